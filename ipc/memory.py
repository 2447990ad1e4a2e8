"""Anonymous shared memory: a memfd that has no name, cannot shrink, and is gone with its last holder.

`posix_fallocate` turns a lack of memory into an error here instead of a SIGBUS later; the seals stop any holder
from resizing it under another. /dev/shm is not involved, whatever its size.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from ipc.errors import RingError

PAGE_BYTES = mmap.PAGESIZE


def create_segment(name: str, num_bytes: int) -> int:
    """Make a sealed segment of `num_bytes` (rounded up to pages), zeroed. Returns its file descriptor, inheritable.

    Raises RingError, with the size, if the memory cannot be had.
    """
    num_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        os.set_inheritable(fd, True)
    except OSError as error:
        os.close(fd)
        raise RingError(f"shared memory for {name} ({num_bytes} bytes) cannot be had: {error.strerror}") from error
    return fd


def map_segment(fd: int, *, writable: bool = True) -> mmap.mmap:
    """Map a whole segment. The mapping outlives the descriptor; closing it waits for its views to go."""
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, access)
