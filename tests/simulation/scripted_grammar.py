"""Grammars for the scripted scheduler, and grammar workers that answer in time, late, wrongly or not at all.

A toy grammar allows tokens by chance, depending on its key and on every token so far; sometimes it allows none. The
scheduler's side decides each record's fate when the step is planned, so the outcome of every sequence is known.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from ipc.mask_records import MaskRecord
from ipc.records import NO_TOKEN, SamplerVariant, StepRecord, StepShape
from ipc.ring import Ring
from tests.simulation.scripted import ScriptedRequest


class Fate(enum.Enum):
    """What becomes of a mask record. All but the first close its masks."""

    IN_TIME = enum.auto()
    LATE = enum.auto()  # published after its step has gone on without it
    OTHER_STEP = enum.auto()
    OTHER_COUNT = enum.auto()
    NEVER = enum.auto()  # its worker has died, and so do all later records of this worker

    @property
    def comes_before_its_step(self) -> bool:
        return self not in (Fate.LATE, Fate.NEVER)


def allowed_tokens(grammar: int, tokens: Sequence[int], vocab_size: int) -> set[int]:
    """The tokens that a toy grammar allows after these."""
    random = Random(f"{grammar} {list(tokens)}")
    share = random.choice((0.1, 0.3, 0.6)) if random.random() > 0.05 else 0.0
    return {token for token in range(vocab_size) if random.random() < share}


def mask_of(allowed: set[int], num_words: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Bit t % 32 of word t // 32 is set for each allowed token t."""
    words = np.zeros(num_words, np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


@dataclass
class MaskRequest:
    """The masks that a step needs of one worker. `keys` and `tokens` are known when it is sent."""

    worker: int
    step: int
    fate: Fate
    requests: list[ScriptedRequest]
    num_known: list[int]  # tokens that each sequence has before this step's
    keys: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_published: bool = False


class GrammarWorker:
    """Advances a matcher by each token that it is sent, and publishes masks. `num_gone_on`: steps that need no masks
    any more."""

    def __init__(
        self, random: Random, shape: StepShape, ring: Ring[MaskRecord], num_gone_on: Callable[[], int]
    ) -> None:
        self._random = random
        self._shape = shape
        self._ring = ring
        self._num_gone_on = num_gone_on
        self._matchers: dict[int, list[int]] = {}
        self.inbox: deque[MaskRequest] = deque()
        self.is_dead = False

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do and each of its records has been released."""
        return (self.is_dead or not self.inbox) and not self._ring.num_unreleased

    def act(self) -> bool:
        """Answer the oldest request, if it is time."""
        if self.is_dead or not self.inbox:
            return False
        request = self.inbox[0]
        if request.fate is Fate.NEVER:
            self.is_dead = True
            return True
        if request.fate is Fate.LATE and (self._num_gone_on() < request.step or self._random.random() < 0.7):
            return False
        if self._ring.num_free() < 1:
            return False
        self.inbox.popleft()
        self._write(self._ring.claim(), request)
        self._ring.publish()
        request.is_published = True
        return True

    def _write(self, record: MaskRecord, request: MaskRequest) -> None:
        record.step[0] = request.step + (self._random.choice((-1, 1)) if request.fate is Fate.OTHER_STEP else 0)
        record.num_masks[0] = len(request.keys) + (request.fate is Fate.OTHER_COUNT)
        record.masks[:] = self._random.choice((0, -1))  # what lies beyond its masks, and masks that do not matter
        for i, (key, token) in enumerate(zip(request.keys, request.tokens, strict=True)):
            if key:
                seen = self._matchers.setdefault(key, [])
                seen += [] if token == NO_TOKEN else [token]
                record.masks[i] = mask_of(allowed_tokens(key, seen, self._shape.vocab_size), self._shape.mask_words)


class ScriptedGrammar:
    """The scheduler's side. Asks for a step's masks when the results of all steps before it are applied, and sometimes
    earlier, if no result in flight matters to them.

    Args:
        reliable: every record comes in time.
    """

    def __init__(
        self, random: Random, shape: StepShape, workers: Sequence[GrammarWorker], *, reliable: bool = False
    ) -> None:
        self._random = random
        self._shape = shape
        self._workers = workers
        self._reliable = reliable
        self._dead = [False] * len(workers)  # from the newest planned step on
        self._num_planned = [0] * len(workers)  # mask records of each
        self._unsent: deque[MaskRequest] = deque()
        self._planned: dict[int, list[MaskRequest]] = {}

    def plan(self, record: StepRecord, step: int, sampling: Sequence[tuple[int, ScriptedRequest]]) -> None:
        """Write what the step owes. `sampling`: each sequence of the step that samples, with its place."""
        record.mask_ticket[:] = record.num_masks[:] = 0
        record.seq_mask[:] = 1 << 20  # beyond the step's sequences: leftovers
        record.seq_mask[: record.num_seqs[0]] = -1
        self._planned[step] = []
        start = 0
        for worker in range(len(self._workers)):
            mine = [(i, request) for i, request in sampling if request.grammar and request.worker == worker]
            if not mine:
                continue
            self._random.shuffle(mine)
            self._num_planned[worker] += 1
            record.mask_ticket[worker], record.num_masks[worker] = self._num_planned[worker], len(mine)
            record.variant[0] = SamplerVariant.ADJUSTED
            for mask, (i, _) in enumerate(mine, start=start):
                record.seq_mask[i] = mask
            start += len(mine)
            self._add(worker, step, [request for _, request in mine])

    def send_through(self, step: int) -> None:
        """The results of all steps before `step` are applied."""
        while self._unsent and self._unsent[0].step <= step:
            self._send(self._unsent.popleft())

    def send_early(self) -> None:
        for request in list(self._unsent):
            known = [len(asked.tokens) == n for asked, n in zip(request.requests, request.num_known, strict=True)]
            is_next = next(other for other in self._unsent if other.worker == request.worker) is request
            if all(known) and is_next and self._random.random() < 0.5:
                self._unsent.remove(request)
                self._send(request)

    def is_waited_for_in_vain(self, step: int) -> bool:
        """Whether the step lacks masks, and none of the missing ones will come before it goes on."""
        missing = [request.fate for request in self._planned[step] if not request.is_published]
        return bool(missing) and not any(fate.comes_before_its_step for fate in missing)

    def _add(self, worker: int, step: int, requests: list[ScriptedRequest]) -> None:
        fate = Fate.IN_TIME
        if not self._reliable and self._random.random() < 0.15:
            fate = self._random.choice(list(Fate))
        self._dead[worker] |= fate is Fate.NEVER
        if self._dead[worker]:
            fate = Fate.NEVER
        num_known = [request.num_planned - len(request.prompt) for request in requests]
        for request, num in zip(requests, num_known, strict=True):
            if fate is not Fate.IN_TIME:
                request.closed_at = num if request.closed_at is None else request.closed_at
        mask_request = MaskRequest(worker, step, fate, requests, num_known)
        self._unsent.append(mask_request)
        self._planned[step].append(mask_request)

    def _send(self, mask_request: MaskRequest) -> None:
        for request, num_known in zip(mask_request.requests, mask_request.num_known, strict=True):
            unseen = request.tokens[request.num_shown : num_known]
            assert request.is_done or len(unseen) <= 1, "a worker is two tokens behind"
            mask_request.keys.append(0 if request.is_done else request.grammar)
            mask_request.tokens.append(NO_TOKEN if request.is_done or not unseen else unseen[0])
            request.num_shown = num_known
        self._workers[mask_request.worker].inbox.append(mask_request)
