"""The engine's HTTP surface: SGLang's endpoints over aiohttp."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from aiohttp import web

from disagg import __version__
from disagg.engines.embedded import answers, loads, shapes
from disagg.engines.embedded.engine import PROBE_HOST, Engine
from disagg.engines.embedded.faults import parse_faults
from disagg.engines.embedded.generation import Ask, Generation, Inbox, Room
from disagg.engines.embedded.sampler import SamplingParams
from disagg.engines.embedded.switch import SwitchBody
from disagg.errors import ConfigError, DisaggError, NoCapacityError, RequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from disagg.engines.embedded.answers import Shape
    from disagg.engines.embedded.shapes import Batch

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 16 * 1024 * 1024
STUCK_AFTER_S = 5.0
PROBE_TIMEOUT_S = 5.0
GARBAGE = b'data: {"choices": [{"delta\xff\xfe\n\n'
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8"}
OPEN_PATHS = frozenset({"/health", "/ready", "/health_generate", "/metrics"})

log = logging.getLogger("disagg.embedded")


class Face(NamedTuple):
    """What the surface says about the engine besides its state."""

    model: str
    model_path: str
    api_key: str = ""
    incremental: bool = False


class Server:
    """Handlers around one engine.

    Attributes:
        draining: new requests are refused; those that run go on.
        url: where it listens, once it does.
    """

    def __init__(self, engine: Engine, face: Face) -> None:
        self.engine = engine
        self.draining = False
        self.url = ""
        self._face = face
        self._created = int(datetime.now(UTC).timestamp())
        self._bounds = shapes.Bounds(engine.settings.context_length, engine.config.vocab_size)
        engine.tokenizer.refuse_beyond(engine.settings.context_length)
        self._probes = 0
        self._steps_seen = (-1, 0.0)

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        routes: list[tuple[str, str, Handler]] = [
            ("POST", "/generate", self._generate),
            ("POST", "/v1/completions", self._completions),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/tokenize", self._tokenize),
            ("POST", "/tokenize", self._tokenize),
            ("POST", "/v1/detokenize", self._detokenize),
            ("POST", "/detokenize", self._detokenize),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/loads", self._loads),
            ("GET", "/health", self._health),
            ("GET", "/ready", self._health),
            ("GET", "/health_generate", self._health_generate),
            ("GET", "/model_info", self._model_info),
            ("GET", "/get_model_info", self._model_info),
            ("GET", "/server_info", self._server_info),
            ("GET", "/get_server_info", self._server_info),
            ("GET", "/metrics", self._metrics),
            ("POST", "/abort_request", self._abort),
            ("POST", "/pd_role_switch", self._switch_role),
            ("POST", "/flush_cache", self._flush_cache),
            ("GET", "/flush_cache", self._flush_cache),
        ]
        if self.engine.settings.faults is not None:
            routes += [("POST", "/faults", self._set_faults), ("GET", "/faults", self._get_faults)]
        for method, path, handler in routes:
            app.router.add_route(method, path, handler)
        return app

    # --- around every request ---

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Demand the key; turn errors into answers."""
        try:
            self._demand_key(request)
            return await handler(request)
        except DisaggError as error:
            return _refusal(request, str(error), error.status)
        except web.HTTPException as error:
            return _refusal(request, error.reason, error.status)
        except ConnectionError:
            return web.Response()  # the client has left between two events; nobody reads this
        except Exception as error:  # the last line of defence of a request; the traceback names no prompt
            log.exception("%s failed", request.path)
            return _refusal(request, f"the engine failed ({type(error).__name__})", 500)

    def _demand_key(self, request: web.Request) -> None:
        if not self._face.api_key or request.path in OPEN_PATHS:
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(errors="replace"), self._face.api_key.encode()):
            raise web.HTTPUnauthorized(reason="the api key is missing or wrong")

    # --- generation ---

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = shapes.decode(await self._body(request), shapes.GenerateBody)
        batch = shapes.read_generate(body, self.engine.tokenizer, self._bounds)
        shape = answers.GenerateShape(batch, self.engine.tokenizer, incremental=self._face.incremental)
        return await self._serve(request, batch, shape)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = shapes.decode(await self._body(request), shapes.CompletionBody)
        batch = shapes.read_completion(body, self.engine.tokenizer, self._bounds)
        shape = answers.CompletionShape(batch, self.engine.tokenizer, model=self._name(batch), created=_wall_s())
        return await self._serve(request, batch, shape)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = shapes.decode(await self._body(request), shapes.ChatBody)
        batch = shapes.read_chat(body, self.engine.tokenizer, self._bounds)
        shape = answers.ChatShape(batch, self.engine.tokenizer, model=self._name(batch), created=_wall_s())
        return await self._serve(request, batch, shape)

    def _name(self, batch: Batch) -> str:
        return batch.model or self._face.model

    async def _body(self, request: web.Request) -> bytes:
        if self.engine.faults.refuse:
            raise _RefusedError(self.engine.faults.refuse)
        if self.draining:
            raise NoCapacityError("the engine is stopping")
        return await request.read()

    async def _serve(self, request: web.Request, batch: Batch, shape: Shape) -> web.StreamResponse:
        inbox = Inbox()
        generations = self.engine.submit(batch.asks, inbox)
        try:
            if self.engine.faults.strikes("stall", "head"):
                head = web.StreamResponse(headers=STREAM_HEADERS if batch.stream else {"Content-Type": "application/json"})
                await head.prepare(request)
                await _for_ever()
            if batch.stream:
                return await self._stream(request, shape, generations, inbox)
            return await self._whole(request, shape, generations, inbox)
        finally:
            # Reached with living generations when the client has left (the handler is cancelled) or another sample
            # has failed.
            if not self.engine.faults.ignore_gone:
                self.engine.cancel(generations, "the client is gone")

    async def _whole(self, request: web.Request, shape: Shape, generations: Sequence[Generation], inbox: Inbox) -> web.StreamResponse:
        while any(generation.finish is None for generation in generations):
            for index in await inbox.take():
                if failure := _failure(generations[index]):
                    return _refusal(request, *failure)
                if await self._breaks_off(generations[index]):
                    _hang_up(request)
        garbled = any(self._cut(generation, "garbage") for generation in generations)
        body = GARBAGE if garbled else shape.whole(generations)
        return web.Response(body=body, content_type="application/json")

    async def _stream(self, request: web.Request, shape: Shape, generations: Sequence[Generation], inbox: Inbox) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM_HEADERS)
        if not shape.late_head:
            await response.prepare(request)
        alive = set(range(len(generations)))
        while alive:
            pieces: list[bytes] = []
            for index in await inbox.take():
                failure = _failure(generations[index])
                if failure is not None:
                    return await self._fail_stream(request, response, shape, b"".join(pieces), failure)
                if await self._breaks_off(generations[index]):
                    return response
                garbled = self._cut(generations[index], "garbage")
                pieces.append(GARBAGE if garbled else shape.piece(generations[index]))
                if generations[index].finish is not None:
                    alive.discard(index)
            if not response.prepared:
                await response.prepare(request)
                pieces.insert(0, shape.head(generations))
            if not alive:
                pieces += [shape.tail(generations), answers.DONE]
            data = b"".join(pieces)
            if data:
                await response.write(data)
        return response

    @staticmethod
    async def _fail_stream(
        request: web.Request, response: web.StreamResponse, shape: Shape, before: bytes, failure: tuple[str, int]
    ) -> web.StreamResponse:
        """A real status as long as that is possible, an event afterwards; SGLang sends [DONE] even then."""
        if not response.prepared:
            return _refusal(request, *failure)
        error = shape.error(*failure)
        await response.write(before + answers.event(error if "error" in error else {"error": error}) + answers.DONE)
        return response

    async def _breaks_off(self, generation: Generation) -> bool:
        """Whether the answer ends here, by a fault. Does not return where it stalls: only its client can end that, by leaving."""
        if self._cut(generation, "stall"):
            await _for_ever()
        return self._cut(generation, "early_end")

    def _cut(self, generation: Generation, fault: str) -> bool:
        # A fault "at token N" lets N tokens out first, so it strikes when there are more.
        return self.engine.faults.strikes(fault, "token", len(generation.ids) - 1)

    # --- everything else ---

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = shapes.decode(await request.read(), shapes.TokenizeBody)
        tokens = shapes.read_tokenize(body, self.engine.tokenizer)
        count = [len(one) for one in tokens if isinstance(one, list)] if isinstance(body.prompt, list) else len(tokens)
        return _json({"tokens": tokens, "count": count, "max_model_len": self._bounds.context_length})

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        body = shapes.decode(await request.read(), shapes.DetokenizeBody)
        return _json({"text": shapes.read_detokenize(body, self.engine.tokenizer, self._bounds)})

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        card = {
            "id": self._face.model,
            "object": "model",
            "created": self._created,
            "owned_by": "disagg",
            "root": self._face.model,
            "parent": None,
            "max_model_len": self._bounds.context_length,
        }
        return _json({"object": "list", "data": [card]})

    async def _loads(self, request: web.Request) -> web.StreamResponse:
        entry = loads.load(self.engine, request.query.get("include"), now=time.monotonic())
        return _json(
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "version": __version__,
                "accelerator": "cpu",
                "num_accelerators": 0,
                "loads": [entry],
            }
        )

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        if self.engine.faults.lie_health:
            return web.Response()
        if self.draining:
            raise NoCapacityError("the engine is stopping")
        if self._stuck():
            raise NoCapacityError("the engine has work and its steps do not advance")
        return web.Response()

    def _stuck(self) -> bool:
        """Whether no step has ended for a while although there is something to compute."""
        now, steps = time.monotonic(), self.engine.totals.steps
        if steps != self._steps_seen[0] or not self.engine.computing:
            self._steps_seen = steps, now
        return now - self._steps_seen[1] > STUCK_AFTER_S

    async def _health_generate(self, _request: web.Request) -> web.StreamResponse:
        if self.engine.faults.lie_health:
            return web.Response()
        self._probes += 1
        ask = Ask(
            f"HEALTH_CHECK_{self._probes}",
            np.zeros(1, np.int32),
            SamplingParams(max_new_tokens=1, temperature=0.0),
            room=Room(PROBE_HOST, 1, 0),
        )
        inbox = Inbox()
        generations = self.engine.submit([ask], inbox)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                while generations[0].finish is None:
                    await inbox.take()
        except TimeoutError:
            raise NoCapacityError("a probe of one token was not answered in time") from None
        finally:
            self.engine.cancel(generations, "the probe is over")
        return web.Response()

    async def _model_info(self, _request: web.Request) -> web.StreamResponse:
        return _json(
            {
                "model_path": self._face.model_path,
                "tokenizer_path": self._face.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": "default",
                "model_type": self.engine.config.family,
                "model_hash": self.engine.profile.model_hash,
                "max_model_len": self._bounds.context_length,
                "vocab_size": self._bounds.vocab_size,
            }
        )

    async def _server_info(self, _request: web.Request) -> web.StreamResponse:
        settings, config = self.engine.settings, self.engine.config
        shared = {
            "disaggregation_mode": self.engine.role,
            "page_size": settings.page_size,
            "max_total_num_tokens": self.engine.pool.size * settings.page_size,
            "kv_bytes_per_token": config.kv_token_bytes,
            "model_hash": self.engine.profile.model_hash,
        }
        return _json(
            {
                "model_path": self._face.model_path,
                "served_model_name": self._face.model,
                "context_length": settings.context_length,
                "chunked_prefill_size": settings.chunked_prefill_size,
                "max_running_requests": settings.max_running_requests,
                "disaggregation_bootstrap_port": self.engine.bootstrap_port or settings.bootstrap_port,
                "disaggregation_decode_enable_radix_cache": settings.decode_cache,
                "enable_pd_role_switch": settings.role_switch,
                "dtype": self.engine.profile.dtype,
                "stream_token_ids": True,
                "tp_size": 1,
                "dp_size": 1,
                "engine": "embedded",
                "version": __version__,
                **shared,
                "internal_states": [{**shared, "last_gen_throughput": self.engine.totals.throughput(time.monotonic())}],
            }
        )

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        text = loads.metrics(self.engine, self._face.model, now=time.monotonic())
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _abort(self, request: web.Request) -> web.StreamResponse:
        body = shapes.decode(await request.read(), shapes.AbortBody)
        if not self.engine.faults.ignore_abort:
            self.engine.abort(body.rid)
            if body.abort_all:
                self.engine.abort_all()
        return web.Response()

    async def _switch_role(self, request: web.Request) -> web.StreamResponse:
        body = shapes.decode(await request.read(), SwitchBody)
        if self.draining:
            raise NoCapacityError("the engine is stopping")
        if self.engine.hung and self.engine.settings.role_switch:
            await _for_ever()  # as with a real engine: the scheduler would have to answer
        answer = self.engine.switch_role(body)
        log.info("switch from %s to %.32s: %s", answer.old_role, answer.new_role, answer.message)
        return _json(answer._asdict(), status=200 if answer.success else 400)

    async def _flush_cache(self, _request: web.Request) -> web.StreamResponse:
        if not self.engine.flush_cache():
            raise RequestError("the cache is not flushed while requests run")
        return web.Response(text="Cache flushed.\n")

    async def _set_faults(self, request: web.Request) -> web.StreamResponse:
        spec = shapes.decode(await request.read(), dict[str, str]).get("spec", "none")
        try:
            self.engine.faults = parse_faults(spec)
        except ConfigError as error:
            raise RequestError(str(error), param="spec") from error
        log.warning("faults are now: %s", spec)
        return _json({"spec": spec})

    async def _get_faults(self, _request: web.Request) -> web.StreamResponse:
        return _json(self.engine.faults._asdict())


class _RefusedError(DisaggError):
    """The fault ``refuse``."""

    def __init__(self, status: int) -> None:
        super().__init__("this engine was told to refuse requests")
        self.status = status


def _failure(generation: Generation) -> tuple[str, int] | None:
    """The sentence and status of a generation that failed; one that was aborted on request has ended normally."""
    finish = generation.finish
    return None if finish is None or finish.status == 0 else (finish.sentence, finish.status)


def _refusal(request: web.Request, sentence: str, status: int) -> web.Response:
    body = answers.generate_error(sentence, status) if request.path == "/generate" else answers.v1_error(sentence, status)
    return _json(body, status=status)


async def _for_ever() -> None:
    await asyncio.get_running_loop().create_future()


def _hang_up(request: web.Request) -> None:
    """The fault ``early-end`` of a whole answer: the connection closes without one."""
    if request.transport is not None:
        request.transport.close()


def _json(payload: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=answers.encode(payload), status=status, content_type="application/json")


def _wall_s() -> int:
    return int(datetime.now(UTC).timestamp())
