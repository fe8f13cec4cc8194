"""Messages to frames and back, with limits on both sides.

A frame is ``b"dsg"``, one byte of major and one of minor version, and a msgpack map whose ``kind`` names the message. Who decodes tolerates
fields that it does not know and says of everything else in one sentence why it was refused; nothing that came over a wire is ever trusted
to be short, shallow or simple. No sentence repeats what a frame holds.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from disagg.errors import DisaggError
from disagg.wire.messages import Message, ToHost, ToRouter

MAJOR = 1
MINOR = 1
KV_MINOR = 1
"""From this minor version on a router takes `KvDelta` and `KvSnapshot`."""
FRAME_LIMIT = 1024 * 1024
DEPTH_LIMIT = 16
VALUES_LIMIT = 8192
"""Values in a frame that must be looked at one by one; 64 engines need half of that."""

_MAGIC = b"dsg"
_HEADER = _MAGIC + bytes((MAJOR, MINOR))

M = TypeVar("M")


class FrameError(DisaggError):
    """A frame that cannot be read. Attribute `why`: one word for counters."""

    why = "garbage"


class FrameTooLargeError(FrameError):
    """Over `FRAME_LIMIT` bytes."""

    why = "too_large"


class FrameTooComplexError(FrameError):
    """More than `VALUES_LIMIT` values; or an array or map that promises more than the frame can hold."""

    why = "too_complex"


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
        FrameTooLargeError: it is over the limit, or holds a number of more than 64 bits, which no honest message does.
    """
    try:
        frame = _HEADER + _encoder.encode(message)
    except OverflowError as error:
        raise FrameTooLargeError(f"a {type(message).__name__} holds a number of more than 64 bits") from error
    if len(frame) > FRAME_LIMIT:
        raise FrameTooLargeError(f"a {type(message).__name__} of {len(frame)} bytes is over the limit of {FRAME_LIMIT}")
    return frame


class Reader(Generic[M]):
    """Decodes the frames of one direction."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._kinds = frozenset(kind.__struct_config__.tag for kind in union.__args__)

    def decode(self, frame: bytes) -> M:
        """A frame as a message.

        Raises:
            FrameError: one of its kinds; the sentence never quotes the frame.
        """
        if len(frame) > FRAME_LIMIT:
            raise FrameTooLargeError(f"a frame of {len(frame)} bytes is over the limit of {FRAME_LIMIT}")
        _check_header(frame)
        body = frame[len(_HEADER) :]
        if _needs_a_look(body) and depth(body) > DEPTH_LIMIT:
            raise FrameTooDeepError(f"a frame is nested more than {DEPTH_LIMIT} deep")
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise self._why_invalid(body, error) from None  # msgspec's own sentence may quote the frame, and a log would show it
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise FrameError("a frame is not valid msgpack") from None

    def _why_invalid(self, body: bytes, error: msgspec.ValidationError) -> FrameError:
        try:
            kind = _kind_of.decode(body).kind
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return FrameError("a frame holds no message: it has no kind")
        if kind not in to_router._kinds | to_host._kinds:
            return UnknownKindError("a frame holds a message of a kind that this release does not know")
        if kind not in self._kinds:
            return FrameError(f"a frame holds a message of the kind {kind}, which only the other side may send")
        return FrameError(f"a frame holds a message of the kind {kind} that is not one: {_without_quotes(str(error))}")


to_router: Reader[ToRouter] = Reader(ToRouter)
to_host: Reader[ToHost] = Reader(ToHost)


def _without_quotes(sentence: str) -> str:
    """What msgspec says as far as it speaks of our types; of a wrong word it shows the word itself."""
    said, at, path = sentence.rpartition(" - at ")
    said = said if at else sentence
    safe = said if said.startswith(("Expected ", "Object missing ")) else "a value that this release does not know"
    return f"{safe}{at}{path if at else ''}"


def _check_header(frame: bytes) -> None:
    if len(frame) < len(_HEADER) or not frame.startswith(_MAGIC):
        raise FrameError("a frame does not begin as one of disagg's")
    major, minor = frame[3], frame[4]
    if major != MAJOR:
        raise VersionError(
            f"the other side speaks version {major}.{minor} of the control protocol and this one {MAJOR}.{MINOR}:"
            " bring both to releases of the same major version"
        )


def minor_of(frame: bytes) -> int:
    """The minor version of whoever made a frame that could be decoded."""
    return frame[4]


_CONTAINERS = bytes((*range(0x80, 0xA0), *range(0xDC, 0xE0)))
_OTHERS = bytes(set(range(256)) - set(_CONTAINERS))
_HUGE = (b"\xdd", b"\xdf")  # an array and a map whose count has four bytes


def _needs_a_look(body: bytes) -> bool:
    """False when too few bytes could open an array or a map, and none a huge one: most frames end their check here, in C."""
    heads = body.translate(None, _OTHERS)
    return len(heads) > DEPTH_LIMIT or any(huge in heads for huge in _HUGE)


_NIL_TO_TRUE = dict.fromkeys(range(0xC0, 0xC4), 1)
_NUMBERS = {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
_FIXED_EXTENSIONS = {0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}
_ONE_BYTE = dict.fromkeys((*range(0x80), *range(0xE0, 0x100)), 1)
_SHORT_STRINGS = {first: 1 + (first & 0x1F) for first in range(0xA0, 0xC0)}
_FIXED = _NIL_TO_TRUE | _NUMBERS | _FIXED_EXTENSIONS | _ONE_BYTE | _SHORT_STRINGS  # first byte -> bytes of the whole value
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # first byte -> bytes of the count, items per element


def depth(body: bytes) -> int:
    """How deep arrays and maps are nested in a msgpack value; counts no further than just over the limit. An empty one adds no level.

    A body that ends too early is as deep as it got: the decoder says what is wrong with it.

    Raises:
        FrameTooComplexError: it has too many values, or promises more of them than it has bytes.
    """
    left = [1]  # items that each open container still expects
    deepest = at = seen = 0
    end = len(body)
    while at < end and deepest <= DEPTH_LIMIT:
        seen += 1
        if seen > VALUES_LIMIT:
            raise FrameTooComplexError(f"a frame holds more than {VALUES_LIMIT} values")
        left[-1] -= 1
        size = _FIXED.get(body[at])
        if size is None:
            size, items = _step(body, at)
            if items > end - at:
                raise FrameTooComplexError("an array or a map in a frame promises more than the frame holds")
            if items:
                left.append(items)
                deepest = max(deepest, len(left) - 1)
        at += size
        while left[-1] == 0:
            left.pop()
            if not left:
                return deepest
    return deepest


def _step(body: bytes, at: int) -> tuple[int, int]:
    """The bytes of a value of variable size, and the items that it contains."""
    first = body[at]
    if first < 0xA0:
        return 1, (first & 0x0F) * (2 if first < 0x90 else 1)
    if first in _SIZED:
        width, extra = _SIZED[first]
        return 1 + width + extra + int.from_bytes(body[at + 1 : at + 1 + width], "big"), 0
    width, per = _COUNTED[first]
    return 1 + width, per * int.from_bytes(body[at + 1 : at + 1 + width], "big")
