"""How each family of models writes a call of a tool. The parsers read these forms, and grammars are made from them.

The calls of an answer have the text

    section_begin + call + separator + call + ... + section_end
    call = begin + NAME + middle + ARGUMENTS + end

A parser accepts more than that, for example other white space. A grammar should write exactly that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

ArgumentsForm = Literal["json", "python", "xml"]


@dataclass(frozen=True, slots=True)
class XmlArguments:
    """How arguments are written one by one.

    Each has the text key_begin + KEY + key_end + value_begin + VALUE + value_end. A text stands there as it is, any
    other value as JSON.
    """

    key_begin: str
    key_end: str
    value_begin: str
    value_end: str


@dataclass(frozen=True, slots=True)
class NativeForm:
    """The text of a family's calls.

    `begin` and `end` surround one call. `trigger` is the first text that only a call has; without one (""), calls are
    the whole answer. `middle` stands between the name and the arguments. "{index}" in it is the number of the call,
    counted from 0. `arguments` is their notation: a JSON object, Python's `name=value, ...`, or the tags of `xml`.
    """

    trigger: str
    begin: str
    middle: str
    end: str
    section_begin: str = ""
    separator: str = ""
    section_end: str = ""
    arguments: ArgumentsForm = "json"
    xml: XmlArguments | None = None
    allows_parallel_calls: bool = True
    more_markers: tuple[str, ...] = ()  # special tokens that parsers read, too, and grammars do not use
    call_id_length: int = 0  # of the ids that the family's chat templates take, of letters and digits; 0: any
    ends_reasoning: bool = False  # models of this family call tools within the reasoning, and leave its end tag out

    @property
    def markers(self) -> tuple[str, ...]:
        """Every text of the form that a special token of the model may be part of."""
        return (self.section_begin, self.begin, self.middle, self.end, self.section_end, *self.more_markers)

    def example(self, name: str, arguments: str, *, index: int = 0) -> str:
        """The text of one call. `arguments` is written as the family does."""
        return f"{self.begin}{name}{self.middle.replace('{index}', str(index))}{arguments}{self.end}"


_DEEPSEEK_SECTION: Final = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

NATIVE_FORMS: Final[dict[str, NativeForm]] = {
    # <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>
    "hermes": NativeForm(
        trigger="<tool_call>",
        begin='<tool_call>\n{"name": "',
        middle='", "arguments": ',
        end="}\n</tool_call>",
        separator="\n",
    ),
    # <tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>
    "qwen3_coder": NativeForm(
        trigger="<tool_call>",
        begin="<tool_call>\n<function=",
        middle=">\n",
        end="</function>\n</tool_call>",
        separator="\n",
        arguments="xml",
        xml=XmlArguments(key_begin="<parameter=", key_end=">", value_begin="\n", value_end="\n</parameter>\n"),
    ),
    # <seed:tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</seed:tool_call>
    "seed_oss": NativeForm(
        trigger="<seed:tool_call>",
        begin="<seed:tool_call>\n<function=",
        middle=">\n",
        end="</function>\n</seed:tool_call>",
        separator="\n",
        arguments="xml",
        xml=XmlArguments(key_begin="<parameter=", key_end=">", value_begin="", value_end="</parameter>\n"),
    ),
    # <minimax:tool_call>\n<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>\n</minimax:tool_call>
    "minimax_m2": NativeForm(
        trigger="<minimax:tool_call>",
        section_begin="<minimax:tool_call>\n",
        begin='<invoke name="',
        middle='">\n',
        end="</invoke>\n",
        section_end="</minimax:tool_call>",
        arguments="xml",
        xml=XmlArguments(key_begin='<parameter name="', key_end='">', value_begin="", value_end="</parameter>\n"),
    ),
    # {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}
    "llama3_json": NativeForm(
        trigger="",
        begin='{"name": "',
        middle='", "parameters": ',
        end="}",
        separator="; ",
        more_markers=("<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    ),
    # [f(a=1, b="x"), g()]
    "pythonic": NativeForm(
        trigger="",
        section_begin="[",
        begin="",
        middle="(",
        end=")",
        separator=", ",
        section_end="]",
        arguments="python",
        more_markers=("<|python_start|>", "<|python_end|>"),
    ),
    # <|tool_call_start|>[f(a=1, b="x"), g()]<|tool_call_end|>
    "lfm2": NativeForm(
        trigger="<|tool_call_start|>",
        section_begin="<|tool_call_start|>[",
        begin="",
        middle="(",
        end=")",
        separator=", ",
        section_end="]<|tool_call_end|>",
        arguments="python",
    ),
    # [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    "mistral_list": NativeForm(
        trigger="[TOOL_CALLS]",
        section_begin="[TOOL_CALLS][",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        section_end="]",
        call_id_length=9,
    ),
    # [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}
    "mistral": NativeForm(
        trigger="[TOOL_CALLS]",
        begin="[TOOL_CALLS]",
        middle="[ARGS]",
        end="",
        more_markers=("[CALL_ID]",),
        call_id_length=9,
    ),
    # <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>
    # <｜tool▁calls▁end｜> (without the line break)
    "deepseek_v3": NativeForm(
        trigger=_DEEPSEEK_SECTION[0],
        section_begin=_DEEPSEEK_SECTION[0],
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        separator="\n",
        section_end=_DEEPSEEK_SECTION[1],
    ),
    # <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    "deepseek_v31": NativeForm(
        trigger=_DEEPSEEK_SECTION[0],
        section_begin=_DEEPSEEK_SECTION[0],
        begin="<｜tool▁call▁begin｜>",
        middle="<｜tool▁sep｜>",
        end="<｜tool▁call▁end｜>",
        section_end=_DEEPSEEK_SECTION[1],
    ),
    # <tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>
    "glm45": NativeForm(
        trigger="<tool_call>",
        begin="<tool_call>",
        middle="\n",
        end="</tool_call>",
        separator="\n",
        arguments="xml",
        xml=XmlArguments(
            key_begin="<arg_key>", key_end="</arg_key>", value_begin="\n<arg_value>", value_end="</arg_value>\n"
        ),
    ),
    # <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>
    "glm47": NativeForm(
        trigger="<tool_call>",
        begin="<tool_call>",
        middle="",
        end="</tool_call>",
        arguments="xml",
        xml=XmlArguments(
            key_begin="<arg_key>", key_end="</arg_key>", value_begin="<arg_value>", value_end="</arg_value>"
        ),
    ),
    # <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>
    # <|tool_calls_section_end|> (without the line break)
    "kimi_k2": NativeForm(
        trigger="<|tool_calls_section_begin|>",
        section_begin="<|tool_calls_section_begin|>",
        begin="<|tool_call_begin|>functions.",
        middle=":{index}<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
        section_end="<|tool_calls_section_end|>",
        ends_reasoning=True,
    ),
    # <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>
    "harmony": NativeForm(
        trigger="<|channel|>commentary to=",
        begin="<|channel|>commentary to=functions.",
        middle=" <|constrain|>json<|message|>",
        end="<|call|>",
        allows_parallel_calls=False,  # <|call|> ends the answer
    ),
    # <TOOLCALL>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]</TOOLCALL>
    "nemotron": NativeForm(
        trigger="<TOOLCALL>",
        section_begin="<TOOLCALL>[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        section_end="]</TOOLCALL>",
    ),
    # <|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    "granite": NativeForm(
        trigger="<|tool_call|>",
        section_begin="<|tool_call|>[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        section_end="]",
    ),
}

# The form that a grammar gives to a model of no known family: [{"name": "f", "parameters": {"a": 1}}, ...]
JSON_LIST: Final = NativeForm(
    trigger="",
    section_begin="[",
    begin='{"name": "',
    middle='", "parameters": ',
    end="}",
    separator=", ",
    section_end="]",
)
