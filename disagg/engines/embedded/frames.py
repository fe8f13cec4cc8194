"""The bytes of a KV handoff between two embedded engines: frames, their limits, and a reader that never copies a page.

One TCP connection carries one handoff. Decode connects; all integers are big-endian:

    header, 20 bytes:  kind u8 · zero u8 · zero u16 · length u32 · page u32 · position u32 · crc u32
    then ``length`` bytes of payload; ``crc`` is zlib.crc32 of the payload (of nothing: 0).

    decode → prefill                                     prefill → decode
    HELLO    who I am, the room, my page numbers         PROGRESS  you are in my queue and it moves
    CANCEL   stop writing; a sentence                    PAGE      bytes for your page ``page``, the ``position``-th
    ACK      ``position`` pages arrived, all sums right     END       all was sent; JSON of ``HandedOver``
                                                         STOPPED   I write nothing any more
                                                         FAIL      as STOPPED, and why; a sentence

A HELLO's payload is ``_HELLO`` and then its page numbers, u32 each. Its first 10 bytes (magic, version) stay where they
are in every version, so that two versions can at least tell each other that they differ.
"""

from __future__ import annotations

import enum
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAGIC = b"DISAGGKV"
VERSION = 1
MAX_PAGES = 1 << 16
MAX_SENTENCE_BYTES = 1024
MAX_END_BYTES = 1 << 16
MAX_PAGE_BYTES = 1 << 28

_HEADER = struct.Struct(">BBHIIII")
_HELLO = struct.Struct(">8sHHQ64s8s6I")
HEADER_BYTES = _HEADER.size


class ProtocolError(Exception):
    """The peer sent something that is no frame, or not one that may come now. One sentence."""


class Kind(enum.IntEnum):
    """What a frame says."""

    HELLO = 1
    CANCEL = 2
    ACK = 3
    PROGRESS = 16
    PAGE = 17
    END = 18
    STOPPED = 19
    FAIL = 20


_LIMITS = {
    Kind.HELLO: _HELLO.size + 4 * MAX_PAGES,
    Kind.CANCEL: MAX_SENTENCE_BYTES,
    Kind.ACK: 0,
    Kind.PROGRESS: 0,
    Kind.PAGE: MAX_PAGE_BYTES,
    Kind.END: MAX_END_BYTES,
    Kind.STOPPED: 0,
    Kind.FAIL: MAX_SENTENCE_BYTES,
}


class Header(NamedTuple):
    """The fixed part of a frame; ``page`` and ``position`` mean something in PAGE and ACK only."""

    kind: Kind
    length: int
    page: int
    position: int
    crc: int

    def pack(self) -> bytes:
        """The 20 bytes on the wire."""
        return _HEADER.pack(self.kind, 0, 0, self.length, self.page, self.position, self.crc)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Header:
        """Read a header.

        Raises:
            ProtocolError: unknown kind, or a length over the kind's limit.
        """
        kind, _, _, length, page, position, crc = _HEADER.unpack(data)
        try:
            known = Kind(kind)
        except ValueError:
            raise ProtocolError(f"a frame of the unknown kind {kind} came") from None
        if length > _LIMITS[known]:
            raise ProtocolError(f"a {known.name} frame of {length} bytes came, at most {_LIMITS[known]} are allowed")
        return cls(known, length, page, position, crc)


class Profile(NamedTuple):
    """What both engines must have in common for one to write into the other's pages.

    Attributes:
        model_hash: of the model folder, hex.
        dtype: of keys and values, NumPy's name.
        page_shape: of one page, ``(layers, 2, page_size, kv_heads, head_dim)``.
    """

    model_hash: str
    dtype: str
    page_shape: tuple[int, int, int, int, int]

    def difference(self, other: Profile) -> str | None:
        """What differs between this (prefill's) and the other (decode's) profile, as a sentence, or None."""
        if self.model_hash != other.model_hash:
            return f"the engines serve different models: prefill {self.model_hash}, decode {other.model_hash}"
        if self.page_shape[2] != other.page_shape[2]:
            return f"the engines' --page-size differs: prefill {self.page_shape[2]}, decode {other.page_shape[2]}"
        if (self.dtype, self.page_shape) != (other.dtype, other.page_shape):
            return f"the engines' KV pages differ: prefill {self[1:]}, decode {other[1:]}"
        return None


class Hello(NamedTuple):
    """Decode's first frame: write the keys and values of this room's prompt into these pages of mine.

    Attributes:
        room: the attempt's number, 63 bits.
        profile: of the decode engine.
        pages: page numbers of the decode engine, in the order of the prompt.
    """

    room: int
    profile: Profile
    pages: tuple[int, ...]

    def pack(self) -> bytes:
        """The whole frame."""
        profile = self.profile
        fixed = _HELLO.pack(
            MAGIC,
            VERSION,
            0,
            self.room,
            profile.model_hash.encode(),
            profile.dtype.encode(),
            *profile.page_shape,
            len(self.pages),
        )
        return frame(Kind.HELLO, fixed + struct.pack(f">{len(self.pages)}I", *self.pages))

    @classmethod
    def unpack(cls, payload: memoryview) -> Hello:
        """Read a HELLO's payload.

        Raises:
            ProtocolError: no HELLO of this version.
        """
        _check_greeting(payload)
        try:
            _, _, _, room, model_hash, dtype, *shape, count = _HELLO.unpack_from(payload)
            pages = struct.unpack_from(f">{count}I", payload, _HELLO.size)
            profile = Profile(_text(model_hash), _text(dtype), tuple(shape))
        except (struct.error, UnicodeDecodeError):
            raise ProtocolError("a HELLO frame is cut short or holds no text where a name belongs") from None
        if len(payload) != _HELLO.size + 4 * count or len(set(pages)) != count:
            raise ProtocolError("a HELLO frame does not hold the page numbers that it announces, each once")
        return cls(room, profile, pages)


def _check_greeting(payload: memoryview) -> None:
    if payload[:8] != MAGIC:
        raise ProtocolError("the peer does not speak disagg's KV transfer protocol")
    version = int.from_bytes(payload[8:10])
    if version != VERSION:
        raise ProtocolError(f"the engines speak different transfer protocols: {VERSION} here, {version} there")


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii")


class HandedOver(msgspec.Struct, frozen=True):
    """What prefill knows besides the pages: END's payload, JSON.

    Attributes:
        token: the first token of the answer.
        logprob: its natural logarithm of probability; None if the request wants none.
        top: most likely tokens at its place with their logprobs, best first; as many as the request asked for.
        cached_tokens: how many of the prompt's tokens came from prefill's prefix cache.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] = []
    cached_tokens: int = 0


def frame(kind: Kind, payload: bytes = b"", *, position: int = 0) -> bytes:
    """A whole control frame."""
    return Header(kind, len(payload), 0, position, zlib.crc32(payload)).pack() + payload


def sentence_frame(kind: Kind, sentence: str) -> bytes:
    """A CANCEL or FAIL frame; a sentence that is too long is cut."""
    return frame(kind, sentence.encode()[:MAX_SENTENCE_BYTES])


def sentence_of(payload: memoryview) -> str:
    """The sentence of a CANCEL or FAIL frame, printable characters only: it ends in logs and answers."""
    text = bytes(payload).decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text)


def end_frame(handed: HandedOver) -> bytes:
    """An END frame."""
    return frame(Kind.END, msgspec.json.encode(handed))


def handed_of(payload: memoryview) -> HandedOver:
    """Read END's payload.

    Raises:
        ProtocolError: it is not what END carries.
    """
    try:
        return msgspec.json.decode(payload, type=HandedOver)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"an END frame cannot be read: {error}") from None


def page_header(page: int, position: int, content: memoryview) -> bytes:
    """The header that goes before a page's bytes."""
    return Header(Kind.PAGE, len(content), page, position, zlib.crc32(content)).pack()


class Frame(NamedTuple):
    """A received frame. A PAGE's payload is the target page itself; other payloads are the reader's own buffer."""

    header: Header
    payload: memoryview

    @property
    def intact(self) -> bool:
        """Whether the payload is what the sender computed the sum of."""
        return zlib.crc32(self.payload) == self.header.crc


class FrameReader:
    """Cuts a byte stream into frames; PAGE payloads are read straight to where they belong.

    The caller fills ``buffer()`` and says how much it filled (the shape of asyncio's BufferedProtocol).

    Args:
        place: says where a PAGE's payload goes; it raises ProtocolError for a page that this peer may not write.
    """

    def __init__(self, place: Callable[[Header], memoryview]) -> None:
        self._place = place
        self._header_bytes = memoryview(bytearray(HEADER_BYTES))
        self._header: Header | None = None
        self._target = self._header_bytes
        self._filled = 0

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._target[self._filled :]

    def filled(self, count: int) -> Frame | None:
        """``count`` bytes were put into ``buffer()``. Returns the frame that they complete, if any.

        Raises:
            ProtocolError: the stream is not frames; nothing more can be read from it.
        """
        self._filled += count
        if self._header is None and self._filled == HEADER_BYTES:
            self._start(Header.unpack(self._header_bytes))
        if self._header is None or self._filled < len(self._target):
            return None
        done = Frame(self._header, self._target)
        self._header, self._target, self._filled = None, self._header_bytes, 0
        return done

    def _start(self, header: Header) -> None:
        self._target = self._place(header) if header.kind is Kind.PAGE else memoryview(bytearray(header.length))
        if len(self._target) != header.length:
            raise ProtocolError(f"a page of {header.length} bytes came, pages here have {len(self._target)}")
        self._header, self._filled = header, 0


def feed(reader: FrameReader, data: Sequence[int] | bytes) -> list[Frame]:
    """Push bytes through a reader, as a transport would. For tests and for callers that hold bytes already."""
    frames: list[Frame] = []
    rest = memoryview(bytes(data))
    while rest:
        target = reader.buffer()
        count = min(len(target), len(rest))
        target[:count] = rest[:count]
        rest = rest[count:]
        complete = reader.filled(count)
        if complete is not None:
            frames.append(complete)
    return frames
