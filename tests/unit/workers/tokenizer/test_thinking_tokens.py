"""The tokens that begin and end thinking, found in a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.unit.workers.text.tools import byte_fallback_tokenizer, byte_level_tokenizer
from workers.model_tokenizer.loading import load_tokenizer
from workers.tokenizer.thinking_tokens import find_thinking_tokens

TOKENS = ["<think>", "</think>", "[THINK]", "[/THINK]", "<|a|>", "<|b|>", "<|channel|>", "<|message|>", "<|end|>"]


def found(folder: Path, tokens: list[str], *, vocab_size: int = 1_000, make: Any = byte_level_tokenizer, **config: Any):  # type: ignore[no-untyped-def]
    """The names of the tokens that are found in a folder with these added tokens."""
    tokenizer: Tokenizer = make()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(folder))
    pair = find_thinking_tokens(str(folder), loaded.tokenizer, loaded.special_tokens, vocab_size)
    return pair and tuple(loaded.tokenizer.id_to_token(i) for i in pair)


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_tokens_of_known_families_are_found(tmp_path: Path, make: Any) -> None:
    assert found(tmp_path, ["[THINK]", "[/THINK]"], make=make) == ("[THINK]", "[/THINK]")
    assert found(tmp_path, TOKENS, make=make) == ("<think>", "</think>")
    assert found(tmp_path, ["<think>"], make=make) is None
    assert found(tmp_path, [], make=make) is None


def test_a_token_that_the_model_does_not_have_is_not_found(tmp_path: Path) -> None:
    assert found(tmp_path, ["<think>", "</think>"], vocab_size=byte_level_tokenizer().get_vocab_size() + 1) is None


@pytest.mark.parametrize(
    "names",
    [
        ("think_start_token", "think_end_token"),
        ("begin_of_thought_token", "end_of_thought_token"),
        ("start_reasoning_token", "end_reasoning_token"),
    ],
)
def test_named_tokens_win_over_families(tmp_path: Path, names: tuple[str, str]) -> None:
    special = dict(zip(names, ("<|a|>", "<|b|>"), strict=True))
    assert found(tmp_path, TOKENS, model_specific_special_tokens=special) == ("<|a|>", "<|b|>")


@pytest.mark.parametrize(
    ("pattern", "tokens"),
    [
        (r"(?:\[THINK\]\s*(?P<thinking>(?:.|\n)*?)\s*\[/THINK\])?(?P<content>.*)", ("[THINK]", "[/THINK]")),
        (r"^(?:<\|a\|>\n?(?P<thinking>[^\)]+?)\n?<\|b\|>)?", ("<|a|>", "<|b|>")),
        # Three tokens begin this thinking, and the last of them begins answers too.
        (r"<\|channel\|>analysis<\|message\|>(?P<thinking>.*?)<\|end\|>", ("<think>", "</think>")),
        (r"(?P<content>.*)", ("<think>", "</think>")),
        (r"(?P<thinking>", ("<think>", "</think>")),
    ],
)
def test_a_response_schema_wins_over_families(tmp_path: Path, pattern: str, tokens: tuple[str, str]) -> None:
    schema = {"type": "object", "properties": {"message": {"x-regex": pattern, "type": "object"}}}
    assert found(tmp_path, TOKENS, response_schema=schema) == tokens
