"""Keeps prompts until the scheduler has them, and decides which tokenizer gets the next one.

    add ──> waiting, in the policy's order ──dispatch──> under way to one tokenizer ──done──> sent ──forget──> forgotten
            │  ^        └── remove: the request has ended                                  │
            │  └──────────── lost: the tokenizer has died ─────────────────────────────────┘
            └── suspects wait apart, and are under way alone

This module alone knows which prompts a tokenizer has.

A tokenizer works through its prompts in the order in which it gets them, so the policy cannot reorder prompts under
way. The dispatcher therefore gives a tokenizer few prompts at a time: enough to keep it busy until the gateway reads
its sockets again.

If a tokenizer dies, a prompt that it had may be the reason. So each of its prompts is a suspect: it is sent again when
a tokenizer has nothing else. A prompt that was in work at two deaths has ended both tokenizers, and is not sent again.

The scheduler applies the same policy again to tokenized prompts. The gateway knows only the bytes of a prompt, and
counts four bytes of its message as a token. That is exact for token ids, and close for most text. With the policy
"fair", tenants therefore share the tokenizers by bytes; the scheduler then charges them the real number of tokens.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from operator import attrgetter
from typing import Final, NamedTuple

from ipc.errors import QueueFull
from ipc.identity import name_of
from ipc.messages import GatewayToTokenizer, Tokenize
from workers.gateway.config import GatewayBootstrap
from workers.queueing.drain_rate import DrainRate
from workers.queueing.policies import NO_ROW, Policy, make_policy

BYTES_PER_TOKEN: Final = 4  # of a message; estimated

_num_bytes: Final = attrgetter("num_bytes")
MAX_ENDED: Final = 1_024  # more than a tokenizer's ring has records, so a dead one's last messages have none before
MAX_DEATHS: Final = 2  # of tokenizers while a prompt was in work


class Prompt:
    """A request whose prompt is not tokenized yet, with the attributes that a policy reads."""

    __slots__ = (
        "arrived_ns", "held_bytes", "key", "message", "num_bytes", "num_deaths", "num_prompt", "priority", "rank",
        "tenant", "tokenizer", "was_sent",
    )  # fmt: skip
    row = NO_ROW

    def __init__(self, message: GatewayToTokenizer, frame_bytes: int, held_bytes: int) -> None:
        self.message = message
        self.tokenizer = b""  # identity of the one that has it
        self.was_sent = False  # to that one, as far as we know
        self.num_deaths = 0  # of tokenizers while this prompt was in work
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

    __slots__ = ("ended", "identity", "is_alone", "is_gone", "num_bytes", "prompts")

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.is_alone = False  # whether its one prompt is a suspect
        self.is_gone = False  # whether it cannot be reached any more
        self.num_bytes = 0  # of the prompts' frames
        self.prompts: dict[int, Prompt] = {}  # by key
        self.ended: deque[int] = deque(maxlen=MAX_ENDED)  # keys of prompts that the scheduler has not accepted


class Lost(NamedTuple):
    """What a dead tokenizer had and does not wait again."""

    poisonous: list[Prompt]  # have ended two tokenizers
    ended: list[int]  # keys of requests that had ended before: the scheduler may expect them in vain


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
        self._departures = DrainRate()  # of held bytes
        self.clear()

    def clear(self) -> None:
        """Forget all prompts, because their requests have ended. The gateway takes no requests after this."""
        self.num_bytes = 0  # held by waiting prompts
        self._policy: Policy[Prompt] = make_policy(self._config)
        self._waiting: dict[int, Prompt] = {}  # by key
        self._loads: dict[bytes, TokenizerLoad] = {}  # by the tokenizer's identity
        self._with_room: dict[bytes, TokenizerLoad] = {}
        self._suspects: OrderedDict[int, Prompt] = OrderedDict()  # by key; they are no part of `_waiting`
        self._sent: dict[int, Prompt] = {}  # by key: the scheduler may not have them yet
        self._dead: dict[bytes, TokenizerLoad] = {}  # tokenizers whose prompts are not lost yet, by identity
        self._charged: set[int] = set()  # prompts under way that the policy knows; suspects it does not

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._suspects)

    def check_room(self, held_bytes: int, now_ns: int) -> None:
        """Raise QueueFull if a request of this many bytes would exceed the bound."""
        if self.num_waiting and self.num_bytes + held_bytes > self._max_waiting_bytes:
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
        self._wait(Prompt(message, frame_bytes, held_bytes))

    def _wait(self, prompt: Prompt) -> None:
        self._waiting[prompt.key] = prompt
        self._policy.add(prompt)
        self.num_bytes += prompt.held_bytes

    def is_waiting(self, key: int) -> bool:
        return key in self._waiting or key in self._suspects

    def remove(self, key: int) -> None:
        """The request of a waiting prompt has ended."""
        prompt = self._suspects.pop(key, None)
        if prompt is None:
            prompt = self._waiting.pop(key)
            self._policy.end(prompt)
        self.num_bytes -= prompt.held_bytes

    def accepted(self, key: int) -> None:
        """The scheduler has this prompt: it is never sent again."""
        self._sent.pop(key, None)

    def forget(self, key: int) -> None:
        """The request of a prompt has ended: it is never sent again."""
        prompt = self._sent.pop(key, None)
        if prompt is not None and isinstance(prompt.message, Tokenize):
            load = self._loads.get(prompt.tokenizer) or self._dead[prompt.tokenizer]
            load.ended.append(key)

    def dispatch(self, now_ns: int) -> Iterator[tuple[bytes, GatewayToTokenizer]]:
        """Yield waiting prompts in the policy's order while a tokenizer has room, each with its tokenizer's identity.

        A prompt goes to the tokenizer with the fewest bytes under way. While suspects wait, nothing else is sent.
        """
        while self._suspects:
            load = next((each for each in self._loads.values() if not each.prompts and self._takes_prompts(each)), None)
            if load is None:
                return
            _, prompt = self._suspects.popitem(last=False)
            self.num_bytes -= prompt.held_bytes
            load.is_alone = True
            yield self._send(load, prompt)
        while self._waiting and self._with_room:
            load = min(self._with_room.values(), key=_num_bytes)
            yield self._send(load, self._take_next(now_ns))

    def _take_next(self, now_ns: int) -> Prompt:
        prompt = self._policy.next()
        assert prompt is not None, "prompts wait, and the policy has none"
        self._policy.dequeue(prompt)
        del self._waiting[prompt.key]
        self._charged.add(prompt.key)
        self.num_bytes -= prompt.held_bytes
        self._departures.leave(now_ns, prompt.held_bytes)
        return prompt

    def _send(self, load: TokenizerLoad, prompt: Prompt) -> tuple[bytes, GatewayToTokenizer]:
        load.prompts[prompt.key] = self._sent[prompt.key] = prompt
        load.num_bytes += prompt.num_bytes
        prompt.tokenizer, prompt.was_sent = load.identity, True
        if not self._has_room(load):
            self._with_room.pop(load.identity, None)
        return load.identity, prompt.message

    def done(self, identity: bytes, key: int) -> None:
        """A tokenizer has passed on a prompt, or (key 0) has connected."""
        load = self._loads.get(identity)
        if load is None:
            load = self._loads[identity] = TokenizerLoad(identity)
        prompt = load.prompts.pop(key, None)
        if prompt is not None:
            load.is_alone = False
            load.num_bytes -= prompt.num_bytes
            self._end_in_policy(prompt)
        if self._has_room(load):
            self._with_room[identity] = load

    # Tokenizers die

    def _takes_prompts(self, load: TokenizerLoad) -> bool:
        """Whether a tokenizer can be reached, and the scheduler takes nothing more from dead ones of the same name.

        Before that the scheduler may still clear their ring, which is the ring of this one.
        """
        if load.is_gone or not self._dead:
            return not load.is_gone
        return name_of(load.identity) not in map(name_of, self._dead)

    def unreachable(self, identity: bytes, key: int) -> None:
        """A prompt could not be sent, because its tokenizer has died: it cannot be the reason. `replaced` follows."""
        load = self._loads.get(identity)
        if load is not None:
            load.is_gone = True
            self._with_room.pop(identity, None)
            if key in load.prompts:
                load.prompts[key].was_sent = False

    def replaced(self, identity: bytes) -> None:
        """This tokenizer has died: it gets no more prompts. `lost` says which of its prompts to send again."""
        self._with_room.pop(identity, None)
        load = self._loads.pop(identity, None)
        self._dead[identity] = load or TokenizerLoad(identity)

    def is_replaced(self, identity: bytes) -> bool:
        """Whether this tokenizer has died, and `lost` was not called for it."""
        return identity in self._dead

    def lost(self, identity: bytes) -> Lost:
        """Let the prompts wait again that a dead tokenizer had and the scheduler does not have."""
        load = self._dead.pop(identity)
        in_work = list(load.prompts.values())
        for prompt in in_work:
            self._end_in_policy(prompt)
        received = [prompt for prompt in in_work if prompt.was_sent]
        if received:
            received[0].num_deaths += 1  # prompts are encoded in their order
        self._with_room |= {each.identity: each for each in self._loads.values() if self._has_room(each)}
        prompts = [prompt for prompt in self._sent.values() if prompt.tokenizer == identity]
        return Lost(self._send_again(prompts, received), list(load.ended))

    def lost_all(self) -> set[int]:
        """Let all prompts wait again that tokenizers had: scheduler and tokenizers were replaced.

        Returns the keys of those that were handed over: the scheduler may have had them. They are forgotten.
        """
        in_tokenizers: set[int] = set()
        for load in [*self._loads.values(), *self._dead.values()]:
            in_tokenizers |= load.prompts.keys()
            for prompt in load.prompts.values():
                self._end_in_policy(prompt)
        self._loads, self._with_room, self._dead = {}, {}, {}
        handed_over = self._sent.keys() - in_tokenizers
        for key in handed_over:
            del self._sent[key]
        self._send_again(list(self._sent.values()), [])
        return handed_over

    def _send_again(self, prompts: list[Prompt], suspects: list[Prompt]) -> list[Prompt]:
        ended: list[Prompt] = []
        for prompt in prompts:
            del self._sent[prompt.key]
            prompt.tokenizer = b""
            if prompt.num_deaths >= MAX_DEATHS:
                ended.append(prompt)
            elif prompt.num_deaths or prompt in suspects:
                self._suspects[prompt.key] = prompt
                self.num_bytes += prompt.held_bytes
            else:
                self._wait(prompt)
        return ended

    def _end_in_policy(self, prompt: Prompt) -> None:
        """A prompt is under way no more. A suspect was unknown to the policy."""
        if prompt.key in self._charged:
            self._charged.remove(prompt.key)
            self._policy.end(prompt)

    def _has_room(self, load: TokenizerLoad) -> bool:
        has_room = len(load.prompts) < self._max_under_way and load.num_bytes < self._max_under_way_bytes
        return has_room and not load.is_alone and self._takes_prompts(load)
