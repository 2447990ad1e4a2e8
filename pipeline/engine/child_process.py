"""One worker as a child process of the launcher: spawned, told what it needs, watched, and buried."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterable

from ipc.codec import encode
from ipc.descriptor_passing import descriptor_channel, send_with_descriptors
from ipc.messages import EngineState
from pipeline.engine.wiring import WorkerPlan
from pipeline.environment.module_search import module_command, module_environment


class ChildProcess:
    """A worker that runs `python -m MODULE --bootstrap-fd N`.

    `descriptors` gives the launcher's numbers for keys.

    The worker inherits the standard streams and N, its end of a channel for its bootstrap and descriptors. The
    launcher's end stays open until `bury()`. Must be made in the main thread: the kernel kills a worker when the thread
    that spawned it ends.
    """

    def __init__(self, plan: WorkerPlan, descriptors: Callable[[Iterable[str]], list[int]]) -> None:
        self.name = plan.name
        self.is_front = plan.is_front
        self.starts_after = plan.starts_after
        self.is_ready = False
        self.is_started = False  # was told Start
        self.serves = False  # as far as the launcher knows, it does its work
        self.told_state: EngineState | None = None  # of a front
        self.is_draining = False  # a front that was told Drain
        self.has_drained = False  # a front without open requests
        self.last_words = ""  # of a worker that ends by itself
        self._descriptors = descriptors
        self._known: set[str] = set()  # keys of the descriptors that the worker has
        self._channel, theirs = descriptor_channel()
        try:
            with theirs:
                # Before the spawn: the worker then has its bootstrap even if the launcher is killed meanwhile.
                self.send(plan)
                self.process = subprocess.Popen(
                    module_command(plan.module, "--bootstrap-fd", str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    env=module_environment(),
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # detached from the terminal: no Ctrl-C, and no stop by `stty tostop`
                )
        except BaseException:
            self._channel.close()
            raise
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)  # readable once the process has ended

    def send(self, plan: WorkerPlan) -> None:
        """Send a bootstrap, with the descriptors that the worker does not have yet. Never blocks.

        Raises OSError if the worker has ended, or has left many of them unread.
        """
        new = [key for key in plan.descriptors if key not in self._known]
        send_with_descriptors(self._channel, encode(plan.bootstrap), self._descriptors(new))
        self._known = set(plan.descriptors)

    def kill(self) -> None:
        self.process.kill()

    def describe_exit(self) -> str:
        """How the process has ended, in words."""
        status = self.process.wait()
        if status >= 0:
            return f"exited with status {status}"
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"

    def bury(self) -> None:
        """Wait for the process's end and close the descriptors that stand for it."""
        self.process.wait()
        os.close(self.pidfd)
        self._channel.close()
