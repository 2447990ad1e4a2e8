"""Loads a model folder's tokenizer for the processes that encode or decode text, without torch.

The result must behave as transformers' AutoTokenizer does for the folder. In most folders tokenizer.json says
everything, and `tokenizers` alone reads it in a tenth of the time. transformers builds the tokenizer of the other
folders (`declarations.py` tells them apart).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer, pre_tokenizers

from ipc.errors import ModelUnsupported
from workers.model_tokenizer.declarations import Declarations, chain, is_byte_level

_MAX_PROBLEM_CHARS: Final = 300
_LOCALLY: Final = {"local_files_only": True, "chat_template": None}  # chat_template.py reads the templates
# Settings of ByteLevel that do not decide where text is split. The class sets the first; the second is for offsets.
_NO_SPLITTING: Final = ("add_prefix_space", "trim_offsets")


class ModelTokenizer(NamedTuple):
    """A folder's tokenizer, with neither truncation nor padding, and what is declared beside it."""

    tokenizer: Tokenizer
    special_tokens: dict[str, str]  # named ones (`bos_token`, ...), as a chat template sees them
    eos_token_id: int | None
    notes: list[str]  # how it was loaded, for the log; empty: tokenizer.json says everything
    warnings: list[str]  # for the log


def load_tokenizer(folder: str) -> ModelTokenizer:
    """The folder's tokenizer as AutoTokenizer has it.

    A model class that would read a byte-level tokenizer.json as pieces (LlamaTokenizer does so), or the reverse, is
    ignored. A class that would split the text of a byte-level tokenizer.json in its own way (GPT2Tokenizer does so) is
    used for everything else. Raises ModelUnsupported if no tokenizer can be loaded, or for a declared special token
    that is not one id.
    """
    declarations = Declarations.read(Path(folder))
    try:
        loaded = _load(folder, declarations)
    except Exception as error:  # `tokenizers` raises bare Exceptions, and a converter may raise anything
        problem = " ".join(str(error).split())[:_MAX_PROBLEM_CHARS]
        raise ModelUnsupported(f"the tokenizer in {folder} cannot be loaded: {problem}") from error
    loaded.tokenizer.no_truncation()
    loaded.tokenizer.no_padding()
    declarations.check(loaded.tokenizer)
    loaded.warnings.extend(declarations.moved_in(loaded.tokenizer))
    return loaded


def hide_torch() -> None:
    """Keep transformers from importing torch, which takes seconds and which no tokenizer needs.

    Call this in a process that needs no torch, before anything imports transformers.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def is_foreign_failure(error: BaseException) -> bool:
    """Whether an error comes from `tokenizers` and concerns only the current text. Its panics are not Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _load(folder: str, declarations: Declarations) -> ModelTokenizer:
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return _of_transformers(_auto_tokenizer(folder), "there is no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    missing = declarations.missing_in(tokenizer)
    if missing is None:
        eos = declarations.named.get("eos_token")
        eos_token_id = None if eos is None else tokenizer.token_to_id(eos)
        return ModelTokenizer(tokenizer, declarations.named, eos_token_id, [], [])
    from transformers import PreTrainedTokenizerFast

    if declarations.has_own_class(tokenizer):
        try:
            built = _auto_tokenizer(folder)
            loaded = _of_transformers(built, missing)
        except Exception as error:  # a class of the folder's own code, or one that needs a package
            missing = f"{missing}, which cannot be used ({type(error).__name__})"
        else:
            if is_byte_level(loaded.tokenizer) == is_byte_level(tokenizer):
                is_rebuilt = type(built) is not PreTrainedTokenizerFast
                if is_rebuilt and is_byte_level(tokenizer) and _split_as_file(loaded.tokenizer, tokenizer):
                    loaded.notes[0] += "; it splits text as tokenizer.json says, not as that class does"
                return loaded
            missing = f"{missing}, which does not fit the kind of tokenizer in tokenizer.json"
    return _of_transformers(PreTrainedTokenizerFast.from_pretrained(folder, **_LOCALLY), missing)


def _auto_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **_LOCALLY, trust_remote_code=False)


def _of_transformers(built: Any, why: str) -> ModelTokenizer:
    backend: Tokenizer | None = getattr(built, "backend_tokenizer", None)
    if backend is None:
        raise ModelUnsupported("transformers has no fast version of it: save it as tokenizer.json")
    named = {name: str(text) for name, text in built.special_tokens_map.items() if not isinstance(text, list)}
    note = f"transformers builds the tokenizer ({type(built).__name__}): {why}"
    return ModelTokenizer(backend, named, built.eos_token_id, [note], [])


def _split_as_file(built: Tokenizer, file: Tokenizer) -> bool:
    """Give `built` the normalizer and the pre-tokenizer of tokenizer.json, with which the model was trained.

    Byte-level classes of transformers replace them with their own, which split numbers and lines differently. The class
    still decides whether text begins with a space. Returns whether anything has changed.
    """
    if file.pre_tokenizer is None or _splitting(built) == _splitting(file):
        return False
    adds_space = any(link.get("add_prefix_space") for link in chain(built.pre_tokenizer))
    links = [
        {**link, "add_prefix_space": adds_space} if link["type"] == "ByteLevel" else link
        for link in chain(file.pre_tokenizer)
    ]
    pre_tokenizer = pre_tokenizers.Sequence([])
    pre_tokenizer.__setstate__(json.dumps({"type": "Sequence", "pretokenizers": links}).encode())
    built.normalizer, built.pre_tokenizer = file.normalizer, pre_tokenizer
    return True


def _splitting(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The settings that decide where a text is split."""
    links = [*chain(tokenizer.normalizer), *chain(tokenizer.pre_tokenizer)]
    return [{key: value for key, value in link.items() if key not in _NO_SPLITTING} for link in links]
