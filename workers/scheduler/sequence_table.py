"""The state of every sequence that has a row, as numpy columns, and which rows are free.

A sequence keeps its row from its admission to its end, also while it is preempted. After the end the row is *retired*:
it becomes free once every published step that names it has been applied. The reason: the next owner's prompt is
uploaded by a copy stream, which does not wait for steps that still read the row.

The scheduler plans steps ahead of their results, so it knows two states of a row. *Planned* columns hold the state
after all published steps have run, and change when a step is planned. *Applied* columns hold what results have
confirmed, and change when a result is applied. Without steps in flight both agree.
"""

from __future__ import annotations

import numpy as np

from workers.scheduler.array_types import Int32Array, IntArray
from workers.scheduler.sequence import Sequence


class SequenceTable:
    """Columns are int64 [num_rows], except for the token ids: a column can index another without a conversion.

    Written once, when the sequence is admitted:
        key: the sequence's key.
        max_len: tokens, prompt and output, at which the sequence ends.
        variant: SamplerVariant that its parameters need.
        want_logprobs: top log-probabilities + 1, as in the step record; 0 = none.
        want_processed: 1 = its log-probabilities are processed ones.
        num_extra_logprobs: how many `logprob_token_ids` the request names.
        grammar_worker: index of the grammar process that follows the sequence; NO_WORKER = none.

    Written when the GPU process is replaced, until the row's ids are sent again:
        is_lost: whether the row is lost on the device.

    Planned (written by the planner):
        num_computed_tokens: tokens whose KV is in the cache after all published steps. 0 while it is preempted.
        num_planned_tokens: `num_tokens` and one for each sampled token of the steps in flight.
        last_ticket: ticket of the last published step that names the row.
        preemptible_len: the sequence can be preempted once `num_computed_tokens` reaches this length. The planner sets
            it to the number of known tokens when it admits or resumes the sequence.
        prompt_logprobs_end: the log-probabilities of the tokens that follow the row's tokens before this place are
            wanted. 0 = none, or all are in published steps. `num_wanting_prompt_logprobs` rows have another value.
        rank: the policy's rank; the planner preempts the highest one. Written at each admission and resumption.

    Applied (written from results):
        num_prompt_logprobs: tokens of the prompt whose log-probabilities have been sent.
        num_tokens: known tokens: those that the sequence brought, and the sampled tokens that have been applied.
        token_ids: [num_rows, max tokens of a row] int32; the first `num_tokens` of each row are known.
        token_blocks: the same memory, [num_rows, max_blocks_per_seq, block_size].
        num_followed_tokens: known tokens that the grammar process has been told of, with the prompt. One less than
            `num_tokens`, or equal to it before the first request for a mask: `Compile` has told it of the output that
            a resumed request brings. Written by `MaskRequests`.

    Written when the sequence ends:
        generation: number of owners that the row has had. What a step planned for an earlier owner says is void.
    """

    def __init__(self, num_rows: int, max_blocks_per_seq: int, block_size: int) -> None:
        def column() -> IntArray:
            return np.zeros(num_rows, np.int64)

        self.key = column()
        self.max_len = column()
        self.variant = column()
        self.want_logprobs = column()
        self.want_processed = column()
        self.num_extra_logprobs = column()
        self.grammar_worker = column()
        self.num_followed_tokens = column()
        self.num_computed_tokens = column()
        self.num_planned_tokens = column()
        self.last_ticket = column()
        self.preemptible_len = column()
        self.prompt_logprobs_end = column()
        self.num_prompt_logprobs = column()
        self.num_wanting_prompt_logprobs = 0
        self.is_lost = np.zeros(num_rows, bool)
        self.rank = column()
        self.num_tokens = column()
        self.token_blocks: Int32Array = np.zeros((num_rows, max_blocks_per_seq, block_size), np.int32)
        self.token_ids: Int32Array = self.token_blocks.reshape(num_rows, -1)
        self.generation = column()
        self.sequences: list[Sequence | None] = [None] * num_rows  # the owner of each row; None: free or retired
        self._free = list(range(num_rows - 1, -1, -1))
        self._retired: dict[int, list[int]] = {}  # rows by the ticket of the last step that names them
        self._applied = 0  # ticket of the last applied step

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take_row(self, sequence: Sequence) -> int:
        """Give a sequence a free row, with the tokens that it has. None of them is computed yet."""
        row, num_known = self._free.pop(), sequence.num_known
        self.sequences[row] = sequence
        self.key[row] = sequence.key
        self.token_ids[row, :num_known] = sequence.token_ids
        self.num_tokens[row] = num_known
        self.num_planned_tokens[row] = num_known
        self.num_computed_tokens[row] = 0
        self.max_len[row] = sequence.max_len
        self.variant[row] = sequence.variant
        self.want_logprobs[row] = sequence.want_logprobs
        self.want_processed[row] = sequence.want_processed
        self.num_extra_logprobs[row] = sequence.num_extra_logprobs
        self.grammar_worker[row] = sequence.grammar_worker
        self.num_followed_tokens[row] = num_known
        self.num_prompt_logprobs[row] = 0
        self.is_lost[row] = False
        if sequence.want_prompt_logprobs:
            self.prompt_logprobs_end[row] = sequence.num_prompt - 1
            self.num_wanting_prompt_logprobs += 1
        return row

    def wants_prompt_logprobs(self, sequence: Sequence) -> bool:
        """Whether a sequence that is waiting or preempted has to compute its whole prompt again.

        Then it may use no cached blocks: the logits of their tokens are not cached.
        """
        return bool(self.prompt_logprobs_end[sequence.row]) if sequence.has_row else sequence.want_prompt_logprobs > 0

    def prompt_logprobs_planned(self, rows: IntArray) -> None:
        """All log-probabilities of these rows' prompts are in published steps."""
        self.num_wanting_prompt_logprobs -= int((self.prompt_logprobs_end[rows] > 0).sum())
        self.prompt_logprobs_end[rows] = 0

    def retire(self, row: int) -> None:
        """The row's sequence has ended. The row is free once all steps in flight that name it have been applied."""
        self.sequences[row] = None
        self.generation[row] += 1
        if self.prompt_logprobs_end[row]:
            self.prompt_logprobs_planned(np.array([row]))
        last_ticket = int(self.last_ticket[row])
        if last_ticket <= self._applied:
            self._free.append(row)
        else:
            self._retired.setdefault(last_ticket, []).append(row)

    def replace_device(self) -> list[Sequence]:
        """The steps in flight are void, and every row on the device is lost. Returns the sequences that have rows.

        The planned columns go back to the applied ones. Retired rows are free.
        """
        self._free += [row for rows in self._retired.values() for row in rows]
        self._retired.clear()
        self._applied = 0
        self.last_ticket[:] = 0
        self.num_computed_tokens[:] = 0
        self.num_planned_tokens[:] = self.num_tokens
        self.is_lost[:] = True
        owners = [sequence for sequence in self.sequences if sequence is not None]
        for sequence in owners:
            end = sequence.num_prompt - 1
            is_wanting = sequence.want_prompt_logprobs > 0 and self.num_prompt_logprobs[sequence.row] < end
            self.prompt_logprobs_end[sequence.row] = end if is_wanting else 0
        self.num_wanting_prompt_logprobs = int((self.prompt_logprobs_end > 0).sum())
        return owners

    def step_applied(self, ticket: int) -> None:
        """Free the retired rows that no later step names."""
        self._applied = ticket
        self._free.extend(self._retired.pop(ticket, ()))
