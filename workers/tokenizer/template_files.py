"""Reads chat templates from the files of a model's folder, as AutoTokenizer does."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from ipc.errors import InvalidRequest
from workers.model_tokenizer.declarations import read_object


def read_templates(folder: Path) -> dict[str, str]:
    """The folder's templates by name; empty if it has none. The main one is named "default".

    Files (chat_template.jinja, additional_chat_templates/*.jinja) outrank tokenizer_config.json. Raises InvalidRequest
    for templates that cannot be read.
    """
    config = folder / "tokenizer_config.json"
    return _of_files(folder) or _of_config(config, read_object(config).get("chat_template"))


def _of_files(folder: Path) -> dict[str, str]:
    """Templates that are separate files, by name."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    templates = {}
    for name, file in files.items():
        try:
            if file.is_file():
                templates[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the model's chat template ({file}) cannot be read: {error}") from None
    return templates


def _of_config(file: Path, value: Any) -> dict[str, str]:
    """Templates of tokenizer_config.json, by name: one text, texts by name, or a list of {name, template}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise InvalidRequest(
            f"the model's chat_template ({reprlib.repr(value)}) in {file} must be a text, or texts by "
            "name: send a prompt"
        )
    return value
