"""The public listener.

It is aiohttp's low-level server with a dict lookup on the raw path: no router, no middleware, no response classes on the way
of a token. `handler_cancellation` is on, so that a client that leaves cancels its handler and through it both engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from disagg.errors import BodyTooLargeError, ClientGoneError, DeadlineError, DisaggError, NoCapacityError, RequestError
from disagg.ids import Ids
from disagg.model import ClusterView
from disagg.observe.metrics import RouterMetrics
from disagg.router.client import Client
from disagg.router.compose import Composition
from disagg.router.legs import WholeLeg
from disagg.router.merge import sample_bodies
from disagg.router.openai import ClientRequest, Route, error_body, error_event, error_object, models_body, parse_request
from disagg.router.owner import Owner
from disagg.router.relay import Job, Record, Relay
from disagg.router.stream import Stream

BODY_TIMEOUT_S = 30.0
KEEPALIVE_S = 75.0

_ROUTES = {route.value: route for route in Route}
_GET_PATHS = frozenset({"/healthz", "/readyz", "/v1/models"})


class PublicListener:
    """Handles the requests of clients.

    Args:
        body_limit: the largest body, in bytes.
        started_at: Unix seconds; only shown, as the creation time of models.

    Attributes:
        draining: it is about to end: not ready, and connections end with their answer.
        refuses: new requests are refused while it drains; not where the next process will accept those who connect from now on.
    """

    def __init__(
        self,
        *,
        relay: Relay,
        owner: Owner,
        view: Callable[[], ClusterView],
        metrics: RouterMetrics,
        ids: Ids,
        body_limit: int,
        started_at: int,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.draining = False
        self.refuses = True
        self._relay = relay
        self._owner = owner
        self._view = view
        self._metrics = metrics
        self._ids = ids
        self._body_limit = body_limit
        self._started_at = started_at
        self._log = log

    def server(self) -> PublicServer:
        """The protocol factory to listen with."""
        server = PublicServer(
            self.handle,
            request_factory=self._make_request,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            lingering_time=2.0,
            max_line_size=8190,
            max_field_size=16 * 1024,
        )
        server.log = self._log
        return server

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: Any,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, self._relay.loop, client_max_size=self._body_limit)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request. Every error ends here as an OpenAI error object or as an event."""
        path = request.raw_path
        route = _ROUTES.get(path)
        if route is None:
            path = path.partition("?")[0]
            route = _ROUTES.get(path)
        if route is not None and request.method == "POST":
            return await self._generate(request, path, route)
        return await self._other(request, path)

    # --- generation

    async def _generate(self, http: web.BaseRequest, path: str, route: Route) -> web.StreamResponse:
        relay, metrics = self._relay, self._metrics
        client = Client(http, self._ids.request_id())
        record = Record(client.request_id, path, relay.clock())
        if self.draining:
            client.must_close()
        relay.remember(record)
        metrics.inflight += 1
        try:
            await self._serve(http, route, client, record)
            record.outcome = "ok"
        except DisaggError as error:
            self._fail(client, record, error)
        except ConnectionResetError as error:
            self._fail(client, record, ClientGoneError(str(error)))
        except asyncio.CancelledError:
            record.outcome = "client_gone"
            raise
        except Exception as error:  # noqa: BLE001  # one request's failure must not become another's; it is counted and logged
            self._log.exception("a request failed by a fault of disagg", request=client.request_id)
            self._fail(client, record, DisaggError(f"disagg failed on this request ({type(error).__name__}); its log says why"))
        finally:
            metrics.inflight -= 1
            metrics.requests[path, record.outcome] += 1
        return client.finished()

    async def _serve(self, http: web.BaseRequest, route: Route, client: Client, record: Record) -> None:
        if self.draining and self.refuses:
            raise NoCapacityError("this router is shutting down; ask again", retry_after_s=2)
        deadline_at = self._deadline(http, record.started_at)
        request = parse_request(route, await self._body(http, client))
        record.model = request.model
        owner = self._owner
        owner.check(request)
        split = request.samples > 1 and (request.stream or owner.may_pair(request))
        bodies = sample_bodies(request) if split else [request.rest]
        jobs = [Job(request, body, sample, deadline_at, record) for sample, body in enumerate(bodies)]
        if len(bodies) > 1 or request.merge_logprobs:
            await Composition(owner, self._metrics, request, client, jobs).answer()
        elif request.stream:
            await self._serve_stream(request, jobs[0], client)
        else:
            await self._serve_whole(jobs[0], client)

    async def _serve_stream(self, request: ClientRequest, job: Job, client: Client) -> None:
        stream = Stream(request, job.rest, self._metrics.itl.observe)
        try:
            await self._owner.run(job, lambda attempt, number: stream.leg(attempt, number, client), client, stream)
            self._metrics.ttft.observe(stream.first_token_at - job.record.started_at)
        finally:
            stream.journal.fold()

    async def _serve_whole(self, job: Job, client: Client) -> None:
        attempt = await self._owner.run(job, lambda attempt, _number: WholeLeg(attempt), client)
        leg = attempt.decode_leg
        assert isinstance(leg, WholeLeg)
        client.send_whole(200, leg.body, choice=attempt.choice, attempt=job.attempts)
        attempt.decode_leg = None  # leg and attempt know each other: without this only the garbage collector would free the answer

    def _deadline(self, http: web.BaseRequest, now: float) -> float | None:
        text = http.headers.get("x-disagg-deadline-ms")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and int(text[:12]) > 0):
            raise RequestError("`x-disagg-deadline-ms` takes a whole number of milliseconds, at least 1", param="x-disagg-deadline-ms")
        return now + int(text[:12]) / 1000

    async def _body(self, http: web.BaseRequest, client: Client) -> bytes:
        headers, content = http.headers, http.content
        if "Content-Encoding" in headers:
            client.must_close()
            raise RequestError("send the body as it is: compressed bodies are not read", code="unsupported_encoding")
        if (http.content_length or 0) > self._body_limit:
            raise self._too_large(client)
        if content.is_eof():  # it came in one piece with its head, as nearly all do
            body = content.read_nowait(-1)
            if len(body) > self._body_limit:
                raise self._too_large(client)
            return body
        if "Expect" in headers:
            client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await http.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise self._too_large(client) from error
        except TimeoutError as error:
            client.must_close()
            raise RequestError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from error

    def _too_large(self, client: Client) -> BodyTooLargeError:
        client.must_close()
        return BodyTooLargeError(f"the body is over the limit of {self._body_limit} bytes")

    def _fail(self, client: Client, record: Record, error: DisaggError) -> None:
        record.outcome = _outcome(error)
        record.error = str(error)
        if isinstance(error, NoCapacityError):
            self._metrics.shed["draining" if self.draining else "no_engine"] += 1
        if record.outcome not in {"client_error", "client_gone", "deadline"}:
            self._log.warning("request failed", request=client.request_id, outcome=record.outcome, error=str(error))
        if isinstance(error, ClientGoneError):
            client.must_close()
        elif client.started:
            client.write(client.frame(error_event(error)))
            client.end_stream()
        else:
            retry = f"Retry-After: {error.retry_after_s}\r\n" if isinstance(error, NoCapacityError) else ""
            choice = record.trail[-1][0] if record.trail else None
            client.send_whole(error.status, error_body(error), choice=choice, attempt=len(record.trail), extra=retry)

    # --- the rest

    async def _other(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        if path in _ROUTES:
            return _error(405, f"{path} takes POST", headers={"Allow": "POST"})
        if path not in _GET_PATHS:
            known = ", ".join(sorted([*_ROUTES, *_GET_PATHS]))
            return _error(404, f"there is nothing at {path[:200]!r}; there is {known}")
        if request.method not in {"GET", "HEAD"}:
            return _error(405, f"{path} takes GET", headers={"Allow": "GET, HEAD"})
        if path == "/healthz":
            return web.json_response({"status": "alive"})
        return self._models() if path == "/v1/models" else self._ready()

    def _models(self) -> web.Response:
        pools = self._view().pools
        contexts = {name: min((e.facts.context_tokens for e in (*p.decode, *p.unified)), default=0) for name, p in pools.items()}
        return web.Response(body=models_body(contexts, created=self._started_at), content_type="application/json")

    def _ready(self) -> web.Response:
        reason = "this router is shutting down" if self.draining else self._view().why_not_ready()
        if not reason:
            return web.json_response({"status": "ready"})
        return _error(503, reason, headers={"Retry-After": "2"})


class _Connection(web.RequestHandler):
    """Answers HTTP that cannot be parsed with an OpenAI error object, and logs no traceback for it."""

    __slots__ = ()

    def close_if_idle(self) -> bool:
        """Closes it where no request is under way; says whether that was so."""
        if self._waiter is None or self._messages:
            return False
        self.close()
        return True

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Called by aiohttp when a request is not HTTP, or when a handler raised."""
        if status == 500 and isinstance(self._manager, PublicServer):
            self._manager.log.error("a request failed outside of its handler", exc_info=exc)
        sentence = "the request is not valid HTTP/1.1" if status == 400 else "disagg failed on this request"
        response = _error(status, sentence)
        response.force_close()
        return response


class PublicServer(web.Server):
    """aiohttp's server with connections that can be emptied."""

    log: structlog.typing.FilteringBoundLogger

    def close_idle(self) -> bool:
        """Closes the connections on which nothing is under way; says whether that were all."""
        closed = [c.close_if_idle() for c in self.connections if isinstance(c, _Connection)]
        return all(closed)

    def __call__(self) -> web.RequestHandler:
        """A client has connected."""
        return _Connection(self, loop=self._loop, **self._kwargs)


def _outcome(error: DisaggError) -> str:
    if isinstance(error, ClientGoneError):
        return "client_gone"
    if isinstance(error, NoCapacityError):
        return "no_capacity"
    if isinstance(error, DeadlineError):
        return "deadline"
    if 400 <= error.status < 500:
        return "client_error"
    return "engine_error" if error.kind == "engine_error" else "internal_error"


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "service_unavailable" if status == 503 else "internal_error"
    body = msgspec.json.encode(error_object(sentence, kind=kind))
    return web.Response(status=status, reason=HTTPStatus(status).phrase, body=body, content_type="application/json", headers=headers)
