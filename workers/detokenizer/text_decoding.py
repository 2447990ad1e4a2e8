"""Decodes a sequence's output tokens piece by piece, into the text that they add to the prompt's text.

The joined pieces equal the decoding of prompt and output together, minus the prompt's own text. No piece ends in half a
character, and emitted text never changes. Special tokens have no text.

Two ways. A byte-level vocabulary (GPT-2, Llama 3, Qwen) is a table of bytes: its text is a UTF-8 stream, which Python
decodes incrementally by the same rule (one U+FFFD per maximal broken piece) that `tokenizers` uses on the whole. For
any other decoder, `piece_decoding.py` asks `tokenizers` for the text of a few ids at a time.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable
from typing import Protocol

from tokenizers import Tokenizer

from workers.detokenizer.piece_decoding import PieceDecoder, PieceTexts, Vocabulary, WindowDecoder


class TextDecoder(Protocol):
    """The decoding of one sequence."""

    def push(self, token_ids: list[int]) -> str:
        """The text that is certain now. Ids that the tokenizer does not know have none."""
        ...

    def flush(self) -> str:
        """The rest, at the end of the sequence; half a character as U+FFFD. Only once."""
        ...


NewDecoder = Callable[[list[int]], TextDecoder]
"""Makes the decoder of a sequence from the last token ids of its prompt (`ipc.messages.PROMPT_TAIL_TOKENS`)."""


def decoder_factory(tokenizer: Tokenizer) -> NewDecoder:
    """Prepare a tokenizer's tables; the result makes a new decoder for each sequence."""
    vocabulary = Vocabulary(tokenizer)
    if [link["type"] for link in vocabulary.chain] == ["ByteLevel"]:
        byte_table, text_table = _byte_level_tables(vocabulary)
        return lambda prompt_tail: ByteLevelDecoder(byte_table, text_table, prompt_tail)
    pieces = PieceTexts.of(vocabulary)
    if pieces is None:
        return lambda prompt_tail: WindowDecoder(vocabulary, prompt_tail)
    return lambda prompt_tail: PieceDecoder(pieces, prompt_tail)


class ByteLevelDecoder:
    """For byte-level vocabularies: a token is some bytes, and a text ends where its UTF-8 is complete."""

    __slots__ = ("_bytes", "_held", "_num_of_prompt", "_texts")

    def __init__(self, byte_table: list[bytes], text_table: list[str | None], prompt_tail: list[int]) -> None:
        self._bytes = byte_table
        self._texts = text_table
        self._held = b""  # the beginning of a character
        self._num_of_prompt = 0  # how many of its bytes are the prompt's, until the output adds some
        if prompt_tail:
            self.push(prompt_tail)
            self._num_of_prompt = len(self._held)

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
        if len(data) > self._num_of_prompt:
            self._num_of_prompt = 0
        text, num_decoded = utf_8_decode(data, "replace", False)
        self._held = data[num_decoded:]
        return text

    def flush(self) -> str:
        if self._num_of_prompt:
            return ""  # the output adds nothing to the prompt's half character
        text, _ = utf_8_decode(self._held, "replace", True)
        self._held = b""
        return text


def _byte_level_tables(vocabulary: Vocabulary) -> tuple[list[bytes], list[str | None]]:
    """By token id: its bytes, and its text where these are whole characters."""
    to_byte = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
    byte_table = [b""] * (max(vocabulary.spoken, default=-1) + 1)
    for i, token in vocabulary.spoken.items():
        try:
            byte_table[i] = bytes([to_byte[character] for character in token])
        except KeyError:  # an added token that is no byte-level text stands for itself
            byte_table[i] = token.encode()
    return byte_table, [_whole_text(data) for data in byte_table]


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
