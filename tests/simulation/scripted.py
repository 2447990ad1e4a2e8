"""A scheduler small enough to be read at once, with chance in place of policy, and with faults to order.

It chunks prompts, interleaves them with decodes, preempts, lets rows wait for their last step before it gives them on,
and takes prompts from either kind of prompt ring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import numpy as np

from ipc.long_values import LONG_COLUMNS, encode_long_values
from ipc.record_layout import declared_fields
from ipc.records import (
    NO_TOKEN,
    PROMPT_RECORD_TOKENS,
    AdmittedColumns,
    Fill,
    FinishCode,
    PromptRecord,
    ResultRecord,
    SamplerVariant,
    StepRecord,
    StepShape,
)
from ipc.ring import Ring


@dataclass
class ScriptedRequest:
    """One request. `num_computed` and `num_planned` speak of the state after every planned step."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    end_ids: tuple[int, ...] = ()
    ring: int = 0  # where its ids come from; 0: the scheduler uploads them
    grammar: int = 0  # 0 = none
    worker: int = 0  # the grammar worker that has its matcher
    row: int = -1
    num_computed: int = 0
    num_planned: int = 0
    blocks: list[int] = field(default_factory=list)
    last_ticket: int = 0
    has_ids: bool = False  # its row has been given its prompt
    tokens: list[int] = field(default_factory=list)  # tokens from applied results
    adjustments: dict[str, Any] = field(default_factory=dict)  # as `plain_adjustments.by_definition` takes them
    finish: FinishCode = FinishCode.RUNNING
    num_shown: int = 0  # tokens that the grammar worker has been sent
    closed_at: int | None = None  # the first of its tokens whose mask counts as closed
    wants_prompt: bool = False  # the log-probabilities of its prompt
    num_scored: int = 0  # tokens of the prompt whose followers' log-probabilities are planned
    prompt_logprobs: list[float] = field(default_factory=list)  # from applied results
    prompt_top_ids: list[list[int]] = field(default_factory=list)  # the likeliest tokens there

    @property
    def is_done(self) -> bool:
        return self.finish != FinishCode.RUNNING


class Masks(Protocol):
    """Plans the masks of steps and asks for them: see scripted_grammar.py."""

    def plan(self, record: StepRecord, step: int, sampling: Sequence[tuple[int, ScriptedRequest]]) -> None: ...

    def send_through(self, step: int) -> None: ...

    def send_early(self) -> None: ...


class ScriptedScheduler:
    """Plans what chance wants. With `recycle_early`, a row goes to the next request while steps in flight name it."""

    def __init__(
        self,
        random: Random,
        shape: StepShape,
        num_blocks: int,
        rings: Sequence[Ring[PromptRecord]],
        *,
        recycle_early: bool = False,
        masks: Masks | None = None,
    ) -> None:
        self._random = random
        self._masks = masks
        self._shape = shape
        self._rings = rings
        self._recycle_early = recycle_early
        self._free_blocks = list(range(num_blocks))
        self._free_rows = list(range(shape.max_num_seqs))
        self._retired: list[ScriptedRequest] = []  # their rows still occur in steps in flight
        self._in_flight: deque[tuple[list[tuple[ScriptedRequest, bool]], list[tuple[int, int]]]] = deque()
        self._scored: deque[list[ScriptedRequest]] = deque()  # of each step in flight: whose prompt each position is of
        self._ticket = 0
        self._applied = 0
        self.waiting: deque[ScriptedRequest] = deque()
        self.running: list[ScriptedRequest] = []

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running or self._in_flight)

    def plan(self, record: StepRecord) -> bool:
        budget = self._shape.max_num_batched_tokens
        planned: list[tuple[ScriptedRequest, int]] = []
        admitted: list[ScriptedRequest] = []
        uploads: list[tuple[int, int]] = []  # (ring, ticket) to be released with this step
        appends: list[tuple[int, int, int]] = []
        for request in list(self.running):
            is_back = request.has_ids and request.num_computed == 0 and not request.blocks
            if not self._random.random() < 0.85:
                if request.blocks and self._random.random() < 0.3:
                    self._preempt(request)
                continue
            count = self._plan_tokens(request, budget, appends)
            if count:
                budget -= count
                planned.append((request, count))
                if is_back:
                    self._admit(record, len(admitted), request, 0, 0, 0)
                    admitted.append(request)
        while self.waiting and self._free_rows and budget:
            request = self.waiting[0]
            long_values = np.frombuffer(encode_long_values(self._shape, _long_columns(request.adjustments)), np.int32)
            num_uploads = (request.ring == 0) - (-len(long_values) // PROMPT_RECORD_TOKENS)
            if self._rings[0].num_free() < num_uploads:
                break
            request.row = self._free_rows.pop()
            request.num_planned = len(request.prompt)
            count = self._plan_tokens(request, budget, appends)
            if not count:
                self._free_rows.append(request.row)
                break
            budget -= count
            self.waiting.popleft()
            self.running.append(request)
            ticket = self._prompt_ticket(request)
            uploads.append((request.ring, ticket))
            self._admit(record, len(admitted), request, request.ring, ticket, len(request.prompt))
            if len(long_values):
                record.admit.long_ticket[len(admitted)] = self._upload(long_values)
                uploads.append((0, self._rings[0].next_ticket - 1))
            request.has_ids = True
            admitted.append(request)
            planned.append((request, count))
        if not planned:
            return False
        self._ticket += 1
        self._random.shuffle(planned)
        self._write(record, planned, appends, len(admitted))
        self._score_prompts(record, planned)
        sequences = []
        for request, count in planned:
            request.num_computed += count
            samples = request.num_computed == request.num_planned
            request.num_planned += samples
            request.last_ticket = self._ticket
            sequences.append((request, samples))
            if request.num_planned == len(request.prompt) + request.max_tokens:
                self._retire(request)  # planned out
        self._in_flight.append((sequences, uploads))
        self._ask_for_masks()
        return True

    def apply(self, result: ResultRecord) -> None:
        self._applied += 1
        sequences, uploads = self._in_flight.popleft()
        for i, request in enumerate(self._scored.popleft()):
            request.prompt_logprobs.append(float(result.prompt_logprob[i]))
            request.prompt_top_ids.append(result.prompt_top_ids[i].tolist())
        for i, (request, samples) in enumerate(sequences):
            if not samples or request.is_done:
                continue
            token, finish = int(result.token_ids[i]), FinishCode(int(result.finish[i]))
            if token != NO_TOKEN:
                request.tokens.append(token)
            assert (finish == FinishCode.LENGTH) <= (len(request.tokens) == request.max_tokens), "ended too early"
            request.finish = finish
            if request.is_done and request in self.running:
                self._retire(request)
        for ring, ticket in uploads:
            self._rings[ring].release_through(ticket)
        for request in [r for r in self._retired if r.last_ticket <= self._applied]:
            self._retired.remove(request)
            self._free_rows.append(request.row)
        self._ask_for_masks()

    def _ask_for_masks(self) -> None:
        if self._masks is not None:
            self._masks.send_through(self._applied + 1)
            self._masks.send_early()

    def _plan_tokens(self, request: ScriptedRequest, budget: int, appends: list[tuple[int, int, int]]) -> int:
        """Take a chunk of at most `budget` tokens and the blocks it needs. Returns its tokens; 0 without enough
        blocks."""
        left = request.num_planned - request.num_computed
        count = min(left if self._random.random() < 0.5 else self._random.randint(1, left), budget)
        needed = -(-(request.num_computed + count) // self._shape.block_size) - len(request.blocks)
        if count and needed > len(self._free_blocks):
            return 0
        for _ in range(needed if count else 0):
            block = self._free_blocks.pop(self._random.randrange(len(self._free_blocks)))
            appends.append((request.row, len(request.blocks), block))
            request.blocks.append(block)
        return count

    def _prompt_ticket(self, request: ScriptedRequest) -> int:
        ring = self._rings[request.ring]
        if request.ring:
            ticket = ring.next_ticket
            assert ring.take() is not None, "the prompt was announced but is not there"
            return ticket
        return self._upload(request.prompt)

    def _upload(self, words: Any) -> int:
        """Returns the first ticket."""
        ring = self._rings[0]
        first = ring.next_ticket
        for start in range(0, len(words), PROMPT_RECORD_TOKENS):
            part = words[start : start + PROMPT_RECORD_TOKENS]
            ring.claim().token_ids[: len(part)] = part
            ring.publish()
        return first

    def _admit(self, record: StepRecord, i: int, request: ScriptedRequest, ring: int, ticket: int, length: int) -> None:
        admit = record.admit
        admit.row[i] = request.row
        admit.ring[i], admit.ticket[i], admit.length[i] = ring, ticket, length
        admit.long_ticket[i] = 0
        for column in declared_fields(AdmittedColumns):
            fills = [mark.value for mark in column.marks if isinstance(mark, Fill)]
            getattr(admit, column.path[0])[i] = fills[0] if fills and not isinstance(fills[0], str) else 0
        admit.prompt_len[i], admit.max_len[i] = len(request.prompt), len(request.prompt) + request.max_tokens
        admit.temperature[i], admit.seed[i], admit.top_k[i] = request.temperature, request.seed, request.top_k
        admit.end_ids[i, : len(request.end_ids)] = request.end_ids
        adjustments = request.adjustments
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"):
            if name in adjustments:
                getattr(admit, name)[i] = adjustments[name]
        if "thinking" in adjustments:
            admit.think_start[i], admit.think_end[i], admit.think_budget[i] = adjustments["thinking"]
        admit.long_columns[i] = sum(1 << LONG_COLUMNS.index(name) for name in _long_columns(adjustments))

    def _write(
        self,
        record: StepRecord,
        planned: list[tuple[ScriptedRequest, int]],
        appends: list[tuple[int, int, int]],
        num_admissions: int,
    ) -> None:
        n = len(planned)
        record.num_seqs[0], record.num_tokens[0] = n, sum(count for _, count in planned)
        record.num_appends[0], record.num_admissions[0] = len(appends), num_admissions
        record.want_logprobs[0] = 0
        record.variant[0] = max(
            SamplerVariant.ADJUSTED
            if request.adjustments
            else (SamplerVariant.FILTERED if request.top_k else SamplerVariant.PLAIN if request.temperature else 0)
            for request, _ in planned
        )
        record.seq_mask[:n] = -1
        record.seq_row[:n] = [request.row for request, _ in planned]
        record.seq_num_tokens[:n] = [count for _, count in planned]
        samples = [request.num_computed + count == request.num_planned for request, count in planned]
        record.seq_sample[:n] = samples
        if self._masks is not None:
            sampling = [(i, request) for i, (request, _) in enumerate(planned) if samples[i]]
            self._masks.plan(record, self._ticket, sampling)
        for i, (row, index, block) in enumerate(appends):
            record.append_row[i], record.append_index[i], record.append_block[i] = row, index, block

    def _score_prompts(self, record: StepRecord, planned: list[tuple[ScriptedRequest, int]]) -> None:
        """Ask for each position of a prompt once, though a preempted one is computed again."""
        places, scored, first = [], [], 0
        for request, count in planned:
            if request.wants_prompt:
                end = min(request.num_computed + count, len(request.prompt) - 1)
                for position in range(max(request.num_computed, request.num_scored), end):
                    places.append(first + position - request.num_computed)
                    scored.append(request)
                request.num_scored = max(request.num_scored, end)
            first += count
        record.num_prompt_logprobs[0] = len(places)
        record.prompt_logprob_index[: len(places)] = places
        self._scored.append(scored)

    def _preempt(self, request: ScriptedRequest) -> None:
        self._free_blocks += request.blocks
        request.blocks = []
        request.num_computed = 0

    def _retire(self, request: ScriptedRequest) -> None:
        """No further step names its row; those in flight still do. Its blocks may go on at once: steps run in order."""
        self.running.remove(request)
        self._free_blocks += request.blocks
        request.blocks = []
        if self._recycle_early:
            self._free_rows.append(request.row)
        else:
            self._retired.append(request)


def _long_columns(adjustments: dict[str, Any]) -> dict[str, Any]:
    """Long values by column."""
    columns: dict[str, Any] = {}
    if "allowed" in adjustments:  # the toy's vocabulary fits into one word
        columns["token_mask"] = [sum(1 << token for token in adjustments["allowed"])]
    if "bias" in adjustments:
        columns["bias_ids"], columns["bias_values"] = list(adjustments["bias"]), list(adjustments["bias"].values())
    if "bad_words" in adjustments:
        columns["bad_words"] = [token for word in adjustments["bad_words"] for token in (*word, NO_TOKEN)]
    return columns
