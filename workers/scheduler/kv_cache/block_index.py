"""Which block is cached under which hash: a hash table in arrays, which looks up or adds many hashes at once.

It is set-associative, like a processor's cache. Some bits of a block hash choose a set, and the hash may stand in any
of the set's WAYS places. No entry ever moves and nothing is probed, so removing a block is one store and leaves no
tombstone. There are as many sets as blocks. About one hash in a million finds its set full; that block is not cached.
Knows nothing of a block's users.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from workers.scheduler.array_types import BoolArray, HashArray, Int32Array, IntArray

WAYS: Final = 8  # the first words of a set fill one cache line, and the results of 8 comparisons fill one word
_EMPTY: Final = np.uint64(0)
_NOWHERE: Final = -1


class BlockIndex:
    """Hashes of up to `num_blocks` blocks. A hash has at most one block, and a block at most one hash."""

    def __init__(self, num_blocks: int) -> None:
        num_sets = 1 << (num_blocks - 1).bit_length()
        self._mask = np.uint64(num_sets - 1)
        # By place: the two words of a hash, and its block. A hash whose first word is zero is never added.
        self._first = np.zeros(num_sets * WAYS, np.uint64)
        self._second = np.zeros(num_sets * WAYS, np.uint64)
        self._block = np.zeros(num_sets * WAYS, np.int32)
        self._sets = self._first.reshape(num_sets, WAYS)
        self._place = np.full(num_blocks, _NOWHERE, np.int64)  # [num_blocks], place of each block's hash
        self._num = 0

    def __len__(self) -> int:
        """Number of blocks that are cached."""
        return self._num

    def contains(self, blocks: Int32Array) -> BoolArray:
        """Whether each block is cached, [n] bool."""
        are_cached: BoolArray = self._place[blocks] != _NOWHERE
        return are_cached

    def find(self, hashes: HashArray) -> Int32Array:
        """The blocks of the first hashes, up to the first hash without a block."""
        if not len(hashes) or not (self._sets[hashes[0, 0] & self._mask] == hashes[0, 0]).any():
            return self._block[:0]  # the usual case: nothing of the prompt is cached
        blocks, is_found = self._look_up(hashes)
        return blocks if is_found.all() else blocks[: int(is_found.argmin())]

    def find_all(self, hashes: HashArray) -> Int32Array:
        """The blocks of all hashes that have one."""
        blocks, is_found = self._look_up(hashes)
        return blocks[is_found]

    def _look_up(self, hashes: HashArray) -> tuple[Int32Array, BoolArray]:
        """A candidate block for each hash, and whether the block really has that hash."""
        first, second = hashes[:, 0], hashes[:, 1]
        sets = (first & self._mask).view(np.int64)
        places = sets * WAYS + (self._sets.take(sets, axis=0) == first[:, None]).argmax(axis=1)
        is_found: BoolArray = (self._first.take(places) == first) & (self._second.take(places) == second)
        blocks: Int32Array = self._block.take(places)
        return blocks, is_found

    def add(self, blocks: Int32Array, hashes: HashArray) -> None:
        """Cache blocks that have no hash yet.

        If a block already has a hash, that block stays and the new one is not cached. Of several new blocks with one
        hash, one is cached. Hashes count as equal here if their first words are: 64 bits do not collide in practice.
        """
        while blocks.size:
            first = hashes[:, 0]
            sets = (first & self._mask).view(np.int64)
            keys = self._sets.take(sets, axis=0)
            places = sets * WAYS + (keys == _EMPTY).argmax(axis=1)
            is_taken = (keys == first[:, None]).view(np.uint64)[:, 0] != 0  # one of the 8 comparisons holds
            is_free = (self._first.take(places) == _EMPTY) & ~is_taken
            if not is_free.all():
                blocks, hashes, places = blocks[is_free], hashes[is_free], places[is_free]
            self._first[places] = hashes[:, 0]
            self._block[places] = blocks
            has_place = self._block.take(places) == blocks  # of several blocks that chose one place, the last has it
            if has_place.all():
                self._settle(blocks, hashes, places)
                return
            self._settle(blocks[has_place], hashes[has_place], places[has_place])
            blocks, hashes = blocks[~has_place], hashes[~has_place]

    def _settle(self, blocks: Int32Array, hashes: HashArray, places: IntArray) -> None:
        self._second[places] = hashes[:, 1]
        self._place[blocks] = places
        self._num += len(blocks)

    def remove(self, blocks: Int32Array) -> None:
        """Forget the hashes of these blocks. All of them are cached."""
        self._first[self._place[blocks]] = _EMPTY
        self._place[blocks] = _NOWHERE
        self._num -= len(blocks)

    def clear(self) -> None:
        self._first[:] = _EMPTY
        self._place[:] = _NOWHERE
        self._num = 0
