"""Measures how long requests and their tokens take, and fills the histograms of the detokenizer's page.

    arrived ----- queue ----- admitted ----- prefill ----- first token ----- decode ----- last token
       |------------------- time to first token ---------------|-- inter-token times --|
       |------------------------------------- end to end ------------------------------------------- end

Times count when the detokenizer receives a message, so a client that reads slowly changes none of them. Tokens of one
sequence that arrive in one message have no time between them. A preemption lengthens prefill or decode.

A sample is measured once: its queue time when it is admitted, its first token when it arrives, its decode time when it
ends. A request is measured when its last sample ends: end to end, prompt tokens, and generated tokens of all samples.
A sample that ends with an error has no decode time. A request is not measured if it was never admitted, if one of its
samples has failed, or if its client has gone.

A resumed request is measured as a new one from its second arrival on, with two exceptions. A sample that brings tokens
has no time to first token: it had that in an earlier attempt. Generated tokens are all tokens of the answer, because no
earlier attempt was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import numpy as np

from ipc.histogram import Histogram
from ipc.messages import FinishReason
from ipc.record_layout import HostArray
from workers.detokenizer.config import ARRAYS, END_REASONS, ENDS, HISTOGRAMS
from workers.detokenizer.request_state import Sequence

_NS_PER_US: Final = 1_000


class RequestMetrics:
    """The arrays of `ARRAYS`. `arrays`: those of the statistics page, by name; None = arrays of its own."""

    def __init__(self, arrays: Mapping[str, HostArray] | None = None) -> None:
        if arrays is None:
            arrays = {name: np.zeros(shape, np.int64) for name, shape in ARRAYS}
        self.arrays = arrays
        histograms = {name: Histogram(bounds, arrays[name]) for name, bounds in HISTOGRAMS.items()}
        self._first_token = histograms["time_to_first_token_us"]
        self._inter_token = histograms["inter_token_us"]
        self._end_to_end = histograms["end_to_end_us"]
        self._queue = histograms["queue_us"]
        self._prefill = histograms["prefill_us"]
        self._decode = histograms["decode_us"]
        self._prompt_tokens = histograms["prompt_tokens"]
        self._generated_tokens = histograms["generated_tokens"]
        self._ends = arrays[ENDS]

    def admitted(self, sequence: Sequence, admitted_ns: int) -> None:
        """The scheduler has admitted a sequence."""
        sequence.admitted_ns = admitted_ns
        sequence.request.was_admitted = True
        self._queue.add(_us(admitted_ns - sequence.request.arrived_ns))

    def first_token(self, sequence: Sequence, now_ns: int) -> None:
        """A sequence has the first token of this attempt."""
        sequence.first_token_ns = now_ns
        if not sequence.num_known:
            self._first_token.add(_us(now_ns - sequence.request.arrived_ns))
        if sequence.admitted_ns:
            self._prefill.add(_us(now_ns - sequence.admitted_ns))

    def next_tokens(self, previous_ns: list[int], now_ns: int) -> None:
        """Sequences have further tokens: when each had its previous one.

        Most sequences of a step had their previous token in the step before, so there are few different times.
        """
        for before_ns, num in Counter(previous_ns).items():
            self._inter_token.add(_us(now_ns - before_ns), num)

    def ended(self, sequence: Sequence, reason: FinishReason, now_ns: int) -> None:
        """A sequence has ended, and with it perhaps its request."""
        request = sequence.request
        request.num_generated += sequence.num_sent + len(sequence.token_ids)
        request.num_running -= 1
        self._ends[END_REASONS.index(reason)] += 1
        if reason == "error":
            request.has_failed = True
        elif sequence.first_token_ns:
            self._decode.add(_us(sequence.last_token_ns - sequence.first_token_ns))
        if not request.num_running and request.was_admitted and not request.has_failed:
            self._end_to_end.add(_us(now_ns - request.arrived_ns))
            self._prompt_tokens.add(request.num_prompt_tokens)
            self._generated_tokens.add(request.num_generated)

    def client_gone(self, num_open: int) -> None:
        """A client has gone, and its open samples with it: the gateway cancels them."""
        self._ends[END_REASONS.index("cancelled")] += num_open


def _us(ns: int) -> int:
    """Rounded. Sums in nanoseconds would exceed 64 bits within days."""
    return (ns + _NS_PER_US // 2) // _NS_PER_US
