"""Connections to engines: a small HTTP/1.1 client on `asyncio.Protocol`.

Why not a client library: towards engines the router sends one prepared POST and relays what comes, and the library's request and stream
objects cost more CPU than all the rest (PEERS: 162 against 33 µs per request). One slotted protocol class reads response heads and walks
chunk frames; what it finds goes to the *leg* that uses the connection at the moment.
"""

from __future__ import annotations

import asyncio
import errno
import math
import re
import resource
from collections.abc import Callable, Iterator
from typing import Protocol, cast

from disagg.errors import EngineError, NoCapacityError
from disagg.model import EngineAddress
from disagg.router.gate import ENGINE_SHARE

IDLE_LIMIT_S = 3.0  # SGLang's HTTP server closes at 5 s: drop idle connections sooner, so that a request never meets a closing one
STALE_WITHIN_S = 0.05  # an idle connection that the engine has closed says so within a round trip; later it is the engine that fails
HEAD_LIMIT = 64 * 1024
FRAME_LIMIT = 16 * 1024 * 1024
CHUNK_LINE_LIMIT = 20

LAST_CHUNK = b"0\r\n\r\n"

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})[ \r]")
_CLOSES = re.compile(rb"\r\nconnection:[^\r]*\bclose\b")  # these four look at a head in lower case
_IS_STREAM = re.compile(rb"\r\ncontent-type:[ \t]*text/event-stream")
_IS_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*\bchunked[ \t]*\r")
_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([^\r]*?)[ \t]*\r")

_IDLE, _HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE = range(5)


class Leg(Protocol):
    """What uses a connection for one exchange. Called in this order: head, then payload or frames, then ended or broken."""

    def head(self, status: int, *, is_stream: bool) -> None:
        """The response head arrived."""

    def payload(self, data: bytes) -> None:
        """Bytes of a body that is not chunked."""

    def frames(self, raw: bytes, aligned: bool) -> None:
        """Whole HTTP chunks, framing included; never the last one. `aligned`: each of them ends where a server-sent event ends."""

    def ended(self) -> None:
        """The response is complete; the connection is back in its pool."""

    def broken(self, error: EngineError, *, stale: bool) -> None:
        """The connection is gone. `stale`: it was reused and died at once, as an idle one does that the engine just closed."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to one engine."""

    __slots__ = (
        "_keep",
        "_left",
        "_paused",
        "_phase",
        "_tail",
        "_upstream",
        "closed",
        "idle_since",
        "leg",
        "reused",
        "saw_bytes",
        "sent_at",
        "transport",
    )

    def __init__(self, upstream: Upstream) -> None:
        self.transport: asyncio.Transport | None = None
        self.leg: Leg | None = None
        self.idle_since = 0.0
        self.reused = False
        self.saw_bytes = False
        self.sent_at = 0.0
        self.closed = False
        self._upstream = upstream
        self._phase = _IDLE
        self._tail = b""
        self._left = 0
        self._keep = True
        self._paused = False

    @property
    def file(self) -> int:
        """The number of its file, -1 when it is closed."""
        connected = self.transport.get_extra_info("socket") if self.transport is not None else None
        return -1 if connected is None else connected.fileno()

    def send(self, leg: Leg, request: bytes) -> None:
        """Starts an exchange."""
        assert self.transport is not None
        self.leg = leg
        self._phase = _HEAD
        self.saw_bytes = False
        self.sent_at = self._upstream.clock()
        if self.closed:  # the engine closed it while the other leg's connection was being made
            self.reused = True
            self._upstream.soon(self.connection_lost, None)
        else:
            self.transport.write(request)

    def abandon(self) -> None:
        """Closes at once; the leg hears nothing more."""
        self.leg = None
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def pause(self) -> None:
        """Stops reading: the client is slower than the engine."""
        if self.transport is not None and not self.closed and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Reads again."""
        if self.transport is not None and not self.closed and self._paused:
            self._paused = False
            self.transport.resume_reading()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`; uvloop and asyncio switch TCP_NODELAY on themselves."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's class does not inherit from asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of `asyncio.Protocol`."""
        self.closed = True
        self._upstream.forget(self)
        leg, self.leg = self.leg, None
        if leg is None:
            return
        if self._phase == _UNTIL_CLOSE and exc is None:
            leg.ended()
            return
        why = "closed the connection before its answer was complete" if exc is None else f"broke the connection ({exc})"
        stale = self.reused and not self.saw_bytes and self._upstream.clock() - self.sent_at < STALE_WITHIN_S
        leg.broken(EngineError(f"the engine {self._upstream.address.id} {why}"), stale=stale)

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        self.saw_bytes = True
        if self._tail:
            data = self._tail + data
            self._tail = b""
        try:
            if self._phase == _CHUNKED:
                self._walk(data)
            elif self._phase == _HEAD:
                self._read_head(data)
            elif self._phase == _LENGTH:
                self._read_length(data)
            elif self._phase == _UNTIL_CLOSE:
                self._deliver(data)
            else:
                self.abandon()  # an engine that speaks unasked is not to be trusted with the next request
        except ValueError as error:
            self._garbage(str(error))

    # --- parsing

    def _read_head(self, data: bytes) -> None:
        start, status, head = 0, 100, b""
        while status < 200:  # interim answers come before the real head
            end = data.find(b"\r\n\r\n", start)
            if end < 0:
                if len(data) - start > HEAD_LIMIT:
                    raise ValueError("its response head has no end")
                self._tail = data[start:]
                return
            line = _STATUS_LINE.match(data, start)
            if line is None:
                raise ValueError("what it sent is not HTTP")
            status = int(line[1])
            head = data[start:end].lower() + b"\r\n"
            start = end + 4
        self._keep = head.startswith(b"http/1.1") and _CLOSES.search(head) is None
        self._set_framing(head, status)
        leg = self.leg
        assert leg is not None
        leg.head(status, is_stream=_IS_STREAM.search(head) is not None)
        rest = data[start:]
        if self._phase == _CHUNKED:
            if rest and self.leg is leg:
                self._walk(rest)
        elif self._phase == _LENGTH:
            self._read_length(rest)
        elif rest:
            self._deliver(rest)

    def _set_framing(self, head: bytes, status: int) -> None:
        if _IS_CHUNKED.search(head) is not None:
            self._phase = _CHUNKED
        elif (length := _LENGTH_LINE.search(head)) is not None:
            self._phase = _LENGTH
            if not length[1].isdigit() or len(length[1]) > 15:
                raise ValueError("its content-length is not a number")
            self._left = int(length[1])
        elif status in {204, 304}:
            self._phase, self._left = _LENGTH, 0
        else:
            self._phase, self._keep = _UNTIL_CLOSE, False

    def _read_length(self, data: bytes) -> None:
        if len(data) > self._left:
            raise ValueError("it sent more than its content-length")
        self._left -= len(data)
        if data:
            self._deliver(data)
        if self._left == 0:
            self._complete()

    def _deliver(self, data: bytes) -> None:
        if self.leg is not None:
            self.leg.payload(data)

    def _walk(self, data: bytes) -> None:  # noqa: C901  # the hot loop: a call per chunk would cost more than it explains
        """Finds the end of the last whole chunk and passes on what stands before it; a partial chunk waits for the next read."""
        # A token at a time is the usual read: one chunk of whole events.
        eol = data.find(b"\r\n", 0, CHUNK_LINE_LIMIT)
        if data[-4:] == b"\n\n\r\n" and 0 < eol < len(data) - 5 and data[:eol] == b"%x" % (len(data) - eol - 4) and self.leg is not None:
            self.leg.frames(data, True)
            return
        at, size, whole = 0, len(data), 0
        ended, aligned, broken = False, True, False
        try:
            while at < size:
                eol = data.find(b"\r\n", at, at + CHUNK_LINE_LIMIT)
                if eol < 0:
                    broken = size - at >= CHUNK_LINE_LIMIT
                    break
                length = int(data[at:eol], 16)
                following = eol + 4 + length
                if following > size or length <= 0:
                    ended = length == 0 and following <= size
                    broken = not 0 <= length <= FRAME_LIMIT or (ended and data[eol + 2 : following] != b"\r\n")
                    at = following if ended else at
                    break
                if data[following - 2] != 13:  # every chunk ends with CR LF
                    broken = True
                    break
                if length < 2 or data[following - 4 : following - 2] != b"\n\n":  # of a single LF the other one is its framing's
                    aligned = False
                whole = at = following
        except ValueError:
            broken = True
        leg = self.leg
        if whole and leg is not None:
            leg.frames(data if whole == size else data[:whole], aligned)
        if broken or (ended and at < size):
            raise ValueError("its chunk framing is broken")
        if ended:
            self._complete()
        elif at < size:
            self._tail = data[at:]

    def _complete(self) -> None:
        leg, self.leg = self.leg, None
        self._phase = _IDLE
        self.resume()
        if self._keep and not self.closed:
            self._upstream.give_back(self)
        elif self.transport is not None:
            self.transport.close()
        if leg is not None:
            leg.ended()

    def _garbage(self, why: str) -> None:
        leg = self.leg
        self.abandon()
        if leg is not None:
            leg.broken(EngineError(f"the engine {self._upstream.address.id} sent garbage: {why}"), stale=False)


class Upstream:
    """One engine's connections and prepared request heads.

    Connections are reused last in, first out, so that a pool shrinks to what the load needs.
    """

    __slots__ = ("_heads", "_idle", "_loop", "_open", "address", "clock")

    def __init__(self, address: EngineAddress, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self.address = address
        self.clock = clock
        self._loop = loop
        self._heads: dict[str, bytes] = {}
        self._idle: list[UpstreamConnection] = []
        self._open: dict[UpstreamConnection, None] = {}  # in the order of their making

    def request(self, path: str, *body: bytes) -> bytes:
        """The bytes of a POST."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._head(path)
        return b"".join((head, b"%d\r\n\r\n" % sum(map(len, body)), *body))

    def _head(self, path: str) -> bytes:
        address = self.address
        host = address.url.removeprefix("http://")
        key = f"Authorization: Bearer {address.api_key}\r\n" if address.api_key else ""
        return f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{key}Content-Length: ".encode()

    def take(self) -> UpstreamConnection | None:
        """An idle connection, or None when a new one must be made."""
        oldest = self.clock() - IDLE_LIMIT_S
        while self._idle:
            connection = self._idle.pop()
            if connection.closed or connection.idle_since < oldest:
                connection.abandon()
                continue
            connection.reused = True
            return connection
        return None

    async def connect(self, limit_s: float) -> UpstreamConnection:
        """Makes a new connection.

        Raises:
            EngineError: the engine refused it or did not answer within `limit_s` seconds.
            NoCapacityError: this process has too many files open.
        """
        address = self.address
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await self._loop.create_connection(lambda: UpstreamConnection(self), address.host, address.port)
        except TimeoutError as error:
            raise EngineError(f"the engine {address.id} at {address.url} could not be connected in {limit_s:g} s") from error
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                raise _no_files_left() from error
            raise EngineError(f"the engine {address.id} at {address.url} refused the connection") from error
        if not connection.closed and connection.file >= _files_for_engines():
            connection.abandon()
            raise _no_files_left()
        if not connection.closed:
            self._open[connection] = None
        return connection

    def soon(self, call: Callable[..., object], *args: object) -> None:
        """Calls in the loop's next round."""
        self._loop.call_soon(call, *args)

    def give_back(self, connection: UpstreamConnection) -> None:
        """Takes a connection back after a complete exchange, or one that was not used."""
        connection.idle_since = self.clock()
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """The connection is gone."""
        self._open.pop(connection, None)
        if connection in self._idle:
            self._idle.remove(connection)

    def prune(self) -> None:
        """Closes connections that were idle for too long."""
        oldest = self.clock() - IDLE_LIMIT_S
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).abandon()

    def close(self) -> None:
        """Closes everything at once."""
        self._idle.clear()
        for connection in list(self._open):
            connection.abandon()

    def __repr__(self) -> str:
        return f"<Upstream {self.address.id} open={len(self._open)} idle={len(self._idle)}>"


def _files_for_engines() -> float:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit * ENGINE_SHARE


def _no_files_left() -> NoCapacityError:
    return NoCapacityError("this router has as many connections as it can take; come again", retry_after_s=1)


def unframe(raw: bytes) -> Iterator[bytes]:
    """The payloads of whole HTTP chunks."""
    at = 0
    while at < len(raw):
        eol = raw.index(b"\r\n", at)
        length = int(raw[at:eol], 16)
        yield raw[eol + 2 : eol + 2 + length]
        at = eol + 4 + length


def frame(payload: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(payload), payload)
