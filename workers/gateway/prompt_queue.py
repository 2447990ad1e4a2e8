"""Requests that wait for a tokenizer, in the order of the policy, and how much memory they hold.

The policy is the scheduler's, which applies it again to tokenized prompts. Here only the bytes of a prompt are known,
and four bytes of its message count as a token: that is exact for token ids, and close for most text. So with "fair"
tenants share the tokenizers by bytes; the scheduler then charges them the real number of tokens.
"""

from __future__ import annotations

import sys
from typing import Final

from ipc.errors import QueueFull
from ipc.messages import Generate, Tokenize
from workers.queueing.drain_rate import DrainRate
from workers.queueing.policies import NO_ROW, Policy, PolicyConfig, make_policy

BYTES_PER_TOKEN: Final = 4  # of a message; estimated

# Resident memory, rounded up from what 100,000 requests of a kind took each (CPython 3.11, x86-64).
REQUEST_OVERHEAD_BYTES: Final = 1_408  # of the message, its entries in the tables and its timers
TENANT_OVERHEAD_BYTES: Final = 640  # of a tenant with "fair": each request may have its own
ITEM_OVERHEAD_BYTES: Final = 80  # of each turn of a chat, stop string and stop token


class Prompt:
    """A request before its prompt is tokenized, as a policy sees it."""

    __slots__ = (
        "arrived_ns", "held_bytes", "key", "message", "num_bytes", "num_prompt", "priority", "rank", "tenant",
    )  # fmt: skip
    row = NO_ROW

    def __init__(self, message: Tokenize, frame_bytes: int, held_bytes: int) -> None:
        self.message: Tokenize | None = message  # None: a tokenizer has it
        self.key = message.key
        self.priority = message.scheduling.priority
        self.tenant = message.scheduling.tenant
        self.arrived_ns = message.arrived_ns
        self.num_bytes = frame_bytes
        self.num_prompt = max(1, frame_bytes // BYTES_PER_TOKEN)
        self.held_bytes = held_bytes
        self.rank = 0


class PromptQueue:
    """Prompts by key. `max_bytes` bounds what the waiting ones hold, in `held_bytes`; one alone may be larger."""

    def __init__(self, max_bytes: int, policy: PolicyConfig) -> None:
        self._max_bytes = max_bytes
        self._config = policy
        self._overhead_bytes = REQUEST_OVERHEAD_BYTES + (TENANT_OVERHEAD_BYTES if policy.policy == "fair" else 0)
        self._departures = DrainRate()  # of held bytes
        self.clear()

    def clear(self) -> None:
        self.num_bytes = 0
        self._policy: Policy[Prompt] = make_policy(self._config)
        self._prompts: dict[int, Prompt] = {}  # those that wait, and those that a tokenizer has

    def __len__(self) -> int:
        return len(self._policy)

    def held_bytes(self, message: Generate, frame_bytes: int) -> int:
        """About how many bytes of memory a request takes while it waits; rounded up.

        Counts its frame, or its text if that is larger: a string is as wide as its widest character, up to four times
        the frame. Adds the memory of its Python objects, which even the smallest request has.
        """
        params, chat = message.params, message.chat or []
        texts = [message.prompt or "", *params.stop]
        for turn in chat:
            texts += turn.role, turn.content
        num_items = len(chat) + len(params.stop) + len(params.stop_token_ids)
        content = max(frame_bytes, sum(map(sys.getsizeof, texts)))
        return content + num_items * ITEM_OVERHEAD_BYTES + self._overhead_bytes

    def check_room(self, num_bytes: int, now_ns: int) -> None:
        """Raise QueueFull if a request of this many bytes would exceed the bound."""
        if len(self) and self.num_bytes + num_bytes > self._max_bytes:
            retry_s = self._departures.retry_after_s(self.num_bytes, now_ns)
            raise QueueFull(
                f"requests that wait for a tokenizer hold {self.num_bytes} bytes; this one's {num_bytes} would exceed "
                f"frontend.max_queued_bytes ({self._max_bytes}): try again in {retry_s:g} s",
                retry_s,
            )

    def add(self, message: Tokenize, frame_bytes: int, held_bytes: int) -> None:
        """A prompt begins to wait. `frame_bytes` is the length of its message."""
        if not len(self):
            self._departures.begin(message.arrived_ns)
        prompt = self._prompts[message.key] = Prompt(message, frame_bytes, held_bytes)
        self._policy.add(prompt)
        self.num_bytes += held_bytes

    def take_next(self, now_ns: int) -> tuple[Tokenize, int]:
        """The message of the next prompt, for a tokenizer, and the length of its frame. There must be one."""
        prompt = self._policy.next()
        assert prompt is not None, "no prompt waits"
        assert prompt.message is not None, f"request {prompt.key} waits and a tokenizer has it"
        self._policy.dequeue(prompt)
        message, prompt.message = prompt.message, None
        self.num_bytes -= prompt.held_bytes
        self._departures.leave(now_ns, prompt.held_bytes)
        return message, prompt.num_bytes

    def end(self, key: int) -> None:
        """A prompt has left: its request ended while it waited, or a tokenizer has passed it on."""
        prompt = self._prompts.pop(key, None)
        if prompt is None:
            return
        if prompt.message is not None:
            self.num_bytes -= prompt.held_bytes
        self._policy.end(prompt)
