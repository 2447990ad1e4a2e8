"""Workers with the sockets and the lifecycle of real ones and nothing inside, for tests of the supervisor.

The environment variable FAKE_<ROLE> makes one of them misbehave. Its values: "fail" (says Failed at start), "deaf"
(ignores Stop), "undrained" (never says Drained), "slow" (never Ready), "killed" and "killed by Start" (by signal 9),
"killed again" (by signal 9, each time but the first), "stalled" (answers that its work makes no progress).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from ipc.channels import bind_router
from ipc.errors import ModelUnsupported
from ipc.messages import Abort, Drain, Drained, EngineState, Start
from workers.process import WorkerProcess

logger = logging.getLogger(__name__)


def live(process: WorkerProcess, bootstrap: Any, *, bind: list[str], connect: list[str], **info: int) -> None:
    """Announce, then obey until Stop."""
    misbehaviour = os.environ.get(f"FAKE_{process.role.partition('.')[0].upper()}", "")
    if misbehaviour == "fail":
        raise ModelUnsupported("this model cannot be run")
    if misbehaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if misbehaviour == "killed again" and bootstrap.worker.epoch > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if misbehaviour == "stalled" and bootstrap.worker.epoch == 1:
        process.stalled_s = lambda: 1e6
    sockets = [process.bind(name) for name in bind] + [process.connect(name) for name in connect]
    if hasattr(bootstrap, "endpoint"):
        sockets.append(bind_router(process.context, bootstrap.endpoint))

    def obey(message: Any) -> None:
        logger.info("heard %s %s", type(message).__name__, message.info if isinstance(message, Start) else "")
        match message:
            case Start() if misbehaviour == "killed by Start":
                os.kill(os.getpid(), signal.SIGKILL)
            case Start() if process.role in ("scheduler", "gateway", "http"):
                process.ready()
            case EngineState():
                logger.info("the engine is %s: %s", message.state, message.detail)
            case Abort():
                logger.info("aborting: %s", message.error_message)
                process.say(Drained())
            case Drain() if misbehaviour != "undrained":
                process.say(Drained())

    process.on_control(obey)
    process.on_rewire(lambda new: logger.info("rewired: %s", new.worker.peers))
    if misbehaviour == "slow":
        process.progress("loading", 0.5)
    elif process.role != "scheduler":
        process.ready(**info)
    if misbehaviour == "deaf":
        time.sleep(3600)
    if process.role != "gateway":
        while True:
            process.wait()
    try:
        launcher = os.pidfd_open(bootstrap.worker.launcher_pid)
        process.watch(launcher)
        while launcher not in process.wait():
            pass
    except ProcessLookupError:
        pass  # it died while this process started
    finally:
        Path(bootstrap.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
