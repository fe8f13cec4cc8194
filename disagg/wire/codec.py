"""Messages to frames and back, with limits on both sides.

A frame is ``b"dsg"``, one byte of major and one of minor version, and a msgpack map whose ``kind`` names the message. Who decodes tolerates
fields that it does not know and says of everything else in one sentence why it was refused; nothing that came over a wire is ever trusted
to be short or shallow.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from disagg.errors import DisaggError
from disagg.wire.messages import Message, ToHost, ToRouter

MAJOR = 1
MINOR = 0
FRAME_LIMIT = 1024 * 1024
DEPTH_LIMIT = 16

_MAGIC = b"dsg"
_HEADER = _MAGIC + bytes((MAJOR, MINOR))

M = TypeVar("M")


class FrameError(DisaggError):
    """A frame that cannot be read. Attribute `why`: one word for counters."""

    why = "garbage"


class FrameTooLargeError(FrameError):
    """Over `FRAME_LIMIT` bytes."""

    why = "too_large"


class FrameTooDeepError(FrameError):
    """Nested more than `DEPTH_LIMIT` deep."""

    why = "too_deep"


class VersionError(FrameError):
    """Another major version."""

    why = "version"


class UnknownKindError(FrameError):
    """A message that this release does not know; a newer peer of the same major version may send it."""

    why = "unknown_kind"


class _Kind(msgspec.Struct):
    kind: str


_encoder = msgspec.msgpack.Encoder()
_kind_of = msgspec.msgpack.Decoder(_Kind)


def encode(message: Message) -> bytes:
    """A message as a frame.

    Raises:
        FrameTooLargeError: it is over the limit, which no honest message is.
    """
    frame = _HEADER + _encoder.encode(message)
    if len(frame) > FRAME_LIMIT:
        raise FrameTooLargeError(f"a {type(message).__name__} of {len(frame)} bytes is over the limit of {FRAME_LIMIT}")
    return frame


class Reader(Generic[M]):
    """Decodes the frames of one direction."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kind)

    def decode(self, frame: bytes) -> M:
        """A frame as a message.

        Raises:
            FrameError: one of its kinds; the sentence never quotes the frame.
        """
        if len(frame) > FRAME_LIMIT:
            raise FrameTooLargeError(f"a frame of {len(frame)} bytes is over the limit of {FRAME_LIMIT}")
        _check_header(frame)
        body = frame[len(_HEADER) :]
        if _may_be_deep(body) and depth(body) > DEPTH_LIMIT:
            raise FrameTooDeepError(f"a frame is nested more than {DEPTH_LIMIT} deep")
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise self._why_invalid(body, error) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError("a frame is not valid msgpack") from error

    def _why_invalid(self, body: bytes, error: msgspec.ValidationError) -> FrameError:
        try:
            kind = _kind_of.decode(body).kind
        except (msgspec.DecodeError, UnicodeDecodeError):
            return FrameError("a frame holds no message: it has no kind")
        if kind not in _KINDS:
            return UnknownKindError("a frame holds a message of a kind that this release does not know")
        return FrameError(f"a frame holds a {kind} message that is not one: {error}")


to_router: Reader[ToRouter] = Reader(ToRouter)
to_host: Reader[ToHost] = Reader(ToHost)
_KINDS = frozenset(kind.__struct_config__.tag for union in (ToRouter, ToHost) for kind in union.__args__)


def _check_header(frame: bytes) -> None:
    if len(frame) < len(_HEADER) or not frame.startswith(_MAGIC):
        raise FrameError("a frame does not begin as one of disagg's")
    major, minor = frame[3], frame[4]
    if major != MAJOR:
        raise VersionError(
            f"the other side speaks version {major}.{minor} of the control protocol and this one {MAJOR}.{MINOR}:"
            " bring both to releases of the same major version"
        )


_CONTAINERS = bytes((*range(0x80, 0xA0), *range(0xDC, 0xE0)))
_OTHERS = bytes(set(range(256)) - set(_CONTAINERS))


def _may_be_deep(body: bytes) -> bool:
    """False when the body holds too few bytes that could open an array or a map; most frames end their check here, in C."""
    return len(body.translate(None, _OTHERS)) > DEPTH_LIMIT


_NIL_TO_TRUE = dict.fromkeys(range(0xC0, 0xC4), 0)
_NUMBERS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIXED_EXTENSIONS = {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
_ONE_BYTE = dict.fromkeys((*range(0x80), *range(0xE0, 0x100)), 0)
_SHORT_STRINGS = {first: first & 0x1F for first in range(0xA0, 0xC0)}
_FIXED = _NIL_TO_TRUE | _NUMBERS | _FIXED_EXTENSIONS | _ONE_BYTE | _SHORT_STRINGS  # first byte -> bytes that follow it
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # first byte -> bytes of the count, items per element


def depth(body: bytes) -> int:
    """How deep arrays and maps are nested in a msgpack value; counts no further than just over the limit.

    A body that ends too early is as deep as it got: the decoder says what is wrong with it.
    """
    left = [1]  # items that each open container still expects
    deepest = at = 0
    while left and at < len(body):
        left[-1] -= 1
        size, items = _step(body, at)
        at += size
        if items:
            left.append(items)
            deepest = max(deepest, len(left) - 1)
            if deepest > DEPTH_LIMIT:
                break
        while left and left[-1] == 0:
            left.pop()
    return deepest


def _step(body: bytes, at: int) -> tuple[int, int]:
    """The bytes of the value's own head and payload, and the items that it contains."""
    first = body[at]
    if first in _FIXED:
        return 1 + _FIXED[first], 0
    if first < 0xA0:
        return 1, (first & 0x0F) * (2 if first < 0x90 else 1)
    if first in _SIZED:
        width, extra = _SIZED[first]
        return 1 + width + extra + int.from_bytes(body[at + 1 : at + 1 + width], "big"), 0
    width, per = _COUNTED[first]
    return 1 + width, per * int.from_bytes(body[at + 1 : at + 1 + width], "big")
