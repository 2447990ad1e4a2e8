"""docs/configuration.md, and the declarations that it is made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.engine.config import SECTIONS, config_from_toml
from pipeline.engine.config_fields import fields_of
from pipeline.engine.config_page import page

PAGE = Path(__file__).parents[4] / "docs" / "configuration.md"


def test_the_committed_page_is_what_the_structs_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make configuration` and commit docs/configuration.md"


def test_every_key_has_a_description_and_every_number_a_range_that_holds_its_default() -> None:
    for section, struct in SECTIONS.items():
        for field in fields_of(struct).values():
            name = f"{section}.{field.key}"
            assert field.description.endswith("."), name
            is_number = field.kind in (int, float, int | None, float | None)
            assert (field.number is not None) == is_number, f"{name} needs both bounds in its Meta"
            if is_number:
                assert field.check(field.default) == field.default, name


def test_the_example_with_all_keys_reads_back_as_the_defaults() -> None:
    text = PAGE.read_text(encoding="utf-8").rsplit("```toml\n")[-1].removesuffix("```\n")
    bare = config_from_toml('[model]\npath = "PATH"\n[http]\n', "text", Path("/"))
    assert config_from_toml(text, "text", Path("/")) == bare
    for section, struct in SECTIONS.items():
        part = text.split(f"[{section}]\n")[1].split("\n[")[0]
        for key in fields_of(struct):
            assert f"{key} = " in part or f"# {key} is not set" in part, f"{section}.{key}"


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("scheduler.max_num_seqs", (1, 65_536), (0, 65_537, 2**70)),
        ("cache.memory_share", (1e-9, 1), (0, 1.1, float("nan"))),
        ("scheduler.queue_timeout_s", (1e-9, 1e6), (0, -1, 1e6 + 1, float("nan"))),
        ("scheduler.priority_aging_s", (0.001, 86_400), (0, 86_401)),
        ("frontend.max_queued_bytes", (16 << 20, 1 << 40), ((16 << 20) - 1,)),
        ("model.null_step_ms", (0, 60_000), (-1, 60_001)),
    ],
)
def test_a_range_includes_its_ends_as_its_brackets_say(
    key: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    section, _, name = key.partition(".")
    field = fields_of(SECTIONS[section])[name]
    for value in inside:
        assert field.check(value) == value
    for value in outside:
        with pytest.raises(ValueError, match=r" in [\[(].*\]$"):
            field.check(value)
