"""Compares incremental decoding with decoding everything at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from ipc.messages import TextOptions
from tests.unit.workers.text.tools import (
    CORPUS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    word_piece_tokenizer,
)
from workers.detokenizer.piece_decoding import PieceDecoder, WindowDecoder
from workers.detokenizer.text_decoding import Decoding, NewDecoder
from workers.model_tokenizer.vocabulary import Vocabulary

TOKENIZERS: dict[str, Tokenizer] = {
    "byte_level": byte_level_tokenizer(),
    "byte_fallback": byte_fallback_tokenizer(),
    "metaspace": metaspace_tokenizer(),
    "word_piece": word_piece_tokenizer(),
    "strips_each_piece": byte_fallback_tokenizer(),
}
TOKENIZERS["strips_each_piece"].decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0), decoders.Fuse()]
)
FACTORIES: dict[str, NewDecoder] = {name: Decoding.of(tokenizer).new_decoder for name, tokenizer in TOKENIZERS.items()}
for name in ("byte_fallback", "metaspace"):  # the same as if nothing were known of their decoders
    TOKENIZERS[f"{name}_by_window"] = TOKENIZERS[name]
    FACTORIES[f"{name}_by_window"] = partial(WindowDecoder, Vocabulary(TOKENIZERS[name]))
for name in ("byte_level", "byte_fallback", "metaspace", "word_piece", "strips_each_piece"):
    TOKENIZERS[f"{name}_named"] = TOKENIZERS[name]  # special tokens have their name as their text
    FACTORIES[f"{name}_named"] = partial(FACTORIES[name], options=TextOptions(skip_special_tokens=False))
SPECIAL = {
    name: set()
    if name.endswith("_named")
    else {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for name, tokenizer in TOKENIZERS.items()
}


def spoken(name: str, token_ids: list[int]) -> list[int]:
    return [i for i in token_ids if TOKENIZERS[name].id_to_token(i) is not None and i not in SPECIAL[name]]


def decode(name: str, token_ids: list[int]) -> str:
    text: str = TOKENIZERS[name].decode(token_ids, skip_special_tokens=False)
    return text


def bytes_of(name: str, token_ids: list[int]) -> bytes | None:
    """The bytes of byte-fallback tokens, None if others are among them; or those of byte-level tokens."""
    tokens = [TOKENIZERS[name].id_to_token(i) for i in token_ids]
    if name.startswith("byte_level"):
        to_byte = dict(zip(ALPHABET, range(256), strict=True))
        parts = [bytes(map(to_byte.__getitem__, t)) if set(t) <= set(ALPHABET) else t.encode() for t in tokens]
        return b"".join(parts)
    matches = [re.fullmatch("<0x(..)>", token) for token in tokens]
    return None if None in matches else bytes(int(match[1], 16) for match in matches if match)


ALPHABET = [chr(i) if chr(i).isprintable() and i not in (32, 0xA0, 0xAD) else "" for i in range(256)]
ALPHABET = [c or chr(256 + ALPHABET[:i].count("")) for i, c in enumerate(ALPHABET)]


def is_character(data: bytes) -> bool:
    """Whether this is one character."""
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def num_open(name: str, token_ids: list[int]) -> int:
    """How many bytes at the end are the beginning of a character."""
    for count in (3, 2, 1):
        data = bytes_of(name, token_ids) if name.startswith("byte_level") else bytes_of(name, token_ids[-count:])
        data = (data or b"")[-count:]
        if len(data) == count and data[0] >= 0xC2 and any(is_character(data + more) for more in COMPLETIONS):
            return count
    return 0


COMPLETIONS = [bytes(more) for n in (1, 2, 3) for more in product((0x80, 0x90, 0xA0, 0xBF), repeat=n)]


def expected_text(name: str, token_ids: list[int]) -> str:
    """Return the decoding of everything at once. A byte that is part of no character is replaced by a piece "\ufffd".
    So `tokenizers` decodes the characters around it, instead of turning the whole run of bytes into U+FFFD."""
    token_ids = spoken(name, token_ids)
    if name.startswith("byte_level"):
        return decode(name, token_ids)
    ids: list[int] = []
    while len(ids) < len(token_ids):
        rest = token_ids[len(ids) :]
        if bytes_of(name, rest[:1]) is None:
            ids.append(rest[0])
            continue
        character = next((rest[:n] for n in range(1, 5) if is_character(bytes_of(name, rest[:n]) or b"")), None)
        ids += character or [TOKENIZERS[name].token_to_id("\ufffd")]
    return decode(name, ids)


def expected_answer(name: str, prompt: list[int], answer: list[int]) -> str:
    """Return the text that the answer adds to the prompt's text. If the answer continues half a character at the
    prompt's end, the character belongs to the answer."""
    if not bytes_of("byte_level", spoken(name, answer)) if name.startswith("byte_level") else not spoken(name, answer):
        return ""
    settled = spoken(name, prompt)
    count = num_open(name, settled)
    if name.startswith("byte_level"):
        settled_text = decode(name, settled)[: -1 if count else None]
    else:
        settled_text = expected_text(name, settled[: len(settled) - count])
    whole = expected_text(name, prompt + answer)
    assert whole.startswith(settled_text)
    return whole[len(settled_text) :]


def decode_in_pieces(
    factory: NewDecoder, token_ids: list[int], sizes: list[int], prompt: Sequence[int] = ()
) -> list[str]:
    decoder = factory(list(prompt))
    pieces, at, which = [], 0, 0
    while at < len(token_ids):
        size = sizes[which % len(sizes)]
        pieces.append(decoder.push(token_ids[at : at + size]))
        at, which = at + size, which + 1
    return [*pieces, decoder.flush()]


def any_ids(name: str, max_size: int) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds, and characters spelled in bytes, whole and broken."""
    tokenizer = TOKENIZERS[name]
    one = st.integers(0, tokenizer.get_vocab_size() + 3).map(lambda i: [i])
    spelled = st.text("é天🙂 a", min_size=1, max_size=3).map(
        lambda text: [i for b in text.encode() if (i := tokenizer.token_to_id(f"<0x{b:02X}>")) is not None]
    )
    cut = st.tuples(spelled, st.integers(0, 3)).map(lambda pair: pair[0][: len(pair[0]) - pair[1]])
    return st.lists(st.one_of(one, spelled, cut), max_size=max_size).map(
        lambda parts: [i for part in parts for i in part]
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_join_to_the_full_decoding(name: str, data: st.DataObject) -> None:
    token_ids = data.draw(any_ids(name, 40))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    assert "".join(decode_in_pieces(FACTORIES[name], token_ids, sizes)) == expected_text(name, token_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_answer_goes_on_where_its_prompt_ends(name: str, data: st.DataObject) -> None:
    prompt = data.draw(any_ids(name, 6))
    answer = data.draw(any_ids(name, 12))
    size = data.draw(st.integers(1, 4))
    text = "".join(decode_in_pieces(FACTORIES[name], answer, [size], prompt))
    assert text == expected_answer(name, prompt, answer)


def with_stream(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Text without spaces between added tokens, with the decoder of `tokenizers` for streams: as vLLM does it."""
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    stream, text, follows_added = decoders.DecodeStream(skip_special_tokens=False), "", False
    for token_id in token_ids:
        new = stream.step(tokenizer, token_id) or ""
        text += added[token_id] if token_id in added and follows_added else new
        follows_added = token_id in added
    return text


@settings(max_examples=100, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, TOKENIZERS["word_piece"].get_vocab_size() - 1), max_size=12),
    size=st.integers(1, 3),
)
def test_no_space_stands_between_added_tokens_if_none_is_wanted(token_ids: list[int], size: int) -> None:
    tokenizer = TOKENIZERS["word_piece"]
    unspaced = TextOptions(skip_special_tokens=False, spaces_between_special_tokens=False)
    decoder = partial(FACTORIES["word_piece"], options=unspaced)
    assert "".join(decode_in_pieces(decoder, token_ids, [size])) == with_stream(tokenizer, token_ids)


def test_spaces_between_special_tokens_are_the_tokenizers_own() -> None:
    def text(**options: bool) -> str:
        decoder = partial(FACTORIES["word_piece"], options=TextOptions(**options))
        return "".join(decode_in_pieces(decoder, [4, 8, 8, 4], [1]))

    assert text() == "it it"
    assert text(skip_special_tokens=False) == "it [SEP] [SEP] it"
    assert text(skip_special_tokens=False, spaces_between_special_tokens=False) == "it [SEP][SEP] it"
    assert text(spaces_between_special_tokens=False) == "it it"


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace", "word_piece", "strips_each_piece"])
def test_the_bytes_of_tokens_join_to_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    bytes_of_token = Decoding.of(tokenizer).bytes_of
    for text in ("it unaffable it",) if name == "word_piece" else ("the fox 今天 🙂.", "é"):
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        joined = b"".join(map(bytes_of_token, token_ids)).decode()
        assert joined.replace(" ", "") == tokenizer.decode(token_ids).replace(" ", "")
        assert name == "strips_each_piece" or joined.strip() == text


def test_the_bytes_of_a_token_are_exact_and_those_of_a_special_token_are_its_name() -> None:
    for name, special in (("byte_level", "</s>"), ("byte_fallback", "</s>"), ("word_piece", "[SEP]")):
        tokenizer = TOKENIZERS[name]
        bytes_of_token = Decoding.of(tokenizer).bytes_of
        assert bytes_of_token(tokenizer.token_to_id(special)) == special.encode()
        assert bytes_of_token(tokenizer.get_vocab_size() + 3) == b""
        if name != "word_piece":
            parts = [bytes_of_token(i) for i in tokenizer.encode("🙂", add_special_tokens=False).ids]
            assert parts[-4:] == [bytes([byte]) for byte in "🙂".encode()]
    pieces = Decoding.of(TOKENIZERS["byte_fallback"]).bytes_of
    assert pieces(TOKENIZERS["byte_fallback"].token_to_id("▁the")) == b" the"


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace", "byte_fallback_by_window", "metaspace_by_window"])
def test_a_completion_keeps_the_space_between_prompt_and_answer(name: str) -> None:
    the, fox = (TOKENIZERS[name].token_to_id(piece) for piece in ("▁the", "▁fox"))
    bos = TOKENIZERS[name].token_to_id("<s>")
    assert "".join(decode_in_pieces(FACTORIES[name], [fox, the], [1], [the])) == " fox the"
    assert "".join(decode_in_pieces(FACTORIES[name], [fox, the], [1], [bos, the, bos])) == " fox the"
    assert "".join(decode_in_pieces(FACTORIES[name], [fox, the], [1], [bos])) == "fox the"  # the text begins here


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace", "byte_fallback_by_window", "metaspace_by_window"])
@pytest.mark.parametrize("prompt", ["", "▁the"])
def test_each_character_of_a_run_of_bytes_has_its_text_at_once(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    decoder = FACTORIES[name]([tokenizer.token_to_id(prompt)] if prompt else [])
    byte_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🙂é🙂".encode()]
    assert [decoder.push([i]) for i in byte_ids] == ["", "", "", "🙂", "", "é", "", "", "", "🙂"]
    # A byte that breaks the run takes nothing back: it is one U+FFFD, and so is each byte of what it cut off.
    broken = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in b"\xf0\x9f\xff"]
    assert [decoder.push([i]) for i in [*broken, *byte_ids[:4]]] == ["", "", "\ufffd" * 3, "", "", "", "🙂"]
    assert decoder.push(broken[:2]) + decoder.flush() == "\ufffd" * 2


def test_half_a_character_at_a_prompts_end_comes_with_the_answer_that_completes_it() -> None:
    for name in TOKENIZERS.keys() - {"word_piece", "word_piece_named"}:
        token_ids = TOKENIZERS[name].encode("🙂", add_special_tokens=False).ids[-4:]
        assert "".join(decode_in_pieces(FACTORIES[name], token_ids[2:], [1], token_ids[:2])) == "🙂"
        assert "".join(decode_in_pieces(FACTORIES[name], [], [1], token_ids[:2])) == ""
        assert "".join(decode_in_pieces(FACTORIES[name], token_ids[2:3], [1], token_ids[:2])).startswith("\ufffd")


def test_every_id_has_the_text_that_tokenizers_gives_it_however_a_vocabulary_lists_it() -> None:
    two_ids = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), ("▁a", -2.0), ("b", -3.0)], unk_id=0)
    )
    two_ids.decoder = decoders.Metaspace()
    two_tokens = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "c": 2, "d": 1}, merges=[]))
    two_tokens.decoder = decoders.ByteLevel()
    for tokenizer, token_ids in ((two_ids, [1, 2, 3, 4, 1]), (two_tokens, [0, 1, 2, 1, 0])):
        text = "".join(decode_in_pieces(Decoding.of(tokenizer).new_decoder, token_ids, [1]))
        assert text == tokenizer.decode(token_ids)
        assert len(tokenizer.decode(token_ids).replace(" ", "")) == len(token_ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace"])
@settings(max_examples=100, deadline=None)
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
    decoder = FACTORIES["byte_level"]([])
    pieces = [decoder.push([i]) for i in token_ids]
    assert all(pieces)
    assert "".join(pieces) == "the fox"


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    for name in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        token_ids = tokenizer.encode("🙂", add_special_tokens=False).ids[:-1]
        decoder = FACTORIES[name]([])
        assert "".join(decoder.push([i]) for i in token_ids) == tokenizer.decode([])
        assert decoder.flush() == tokenizer.decode(token_ids).lstrip()


@pytest.mark.parametrize("name", ["byte_fallback", "byte_fallback_by_window"])
@pytest.mark.parametrize("piece", ["▁", "\ufffd", "\n", "▁the", "<s>"])
def test_a_long_text_of_one_piece_keeps_a_short_window(name: str, piece: str) -> None:
    tokenizer = TOKENIZERS[name]
    decoder = FACTORIES[name]([])
    assert isinstance(decoder, PieceDecoder | WindowDecoder)
    token_id = tokenizer.token_to_id(piece)
    text = "".join(decoder.push([token_id]) for _ in range(2_000))
    if isinstance(decoder, WindowDecoder):
        assert len(decoder._window) < 100
    else:
        assert len(decoder._beginning or []) < 100 or piece == "<s>"
    assert text + decoder.flush() == tokenizer.decode([token_id] * 2_000)
