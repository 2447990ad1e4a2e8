"""The model's vocabulary as llguidance needs it: the text of each token, and which tokens are special.

Built from the tokenizer that the other host processes load, so that tokens declared outside tokenizer.json count too.
"""

from __future__ import annotations

from typing import Final

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from ipc.errors import ModelUnsupported
from workers.model_tokenizer.loading import load_tokenizer

_MAX_PROBLEM_CHARS: Final = 300


class Vocabulary:
    """The tokens of one model. Immutable; threads may share it.

    Attributes:
        size: tokens that the model can generate, which is the number of bits of a mask. Those beyond the tokenizer's
            have no text and are never allowed.
        num_words: int32 words of a mask: token t is bit t % 32 of word t // 32.
        tokens: llguidance's view. Its width may differ from the model's.
        end_id: the token that llguidance takes for the end of the text. The matchers replace it by each request's own
            end-of-sequence ids.
        padding_ids: bits of a mask's last word that stand for no token of the model.
        special_ids: text of each special token -> its id. Free text cannot produce them.
        broken_tokens: bytes of each other token that begins or ends inside a character, by id. Free text, which is
            UTF-8, may be made of them and cannot end behind each of them.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_id: int | None = None) -> None:
        """Raises ModelUnsupported, with llguidance's reason, for a tokenizer that it cannot read."""
        self.size: Final = size
        self.num_words: Final = -(-size // 32)
        self.padding_ids: Final = range(size, self.num_words * 32)
        added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        special = [token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        # An ordinary token would be lost to the grammars, so the end is a special one if there is any.
        candidates = [token_id for token_id in (eos_token_id, *special) if token_id is not None]
        self.end_id: Final = next((each for each in candidates if each in special), 0)
        width = max(size, max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1)
        try:
            self.tokens: Final = LLTokenizer(tokenizer.to_str(), n_vocab=width, eos_token=[self.end_id])
        except Exception as error:
            problem = " ".join(str(error).split())[:_MAX_PROBLEM_CHARS]
            raise ModelUnsupported(
                f"structured outputs cannot be used with this model: llguidance refuses its tokenizer ({problem})"
            ) from None
        self.special_ids: Final = {
            text: token_id for token_id, text in added.items() if text and self.tokens.is_special_token(token_id)
        }
        texts = ((token_id, self.tokens.decode_bytes([token_id])) for token_id in range(size))
        self.broken_tokens: Final = {
            token_id: text
            for token_id, text in texts
            if not _is_utf8(text) and not self.tokens.is_special_token(token_id)
        }

    @classmethod
    def of_folder(cls, folder: str, size: int) -> Vocabulary:
        """The vocabulary of a model folder, whose model has `size` logits. Raises ModelUnsupported."""
        loaded = load_tokenizer(folder)
        return cls(loaded.tokenizer, size, loaded.eos_token_id)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
