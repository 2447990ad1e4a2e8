"""Decodes token ids into text piece by piece: the pieces joined are the decoding of all ids at once.

No piece ends in half a character, and nothing that was given out is ever taken back. Special tokens have no text.

Two ways. A byte-level vocabulary (GPT-2, Llama 3, Qwen) is a table of bytes: its text is a UTF-8 stream, which Python
decodes incrementally by the same rule (one U+FFFD per maximal broken piece) that `tokenizers` uses on the whole. Any
other decoder is asked for the text of a window of ids that overlaps what was given out.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Callable
from typing import Final, Protocol

from tokenizers import Tokenizer, decoders

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
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
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    spoken = frozenset(vocabulary.values()) - _special_ids(tokenizer)
    byte_tokens = frozenset(i for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))
    return lambda: WindowDecoder(tokenizer, spoken, byte_tokens)


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
    """

    __slots__ = ("_byte_tokens", "_prefix", "_spoken", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, spoken: frozenset[int], byte_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._spoken = spoken  # ids that have text at all
        self._byte_tokens = byte_tokens
        self._window: list[int] = []
        self._prefix = ""  # of the window's text, what has been given out

    def push(self, token_ids: list[int]) -> str:
        window = self._window
        new = [i for i in token_ids if i in self._spoken]
        window += new
        if not new or new[-1] in self._byte_tokens:
            return ""
        text = self._certain(window)
        delta = text[len(self._prefix) :]
        self._prefix = text
        if len(window) > _WINDOW:
            self._shorten()
        return delta

    def flush(self) -> str:
        return self._decode(self._window)[len(self._prefix) :]

    def _certain(self, window: list[int]) -> str:
        text = self._decode(window)
        return text[:-1] if text.endswith(_REPLACEMENT) else text

    def _shorten(self) -> None:
        """Forget the window's beginning. What stays has a text, so that the treatment of a first token is behind it."""
        num_kept = _OVERLAP
        while num_kept < len(self._window):
            # A run of byte tokens decodes as a whole or not at all: never begin inside one.
            if self._window[-num_kept] not in self._byte_tokens:
                kept = self._window[-num_kept:]
                prefix = self._certain(kept)
                if prefix and self._prefix.endswith(prefix.lstrip()):
                    self._window, self._prefix = kept, prefix
                    return
            num_kept *= 2

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)  # there are none
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
