"""Blocks and the tables of who holds them."""

from __future__ import annotations

import numpy as np
import pytest

from workers.scheduler.blocks import BlockPool, BlockTables


def tables(num_blocks: int = 10) -> BlockTables:
    return BlockTables(BlockPool(num_blocks), num_rows=3, max_blocks_per_seq=8, block_size=4)


def give(owner: BlockTables, rows: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    row, index, block = owner.extend(*owner.missing(np.array(rows), np.array(lengths)))
    return list(zip(row.tolist(), index.tolist(), block.tolist(), strict=True))


def test_blocks_are_handed_out_once_and_again_after_they_are_freed() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted([*first, *second]) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.free(first)
    assert sorted(pool.allocate(3)) == sorted(first)


def test_a_pool_refuses_what_it_does_not_have_and_what_it_never_gave() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 KV blocks wanted, 2 free"):
        pool.allocate(3)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(np.array([0], np.int32))


def test_rows_get_entries_behind_those_they_have() -> None:
    owner = tables()
    assert [entry[:2] for entry in give(owner, [0, 2], [4, 9])] == [(0, 0), (2, 0), (2, 1), (2, 2)]
    assert [entry[:2] for entry in give(owner, [0, 2], [9, 13])] == [(0, 1), (0, 2), (2, 3)]
    assert owner.num_blocks.tolist() == [3, 0, 4]
    assert len(set(owner.table[0, :3]) | set(owner.table[2, :4])) == 7


def test_a_row_needs_a_block_only_when_its_last_one_is_full() -> None:
    owner = tables()
    give(owner, [1], [3])
    assert owner.missing(np.array([1]), np.array([4]))[2] == 0
    assert owner.missing(np.array([1]), np.array([5]))[2] == 1


def test_a_freed_row_holds_nothing() -> None:
    owner = tables()
    give(owner, [0, 1], [8, 8])
    owner.free_row(0)
    owner.free_row(0)
    assert owner.pool.num_free == 8
    assert owner.num_blocks.tolist() == [0, 2, 0]
    assert owner.missing(np.array([0]), np.array([1]))[2] == 1
