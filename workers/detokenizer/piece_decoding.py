"""Decoding for tokenizers of pieces (SentencePiece and the like), by asking `tokenizers` for the text of a few ids.

This module cuts runs of byte-fallback tokens into characters. A complete character has its text at once, and each byte
outside a character becomes one U+FFFD. `tokenizers` decodes a run as a whole: one invalid byte turns the whole run into
U+FFFD, which would change characters that were emitted already. Both give the same text for a run of valid UTF-8.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Iterator
from typing import Final, NamedTuple

from workers.model_tokenizer.vocabulary import Vocabulary

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_PIECEWISE: Final = re.compile(r"(?: ?(?:Replace|ByteFallback|Metaspace))+(?: Fuse(?: Strip)?)?")
_WINDOW: Final = 32  # ids
_OVERLAP: Final = 8


class Unit(NamedTuple):
    """Ids that are decoded together: one piece, the bytes of one character, or a byte that belongs to no character."""

    token_ids: list[int]
    is_broken: bool  # a byte that belongs to no character


class UnitCutter:
    """Cuts the ids of one sequence into units. Holds back the bytes of a character that is not whole yet."""

    __slots__ = ("_data", "_num_of_prompt", "_vocabulary", "held")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._data = b""  # the bytes of `held`
        self._num_of_prompt = 0  # how many of these are the prompt's, until the output adds some
        self.held: list[int] = []

    def cut(self, token_ids: list[int]) -> Iterator[Unit]:
        bytes_of, spoken = self._vocabulary.bytes_of, self._vocabulary.spoken
        for token_id in token_ids:
            if token_id not in spoken:
                continue
            byte = bytes_of.get(token_id)
            if byte is not None:
                self._num_of_prompt = 0
                self._data += byte
                self.held.append(token_id)
                yield from self._settled()
            else:
                if self.held:
                    self._num_of_prompt = 0
                    yield from self._break(len(self.held))
                yield Unit([token_id], False)

    def end_prompt(self) -> None:
        """The prompt ends here. Bytes held now belong to the output only if the output continues their character."""
        self._num_of_prompt = len(self.held)

    def finish(self) -> list[Unit]:
        return [] if self._num_of_prompt else self._break(len(self.held))

    def _settled(self) -> Iterator[Unit]:
        while self._data:
            try:
                text, _ = utf_8_decode(self._data, "strict", False)
            except UnicodeDecodeError as error:
                yield from self._break(error.end)
                continue
            if text:
                whole, self.held, self._data = self.held, [], b""
                yield Unit(whole, False)
            return

    def _break(self, count: int) -> list[Unit]:
        broken = [Unit([token_id], True) for token_id in self.held[:count]]
        self.held, self._data = self.held[count:], self._data[count:]
        return broken


class PieceTexts(dict[int, str]):
    """Each piece's text by id, for any place except a text's beginning. Filled on demand. Holds no byte tokens."""

    def __init__(self, vocabulary: Vocabulary, filler: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self._before = [filler]
        self._num_before = len(vocabulary.decode(self._before))
        self._characters: dict[tuple[int, ...], str] = {}

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> PieceTexts | None:
        """None if the tokenizer's decoder is not known to treat each piece by itself."""
        kinds = " ".join(link["type"] for link in vocabulary.chain)
        if vocabulary.filler is None or not _PIECEWISE.fullmatch(kinds) or any(c.get("stop") for c in vocabulary.chain):
            return None
        return cls(vocabulary, vocabulary.filler)

    def of_unit(self, unit: Unit) -> str:
        """The text of a unit that is not broken."""
        token_ids = unit.token_ids
        if token_ids[0] not in self.vocabulary.bytes_of:
            return self[token_ids[0]]
        key = tuple(token_ids)
        text = self._characters.get(key)
        if text is None:
            text = self._characters[key] = self._decode(token_ids)
        return text

    def __missing__(self, token_id: int) -> str:
        if token_id in self.vocabulary.bytes_of:
            raise KeyError(token_id)
        text = self._decode([token_id]) if token_id in self.vocabulary.spoken else ""
        self[token_id] = text
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self.vocabulary.decode(self._before + token_ids)[self._num_before :]


class PieceDecoder:
    """For decoder chains that treat each piece by itself, so that a piece always has the same text.

    The first piece is the exception. Such a chain may strip a leading space from a text, so the ids at the beginning
    are decoded together until they have a text.
    """

    __slots__ = ("_beginning", "_cutter", "_pieces")

    def __init__(self, pieces: PieceTexts, prompt_tail: list[int]) -> None:
        self._pieces = pieces
        self._cutter = UnitCutter(pieces.vocabulary)
        self._beginning: list[int] | None = []  # ids, as long as these have no text
        if prompt_tail:
            self.push(prompt_tail)
            self._cutter.end_prompt()

    def push(self, token_ids: list[int]) -> str:
        if self._beginning is None and not self._cutter.held:
            pieces = self._pieces
            try:
                return "".join([pieces[i] for i in token_ids])
            except KeyError:
                pass  # a byte: it depends on its neighbours
        return "".join([self._text(unit) for unit in self._cutter.cut(token_ids)])

    def flush(self) -> str:
        return "".join([self._text(unit) for unit in self._cutter.finish()])

    def _text(self, unit: Unit) -> str:
        if unit.is_broken:
            self._beginning = None
            return _REPLACEMENT
        if self._beginning is None:
            return self._pieces.of_unit(unit)
        self._beginning += unit.token_ids
        text = self._pieces.vocabulary.decode(self._beginning)
        if text:
            self._beginning = None
        return text


class WindowDecoder:
    """Asks the tokenizer for the text of a sliding window; the new text is what follows the known prefix.

        ids:     ..... emitted ....[ overlap | new ]
        text:    ..................[ prefix  | delta ]

    The overlap stands for all earlier ids. A decoder that treats the first token of a text differently, and strips a
    leading space, does so in the prefix and in the whole alike. If ByteLevel is one link of a longer chain, a final
    U+FFFD may be the beginning of a character, so it is held back.
    """

    __slots__ = ("_cutter", "_prefix", "_vocabulary", "_window")

    def __init__(self, vocabulary: Vocabulary, prompt_tail: list[int]) -> None:
        self._vocabulary = vocabulary
        self._cutter = UnitCutter(vocabulary)
        self._window: list[int] = []
        self._prefix = ""  # the part of the window's text that was emitted
        if prompt_tail:
            self.push(prompt_tail)
            self._cutter.end_prompt()

    def push(self, token_ids: list[int]) -> str:
        return self._take(self._cutter.cut(token_ids), is_last=False)

    def flush(self) -> str:
        return self._take(iter(self._cutter.finish()), is_last=True)

    def _take(self, units: Iterator[Unit], *, is_last: bool) -> str:
        window = self._window
        texts: list[str] = []
        for unit in units:
            if unit.is_broken:
                texts += self._new_text(), _REPLACEMENT
                if self._vocabulary.filler is not None:  # replaces the byte, to keep the runs around it apart
                    window.append(self._vocabulary.filler)
                    self._prefix = self._vocabulary.decode(window)
            else:
                window += unit.token_ids
        texts.append(self._new_text(hold_back=not is_last))
        if len(window) > _WINDOW:
            self._shorten()
        return "".join(texts)

    def _new_text(self, *, hold_back: bool = False) -> str:
        text = self._vocabulary.decode(self._window)
        if hold_back and self._vocabulary.has_half_characters and len(text) > len(self._prefix):
            text = text.removesuffix(_REPLACEMENT)
        delta = text[len(self._prefix) :]
        self._prefix = text
        return delta

    def _shorten(self) -> None:
        """Drop the window's beginning. The kept ids have a text, so later ids are not treated as a text's first."""
        num_kept = _OVERLAP
        while num_kept < len(self._window):
            # The bytes of one character decode only together, so the window must not begin inside a run of bytes.
            if self._window[-num_kept] not in self._vocabulary.bytes_of:
                kept = self._window[-num_kept:]
                prefix = self._vocabulary.decode(kept)
                if not self._prefix.endswith(prefix.lstrip()):
                    prefix = prefix.removesuffix(_REPLACEMENT)  # held back
                if prefix and self._prefix.endswith(prefix.lstrip()):
                    self._window[:], self._prefix = kept, prefix
                    return
            num_kept *= 2
