"""The scheduler as it would be written if nothing had to be fast: lists, and a loop for everything.

It hears of the same events as the real one and must decide the same: which sequences run in each step and with how many
tokens, which are admitted with which cached blocks, which are preempted, and how each request ends. A block is an
object; its name, if it has one, is the tuple of all tokens up to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MAX_ADMISSIONS = 64


@dataclass(eq=False)
class Block:
    """One KV block. `name` is not () while it can be found."""

    name: tuple[int, ...] = ()
    users: int = 0


@dataclass(eq=False)
class Sequence:
    """A request, from its arrival on. `known` are its prompt and the tokens that results have brought."""

    key: int
    known: list[int]
    max_len: int
    priority: int
    tenant: str
    arrived_ns: int
    timers: list[tuple[int, int, str]]
    leader: Sequence | None = None  # sample 0, if this is another of a prompt with a block that it may find
    has_followers: bool = False  # and this is their leader
    scored: int = 0  # tokens of the prompt that its log-probabilities follow, until all of them are planned
    num_prompt: int = 0
    rank: int = 0
    planned: int = 0
    computed: int = 0
    progress: int = 0
    blocks: list[Block] = field(default_factory=list)
    num_offered: int = 0
    offers: bool = True
    has_row: bool = False
    last_ticket: int = 0
    end: str = ""


class Turns:
    """Computes deficit round robin, one turn at a time."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self.order: list[str] = []
        self.credit: dict[str, int] = {}
        self.begun = ""
        self.pinned: Sequence | None = None

    def next(self, waiting: list[Sequence]) -> Sequence:
        while self.pinned is None:
            tenant = self.order[0]
            if self.begun != tenant:
                self.begun = tenant
                self.credit[tenant] += self.quantum
            if self.credit[tenant] > 0:
                self.pinned = next(sequence for sequence in waiting if sequence.tenant == tenant)
            else:
                self.order.append(self.order.pop(0))
                self.begun = ""
        return self.pinned


class SchedulerModel:
    """One event a method. `max_blocks` of a sequence bound the cached blocks that one step's record can carry."""

    def __init__(
        self, *, policy: str, num_rows: int, budget: int, size: int, num_blocks: int, max_blocks: int,
        max_waiting: int, max_waiting_tokens: int | None, aging_ns: int, quantum: int,
        max_scored: int,
    ) -> None:  # fmt: skip
        self.policy, self.num_rows, self.budget, self.size, self.max_blocks = policy, num_rows, budget, size, max_blocks
        self.max_waiting, self.max_waiting_tokens, self.aging_ns = max_waiting, max_waiting_tokens, aging_ns
        self.turns = Turns(quantum)
        self.max_scored = max_scored  # tokens in one step of prompts with log-probabilities
        self.num_scored_left = 0  # of them in the step that is being planned
        self.free = [Block() for _ in range(num_blocks)]
        self.idle: list[Block] = []  # the longest idle first
        self.sequences: list[Sequence] = []  # all open ones, in order of arrival
        self.waiting: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.running: list[Sequence] = []
        self.ended_rows: list[Sequence] = []  # that steps in flight still name
        self.in_flight: list[tuple[int, list[tuple[Sequence, bool]]]] = []
        self.ticket = self.applied = self.num_arrived = self.num_admitted = 0
        self.cached: dict[int, int] = {}
        self.num_preemptions = 0
        self.scores: list[tuple[int, int]] = []  # (key, position) of each log-probability that the last step computes
        self.chunk = budget  # prompt tokens beside decodes in the next step

    # Events

    def add(self, samples: list[Sequence]) -> bool:
        """Whether a request is taken, with all its samples."""
        free_rows, tokens = self.num_free_rows(), sum(len(waiting.known) for waiting in self.waiting)
        if len(self.waiting) + len(samples) > self.max_waiting + free_rows:
            return False
        most = self.max_waiting_tokens
        if most is not None and self.waiting and tokens + sum(len(sample.known) for sample in samples) > most:
            return False
        for sample in samples:
            self._enqueue(sample)
        return True

    def _enqueue(self, sequence: Sequence) -> None:
        self.num_arrived += 1
        sequence.planned = sequence.num_prompt = len(sequence.known)
        sequence.rank = self.num_arrived
        if self.policy == "priority":
            sequence.rank = sequence.arrived_ns - sequence.priority * self.aging_ns
        self.sequences.append(sequence)
        self.waiting.append(sequence)
        if sequence.tenant not in self.turns.credit:
            self.turns.credit[sequence.tenant] = 0
        if sequence.tenant not in self.turns.order:
            self.turns.order.append(sequence.tenant)

    def end(self, keys: Iterable[int], reason: str) -> None:
        self._end([sequence for key in keys for sequence in self.sequences if sequence.key == key], reason)

    def expire(self, now_ns: int) -> None:
        due = [timer for sequence in self.sequences for timer in sequence.timers if timer[0] <= now_ns]
        for _, key, reason in sorted(due):
            found = [s for s in self.sequences if s.key == key and not (reason == "queue_timeout" and s.has_row)]
            self._end(found, reason)

    def clear_cache(self) -> None:
        for block in [block for sequence in self.running for block in sequence.blocks] + self.idle:
            block.name = ()
        self.free += self.idle
        self.idle = []
        for sequence in self.sequences:
            sequence.offers = False

    def plan(self) -> list[tuple[int, int, bool]]:
        """(key, tokens, whether one is sampled) of each sequence of the next step; none if nothing can run."""
        while True:
            work, left = self._deal()
            if self._num_wanted(work) <= self.num_free():
                break
            self._preempt()
        for sequence, count in work:
            self._give_blocks(sequence, sequence.computed + count)
        admitted = self._admit(left)
        for sequence, count in admitted:
            self._give_blocks(sequence, sequence.computed + count)
        return self._run(work + admitted)

    def apply(self, token_of: Callable[[int, int], tuple[int, str]]) -> None:
        """Results of the oldest step; `token_of` gives token and end ("" = none) by key and length before it.

        With the end "error" there is no token, and what is cached of the sequence's tokens is forgotten.
        """
        ticket, step = self.in_flight.pop(0)
        finished: list[Sequence] = []
        for sequence, samples in step:
            if samples and not sequence.end:
                token_id, end = token_of(sequence.key, len(sequence.known))
                if end == "error":
                    self._withdraw(sequence)
                else:
                    sequence.known.append(token_id)
                if end:
                    sequence.end = end
                    finished.append(sequence)
        self._end(finished, "")
        self.applied = ticket
        self.ended_rows = [sequence for sequence in self.ended_rows if sequence.last_ticket > ticket]

    # Sizes and capacities

    def num_free(self) -> int:
        return len(self.free) + len(self.idle)

    def num_free_rows(self) -> int:
        return self.num_rows - sum(sequence.has_row for sequence in self.sequences) - len(self.ended_rows)

    def names(self) -> set[tuple[int, ...]]:
        held = [block for sequence in self.running for block in sequence.blocks]
        return {block.name for block in held + self.idle if block.name}

    def _blocks_for(self, num_tokens: int) -> int:
        return (num_tokens + self.size - 1) // self.size

    # Parts of a plan

    def _deal(self) -> tuple[list[tuple[Sequence, int]], int]:
        """Decodes first, then prompts in order, of the budget; beside decodes at most a chunk."""
        left, work = self.budget, []
        self.num_scored_left = self.max_scored
        for is_decode in (True, False):
            if not is_decode and work:
                left = min(left, self.chunk)
            for sequence in self.running:
                wanted = sequence.planned - sequence.computed
                count = self._share(sequence, left, wanted)
                if (wanted == 1) == is_decode and count:
                    work.append((sequence, count))
                    left -= count
                    self.num_scored_left -= count if sequence.scored else 0
        return work, left

    def _share(self, sequence: Sequence, left: int, wanted: int) -> int:
        return min(left, wanted, self.num_scored_left if sequence.scored else wanted)

    def _num_wanted(self, work: list[tuple[Sequence, int]]) -> int:
        """Blocks that the step needs, and blocks reserved for sequences that have not produced a token yet."""
        counts = dict(work)
        wanted = 0
        for sequence in self.running:
            length = max(sequence.computed + counts.get(sequence, 0), sequence.progress)
            wanted += max(0, self._blocks_for(length) - len(sequence.blocks))
        missing = sum(max(0, self._blocks_for(s.computed + n) - len(s.blocks)) for s, n in work)
        return wanted if missing else 0

    def _preempt(self) -> None:
        victim = max((s for s in self.running if s.computed >= s.progress), key=lambda sequence: sequence.rank)
        self.running.remove(victim)
        self._give_up([victim])
        victim.computed = 0
        self.preempted.append(victim)
        self.num_preemptions += 1

    def _next(self) -> Sequence | None:
        def first(sequences: list[Sequence]) -> Sequence | None:
            return min(sequences, key=lambda sequence: (sequence.rank, sequence.key), default=None)

        preempted, waiting = first(self.preempted), None
        if self.waiting and self.num_free_rows():
            waiting = self.turns.next(self.waiting) if self.policy == "fair" else first(self.waiting)
        if self.policy == "priority" and preempted and waiting and waiting.rank < preempted.rank:
            return waiting
        return preempted or waiting

    def _admit(self, left: int) -> list[tuple[Sequence, int]]:
        admitted: list[tuple[Sequence, int]] = []
        room, most_found = self.num_free(), self.max_blocks
        if any(sequence.scored for sequence in self.running):  # only then running prompts leave tokens to admit with
            room -= sum(max(0, self._blocks_for(s.progress) - len(s.blocks)) for s in self.running)
        while left > 0 and len(admitted) < min(self.num_rows, MAX_ADMISSIONS):
            sequence = self._next()
            if sequence is None:
                break
            leader = sequence.leader
            if leader in self.running and leader.offers and leader.num_offered < leader.num_prompt // self.size:
                break
            num_known = sequence.planned
            share = self._share(sequence, left, left)
            if not share:
                break
            found = self._find(sequence.known[: self.size * ((num_known - 1) // self.size)])
            if sequence.scored:
                found = []
            num_cached = len(found) * self.size
            needed = self._blocks_for(num_known) - sum(block.users > 0 for block in found)
            num_steps = -(-(num_known - num_cached) // share)
            others = len(self.running)
            if needed + others * self._blocks_for(num_steps) > room or len(found) > most_found:
                break
            if sequence in self.preempted:
                self.preempted.remove(sequence)
            else:
                sequence.has_row = True
                if num_cached:
                    self.cached[sequence.key] = num_cached
                self.turns.credit[sequence.tenant] -= len(sequence.known)
                self._stop_waiting(sequence)
                if self.policy == "fair":
                    self.num_admitted += 1
                    sequence.rank = self.num_admitted
            for block in found:
                block.users += 1
                if block in self.idle:
                    self.idle.remove(block)
            sequence.blocks = found
            sequence.computed, sequence.progress = num_cached, num_known
            sequence.num_offered, sequence.offers = len(found), True
            self.running.append(sequence)
            admitted.append((sequence, min(share, num_known - num_cached)))
            left -= admitted[-1][1]
            self.num_scored_left -= admitted[-1][1] if sequence.scored else 0
            room -= needed
            most_found -= len(found)
            if sequence.has_followers and admitted[-1][1] == num_known - num_cached:
                self._give_blocks(sequence, num_known)
                self._offer(sequence, sequence.num_prompt // self.size)
        return admitted

    def _find(self, tokens: list[int]) -> list[Block]:
        found = []
        blocks = self.idle + [block for sequence in self.running for block in sequence.blocks]
        for end in range(self.size, len(tokens) + 1, self.size):
            block = next((block for block in blocks if block.name == tuple(tokens[:end])), None)
            if block is None:
                break
            found.append(block)
        return found

    def _give_blocks(self, sequence: Sequence, length: int) -> None:
        while len(sequence.blocks) < self._blocks_for(length):
            if not self.free:
                self.free.append(self.idle.pop(0))
                self.free[-1].name = ()
            block = self.free.pop()
            block.users = 1
            sequence.blocks.append(block)

    def _offer(self, sequence: Sequence, end: int) -> None:
        """Offer blocks that this step fills to sequences that join the same step later."""
        names = self.names()
        for i in range(sequence.num_offered, end):
            name = tuple(sequence.known[: (i + 1) * self.size])
            if name not in names:
                sequence.blocks[i].name = name
                names.add(name)
        sequence.num_offered = max(end, sequence.num_offered)

    def _run(self, work: list[tuple[Sequence, int]]) -> list[tuple[int, int, bool]]:
        if not work:
            return []
        self.ticket += 1
        self.scores = []
        step, offered = [], []
        for sequence, count in work:
            self.scores += [
                (sequence.key, position)
                for position in range(sequence.computed + 1, sequence.computed + count + 1)
                if position <= sequence.scored
            ]
            sequence.computed += count
            if sequence.computed >= sequence.scored:
                sequence.scored = 0
            samples = sequence.computed == sequence.planned
            sequence.planned += samples
            sequence.last_ticket = self.ticket
            self.turns.credit[sequence.tenant] -= samples
            step.append((sequence, samples))
            filled = min(sequence.computed, len(sequence.known)) // self.size
            if sequence.offers:
                for i in range(sequence.num_offered, filled):
                    offered.append((sequence.blocks[i], tuple(sequence.known[: (i + 1) * self.size])))
                sequence.num_offered = max(filled, sequence.num_offered)
        names = self.names()
        for block, name in reversed(offered):
            if name not in names:
                block.name = name
                names.add(name)
        self.in_flight.append((self.ticket, step))
        out = [sequence for sequence, _ in work if sequence.planned == sequence.max_len]
        self.running = [sequence for sequence in self.running if sequence not in out]
        self._give_up(out)
        return [(sequence.key, count, samples) for (sequence, count), (_, samples) in zip(work, step, strict=True)]

    # Ends

    def _end(self, sequences: list[Sequence], reason: str) -> None:
        running = [sequence for sequence in sequences if sequence in self.running]
        for sequence in sequences:
            sequence.end = sequence.end or reason
            self.sequences.remove(sequence)
            if sequence in self.waiting:
                self._stop_waiting(sequence)
            elif sequence.last_ticket > self.applied:
                self.ended_rows.append(sequence)
            if sequence in self.preempted:
                self.preempted.remove(sequence)
            if not any(other.tenant == sequence.tenant for other in self.sequences):
                del self.turns.credit[sequence.tenant]
        self.running = [sequence for sequence in self.running if sequence not in sequences]
        self._give_up(running)

    def _withdraw(self, sequence: Sequence) -> None:
        for block in [block for other in self.running for block in other.blocks] + self.idle:
            if block.name == tuple(sequence.known[: len(block.name)]):
                block.name = ()
        self.free += [block for block in self.idle if not block.name]
        self.idle = [block for block in self.idle if block.name]

    def _stop_waiting(self, sequence: Sequence) -> None:
        turns, tenant = self.turns, sequence.tenant
        self.waiting.remove(sequence)
        if turns.pinned is sequence:
            turns.pinned = None
        if not any(other.tenant == tenant for other in self.waiting):
            turns.order.remove(tenant)
            turns.credit[tenant] = min(0, turns.credit[tenant])
            if turns.begun == tenant:
                turns.begun = ""

    def _give_up(self, sequences: list[Sequence]) -> None:
        """Free blocks, the last one of a sequence first. A block that several free counts at its last place."""
        given = [block for sequence in sequences for block in reversed(sequence.blocks)]
        for block in given:
            block.users -= 1
        for i, block in enumerate(given):
            if block.users == 0 and block not in given[i + 1 :]:
                (self.idle if block.name else self.free).append(block)
        for sequence in sequences:
            sequence.blocks = []
