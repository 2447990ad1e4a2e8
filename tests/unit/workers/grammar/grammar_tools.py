"""The tiny model's vocabulary, and walks through grammars token by token."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ipc.codec import decode as decode_message
from ipc.codec import encode as encode_message
from ipc.structured_outputs import StructuredOutputs
from workers.grammar.compiler import Compiler, Prototype
from workers.grammar.matchers import Matchers
from workers.grammar.vocabulary import Vocabulary

TINY: Final = Path(__file__).parents[4] / "configs" / "tiny-model"
VOCAB_SIZE: Final = 4096
END: Final = 1  # <|end|>
SYSTEM: Final = 2  # <|system|>, a special token that ends nothing


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary.of_folder(str(TINY), VOCAB_SIZE)


def compiled(spec: StructuredOutputs) -> Prototype:
    return _compiled(encode_message(spec))


@cache
def _compiled(spec: bytes) -> Prototype:
    return Compiler(vocabulary()).compile(decode_message(spec, StructuredOutputs))


def matchers_of(spec: StructuredOutputs, num_sequences: int = 1, end_ids: tuple[int, ...] = (END,)) -> Matchers:
    """Matchers with the keys 1, 2, ..."""
    matchers = Matchers(vocabulary())
    for key in range(1, num_sequences + 1):
        matchers.add(key, compiled(spec), end_ids)
    return matchers


def masks_of(matchers: Matchers, *keys: int) -> NDArray[np.int32]:
    """The masks of some keys, filled over garbage."""
    masks = np.full((len(keys), vocabulary().num_words), 0x5A5A5A5A, np.int32)
    matchers.fill(keys, masks)
    return masks


def allowed(matchers: Matchers, key: int = 1) -> NDArray[np.int64]:
    """The ids that a sequence may sample."""
    bits = np.unpackbits(masks_of(matchers, key)[0].view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def encode(text: str, spelled_out: bool = False) -> list[int]:
    """The ids of a text. Special tokens in it become their ids unless they are spelled out."""
    if spelled_out:
        pieces = re.split(r"(<|\||>)", text)  # no piece is a special token
        return [token_id for piece in pieces for token_id in encode(piece)]
    token_ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return token_ids


def follow(matchers: Matchers, text: str, key: int = 1, spelled_out: bool = False) -> bool:
    """Advance by the tokens of a text as long as each is allowed. Returns whether all were."""
    for token_id in encode(text, spelled_out):
        if token_id not in allowed(matchers, key):
            return False
        matchers.advance(key, token_id)
    return True


def accepts(spec: StructuredOutputs, text: str, spelled_out: bool = False) -> bool:
    """Whether a constraint allows a text, token by token, and the end after it."""
    matchers = matchers_of(spec)
    return follow(matchers, text, 1, spelled_out) and END in allowed(matchers)


def walk(spec: StructuredOutputs, seed: int, max_tokens: int = 60) -> tuple[str, bool]:
    """A random text that a constraint allows, and whether it has ended. Ends as soon as it may, but for one time in
    four; after half of the tokens it takes short tokens, most of which close something."""
    draw = random.Random(seed)
    matchers = matchers_of(spec)
    token_ids: list[int] = []
    while len(token_ids) < max_tokens:
        choices: Any = allowed(matchers)
        assert len(choices), f"{spec} allows nothing after {tokenizer().decode(token_ids)!r}: {matchers.problem(1)}"
        if END in choices and (len(choices) == 1 or draw.random() < 0.75):
            return _text(token_ids), True
        if len(token_ids) > max_tokens // 2:
            closing = [token_id for token_id in choices if token_id in _closing()]
            choices = closing or choices
        token_ids.append(int(draw.choice([each for each in choices if each != END])))
        matchers.advance(1, token_ids[-1])
        assert matchers.problem(1) == ""
    return _text(token_ids, "replace"), False


@cache
def _closing() -> frozenset[int]:
    ids = (tokenizer().token_to_id(text) for text in ('"', "}", "]", "}]", '"}', '"]', "0", "1", ">", ")"))
    return frozenset(each for each in ids if each is not None)


def _text(token_ids: list[int], errors: str = "strict") -> str:
    return vocabulary().tokens.decode_bytes(token_ids).decode(errors=errors)
