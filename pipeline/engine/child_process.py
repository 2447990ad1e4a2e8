"""One worker as a child process of the launcher: spawned, told what it needs, watched, and buried."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterable

from ipc.codec import encode
from ipc.descriptor_passing import descriptor_channel, send_with_descriptors
from ipc.messages import EngineState
from pipeline.engine.wiring import WorkerPlan
from pipeline.environment.module_search import module_command, module_environment


class SpareProcess:
    """A process that imports what a worker of its module needs, and then waits to become one."""

    def __init__(self, module: str) -> None:
        self.channel, theirs = descriptor_channel()
        try:
            with theirs:
                self.process = _spawn(module, theirs.fileno(), "--spare")
        except BaseException:
            self.channel.close()
            raise

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """It is not needed any more."""
        self.process.kill()
        self.process.wait()
        self.channel.close()


class ChildProcess:
    """A worker that runs `python -m MODULE --bootstrap-fd N`.

    The worker inherits the standard streams and N, its end of a channel for its bootstrap and descriptors. The
    launcher's end stays open until `bury()`. Must be made in the main thread: the kernel kills a worker when the thread
    that spawned it ends.

    Args:
        plan: says which worker it is.
        descriptors: gives the launcher's numbers for keys.
        spare: the process that becomes the worker; None = a new one does.
    """

    def __init__(
        self, plan: WorkerPlan, descriptors: Callable[[Iterable[str]], list[int]], spare: SpareProcess | None = None
    ) -> None:
        self.name, self.role = plan.process.name, plan.process.role
        self.is_ready = False
        self.is_started = False  # was told Start
        self.serves = False  # as far as the launcher knows, it does its work
        self.told_state: EngineState | None = None  # of a front
        self.is_draining = False  # a front that was told Drain
        self.has_drained = False  # a front without open requests
        self.last_words = ""  # of a worker that ends by itself
        self._descriptors = descriptors
        self._known: set[str] = set()  # keys of the descriptors that the worker has
        if spare is not None:
            self._channel, self.process = spare.channel, spare.process
            with contextlib.suppress(OSError):  # it has died, which its pidfd will tell
                self.send(plan)
        else:
            self._channel, theirs = descriptor_channel()
            try:
                with theirs:
                    # Before the spawn: the worker then has its bootstrap even if the launcher is killed meanwhile.
                    self.send(plan)
                    self.process = _spawn(self.role.module, theirs.fileno())
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


def _spawn(module: str, channel_fd: int, *flags: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        module_command(module, "--bootstrap-fd", str(channel_fd), *flags),
        stdin=subprocess.DEVNULL,
        env=module_environment(),
        pass_fds=(channel_fd,),
        start_new_session=True,  # detached from the terminal: no Ctrl-C, and no stop by `stty tostop`
    )
