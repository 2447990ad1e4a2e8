"""Which block is known under which name: a hash table in arrays, so that many names are looked up or entered at once.

It is set-associative, as a processor's cache is: a name may stand in any of the WAYS places of one set, which its own
bits choose. Nothing is ever moved and nothing is probed, so forgetting a block is one store, and there are no
tombstones. There are as many sets as blocks: that a set overflows happens to one name in a million, and then that block
is not offered. Knows nothing of who uses a block.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from workers.scheduler.array_types import BoolArray, Int32Array, IntArray, NameArray

WAYS: Final = 8  # a set's first words fill one cache line; as many comparisons fill one word
_EMPTY: Final = np.uint64(0)
_NOWHERE: Final = -1


class BlockIndex:
    """Names of up to `num_blocks` blocks. At most one block has a name, and a block at most one name."""

    def __init__(self, num_blocks: int) -> None:
        num_sets = 1 << (num_blocks - 1).bit_length()
        self._mask = np.uint64(num_sets - 1)
        # By place: the two words of a name, and the block that has it. A name whose first word is zero is never kept.
        self._first = np.zeros(num_sets * WAYS, np.uint64)
        self._second = np.zeros(num_sets * WAYS, np.uint64)
        self._block = np.zeros(num_sets * WAYS, np.int32)
        self._sets = self._first.reshape(num_sets, WAYS)
        self._place = np.full(num_blocks, _NOWHERE, np.int64)  # [num_blocks], where each one's name stands
        self._num = 0

    def __len__(self) -> int:
        """Blocks with a name."""
        return self._num

    def are_named(self, blocks: Int32Array) -> BoolArray:
        are_named: BoolArray = self._place[blocks] != _NOWHERE
        return are_named

    def find(self, names: NameArray) -> Int32Array:
        """The blocks of the first names, up to one that nobody has."""
        if not len(names) or not (self._sets[names[0, 0] & self._mask] == names[0, 0]).any():
            return self._block[:0]  # as for most prompts of which nothing is cached
        blocks, is_found = self._look_up(names)
        return blocks if is_found.all() else blocks[: int(is_found.argmin())]

    def find_all(self, names: NameArray) -> Int32Array:
        """The blocks of those names that have one."""
        blocks, is_found = self._look_up(names)
        return blocks[is_found]

    def _look_up(self, names: NameArray) -> tuple[Int32Array, BoolArray]:
        """A candidate block for each name, and whether the block really has that name."""
        first, second = names[:, 0], names[:, 1]
        sets = (first & self._mask).view(np.int64)
        places = sets * WAYS + (self._sets.take(sets, axis=0) == first[:, None]).argmax(axis=1)
        is_found: BoolArray = (self._first.take(places) == first) & (self._second.take(places) == second)
        blocks: Int32Array = self._block.take(places)
        return blocks, is_found

    def enter(self, blocks: Int32Array, names: NameArray) -> None:
        """Name blocks that have no name. A name that a block has already stays with it; of several given the same one,
        one gets it. (Names count as the same here if their first words are: in 64 bits there are no others.)"""
        while blocks.size:
            first = names[:, 0]
            sets = (first & self._mask).view(np.int64)
            keys = self._sets.take(sets, axis=0)
            places = sets * WAYS + (keys == _EMPTY).argmax(axis=1)
            is_taken = (keys == first[:, None]).view(np.uint64)[:, 0] != 0  # one of eight comparisons holds
            is_free = (self._first.take(places) == _EMPTY) & ~is_taken
            if not is_free.all():
                blocks, names, places = blocks[is_free], names[is_free], places[is_free]
            self._first[places] = names[:, 0]
            self._block[places] = blocks
            has_place = self._block.take(places) == blocks  # several may have chosen one: the last of them has it
            if has_place.all():
                self._settle(blocks, names, places)
                return
            self._settle(blocks[has_place], names[has_place], places[has_place])
            blocks, names = blocks[~has_place], names[~has_place]

    def _settle(self, blocks: Int32Array, names: NameArray, places: IntArray) -> None:
        self._second[places] = names[:, 1]
        self._place[blocks] = places
        self._num += len(blocks)

    def forget(self, blocks: Int32Array) -> None:
        """Take the names of these blocks away; each has one."""
        self._first[self._place[blocks]] = _EMPTY
        self._place[blocks] = _NOWHERE
        self._num -= len(blocks)

    def clear(self) -> None:
        self._first[:] = _EMPTY
        self._place[:] = _NOWHERE
        self._num = 0
