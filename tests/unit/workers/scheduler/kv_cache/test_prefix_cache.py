"""The prefix cache: hashes of blocks, which sequences find which blocks, and which blocks are evicted first."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np

from ipc.block_hash import SEED_BYTES, chain_hashes, next_hashes, read_hashes, root_hash
from ipc.sampling_params import SamplingParams
from tests.simulation.fake_gpu import expected_tokens
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.scheduler.kv_cache.block_pool import BlockPool
from workers.scheduler.kv_cache.prefix_cache import PrefixCache

PROMPT = list(range(21))  # five full blocks of 4, and one token
ONE = SamplingParams(max_tokens=1)


def ids(tokens: list[int]) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def run_one(engine: ScheduledEngine, key: int, prompt: list[int], salt: str = "") -> int:
    """Run a request to its end; how many of its tokens were cached."""
    engine.send(key, prompt, ONE, salt=salt)
    engine.drain()
    return engine.cached.get(key, 0)


def chain(prompt: list[int], root: bytes) -> list[tuple[int, ...]]:
    return [tuple(name) for name in read_hashes(chain_hashes(root, ids(prompt), 4)).tolist()]


def test_a_hash_depends_on_all_tokens_before_it_and_on_salt_and_seed() -> None:
    root = root_hash(bytes(SEED_BYTES), "")
    names = chain(PROMPT, root)
    assert len(set(names)) == 6
    assert not set(names[1:]) & set(chain([99, *PROMPT[1:]], root)[1:])
    assert names[:5] == chain([*PROMPT[:19], 99], root)[:5]
    roots = {root, root_hash(bytes(SEED_BYTES), "a"), root_hash(b"\1" * SEED_BYTES, "")}
    assert len(roots) == 3


def test_hashes_of_many_sequences_are_those_that_their_prompts_would_have() -> None:
    prompts = np.arange(24, dtype=np.int32).reshape(3, 8)
    chains = [read_hashes(chain_hashes(root_hash(bytes(SEED_BYTES), ""), ids(row.tolist()), 4)) for row in prompts]
    parents = np.array([names[1] for names in chains])
    assert next_hashes(parents, prompts[:, 4:]).tolist() == [names[2].tolist() for names in chains]


def test_a_second_prompt_finds_the_first_ones_full_blocks_and_keeps_a_token_to_compute() -> None:
    engine = ScheduledEngine()
    assert run_one(engine, 1, PROMPT) == 0
    assert run_one(engine, 2, PROMPT) == 20
    assert run_one(engine, 3, PROMPT[:20]) == 16, "the last token has to be computed"
    assert run_one(engine, 4, [*PROMPT[:9], 60, 60, 60, 60]) == 8
    assert engine.scheduler.gauges()["num_cached_tokens"] == 44
    engine.check_empty()


def test_another_salt_finds_nothing() -> None:
    engine = ScheduledEngine()
    run_one(engine, 1, PROMPT, salt="a")
    assert run_one(engine, 2, PROMPT, salt="b") == 0
    assert run_one(engine, 3, PROMPT, salt="a") == 20


def test_tokens_that_were_generated_are_found_by_the_next_turn_of_a_chat() -> None:
    engine = ScheduledEngine()
    engine.send(1, PROMPT, SamplingParams(max_tokens=12))
    engine.drain()
    assert run_one(engine, 2, [*PROMPT, *engine.tokens[1], 1, 2, 3]) >= 28


def test_a_block_is_found_while_the_step_that_fills_it_is_in_flight_and_not_before() -> None:
    engine = ScheduledEngine(max_num_batched_tokens=12, depth=3)
    engine.send(1, PROMPT)
    engine.plan()  # its first 12 tokens
    engine.send(2, PROMPT)
    engine.plan()  # the other 9; request 2 is admitted with the blocks that the step before fills
    engine.drain()
    assert engine.cached == {2: 12}
    assert engine.tokens[1] == engine.tokens[2]


def test_blocks_idle_for_longest_are_given_away_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(5)
    names = np.arange(1, 9, dtype=np.uint64).reshape(4, 2)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.offer(np.concatenate((old, new)), names)
    pool.free(old[::-1])
    pool.free(new[::-1])
    assert pool.num_free == 5
    pool.allocate(2)  # the block that was never cached, and the end of the older prompt
    assert pool.find(names[:2]).tolist() == old[:1].tolist()
    assert pool.find(names[2:]).tolist() == new.tolist()


def test_a_shared_block_stays_until_its_last_user_is_gone() -> None:
    pool = BlockPool(1)
    name = np.array([[1, 2]], np.uint64)
    block = pool.allocate(1)
    pool.offer(block, name)
    pool.share(pool.find(name))
    pool.free(block)
    assert pool.num_free == 0
    pool.free(block)
    assert pool.num_free == 1
    assert pool.find(name).tolist() == [0]


def test_a_block_that_several_give_up_at_once_is_free_once() -> None:
    pool = BlockPool(2)
    name = np.array([[1, 2]], np.uint64)
    block = pool.allocate(1)
    pool.offer(block, name)
    for _ in range(2):
        pool.share(block)
    pool.free(np.concatenate((block, block)))
    assert pool.num_free == 1
    pool.free(block)
    assert sorted(pool.allocate(2).tolist()) == [0, 1]


def test_a_hit_longer_than_a_steps_tokens_fits_into_one_record() -> None:
    engine = ScheduledEngine(
        max_num_seqs=2, max_num_batched_tokens=4, max_model_len=256, num_blocks=200, prompt_records=99
    )
    prompt = [i % 61 for i in range(240)]
    run_one(engine, 1, prompt)
    engine.send(2, prompt, ONE)
    engine.send(3, prompt, ONE)
    engine.drain()
    assert engine.cached == {2: 236, 3: 236}
    engine.check_empty()


def stale_tokens(engine: ScheduledEngine) -> int:
    """Return the cached tokens of a prompt. After a clear, its beginning was computed again, and a request from before
    the clear computed its end."""
    engine.send(1, PROMPT, SamplingParams(max_tokens=24))
    for _ in range(2):
        engine.step()
    engine.scheduler.clear_cache()
    assert engine.scheduler.gauges()["num_cached_blocks"] == 0
    run_one(engine, 2, PROMPT)
    engine.drain()
    return run_one(engine, 3, PROMPT + engine.tokens[1][:23])


def test_nothing_stale_is_found_after_a_clear_not_even_what_running_requests_add() -> None:
    assert stale_tokens(ScheduledEngine()) <= 20


def test_a_clear_that_forgets_running_requests_would_be_found() -> None:
    with patch.object(PrefixCache, "clear", lambda cache: cache._pool.clear()):
        assert stale_tokens(ScheduledEngine()) > 20


# Samples of one prompt


def send_samples(engine: ScheduledEngine, n: int, prompt: list[int] = PROMPT, *, max_tokens: int = 6) -> SamplingParams:
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=9, n=n)
    engine.send(1, prompt, params)
    return params


def test_samples_get_the_tokens_of_requests_with_their_seeds_and_find_the_prompts_full_blocks() -> None:
    engine = ScheduledEngine()
    params = send_samples(engine, 3)
    engine.drain()
    assert engine.tokens == {1 + i: expected_tokens(PROMPT, params.of_sample(i).seed or 0, 27, []) for i in range(3)}
    assert len({tuple(tokens) for tokens in engine.tokens.values()}) == 3
    assert engine.cached == {2: 20, 3: 20}
    engine.check_empty()


def test_samples_come_in_behind_the_first_one_into_the_step_that_computes_its_prompt() -> None:
    engine = ScheduledEngine(max_num_batched_tokens=100)
    params = send_samples(engine, 3)
    record = engine.plan()
    assert record is not None
    assert record.seq_num_tokens[: record.num_seqs[0]].tolist() == [21, 1, 1]
    engine.drain()
    assert engine.tokens == {1 + i: expected_tokens(PROMPT, params.of_sample(i).seed or 0, 27, []) for i in range(3)}
    assert engine.cached == {2: 20, 3: 20}
    engine.check_empty()


def test_samples_wait_for_the_first_ones_prompt_and_no_longer() -> None:
    engine = ScheduledEngine(max_num_batched_tokens=12, depth=4)
    send_samples(engine, 3)
    rows = []
    for _ in range(3):
        record = engine.plan()
        assert record is not None
        rows.append(record.seq_num_tokens[: record.num_seqs[0]].tolist())
    assert rows == [[12], [9], [1, 1, 1]], (
        "the first one's chunks, then its first decode beside the others' last tokens"
    )
    engine.drain()


def test_samples_of_a_prompt_without_a_full_block_and_of_an_uncached_one_do_not_wait() -> None:
    for engine, prompt in ((ScheduledEngine(), [1, 2, 3]), (ScheduledEngine(prefix_caching=False), [1, 2, 3, 4, 5])):
        send_samples(engine, 3, prompt)
        record = engine.plan()
        assert record is not None
        assert record.num_seqs[0] == 3
        engine.drain()


def test_samples_go_on_when_the_first_is_cancelled_before_during_or_after_its_prompt() -> None:
    for num_steps in range(4):
        engine = ScheduledEngine(max_num_batched_tokens=12, depth=3)
        params = send_samples(engine, 2)
        for _ in range(num_steps):
            engine.step()
        engine.scheduler.cancel([1])
        engine.drain()
        assert engine.tokens[2] == expected_tokens(PROMPT, params.of_sample(1).seed or 0, 27, [])
        engine.check_empty()


def test_a_request_whose_samples_do_not_all_fit_into_the_queue_is_refused_once() -> None:
    engine = ScheduledEngine(max_num_seqs=2, max_num_waiting=2)
    engine.send(9, PROMPT)
    send_samples(engine, 4)
    engine.hear()
    assert engine.ends == {1: "error"}
    assert engine.errors[1][0] == "queue_full"
    engine.drain()
    engine.check_empty()


def test_more_samples_than_can_ever_be_held_are_no_matter_of_waiting() -> None:
    engine = ScheduledEngine(max_num_seqs=2, max_num_waiting=2)
    send_samples(engine, 5)
    engine.hear()
    assert engine.errors[1][0] == "invalid_request"
    engine.check_empty()
