"""64-bit words in shared memory with the ordering that publishing needs: release stores and acquire loads.

On x86-64 an aligned 8-byte plain store is a release store and a plain load an acquire load (total store order). CPython
does not split either of them when it accesses an 8-byte `memoryview` item. Other processors need explicit atomics from
libatomic; there a release store also waits for the payload reads before it, as freeing a record requires.
These words are not sequentially consistent, and ringfeed does not need that: the writer rings the doorbell
(`ipc/doorbell.py`) after every publish, so no reader has to set a flag and then look again.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import platform
from collections.abc import Callable

from ipc.errors import RingError

_TOTAL_STORE_ORDER = platform.machine() in ("x86_64", "AMD64")
_ACQUIRE, _RELEASE = 2, 3  # C11 memory_order


class Words:
    """A view of `num_words` signed 64-bit words, `offset` bytes (a multiple of 8) into a writable buffer."""

    def __init__(self, buffer: memoryview, offset: int, num_words: int) -> None:
        assert offset % 8 == 0, f"words at byte {offset} would straddle cache lines"
        view = buffer[offset : offset + 8 * num_words].cast("q")
        self._view = view
        self.load: Callable[[int], int] = view.__getitem__  # acquire
        self.store: Callable[[int, int], None] = view.__setitem__  # release
        if not _TOTAL_STORE_ORDER:
            self._use_libatomic(view)

    def _use_libatomic(self, view: memoryview) -> None:
        load, store = _libatomic()
        cells = [ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(view, 8 * i))) for i in range(len(view))]
        self.load = lambda i: load(cells[i], _ACQUIRE)
        self.store = lambda i, value: store(cells[i], value, _RELEASE)

    def release(self) -> None:
        """Release the buffer, so that its mapping can be closed. Loads and stores raise ValueError from then on."""
        self._view.release()
        self.load, self.store = self._view.__getitem__, self._view.__setitem__  # libatomic's would hit unmapped memory


@functools.cache
def _libatomic() -> tuple[Callable[[ctypes.c_void_p, int], int], Callable[[ctypes.c_void_p, int, int], None]]:
    """libatomic's 8-byte load and store. Not in the class, because a class body would mangle their names."""
    path = ctypes.util.find_library("atomic")
    if path is None:
        raise RingError(f"rings on {platform.machine()} need libatomic (Debian: apt install libatomic1)")
    library = ctypes.CDLL(path)
    load, store = library.__atomic_load_8, library.__atomic_store_8
    load.argtypes, load.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_int64
    store.argtypes, store.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], None
    return load, store
