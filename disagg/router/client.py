"""The client's side of a connection: response heads made ready, bytes written straight to the transport.

aiohttp reads and parses requests; its response classes cost more than the rest of a relayed chunk, so answers of the generation routes
bypass them: the handler returns one of two shared response objects that write nothing, after everything was written here.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from disagg.model import Choice
from disagg.router.upstream import LAST_CHUNK, frame


class Written(web.Response):
    """Tells aiohttp that the answer is on its way already."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self._keep = keep

    @property
    def keep_alive(self) -> bool | None:
        """Whether aiohttp reads another request from this connection."""
        return self._keep

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Writes nothing."""
        return None

    async def write_eof(self, data: Any = b"") -> None:
        """Writes nothing."""


_REASONS = {status.value: status.phrase for status in HTTPStatus}
_KEEP, _CLOSE = Written(keep=True), Written(keep=False)


class Client:
    """Who asked.

    Args:
        request: aiohttp's request.
        request_id: ours, 32 hex digits.

    Attributes:
        started: bytes of the answer were written; from now on an error can only be an event in the stream.
        chunked: HTTP/1.1 clients get chunks; older ones get a body that ends with the connection.
    """

    __slots__ = ("_client_id", "_is_closing", "_keep", "_protocol", "_transport", "_write", "_writer", "chunked", "request_id", "started")

    def __init__(self, request: web.BaseRequest, request_id: str) -> None:
        transport = request.transport
        self.request_id = request_id
        self.started = False
        self.chunked = request.version >= (1, 1)
        self._keep = request.keep_alive and self.chunked
        self._protocol = request.protocol
        self._writer = request.writer
        if transport is None:
            raise ConnectionResetError("the client left before its request was handled")
        self._transport = transport
        self._write = transport.write
        self._is_closing = transport.is_closing
        self._client_id = request.headers.get("x-request-id")

    # --- writing

    def write(self, data: bytes) -> bool:
        """Writes bytes as they are; returns False when the client reads too slowly and `drain` should be awaited."""
        if not self._is_closing():
            self._write(data)
        return not self._protocol.writing_paused

    def start_stream(self, choice: Choice, attempt: int, first: bytes) -> bool:
        """Writes the head of an event stream together with its first bytes, framed already."""
        self.started = True
        framing = "Transfer-Encoding: chunked" if self.chunked else "Connection: close"
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
            f"{framing}\r\n{self._closing()}{self._headers(choice, attempt)}\r\n"
        )
        return self.write(head.encode() + first)

    def frame(self, payload: bytes) -> bytes:
        """Events, framed for this client."""
        return frame(payload) if self.chunked else payload

    def end_stream(self) -> None:
        """Ends an event stream."""
        if self.chunked:
            self.write(LAST_CHUNK)

    def send_whole(self, status: int, body: bytes, *, choice: Choice | None = None, attempt: int = 0, extra: str = "") -> None:
        """Writes a whole JSON answer in one write."""
        self.started = True
        head = (
            f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{self._closing()}{extra}{self._headers(choice, attempt)}\r\n"
        )
        self.write(head.encode() + body)

    def _closing(self) -> str:
        return "" if self._keep else "Connection: close\r\n"

    def _headers(self, choice: Choice | None, attempt: int) -> str:
        lines = f"x-request-id: {self.request_id}\r\n"
        if choice is not None:
            prefill = choice.prefill.id if choice.prefill is not None else choice.decode.id
            lines += f"x-disagg-prefill: {prefill}\r\nx-disagg-decode: {choice.decode.id}\r\nx-disagg-attempts: {attempt}\r\n"
        if self._client_id is not None and self._client_id.isascii() and self._client_id.isprintable():
            lines += f"x-client-request-id: {self._client_id[:200]}\r\n"
        return lines

    # --- flow

    async def drain(self, limit_s: float) -> None:
        """Waits until the client has read enough.

        Raises:
            ConnectionResetError: it did not within `limit_s` seconds; its connection is closed.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self._writer.drain()
        except TimeoutError as error:
            self._keep = False
            self._transport.abort()
            raise ConnectionResetError(f"the client read nothing for {limit_s:g} s") from error

    def must_close(self) -> None:
        """The connection cannot be used again: what was written does not end as its head promised."""
        self._keep = False

    def finished(self) -> web.Response:
        """What the handler returns."""
        return _KEEP if self._keep else _CLOSE
