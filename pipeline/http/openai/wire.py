"""Values that several of OpenAI's endpoints write: usage and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from pipeline.client.outputs import TokenLogprob
from pipeline.http.errors import HttpError
from pipeline.http.generation.chat_run import RunUsage

DONE: Final = b"data: [DONE]\n\n"  # the last event of a stream


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options` of a request. `continuous_usage_stats` is vLLM's: every chunk has the usage so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers; accepted, without effect


def check_stream_options(options: StreamOptions | None, *, is_stream: bool) -> None:
    """Raises HttpError 400 if a whole answer is to have `stream_options`, as OpenAI's API does."""
    if options is not None and not is_stream:
        raise HttpError(400, "stream_options needs stream (true): set it, or leave both out", param="stream_options")


def check_prompt_logprobs(value: int | None, *, is_stream: bool) -> None:
    """Raises HttpError 400 if a stream is to have `prompt_logprobs`. As in vLLM, only whole answers have them."""
    if value is not None and is_stream:
        raise HttpError(
            400, f"prompt_logprobs ({value}) is not available in a stream: leave it or stream out",
            param="prompt_logprobs",
        )  # fmt: skip


def usage_value(usage: RunUsage) -> dict[str, Any]:
    """`usage` of an answer."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def chat_logprobs(rows: Sequence[TokenLogprob], *, as_ids: bool = False) -> dict[str, Any]:
    """`logprobs` of a choice of a chat completion. `logprob_token_ids` of the request follow the likeliest tokens."""
    return {
        "content": [
            _chat_logprob(row, row.token_id, row.logprob, as_ids)
            | {
                "top_logprobs": [
                    _chat_logprob(row, token_id, value, as_ids) for token_id, value in (row.top | row.requested).items()
                ]
            }
            for row in rows
        ],
        "refusal": None,
    }


def token_name(row: TokenLogprob, token_id: int, *, as_ids: bool) -> str:
    """A token's text, or "token_id:7" if the request has `return_tokens_as_token_ids`."""
    return f"token_id:{token_id}" if as_ids else row.text_of(token_id)


def prompt_logprobs_value(rows: Sequence[TokenLogprob | None], num_top: int) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`, vLLM's field: for each token of the prompt, token id to log-probability, rank and text."""
    return [None if row is None else _prompt_row(row, num_top) for row in rows]


def _chat_logprob(row: TokenLogprob, token_id: int, logprob: float, as_ids: bool) -> dict[str, Any]:
    return {
        "token": token_name(row, token_id, as_ids=as_ids),
        "logprob": finite(logprob),
        "bytes": list(row.token_bytes.get(token_id, b"")),
    }


def _prompt_row(row: TokenLogprob, num_top: int) -> dict[str, Any]:
    ranked = {token_id: rank for rank, token_id in enumerate(row.top, start=1)}
    found = dict(list(row.top.items())[:num_top])
    found.setdefault(row.token_id, row.logprob)
    return {
        str(token_id): {
            "logprob": finite(logprob), "rank": ranked.get(token_id), "decoded_token": row.text_of(token_id),
        }
        for token_id, logprob in found.items()
    }  # fmt: skip


def finite(logprob: float) -> float:
    """JSON has no infinity. OpenAI writes -9999 for a token that cannot be sampled."""
    return max(logprob, -9999.0)
