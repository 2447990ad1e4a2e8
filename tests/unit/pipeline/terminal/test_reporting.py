"""Commands whose output cannot be written: no traceback, and an exit status that is not 0."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.environment.module_search import module_environment

PRINTS = "from pipeline.terminal.reporting import status_of; raise SystemExit(status_of(lambda: print('x' * 100_000)))"
COMMANDS = ("bench", "chat", "demo", "metrics", "timeline")


@pytest.mark.parametrize(
    "arguments",
    [("-c", PRINTS), *(("-m", f"pipeline.{name}", "--help") for name in COMMANDS)],
    ids=lambda arguments: arguments[1].partition(";")[0],
)
def test_output_that_cannot_be_written_ends_a_command_without_a_traceback(arguments: tuple[str, ...]) -> None:
    environment = module_environment() | {"PYTHONUNBUFFERED": ""}  # unbuffered, argparse itself drops what fails
    reader, nobody_reads = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full, open(nobody_reads, "wb") as left:
        for output, said in ((full, "error: the output cannot be written: No space left on device\n"), (left, "")):
            done = subprocess.run(
                [sys.executable, *arguments], env=environment, stdout=output, stderr=subprocess.PIPE, text=True
            )
            assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize(
    "arguments", [("pipeline.launch", "--config", "/nowhere"), ("pipeline.timeline", "/nowhere", "-o", "/nowhere.svg")]
)
def test_an_error_that_cannot_be_written_leaves_the_exit_status_as_it_is(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", *arguments]
    said = subprocess.run(command, env=module_environment(), stderr=subprocess.PIPE)
    assert said.stderr.startswith(b"error: ")
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, env=module_environment(), stderr=full).returncode == said.returncode


SHOWS = """
import sys
from rich.console import Console
from rich.live import Live
from pipeline.terminal.reporting import status_of
from pipeline.metrics.figures import DeviceTime, Figures
from pipeline.metrics.watch import view
from pipeline.terminal.progress_bar import progress_bar
counters = {"num_running": 1.0, "num_waiting": 0.0, "cpu_ns": 1e9}
class Counters(dict):
    __missing__ = lambda self, name: 0.0
roles = {"gateway": Counters(counters), "scheduler": Counters(counters), "gpu": Counters(counters)}
figures = Figures(1.0, 9, 1, 9, {}, 1.0, 1.0, DeviceTime(5e8, 1e8, 1e8, 1e8))
def show():
    Console().print("a text of a model: \\u00e9 \\U0001f600", markup=False)
    with Live(auto_refresh=False) as live:
        live.update(view(roles, roles, figures), refresh=True)
sys.exit(status_of(show))
"""
BAR = """
from pipeline.terminal.progress_bar import progress_bar
with progress_bar("generating", 3, shown=True) as advance:
    for _ in range(3):
        advance()
"""


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(("code", "columns", "expected"), [(SHOWS, 40, "busy 62.50%"), (BAR, 24, "gener")])
def test_what_is_shown_can_be_shown_in_any_encoding(
    code: str, columns: int, expected: str, encoding: str, is_terminal: bool
) -> None:
    environment = module_environment() | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding,
        "COLUMNS": str(columns),
    }  # fmt: skip
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    environment |= {"FORCE_COLOR": "1", "TERM": "xterm"} if is_terminal else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert expected in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", done.stdout.decode(encoding)).replace("\n", " ")


def test_a_configuration_is_printed_as_toml_whatever_the_encoding(tmp_path: Path) -> None:
    model = tmp_path / "mod\N{LATIN SMALL LETTER E WITH GRAVE}le"
    config = tmp_path / "c.toml"
    config.write_text(f'[model]\npath = "{model}"\nload_format = "null"\n', encoding="utf-8")
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 32, "max_position_embeddings": 64, "eos_token_id": 1}')
    (model / "tokenizer.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.launch", "--config", str(config), "--check"],
        env=module_environment() | {"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout.decode())["model"]["path"] == str(model)
