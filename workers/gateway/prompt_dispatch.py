"""Keeps prompts until a tokenizer has passed them on, and decides which tokenizer gets the next one.

    add ──> waiting, in the policy's order ──dispatch──> under way to one tokenizer ──done──> forgotten
                     └── remove: the request has ended

This module alone knows which prompts a tokenizer has.

A tokenizer works through its prompts in the order in which it gets them, so the policy cannot reorder prompts under
way. The dispatcher therefore gives a tokenizer few prompts at a time: enough to keep it busy until the gateway reads
its sockets again.

The scheduler applies the same policy again to tokenized prompts. The gateway knows only the bytes of a prompt, and
counts four bytes of its message as a token. That is exact for token ids, and close for most text. With the policy
"fair", tenants therefore share the tokenizers by bytes; the scheduler then charges them the real number of tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

from ipc.errors import QueueFull
from ipc.messages import ClientRequest, DetokenizeQuery, GatewayToTokenizer, Generate
from workers.gateway.config import GatewayBootstrap
from workers.queueing.drain_rate import DrainRate
from workers.queueing.policies import NO_ROW, Policy, make_policy

BYTES_PER_TOKEN: Final = 4  # of a message; estimated

# Resident memory, rounded up from what each of 100,000 requests of a kind took (CPython 3.11, x86-64).
REQUEST_OVERHEAD_BYTES: Final = 1_664  # of the message, its entries in the tables and its timers
TENANT_OVERHEAD_BYTES: Final = 640  # of a tenant with "fair": each request may have its own
CHAT_OVERHEAD_BYTES: Final = 320  # of the objects that hold a chat's JSON
SAMPLE_OVERHEAD_BYTES: Final = 160  # of each sample of a resumed request, with the gateway's count of its tokens
ITEM_OVERHEAD_BYTES: Final = 80  # of each item of a parameter that is a list or a map

_LISTS: Final = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logit_bias", "logprob_token_ids")
_num_bytes: Final = attrgetter("num_bytes")


class Prompt:
    """A request whose prompt is not tokenized yet, with the attributes that a policy reads."""

    __slots__ = (
        "arrived_ns", "held_bytes", "key", "message", "num_bytes", "num_prompt", "priority", "rank", "tenant",
    )  # fmt: skip
    row = NO_ROW

    def __init__(self, message: GatewayToTokenizer, frame_bytes: int, held_bytes: int) -> None:
        self.message: GatewayToTokenizer | None = message  # None: it has been sent to a tokenizer
        self.key = message.key
        self.priority = message.scheduling.priority
        self.tenant = message.scheduling.tenant
        self.arrived_ns = message.arrived_ns
        self.num_bytes = frame_bytes
        self.num_prompt = max(1, frame_bytes // BYTES_PER_TOKEN)
        self.held_bytes = held_bytes
        self.rank = 0


class TokenizerLoad:
    """The prompts under way to one tokenizer."""

    __slots__ = ("identity", "num_bytes", "prompts")

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.num_bytes = 0  # of the prompts' frames
        self.prompts: dict[int, Prompt] = {}  # by key


class PromptDispatcher:
    """Prompts that wait for a tokenizer, and the load of each connected tokenizer.

    `frontend.max_queued_bytes` bounds the `held_bytes` of the waiting prompts; a single one may be larger.
    `tokenizer_window` and `tokenizer_window_bytes` bound the prompts under way to one tokenizer; the prompt that
    reaches the bound in bytes is the last one.
    """

    def __init__(self, bootstrap: GatewayBootstrap) -> None:
        self._max_waiting_bytes = bootstrap.frontend.max_queued_bytes
        self._max_under_way = bootstrap.tokenizer_window
        self._max_under_way_bytes = bootstrap.tokenizer_window_bytes
        self._config = bootstrap.policy
        self._overhead_bytes = REQUEST_OVERHEAD_BYTES + (TENANT_OVERHEAD_BYTES if self._config.policy == "fair" else 0)
        self._departures = DrainRate()  # of held bytes
        self.clear()

    def clear(self) -> None:
        """Forget all prompts, because their requests have ended. The gateway takes no requests after this."""
        self.num_bytes = 0  # held by waiting prompts
        self._policy: Policy[Prompt] = make_policy(self._config)
        self._waiting: dict[int, Prompt] = {}  # by key
        self._loads: dict[bytes, TokenizerLoad] = {}  # by the tokenizer's identity
        self._with_room: dict[bytes, TokenizerLoad] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def held_bytes(self, message: ClientRequest, frame_bytes: int) -> int:
        """About how many bytes of memory a request takes while it waits; rounded up.

        Counts its frame, or its text if that is larger: a string is as wide as its widest character, up to four times
        the frame. Adds the memory of its Python objects, which even the smallest request has.
        """
        overhead, ids = self._overhead_bytes, 0
        if isinstance(message, DetokenizeQuery):
            return frame_bytes + overhead
        chat, texts = message.chat, [message.prompt or ""]
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

    def check_room(self, held_bytes: int, now_ns: int) -> None:
        """Raise QueueFull if a request of this many bytes would exceed the bound."""
        if self._waiting and self.num_bytes + held_bytes > self._max_waiting_bytes:
            retry_s = self._departures.retry_after_s(self.num_bytes, now_ns)
            raise QueueFull(
                f"requests that wait for a tokenizer hold {self.num_bytes} bytes; the {held_bytes} bytes of this one "
                f"would exceed frontend.max_queued_bytes ({self._max_waiting_bytes}): try again in {retry_s:g} s",
                retry_s,
            )

    def add(self, message: GatewayToTokenizer, frame_bytes: int, held_bytes: int) -> None:
        """A prompt begins to wait. `frame_bytes` is the length of the client's message."""
        if not self._waiting:
            self._departures.begin(message.arrived_ns)
        prompt = self._waiting[message.key] = Prompt(message, frame_bytes, held_bytes)
        self._policy.add(prompt)
        self.num_bytes += held_bytes

    def remove(self, key: int) -> None:
        """The request of a waiting prompt has ended."""
        prompt = self._waiting.pop(key)
        self.num_bytes -= prompt.held_bytes
        self._policy.end(prompt)

    def dispatch(self, now_ns: int) -> Iterator[tuple[bytes, GatewayToTokenizer]]:
        """Yield waiting prompts in the policy's order while a tokenizer has room, each with its tokenizer's identity.

        A prompt goes to the tokenizer with the fewest bytes under way.
        """
        while self._waiting and self._with_room:
            load = min(self._with_room.values(), key=_num_bytes)
            yield load.identity, self._send_next(load, now_ns)

    def _send_next(self, load: TokenizerLoad, now_ns: int) -> GatewayToTokenizer:
        prompt = self._policy.next()
        assert prompt is not None, "prompts wait, and the policy has none"
        self._policy.dequeue(prompt)
        del self._waiting[prompt.key]
        self.num_bytes -= prompt.held_bytes
        self._departures.leave(now_ns, prompt.held_bytes)
        load.prompts[prompt.key] = prompt
        load.num_bytes += prompt.num_bytes
        if not self._has_room(load):
            del self._with_room[load.identity]
        message, prompt.message = prompt.message, None
        assert message is not None, f"request {prompt.key} waits, and was sent to a tokenizer"
        return message

    def done(self, identity: bytes, key: int) -> None:
        """A tokenizer has passed on a prompt, or (key 0) has connected."""
        load = self._loads.get(identity)
        if load is None:
            load = self._loads[identity] = TokenizerLoad(identity)
        prompt = load.prompts.pop(key, None)
        if prompt is not None:
            load.num_bytes -= prompt.num_bytes
            self._policy.end(prompt)
        if self._has_room(load):
            self._with_room[identity] = load

    def _has_room(self, load: TokenizerLoad) -> bool:
        return len(load.prompts) < self._max_under_way and load.num_bytes < self._max_under_way_bytes
