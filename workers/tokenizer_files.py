"""Loads a model folder's tokenizer for the processes that encode or decode text, without torch where possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ipc.errors import ModelUnsupported


def load_tokenizer(folder: str) -> Tokenizer:
    """The folder's tokenizer, with neither truncation nor padding.

    tokenizer.json alone says which special tokens a prompt gets: as in AutoTokenizer, it outranks `add_bos_token`.
    A folder without tokenizer.json is left to AutoTokenizer, which can convert older formats but takes seconds and
    needs torch. Raises ModelUnsupported if no tokenizer can be loaded.
    """
    file = Path(folder) / "tokenizer.json"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = _convert_with_transformers(folder)
    except Exception as error:  # `tokenizers` raises bare Exceptions, and a converter may raise anything
        raise ModelUnsupported(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer_config(folder: str) -> dict[str, Any]:
    """tokenizer_config.json, or nothing if there is none. Raises ModelUnsupported for a broken one."""
    file = Path(folder) / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        plain = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnsupported(f"{file} cannot be read: {error}") from None
    if not isinstance(plain, dict):
        raise ModelUnsupported(f"{file} must hold a JSON object")
    return plain


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens (`bos_token`, ...) of a tokenizer_config.json, as text."""
    named: dict[str, str] = {}
    for name, value in config.items():
        if name.endswith("_token") and not name.startswith("add_"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[name] = text
    return named


def _convert_with_transformers(folder: str) -> Tokenizer:
    from transformers import AutoTokenizer

    backend: Tokenizer | None = getattr(AutoTokenizer.from_pretrained(folder), "backend_tokenizer", None)
    if backend is None:
        raise ModelUnsupported("it has no fast form; save it as tokenizer.json")
    return backend


def is_foreign_failure(error: BaseException) -> bool:
    """Whether a call into `tokenizers` failed, which concerns the text at hand alone. Its panics are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
