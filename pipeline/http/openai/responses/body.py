"""The body of a request for a response, and the fields of it that the answer repeats."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from pipeline.http.bodies import read_body
from pipeline.http.errors import HttpError
from pipeline.http.generation.sampling_fields import MAX_TOP_LOGPROBS, SamplingFields
from pipeline.http.openai.wire import StreamOptions, check_stream_options

INCLUDE_LOGPROBS: Final = "message.output_text.logprobs"
_INCLUDES: Final = (  # besides logprobs: parts of items that this server never has
    INCLUDE_LOGPROBS, "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
)  # fmt: skip
# Fields of chat completions, and what stands for them in this API.
_FOREIGN: Final = {
    "max_tokens": "give max_output_tokens",
    "response_format": "give text.format",
    "n": "send several requests",
    "prompt_logprobs": "use /v1/completions or /v1/chat/completions",
    "return_token_ids": "use /v1/completions or /v1/chat/completions",
    "return_tokens_as_token_ids": "use /v1/completions or /v1/chat/completions",
}
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "background": (False,), "conversation": (), "prompt": (), "context_management": ([],), "modalities": (["text"],),
    "audio": (), "enable_response_messages": (False,), "previous_input_messages": ([],), "kv_transfer_params": (),
    "mm_processor_kwargs": ({},), "media_io_kwargs": ({},), "personality": (), **dict.fromkeys(_FOREIGN, ()), "n": (1,),
}  # fmt: skip
_HARMLESS: Final = (
    "moderation", "image", "access_programs", "background_options", "prompt_cache_options", "vllm_xargs",
    "include_obfuscation",
)  # fmt: skip
_NOT_HERE: Final = {
    "background": "background (true) is not supported by this server: leave it out, and read the answer or its stream",
    "prompt": "prompt is not supported, because this server keeps no prompt templates: give instructions and input",
    "conversation": "conversation is not supported by this server: continue a response with previous_response_id",
    **{name: f"{name} is no field of this request: {instead}" for name, instead in _FOREIGN.items()},
}


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """`reasoning` of a request. Answers hold the reasoning itself, so `summary` has no effect."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    """`text` of a request. `verbosity` has no effect."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseBody(SamplingFields, kw_only=True):
    """Names and meanings are those of OpenAI's API, and of vLLM's additions to it. None = left out."""

    input: str | list[dict[str, Any]] = msgspec.field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def with_logprobs(self) -> bool:
        """The answer's text has log-probabilities."""
        return self.include is not None and INCLUDE_LOGPROBS in self.include


def read_response_body(body: bytes) -> ResponseBody:
    """Raises HttpError 400, naming the field."""
    try:
        read = read_body(body, ResponseBody, harmless=_HARMLESS, neutral=_NEUTRAL)
    except HttpError as error:
        if error.param in _NOT_HERE:
            raise HttpError(400, _NOT_HERE[error.param], param=error.param) from None
        raise
    _check_values(read)
    return read


def _check_values(body: ResponseBody) -> None:
    check_stream_options(body.stream_options, is_stream=bool(body.stream))
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise HttpError(
            400, f"max_output_tokens ({body.max_output_tokens}) must be at least 1", param="max_output_tokens"
        )
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise HttpError(
            400, f"top_logprobs ({body.top_logprobs}) must lie in [0, {MAX_TOP_LOGPROBS}]", param="top_logprobs"
        )
    if body.truncation not in (None, "auto", "disabled"):
        raise HttpError(400, f"truncation ({body.truncation[:100]!r}) must be 'auto' or 'disabled'", param="truncation")
    for name in body.include or []:
        if name not in _INCLUDES:
            raise HttpError(400, f"include ({name[:100]!r}) must be one of {', '.join(_INCLUDES)}", param="include")


def response_format(text: TextOptions | None) -> dict[str, Any] | None:
    """`text.format` as `response_format` of chat completions, where the schema is in an inner object."""
    if text is None or text.format is None:
        return None
    if text.format.get("type") != "json_schema":
        return text.format
    return {"type": "json_schema", "json_schema": {key: each for key, each in text.format.items() if key != "type"}}


def chat_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The tools as chat completions have them. Raises HttpError 400 for tools that OpenAI's servers run themselves."""
    for i, tool in enumerate(tools or []):
        if (kind := tool.get("type")) != "function":
            raise HttpError(
                400,
                f"tools[{i}].type ({str(kind)[:100]!r}) is not supported, because this server runs no tools itself: "
                "give tools of type 'function'",
                param=f"tools[{i}].type",
            )
    return [
        {"type": "function", "function": {key: each for key, each in tool.items() if key != "type"}}
        for tool in tools or []
    ]
