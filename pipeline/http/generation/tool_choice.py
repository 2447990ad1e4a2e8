"""From the tools and the answer format of a request to the grammar of its answers, and how they hold calls."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from ipc.errors import InvalidRequest
from ipc.structured_outputs import MAX_STRUCTURE_BYTES, StructuredOutputs
from pipeline.http.generation.answer_formats import Node, as_node, read_answer_format
from pipeline.http.generation.argument_formats import const, json_value, one_of, sequence
from pipeline.http.generation.call_formats import BARE_CALL, FINAL_ANSWER, CallFormats, parameters_source
from pipeline.http.generation.template_tools import messages_for
from pipeline.http.generation.tool_definitions import ToolUse, parameters_of, read_tool_use
from pipeline.http.parsing.families import HARMONY
from pipeline.http.parsing.formats import CallForm, OutputFormat
from pipeline.http.parsing.native_forms import JSON_LIST, NATIVE_FORMS, NativeForm
from pipeline.http.parsing.scanner import Tool
from workers.grammar.origin import SOURCE, field_of

__all__ = ["Constraint", "constrain", "messages_for"]

# In harmony an answer or a call is a message too, and the header of the next message follows the reasoning.
_REASONING: Final = {HARMONY: ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")}


@dataclass(frozen=True)
class Constraint:
    """The grammar of a request's answers, and how to read them.

    Args:
        structured: the grammar; None: free text.
        call_form: how answers hold calls of tools.
        tools: the tools that answers may call.
    """

    structured: StructuredOutputs | None
    call_form: CallForm
    tools: list[Tool] = field(default_factory=list)


def constrain(
    *,
    tools: Any,
    tool_choice: Any,
    parallel_tool_calls: Any,
    response_format: Any,
    structured_outputs: Any,
    format: OutputFormat,
    starts_in_reasoning: bool,
) -> Constraint:
    """Choose the grammar of a request's answers from its fields, which are JSON values.

    - A call that is required or named follows the schema of its tool, and there is no text beside it. So
      `response_format`, which is about text, has no effect then.
    - With "auto", calls of tools that are `strict` follow their schemas. If an answer format is given, the answer is
      calls or has that format. A grammar also holds if only some tools are allowed, or only one call. Otherwise the
      answer is free.

    Raises InvalidRequest, naming the field.
    """
    use = read_tool_use(tools, tool_choice)
    answer = read_answer_format(response_format, structured_outputs)
    if not isinstance(parallel_tool_calls, bool | None):
        raise InvalidRequest(f"parallel_tool_calls ({reprlib.repr(parallel_tool_calls)}) must be true or false")
    if use.mode in ("required", "named") and structured_outputs is not None and answer is not None:
        raise InvalidRequest(
            f"structured_outputs (with {answer.constraint}) cannot be honoured beside tool_choice "
            f"({reprlib.repr(tool_choice)}): the answer is a call then; leave one of them out"
        )
    try:
        spec, call_form = _grammar(use, answer, format, parallel_tool_calls is not False)
    except RecursionError:
        raise InvalidRequest("tools has parameters that are nested too deeply") from None
    return Constraint(_behind_reasoning(spec, format, starts_in_reasoning), call_form, use.tools)


def _grammar(
    use: ToolUse, answer: StructuredOutputs | None, format: OutputFormat, is_parallel: bool
) -> tuple[StructuredOutputs | None, CallForm]:
    if use.mode == "required" or use.mode == "named":
        return _of_calls(use, format, is_parallel)
    if use.mode == "auto":
        return _of_either(use, answer, format, is_parallel), "native"
    return _of_answer(answer, format), "none"


def _of_calls(use: ToolUse, format: OutputFormat, is_parallel: bool) -> tuple[StructuredOutputs, CallForm]:
    form = _form(format)
    if form is None and use.mode == "named":
        (tool,) = use.tools
        return _structural_tag(json_value(parameters_of(tool)) | {SOURCE: parameters_source(tool)}), "json_arguments"
    is_parallel = is_parallel and use.mode == "required"
    formats = CallFormats(form or JSON_LIST, use.tools, follows_schemas=True, is_parallel=is_parallel)
    return _structural_tag(formats.calls()), "json_list" if form is None else "native"


def _of_either(
    use: ToolUse, answer: StructuredOutputs | None, format: OutputFormat, is_parallel: bool
) -> StructuredOutputs | None:
    is_bound = use.is_limited or not is_parallel or any(tool.get("strict") for tool in use.tools)
    if (answer is None and not is_bound) or (answer is not None and answer.structural_tag is not None):
        return answer  # a structural tag says itself how calls are written
    form = _form(format)
    if form is None and format.tool_parser is not None:
        return answer  # the model's own files say how it writes calls, which no grammar knows
    if form is None:
        form, is_parallel = BARE_CALL, False  # a bare call is the whole answer
    formats = CallFormats(form, use.tools, follows_schemas=False, is_parallel=is_parallel)
    final = FINAL_ANSWER.get(_family(format), "")
    if answer is None:
        return _structural_tag(formats.calls_or_text(final))
    node = as_node(answer)
    if node["type"] == "json_schema":
        return _structural_tag(formats.calls_or_json(node, final), answer)
    return _structural_tag(one_of(formats.calls(), sequence(const(final), node)), answer)


def _of_answer(answer: StructuredOutputs | None, format: OutputFormat) -> StructuredOutputs | None:
    final = FINAL_ANSWER.get(_family(format))
    if answer is None or final is None or answer.structural_tag is not None:
        return answer
    return _structural_tag(sequence(const(final), as_node(answer)), answer, source=field_of(answer))


def _structural_tag(
    node: Node, options_of: StructuredOutputs | None = None, *, source: str = "tools"
) -> StructuredOutputs:
    tag = {"type": "structural_tag", SOURCE: source, "format": node}
    text = json.dumps(tag, ensure_ascii=False, separators=(",", ":"))
    if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_STRUCTURE_BYTES:
        raise InvalidRequest(
            f"{source} cannot be used: the grammar has {size:,} bytes, more than the {MAX_STRUCTURE_BYTES:,} that a "
            "request may have: simplify it"
        )
    if options_of is None:
        return StructuredOutputs(structural_tag=text)
    return msgspec.structs.replace(
        options_of, structural_tag=text, json=None, regex=None, choice=None, grammar=None, json_object=None
    )


def _behind_reasoning(
    spec: StructuredOutputs | None, format: OutputFormat, starts_in_reasoning: bool
) -> StructuredOutputs | None:
    own = _REASONING.get(_family(format))
    tags = own or format.reasoning_tags
    if spec is None or tags is None or spec.after_reasoning:
        return spec
    is_inside = starts_in_reasoning or (own is None and format.always_reasons)
    return msgspec.structs.replace(spec, after_reasoning=list(tags[1:] if is_inside else tags))


def _family(format: OutputFormat) -> str:
    """The name of the family whose form calls and answers have; "" = none is known."""
    return HARMONY if format.reasoning_parser == HARMONY else format.tool_parser or ""


def _form(format: OutputFormat) -> NativeForm | None:
    return NATIVE_FORMS.get(_family(format))
