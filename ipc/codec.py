"""Turns messages into msgpack bytes and back. The only place that packs or unpacks.

msgpack bounds what a frame may hold and refuses extension types; msgspec then checks every field's type, so that
nothing untyped goes further than this module. Nothing is ever pickled.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgpack
import msgspec

from ipc.errors import InvalidRequest, ProtocolError

MAX_FRAME_BYTES: Final = 64 << 20
MAX_ITEMS: Final = 16_384  # in one list or map: the unpacker reserves room for what a header claims, at each depth

T = TypeVar("T")


def encode(message: Any, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Pack a message struct (or plain containers of them).

    Raises InvalidRequest for text that has no UTF-8 form and for integers beyond 64 bits, ProtocolError for a frame
    larger than its receiver takes in.
    """
    try:
        plain = msgspec.to_builtins(message, builtin_types=(bytes,), enc_hook=_plain_value)
        frame: bytes = msgpack.packb(plain, use_bin_type=True)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"text with a lone surrogate at character {error.start} cannot be sent") from None
    except OverflowError:
        raise InvalidRequest("an integer beyond 64 bits cannot be sent") from None
    if len(frame) > max_bytes:  # its receiver would cut the connection
        raise ProtocolError(f"frame of {len(frame)} bytes is larger than {max_bytes}")
    return frame


def _plain_value(value: Any) -> Any:
    """numpy's float64 and str_ are a float and a str to whoever checks them, but not to msgspec."""
    for kind in (float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _refuse_extension(code: int, _: bytes) -> Any:
    raise ProtocolError(f"extension type {code} is not part of the protocol")


def decode(frame: bytes | memoryview, kind: type[T] | Any) -> T:
    """Unpack one frame as `kind`, a message class or a union of them.

    Raises ProtocolError for bytes that are no such message, InvalidRequest where the shape is right and a
    value is out of its range (a `SamplingParams` field, say).
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"frame of {len(frame)} bytes is larger than {MAX_FRAME_BYTES}")
    try:
        plain = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_str_len=len(frame),
            max_bin_len=len(frame),
            max_array_len=min(MAX_ITEMS, len(frame)),
            max_map_len=min(MAX_ITEMS, len(frame)),
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a msgpack message: {str(error) or type(error).__name__}") from None
    try:
        return msgspec.convert(plain, kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequest):
            raise InvalidRequest(str(error.__cause__)) from None
        raise ProtocolError(f"not a message of this protocol: {error}") from None
    except RecursionError:
        raise ProtocolError("nested too deeply") from None
