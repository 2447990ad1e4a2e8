"""The sampling and scheduling fields of request bodies, and the engine's parameters that follow from them.

Names and meanings are those of OpenAI's API and of vLLM's additions to it. A field of the same name in
`SamplingParams` says what it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from ipc.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from ipc.scheduling_params import MAX_PRIORITY, SchedulingParams, no_priority
from pipeline.http.body_schemas import ResponseFormat
from pipeline.http.errors import HttpError
from pipeline.http.generation.defaults import SamplingDefaults
from pipeline.http.service import Service, new_id

MAX_TEMPERATURE: Final = 2.0  # OpenAI's bound
MAX_TOP_LOGPROBS: Final = MAX_LOGPROBS
MAX_REQUEST_ID_CHARS: Final = 256
TENANT_HEADER: Final = "x-tenant"

_SAME_NAME: Final = (  # fields whose value goes into the engine's parameters as it is
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "thinking_token_budget", "seed", "stop",
    "include_stop_str_in_output", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "spaces_between_special_tokens", "truncate_prompt_tokens", "logprob_token_ids", "prompt_logprobs", "logprobs_mode",
    "n",
)  # fmt: skip


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields that completions, chat completions and responses share. None = left out."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    min_tokens: int | None = None
    thinking_token_budget: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    logprob_token_ids: list[int] | None = None
    logprobs_mode: str | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    deadline_s: float | None = None
    queue_timeout_s: float | None = None
    tenant: str | None = None


class CompletionFields(SamplingFields, kw_only=True):
    """Further fields that completions and chat completions share. None = left out."""

    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


def sampling_params(body: SamplingFields, defaults: SamplingDefaults, **forced: Any) -> SamplingParams:
    """The engine's parameters: the defaults, then the body's fields, then `forced`; None leaves the value before it.

    Raises HttpError 400 for a temperature outside [0, 2], and InvalidRequest as SamplingParams does.
    """
    if body.temperature is not None and not 0 <= body.temperature <= MAX_TEMPERATURE:
        raise HttpError(
            400, f"temperature ({body.temperature}) must lie in [0, {MAX_TEMPERATURE:g}]", param="temperature"
        )
    values: dict[str, Any] = dict(defaults.values)
    for name in _SAME_NAME:
        value = getattr(body, name, None)  # not every body has all of them
        if value is not None:
            values[name] = value
    if isinstance(body.seed, int) and body.seed < 0:
        values["seed"] = body.seed % 2**63  # OpenAI's API takes negative seeds
    values |= {name: value for name, value in forced.items() if value is not None}
    return SamplingParams(**values)


def answer_id(prefix: str, body: SamplingFields) -> str:
    """The id of an answer: a new one, or `prefix` and the body's `request_id`, as in vLLM.

    Raises HttpError 400 for one of more than 256 characters.
    """
    if not body.request_id:
        return new_id(prefix)
    if len(body.request_id) > MAX_REQUEST_ID_CHARS:
        message = f"request_id has {len(body.request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed"
        raise HttpError(400, message, param="request_id")
    return prefix + body.request_id


def structured_fields(body: SamplingFields) -> dict[str, Any] | None:
    """The fields of StructuredOutputs that a body asks for, in vLLM's present or earlier names; None for none.

    Raises HttpError 400 for more than one of them.
    """
    names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if len(given) + (body.structured_outputs is not None) > 1:
        first, second = ["structured_outputs", *given][-2:] if body.structured_outputs is not None else list(given)[:2]
        raise HttpError(400, f"{first} and {second} are both given: give one of them", param=second)
    if given:
        ((name, value),) = given.items()
        return {name.removeprefix("guided_"): value}
    return body.structured_outputs


def scheduling_params(body: SamplingFields, headers: Mapping[str, str], service: Service) -> SchedulingParams:
    """The engine's scheduling parameters. The body's tenant wins over the header's.

    In vLLM a lower `priority` is scheduled earlier, in the engine a higher one. Values beyond the engine's range count
    as the end of the range, because vLLM has no bounds. Raises HttpError 400 for a priority without effect.
    """
    if body.priority and not service.takes_priority:  # the engine would name the other number
        raise HttpError(400, no_priority(body.priority), param="priority")
    return SchedulingParams(
        priority=-max(-MAX_PRIORITY, min(MAX_PRIORITY, body.priority or 0)),
        tenant=body.tenant or headers.get(TENANT_HEADER, ""),
        deadline_s=body.deadline_s,
        queue_timeout_s=body.queue_timeout_s,
    )


def max_prompt_tokens(params: SamplingParams, max_model_len: int) -> int | None:
    """How many tokens of a prompt `truncate_prompt_tokens` keeps, by the engine's rule. None = all."""
    if params.truncate_prompt_tokens == -1:
        return max(1, max_model_len - (params.max_tokens or 1))
    return params.truncate_prompt_tokens
