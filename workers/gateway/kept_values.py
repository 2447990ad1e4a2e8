"""Values that clients keep in the gateway for other clients: a map that forgets what was not used for longest.

The HTTP processes keep finished responses here, so that each of them finds the responses of the others. The gateway
never reads the values.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Final

from ipc.errors import InvalidRequest

VALUE_OVERHEAD_BYTES: Final = 256  # of a value's objects and its place in the map, rounded up


class KeptValues:
    """At most `max_bytes` of keys and values, each counted with its overhead. 0: no value can be kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[str, bytes] = OrderedDict()  # the one used last is at the end
        self.num_bytes = 0

    def keep(self, key: str, value: bytes) -> bool:
        """Keep a value and forget others if there is no room. Returns whether it replaces one.

        Raises InvalidRequest for a value that is larger than the whole map.
        """
        self._check_is_on()
        num_bytes = _size(key, value)
        if num_bytes > self._max_bytes:
            raise InvalidRequest(
                f"the value takes {num_bytes} bytes, more than frontend.max_kept_bytes ({self._max_bytes}): keep less, "
                "or start the engine with a larger value"
            )
        was_there = self.forget(key)
        while self.num_bytes + num_bytes > self._max_bytes:
            self.num_bytes -= _size(*self._values.popitem(last=False))
        self._values[key] = value
        self.num_bytes += num_bytes
        return was_there

    def recall(self, key: str) -> bytes | None:
        """The value, which counts as used now; None if there is none. Raises InvalidRequest if no values are kept."""
        self._check_is_on()
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def forget(self, key: str) -> bool:
        """Forget a value. Returns whether there was one. Raises InvalidRequest if no values are kept."""
        self._check_is_on()
        value = self._values.pop(key, None)
        if value is not None:
            self.num_bytes -= _size(key, value)
        return value is not None

    def _check_is_on(self) -> None:
        if not self._max_bytes:
            raise InvalidRequest(
                "this engine keeps no values (frontend.max_kept_bytes = 0): start it with a larger value"
            )


def _size(key: str, value: bytes) -> int:
    return sys.getsizeof(key) + len(value) + VALUE_OVERHEAD_BYTES
