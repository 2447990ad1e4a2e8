"""Anonymous shared memory: a memfd that has no name, cannot shrink, and is gone with its last holder.

The kernel takes all pages at once, so a lack of memory is an error here and no SIGBUS later. The seals stop every
holder from resizing the segment. The size of /dev/shm does not matter: a memfd is not in it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from ipc.errors import RingError

PAGE_BYTES = mmap.PAGESIZE


def create_segment(name: str, num_bytes: int) -> int:
    """Make a sealed segment of `num_bytes` (rounded up to pages), zeroed. Returns its file descriptor.

    No child process inherits the descriptor: see `ipc/descriptor_passing.py`. Raises RingError, with the size, if there
    is not enough memory.
    """
    num_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    fd = -1
    try:
        available = _available_bytes()
        if num_bytes > available:  # the kernel would rather kill a process than refuse
            raise OSError(errno.ENOMEM, f"{available} bytes are available")
        fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.posix_fallocate(fd, 0, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise RingError(
            f"shared memory for {name} ({num_bytes} bytes) cannot be allocated: {error.strerror}"
        ) from error
    return fd


def map_segment(fd: int, *, writable: bool = True) -> mmap.mmap:
    """Map a whole segment. The mapping outlives the descriptor; it can be closed once no view of it is left.

    Raises RingError if `fd` is not a segment, or if there is no room for the mapping.
    """
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, access)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise RingError(f"descriptor {fd} cannot be mapped: {error}") from error


def _available_bytes() -> int:
    """The kernel's estimate of the memory that it can give without swapping."""
    with open("/proc/meminfo") as file:
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in file)}
    return kib["MemAvailable"] * 1024
