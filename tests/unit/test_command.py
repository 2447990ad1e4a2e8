"""Commands whose output cannot be written: no traceback, and an exit status that is not 0."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.python_module import module_environment

PRINTS = "from pipeline.command import run_command; run_command(lambda: print('x' * 100_000))"


@pytest.mark.parametrize(
    "arguments",
    [("-c", PRINTS), *(("-m", f"pipeline.{name}", "--help") for name in ("bench", "demo", "metrics", "timeline"))],
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
