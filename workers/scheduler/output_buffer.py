"""Collects the scheduler's next message to the detokenizer.

Owns the order within a message (opened, log-probabilities of prompts, tokens, ended) and its size limits. Knows nothing
of rows: tokens arrive by key.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any, Final

import numpy as np

from ipc.codec import MAX_ITEMS
from ipc.messages import Ended, Opened, PromptLogprobs, StepLogprobs, StepOutputs
from workers.scheduler.array_types import Int32Array, IntArray

MAX_RESUMED_BYTES: Final = 16 << 20  # of the tokens that resumed requests bring, in one message before its last one
MAX_PARTS: Final = 128  # of prompts' log-probabilities in one message: at most 11 MB


@dataclass(frozen=True)
class LogprobArrays:
    """Log-probabilities of n tokens, copied because the result record is reused."""

    logprob: np.ndarray[Any, np.dtype[np.float32]]  # [n]
    top_ids: Int32Array  # [n, num_top]
    top_logprobs: np.ndarray[Any, np.dtype[np.float32]]  # [n, num_top]
    extra_logprobs: np.ndarray[Any, np.dtype[np.float32]]  # [n, num_extra]


class OutputBuffer:
    """Everything that the detokenizer must know since the last `take()`."""

    def __init__(self) -> None:
        self.opened: list[Opened] = []
        self.ended: list[Ended] = []
        self.admitted: list[tuple[int, int, int]] = []  # (key, when in ns, number of cached tokens)
        self.prompt_logprobs: list[tuple[int, PromptLogprobs]] = []  # (key, next part of its prompt)
        self._keys: list[bytes] = []  # of each applied step, int64
        self._token_ids: list[bytes] = []  # of each applied step, int32
        self._finish: list[bytes] = []  # of each applied step, uint8
        self._logprobs: list[tuple[int, LogprobArrays | None]] = []  # of each applied step: number of tokens, arrays
        self._any_logprobs = False

    def add_tokens(
        self, keys: IntArray, token_ids: Int32Array, finish: Int32Array, logprobs: LogprobArrays | None
    ) -> None:
        """Add the tokens of one applied step, [n] each."""
        self._keys.append(keys.tobytes())
        self._token_ids.append(token_ids.tobytes())
        self._finish.append(finish.astype(np.uint8).tobytes())
        self._logprobs.append((len(keys), logprobs))
        self._any_logprobs = self._any_logprobs or logprobs is not None

    def take(self) -> StepOutputs | None:
        """The next message; None: there is nothing to send. Call until None: a large burst takes several messages."""
        opened: list[Opened] = []
        if self.opened:
            num_opened = self._num_opened()
            opened, self.opened = self.opened[:num_opened], self.opened[num_opened:]
            if self.opened:  # a token may belong to a request that is still to be opened
                return StepOutputs(opened=opened)
        if not (opened or self._keys or self.ended or self.prompt_logprobs):
            return None
        admitted, self.admitted = self.admitted[:MAX_ITEMS], self.admitted[MAX_ITEMS:]
        if self.admitted:
            return StepOutputs(opened=opened, admitted=admitted)
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs[:MAX_PARTS], self.prompt_logprobs[MAX_PARTS:]
        if self.prompt_logprobs:
            return StepOutputs(opened=opened, prompt_logprobs=prompt_logprobs)
        ended, self.ended = self.ended[:MAX_ITEMS], self.ended[MAX_ITEMS:]
        outputs = StepOutputs(
            opened=opened,
            admitted=admitted,
            prompt_logprobs=prompt_logprobs,
            keys=b"".join(self._keys),
            token_ids=b"".join(self._token_ids),
            finish=b"".join(self._finish),
            logprobs=_join(self._logprobs) if self._any_logprobs else None,
            ended=ended,
        )
        for part in (self._keys, self._token_ids, self._finish, self._logprobs):
            part.clear()
        self._any_logprobs = False
        return outputs

    def _num_opened(self) -> int:
        """How many of the requests that open fit into the next message."""
        sizes = accumulate(map(_resumed_bytes, self.opened[:MAX_ITEMS]))
        whole = sum(1 for _ in takewhile(lambda num_bytes: num_bytes < MAX_RESUMED_BYTES, sizes))
        return min(whole + 1, MAX_ITEMS)  # the one that reaches the bound goes along


def _resumed_bytes(opened: Opened) -> int:
    """Size of the tokens that a resumed request brings."""
    return 0 if opened.resume is None else sum(len(sample.token_ids) for sample in opened.resume.samples)


def _join(steps: list[tuple[int, LogprobArrays | None]]) -> StepLogprobs:
    """Join the tables of several steps. The result is as wide as the widest of them; missing entries are zero."""
    num_tokens = sum(n for n, _ in steps)
    num_top = max(arrays.top_ids.shape[1] for _, arrays in steps if arrays is not None)
    num_extra = max(arrays.extra_logprobs.shape[1] for _, arrays in steps if arrays is not None)
    logprobs = np.zeros(num_tokens, np.float32)
    top_ids = np.zeros((num_tokens, num_top), np.int32)
    top_logprobs = np.zeros((num_tokens, num_top), np.float32)
    extra_logprobs = np.zeros((num_tokens, num_extra), np.float32)
    start = 0
    for n, arrays in steps:
        if arrays is not None:
            rows = slice(start, start + n)
            logprobs[rows] = arrays.logprob
            top_ids[rows, : arrays.top_ids.shape[1]] = arrays.top_ids
            top_logprobs[rows, : arrays.top_ids.shape[1]] = arrays.top_logprobs
            extra_logprobs[rows, : arrays.extra_logprobs.shape[1]] = arrays.extra_logprobs
        start += n
    return StepLogprobs(
        num_top=num_top,
        logprobs=logprobs.tobytes(),
        top_ids=top_ids.tobytes(),
        top_logprobs=top_logprobs.tobytes(),
        num_extra=num_extra,
        extra_logprobs=extra_logprobs.tobytes(),
    )
