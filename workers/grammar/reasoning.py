"""Puts a reasoning, which is free text between tags, before the grammar of an answer."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Final

from ipc.structured_outputs import StructuredOutputs
from workers.grammar.grammar_text import listed
from workers.grammar.lark_parts import LarkParts
from workers.grammar.vocabulary import Vocabulary

_TOKEN: Final = re.compile(r"<\[(\d{1,9})\]>")  # as lark_parts.py writes it


def behind_reasoning(grammar: str, spec: StructuredOutputs, vocabulary: Vocabulary) -> str:
    """The grammar of a text whose answer follows `grammar`, behind the reasoning that `spec.after_reasoning` names.

    A tag may be a special token, or be spelled out by other tokens. Its first occurrence counts, and the answer may
    begin inside the token that completes it. The mask of every state leaves out the tokens that end the sequence.
    """
    *begins, end = spec.after_reasoning
    parts = LarkParts(spec, vocabulary)
    reasoning = parts.text_until(end)
    # A special token of the answer ends a reasoning for some parsers, so it is no part of one.
    of_answer = {int(token_id) for token_id in _TOKEN.findall(grammar)}
    if others := _other_tokens(end, {*of_answer, parts.first_token(end)}, vocabulary):
        reasoning = f"({parts.text()} {others})* {reasoning}"
    if begins:
        reasoning = f"({parts.at_once(begins[0])} {reasoning})?"
    named = '{"name":"answer",' + listed(grammar).removeprefix("{")
    return parts.grammar(f"{reasoning} @answer", named)


def _other_tokens(end: str, excluded: Container[int | None], vocabulary: Vocabulary) -> str:
    """The tokens that a reasoning may hold beside whole characters, as an expression; "" if there is no such token.

    These are the special tokens that are not `excluded`, and tokens that begin or end inside a character. A budget of
    thinking tokens may force the end of the reasoning behind one of the latter. llguidance cannot find the end tag
    across a token of this list. So the list leaves out tokens that may be a part of the tag.
    """
    tag = end.encode("utf-8", "surrogatepass")
    broken = [token_id for token_id, text in vocabulary.broken_tokens.items() if not _may_be_part(text, tag)]
    special = [token_id for token_id in vocabulary.special_ids.values() if token_id not in excluded]
    return f"<[{_ranges([*broken, *special])}]>" if broken or special else ""


def _may_be_part(text: bytes, tag: bytes) -> bool:
    """Whether the bytes of a token can overlap an occurrence of the tag."""
    return (
        text in tag
        or tag in text
        or any(text.endswith(tag[:size]) or text.startswith(tag[-size:]) for size in range(1, len(tag)))
    )


def _ranges(token_ids: list[int]) -> str:
    """Ids as Lark writes them: 1-3,7."""
    runs: list[list[int]] = []
    for token_id in sorted(token_ids):
        if runs and runs[-1][1] == token_id - 1:
            runs[-1][1] = token_id
        else:
            runs.append([token_id, token_id])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
