from __future__ import annotations

import math

import numpy as np
import pytest

from ipc.codec import decode, encode
from ipc.errors import InvalidRequest
from ipc.sampling_params import MAX_SEED, SamplingParams

INT32 = 2**31


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_tokens": 0}, "max_tokens (0) must be an integer in [1, 2**31), or None"),
        ({"max_tokens": True}, "max_tokens (True) must be an integer in [1, 2**31), or None"),
        ({"max_tokens": INT32}, "max_tokens (2147483648) must be an integer in [1, 2**31), or None"),
        ({"temperature": -0.5}, "temperature (-0.5) must lie in [0, 100]; below 0.001 it is greedy"),
        ({"temperature": math.nan}, "temperature (nan) must lie in [0, 100]; below 0.001 it is greedy"),
        ({"temperature": math.inf}, "temperature (inf) must lie in [0, 100]; below 0.001 it is greedy"),
        ({"temperature": "hot"}, "temperature ('hot') must lie in [0, 100]; below 0.001 it is greedy"),
        ({"top_k": -2}, "top_k (-2) must be an integer in [-1, 2**31) (0 or -1 = off)"),
        ({"top_k": 1.0}, "top_k (1.0) must be an integer in [-1, 2**31) (0 or -1 = off)"),
        ({"top_k": INT32}, "top_k (2147483648) must be an integer in [-1, 2**31) (0 or -1 = off)"),
        ({"top_p": 0}, "top_p (0) must lie in (0, 1] (1 = off)"),
        ({"top_p": 1.01}, "top_p (1.01) must lie in (0, 1] (1 = off)"),
        ({"min_p": -0.1}, "min_p (-0.1) must lie in [0, 1] (0 = off)"),
        ({"min_p": math.nan}, "min_p (nan) must lie in [0, 1] (0 = off)"),
        ({"seed": -1}, "seed (-1) must be an integer in [0, 2**63), or None"),
        ({"seed": MAX_SEED + 1}, "seed (9223372036854775808) must be an integer in [0, 2**63), or None"),
        ({"stop": [7]}, "stop ([7]) must be a list of at most 16 strings of 1 to 256 characters each"),
        ({"stop": [""]}, "stop (['']) must be a list of at most 16 strings of 1 to 256 characters each"),
        ({"stop_token_ids": [-1]}, "stop_token_ids ([-1]) must be a list of at most 16 integers in [0, 2**31)"),
        (
            {"stop_token_ids": [INT32]},
            "stop_token_ids ([2147483648]) must be a list of at most 16 integers in [0, 2**31)",
        ),
        ({"ignore_eos": 1}, "ignore_eos (1) must be true or false"),
        ({"logprobs": 21}, "logprobs (21) must be an integer in [0, 20], or None"),
        ({"n": 0}, "n (0) must be an integer in [1, 64]"),
        ({"n": 65}, "n (65) must be an integer in [1, 64]"),
        ({"n": None}, "n (None) must be an integer in [1, 64]"),
    ],
)
def test_a_bad_value_is_refused_with_field_value_and_cure(fields, text):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert str(caught.value) == text


@pytest.mark.parametrize("bias", [{"9" * 5_000: 1.0}, {str(i): 1.0 for i in range(2_000)}])
def test_a_logit_bias_that_is_too_long_is_refused(bias):
    with pytest.raises(InvalidRequest, match=r"^logit_bias \(.{1,200}\) must map at most 1024 token ids"):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1, "temperature": 0, "top_p": 1, "min_p": 1, "seed": 0, "logprobs": 0},
        {"max_tokens": INT32 - 1, "top_k": INT32 - 1, "top_p": 1e-9, "seed": MAX_SEED, "logprobs": 20},
        {"temperature": np.float64(0.001), "stop": [np.str_("END")]},
        {
            "temperature": 100.0,
            "stop": ["x" * 256] * 16,
            "stop_token_ids": [INT32 - 1] * 16,
            "ignore_eos": True,
            "n": 64,
        },
    ],
)
def test_the_ends_of_every_range_are_allowed_and_cross_the_wire(fields):
    params = SamplingParams(**fields)
    assert decode(encode(params), SamplingParams) == params


@pytest.mark.parametrize("field", ["stop", "stop_token_ids"])
def test_the_text_about_a_long_list_is_short(field):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: [7] * 100_000})
    assert str(caught.value).startswith(f"{field} ([7, 7, 7")
    assert len(str(caught.value)) < 200


def test_a_bad_value_from_the_wire_is_refused_with_the_same_text():
    with pytest.raises(InvalidRequest, match=r"^top_p \(2\.0\) must lie in \(0, 1\] \(1 = off\)$"):
        decode(encode({"top_p": 2.0}), SamplingParams)


def test_parameters_are_immutable_and_do_not_share_lists():
    one, two = SamplingParams(), SamplingParams()
    with pytest.raises(AttributeError):
        one.top_k = 3
    assert one.stop is not two.stop


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"max_tokens": np.int64(3), "seed": np.uint8(4), "n": np.int32(2)}, {"max_tokens": 3, "seed": 4, "n": 2}),
        ({"temperature": np.float32(0.5), "top_k": np.int64(-1)}, {"temperature": 0.5, "top_k": -1}),
        ({"stop": ("a", np.str_("b"))}, {"stop": ["a", "b"]}),
        ({"stop_token_ids": np.array([1, 2])}, {"stop_token_ids": [1, 2]}),
        ({"allowed_token_ids": [np.int32(1), 2]}, {"allowed_token_ids": [1, 2]}),
        ({"logit_bias": {np.int64(1): np.float32(2)}}, {"logit_bias": {1: 2.0}}),
        ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
        ({"bad_words": ("a", "a")}, {"bad_words": ["a"]}),
        ({"stop": None, "stop_token_ids": None, "bad_words": None, "thinking_token_budget": -1}, {}),
        ({"logprob_token_ids": (5, 3, 5)}, {"logprob_token_ids": [5, 3]}),
    ],
)
def test_values_that_stand_for_plain_ones_are_replaced(fields, plain):
    params = SamplingParams(**fields)
    assert params == SamplingParams(**plain)
    assert decode(encode(params), SamplingParams) == params


@pytest.mark.parametrize(
    "fields",
    [{"stop_token_ids": np.array([1.5])}, {"stop_token_ids": [np.int64(-1)]}, {"max_tokens": np.float64(3)}],
)
def test_numbers_of_numpy_are_checked_like_others(fields):
    with pytest.raises(InvalidRequest, match=next(iter(fields))):
        SamplingParams(**fields)


def test_requested_tokens_alone_ask_for_log_probabilities_of_the_sampled_ones():
    assert SamplingParams().num_logprobs is None
    assert SamplingParams(logprob_token_ids=[3]).num_logprobs == 0
    assert SamplingParams(logprobs=2, logprob_token_ids=[3]).num_logprobs == 2


def test_long_values_are_taken_out_without_a_trace():
    params = SamplingParams(max_tokens=3, seed=1, logprob_token_ids=[3])
    assert params.without_long_values() is params
    long = SamplingParams(
        max_tokens=3, seed=1, logprob_token_ids=[3], bad_words=["x"], logit_bias={1: 1.0}, allowed_token_ids=[1]
    )
    assert long.without_long_values() == params
    assert long.bad_words == ["x"]


def test_sample_0_keeps_the_seed_and_no_two_samples_of_close_seeds_share_one():
    for seed in (0, 1, MAX_SEED):
        params = SamplingParams(seed=seed, n=4, temperature=0.5, stop=["x"])
        assert params.of_sample(0) == SamplingParams(seed=seed, temperature=0.5, stop=["x"])
        assert params.of_sample(3).n == 1
    seeds = {SamplingParams(seed=seed, n=64).of_sample(index).seed for seed in range(50) for index in range(64)}
    assert len(seeds) == 50 * 64
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_the_seed_of_a_sample_is_the_same_for_ever():
    assert SamplingParams(seed=7, n=2).of_sample(1).seed == 5_595_607_496_629_875_680


def test_samples_of_a_request_without_a_seed_cannot_be_told_apart():
    with pytest.raises(InvalidRequest, match="seed"):
        SamplingParams(n=2).of_sample(1)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_sample_that_a_request_does_not_have_is_refused(index):
    with pytest.raises(InvalidRequest, match=rf"index \({index}\) must lie in \[0, 2\)"):
        SamplingParams(seed=1, n=2).of_sample(index)


def test_a_copy_with_a_seed_differs_in_the_seed_alone() -> None:
    params = SamplingParams(max_tokens=7, temperature=0.5, stop=["x"], n=3)
    assert params.with_seed(9) == SamplingParams(max_tokens=7, temperature=0.5, stop=["x"], n=3, seed=9)
    assert params.seed is None
