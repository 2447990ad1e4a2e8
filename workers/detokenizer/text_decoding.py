"""Decodes a sequence's output tokens piece by piece, into the text that they add to the prompt's text.

The joined pieces equal the decoding of prompt and output together, minus the prompt's own text. No piece ends in half a
character, and emitted text never changes. Special tokens have no text, or their name as their text: the request says
which.

Two ways. A byte-level vocabulary (GPT-2, Llama 3, Qwen) is a table of bytes: its text is a UTF-8 stream, which Python
decodes incrementally by the same rule (one U+FFFD per maximal broken piece) that `tokenizers` uses on the whole. For
any other decoder, `piece_decoding.py` asks `tokenizers` for the text of a few ids at a time.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from ipc.messages import PLAIN_TEXT, TextOptions
from workers.detokenizer.piece_decoding import PieceDecoder, PieceTexts, WindowDecoder
from workers.model_tokenizer.token_bytes import TokenBytes, byte_level_bytes
from workers.model_tokenizer.vocabulary import Vocabulary


class TextDecoder(Protocol):
    """The decoding of one sequence."""

    def push(self, token_ids: list[int]) -> str:
        """The text that is certain now. Ids that the tokenizer does not know have none."""
        ...

    def flush(self) -> str:
        """The rest, at the end of the sequence; half a character as U+FFFD. Only once."""
        ...


class NewDecoder(Protocol):
    """Makes the decoder of a sequence."""

    def __call__(self, prompt_tail: list[int], options: TextOptions = PLAIN_TEXT) -> TextDecoder:
        """`prompt_tail`: the last token ids of its prompt (`ipc.messages.PROMPT_TAIL_TOKENS`)."""
        ...


class Decoding(NamedTuple):
    """The tables of one tokenizer."""

    new_decoder: NewDecoder
    bytes_of: Callable[[int], bytes]  # a token's own bytes, by id
    shown_text: Callable[[int], str]  # the text that a token adds to a text before it, special ones included
    special_tokens: Mapping[int, str]  # names by id

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Decoding:
        vocabulary = Vocabulary(tokenizer)
        spoken = vocabulary.with_special_tokens()
        nameless: _Maker
        named: _Maker
        bytes_of: Callable[[int], bytes]
        shown_text: Callable[[int], str]
        if [link["type"] for link in vocabulary.chain] == ["ByteLevel"]:
            tables = ByteTables.of(spoken)
            nameless = partial(ByteLevelDecoder, tables.without(vocabulary.special))
            named = partial(ByteLevelDecoder, tables)
            bytes_of, shown_text = tables.bytes_of, tables.shown_text
        else:
            nameless, named = _piece_decoders(vocabulary), _piece_decoders(spoken)
            token_bytes = TokenBytes(spoken)
            bytes_of, shown_text = token_bytes.__getitem__, token_bytes.shown_text
        added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}

        def new_decoder(prompt_tail: list[int], options: TextOptions = PLAIN_TEXT) -> TextDecoder:
            if options.skip_special_tokens:
                return nameless(prompt_tail)
            decoder = named(prompt_tail)
            return decoder if options.spaces_between_special_tokens else UnspacedDecoder(decoder, added)

        return cls(new_decoder, bytes_of, shown_text, vocabulary.special)


_Maker = Callable[[list[int]], TextDecoder]


def _piece_decoders(vocabulary: Vocabulary) -> _Maker:
    pieces = PieceTexts.of(vocabulary)
    return partial(WindowDecoder, vocabulary) if pieces is None else partial(PieceDecoder, pieces)


class ByteTables(NamedTuple):
    """By token id: its bytes, and its text where these are whole characters."""

    data: list[bytes]
    texts: list[str | None]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> ByteTables:
        data = [b""] * (max(vocabulary.spoken, default=-1) + 1)
        for token_id, token in vocabulary.spoken.items():
            data[token_id] = byte_level_bytes(token)
        return cls(data, [_whole_text(part) for part in data])

    def without(self, token_ids: Iterable[int]) -> ByteTables:
        """The same tables, in which these tokens have no text."""
        data, texts = self.data.copy(), self.texts.copy()
        for token_id in token_ids:
            data[token_id], texts[token_id] = b"", ""
        return ByteTables(data, texts)

    def bytes_of(self, token_id: int) -> bytes:
        return self.data[token_id] if token_id < len(self.data) else b""

    def shown_text(self, token_id: int) -> str:
        return self.data[token_id].decode("utf-8", "replace")


class ByteLevelDecoder:
    """For byte-level vocabularies: a token is some bytes, and a text ends where its UTF-8 is complete."""

    __slots__ = ("_bytes", "_held", "_num_of_prompt", "_texts")

    def __init__(self, tables: ByteTables, prompt_tail: list[int]) -> None:
        self._bytes, self._texts = tables
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


class UnspacedDecoder:
    """Writes no space between two added tokens, where the decoder that it wraps may write one.

    As vLLM does for `spaces_between_special_tokens=False`: an added token that follows another one has its name as its
    text.
    """

    __slots__ = ("_added", "_decoder", "_follows_added")

    def __init__(self, decoder: TextDecoder, added: Mapping[int, str]) -> None:
        self._decoder = decoder
        self._added = added
        self._follows_added = False

    def push(self, token_ids: list[int]) -> str:
        texts = []
        for token_id in token_ids:
            text = self._decoder.push([token_id])
            name = self._added.get(token_id)
            texts.append(name if name is not None and self._follows_added else text)
            self._follows_added = name is not None
        return "".join(texts)

    def flush(self) -> str:
        return self._decoder.flush()


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
