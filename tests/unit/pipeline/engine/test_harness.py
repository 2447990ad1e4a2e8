"""What a Pipeline may be made from. Engines that really start are in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import Config, ConfigError, Pipeline
from pipeline.http.config import HttpConfig
from workers.gpu.config import ModelConfig

ROOT = Path(__file__).parents[4]
TINY = ROOT / "configs" / "tiny.toml"


def test_a_model_alone_has_the_default_of_every_other_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Pipeline(model="m").config == Config(model=ModelConfig(path=str(tmp_path / "m")), http=HttpConfig())
    assert Pipeline(model=tmp_path / "m").config == Pipeline(model="m").config
    assert Pipeline(model="organization/name").config.model.path == "organization/name"
    changed = Pipeline(model="m", overrides={"ring.depth": 3, "model.device": "cpu"}).config
    assert (changed.ring.depth, changed.model.device) == (3, "cpu")


def test_a_file_a_dict_and_a_config_give_the_same_engine() -> None:
    config = Config.load(TINY)
    assert Pipeline(TINY).config == Pipeline(str(TINY)).config == Pipeline(config).config == config
    nested = {"model": {"path": "organization/name"}, "ring": {"depth": 1}}
    assert Pipeline(nested).config == Config.from_dict(nested)
    assert Config.load(TINY, {"ring.depth": 4}) == Pipeline(TINY, "ring.depth=4").config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, r'config \(None\) and model \(None\) are both missing: give .*Pipeline\(model="FOLDER_OR_HUB_ID"\)'),
        (
            {"config": "a.toml", "model": "b"},
            r"config \('a.toml'\) and model \('b'\) are both given: give one;",
        ),
        ({"model": 5}, r"model \(5\) must be a folder or a hub id"),
        ({"model": ""}, r"model='': model.path \(''\) must be a folder or a hub id"),
        ({"model": "m", "record": 5}, r"record \(5\) must be the path of a file"),
        ({"model": "m", "timeline": 5}, r"timeline \(5\) must be the path of a file"),
        ({"model": "a", "overrides": {"ring.depth": 9}}, r"--set ring.depth=9: ring.depth \(9\) must lie in \[1, 8\]"),
    ],
)
def test_a_pipeline_of_neither_or_both_or_of_something_else_is_told_what_to_give(
    arguments: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as raised:
        Pipeline(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_model_that_is_not_there_is_named_as_it_was_given(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=f"^model='{missing}': model.path .* there is no such folder"):
        Pipeline(model=missing).start()
