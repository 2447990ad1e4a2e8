"""Each token's own bytes, which log-probabilities and `PromptTokens` carry.

They do not depend on the tokens around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ipc.messages import TokenBytes as TokenBytesTable
from workers.model_tokenizer.loading import is_foreign_failure
from workers.model_tokenizer.vocabulary import Vocabulary


class TokenBytes(dict[int, bytes]):
    """Each token's bytes by id, for a vocabulary that is not byte-level. Filled on demand.

    A byte-fallback token is its byte. Any other token is the text that it adds to a text before it. A special token is
    its name. An id that the tokenizer does not know, or that it cannot decode, has no bytes.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._before = [] if vocabulary.filler is None else [vocabulary.filler]
        self._prefix = vocabulary.decode(self._before)

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._bytes_of(token_id)
        return data

    def _bytes_of(self, token_id: int) -> bytes:
        vocabulary = self._vocabulary
        name = vocabulary.special.get(token_id)
        if name is not None:
            return name.encode()
        if token_id in vocabulary.bytes_of:
            return vocabulary.bytes_of[token_id]
        if token_id not in vocabulary.spoken:
            return b""
        if vocabulary.has_half_characters:
            return byte_level_bytes(vocabulary.spoken[token_id])
        return self.shown_text(token_id).encode()

    def shown_text(self, token_id: int) -> str:
        """The text that a token adds to a text before it; "" if the tokenizer cannot decode it."""
        try:
            text = self._vocabulary.decode([*self._before, token_id])
            if not text.startswith(self._prefix):  # the decoder joins the two, as WordPiece does with "it 's"
                return self._vocabulary.decode([token_id])
        except BaseException as error:
            if not is_foreign_failure(error):
                raise
            return ""
        return text[len(self._prefix) :]


def token_bytes_table(id_columns: Sequence[bytes], bytes_of: Callable[[int], bytes]) -> TokenBytesTable:
    """The bytes of all tokens in these int32 columns, each token once."""
    ids = np.unique(np.frombuffer(b"".join(id_columns), "<i4"))
    ids = ids[ids >= 0]  # places beyond the vocabulary hold NO_TOKEN
    parts = [bytes_of(i) for i in ids.tolist()]
    return TokenBytesTable(ids.tobytes(), np.array([len(part) for part in parts], "<i4").tobytes(), b"".join(parts))


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token, as its stand-in characters spell them.

    An added token that is no byte-level text stands for itself.
    """
    try:
        return bytes([_TO_BYTE[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_level_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: a visible character is its own, the others follow from U+0100."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


_TO_BYTE = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
