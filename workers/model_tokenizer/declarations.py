"""Compares the declarations in the files beside tokenizer.json with tokenizer.json itself.

Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json. Builds no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import AddedToken, Tokenizer

from ipc.errors import ModelUnsupported

# Classes that use tokenizer.json as it is. Any other class rebuilds the tokenizer with its own defaults.
_PLAIN_CLASSES: Final = ("PreTrainedTokenizer", "TokenizersBackend")
_BEHAVIOUR: Final = ("split_special_tokens", "add_prefix_space", "fix_mistral_regex")
_TOKEN_FIELDS: Final = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class Declarations(NamedTuple):
    """The declarations of one model folder about its tokenizer."""

    folder: Path
    class_name: str  # of the tokenizer; empty: the folder names none
    model_type: str
    behaviour: list[str]  # settings outside tokenizer.json that change how text is encoded
    named: dict[str, str]  # bos_token and the like
    extra: list[str]  # more special tokens
    added: dict[int, AddedToken]  # by the id that they should have
    are_older: bool  # the added tokens are those of added_tokens.json; tokenizer.json wins where it has the id

    @classmethod
    def read(cls, folder: Path) -> Declarations:
        """Raises ModelUnsupported for a file that cannot be read."""
        config = read_object(folder / "tokenizer_config.json")
        model = read_object(folder / "config.json")
        are_older = "added_tokens_decoder" not in config
        if are_older:  # else transformers does not look at this file
            config |= read_object(folder / "special_tokens_map.json")
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = _texts({name: value for name, value in config.items() if name.endswith("_token")})
        named |= _texts(config.get("model_specific_special_tokens"))
        if isinstance(more, dict):
            named |= _texts(more)
            more = []
        extra = list(_texts(more).values())
        try:
            if are_older:
                special = {*named.values(), *extra}
                added = {
                    int(token_id): AddedToken(text, normalized=text not in special, special=text in special)
                    for text, token_id in read_object(folder / "added_tokens.json").items()
                }
            else:
                added = {
                    int(token_id): AddedToken(**{key: token[key] for key in _TOKEN_FIELDS if key in token})
                    for token_id, token in config["added_tokens_decoder"].items()
                }
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelUnsupported(f"the added tokens in {folder} cannot be read: {error}") from None
        class_name = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
        behaviour = [key for key in _BEHAVIOUR if config.get(key)]
        return cls(
            folder=folder,
            class_name=str(class_name).removesuffix("Fast"),
            model_type=str(model.get("model_type") or ""),
            behaviour=behaviour,
            named=named,
            extra=extra,
            added=added,
            are_older=are_older,
        )

    def missing_in(self, tokenizer: Tokenizer) -> str | None:
        """A declaration that tokenizer.json alone does not fulfil, in words; None if it fulfils all of them."""
        if self.has_own_class(tokenizer):
            return f"its class is {self.class_name}" if self.class_name else f"the model type is {self.model_type}"
        if self.behaviour:
            return f"tokenizer_config.json sets {self.behaviour[0]}"
        known = tokenizer.get_added_tokens_decoder()
        special = {token.content for token in known.values() if token.special}
        for token_id, token in self.added.items():
            if token_id not in known or not (self.are_older or repr(known[token_id]) == repr(token)):
                return f"tokenizer.json does not hold {token.content!r} ({token_id}) as it is declared"
        for text in (*self.named.values(), *self.extra):
            if text not in special:
                return f"tokenizer.json does not hold {text!r} as a special token"
        return None

    def has_own_class(self, tokenizer: Tokenizer) -> bool:
        """Whether AutoTokenizer uses a special tokenizer class for this folder."""
        if self.class_name == "LlamaTokenizer" and is_byte_level(tokenizer):
            return False
        return self.class_name not in _PLAIN_CLASSES if self.class_name else bool(self.model_type)

    def moved_in(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Warnings about declared tokens that the tokenizer has under another id than the model learned."""
        for token_id, token in self.added.items():
            actual = tokenizer.token_to_id(token.content)
            if actual != token_id and token.content:
                has = "does not have it" if actual is None else f"has it as {actual}"
                yield (
                    f"{self.folder} declares the token {token.content!r} as {token_id}, and the tokenizer {has}: "
                    "the model may not understand it; add it to tokenizer.json"
                )

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise ModelUnsupported for a declared special token that the tokenizer splits."""
        if tokenizer.encode_special_tokens:  # declared, too: text never becomes a special token
            return
        special = [token.content for token in self.added.values() if token.special and token.content]
        for text in dict.fromkeys((*self.named.values(), *self.extra, *special)):
            token_ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(token_ids) != 1:
                raise ModelUnsupported(
                    f"the tokenizer in {self.folder} declares the special token {text!r} and makes {len(token_ids)} "
                    "tokens of it: make it one added token in tokenizer.json, with normalized false"
                )


def chain(part: Any) -> list[dict[str, Any]]:
    """The links of a tokenizer's normalizer, pre-tokenizer or decoder, as in tokenizer.json. None has no links."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    sequence = next((links for links in state.values() if isinstance(links, list)), None)
    return [state] if state["type"] != "Sequence" or sequence is None else sequence


def is_byte_level(tokenizer: Tokenizer) -> bool:
    return any(link["type"] == "ByteLevel" for link in chain(tokenizer.decoder))


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object, or nothing if there is no such file. Raises ModelUnsupported for a broken one."""
    if not file.is_file():
        return {}
    try:
        plain = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnsupported(f"{file} cannot be read: {error}") from None
    if not isinstance(plain, dict):
        raise ModelUnsupported(f"{file} must hold a JSON object")
    return plain


def _texts(values: Any) -> dict[Any, str]:
    """The tokens among the values of an object or a list: a text, or an object with a text."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}
