"""Finds the tokens that begin and end a model's thinking, in the model's folder.

A declaration in tokenizer_config.json wins: named tokens, or the pattern of a response_schema. Without one, the
vocabulary is searched for the pairs of known model families.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from workers.model_tokenizer.declarations import read_object

_FAMILIES: Final = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, SmolLM3 and many others
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<longcat_think>", "</longcat_think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)
_SUBJECT: Final = re.compile("think|thought|reason", re.IGNORECASE)
_BEGIN: Final = re.compile(r"(?:^|_)(?:start|begin_of|begin|open)(?:_|$)", re.IGNORECASE)
_END: Final = re.compile(r"(?:^|_)(?:end_of|end|close)(?:_|$)", re.IGNORECASE)
_GROUP: Final = re.compile(r"\(\?P<(?:thinking|reasoning|reasoning_content)>")
_BLANKS: Final = re.compile(r"(?:\\[nrs]|\s)[*+?]?")
_MAX_DEPTH: Final = 8  # of a response_schema


def find_thinking_tokens(
    folder: str, tokenizer: Tokenizer, named: Mapping[str, str], vocab_size: int
) -> tuple[int, int] | None:
    """The ids of the two tokens; None if the folder names none, or if one of them is not a single token of the model.

    `named` are the special tokens that the folder declares by name.
    """
    schema = read_object(Path(folder) / "tokenizer_config.json").get("response_schema")
    for pair in (*_named_pairs(named), *_schema_pairs(schema, tokenizer), *_FAMILIES):
        start, end = (_token_id(text, tokenizer) for text in pair)
        if start is not None and end is not None and start != end and max(start, end) < vocab_size:
            return start, end
    return None


def _token_id(text: str, tokenizer: Tokenizer) -> int | None:
    """The token whose whole text this is. Text inside a prompt must become this token, too."""
    token_id: int | None = tokenizer.token_to_id(text)
    if token_id is None or token_id not in tokenizer.encode(text, add_special_tokens=False).ids:
        return None
    return token_id


def _named_pairs(named: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Tokens declared as `think_start_token` and `think_end_token`, or by similar names."""
    names = [name.removesuffix("_token") for name in named if _SUBJECT.search(name)]
    for start in filter(_BEGIN.search, names):
        for end in filter(_END.search, names):
            if _BEGIN.sub("_", start).strip("_") == _END.sub("_", end).strip("_"):
                texts = {name.removesuffix("_token"): text for name, text in named.items()}
                yield texts[start], texts[end]


def _schema_pairs(schema: Any, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """The tokens right before and right after the group of the thinking, in the patterns of a response_schema."""
    texts = sorted({token.content for token in tokenizer.get_added_tokens_decoder().values()}, key=len, reverse=True)
    for pattern in _patterns(schema, _MAX_DEPTH):
        for group in _GROUP.finditer(pattern):
            plain = re.sub(r"\\(\W)", r"\1", _BLANKS.sub("", pattern[: group.start()]))
            start = next((text for text in texts if text and plain.endswith(text)), None)
            if start is None or plain.removesuffix(start)[-1:] not in ("", "(", ":", "^", "|"):
                continue  # more than one token begins the thinking
            rest = re.sub(r"\\(\W)", r"\1", _BLANKS.sub("", pattern[_end_of_group(pattern, group.end()) :]))
            end = next((text for text in texts if text and rest.lstrip("?").startswith(text)), None)
            if end is not None:
                yield start, end


def _end_of_group(pattern: str, start: int) -> int:
    """The index behind the parenthesis that closes a group whose inside begins at `start`."""
    depth, at = 1, start
    while at < len(pattern) and depth:
        if pattern[at] == "\\":
            at += 1
        else:
            depth += (pattern[at] == "(") - (pattern[at] == ")")
        at += 1
    return at


def _patterns(schema: Any, depth: int) -> Iterator[str]:
    """Every regular expression (x-regex) of a response_schema."""
    if not isinstance(schema, dict) or not depth:
        return
    for name, value in schema.items():
        if name == "x-regex" and isinstance(value, str):
            yield value
        else:
            yield from _patterns(value, depth - 1)
