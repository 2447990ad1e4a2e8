"""The benchmarks' command line. Unusable arguments give one line and exit status 2, and nothing is launched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.bench import __main__ as bench
from pipeline.bench import host


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The last line of what the command says before it ends with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        sys.exit(bench.main())
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("host", "--num-seqs", "a"), "--num-seqs: 'a' must be numbers, separated by commas"),
        (("host", "--step-ms", "1,"), "--step-ms"),
        (("host", "--seconds", "-1"), "--seconds: -1 must be a number above 0"),
        (("host", "--num-seqs", "0"), "scheduler.max_num_seqs (0)"),
        (("host", "--depth", "9"), "ring.depth (9)"),
        (("host", "--config", "none.toml"), "none.toml: cannot be read"),
        (
            ("host", "--timeline", "/dev/null/x"),
            "--timeline: the folder /dev/null/x cannot be created: Not a directory",
        ),
        (("throughput", "--config", "c.toml", "--timeline", "/dev/null/x"), "--timeline: the folder /dev/null/x"),
        (("throughput", "--config", "c.toml", "--depth", "1,,2"), "--depth: '1,,2' must be numbers"),
        (("throughput", "--config", "c.toml", "--rate", "inf"), "--rate: inf must be a number above 0"),
        (("throughput", "--config", "c.toml", "--rate", "nan"), "--rate: nan must be a number above 0"),
        (("throughput", "--config", "c.toml", "--seconds", "inf"), "--seconds: inf must be a number above 0"),
        (("idle", "--seconds", "0"), "--seconds: 0 must be a number above 0"),
        (("idle", "--config", "none.toml"), "none.toml: cannot be read"),
        (("overload", "--times", "0"), "--times: 0 must be a number above 0"),
        (("overload", "--seconds", "nan"), "--seconds: nan must be a number above 0"),
        (("overload", "--calm-seconds", "0"), "--calm-seconds: 0 must be a number above 0"),
        (("prefix", "--num-prefixes", "0"), "--num-prefixes (0)"),
        (("prefix", "--max-tokens", "0"), "max_tokens (0) must be"),
        (("restart", "--streams", "0"), "--streams (0) must be at least 1"),
        (("restart", "--timeout", "0"), "--timeout: 0 must be a number above 0"),
        (("scheduler", "--num-seqs", "1"), "--num-seqs (1) must be at least 2"),
        (("scheduler", "--num-seqs", ","), "--num-seqs: ',' must be numbers"),
    ],
)
def test_an_argument_that_cannot_work_is_named_in_one_line(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("an engine was launched")

    monkeypatch.setattr("pipeline.engine.harness.Pipeline.start", never)
    assert expected in refusal(capsys, monkeypatch, *arguments)


def test_a_folder_for_timelines_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "host", "--timeline", str(tmp_path / "a" / "b"), "--num-seqs", "1"])
    monkeypatch.setattr(host, "run", lambda arguments: None)
    bench.main()
    assert (tmp_path / "a" / "b").is_dir()
