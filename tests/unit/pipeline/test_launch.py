"""What the launcher checks before it starts any process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipc.errors import ConfigError
from pipeline.engine.config import config_from_dict
from pipeline.engine.model_files import ServedModel
from pipeline.launch import _check_http


def test_parsers_are_checked_with_the_chat_template_that_replaces_the_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    template = tmp_path / "own.jinja"
    template.write_text("<|channel|>final<|message|>")  # the family "harmony" reads calls and reasoning together
    model = ServedModel(name="m", folder=str(tmp_path), vocab_size=8, eos_token_ids=[1], max_model_len=64)

    def check(**tokenizer: Any) -> None:
        http = {"reasoning_parser": "deepseek_r1"}
        config = config_from_dict({"model": {"path": str(tmp_path)}, "http": http, "tokenizer": tokenizer})
        assert config.http is not None
        _check_http(config, config.http, model)

    check()
    with pytest.raises(ConfigError, match="'harmony' reads calls and reasoning together"):
        check(chat_template=str(template))
    template.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"^tokenizer\.chat_template \(.*own\.jinja'\) cannot be read: "):
        check(chat_template=str(template))
