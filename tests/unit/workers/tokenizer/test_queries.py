"""Answers to queries for token ids and texts, held against transformers' tokenizers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from transformers import AutoTokenizer

from ipc.messages import DetokenizedText, DetokenizeQuery, PromptTokens, TokenizeDone, TokenizeQuery, TokenizerQuery
from pipeline.client.outputs import TokenizedPrompt, tokenized_prompt
from tests.unit.workers.text.tools import (
    CORPUS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    encoded_chat,
    metaspace_tokenizer,
    word_piece_tokenizer,
)
from tests.unit.workers.tokenizer.test_tokenizer import CHAT, TEMPLATE, encoder, request, save, shape
from workers.tokenizer import core
from workers.tokenizer.chat_template import ChatTemplates
from workers.tokenizer.core import MAX_ERROR_CHARS, PromptEncoder

SPECIAL = "<s> a special token in the text </s>"


def ask(encoder: PromptEncoder, **fields: Any) -> TokenizeDone:
    query = TokenizeQuery(request_id="q", **fields)
    done = encoder.answer(TokenizerQuery(key=7, query=query, arrived_ns=5))
    assert done.key == 7
    return done


def tokens(encoder: PromptEncoder, **fields: Any) -> TokenizedPrompt:
    answer = ask(encoder, **fields).answer
    assert isinstance(answer, PromptTokens)
    return asyncio.run(tokenized_prompt(answer))


def ask_text(encoder: PromptEncoder, token_ids: list[int], **fields: Any) -> TokenizeDone:
    packed = np.array(token_ids, "<i4").tobytes()
    query = DetokenizeQuery(request_id="q", token_ids=packed, **fields)
    return encoder.answer(TokenizerQuery(key=7, query=query, arrived_ns=5))


def text(encoder: PromptEncoder, token_ids: list[int], **fields: Any) -> str:
    answer = ask_text(encoder, token_ids, **fields).answer
    assert isinstance(answer, DetokenizedText)
    return answer.text


def failure(done: TokenizeDone) -> str:
    assert (done.answer, done.error_code) == (None, "invalid_request")
    return done.error_message


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, metaspace_tokenizer])
def test_ids_and_texts_are_those_of_auto_tokenizer(tmp_path: Path, make: Any) -> None:
    folder = save(tmp_path, make(), add_bos_token=True)
    reference = AutoTokenizer.from_pretrained(folder)
    ours = encoder(folder)
    for prompt in (*CORPUS, SPECIAL, " leading and trailing  ", ""):
        for adds in (True, False):
            token_ids = reference(prompt, add_special_tokens=adds)["input_ids"]
            assert tokens(ours, prompt=prompt, add_special_tokens=adds).token_ids == token_ids
            for skips in (True, False):
                expected = reference.decode(token_ids, skip_special_tokens=skips)
                assert text(ours, token_ids, skip_special_tokens=skips) == expected


def test_a_byte_level_text_comes_back_as_it_was_and_its_tokens_bytes_spell_it(tmp_path: Path) -> None:
    ours = encoder(save(tmp_path))
    for prompt in (*CORPUS, SPECIAL, ""):
        found = tokens(ours, prompt=prompt, add_special_tokens=False)
        assert found.num_tokens == len(found.token_bytes)
        assert text(ours, found.token_ids) == prompt
        assert b"".join(found.token_bytes) == prompt.encode()
    assert max(map(len, tokens(ours, prompt="🙂", add_special_tokens=False).token_bytes)) < 4, "a part of a character"


def test_a_pieces_bytes_have_the_space_that_it_writes_and_a_byte_token_is_its_byte(tmp_path: Path) -> None:
    ours = encoder(save(tmp_path, byte_fallback_tokenizer()))
    found = tokens(ours, prompt="the fox 🙂", add_special_tokens=False)
    assert b"".join(found.token_bytes).strip() == "the fox 🙂".encode()


def test_a_chat_has_the_tokens_that_a_request_with_it_has_whatever_is_said_of_special_tokens(tmp_path: Path) -> None:
    ours = encoder(save(tmp_path, chat_template=TEMPLATE, add_bos_token=True))
    expected = ours.encode(request(chat=CHAT)).token_ids.tolist()
    for adds in (True, False):
        assert tokens(ours, chat=CHAT, add_special_tokens=adds).token_ids == expected


def test_given_ids_come_back_with_their_bytes_though_the_tokenizer_does_not_know_all_of_them(tmp_path: Path) -> None:
    ours = encoder(save(tmp_path))
    assert tokens(ours, token_ids=np.array([1, 499, 1], "<i4").tobytes()) == TokenizedPrompt(
        [1, 499, 1], [b"</s>", b"", b"</s>"]
    )
    assert text(ours, [1, 499]) == "</s>"  # 499 only fills the model's vocabulary up


def test_a_prompt_longer_than_the_model_is_counted(tmp_path: Path) -> None:
    ours = encoder(save(tmp_path), max_model_len=10)
    assert ours.encode(request(prompt="the fox " * 20)).error is not None
    assert tokens(ours, prompt="the fox " * 20).num_tokens > 10


@pytest.mark.parametrize("bad", [-1, 500, 2**31 - 1])
def test_an_unknown_id_is_named(tmp_path: Path, bad: int) -> None:
    ours = encoder(save(tmp_path))
    assert f"token_ids holds {bad}; the model's ids are 0 to 499" in failure(ask_text(ours, [3, bad]))
    packed = np.array([3, bad], "<i4").tobytes()
    assert f"token_ids holds {bad}" in failure(ask(ours, token_ids=packed))


def test_a_token_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    assert "the model does not have" in failure(ask(encoder(save(tmp_path), vocab_size=20), prompt="the fox"))


def test_too_many_ids_and_too_long_a_text_are_refused_with_the_numbers(tmp_path: Path) -> None:
    ours = encoder(save(tmp_path), max_model_len=10)
    assert text(ours, [70] * 10)
    assert "holds 11 ids; the longest sequence of this engine has 10" in failure(ask_text(ours, [70] * 11))
    assert "10000000 characters" in failure(ask(ours, prompt="x" * 10_000_000))
    with patch.object(core, "MAX_ANSWER_BYTES", 8):
        assert "the text takes 40 bytes, and an answer has at most 8" in failure(ask_text(ours, [1] * 10))
        refusal = failure(ask(ours, prompt="the fox jumps"))
    assert "the prompt has " in refusal
    assert "tokens; they take" in refusal


def test_no_ids_have_no_text_even_where_the_decoder_panics_on_none(tmp_path: Path) -> None:
    assert text(encoder(save(tmp_path)), []) == ""
    pieces = PromptEncoder(word_piece_tokenizer(), ChatTemplates({}, {}), shape(20, 50))
    assert text(pieces, []) == ""
    assert text(pieces, [1, 2, 3]) == "unaffable"
    assert tokens(pieces, prompt="unaffable").token_bytes == [b" un", b"aff", b"able"]


def test_a_hostile_template_is_stopped_as_for_a_request(tmp_path: Path) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    folder = save(tmp_path, chat_template=endless)
    templates = ChatTemplates.load(folder, {}, timeout_s=0.05)
    ours = PromptEncoder(byte_level_tokenizer(), templates, shape(500, 200))
    assert "takes more than 0.05 s of processor time" in failure(ask(ours, chat=CHAT))
    assert tokens(ours, prompt="the fox").num_tokens > 0
    own = encoded_chat([{"role": "user", "content": "x"}], template="{{ ''.__class__ }}")
    assert "renders no templates of requests" in failure(ask(ours, chat=own))
    assert "no chat template" in failure(ask(encoder(save(tmp_path / "plain")), chat=CHAT))


def test_a_panic_of_the_tokenizer_is_that_querys_error() -> None:
    class Panicking:
        def get_vocab(self) -> dict[str, int]:
            return {"long token": 0}

        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> Any:
            raise type("PanicException", (BaseException,), {})("a Rust panic" + "!" * 2_000)

    done = ask_text(PromptEncoder(Panicking(), ChatTemplates({}, {}), shape(500, 100)), [1])
    assert done.error_code == "request_failed"
    assert "a Rust panic" in done.error_message
    assert len(done.error_message) == MAX_ERROR_CHARS
