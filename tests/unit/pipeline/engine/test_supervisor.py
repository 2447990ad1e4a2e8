"""The life of an engine of fake workers: up, serving, down, and what is left of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from ipc.errors import ConfigError
from ipc.messages import EOS_TOKEN_ID
from pipeline.client.endpoint import EndpointClaim
from pipeline.environment.module_search import module_environment

ROLES = ["gateway", "gpu", "scheduler", "detokenizer", "tokenizer.0", "tokenizer.1"]
RUN = """
import dataclasses, logging, sys
from pipeline.engine.config import config_from_dict
from pipeline.engine.topology import ENGINE, Role
from pipeline.launch import launch
from workers.process import LOG_FORMAT
import json, os
from tests.unit.pipeline.engine.fake_workers.http import HttpBootstrap
logging.basicConfig(level="DEBUG", format=LOG_FORMAT.format(role="launcher"))
plain = json.loads(sys.argv[1])
fakes = "tests.unit.pipeline.engine.fake_workers."
roles = tuple(dataclasses.replace(role, module=fakes + role.name) for role in ENGINE.roles)
if "WITH_HTTP" in os.environ:
    roles += (Role(name="http", module=fakes + "http", bootstrap=lambda _, worker: HttpBootstrap(worker), counters=(),
                   start_order=9, is_front=True),)
sys.exit(launch(config_from_dict(plain), status_fd=int(sys.argv[2]), lifeline_fd=int(sys.argv[3]),
                table=dataclasses.replace(ENGINE, roles=roles)))
"""


def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.01)
    return result


class Engine:
    """A launcher of fake workers as a subprocess."""

    def __init__(
        self,
        folder: Path,
        faults: dict[str, str],
        popen: dict[str, Any] | None = None,
        num_grammar_workers: int = 0,
        supervisor: dict[str, Any] | None = None,
        **frontend: Any,
    ) -> None:
        self.folder = folder
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"vocab_size": 32, "max_position_embeddings": 64, "eos_token_id": 1}')
        (model / "tokenizer.json").write_text("{}")
        self.endpoint_folder = folder / "e"
        plain = {
            "model": {"path": str(model), "load_format": "dummy"},
            "tokenizer": {"num_workers": 2},
            "grammar": {"num_workers": num_grammar_workers},
            "supervisor": supervisor or {},
            "frontend": {"endpoint": f"ipc://{self.endpoint_folder}/client.sock", **frontend},
        }
        status_reader, status_writer = os.pipe()
        lifeline_reader, self.lifeline = os.pipe()
        self.stderr = (folder / f"stderr-{id(self)}").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, json.dumps(plain), str(status_writer), str(lifeline_reader)],
            env={**module_environment(), **faults, "XDG_RUNTIME_DIR": str(folder)},
            pass_fds=(status_writer, lifeline_reader),
            **{"stderr": self.stderr, **(popen or {})},
        )
        os.close(status_writer)
        os.close(lifeline_reader)
        self.status = os.fdopen(status_reader, "rb")
        self.pids: dict[str, int] = {}

    def event(self) -> dict[str, Any] | None:
        """The next life event; None when there will be none."""
        line = self.status.readline()
        event = json.loads(line) if line else None
        self.pids |= (event or {}).get("pids", {})
        return event

    def until_ready(self) -> Engine:
        assert [self.event()["event"], self.event()["event"]] == ["spawned", "ready"], self.log()
        assert [name for name in self.pids if not name.startswith("grammar")] == ROLES
        return self

    def log(self) -> str:
        return Path(self.stderr.name).read_text()

    def assert_nothing_left(self) -> None:
        eventually(lambda: not any(psutil.pid_exists(pid) and is_running(pid) for pid in self.pids.values()))
        assert not list(self.folder.glob("ringfeed-*"))

    def close(self) -> None:
        for pid in (self.process.pid, *self.pids.values()):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.lifeline)
        self.status.close()
        self.stderr.close()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []
    folder = tmp_path_factory.mktemp("f")

    def start(faults: dict[str, str] | None = None, popen: dict[str, Any] | None = None, **options: Any) -> Engine:
        engines.append(Engine(folder, faults or {}, popen, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def test_sigterm_drains_and_exits_0(launch: Callable[..., Engine]) -> None:
    engine = launch().until_ready()
    assert not list(engine.folder.glob("ringfeed-*")), "internal sockets have no names"
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0
    assert "gateway: heard Drain" in engine.log()
    assert "Abort" not in engine.log()
    assert not engine.endpoint_folder.exists()
    engine.assert_nothing_left()


def test_workers_start_in_order_and_the_gateway_last(launch: Callable[..., Engine]) -> None:
    engine = launch().until_ready()
    engine.process.send_signal(signal.SIGINT)
    assert engine.process.wait(20) == 0
    heard = [line.split(" INFO ")[1] for line in engine.log().splitlines() if "heard Start" in line]
    assert heard[0].startswith("scheduler:")
    assert "'num_blocks': 100" in heard[0]
    assert f"'{EOS_TOKEN_ID}': 7" in heard[0]
    assert len(heard) == len(ROLES)
    assert engine.log().index("ready: ipc://") > engine.log().index("scheduler: heard Start")


GROUPS = {
    "gateway": [*ROLES[:1], *ROLES[2:]],
    "scheduler": ROLES[2:],
    "detokenizer": ROLES[2:],
    "gpu": ["gpu"],
    "tokenizer.0": ["tokenizer.0"],
    "tokenizer.1": ["tokenizer.1"],
}
REWIRED = {
    "gateway": {"gpu"},
    "scheduler": {"gpu", "gateway"},
    "detokenizer": {"gpu", "gateway"},
    "gpu": {"scheduler", "tokenizer.0", "tokenizer.1"},
    "tokenizer.0": {"gpu", "gateway", "scheduler"},
    "tokenizer.1": {"gpu", "gateway", "scheduler"},
}


def mostly_slow(*fast: str, of: Sequence[str] = ROLES) -> list[Any]:
    """Roles as parameters of a test. It takes seconds with each: the fast suite has room for a few."""
    return [role if role in fast else pytest.param(role, marks=pytest.mark.slow) for role in of]


def times_ready(engine: Engine) -> int:
    return engine.log().count("all processes serve again")


@pytest.mark.parametrize("role", mostly_slow("gpu", "scheduler"))
def test_a_killed_worker_is_started_again_with_its_group_and_the_others_are_rewired(
    launch: Callable[..., Engine], role: str
) -> None:
    engine = launch().until_ready()
    before = dict(engine.pids)
    os.kill(engine.pids[role], signal.SIGKILL)
    event = engine.event()
    assert event is not None
    assert sorted(event["pids"]) == sorted(GROUPS[role])
    eventually(lambda: times_ready(engine) == 1)
    eventually(lambda: "the engine is ready" in engine.log())
    assert {name for name in ROLES if engine.pids[name] != before[name]} == set(GROUPS[role])
    log = engine.log()
    assert f"ERROR launcher: {role} was killed by signal 9 (Killed): starting {', '.join(event['pids'])} again" in log
    assert {name for name in ROLES if f"INFO {name}: rewired: " in log} == REWIRED[role]
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0
    assert not engine.endpoint_folder.exists()
    engine.assert_nothing_left()


@pytest.mark.slow
def test_workers_may_die_while_others_are_started_again(launch: Callable[..., Engine]) -> None:
    engine = launch(num_grammar_workers=1).until_ready()
    for role in ("scheduler", "gpu", "detokenizer", "tokenizer.1", "gateway", "grammar.0", "scheduler"):
        os.kill(engine.pids[role], signal.SIGKILL)
        assert engine.event() is not None
    eventually(lambda: times_ready(engine) >= 1 and engine.log().rstrip().rpartition("\n")[2])
    eventually(lambda: "the engine is ready" in engine.log().rpartition("starting")[2])
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0
    engine.assert_nothing_left()


@pytest.mark.parametrize("role", mostly_slow("gpu", of=("gpu", "scheduler", "gateway")))
def test_an_engine_whose_worker_dies_too_often_ends_and_says_so(launch: Callable[..., Engine], role: str) -> None:
    engine = launch({f"FAKE_{role.upper()}": "killed again"}, supervisor={"max_restarts": 3}).until_ready()
    os.kill(engine.pids[role], signal.SIGKILL)
    assert engine.process.wait(30) == 1
    assert f"{role} was killed by signal 9 (Killed); {role} was started again 3 times within" in engine.log()
    assert engine.log().count(f"{role} was killed by signal 9 (Killed): starting") == 3
    if role != "gateway":
        assert f"aborting: {role} was killed by signal 9" in engine.log()
    engine.assert_nothing_left()


@pytest.mark.parametrize("role", mostly_slow("tokenizer.1"))
def test_a_stopped_worker_is_killed_and_started_again(launch: Callable[..., Engine], role: str) -> None:
    engine = launch(supervisor={"hang_timeout_s": 1.0}).until_ready()
    os.kill(engine.pids[role], signal.SIGSTOP)
    event = engine.event()
    assert event is not None
    assert sorted(event["pids"]) == sorted(GROUPS[role])
    eventually(lambda: times_ready(engine) == 1)
    assert re.search(
        rf"{role} has answered nothing for \d+ s \(supervisor.hang_timeout_s 1\), and was killed", engine.log()
    )
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0
    engine.assert_nothing_left()


@pytest.mark.slow
def test_a_worker_whose_work_makes_no_progress_is_killed_and_started_again(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GPU": "stalled"}).until_ready()
    eventually(lambda: times_ready(engine) == 1)
    assert "gpu has made no progress for 1000000 s" in engine.log()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0


def test_open_requests_outlive_a_death_while_the_engine_drains(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GATEWAY": "undrained"}, drain_timeout_s=60).until_ready()
    engine.process.send_signal(signal.SIGTERM)
    eventually(lambda: "heard Drain" in engine.log())
    os.kill(engine.pids["gpu"], signal.SIGKILL)
    eventually(lambda: times_ready(engine) == 1)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 128 + signal.SIGTERM
    engine.assert_nothing_left()


def test_a_worker_that_fails_while_the_engine_comes_up_ends_it(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GRAMMAR": "fail", "FAKE_GPU": "slow"}, num_grammar_workers=1)
    assert engine.process.wait(20) == 1
    assert "grammar.0 failed: this model cannot be run: the engine ends" in engine.log()


@pytest.mark.slow
def test_a_worker_that_does_not_start_in_time_ends_the_engine(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GPU": "slow"}, supervisor={"start_timeout_s": 8.0})  # the others need one or two
    assert engine.process.wait(20) == 1
    assert "gpu was not ready within supervisor.start_timeout_s (8)" in engine.log()


def test_a_killed_worker_is_seen_as_killed_where_the_parent_ignores_the_ends_of_children(
    launch: Callable[..., Engine],
) -> None:
    engine = launch(
        popen={"preexec_fn": lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)}, supervisor={"max_restarts": 0}
    ).until_ready()
    os.kill(engine.pids["scheduler"], signal.SIGKILL)
    assert engine.process.wait(20) == 1
    assert "scheduler was killed by signal 9 (Killed); supervisor.max_restarts is 0: the engine ends" in engine.log()


@pytest.mark.parametrize(("role", "when"), [("gpu", "killed"), ("gateway", "killed"), ("gateway", "killed by Start")])
def test_a_worker_that_is_killed_while_the_engine_comes_up_is_named(
    launch: Callable[..., Engine], role: str, when: str
) -> None:
    engine = launch({f"FAKE_{role.upper()}": when})
    assert engine.process.wait(20) == 1
    assert f"ERROR launcher: {role} was killed by signal 9 (Killed): the engine ends" in engine.log()
    assert "Traceback" not in engine.log()
    assert engine.event()["event"] == "spawned"
    engine.assert_nothing_left()


def test_a_worker_that_fails_at_start_ends_the_engine_with_its_reason(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GPU": "fail"})
    assert engine.process.wait(20) == 1
    assert "gpu failed: this model cannot be run: the engine ends" in engine.log()
    assert engine.event()["event"] == "spawned"
    assert engine.event() is None
    engine.assert_nothing_left()


def test_a_gpu_process_out_of_memory_ends_the_engine_with_one_line(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GPU": "out of memory"})
    assert engine.process.wait(60) == 1
    (line,) = [line for line in engine.log().splitlines() if "launcher" in line and "out of memory" in line]
    assert "ERROR launcher: gpu failed: out of memory while loading weights, 40% of 16.00 GiB done: " in line
    assert "; tried to allocate 2.00 GiB. Use a smaller model" in line
    assert line.endswith(": the engine ends")
    assert "Traceback" not in engine.log()
    engine.assert_nothing_left()


def test_a_second_front_is_a_row_and_is_started_drained_and_stopped(launch: Callable[..., Engine]) -> None:
    engine = launch({"WITH_HTTP": "1", "FAKE_HTTP": "undrained"}, drain_timeout_s=0.2)
    assert [engine.event()["event"], engine.event()["event"]] == ["spawned", "ready"], engine.log()
    assert list(engine.pids) == [*ROLES, "http"]
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0
    log = engine.log()
    assert log.index("gateway: heard Start") < log.index("http: heard Start") < log.index("ready: ipc://")
    assert "http: heard Drain" in log
    assert "http: aborting: the engine is stopping" in log, "the engine waits for both of them"
    engine.assert_nothing_left()


def test_a_deaf_worker_is_killed(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_DETOKENIZER": "deaf"}).until_ready()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0
    assert "detokenizer: no exit within 3 s, killing" in engine.log()
    engine.assert_nothing_left()


def test_open_requests_get_an_error_when_draining_takes_too_long(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GATEWAY": "undrained"}, drain_timeout_s=0.2).until_ready()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0
    assert "aborting: the engine is stopping" in engine.log()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(launch: Callable[..., Engine], signum: int, status: int) -> None:
    engine = launch({"FAKE_GATEWAY": "undrained"}).until_ready()
    engine.process.send_signal(signum)
    eventually(lambda: "heard Drain" in engine.log())
    engine.process.send_signal(signum)
    assert engine.process.wait(2) == status
    assert not engine.endpoint_folder.exists()
    engine.assert_nothing_left()


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(launch: Callable[..., Engine], signum: int) -> None:
    engine = launch(popen={"preexec_fn": lambda: signal.signal(signum, signal.SIG_IGN)}).until_ready()
    for pid in (*engine.pids.values(), engine.process.pid):
        os.kill(pid, signum)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0, "the second signal would have stopped it at once"
    assert "SIGTERM: finishing open requests" in engine.log()


def test_sigterm_ends_a_launcher_whose_parent_ignores_or_blocks_it(launch: Callable[..., Engine]) -> None:
    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    engine = launch(popen={"preexec_fn": stubborn}).until_ready()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(20) == 0


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_service_is_the_launchers_to_act_on(
    launch: Callable[..., Engine], signum: int
) -> None:
    engine = launch().until_ready()
    for pid in (*engine.pids.values(), engine.process.pid):
        os.kill(pid, signum)
    assert engine.process.wait(20) == 0
    assert "gateway: heard Drain" in engine.log()
    assert "was killed" not in engine.log()


def test_an_engine_on_a_terminal_that_stops_background_output_comes_up(launch: Callable[..., Engine]) -> None:
    ours, terminal = os.openpty()
    mode = termios.tcgetattr(terminal)
    mode[3] |= termios.TOSTOP
    termios.tcsetattr(terminal, termios.TCSANOW, mode)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    become_foreground = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    engine = launch(popen={**streams, **become_foreground})
    os.close(terminal)
    threading.Thread(target=discard, args=(ours,), daemon=True).start()
    engine.until_ready()  # its workers have logged by then
    os.close(engine.lifeline)
    engine.lifeline = os.open(os.devnull, os.O_RDONLY)
    assert engine.process.wait(20) == 0


def discard(fd: int) -> None:
    with contextlib.suppress(OSError), os.fdopen(fd, "rb", buffering=0) as file:  # the other end of a terminal closes
        while file.read(65_536):
            pass


def test_a_signal_while_loading_ends_the_engine(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GPU": "slow"})
    assert engine.event()["event"] == "spawned"
    eventually(lambda: "gpu: loading (50 %)" in engine.log())
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(2.5) == 0, "a worker that loads is not waited for"
    engine.assert_nothing_left()


def test_sigkill_of_the_launcher_leaves_no_process_and_no_socket(launch: Callable[..., Engine]) -> None:
    engine = launch().until_ready()
    engine.process.kill()
    engine.process.wait()
    engine.assert_nothing_left()
    eventually(lambda: not (engine.endpoint_folder / "client.sock").exists())


def test_sigkill_of_a_loading_launcher_leaves_nothing(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_SCHEDULER": "slow", "FAKE_GPU": "slow"})
    assert engine.event()["event"] == "spawned"
    eventually(lambda: "gpu: loading (50 %)" in engine.log())
    engine.process.kill()
    engine.process.wait()
    engine.assert_nothing_left()


def test_the_end_of_the_lifeline_ends_the_engine(launch: Callable[..., Engine]) -> None:
    engine = launch({"FAKE_GATEWAY": "undrained"}).until_ready()
    os.close(engine.lifeline)
    engine.lifeline = os.open(os.devnull, os.O_RDONLY)
    assert engine.process.wait(10) == 0
    assert "the launcher's parent is gone" in engine.log()
    engine.assert_nothing_left()


def test_an_endpoint_in_use_is_refused_and_not_stolen(launch: Callable[..., Engine]) -> None:
    first = launch().until_ready()
    second = launch()
    assert second.process.wait(20) == 1
    assert "is in use by another engine" in second.log()
    assert second.event() is None, "nothing was spawned"
    assert (first.endpoint_folder / "client.sock").exists()
    with pytest.raises(ConfigError, match="in use"):
        EndpointClaim(f"ipc://{first.endpoint_folder}/client.sock")
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(20) == 0


def inheritable_descriptors(pid: int) -> set[int]:
    """The descriptors that a program started by this process could get."""
    o_cloexec = 0o2000000
    files = list(Path(f"/proc/{pid}/fdinfo").iterdir())
    flags = {int(file.name): int(file.read_text().split("flags:")[1].split()[0], 8) for file in files}
    return {fd for fd, bits in flags.items() if not bits & o_cloexec}


def test_a_workers_descriptors_are_its_own(launch: Callable[..., Engine]) -> None:
    engine = launch().until_ready()

    def shared(role: str) -> set[str]:
        links = (os.readlink(fd) for fd in Path(f"/proc/{engine.pids[role]}/fd").iterdir())
        return {link.split(":")[1].split(" ")[0] for link in links if link.startswith("/memfd:")}

    assert shared("tokenizer.0") == {"ringfeed-prompt.1", "ringfeed-stats-tokenizer.0"}
    assert shared("detokenizer") == {"ringfeed-stats-detokenizer"}
    rings = {"ringfeed-step", "ringfeed-result", *(f"ringfeed-prompt.{i}" for i in range(3))}
    assert shared("scheduler") == {"ringfeed-stats-scheduler", *rings}
    assert shared("gpu") == {"ringfeed-stats-gpu", *rings}
    assert shared("gateway") == {f"ringfeed-stats-{role}" for role in ROLES}
    # A program that a worker starts gets the standard streams alone.
    inheritable = {role: inheritable_descriptors(pid) for role, pid in engine.pids.items()}
    assert inheritable == {role: {0, 1, 2} for role in ROLES}
    engine.pids["launcher"] = engine.process.pid
    assert shared("launcher") == shared("gateway") | rings, "the launcher keeps all of them"
