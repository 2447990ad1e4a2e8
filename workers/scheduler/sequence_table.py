"""The state of every sequence that holds a row, as numpy columns, and which rows are free.

A row belongs to a sequence from its admission to its end, also while it is preempted. After that it stays retired until
every published step that names it has been applied: the next owner's prompt is uploaded by a copy stream, which does
not wait for the steps that still read the row.
"""

from __future__ import annotations

import numpy as np

from workers.scheduler.admission.request import Request
from workers.scheduler.array_types import IntArray


class SequenceTable:
    """Columns are int64 [num_rows], ids apart, so that one can index another without a conversion."""

    def __init__(self, num_rows: int, max_blocks_per_seq: int, block_size: int) -> None:
        def column() -> IntArray:
            return np.zeros(num_rows, np.int64)

        self.key = column()
        self.generation = column()  # +1 at each end of an owner: what an earlier step says of the row is void then
        self.last_ticket = column()  # of the last step that names the row
        self.token_blocks = np.zeros((num_rows, max_blocks_per_seq, block_size), np.int32)
        self.token_ids = self.token_blocks.reshape(num_rows, -1)  # the known ones: `num_tokens` of each row
        self.num_tokens = column()  # known: prompt and applied tokens
        self.num_planned_tokens = column()  # the same and those that steps in flight sample
        self.num_computed = column()  # tokens with KV, once every planned step has run
        self.progress_len = column()  # length at which a row has made progress since it came in or came back
        self.max_len = column()
        self.rank = column()  # Request.rank
        self.variant = column()  # SamplerVariant
        self.want_logprobs = column()  # as in the step record: top log-probabilities + 1, 0 = none
        self.requests: list[Request | None] = [None] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        self._retired: dict[int, list[int]] = {}  # rows by the ticket that they wait for
        self._applied = 0  # ticket

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, request: Request) -> int:
        """Give a free row to a request; nothing of it is computed yet."""
        row = self._free.pop()
        self.requests[row] = request
        self.key[row] = request.key
        self.token_ids[row, : request.num_prompt] = request.token_ids
        self.num_tokens[row] = request.num_prompt
        self.num_planned_tokens[row] = request.num_prompt
        self.num_computed[row] = 0
        self.max_len[row] = request.max_len
        self.variant[row] = request.variant
        self.want_logprobs[row] = request.want_logprobs
        return row

    def retire(self, row: int) -> None:
        """Its owner has ended. What steps in flight still say of it is void; it is free when they are applied."""
        self.requests[row] = None
        self.generation[row] += 1
        last_ticket = int(self.last_ticket[row])
        if last_ticket <= self._applied:
            self._free.append(row)
        else:
            self._retired.setdefault(last_ticket, []).append(row)

    def step_applied(self, ticket: int) -> None:
        self._applied = ticket
        self._free.extend(self._retired.pop(ticket, ()))
