"""Loads a model folder's tokenizer for the processes that encode or decode text, without torch.

What transformers' AutoTokenizer makes of the folder is right. Most folders say everything in tokenizer.json, and
`tokenizers` alone reads that in a tenth of the time; transformers builds the others (`tokenizer_declarations.py` tells
them apart).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

from ipc.errors import ModelUnsupported
from workers.tokenizer_declarations import Declarations, chain_kinds

_MAX_PROBLEM_CHARS: Final = 300
_LOCALLY: Final = {"local_files_only": True, "chat_template": None}  # templates are read elsewhere


class ModelTokenizer(NamedTuple):
    """A folder's tokenizer, with neither truncation nor padding, and what is declared beside it."""

    tokenizer: Tokenizer
    special_tokens: dict[str, str]  # named ones (`bos_token`, ...), as a chat template sees them
    eos_token_id: int | None
    notes: list[str]  # how it was loaded, for the log; empty: tokenizer.json says everything


def load_tokenizer(folder: str) -> ModelTokenizer:
    """The folder's tokenizer as AutoTokenizer has it.

    A model class that would read a byte-level tokenizer.json as pieces, or the reverse (LlamaTokenizer does so), is not
    followed. Raises ModelUnsupported if no tokenizer can be loaded, or for a declared special token that is not one id.
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
    return loaded


def hide_torch() -> None:
    """Keep transformers from importing torch, which takes seconds and serves no tokenizer.

    For a process that needs no torch, before anything imports transformers.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def is_foreign_failure(error: BaseException) -> bool:
    """Whether a call into `tokenizers` failed, which concerns the text at hand alone. Its panics are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _load(folder: str, declarations: Declarations) -> ModelTokenizer:
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return _of_transformers(_auto_tokenizer(folder), "there is no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    missing = declarations.missing_in(tokenizer)
    if missing is None:
        eos = declarations.named.get("eos_token")
        return ModelTokenizer(tokenizer, declarations.named, None if eos is None else tokenizer.token_to_id(eos), [])
    if declarations.has_own_class(tokenizer):
        try:
            loaded = _of_transformers(_auto_tokenizer(folder), missing)
        except Exception as error:  # a class of the folder's own code, or one that needs a package
            missing = f"{missing}, which cannot be used ({type(error).__name__})"
        else:
            if _is_byte_level(loaded.tokenizer) == _is_byte_level(tokenizer):
                return loaded
            missing = f"{missing}, which is not for the kind of tokenizer that tokenizer.json holds"
    from transformers import PreTrainedTokenizerFast

    return _of_transformers(PreTrainedTokenizerFast.from_pretrained(folder, **_LOCALLY), missing)


def _auto_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **_LOCALLY, trust_remote_code=False)


def _of_transformers(built: Any, why: str) -> ModelTokenizer:
    backend: Tokenizer | None = getattr(built, "backend_tokenizer", None)
    if backend is None:
        raise ModelUnsupported("it has no fast form; save it as tokenizer.json")
    named = {name: str(text) for name, text in built.special_tokens_map.items() if not isinstance(text, list)}
    note = f"transformers builds the tokenizer ({type(built).__name__}): {why}"
    return ModelTokenizer(backend, named, built.eos_token_id, [note])


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return "ByteLevel" in chain_kinds(tokenizer.decoder)
