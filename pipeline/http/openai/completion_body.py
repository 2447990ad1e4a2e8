"""The body of `/v1/completions`: its prompts, and what it asks of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from pipeline.http.body_schemas import Prompts
from pipeline.http.errors import HttpError
from pipeline.http.generation.answer_formats import read_answer_format
from pipeline.http.generation.sampling_fields import (
    MAX_TOP_LOGPROBS,
    CompletionFields,
    sampling_params,
    scheduling_params,
    structured_fields,
)
from pipeline.http.openai.wire import StreamOptions, check_prompt_logprobs, check_stream_options
from pipeline.http.transport import Call

DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's
MAX_PROMPTS: Final = 1_024  # of one request
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "suffix": ("",), "use_beam_search": (False,), "length_penalty": (1.0,), "kv_transfer_params": (),
    "prompt_embeds": (),
}  # fmt: skip

Prompt = str | list[int]


class CompletionBody(CompletionFields, kw_only=True):
    """Names and meanings are those of OpenAI's API, and of vLLM's additions to it."""

    prompt: str | Prompts
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What a body asks of each of its prompts.

    Args:
        prompts: texts or token ids, at least one.
        logprobs: how many alternatives of each token are reported; None = no log-probabilities.
        echo: the answer begins with the prompt.
        add_special_tokens: the tokenizer adds its special tokens to a text.
        shows_token_ids: the answer has the token ids of prompt and output.
        generates: False: only the prompt is scored (`max_tokens` 0 with `echo`). The engine generates one token even
            then, and the answer leaves it out.
    """

    prompts: list[Prompt]
    params: SamplingParams
    scheduling: SchedulingParams
    cache_salt: str
    logprobs: int | None
    echo: bool
    add_special_tokens: bool
    shows_token_ids: bool
    generates: bool


def read_request(call: Call, body: CompletionBody) -> CompletionRequest:
    """Raises HttpError 400 or InvalidRequest, naming the field."""
    prompts = _prompts(body.prompt)
    echo = bool(body.echo)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not echo:
        raise HttpError(400, "max_tokens (0) needs echo: without it there is nothing to answer", param="max_tokens")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise HttpError(
            400, f"best_of ({body.best_of}) is not supported: leave it out, or set it to n ({body.n or 1})",
            param="best_of",
        )  # fmt: skip
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_TOP_LOGPROBS:
        raise HttpError(400, f"logprobs ({body.logprobs}) must lie in [0, {MAX_TOP_LOGPROBS}]", param="logprobs")
    check_prompt_logprobs(body.prompt_logprobs, is_stream=bool(body.stream))
    check_stream_options(body.stream_options, is_stream=bool(body.stream))
    scores_prompt = echo and body.logprobs is not None
    forced = {
        "max_tokens": max_tokens or 1,
        "logprobs": body.logprobs,
        "structured_outputs": read_answer_format(body.response_format, structured_fields(body)),
        "prompt_logprobs": max(body.logprobs or 0, body.prompt_logprobs or 0) if scores_prompt else None,
    }
    return CompletionRequest(
        prompts=prompts,
        params=sampling_params(body, call.service.defaults, **forced),
        scheduling=scheduling_params(body, call.headers, call.service),
        cache_salt=body.cache_salt or "",
        logprobs=body.logprobs,
        echo=echo,
        add_special_tokens=body.add_special_tokens is not False,
        shows_token_ids=bool(body.return_token_ids),
        generates=max_tokens > 0,
    )


def _prompts(given: str | list[Any]) -> list[Prompt]:
    """A text, token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if set(map(type, given)) == {int}:
        return [given]
    if not given:
        raise HttpError(400, "prompt is empty: give a text, token ids, or a list of either", param="prompt")
    if len(given) > MAX_PROMPTS:
        raise HttpError(400, f"prompt holds {len(given)} prompts; at most {MAX_PROMPTS} are allowed", param="prompt")
    for i, item in enumerate(given):
        if not isinstance(item, str) and not (isinstance(item, list) and item):
            raise HttpError(400, f"prompt[{i}] must be a text or a list of token ids", param="prompt")
    return given
