"""The public listener.

It is aiohttp's low-level server with a dict lookup on the raw path: no router, no middleware, no response classes on the way
of a token. `handler_cancellation` is on, so that a client that leaves cancels its handler and through it both engines.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any

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
from disagg.router.connection import Connection, Server, error_response, hurry, read_body
from disagg.router.gate import Gate
from disagg.router.legs import WholeLeg
from disagg.router.merge import sample_bodies
from disagg.router.openai import ClientRequest, Route, error_body, error_event, models_body, parse_request
from disagg.router.owner import Owner
from disagg.router.relay import Job, Record, Relay
from disagg.router.stream import Stream

KEEPALIVE_S = 75.0
LARGE_BODY = 256 * 1024
"""A larger body is parsed in a thread, one at a time, so that the loop turns meanwhile."""
TELL_SHED_S = 10.0
SAMPLES_LIMIT = 64 * 1024 * 1024
"""Bytes that one request may become when it is split into samples."""

_QUIET = frozenset({"client_error", "client_gone", "deadline", "no_capacity"})
"""Outcomes that happen in masses when clients or the load are wild: they are counted and not logged one by one."""
PRIORITIES = 100
"""From minus this to this."""

_ROUTES = {route.value: route for route in Route}
_PRIORITY = re.compile(r"-?[0-9]{1,3}", re.ASCII)
_GET_PATHS = frozenset({"/healthz", "/readyz", "/v1/models"})


class PublicListener:
    """Handles the requests of clients.

    Args:
        body_limit: the largest body, in bytes.
        gate: counts the connections.
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
        gate: Gate,
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
        self._gate = gate
        self._reader = ThreadPoolExecutor(1, "large bodies")
        self._started_at = started_at
        self._log = log
        self._shed_told = 0
        self._shed_told_at = -inf

    def server(self) -> Server:
        """The protocol factory to listen with.

        Raises:
            StartError: aiohttp was installed without its C parser.
        """
        return Server(
            self.handle,
            gate=self._gate,
            log=self._log,
            request_factory=self._make_request,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            lingering_time=2.0,
            max_line_size=8190,
            max_field_size=16 * 1024,
        )

    def close(self) -> None:
        """Nothing is listened to any more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: Any,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        if message.upgrade:
            message = message._replace(should_close=True)  # what follows it in the same read is lost, so nothing may follow
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
            error.__traceback__ = error.__cause__ = error.__context__ = None  # its frames know the body, and an attempt knows the error
        except ConnectionResetError as error:
            self._fail(client, record, ClientGoneError(str(error)))
        except asyncio.CancelledError:
            record.outcome = "client_gone"
            raise
        except Exception as error:  # noqa: BLE001  # one request's failure must not become another's; it is counted and logged
            self._log.exception("a request failed by a fault of disagg", request=client.request_id)
            self._fail(client, record, DisaggError(f"disagg failed on this request ({type(error).__name__}); its log says why"))
        finally:
            if record.outcome != "ok" or len(record.trail) > 1:  # else nothing went wrong
                record.seal()
            metrics.inflight -= 1
            metrics.requests[path, record.outcome] += 1
        return client.finished()

    async def _serve(self, http: web.BaseRequest, route: Route, client: Client, record: Record) -> None:
        if self.draining and self.refuses:
            raise NoCapacityError("this router is shutting down; ask again", retry_after_s=2, reason="draining")
        deadline_at = self._deadline(http, record.started_at)
        request = await self._parse(route, await self._body(http, client))
        record.model = request.model
        if request.samples * len(request.rest) > SAMPLES_LIMIT:
            raise BodyTooLargeError(f"`n` times the body is over the limit of {SAMPLES_LIMIT} bytes: ask for fewer samples")
        owner = self._owner
        owner.check(request)
        split = request.samples > 1 and (request.stream or owner.may_pair(request))
        bodies = sample_bodies(request) if split else [request.rest]
        user, priority = _user(http), _priority(http)
        arm = owner.draw_arm()
        jobs = [Job(request, body, i, deadline_at, record, user=user, priority=priority, arm=arm) for i, body in enumerate(bodies)]
        if len(bodies) > 1 or request.merge_logprobs:
            await Composition(owner, self._metrics, self._relay.admission.token_gap, request, client, jobs).answer()
        elif request.stream:
            await self._serve_stream(request, jobs[0], client)
        else:
            await self._serve_whole(jobs[0], client)

    async def _serve_stream(self, request: ClientRequest, job: Job, client: Client) -> None:
        stream = Stream(request, job.rest, self._metrics.itl.observe, self._relay.admission.token_gap)
        try:
            attempt = await self._owner.run(job, lambda attempt, number: stream.leg(attempt, number, client), client, stream)
            ttft_s = stream.first_token_at - job.record.started_at
            self._metrics.ttft.observe(ttft_s)
        finally:
            stream.journal.fold()
        if stream.first_token_at:
            self._owner.answered(job, attempt.choice, stream.journal.tokens, ttft_s, stream.first_token_at)

    async def _serve_whole(self, job: Job, client: Client) -> None:
        attempt = await self._owner.run(job, lambda attempt, _number: WholeLeg(attempt), client)
        leg = attempt.decode_leg
        assert isinstance(leg, WholeLeg)
        if job.request.prompts is None:
            body_bytes = 0 if job.tokens else job.body_bytes  # digits say nothing of how many bytes a token of text takes
            self._owner.learn(attempt.choice, body_bytes, leg.body)
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
            return await read_body(http, self._body_limit)
        except RequestError as error:
            client.must_close()
            if error.status != 413:  # who sends too much may be one who means well and reads only when all is sent
                hurry(http)
            raise

    async def _parse(self, route: Route, body: bytes) -> ClientRequest:
        if len(body) <= LARGE_BODY:
            return parse_request(route, body, named=self._owner.names_wanted, with_ids=self._owner.ids_wanted)
        parse = functools.partial(parse_request, route, body, named=self._owner.names_wanted, with_ids=self._owner.ids_wanted)
        return await self._relay.loop.run_in_executor(self._reader, parse)

    def _too_large(self, client: Client) -> BodyTooLargeError:
        client.must_close()
        return BodyTooLargeError(f"the body is over the limit of {self._body_limit} bytes")

    def _fail(self, client: Client, record: Record, error: DisaggError) -> None:
        record.outcome = _outcome(error)
        record.error = str(error)
        if isinstance(error, NoCapacityError):
            self._metrics.shed[error.reason] += 1
            self._tell_of_shed()
        if record.outcome not in _QUIET:
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

    def _tell_of_shed(self) -> None:
        """Says that requests are sent away: at once, then not more often than every `TELL_SHED_S`."""
        now, shed = self._relay.clock(), self._metrics.shed
        if now < self._shed_told_at + TELL_SHED_S:
            return
        total = shed.total()
        self._log.warning("requests were sent away", since_the_last_line=total - self._shed_told, **shed)
        self._shed_told, self._shed_told_at = total, now

    # --- the rest

    async def _other(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        if not request.content.is_eof() and request.content_length is None:
            hurry(request)  # chunks without end would be parsed, only to be dropped
        if path in _ROUTES:
            return error_response(405, f"{path} takes POST", headers={"Allow": "POST"})
        if path not in _GET_PATHS:
            known = ", ".join(sorted([*_ROUTES, *_GET_PATHS]))
            return error_response(404, f"there is nothing at {path[:200]!r}; there is {known}")
        if request.method not in {"GET", "HEAD"}:
            return error_response(405, f"{path} takes GET", headers={"Allow": "GET, HEAD"})
        if path == "/healthz":
            return web.json_response({"status": "alive"})
        return self._models() if path == "/v1/models" else self._ready()

    def _models(self) -> web.Response:
        pools = self._view().pools
        contexts = {name: min((e.facts.context_tokens for e in (*p.decode, *p.unified)), default=0) for name, p in pools.items()}
        return web.Response(body=models_body(contexts, created=self._started_at), content_type="application/json")

    def why_not_ready(self) -> str:
        """One sentence; empty when requests can be served."""
        return "this router is shutting down" if self.draining else self._view().why_not_ready()

    def _ready(self) -> web.Response:
        reason = self.why_not_ready()
        if not reason:
            return web.json_response({"status": "ready"})
        return error_response(503, reason, headers={"Retry-After": "2"})


def _user(http: web.BaseRequest) -> str:
    """Whose request it is, opaque: by API key, or by address where none is sent."""
    key = http.headers.get("Authorization")
    if key is not None:
        return f"key {hash(key):x}"
    connection = http.protocol
    return connection.address if isinstance(connection, Connection) else ""


def _priority(http: web.BaseRequest) -> int:
    text = http.headers.get("x-disagg-priority")
    if text is None:
        return 0
    if not _PRIORITY.fullmatch(text) or abs(int(text)) > PRIORITIES:
        sentence = f"`x-disagg-priority` takes a whole number from -{PRIORITIES} to {PRIORITIES}; larger is more important"
        raise RequestError(sentence, param="x-disagg-priority")
    return int(text)


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
