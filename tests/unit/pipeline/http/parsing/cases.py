"""Texts of every family, and the events each stands for. Each text is an answer as a model of the family writes it."""

from __future__ import annotations

from pipeline.http.generation.events import Content, Reasoning
from tests.unit.pipeline.http.parsing.reading import WEATHER, Case, call

HARD = r'{"city": "}\"{ \\ \u00e9 北京 🌧", "range": {"a": [1, {"b": []}], "c": "</tool_call> [TOOL_CALLS] ```"}}'
RANGE = '{"city": "Zürich", "range": {"from": {"day": 1}, "to": [2, 3]}}'
TEXT = "Let me look 看一下 🙂 < that >\nup.\n"

HERMES = [
    Case("hermes", TEXT, [Content(TEXT)]),
    Case("hermes", "", []),
    Case("hermes", " \n", [Content(" \n")]),
    Case(
        "hermes",
        f'{TEXT}<tool_call>\n{{"name": "get_weather", "arguments": {RANGE}}}\n</tool_call>',
        [Content(TEXT), *call("get_weather", RANGE)],
    ),
    Case(
        "hermes",
        f'\n\n<tool_call>\n{{"name": "get_weather", "arguments": {HARD}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n',
        [*call("get_weather", HARD), *call("now", "{}")],
    ),
    Case(
        "hermes",
        '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call> and '
        '<tool_call>{"name":"now"}</tool_call>\nDone.',
        [*call("get_weather", '{"city": "Oslo"}'), Content(" and "), *call("now", "{}"), Content("\nDone.")],
    ),
    Case(
        "hermes",
        '<tool_call>\n{"id": "c1", "name": "now", "extra": {"a": "}"}, "arguments": null}\n</tool_call>',
        call("now", "{}"),
    ),
    Case(
        "hermes",
        r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"B\u00e9\"}"}</tool_call>',
        call("get_weather", '{"city": "Bé"}'),
    ),
    Case("hermes", '<tool_call>\n{"name": "get_weather", "arg', [Content('<tool_call>\n{"name": "get_weather", "arg')]),
    Case(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "O\\',
        call("get_weather", '{"city": "O\\'),
    ),
    Case("hermes", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_', call("now", "{}")),
    Case(
        "hermes",
        '<tool_call>oops</tool_call> <tool_call>{"name": "now", "arguments": {}}',
        [Content("<tool_call>oops</tool_call> "), *call("now", "{}")],
    ),
    Case(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": </tool_call>x',
        [*call("get_weather", '{"city": '), Content("x")],
    ),
    Case(
        "hermes",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        [Content('<tool_call>{"name": 3, "arguments": {}}</tool_call>')],
    ),
    Case(
        "hermes",
        '<tool_call>{"name": "now", "arguments": {}}}</tool_call>',
        [*call("now", "{}"), Content("}</tool_call>")],
    ),
]

XML = [
    Case(
        "qwen3_coder",
        f'{TEXT}<tool_call>\n<function=get_weather>\n<parameter=city>\nSão\n"Paulo" \\ 🙂 </b>\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
        '<parameter=places>\n["a", {"b": 1}]\n</parameter>\n<parameter=unit>\nnull\n</parameter>\n'
        "<parameter=free>\n12\n</parameter>\n</function>\n</tool_call>",
        [
            Content(TEXT),
            *call(
                "get_weather",
                '{"city": "São\\n\\"Paulo\\" \\\\ 🙂 </b>", "days": 3, "exact": true, "places": ["a", {"b": 1}], '
                '"unit": null, "free": "12"}',
            ),
        ],
    ),
    Case(
        "qwen3_coder",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<function=get_weather>"
        '<parameter=unit>nullable "C"</parameter>'
        "<parameter=days>many</parameter><parameter=range>{'a': (1, None)}</parameter></function></tool_call>\nBye",
        [
            *call("now", "{}"),
            *call("get_weather", '{"unit": "nullable \\"C\\"", "days": "many", "range": {"a": [1, null]}}'),
            Content("\nBye"),
        ],
    ),
    Case(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOs",
        call("get_weather", '{"city": "Os'),
    ),
    Case(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<par",
        [Content("<tool_call>\n<function=get_weather>\n<par")],
    ),
    Case("qwen3_coder", "<tool_call>{}</tool_call>", [Content("<tool_call>{}</tool_call>")]),
    Case(
        "qwen3_coder",
        "<function=get_weather><parameter=days>1</parameter>oops</function>",
        [*call("get_weather", '{"days": 1}'), Content("oops</function>")],
    ),
    Case(
        "glm45",
        '好的\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京 "x"\n</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n<arg_key>free</arg_key>\n<arg_value>[1, true]</arg_value>\n"
        "<arg_key>note</arg_key>\n<arg_value>as it is</arg_value>\n</tool_call>\n"
        "<tool_call>now\n</tool_call><tool_call>now</tool_call>",
        [
            Content("好的\n"),
            *call("get_weather", '{"city": "北京 \\"x\\"\\n", "days": 2, "free": [1, true], "note": "as it is"}'),
            *call("now", "{}"),
            *call("now", "{}"),
        ],
    ),
    Case(
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>北京</arg_value><arg_key>days</arg_key><arg_value>2"
        "</arg_value></tool_call><tool_call>now</tool_call>",
        [*call("get_weather", '{"city": "北京", "days": 2}'), *call("now", "{}")],
    ),
    Case("glm45", "<tool_call>what is this?</tool_call>", [Content("<tool_call>what is this?</tool_call>")]),
    Case(
        "glm45",
        "<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_c",
        call("get_weather", '{"days": 2'),
    ),
    Case("glm45", "<tool_call>get_weather<arg_key>da", call("get_weather", "{")),
]

XML += [
    Case(
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>\nOslo </parameter>\n<parameter=days>2</parameter>\n"
        "</function>\n</seed:tool_call>",
        call("get_weather", '{"city": "\\nOslo ", "days": 2}'),
    ),
    Case(
        "minimax_m2",
        'So:\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">北</parameter>\n'
        '<parameter name="places">[1]</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        [Content("So:\n"), *call("get_weather", '{"city": "北", "places": [1]}'), *call("now", "{}")],
    ),
]

LLAMA = [
    Case(
        "llama3_json",
        f'{{"name": "get_weather", "parameters": {HARD}}}; {{"type": "function", "name": "now", "parameters": {{}}}}',
        [*call("get_weather", HARD), *call("now", "{}")],
    ),
    Case(
        "llama3_json",
        f'<|python_tag|>{{"name": "get_weather", "arguments": {RANGE}}}\n{{"name": "now", "parameters": {{}}}} so',
        [*call("get_weather", RANGE), *call("now", "{}"), Content(" so")],
    ),
    Case(
        "llama3_json",
        'Look: <|python_tag|>{"name": "now", "parameters": {}}; then',
        [Content("Look: "), *call("now", "{}"), Content("; then")],
    ),
    Case(
        "llama3_json",
        '<|python_start|>{"name": "now", "parameters": {}}<|python_end|>\n<|python_start|>'
        '{"name": "now", "parameters": {}}',
        [*call("now", "{}"), *call("now", "{}")],
    ),
    Case("llama3_json", ' {"name": "Bob", "age": 3}', [Content(' {"name": "Bob", "age": 3}')]),
    Case("llama3_json", '{"name": "Bob"}', [Content('{"name": "Bob"}')]),
    Case("llama3_json", '<|python_tag|>print("x")', [Content('<|python_tag|>print("x")')]),
    Case("llama3_json", '[{"name": "now", "parameters": {}}]', call("now", "{}")),
    Case("llama3_json", 'Use {"name": "now", "parameters": {}}', [Content('Use {"name": "now", "parameters": {}}')]),
    Case(
        "pythonic",
        "[get_weather(city='São \\'x\\' \"y\" \\n\\u00e9 🙂', days=3, exact=True, unit=None, places=[-1.5, (2,), []], "
        "range={'a': {\"b\": 'c'}, }), now()]",
        [
            *call(
                "get_weather",
                '{"city": "São \'x\' \\"y\\" \\n\\u00e9 🙂", "days": 3, "exact": true, "unit": null, '
                '"places": [-1.5, [2], []], "range": {"a": {"b": "c"}}}',
            ),
            *call("now", "{}"),
        ],
    ),
    Case(
        "pythonic",
        '<|python_start|>[now(), get_weather(city="""a\n"b"\\x41""", )]<|python_end|>',
        [*call("now", "{}"), *call("get_weather", '{"city": "a\\n\\"b\\"A"}')],
    ),
    Case("pythonic", "[1, 2, 3] is a list", [Content("[1, 2, 3] is a list")]),
    Case("pythonic", "[link](http://x) and [see(this)]", [Content("[link](http://x) and [see(this)]")]),
    Case("pythonic", '[get_weather(city="Os', call("get_weather", '{"city": "Os')),
    Case("pythonic", "[get_weather(days=1, 5)]", [*call("get_weather", '{"days": 1'), Content("5)]")]),
    Case("pythonic", "[get_weather(days=x + 1)]", [*call("get_weather", '{"days": '), Content("x + 1)]")]),
    Case(
        "lfm2",
        'Sure.<|tool_call_start|>[get_weather(city="Ōsaka")]<|tool_call_end|>Checking [now()].',
        [Content("Sure."), *call("get_weather", '{"city": "Ōsaka"}'), Content("Checking [now()].")],
    ),
]

MISTRAL = [
    Case(
        "mistral",
        f"{TEXT}[TOOL_CALLS]get_weather[ARGS]{HARD}[TOOL_CALLS]now[CALL_ID]abc123XYZ[ARGS]{{}}",
        [Content(TEXT), *call("get_weather", HARD), *call("now", "{}", "abc123XYZ")],
    ),
    Case("mistral", f"[TOOL_CALLS]get_weather{RANGE}", call("get_weather", RANGE)),
    Case(
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {RANGE}, "id": "x"}}, '
        '{"name": "now", "arguments": {}}]',
        [*call("get_weather", RANGE), *call("now", "{}")],
    ),
    Case("mistral", "[TOOL_CALLS] is a token. [TOOL", [Content("[TOOL_CALLS] is a token. [TOOL")]),
    Case(
        "mistral_list",
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"oops": 1}]',
        [*call("now", "{}"), Content(', {"oops": 1}]')],
    ),
    Case(
        "nemotron",
        'Ok <TOOLCALL>[{"name": "get_weather", "arguments": {"days": 1}}]</TOOLCALL> then',
        [Content("Ok "), *call("get_weather", '{"days": 1}'), Content(" then")],
    ),
    Case(
        "granite",
        '<|tool_call|>[{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"days": 1}}]',
        [*call("now", "{}"), *call("get_weather", '{"days": 1}')],
    ),
]

V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
SECTIONS = [
    Case(
        "deepseek_v3",
        f"{TEXT}<｜tool▁calls▁begin｜>{V3.format('get_weather', HARD)}\n{V3.format('now', '{}')}<｜tool▁calls▁end｜>",
        [Content(TEXT), *call("get_weather", HARD), *call("now", "{}")],
    ),
    Case(
        "deepseek_v31",
        f"<｜tool▁calls▁begin｜>{V31.format('get_weather', RANGE)}{V31.format('now', '{}')}<｜tool▁calls▁end｜>好",
        [*call("get_weather", RANGE), *call("now", "{}"), Content("好")],
    ),
    Case("deepseek_v3", f"\n{V3.format('now', '{}')}", call("now", "{}")),
    Case("deepseek_v31", "<｜tool▁calls▁begin｜>oops", [Content("<｜tool▁calls▁begin｜>oops")]),
    Case(
        "deepseek_v31",
        f"<｜tool▁calls▁begin｜>{V31.format('now', '{}')}<｜tool▁call▁begin｜>oops<｜tool▁calls▁end｜>",
        [*call("now", "{}"), Content("<｜tool▁call▁begin｜>oops<｜tool▁calls▁end｜>")],
    ),
    Case(
        "kimi_k2",
        f"{TEXT}<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{HARD}<|tool_call_end|><|tool_call_begin|>now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        [Content(TEXT), *call("get_weather", HARD, "functions.get_weather:0"), *call("now", "{}", "now:1")],
    ),
    Case(
        "kimi_k2",
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "O',
        call("get_weather", '{"city": "O', "functions.get_weather:0"),
    ),
    Case(
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>hm?<|tool_calls_section_end|>",
        [Content("<|tool_calls_section_begin|><|tool_call_begin|>hm?<|tool_calls_section_end|>")],
    ),
]

HARMONY = [
    Case(
        "harmony",
        f"<|channel|>analysis<|message|>{TEXT}<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{HARD}<|call|>",
        [Reasoning(TEXT), *call("get_weather", HARD)],
        "harmony",
    ),
    Case(
        "harmony",
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}<|return|>",
        [Reasoning("Hm."), Content(TEXT)],
        "harmony",
    ),
    Case(
        "harmony",
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant to=functions.now<|channel|>"
        "commentary json<|message|><|call|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{}",
        [Content("I will look."), *call("now", "{}"), *call("now", "{}")],
        "harmony",
    ),
    Case(
        "harmony",
        " to=functions.now<|channel|>commentary<|message|>{}<|end|><|channel|>analysis<|message|>Now<|channel|>final"
        "<|message|>12 o'clock",
        [*call("now", "{}"), Reasoning("Now"), Content("12 o'clock")],
        "harmony",
    ),
    Case("harmony", "no channel at all", [Content("no channel at all")], "harmony"),
    Case(
        "harmony",
        "so<|end|><|start|>assistant<|channel|>final<|message|>Yes",
        [Reasoning("so"), Content("Yes")],
        "harmony",
        True,
    ),
    Case("harmony", "<|channel|>broken<|end|>", [Content("<|channel|>broken<|end|>")], "harmony"),
    Case(
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        '[{"name": "now", "parameters": {}}]',
        [Reasoning("Hm."), *call("now", "{}")],
        "harmony",
        False,
        "json_list",
    ),
    Case("harmony", "<|channel|>commentary to=functions.now<|message|>{}", [Content("{}")], "harmony", False, "none"),
]

CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
REASONING = [
    Case("hermes", f"<think>\n想 {TEXT}</think>\n\nYes.", [Reasoning(f"\n想 {TEXT}"), Content("\n\nYes.")], "think"),
    Case("hermes", "<think>\n\n</think>\n\nHi", [Content("\n\nHi")], "think"),
    Case("hermes", "\n\n</think>Hi", [Content("Hi")], "think", True),
    Case("hermes", f"\n<think>a</think>\n\n{CALL}", [Reasoning("a"), *call("now", "{}")], "think"),
    Case("hermes", f"a {CALL} b</think>{CALL}", [Reasoning(f"a {CALL} b"), *call("now", "{}")], "think", True),
    Case("hermes", "<think>\na</think>b", [Reasoning("\na"), Content("b")], "think", True),
    Case("hermes", " cut off </thi", [Reasoning(" cut off </thi")], "think", True),
    Case(
        "hermes",
        f" no tag <think>x</think> {CALL}",
        [Content(" no tag <think>x</think> "), *call("now", "{}")],
        "think",
    ),
    Case("hermes", f"<think>x</think>{CALL}", [Reasoning("x"), Content(CALL)], "think", False, "none"),
    Case("deepseek_v3", "thinking</think>answer", [Reasoning("thinking"), Content("answer")], "deepseek_r1"),
    Case(None, "[THINK]x[1][/THINK]y", [Reasoning("x[1]"), Content("y")], "mistral"),
    Case(
        None,
        "Here is my thought process: a\nHere is my response: b",
        [Reasoning(" a\n"), Content(" b")],
        "granite",
    ),
    Case(
        "kimi_k2",
        "a<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        [Reasoning("a"), *call("now", "{}", "functions.now:0")],
        "think",
        True,
    ),
    Case(
        None,
        '<think>a</think>\n{"days": 1}',
        [Reasoning("a"), *call("get_weather", '{"days": 1}')],
        "think",
        False,
        "json_arguments",
        [WEATHER],
    ),
]

JSON = [
    Case(None, f'{{"name": "get_weather", "arguments": {HARD}}}', call("get_weather", HARD)),
    Case(
        None,
        f' [{{"name": "get_weather", "parameters": {RANGE}}},\n{{"name": "now", "arguments": {{}}}}]\n',
        [*call("get_weather", RANGE), *call("now", "{}")],
    ),
    Case(None, '{"name": "unknown", "arguments": {}}', [Content('{"name": "unknown", "arguments": {}}')]),
    Case(None, '{"answer": {"name": "now"}}', [Content('{"answer": {"name": "now"}}')]),
    Case(None, "[1, 2]", [Content("[1, 2]")]),
    Case(None, f"A {CALL}", [Content(f"A {CALL}")]),
    Case(None, '{"name": "now", "arguments": {}}', [Content('{"name": "now", "arguments": {}}')], form="none"),
    Case(
        "hermes",
        f'[{{"name": "get_weather", "parameters": {HARD}}}, {{"name":"other","parameters":{{}}}}]',
        [*call("get_weather", HARD), *call("other", "{}")],
        form="json_list",
    ),
    Case(
        None, '[{"name": "get_weather", "parameters": {"city": "O', call("get_weather", '{"city": "O'), form="json_list"
    ),
    Case(None, HARD, call("get_weather", HARD), form="json_arguments", tools=[WEATHER]),
    Case(None, "", [], form="json_arguments", tools=[WEATHER]),
]

CASES = [*HERMES, *XML, *LLAMA, *MISTRAL, *SECTIONS, *HARMONY, *REASONING, *JSON]
