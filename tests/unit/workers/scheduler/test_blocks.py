"""Blocks, and the tables of their holders."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from workers.scheduler.block_index import BlockIndex
from workers.scheduler.blocks import BlockPool, BlockTables, IdleBlocks


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
    owner.free_rows([0])
    owner.free_rows([0])
    assert owner.pool.num_free == 8
    assert owner.num_blocks.tolist() == [0, 2, 0]
    assert owner.missing(np.array([0]), np.array([1]))[2] == 1


def array(values: list[int]) -> Any:
    return np.array(values, np.int32)


@pytest.mark.parametrize("seed", range(20))
def test_idle_blocks_leave_in_order_of_arrival_wherever_others_left_from(seed: int) -> None:
    rng = random.Random(seed)
    idle, expected = IdleBlocks(12), []
    for _ in range(300):
        out = [block for block in range(12) if block not in expected]
        if rng.random() < 0.5 and out:
            came = rng.sample(out, rng.randint(1, len(out)))
            idle.add(array(came))
            expected += came
        elif rng.random() < 0.5:
            left = rng.sample(expected, rng.randint(0, len(expected)))
            idle.remove(array(left))
            expected = [block for block in expected if block not in left]
        else:
            count = rng.randint(0, len(expected))
            assert idle.take_oldest(count).tolist() == expected[:count]
            del expected[:count]
        assert len(idle) == len(expected)


@pytest.mark.parametrize("seed", range(20))
def test_a_table_of_names_does_what_a_dictionary_does(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, few_sets = 40, 7  # first words that choose few of the sets: several at once want the same place
    table, expected = BlockIndex(num_blocks), {}
    for _ in range(200):
        unnamed = [block for block in range(num_blocks) if block not in expected.values()]
        blocks = rng.sample(unnamed, min(len(unnamed), rng.randint(0, 6)))
        names = [(rng.randrange(few_sets) + 64 * rng.randrange(1, 3), rng.randrange(2)) for _ in blocks]
        table.enter(array(blocks), np.array(names, np.uint64).reshape(-1, 2))
        named = table.are_named(array(blocks)).tolist()
        entered = {name: block for block, name, is_named in zip(blocks, names, named, strict=True) if is_named}
        assert len(entered) == sum(named), "two blocks have one name"
        assert not entered.keys() & expected.keys(), "two blocks have one name"
        expected |= entered
        assert {first for first, _ in names} <= {first for first, _ in expected}, "a name was lost"
        gone = rng.sample(list(expected), rng.randint(0, len(expected)) if rng.random() < 0.3 else 0)
        table.forget(array([expected.pop(name) for name in gone]))
        assert len(table) == len(expected)
        for name, block in expected.items():
            assert table.find(np.array([name], np.uint64)).tolist() == [block]
        for name in gone:
            assert not table.find(np.array([name], np.uint64)).size


def test_a_chain_is_found_up_to_the_first_name_that_nobody_has() -> None:
    table = BlockIndex(8)
    names = np.arange(1, 11, dtype=np.uint64).reshape(5, 2)
    table.enter(array([7, 3, 5]), names[[0, 1, 3]])
    assert table.find(names).tolist() == [7, 3]
    assert table.find(names[2:]).tolist() == []
    assert table.find(names[:0]).tolist() == []
    table.clear()
    assert table.find(names).tolist() == []


def test_a_set_that_is_full_offers_no_more_and_loses_nothing() -> None:
    table = BlockIndex(16)
    names = np.array([(1 + 16 * i, i) for i in range(10)], np.uint64)  # ten of one set
    table.enter(array(list(range(10))), names)
    assert len(table) == 8
    found = [i for i in range(10) if table.find(names[i : i + 1]).tolist() == [i]]
    assert len(found) == 8
