"""Hypothesis strategies for every message, derived from its declared types, so that a new field is covered."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from ipc.messages import Message
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from ipc.structured_outputs import StructuredOutputs

MAX_INT = 2**63 - 1
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 99),
    temperature=st.just(0.0) | st.floats(0.001, 100),
    seed=st.none() | st.integers(0, MAX_INT),
    stop=st.lists(st.sampled_from(["END", "é"]), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3),
    ignore_eos=st.booleans(),
    bad_words=st.lists(st.sampled_from(["END", "é"]), max_size=2),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
    spaces_between_special_tokens=st.booleans(),
    truncate_prompt_tokens=st.none() | st.just(-1) | st.integers(1, 99),
    thinking_token_budget=st.none() | st.integers(0, 99),
    prompt_logprobs=st.none() | st.integers(0, 20),
    logprob_token_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
    logprobs_mode=st.sampled_from(["raw_logprobs", "processed_logprobs"]),
    n=st.integers(1, 64),
)
STRUCTURED_OUTPUTS = st.one_of(
    st.builds(StructuredOutputs, json=st.just("{}") | st.just({"const": "é"}), disable_any_whitespace=st.booleans()),
    st.builds(
        StructuredOutputs,
        choice=st.lists(st.sampled_from(["a", "é"]), min_size=1, max_size=3),
        after_reasoning=st.lists(st.sampled_from(["</think>", "é"]), max_size=2),
    ),
)
SCHEDULING = st.builds(
    SchedulingParams,
    priority=st.integers(-1_000, 1_000),
    tenant=st.sampled_from(["", "é"]),
    deadline_s=st.none() | st.floats(0.001, 1e6),
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a message field's declared type."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(*map(values_of, arguments), max_size=3)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return structs_of(kind)
    return {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(0, MAX_INT),
        float: st.floats(allow_nan=False),
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        bytes: st.binary(max_size=24),
    }[kind]


def structs_of(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    if kind is SamplingParams:
        return PARAMS
    if kind is StructuredOutputs:
        return STRUCTURED_OUTPUTS
    if kind is SchedulingParams:
        return SCHEDULING
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: values_of(hints[name]) for name in kind.__struct_fields__})


ALL_MESSAGES: list[type[Message]] = Message.__subclasses__()
ANY_MESSAGE = Union[tuple(ALL_MESSAGES)]  # noqa: UP007
MESSAGES = st.sampled_from(ALL_MESSAGES).flatmap(structs_of)
