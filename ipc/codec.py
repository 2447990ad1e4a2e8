"""Turns messages into msgpack bytes and back. The only module that packs or unpacks frames.

Owns two ways to read one wire format:

- `decode` reads frames that ringfeed's own processes wrote: inside the engine, and from the engine to its clients.
  msgspec builds the message directly from the bytes. The message classes bound every list and map.
- `decode_untrusted` reads frames that a client wrote. msgpack first unpacks them within bounds, then msgspec converts
  the result.

Both check the type of every field. Neither unpickles or runs anything that a frame contains.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgpack
import msgspec

from ipc.errors import InvalidRequest, ProtocolError

MAX_FRAME_BYTES: Final = 64 << 20
MAX_ITEMS: Final = 16_384  # in one list or map

T = TypeVar("T")
BoundedList = Annotated[list[T], msgspec.Meta(max_length=MAX_ITEMS)]  # how a message declares a list


def encode(message: Any, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Pack a message struct (or plain containers of them).

    Raises InvalidRequest for text that has no UTF-8 form and for integers beyond 64 bits, ProtocolError for a frame
    that is larger than its receiver accepts.
    """
    try:
        frame = _ENCODER.encode(message)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"text with a lone surrogate at character {error.start} cannot be sent") from None
    except OverflowError:
        raise InvalidRequest("an integer beyond 64 bits cannot be sent") from None
    if len(frame) > max_bytes:  # the receiver would close the connection
        raise ProtocolError(f"frame of {len(frame)} bytes is larger than {max_bytes}")
    return frame


def _plain_value(value: Any) -> Any:
    """Accept numpy's float64 and str_: they are subclasses of float and str, which msgspec does not encode."""
    for kind in (float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_plain_value)  # any number of threads may use it


_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}  # by message class or union; building one takes long


def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    return decoder


def decode(frame: bytes | memoryview, kind: type[T] | Any) -> T:
    """Read one frame of ringfeed's own processes as `kind`, a message class or a union of them.

    Raises ProtocolError for bytes that are not such a message, InvalidRequest for a message with a value out of range
    (a `SamplingParams` field, for example).
    """
    _check_size(frame)
    try:
        message: T = _decoder(kind).decode(frame)
    except msgspec.ValidationError as error:
        raise _refusal(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a msgpack message: {error}") from None
    except RecursionError:
        raise ProtocolError("not a msgpack message: nested too deeply") from None
    return message


def decode_untrusted(frame: bytes | memoryview, kind: type[T] | Any) -> T:
    """Read one frame of a client: like `decode`, but msgpack's bounded unpacker sees the bytes first.

    The bounds apply to every list, map and extension in the frame, also in places where `kind` has no such field.
    """
    _check_size(frame)
    max_items = min(MAX_ITEMS, len(frame))  # the unpacker allocates as many items as a header claims, at each depth
    try:
        plain = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=False,  # logit_bias is a map of integers; msgspec checks the type of every key
            ext_hook=_refuse_extension,
            max_str_len=len(frame),
            max_bin_len=len(frame),
            max_array_len=max_items,
            max_map_len=max_items,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a msgpack message: {str(error) or type(error).__name__}") from None
    try:
        return msgspec.convert(plain, kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise ProtocolError("not a msgpack message: nested too deeply") from None


def _check_size(frame: bytes | memoryview) -> None:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"frame of {len(frame)} bytes is larger than {MAX_FRAME_BYTES}")


def _refuse_extension(code: int, _: bytes) -> Any:
    raise ProtocolError(f"extension type {code} is not part of the protocol")


def _refusal(error: msgspec.ValidationError) -> ProtocolError | InvalidRequest:
    """The error to raise for a message whose fields are wrong: InvalidRequest if a struct's own check refused it."""
    if isinstance(error.__cause__, InvalidRequest):
        return InvalidRequest(str(error.__cause__))
    reason = " ".join(str(error).splitlines())  # it may quote the name of an unknown field
    return ProtocolError(f"not a message of this protocol: {reason}")
