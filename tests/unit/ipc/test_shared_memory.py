from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from ipc.errors import RingError
from ipc.shared_memory import PAGE_BYTES, create_segment, map_segment


def test_a_segment_is_zeroed_shared_and_of_whole_pages():
    fd = create_segment("test", PAGE_BYTES + 1)
    one, two = map_segment(fd), map_segment(fd)
    assert len(one) == len(two) == 2 * PAGE_BYTES
    assert one[:] == bytes(2 * PAGE_BYTES)
    one[PAGE_BYTES] = 7
    assert two[PAGE_BYTES] == 7
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert one[PAGE_BYTES] == 7  # the mapping outlives the descriptor


def test_a_read_only_mapping_cannot_be_written():
    fd = create_segment("test", 1)
    with pytest.raises(TypeError):
        map_segment(fd, writable=False)[0] = 1
    os.close(fd)


def test_a_segment_cannot_be_resized_by_anybody():
    fd = create_segment("test", PAGE_BYTES)
    for num_bytes in (0, 1, 2 * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, num_bytes)
    with pytest.raises(PermissionError):
        os.posix_fallocate(fd, 0, 2 * PAGE_BYTES)
    with pytest.raises(OSError, match="not permitted"):
        map_segment(fd).resize(2 * PAGE_BYTES)
    os.close(fd)


def test_more_memory_than_there_is_is_refused_at_once():
    with pytest.raises(
        RingError, match=rf"memory for huge \({1 << 50} bytes\) cannot be allocated: \d+ bytes are available"
    ):
        create_segment("huge", 1 << 50)


def test_an_allocation_that_the_kernel_refuses_is_a_ring_error_and_leaks_nothing():
    before = os.listdir("/proc/self/fd")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(RingError, match=r"memory for big \(2097152 bytes\) cannot be allocated: File too large"):
            create_segment("big", 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir("/proc/self/fd") == before


def test_too_many_open_files_are_a_ring_error():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(RingError, match="Too many open files"):
            create_segment("test", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_cannot_be_mapped_is_a_ring_error():
    fd = os.memfd_create("empty")
    with pytest.raises(RingError, match=f"descriptor {fd} cannot be mapped"):
        map_segment(fd)
    os.close(fd)
    with pytest.raises(RingError, match=f"descriptor {fd} cannot be mapped"):
        map_segment(fd)


def test_an_inherited_descriptor_maps_the_same_memory_in_another_program():
    fd = create_segment("test", PAGE_BYTES)
    code = "import sys; from ipc.shared_memory import map_segment; map_segment(int(sys.argv[1]))[:5] = b'hello'"
    subprocess.run([sys.executable, "-c", code, str(fd)], check=True, pass_fds=[fd], timeout=30)
    assert map_segment(fd)[:5] == b"hello"
    os.close(fd)
