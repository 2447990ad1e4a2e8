"""Random traffic through the scheduler and a fake GPU, against what each request must get by itself."""

from __future__ import annotations

import random

import pytest

from ipc.sampling import SamplingParams
from tests.simulation.fake_gpu import VOCAB_SIZE, expected_tokens
from tests.simulation.scheduled_engine import ScheduledEngine

NUM_SEEDS = 96


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
        self.requests = {key: self._request(rng) for key in range(rng.randint(1, 24))}
        self.cancel_after = {key: rng.randint(0, 40) for key in self.requests if rng.random() < 0.25}

    def _request(self, rng: random.Random) -> tuple[list[int], SamplingParams]:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 3, 8, 9, 15, self.max_model_len - 1]))]
        prompt = prompt[: self.max_model_len - 1]
        params = SamplingParams(
            max_tokens=rng.choice([None, 1, 2, 7, 30]),
            seed=rng.randrange(1_000),
            temperature=rng.choice([0.0, 1.0]),
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 0, 3]))],
        )
        return prompt, params

    def expected(self, key: int) -> list[int]:
        prompt, params = self.requests[key]
        limit = self.max_model_len
        if params.max_tokens is None:
            limit = min(limit, self.shape["num_blocks"] * self.block_size)
        else:
            limit = min(limit, len(prompt) + params.max_tokens)
        end_ids = [*(() if params.ignore_eos else self.shape["eos_token_ids"]), *params.stop_token_ids]
        return expected_tokens(prompt, params.seed or 0, limit, end_ids)

    def run(self, depth: int) -> ScheduledEngine:
        """Events in random order, everything that may be late being late at times."""
        rng = random.Random(self.seed * 8 + depth)
        engine = ScheduledEngine(**self.shape, depth=depth)
        scheduler = engine.scheduler
        to_send = {ring: [] for ring in range(1, self.shape["num_tokenizers"] + 1)}
        for key in self.requests:
            to_send[rng.choice(list(to_send))].append(key)
        sent: set[int] = set()
        for moment in range(20_000):
            event = rng.choice(("send", "plan", "plan", "device", "apply", "hear", "cancel"))
            if event == "send":
                ring = rng.choice(list(to_send))
                if to_send[ring] and engine.can_publish(len(self.requests[to_send[ring][0]][0]), ring):
                    key = to_send[ring].pop(0)
                    engine.send(key, *self.requests[key], ring=ring)
                    sent.add(key)
            elif event == "plan" and scheduler.num_in_flight < depth:
                engine.plan()
            elif event == "device" and engine.gpu.num_submitted:
                engine.run_device()
            elif event == "apply" and scheduler.num_in_flight:
                engine.apply()
            elif event == "hear":
                engine.hear()
            elif event == "cancel":
                scheduler.cancel([key for key, after in self.cancel_after.items() if key in sent and moment >= after])
            done = not (scheduler.has_work or scheduler.num_in_flight or any(to_send.values()))
            if done and engine.hear() is None:
                break
        else:
            pytest.fail("the engine never came to an end")
        return engine


@pytest.mark.parametrize("first_seed", range(0, NUM_SEEDS, 16))
def test_every_request_gets_its_own_tokens_at_any_depth_and_nothing_leaks(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 16):
        traffic = Traffic(seed)
        for depth in (1, 2, 3, 4):
            try:
                engine = traffic.run(depth)
                engine.check_empty()
                assert set(engine.ends) == set(traffic.requests)
                for key, end in engine.ends.items():
                    check_end(traffic, engine, key, end)
            except Exception as error:
                error.add_note(f"seed {seed}, depth {depth}")
                raise


def check_end(traffic: Traffic, engine: ScheduledEngine, key: int, end: str) -> None:
    """All tokens, or a beginning of them where the request was cancelled."""
    expected, got = traffic.expected(key), engine.tokens[key]
    if end == "error":
        assert engine.errors[key][0] == "queue_full"
        assert traffic.shape["max_num_waiting"] < len(traffic.requests)
        assert not got
    elif end == "cancelled":
        assert key in traffic.cancel_after
        assert got == expected[: len(got)]
        assert len(got) < len(expected), "a request that had ended was cancelled"
    else:
        assert got == expected
        params = traffic.requests[key][1]
        end_ids = {*(() if params.ignore_eos else traffic.shape["eos_token_ids"]), *params.stop_token_ids}
        assert end == ("stop" if got[-1] in end_ids else "length")
