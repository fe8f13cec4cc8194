"""A scripted engine on a real socket: it speaks as much of SGLang's HTTP as the router uses, and does what a test tells it to.

It computes nothing. What it says is set per test: an answer, an error, silence, a cut, garbage. It notes what it was sent and what was
aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from disagg.model import EngineAddress, EngineId, Role

HUNG_S = 20.0
"""How long a test waits for what takes a moment, before it calls it hung: a slow machine is no failure."""

Behaviour = Callable[["Call"], Awaitable[None]]


class Call:
    """One generation request as a behaviour sees it."""

    def __init__(self, engine: FakeEngine, request: web.Request, body: bytes) -> None:
        self.engine = engine
        self.path = request.path
        self.raw = body
        self.json: dict[str, Any] = msgspec.json.decode(body)
        self.aborted = asyncio.Event()
        self._request = request
        self._response: web.StreamResponse | None = None

    @property
    def rids(self) -> list[str]:
        rid = self.json["rid"]
        return rid if isinstance(rid, list) else [rid]

    async def json_answer(self, value: Any, status: int = 200) -> None:
        self._response = web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
        await self._response.prepare(self._request)
        await self._response.write_eof()

    async def start_stream(self) -> None:
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await self._response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        """Writes one HTTP chunk."""
        if self._response is None:
            await self.start_stream()
        assert self._response is not None
        await self._response.write(data)

    async def event(self, value: Any) -> None:
        await self.write(b"data: " + msgspec.json.encode(value) + b"\n\n")

    async def done(self) -> None:
        await self.write(b"data: [DONE]\n\n")
        await self.end()

    async def end(self) -> None:
        assert self._response is not None
        await self._response.write_eof()

    def cut(self) -> None:
        """Ends the connection the hard way, as a killed process does."""
        assert self._request.transport is not None
        self._request.transport.abort()

    def raw_write(self, data: bytes) -> None:
        assert self._request.transport is not None
        self._request.transport.write(data)

    @property
    def response(self) -> web.StreamResponse:
        assert self._response is not None
        return self._response


async def answer_well(call: Call) -> None:
    """A prefill engine's one token, or a decode engine's short answer, in the shape of the route."""
    stream = bool(call.json.get("stream"))
    if call.engine.role is Role.PREFILL:
        await call.json_answer({"text": "a", "meta_info": {"input_token_logprobs": [[-0.5, 1, None]]}})
    elif stream:
        for word in ("alpha", " beta", " gamma"):
            await call.event(chat_chunk(word))
        await call.event(chat_chunk("", finish="stop"))
        await call.done()
    else:
        await call.json_answer(chat_answer("alpha beta gamma"))


def chat_chunk(text: str, *, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": [choice]}


def chat_answer(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice], "usage": usage}


class FakeEngine:
    """A running fake engine.

    Attributes:
        behave: what it does with a generation request; replaced by a test.
        calls: every generation request so far.
        aborted: every rid that was aborted, in order.
        live: generation requests that have not ended.
        abort_ends: whether an abort cancels what the call is doing, as a healthy engine does.
        knows: answers /v1/tokenize and /v1/detokenize: path and body in, body out; None for an engine that does not know them.
        asked: the paths of such questions, in order.
        stream_token_ids: what it says of itself to a prober.
        places: requests that may run at a time, as it says to a prober; 0 if it says nothing.
    """

    def __init__(self, role: Role, number: int, model: str) -> None:
        self.role = role
        self.number = number
        self.model = model
        self.behave: Behaviour = answer_well
        self.calls: list[Call] = []
        self.aborted: list[str] = []
        self.live: set[asyncio.Task[Any]] = set()
        self.abort_ends = True
        self.connections = 0
        self.knows: Callable[[str, Any], Any] | None = None
        self.asked: list[str] = []
        self.stream_token_ids = False
        self.places = 0
        self.tell: Callable[[web.Request], Awaitable[web.StreamResponse]] = self._tell
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> EngineAddress:
        return EngineAddress(
            EngineId(f"{self.role}-{self.number}"), self.role, "127.0.0.1", self.port, 8998 if self.role is Role.PREFILL else 0
        )

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._generate)
        app.router.add_post("/abort_request", self._abort)
        for path in ("/v1/tokenize", "/v1/detokenize"):
            app.router.add_post(path, self._told)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/v1/loads", self._loads)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def stop(self) -> None:
        assert self._runner is not None
        for task in list(self.live):
            task.cancel()
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        call = Call(self, request, await request.read())
        self.calls.append(call)
        task = asyncio.current_task()
        assert task is not None
        self.live.add(task)
        try:
            async with asyncio.TaskGroup() as group:
                work = group.create_task(self._behave(call))
                stop = group.create_task(call.aborted.wait())
                await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    work.cancel()
                    call.cut()
                stop.cancel()
        finally:
            self.live.discard(task)
        return call._response or web.Response(status=500)

    async def _behave(self, call: Call) -> None:
        await self.behave(call)

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborted.append(rid)
        for call in self.calls:
            if rid in call.rids and self.abort_ends:
                call.aborted.set()
        return web.Response()

    async def _told(self, request: web.Request) -> web.StreamResponse:
        return await self.tell(request)

    async def _tell(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if self.knows is None:
            return web.json_response({"message": "not found"}, status=404)
        return web.json_response(self.knows(request.path, await request.json()))

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "max_model_len": 8192}]})

    async def _info(self, _request: web.Request) -> web.Response:
        mode = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNIFIED: "null"}[self.role]
        return web.json_response(
            {
                "internal_states": [{"disaggregation_mode": mode}],
                "page_size": 16,
                "stream_token_ids": self.stream_token_ids,
                "max_running_requests": self.places,
            }
        )

    async def _loads(self, _request: web.Request) -> web.Response:
        load = {"num_running_reqs": len(self.live), "num_waiting_reqs": 0, "num_used_tokens": 0, "max_total_num_tokens": 16384}
        return web.json_response({"loads": [load]})


@asynccontextmanager
async def fake_engine(role: Role, number: int = 0, model: str = "fake") -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(role, number, model)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def until(condition: Callable[[], bool], limit_s: float = HUNG_S) -> None:
    """Waits for a condition, at most `limit_s` seconds."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in other code
            await asyncio.sleep(0.005)
