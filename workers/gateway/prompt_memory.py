"""How much memory a request takes in the gateway while its prompt waits for a tokenizer."""

from __future__ import annotations

import sys
from typing import Final

from ipc.messages import ClientRequest, DetokenizeQuery, Generate

# Resident memory, rounded up from what each of 100,000 requests of a kind took (CPython 3.11, x86-64).
REQUEST_OVERHEAD_BYTES: Final = 1_664  # of the message, its entries in the tables and its timers
TENANT_OVERHEAD_BYTES: Final = 640  # of a tenant with "fair": each request may have its own
CHAT_OVERHEAD_BYTES: Final = 320  # of the objects that hold a chat's JSON
SAMPLE_OVERHEAD_BYTES: Final = 192  # of each sample of a resumed request, with the gateway's count of its tokens
ITEM_OVERHEAD_BYTES: Final = 80  # of each item of a parameter that is a list or a map

_LISTS: Final = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logit_bias", "logprob_token_ids")


def held_bytes(message: ClientRequest, frame_bytes: int, policy: str) -> int:
    """About how many bytes of memory a request takes while it waits under a policy; rounded up.

    Counts its frame, or its text if that is larger: a string is as wide as its widest character, up to four times the
    frame. Adds the memory of its Python objects, which even the smallest request has.
    """
    overhead = REQUEST_OVERHEAD_BYTES + (TENANT_OVERHEAD_BYTES if policy == "fair" else 0)
    if isinstance(message, DetokenizeQuery):
        return frame_bytes + overhead
    chat, texts, ids = message.chat, [message.prompt or ""], 0
    if isinstance(message, Generate):
        params = message.params
        texts += *params.stop, *params.bad_words
        overhead += sum(len(getattr(params, name) or ()) for name in _LISTS) * ITEM_OVERHEAD_BYTES
        if message.resume is not None:  # its token ids are bytes, which take as much as in the frame
            overhead += len(message.resume.samples) * SAMPLE_OVERHEAD_BYTES
            ids = sum(len(sample.token_ids) for sample in message.resume.samples)
    if chat is not None:
        overhead += CHAT_OVERHEAD_BYTES
        if chat.template is not None:  # JSON is bytes, which take as much as in the frame
            texts.append(chat.template)
    return max(frame_bytes, sum(map(sys.getsizeof, texts)) + ids) + overhead
