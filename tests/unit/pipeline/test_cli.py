"""The `ringfeed` program: its commands, their help, and what wrong use of them is told. No engine runs here."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import Client, EngineUnavailable, RequestFailed, SamplingParams, cli
from pipeline.chat import Conversation, _converse
from pipeline.environment.module_search import module_environment

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "tiny.toml"
TINY_MODEL = ROOT / "configs" / "tiny-model"


def status(*arguments: str) -> int:
    """The exit status of the program, which argparse ends by SystemExit."""
    with pytest.raises(SystemExit) as ended:
        sys.exit(cli.main(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_lists_every_command_and_loads_none_of_them() -> None:
    script = (
        "import sys\nfrom pipeline.cli import COMMANDS, main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert not {command.module for command in COMMANDS.values()} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=module_environment(), capture_output=True, text=True, timeout=60, check=True)
    assert all(f"\n    {name} " in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_has_examples_and_a_text_for_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"ringfeed {name}" in shown.partition("examples:\n")[2]
    parser = cli.Parser()
    cli._complete(parser, name)
    for action in parser._actions:
        assert action.help or action.metavar == "NAME", f"ringfeed {name}: no word about {action.option_strings}"


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("chat", "--help") == 0
    shown = capsys.readouterr().out
    assert "(default: 512)" in shown
    assert "(default: 0.0)" in shown
    assert "default: None" not in shown
    assert "default: False" not in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sevre"], "invalid choice: 'sevre' (choose from"),
        (["sevre"], "did you mean serve?"),
        (["serve"], "give a configuration, --config FILE, or a model, --model PATH_OR_HUB_ID"),
        (["serve", "--config", "a.toml", "--model", "b"], "--config a.toml and --model b are both given: give one;"),
        (["serve", "--modle=x"], "unrecognized arguments: --modle=x"),
        (["serve", "--model", "a", "--record-limit", "0"], "'0' must be a number of gigabytes above 0"),
        (["serve", "--config", "/nowhere.toml"], "/nowhere.toml: cannot be read: No such file or directory"),
        (["serve", "--model", "/nowhere"], "--model /nowhere: model.path ('/nowhere'): there is no such folder"),
        (["serve", "--model", "a", "--set", "ring.depht=1"], "there is no key ring.depht: did you mean depth?"),
        (["demo", "--num-requests", "0"], "--num-requests (0) must be at least 1"),
        (["demo", "--config", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["chat", "hi", "--max-tokens", "0"], "max_tokens (0) must be"),
        (["chat", " "], "PROMPT is empty"),
        (["chat", "hi", "--set", "ring.depth=1"], "give --config or --model too"),
        (["chat", "hi", "--raw", "--system", "x"], "--system and --raw are both given"),
        (["chat", "hi", "--model", "m", "--endpoint", "tcp://h:1"], "give one of them"),
        (["bench", "hots"], "did you mean host?"),
        (["replay", "/nowhere"], "/nowhere: cannot be read"),
        (["timeline", "/nowhere", "-o", "/tmp/x.svg"], "/nowhere: cannot be read"),
    ],
)
def test_wrong_use_is_one_line_that_names_it_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    told = capsys.readouterr()
    assert expected in told.err
    assert (told.err.count("\n"), told.out) == (1, "")


def test_no_arguments_show_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert status() == 2
    assert "ringfeed COMMAND --help" in capsys.readouterr().err


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version") == 0
    assert capsys.readouterr().out == f"ringfeed {importlib.metadata.version('ringfeed')}\n"


def test_options_without_a_command_are_those_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--config", str(TINY), "--check") == 0
    without = capsys.readouterr().out
    assert status("serve", "--config", str(TINY), "--check") == 0
    assert capsys.readouterr().out == without


def test_a_model_alone_is_served_with_the_default_of_every_other_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert status("serve", "--model", "configs/tiny-model", "--set", "ring.depth=1", "--check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {f'path = "{TINY_MODEL}"', 'device = "auto"', 'dtype = "auto"', "depth = 1"} <= set(lines)
    assert "# num_threads is not set" in lines


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (EngineUnavailable("gone"), 1)])
def test_ctrl_c_and_errors_end_any_command_without_a_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.engine.harness.Pipeline.start", fail)
    assert status("demo") == code
    assert capsys.readouterr().err == ("error: gone\n" if code == 1 else "")


class FakeClient:
    """Answers each request with the next of `answers`: pieces of text, or an error to raise."""

    def __init__(self, *answers: list[Any]) -> None:
        self._answers = iter(answers)
        self.prompts: list[Any] = []

    @contextmanager
    def generate(self, prompt: Any, params: SamplingParams, *, stream: bool) -> Iterator[Iterator[SimpleNamespace]]:
        self.prompts.append(prompt)

        def pieces() -> Iterator[SimpleNamespace]:
            for piece in next(self._answers):
                if isinstance(piece, BaseException):
                    raise piece
                yield SimpleNamespace(text=piece)

        yield pieces()


def converse(client: FakeClient, *lines: str, monkeypatch: pytest.MonkeyPatch) -> Conversation:
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None  # Ctrl-D

    monkeypatch.setattr("builtins.input", read)
    chat = Conversation(client, SamplingParams(), None, is_raw=False)  # type: ignore[arg-type]
    _converse(chat)
    return chat


def test_a_conversation_sends_all_its_turns_and_ends_with_ctrl_d(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(["He", "llo"], ["Bye"])
    converse(client, "a", "  ", "b", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == "Hello\nBye\n"
    turns = [("user", "a"), ("assistant", "Hello"), ("user", "b")]
    assert client.prompts == [[dict(zip(("role", "content"), turn, strict=True)) for turn in turns[:n]] for n in (1, 3)]


def test_ctrl_c_stops_an_answer_and_a_refused_turn_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(["part", KeyboardInterrupt()], [RequestFailed("broken")], ["ok"])
    chat = converse(client, "a", "b", "c", monkeypatch=monkeypatch)
    told = capsys.readouterr()
    assert told.out == "part\nok\n"
    assert told.err.splitlines()[:2] == ["(stopped)", "error: broken"]
    assert [message["content"] for message in chat.messages] == ["a", "part", "c", "ok"]


def test_a_chat_without_an_engine_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(self: Client) -> None:
        raise EngineUnavailable(f"no engine answers at {self.endpoint}.")

    monkeypatch.setattr(Client, "health", gone)
    assert status("chat", "hi") == 1
    assert "To start one here, give --model PATH_OR_HUB_ID." in capsys.readouterr().err
