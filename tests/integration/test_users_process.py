"""A Pipeline in a process that forks, drops it, exits, or has closed standard streams or many open descriptors."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ipc.errors import ConfigError
from pipeline import Client, Pipeline, SamplingParams
from pipeline.engine import launcher_process as engine_process
from pipeline.environment.module_search import module_environment
from tests.integration.conftest import TINY_CONFIG
from tests.unit.pipeline.client.client_scripts import in_child, wait_until

NULL = {"model.load_format": "null", "model.null_step_ms": 1.0}
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def wait_until_gone(pids: dict[str, int]) -> None:
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids.values()), "the end of the engine")


def check_that_children_leave_it_alone(pipeline: Pipeline) -> None:
    def leave() -> object:
        with pipeline:
            reason = pipeline.client.generate("A module is", SHORT).finish_reason
        engine_process._end_all()  # as at the exit of the interpreter
        return reason

    assert in_child(leave) == "length"
    for end in (pipeline.stop, pipeline.kill, lambda: pipeline.wait(1)):
        assert f"InvalidRequest: this Pipeline was started by process {os.getpid()}" in in_child(end)
    assert pipeline.client.generate("A module is", SHORT).finish_reason == "length"
    with Client(pipeline.endpoint) as client:
        assert client.generate("A module is", SHORT).finish_reason == "length", "its socket is there"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads, from Python 3.12 on
def test_an_engine_outlives_forked_children_and_ends_with_the_last_reference() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    pipeline = Pipeline(TINY_CONFIG, NULL).start()
    pids, folder = dict(pipeline.pids), Path(pipeline.endpoint.removeprefix("ipc://")).parent
    pipeline.client.generate("A module is", SHORT)
    check_that_children_leave_it_alone(pipeline)

    client = pipeline.client
    del pipeline
    gc.collect()
    assert client.generate("A module is", SHORT).finish_reason == "length", "its client keeps it"
    del client
    wait_until_gone(pids)
    wait_until(lambda: not folder.exists(), "the end of its folder")
    gc.collect()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the end of its descriptors")


HARD = """
import json, os, resource, signal, sys
from pipeline import Pipeline, SamplingParams
out = os.fdopen(int(sys.argv[2]), "w")
for fd in (0, 1, 2):
    os.close(fd)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
many = [os.dup(out.fileno()) for _ in range(1_100)]
with Pipeline(sys.argv[1], {"model.load_format": "null", "model.null_step_ms": 1.0}) as pipeline:
    assert many[-1] > 1_024
    reason = pipeline.client.generate("A module is", SamplingParams(max_tokens=3, ignore_eos=True)).finish_reason
    child = os.fork()
    if child == 0:
        os.closerange(out.fileno(), many[-1] + 1)
        signal.pause()
    print(json.dumps([reason, child, pipeline.pids]), file=out, flush=True)
    signal.pause()
"""


def test_an_engine_starts_without_standard_streams_beside_many_descriptors_and_ends_with_its_owner_not_its_child() -> (
    None
):
    reader, writer = os.pipe()
    command = [sys.executable, "-W", "ignore", "-c", HARD, str(TINY_CONFIG), str(writer)]
    with subprocess.Popen(command, pass_fds=[writer], env=module_environment()) as owner:
        os.close(writer)
        with os.fdopen(reader) as out:
            line = out.readline()
        owner.kill()
    reason, child, pids = json.loads(line)
    try:
        assert reason == "length"
        wait_until_gone(pids)
        assert psutil.pid_exists(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_engine_that_nobody_ended_is_gone_when_the_interpreter_has_exited() -> None:
    script = (
        "import json, sys; from pipeline import Pipeline\n"
        f"pipeline = Pipeline({str(TINY_CONFIG)!r}, {NULL!r}).start()\n"
        "print(json.dumps(pipeline.pids))\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=module_environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(psutil.pid_exists(pid) for pid in json.loads(done.stdout).values())


def test_a_pipeline_is_started_once() -> None:
    pipeline = Pipeline({"model": {"path": "/nowhere"}})
    with pytest.raises(ConfigError, match="nowhere"):
        pipeline.start()
    with pytest.raises(ValueError, match="was started already"):
        pipeline.start()
