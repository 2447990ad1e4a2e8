"""The families of models whose calls and reasoning can be read, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pipeline.http.parsing.json_families import llama3_json, mistral, tagged_json
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from pipeline.http.parsing.python_families import pythonic
from pipeline.http.parsing.scanner import Script
from pipeline.http.parsing.section_families import deepseek, kimi_k2
from pipeline.http.parsing.xml_families import xml_calls

HARMONY: Final = "harmony"
RESPONSE_TEMPLATE: Final = "response_template"  # the model's own: see response_template.py

# Each script reads the calls in an answer. Harmony has calls and reasoning in one form: see harmony.py.
CALL_SCRIPTS: Final[Mapping[str, Script]] = {
    "hermes": tagged_json("<tool_call>", "</tool_call>"),
    "qwen3_coder": xml_calls("qwen3_coder", untyped_is_text=True),
    "seed_oss": xml_calls("seed_oss", untyped_is_text=True),
    "minimax_m2": xml_calls("minimax_m2", untyped_is_text=True),
    "llama3_json": llama3_json,
    "pythonic": pythonic(*NATIVE_FORMS["pythonic"].more_markers, needs_begin=False),
    "lfm2": pythonic("<|tool_call_start|>", "<|tool_call_end|>", needs_begin=True),
    "mistral": mistral,
    "mistral_list": mistral,
    "deepseek_v3": deepseek(),
    "deepseek_v31": deepseek(),
    "glm45": xml_calls("glm45", untyped_is_text=False),
    "glm47": xml_calls("glm47", untyped_is_text=False),
    "kimi_k2": kimi_k2(),
    "nemotron": tagged_json("<TOOLCALL>", "</TOOLCALL>"),
    "granite": tagged_json("<|tool_call|>"),
}
TOOL_PARSERS: Final = (*NATIVE_FORMS, RESPONSE_TEMPLATE)

# These tags surround the reasoning. The keys are the names of the reasoning parsers.
REASONING_TAGS: Final[Mapping[str, tuple[str, str]]] = {
    "think": ("<think>", "</think>"),  # Qwen3, GLM, Kimi, DeepSeek and many others
    "deepseek_r1": ("<think>", "</think>"),  # reasons always, and may leave the first tag out
    "mistral": ("[THINK]", "[/THINK]"),
    "gemma4": ("<|channel>thought\n", "<channel|>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "kimi": ("◁think▷", "◁/think▷"),
    "apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "longcat": ("<longcat_think>", "</longcat_think>"),
    "thinking": ("<thinking>", "</thinking>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "thought": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "granite": ("Here is my thought process:", "Here is my response:"),
}
ALWAYS_REASON: Final = ("deepseek_r1", HARMONY)
REASONING_PARSERS: Final = (*REASONING_TAGS, HARMONY, RESPONSE_TEMPLATE)
