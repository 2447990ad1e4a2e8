"""What the launcher does about deaths and hangs, with processes that only count what is done to them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ipc.errors import EngineUnavailable, RingError
from ipc.messages import EngineState, Failed, Ready
from pipeline.engine import heartbeats
from pipeline.engine import recovery as module
from pipeline.engine.instances import Process
from pipeline.engine.recovery import Recovery
from pipeline.engine.supervisor_config import SupervisorConfig
from pipeline.engine.topology import ENGINE
from pipeline.engine.wiring import Wiring
from tests.unit.pipeline.engine.test_topology import CORE_PROCESSES, facts


class Worker:
    def __init__(self, process: Process) -> None:
        self.name, self.role = process.name, process.role
        self.is_ready = self.is_started = self.serves = self.is_draining = False
        self.told_state: EngineState | None = None
        self.last_words = ""
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True


class Workers:
    """In place of a WorkerSet. Every process is connected at once."""

    def __init__(self) -> None:
        self.wiring = Wiring(ENGINE, facts())
        self.info = {"num_blocks": 7}
        self.live = {process.name: Worker(process) for process in self.wiring.processes}
        self.told: list[tuple[str, Any]] = []
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self.live.values()))

    def get(self, name: str) -> Worker | None:
        return self.live.get(name)

    def bury(self, name: str) -> None:
        del self.live[name]

    def tell(self, name: str, message: Any) -> bool:
        self.told.append((name, message))
        return True

    def start(self, worker: Worker) -> None:
        worker.is_started = True
        worker.serves = not worker.role.is_front and not worker.role.starts_after

    def keep_spares(self) -> None:
        """No role has any."""

    def replace(self, wiring: Wiring, started: tuple[Process, ...]) -> dict[str, int]:
        if self.failure is not None:
            raise self.failure
        self.wiring = wiring
        self.live |= {process.name: Worker(process) for process in started}
        return dict.fromkeys((process.name for process in started), 1)


class Announcer:
    is_ready = True

    def spawned(self, pids: dict[str, int]) -> None:
        pass

    def worker_ready(self, name: str) -> None:
        pass


class Engine:
    """An engine that serves, at a time that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.workers = Workers()
        workers: Any = self.workers
        announcer: Any = Announcer()
        self.recovery = Recovery(workers, announcer, SupervisorConfig(**config))
        self.recovery.spawned(dict.fromkeys(self.workers.live, 1))
        self.all_ready()

    def all_ready(self) -> None:
        """All processes say Ready, are told Start, and say what they then say."""
        for _ in range(2):
            for worker in self.workers:
                self.recovery.ready(worker, Ready(role=worker.name))  # type: ignore[arg-type]
            self.recovery.go_on(drains=False)

    def silence(self, *names: str, seconds: float) -> str | None:
        """So much time passes, in which all others answer. Returns why the engine ends."""
        ends = self.now + seconds
        while self.now < ends:
            self.now += 1.0
            for worker in self.workers:
                if worker.is_ready and worker.name not in names:
                    self.recovery._heartbeats.answered(worker.name, 0.0, self.now)
            self.recovery.go_on(drains=False)
            for worker in self.workers:  # as the supervisor does, which hears of their deaths
                if worker.is_killed and self.workers.get(worker.name) is worker:
                    self.workers.bury(worker.name)
                    if loss := self.recovery.died(worker.name, worker.last_words):
                        return loss
        return None

    def states(self) -> list[EngineState]:
        return [message for _, message in self.workers.told if isinstance(message, EngineState)]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def restarted(engine: Engine) -> set[str]:
    return {name for name, epoch in engine.workers.wiring.epochs.items() if epoch == 2}


def test_two_processes_of_a_group_that_hang_together_are_started_again_once(engine: Engine) -> None:
    assert engine.silence("scheduler", "detokenizer", seconds=31) is None
    assert restarted(engine) == CORE_PROCESSES
    assert max(engine.workers.wiring.epochs.values()) == 2


def test_a_process_that_says_that_it_fails_and_does_not_end_is_killed_soon(engine: Engine) -> None:
    gpu: Any = engine.workers.get("gpu")
    engine.recovery.failed(gpu, Failed(role="gpu", error_code="internal", error_message="out of luck"))
    assert gpu.last_words == "gpu failed: out of luck"
    engine.silence("gpu", seconds=heartbeats.EXIT_S)
    assert restarted(engine) == set()
    engine.silence("gpu", seconds=1)
    assert restarted(engine) == {"gpu"}


@pytest.mark.parametrize("error", [
    RingError("no memory"), EngineUnavailable("no socket"), OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
])  # fmt: skip
def test_what_cannot_be_started_again_ends_the_engine_with_the_reason(engine: Engine, error: Exception) -> None:
    engine.workers.failure = error
    engine.workers.bury("gpu")
    loss = engine.recovery.died("gpu", "gpu was killed")
    assert loss == f"gpu was killed; it cannot be started again: {error}"


def test_the_fronts_hear_that_the_engine_recovers_until_all_serve_again(engine: Engine) -> None:
    assert engine.states()[-1] == EngineState(state="ready", detail="")
    engine.workers.told.clear()
    engine.workers.bury("tokenizer.0")
    assert engine.recovery.died("tokenizer.0", "it was killed") is None
    assert engine.states() == [EngineState(state="recovering", detail="started again, not ready yet: tokenizer.0")]
    engine.all_ready()
    assert engine.states()[1:] == [EngineState(state="ready", detail="")]


def test_a_gateway_that_is_started_again_hears_the_state_only_after_its_start(engine: Engine) -> None:
    engine.workers.told.clear()
    engine.workers.bury("gateway")
    assert engine.recovery.died("gateway", "it was killed") is None
    assert engine.states() == []
    gateway: Any = engine.workers.get("gateway")
    engine.recovery.ready(gateway, Ready(role="gateway"))
    engine.recovery.go_on(drains=False)
    assert gateway.is_started
    assert [state.state for state in engine.states()] == ["recovering"]


def test_a_front_drains_once_and_only_when_it_serves(engine: Engine) -> None:
    engine.workers.bury("gateway")
    assert engine.recovery.died("gateway", "it was killed") is None
    engine.workers.told.clear()
    assert engine.recovery.go_on(drains=True) is None
    assert [message for name, message in engine.workers.told if name == "gateway"] == []
    engine.all_ready()
    for _ in range(2):
        engine.recovery.go_on(drains=True)
    told = [type(message).__name__ for name, message in engine.workers.told if name == "gateway"]
    assert told.count("Drain") == 1


def test_deaths_beyond_the_budget_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, max_restarts=1)
    for name, is_over in (("tokenizer.0", False), ("gpu", False), ("tokenizer.1", True)):
        engine.workers.bury(name)
        assert bool(engine.recovery.died(name, "it was killed")) == is_over
