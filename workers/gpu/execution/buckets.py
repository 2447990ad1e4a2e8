"""The sizes that steps are padded to, so that few graphs serve every step.

A step with one token per sequence (decode) runs as (S, S); the batch of (1, 1) has a second token, see `StepBatch`. A
mixed step of up to `MAX_CAPTURED_TOKENS` tokens runs as (S, T) with few choices of each. Both kinds are captured. A
larger step is launched piece by piece, at about its own size: the device then works for longer than the host takes to
launch, so that padding would cost more than launches.
The host takes about 0.8 ms for a decoder layer, as long as an H200 takes for about 1,200 tokens of an 8B model, or for
several thousand of a 1B model.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from ipc.records import StepShape

MAX_CAPTURED_TOKENS: Final = 2_048
_SMALL_TOKENS: Final = (64, 128, 256, 384, 512)  # captured for every choice of S
_LARGE_TOKENS: Final = tuple(range(640, MAX_CAPTURED_TOKENS + 1, 128))  # captured for the largest two choices
_TILE: Final = 64  # tokens that matrix products handle at once: larger steps are padded to multiples of it
_SMALLEST_MIXED: Final = 16  # sequences; from there on by factors of 4


class Buckets:
    """The sizes for one StepShape. `captured` are the buckets (S, T) that get a graph; none if not `captures`."""

    def __init__(self, shape: StepShape, *, captures: bool = True) -> None:
        self._max_seqs, self._max_tokens = shape.max_num_seqs, shape.max_num_batched_tokens
        self.decode = _up_to(min(self._max_seqs, self._max_tokens), _decode_sizes(self._max_seqs))
        sizes = [_SMALLEST_MIXED]
        while sizes[-1] < self._max_seqs:
            sizes.append(4 * sizes[-1])
        self._mixed_seqs = _up_to(self._max_seqs, sizes)
        self._large_seqs = self._mixed_seqs[-2:]
        self._mixed_tokens = _up_to(min(MAX_CAPTURED_TOKENS, self._max_tokens), (*_SMALL_TOKENS, *_LARGE_TOKENS))
        mixed = {self._mixed(s, t) for s in self._mixed_seqs for t in self._mixed_tokens}
        self.captured = sorted({(s, s) for s in self.decode} | mixed) if captures else []

    def choose(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        """The smallest bucket (S, T) that holds a step of these sizes."""
        if num_seqs == num_tokens:
            size = _round_up(num_seqs, self.decode)
            return size, size
        return self._mixed(num_seqs, num_tokens)

    def _mixed(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        if num_tokens <= self._mixed_tokens[-1]:
            tokens = _round_up(num_tokens, self._mixed_tokens)
        else:
            tokens = min(-(-num_tokens // _TILE) * _TILE, self._max_tokens)
        seqs = self._mixed_seqs if tokens <= _SMALL_TOKENS[-1] else self._large_seqs
        return min(_round_up(num_seqs, seqs), tokens), tokens


def _decode_sizes(max_size: int) -> list[int]:
    """1, 2, 4, 8, 16, and from there on two sizes per power of two: 24, 32, 48, 64, ..."""
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < max_size:
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return sizes


def _up_to(limit: int, sizes: list[int] | tuple[int, ...]) -> list[int]:
    """The sizes below the limit, and the limit itself."""
    return [*(size for size in sizes if size < limit), limit]


def _round_up(n: int, sizes: list[int]) -> int:
    return sizes[bisect_left(sizes, n)]
