"""The ids of a tokenizer, each with the token that it decodes."""

from __future__ import annotations

import copy
import re
from typing import Final

from tokenizers import Tokenizer

from workers.model_tokenizer.declarations import chain
from workers.model_tokenizer.loading import is_foreign_failure

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """A tokenizer's ids, each with the token that `Tokenizer.decode` uses for it.

    Looked up by id, because a vocabulary may list one id under two tokens, or one token under two ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        num_ids = 1 + max([tokenizer.get_vocab_size(), *tokenizer.get_vocab().values()])
        tokens = {i: tokenizer.id_to_token(i) for i in range(num_ids)}
        self.spoken: dict[int, str] = {i: t for i, t in tokens.items() if t is not None and i not in self.special}
        self.chain = chain(tokenizer.decoder)
        kinds = [link["type"] for link in self.chain]
        self.has_half_characters = "ByteLevel" in kinds  # decodes half a character to U+FFFD
        self.bytes_of: dict[int, bytes] = {}
        if "ByteFallback" in kinds:
            matches = ((i, _BYTE_TOKEN.fullmatch(token)) for i, token in self.spoken.items())
            self.bytes_of = {i: bytes([int(match[1], 16)]) for i, match in matches if match}
        self.filler = next(filter(self._has_text, self.spoken), None)  # an id with a text of its own

    def with_special_tokens(self) -> Vocabulary:
        """The same vocabulary, in which special tokens have their name as their text."""
        other = copy.copy(self)
        other.spoken = {**self.special, **self.spoken}
        return other

    def decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""  # some decoders panic on an empty list
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False)  # the ids are spoken ones
        return text

    def _has_text(self, token_id: int) -> bool:
        try:
            return token_id not in self.bytes_of and bool(self.decode([token_id]).strip(f" {_REPLACEMENT}"))
        except BaseException as error:
            if not is_foreign_failure(error):
                raise
            return False
