"""Random traffic through the scheduler and a fake GPU, compared with the tokens that each request must get alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from msgspec import structs

from ipc.block_hash import read_hashes
from ipc.errors import RingError
from ipc.sampling_params import SamplingParams
from ipc.structured_outputs import StructuredOutputs
from tests.simulation.fake_gpu import VOCAB_SIZE, expected_tokens, extend_hash
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.scheduler import sequence
from workers.scheduler.admission.admission import Admission
from workers.scheduler.kv_cache.block_pool import BlockPool
from workers.scheduler.kv_cache.prefix_cache import PrefixCache
from workers.scheduler.planning.mask_requests import MaskRequests
from workers.scheduler.planning.step import PlannedStep, StepMasks

NUM_SEEDS = 96
MAX_N = 4  # samples of a prompt
SEEDS = [seed for seed in range(40) if seed % 4]  # for planted faults
JSON = StructuredOutputs(json_object=True)


class Traffic:
    """Requests, cancellations and an engine's shape, all from one seed; `run` them at one depth."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.block_size = rng.choice([1, 2, 4, 8])
        self.max_model_len = rng.choice([16, 40])
        blocks_of_longest = -(-self.max_model_len // self.block_size)
        self.shape = {
            "max_num_seqs": rng.choice([1, 2, 5, 9]),
            "max_num_batched_tokens": rng.choice([1, 3, 9, 10, 32, 64]),
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "num_blocks": rng.choice([blocks_of_longest, blocks_of_longest + 2, 3 * blocks_of_longest]),
            "max_num_waiting": rng.choice([3, 1_000]),
            "eos_token_ids": (5, 17) if rng.random() < 0.5 else (),
            "num_tokenizers": rng.choice([1, 3]),
            "prompt_records": rng.choice([5, 6, 20]),
        }
        self.shape["prefix_caching"] = seed % 4 > 0
        self.shape["policy"] = ("fifo", "priority", "fair")[seed % 3]
        self.shared = [rng.randrange(VOCAB_SIZE) for _ in range(self.max_model_len)]  # some prompts begin like it
        self.requests = {key: self._request(rng) for key in range(MAX_N, MAX_N + MAX_N * rng.randint(1, 24), MAX_N)}
        grammar = random.Random(f"grammar {seed}")
        self.shape["num_grammar_workers"] = grammar.choice([0, 1, 1, 2])
        structured = {key for key in self.requests if grammar.random() < 0.5 and self.shape["num_grammar_workers"]}
        for key in structured:
            prompt, params = self.requests[key]
            self.requests[key] = prompt, structs.replace(params, structured_outputs=JSON, ignore_eos=False)
        self.refused = {key for key in structured if grammar.random() < 0.1}  # by its grammar process
        self.sequences = {
            key + sample: (prompt, params.of_sample(sample))
            for key, (prompt, params) in self.requests.items()
            for sample in range(params.n)
        }
        resumed = random.Random(f"resumed {seed}")
        self.known = {key: self._known(key, resumed) for key in self.requests if resumed.random() < 0.3}
        self.cancel_after = {key: rng.randint(0, 40) for key in self.sequences if rng.random() < 0.25}

    def _request(self, rng: random.Random) -> tuple[list[int], SamplingParams]:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 3, 8, 9, 15, self.max_model_len - 1]))]
        if rng.random() < 0.6:
            begin = rng.randrange(1, len(self.shared))
            prompt = self.shared[:begin] + (prompt if rng.random() < 0.6 else [])
        prompt = prompt[: self.max_model_len - 1]
        params = SamplingParams(
            max_tokens=rng.choice([None, 1, 2, 7, 30]),
            seed=rng.randrange(1_000),
            temperature=rng.choice([0.0, 1.0]),
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 0, 3]))],
            n=rng.choice([1, 1, 1, 2, MAX_N]),
        )
        return prompt, params

    def _known(self, key: int, rng: random.Random) -> list[list[int] | None]:
        """The output that each sample of a resumed request brings; None: the sample has ended. At least one has not."""
        n = self.requests[key][1].n
        answers = [self.expected(key + sample) for sample in range(n)]
        known: list[list[int] | None] = [answer[: rng.randrange(len(answer))] for answer in answers]
        for sample in rng.sample(range(n), rng.randrange(n)):
            known[sample] = None
        return known

    def has_ended(self, key: int) -> bool:
        """Whether a sequence had ended before its request was resumed."""
        request = key - key % MAX_N
        return request in self.known and self.known[request][key % MAX_N] is None

    def rest(self, key: int) -> list[int]:
        """The tokens that a sequence still lacks when it arrives."""
        request = key - key % MAX_N
        known = self.known[request][key % MAX_N] if request in self.known else []
        return self.expected(key)[len(known or []) :]

    def _scheduling(self, key: int) -> dict[str, Any]:
        return {"priority": key % 3} if self.shape["policy"] == "priority" else {"tenant": f"tenant {key % 3}"}

    def expected(self, key: int) -> list[int]:
        prompt, params = self.sequences[key]
        limit = self.max_model_len
        if params.max_tokens is None:
            limit = min(limit, self.shape["num_blocks"] * self.block_size)
        else:
            limit = min(limit, len(prompt) + params.max_tokens)
        end_ids = [*(() if params.ignore_eos else self.shape["eos_token_ids"]), *params.stop_token_ids]
        return expected_tokens(prompt, params.seed or 0, limit, end_ids)

    def run(self, depth: int, before: Callable[[int, ScheduledEngine], None] | None = None) -> ScheduledEngine:
        """Events in random order, everything that may be late being late at times.

        `before` gets a turn before each event, with the event's number.
        """
        rng = random.Random(self.seed * 8 + depth)
        engine = ScheduledEngine(**self.shape, depth=depth)
        scheduler = engine.scheduler
        to_send = {ring: [] for ring in range(1, self.shape["num_tokenizers"] + 1)}
        for key in self.requests:
            to_send[rng.choice(list(to_send))].append(key)
        sent: set[int] = set()
        for moment in range(20_000):
            if before is not None:
                before(moment, engine)
            event = rng.choice(("send", "plan", "plan", "device", "apply", "hear", "cancel", "clear", "compile"))
            if event == "send":
                ring = rng.choice(list(to_send))
                if to_send[ring] and engine.can_publish(len(self.requests[to_send[ring][0]][0]), ring):
                    key = to_send[ring].pop(0)
                    known, scheduling = self.known.get(key), self._scheduling(key)
                    engine.send(key, *self.requests[key], ring=ring, known=known, **scheduling)
                    sent |= set(range(key, key + self.requests[key][1].n))
            elif event == "plan" and scheduler.num_in_flight < depth:
                engine.plan()
            elif event == "device" and engine.gpu.num_submitted and engine.grammar.can_answer(scheduler):
                engine.run_device()
            elif event == "apply" and scheduler.num_in_flight:
                engine.apply()
            elif event == "hear":
                engine.hear()
            elif event == "compile":
                self._compile(engine, rng)
            elif event == "clear" and rng.random() < 0.05:
                scheduler.clear_cache()
            elif event == "cancel":
                scheduler.cancel([key for key, after in self.cancel_after.items() if key in sent and moment >= after])
            done = not (scheduler.num_open or scheduler.num_in_flight or any(to_send.values()))
            if done and engine.hear() is None:
                break
        else:
            pytest.fail("the engine never came to an end")
        return engine

    def _compile(self, engine: ScheduledEngine, rng: random.Random) -> None:
        """Answer one of the grammars that wait, in any order."""
        engine.grammar.hear(engine.scheduler)
        if engine.grammar.compiles:
            index = rng.randrange(len(engine.grammar.compiles))
            is_refused = engine.grammar.compiles[index][1].key in self.refused
            engine.grammar.compile(engine.scheduler, index, "no" if is_refused else "")


@pytest.mark.parametrize("first_seed", range(0, NUM_SEEDS, 16))
def test_every_request_gets_its_own_tokens_at_any_depth_and_nothing_leaks(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 16):
        traffic = Traffic(seed)
        for depth in (1, 2, 3, 4):
            try:
                engine = traffic.run(depth)
                engine.check_empty()
                check_cache(traffic, engine)
                check_samples(traffic, engine)
                check_masks(traffic, engine)
                for key, end in engine.ends.items():
                    check_end(traffic, engine, key, end)
            except Exception as error:
                error.add_note(f"seed {seed}, depth {depth}")
                raise


def check_samples(traffic: Traffic, engine: ScheduledEngine) -> None:
    """Every request was taken with all its samples, or answered once."""
    for key, (_, params) in traffic.requests.items():
        ended = [k for k in range(key, key + MAX_N) if k in engine.ends]
        if engine.ends.get(key) == "error" and engine.errors[key][0] == "queue_full":
            assert ended == [key]
        else:
            assert ended == [k for k in range(key, key + params.n) if not traffic.has_ended(k)]


def check_masks(traffic: Traffic, engine: ScheduledEngine) -> None:
    """A grammar process was told every token of its sequences in order, but the last one."""
    told = engine.grammar.told
    assert told.keys() <= {key for key, (_, params) in traffic.sequences.items() if params.structured_outputs}
    for key, (_, params) in traffic.sequences.items():
        if params.structured_outputs is not None:
            expected = traffic.rest(key)
            if engine.ends.get(key) in ("stop", "length"):
                assert told[key] == expected[:-1]
            else:
                assert told.get(key, []) == expected[: len(told.get(key, []))]


def check_cache(traffic: Traffic, engine: ScheduledEngine) -> None:
    """Every cached block has the name of tokens that some request really has, and the KV of these."""
    size, prefixes = traffic.block_size, {}
    for key, (prompt, _) in traffic.sequences.items():
        tokens, prefix = prompt + traffic.expected(key), 1
        names = [tuple(name) for name in read_hashes(engine.names(tokens))[1:].tolist()]
        for i, token_id in enumerate(tokens[: len(names) * size]):
            prefix = extend_hash(prefix, token_id)
            if (i + 1) % size == 0:
                prefixes[names[i // size]] = prefix
    for name, block in cached_blocks(engine):
        assert name in prefixes, "a block is cached under the name of tokens that no request has"
        assert engine.gpu.kv_prefix[(block + 1) * size - 1] == prefixes[name], "a block is cached under a wrong name"
    for key, num_cached in engine.cached.items():
        num_prompt = len(traffic.sequences[key][0])
        is_resumed = key - key % MAX_N in traffic.known
        assert 0 < num_cached < num_prompt + is_resumed
        assert num_cached % size == 0 or num_cached == num_prompt


def cached_blocks(engine: ScheduledEngine) -> list[tuple[tuple[int, ...], int]]:
    table = engine.scheduler._kv_cache.pool._index
    blocks = (table._place >= 0).nonzero()[0]
    places = table._place[blocks]
    assert len(blocks) == len(table)
    assert (table._block[places] == blocks).all()
    names = zip(table._first[places].tolist(), table._second[places].tolist(), strict=True)
    return list(zip(names, blocks.tolist(), strict=True))


def offer_planned(cache: PrefixCache, rows: Any, offer: Any = PrefixCache.offer_full) -> None:
    """As if a block were full as soon as its tokens are planned."""
    columns = cache._table
    with patch.object(columns, "num_computed_tokens", columns.num_planned_tokens):
        offer(cache, rows)


def offer_unknown(cache: PrefixCache, rows: Any, offer: Any = PrefixCache.offer_full) -> None:
    """As if tokens were known before their step is applied."""
    columns = cache._table
    with patch.object(columns, "num_tokens", columns.num_planned_tokens):
        offer(cache, rows)


def find_all(cache: PrefixCache, sequence: Any, num_known: int, find: Any = PrefixCache.find) -> Any:
    """As if a prompt might be cached to its last token."""
    return find(cache, sequence, num_known + 1)


def free_unshared(pool: BlockPool, blocks: Any, free: Any = BlockPool.free) -> None:
    """As if a block that one user frees had no other."""
    pool._num_users[blocks] = 1
    free(pool, np.unique(blocks))


def share_lease(lease: Any, **_: bool) -> Any:
    """As if all samples might copy their ids from the records that end with the first of them."""
    return lease


def keep_ended(requests: MaskRequests, batch: Any, places: Any, unseen: Any = MaskRequests._unseen) -> Any:
    """As if a sequence that has ended still needed its mask."""
    _, tokens = unseen(requests, batch, places)
    return requests._table.key[batch.rows[places]], tokens


def tell_never(admission: Admission, sequence: Any, resume: Any = Admission.resume) -> Any:
    """As if a resumed sequence's newest token had been told."""
    admission._table.num_followed_tokens[sequence.row] = admission._table.num_tokens[sequence.row]
    return resume(admission, sequence)


def ask_early(requests: MaskRequests, batch: Any, samples: Any, plan: Any = MaskRequests.plan) -> Any:
    """As if a step's masks did not depend on the results of the steps in flight."""
    masks = plan(requests, batch, samples)
    if masks is not None:
        requests.send(PlannedStep(1, 0, 0, batch, samples, 0, [], masks))
    return None if masks is None else StepMasks(masks.tickets, {})


@pytest.mark.parametrize(
    ("owner", "method", "mutant"),
    [
        (PrefixCache, "offer_full", offer_planned),
        (PrefixCache, "offer_full", offer_unknown),
        (PrefixCache, "find", find_all),
        (BlockPool, "free", free_unshared),
        (sequence, "replace", share_lease),
        (MaskRequests, "_unseen", keep_ended),
        (Admission, "resume", tell_never),
        (MaskRequests, "plan", ask_early),
    ],
    ids=[
        "offered early", "tokens past the end", "nothing left to compute", "freed while shared", "records shared",
        "mask for an ended sequence", "token never told", "masks asked for early",
    ],
)  # fmt: skip
def test_a_fault_planted_where_sequences_share_something_is_found(owner: Any, method: str, mutant: Any) -> None:
    assert not any_is_found()
    with patch.object(owner, method, mutant):
        assert any(is_found(seed) for seed in SEEDS)


@functools.cache
def any_is_found() -> bool:
    """Whether a seed fails without a planted fault."""
    return any(is_found(seed) for seed in SEEDS)


def is_found(seed: int) -> bool:
    traffic = Traffic(seed)
    try:
        engine = traffic.run(3)
        engine.check_empty()
        check_cache(traffic, engine)
        check_masks(traffic, engine)
        return any(engine.tokens[key] != traffic.rest(key)[: len(engine.tokens[key])] for key in engine.tokens)
    except (AssertionError, IndexError, ValueError, RingError):
        return True


def check_end(traffic: Traffic, engine: ScheduledEngine, key: int, end: str) -> None:
    """All tokens, or a beginning of them where the request was cancelled."""
    expected, got = traffic.rest(key), engine.tokens[key]
    if end == "error" and engine.errors[key][0] == "invalid_request":
        assert key - key % MAX_N in traffic.refused
        assert not got
    elif end == "error":
        assert engine.errors[key][0] == "queue_full"
        assert traffic.shape["max_num_waiting"] < len(traffic.sequences)
        assert not got
    elif end == "cancelled":
        assert key in traffic.cancel_after
        assert got == expected[: len(got)]
        assert len(got) < len(expected), "a request that had ended was cancelled"
    else:
        assert got == expected
        params = traffic.sequences[key][1]
        end_ids = {*(() if params.ignore_eos else traffic.shape["eos_token_ids"]), *params.stop_token_ids}
        assert end == ("stop" if got[-1] in end_ids else "length")
