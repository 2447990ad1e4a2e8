from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from ipc.errors import ModelUnsupported
from ipc.structured_outputs import StructuredOutputs
from tests.unit.workers.grammar.grammar_tools import TINY, VOCAB_SIZE, vocabulary
from tests.unit.workers.text.tools import byte_fallback_tokenizer, byte_level_tokenizer
from workers.grammar.compiler import Compiler
from workers.grammar.matchers import Matchers
from workers.grammar.vocabulary import Vocabulary


def test_special_tokens_are_known_by_their_text() -> None:
    assert vocabulary().special_ids == {
        "<|pad|>": 0, "<|end|>": 1, "<|system|>": 2, "<|user|>": 3, "<|assistant|>": 4,
    }  # fmt: skip
    assert vocabulary().end_id == 1
    assert vocabulary().num_words == VOCAB_SIZE // 32


def test_a_token_that_is_declared_beside_the_tokenizer_file_is_special_too(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config["added_tokens_decoder"] = {str(VOCAB_SIZE): {"content": "<|call|>", **flags}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Vocabulary.of_folder(str(tmp_path), VOCAB_SIZE + 64).special_ids["<|call|>"] == VOCAB_SIZE


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_text_of_every_kind_of_tokenizer_can_be_followed(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer: Tokenizer = make()
    ours = Vocabulary(tokenizer, tokenizer.get_vocab_size(), None)
    matchers = Matchers(ours)
    matchers.add(1, Compiler(ours).compile(StructuredOutputs(choice=["the fox", "é🙂"])), [0])
    for token_id in ours.tokens.tokenize_str("é🙂"):
        matchers.advance(1, token_id)
    assert matchers.problem(1) == ""
    assert matchers.is_complete(1)


def test_a_tokenizer_that_llguidance_cannot_read_is_refused_with_its_reason() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(ModelUnsupported, match=r"structured outputs cannot be used with this model: llguidance"):
        Vocabulary(tokenizer, 2)
