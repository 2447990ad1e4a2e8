"""Incremental decoding against the decoding of everything at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.unit.text_tools import (
    CORPUS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    word_piece_tokenizer,
)
from workers.detokenizer.decoding import Vocabulary, WindowDecoder, decoder_factory

TOKENIZERS: dict[str, Tokenizer] = {
    "byte_level": byte_level_tokenizer(),
    "byte_fallback": byte_fallback_tokenizer(),
    "metaspace": metaspace_tokenizer(),
    "word_piece": word_piece_tokenizer(),
}
FACTORIES = {name: decoder_factory(tokenizer) for name, tokenizer in TOKENIZERS.items()}
for name in ("byte_fallback", "metaspace"):  # the same as if nothing were known of their decoders
    TOKENIZERS[f"{name}_by_window"] = TOKENIZERS[name]
    FACTORIES[f"{name}_by_window"] = partial(WindowDecoder, Vocabulary(TOKENIZERS[name]), None)


def decode_in_pieces(factory: Callable[[], object], token_ids: list[int], sizes: list[int]) -> list[str]:
    decoder = factory()
    pieces, at, which = [], 0, 0
    while at < len(token_ids):
        size = sizes[which % len(sizes)]
        pieces.append(decoder.push(token_ids[at : at + size]))  # type: ignore[attr-defined]
        at, which = at + size, which + 1
    return [*pieces, decoder.flush()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_join_to_the_full_decoding(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=80))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    pieces = decode_in_pieces(FACTORIES[name], token_ids, sizes)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace"])
@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(max_size=60), st.sampled_from(CORPUS)), size=st.integers(1, 3))
def test_pieces_of_a_text_hold_whole_characters_only(name: str, text: str, size: int) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = decode_in_pieces(FACTORIES[name], token_ids, [size])
    whole = tokenizer.decode(token_ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_token_with_whole_characters_has_its_text_at_once() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("the fox", add_special_tokens=False).ids
    decoder = FACTORIES["byte_level"]()
    pieces = [decoder.push([i]) for i in token_ids]
    assert all(pieces)
    assert "".join(pieces) == "the fox"


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    for name in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        token_ids = tokenizer.encode("🙂", add_special_tokens=False).ids[:-1]
        decoder = FACTORIES[name]()
        assert "".join(decoder.push([i]) for i in token_ids) == tokenizer.decode([])
        assert decoder.flush() == tokenizer.decode(token_ids).lstrip()


@pytest.mark.parametrize("name", ["byte_fallback", "byte_fallback_by_window"])
@pytest.mark.parametrize("piece", ["▁", "\ufffd", "\n", "▁the", "<s>"])
def test_a_long_text_of_one_piece_keeps_a_short_window(name: str, piece: str) -> None:
    tokenizer = TOKENIZERS[name]
    decoder = FACTORIES[name]()
    assert isinstance(decoder, WindowDecoder)
    token_id = tokenizer.token_to_id(piece)
    text = "".join(decoder.push([token_id]) for _ in range(2_000))
    assert len(decoder._window) < 100
    assert text + decoder.flush() == tokenizer.decode([token_id] * 2_000)
