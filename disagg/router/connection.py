"""A client's connection: refused at once where there are too many, ended where its requests come too slowly.

aiohttp parses; it knows no deadline for a request's head and no limit on connections. Both are added here, around its protocol class, at a
cost per connection and per read of a request, none per chunk of an answer.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from aiohttp import http_parser, web
from aiohttp.http_parser import RawRequestMessage

from disagg.errors import BodyTooLargeError, RequestError, SlowRequestError, StartError
from disagg.router.gate import CHUNKS_LIMIT, HEAD_LIMIT_S, Gate, body_due_s
from disagg.router.openai import error_object

FAREWELL_S = 1.0
COMPLAINT_S = 1.0
_PATIENCE_STEP_S = 0.25

_KINDS = {408: "invalid_request_error", 429: "rate_limit_exceeded", 503: "service_unavailable"}


def _last_words(status: int, sentence: str, retry_after_s: int = 0) -> bytes:
    body = msgspec.json.encode(error_object(sentence, kind=_KINDS[status]))
    retry = f"Retry-After: {retry_after_s}\r\n" if retry_after_s else ""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{retry}Connection: close\r\n\r\n".encode() + body


_REFUSALS = {
    "files": _last_words(503, "this router has as many connections as it can take; come again", 1),
    "address": _last_words(429, "too many connections from this address; close some, or share them between requests", 1),
}


class Server(web.Server):
    """Makes connections.

    Attributes:
        farewells: connections that were refused and have not yet read why.
        head_limit_s: how long the head of a request may take.
    """

    def __init__(
        self, handler: Any, *, gate: Gate, log: structlog.typing.FilteringBoundLogger, head_limit_s: float = HEAD_LIMIT_S, **kwargs: Any
    ) -> None:
        super().__init__(handler, **kwargs)
        if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
            raise StartError("aiohttp has no C parser here, and its Python parser is not strict enough: install aiohttp from a wheel")
        self.log = log
        self.gate = gate
        self.head_limit_s = head_limit_s
        self.farewells = 0
        self._told = 0
        self._told_at = -COMPLAINT_S

    def __call__(self) -> web.RequestHandler:
        """Called for each connection."""
        return Connection(self, loop=self._loop, **self._kwargs)

    def close_idle(self) -> bool:
        """Closes the connections on which nothing is under way; says whether that were all."""
        closed = [c.close_if_idle() for c in self.connections if isinstance(c, Connection)]
        return all(closed)

    def complain(self) -> None:
        """Says that connections are refused, not more often than once in a second."""
        now = self._loop.time()
        if now < self._told_at + COMPLAINT_S:
            return
        total = self.gate.refused.total()
        self.log.warning("connections were refused", since_the_last_line=total - self._told, **self.gate.refused)
        self._told, self._told_at = total, now


class Connection(web.RequestHandler):
    """One client's connection.

    Attributes:
        address: of the client; empty where it has none.
    """

    __slots__ = ("_bye", "_head_timer", "_heard", "_let_in", "_server", "address")

    def __init__(self, server: Server, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._server = server
        self.address = ""
        self._let_in = False
        self._heard = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._bye: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        peer = transport.get_extra_info("peername")
        connected = transport.get_extra_info("socket")
        self.address = peer[0] if isinstance(peer, tuple) else ""
        reason = self._server.gate.enter(self.address, connected.fileno() if connected is not None else 0)
        if reason:
            self._refuse(transport, _REFUSALS[reason])
            return
        self._let_in = True
        super().connection_made(transport)
        self._head_timer = self._loop.call_later(self._server.head_limit_s, self._head_is_late)

    def _refuse(self, transport: Any, words: bytes) -> None:
        """Closing with unread bytes would reset the connection, and the client might never read why: some get a moment for that."""
        server = self._server
        server.complain()
        transport.write(words)
        if server.farewells >= server.gate.farewells:
            transport.close()
            return
        server.farewells += 1
        transport.write_eof()
        self._bye = self._loop.call_later(FAREWELL_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        if not self._let_in:
            return
        count = self._request_count
        super().data_received(data)
        if self._request_count != count:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            if self._messages and not isinstance(self._messages[-1][0], RawRequestMessage):
                self._break_body()
        elif data:
            self._heard = True
            waiter = self._waiter
            if self._head_timer is None and waiter is not None and not waiter.done():  # it waits for a head, and these are not its end
                self._head_timer = self._loop.call_later(self._server.head_limit_s, self._head_is_late)

    def close_if_idle(self) -> bool:
        """Closes it where no request is under way; says whether that was so."""
        if self._waiter is None or self._messages:
            return False
        self.close()
        return True

    def _break_body(self) -> None:
        """What came is not HTTP. aiohttp keeps that for the next request, but whoever waits for the rest of a body waits in vain."""
        request = self._current_request
        if request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("the body is not valid HTTP"))

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._heard and self.transport is not None:
            self.transport.write(_last_words(408, f"the head of the request did not arrive within {self._server.head_limit_s:g} s"))
        self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Part of `asyncio.Protocol`."""
        for timer in (self._head_timer, self._bye):
            if timer is not None:
                timer.cancel()
        self._head_timer = None
        if self._let_in:
            self._server.gate.leave(self.address)
            super().connection_lost(exc)
        elif self._bye is not None:
            self._server.farewells -= 1

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Called by aiohttp when a request is not HTTP, or when a handler raised: an OpenAI error object, and no traceback for bad HTTP."""
        if status == 500:
            self._server.log.error("a request failed outside of its handler", exc_info=exc)
        sentence = "the request is not valid HTTP/1.1" if status == 400 else "disagg failed on this request"
        response = error_response(status, sentence)
        response.force_close()
        return response


def hurry(request: web.BaseRequest) -> None:
    """What the client still sends is not waited for: the connection ends with the answer."""
    request.protocol._lingering_time = 0.0  # noqa: SLF001  # a setting of all connections, which is to differ for this one


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """Reads a body that did not come in one piece with its head.

    Args:
        request: its head was read.
        limit: bytes.

    Raises:
        BodyTooLargeError: it is larger.
        SlowRequestError: it comes too slowly.
        RequestError: it is cut into too many chunks, or its chunks are not HTTP.
        ConnectionResetError: the client left.
    """
    loop, content = asyncio.get_running_loop(), request.content
    began = loop.time()
    parts: list[bytes] = []
    size = chunks = 0
    try:
        async with asyncio.timeout_at(began + body_due_s(0)) as patience:
            while True:
                data, is_end = await content.readchunk()
                if not data and not is_end:
                    return b"".join(parts)
                parts.append(data)
                size += len(data)
                chunks += is_end
                if size > limit:
                    raise BodyTooLargeError(f"the body is over the limit of {limit} bytes")
                if chunks > CHUNKS_LIMIT:
                    raise RequestError(f"the body came in more than {CHUNKS_LIMIT} chunks: send larger ones")
                due = began + body_due_s(size)
                if due > (patience.when() or 0.0) + _PATIENCE_STEP_S:
                    patience.reschedule(due)
    except TimeoutError as error:
        raise SlowRequestError(f"the body came too slowly: {size} bytes in {loop.time() - began:.0f} s") from error
    except web.RequestPayloadError as error:
        raise RequestError("the chunks of the body are not valid HTTP/1.1") from error


def error_response(status: int, sentence: str, headers: dict[str, str] | None = None) -> web.Response:
    """An OpenAI error object as aiohttp's answer."""
    kind = "invalid_request_error" if status < 500 else "service_unavailable" if status == 503 else "internal_error"
    body = msgspec.json.encode(error_object(sentence, kind=kind))
    return web.Response(status=status, reason=HTTPStatus(status).phrase, body=body, content_type="application/json", headers=headers)
