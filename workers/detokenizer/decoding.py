"""Decodes token ids into text piece by piece: the pieces joined are the decoding of all ids at once.

No piece ends in half a character, and nothing that was given out is ever taken back. Special tokens have no text.

Two ways. A byte-level vocabulary (GPT-2, Llama 3, Qwen) is a table of bytes: its text is a UTF-8 stream, which Python
decodes incrementally by the same rule (one U+FFFD per maximal broken piece) that `tokenizers` uses on the whole. Any
other decoder is asked for the text of a window of ids that overlaps what was given out.
"""

from __future__ import annotations

import json
import re
from codecs import utf_8_decode
from collections.abc import Callable
from typing import Final, Protocol

from tokenizers import Tokenizer, decoders

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PIECEWISE: Final = re.compile(r"(?: ?(?:Replace|ByteFallback|Metaspace))+(?: Fuse(?: Strip)?)?")
_WINDOW: Final = 32  # ids
_OVERLAP: Final = 8


class TextDecoder(Protocol):
    """The decoding of one sequence."""

    def push(self, token_ids: list[int]) -> str:
        """The text that is certain now. Ids that the tokenizer does not know have none."""
        ...

    def flush(self) -> str:
        """The rest, at the end of the sequence; half a character as U+FFFD. Only once."""
        ...


def decoder_factory(tokenizer: Tokenizer) -> Callable[[], TextDecoder]:
    """Prepare a tokenizer's tables; the result makes a new decoder for each sequence."""
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        byte_table, text_table = _byte_level_tables(tokenizer)
        return lambda: ByteLevelDecoder(byte_table, text_table)
    vocabulary = Vocabulary(tokenizer)
    pieces = PieceTexts.of(tokenizer, vocabulary)
    return lambda: WindowDecoder(vocabulary, pieces)


class ByteLevelDecoder:
    """A token is some bytes; a text is complete where its UTF-8 is."""

    __slots__ = ("_bytes", "_held", "_texts")

    def __init__(self, byte_table: list[bytes], text_table: list[str | None]) -> None:
        self._bytes = byte_table
        self._texts = text_table
        self._held = b""  # the beginning of a character

    def push(self, token_ids: list[int]) -> str:
        if not self._held and len(token_ids) == 1:
            try:
                text = self._texts[token_ids[0]]
            except IndexError:
                return ""
            if text is not None:
                return text
        table = self._bytes
        try:
            data = self._held + b"".join([table[i] for i in token_ids])
        except IndexError:  # rows of the embedding that pad the vocabulary
            data = self._held + b"".join([table[i] for i in token_ids if i < len(table)])
        text, num_decoded = utf_8_decode(data, "replace", False)
        self._held = data[num_decoded:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._held, "replace", True)
        self._held = b""
        return text


class WindowDecoder:
    """Asks the tokenizer for the text of a sliding window; new text is what it has beyond its known beginning.

        ids:     ... given out ....[ overlap | new ]
        text:    ..................[ prefix  | delta ]

    The overlap stands for all that came before it: a decoder that treats the first token of a text differently (and
    takes a leading space off) does so to prefix and whole alike. Two ends of a text may still change and are held back:
    a run of byte-fallback tokens, which turns into U+FFFDs as a whole if it is not UTF-8 as a whole, and a last U+FFFD,
    which may be the beginning of a character.

    Where the decoder is a chain that treats each piece by itself (`PieceTexts`), any one piece will do for an overlap,
    and a piece that is no byte has always the same text.
    """

    __slots__ = ("_pieces", "_prefix", "_vocabulary", "_window")

    def __init__(self, vocabulary: Vocabulary, pieces: PieceTexts | None) -> None:
        self._vocabulary = vocabulary
        self._pieces = pieces
        self._window: list[int] = []
        self._prefix = ""  # of the window's text, what has been given out

    def push(self, token_ids: list[int]) -> str:
        window, pieces = self._window, self._pieces
        if pieces is not None and window == pieces.overlap:
            try:
                return "".join([pieces[i] for i in token_ids])
            except KeyError:
                pass  # a byte: it depends on its neighbours
        new = [i for i in token_ids if i in self._vocabulary.spoken]
        window += new
        if not new or new[-1] in self._vocabulary.byte_tokens:
            return ""
        text = self._vocabulary.decode(window)
        if pieces is None and text.endswith(_REPLACEMENT):
            text = text[:-1]
        delta = text[len(self._prefix) :]
        self._prefix = text
        if pieces is not None and text:
            self._window, self._prefix = pieces.overlap.copy(), pieces.overlap_text
        elif len(window) > _WINDOW:
            self._shorten()
        return delta

    def flush(self) -> str:
        return self._vocabulary.decode(self._window)[len(self._prefix) :]

    def _shorten(self) -> None:
        """Forget the window's beginning. What stays has a text, so that the treatment of a first token is behind it."""
        num_kept = _OVERLAP
        while num_kept < len(self._window):
            # A run of byte tokens decodes as a whole or not at all: never begin inside one.
            if self._window[-num_kept] not in self._vocabulary.byte_tokens:
                kept = self._window[-num_kept:]
                prefix = self._vocabulary.decode(kept).removesuffix(_REPLACEMENT)
                if prefix and self._prefix.endswith(prefix.lstrip()):
                    self._window, self._prefix = kept, prefix
                    return
            num_kept *= 2


class Vocabulary:
    """A tokenizer's ids: which have text at all, and which are single bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self._tokenizer = tokenizer
        self.spoken = frozenset(ids.values()) - _special_ids(tokenizer)
        self.byte_tokens = frozenset(i for token, i in ids.items() if _BYTE_TOKEN.fullmatch(token))

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)  # there are none among them
        return text


class PieceTexts(dict[int, str]):
    """By id, a piece's text anywhere but at the beginning; filled as it is asked for. Bytes are not in it."""

    def __init__(self, vocabulary: Vocabulary, overlap: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.overlap = [overlap]
        self.overlap_text = vocabulary.decode(self.overlap)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocabulary: Vocabulary) -> PieceTexts | None:
        """None if the tokenizer's decoder does not treat each piece by itself, as far as is known here."""
        if tokenizer.decoder is None:
            return None
        state = json.loads(tokenizer.decoder.__getstate__())
        chain = state["decoders"] if state["type"] == "Sequence" else [state]
        kinds = " ".join(link["type"] for link in chain)
        if not _PIECEWISE.fullmatch(kinds) or any(link.get("stop") for link in chain):
            return None
        whole = (i for i in sorted(vocabulary.spoken - vocabulary.byte_tokens) if vocabulary.decode([i]).strip())
        overlap = next(whole, None)
        return None if overlap is None else cls(vocabulary, overlap)

    def __missing__(self, token_id: int) -> str:
        if token_id in self._vocabulary.byte_tokens:
            raise KeyError(token_id)
        text = ""
        if token_id in self._vocabulary.spoken:
            text = self._vocabulary.decode([*self.overlap, token_id])[len(self.overlap_text) :]
        self[token_id] = text
        return text


def _byte_level_tables(tokenizer: Tokenizer) -> tuple[list[bytes], list[str | None]]:
    """By token id: its bytes, and its text where these are whole characters."""
    to_byte = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
    special = _special_ids(tokenizer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    byte_table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        if i not in special:
            try:
                byte_table[i] = bytes([to_byte[character] for character in token])
            except KeyError:  # an added token that is no byte-level text stands for itself
                byte_table[i] = token.encode()
    return byte_table, [_whole_text(data) for data in byte_table]


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _byte_level_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: a visible character is its own, the others follow from U+0100."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
