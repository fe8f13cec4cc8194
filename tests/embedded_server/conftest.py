"""Engines that live as long as the test session, and a client that speaks to them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import numpy as np
import pytest

from disagg.engines.embedded.checkpoint import Checkpoint, Floats, load_checkpoint
from disagg.engines.embedded.engine import Engine, Settings
from disagg.engines.embedded.pages import PagePool
from disagg.engines.embedded.tokens import Tokenizer
from disagg.engines.embedded.transformer import Transformer
from tests.engines import DEMO_MODEL, EngineProcess, launch_engine, running_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from disagg.engines.embedded.generation import Generation, Inbox

LIMITS = ("--bootstrap-timeout", "3", "--transfer-stall-timeout", "2")
FREE_WITHIN_S = 5.0


class Trio(NamedTuple):
    """A unified engine to compare with, and a pair."""

    unified: EngineProcess
    prefill: EngineProcess
    decode: EngineProcess


class Answer(NamedTuple):
    """What an endpoint gave: the whole body, its JSON, or the JSON of its events."""

    status: int
    raw: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def events(self) -> list[Any]:
        parts = [part for part in self.raw.decode().split("\n\n") if part]
        assert all(part.startswith("data: ") for part in parts)
        return [part if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]

    @property
    def ids(self) -> list[int]:
        """Token ids of a whole /generate answer, or of the last event of a stream."""
        found = self.events[-2] if self.raw.startswith(b"data:") else self.json
        ids: list[int] = found["output_ids"]
        return ids


class Client:
    """Sends requests to engines, to a pair with a fresh room each."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def post(self, engine: EngineProcess, path: str, body: Any) -> Answer:
        began = time.monotonic()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(engine.url + path, data=data, headers={"Content-Type": "application/json"}) as got:
            raw = await got.read()
            return Answer(got.status, raw, time.monotonic() - began)

    async def get(self, engine: EngineProcess, path: str) -> Answer:
        began = time.monotonic()
        async with self.session.get(engine.url + path) as got:
            raw = await got.read()
            return Answer(got.status, raw, time.monotonic() - began)

    async def both(
        self, prefill: EngineProcess, decode: EngineProcess, path: str, body: dict[str, Any], **legs: Any
    ) -> tuple[Answer, Answer]:
        """The same request to both legs at once. Returns prefill's and decode's answers."""
        full = {**body, **room_at(prefill), **legs}
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(self.post(prefill, path, full), name="prefill leg")
            second = tasks.create_task(self.post(decode, path, full), name="decode leg")
        return first.result(), second.result()

    async def load(self, engine: EngineProcess) -> dict[str, Any]:
        found: dict[str, Any] = (await self.get(engine, "/v1/loads?include=all")).json["loads"][0]
        return found

    async def faults(self, engine: EngineProcess, spec: str) -> None:
        assert (await self.post(engine, "/faults", {"spec": spec})).status == 200

    async def wait_for(self, engine: EngineProcess, section: str, name: str, value: int, within_s: float = 5.0) -> None:
        """Until a number of /v1/loads is at least ``value``."""
        limit = time.monotonic() + within_s
        while True:
            load = await self.load(engine)
            found = (load[section] if section else load)[name]
            if found >= value:
                return
            assert time.monotonic() < limit, f"{name} of {engine.role} is {found}, not {value}"
            await asyncio.sleep(0.005)

    async def wait_free(self, *engines: EngineProcess, within_s: float = FREE_WITHIN_S) -> None:
        """Until no engine holds a page or a request."""
        limit = time.monotonic() + within_s
        for engine in engines:
            while True:
                load = await self.load(engine)
                disagg = load["disaggregation"]
                queued = sum(value for name, value in disagg.items() if name.endswith("_queue_reqs"))
                busy = load["num_used_tokens"] + load["num_running_reqs"] + load["num_waiting_reqs"] + queued
                if not busy:
                    break
                assert time.monotonic() < limit, f"{engine.role} still holds something: {load}"
                await asyncio.sleep(0.01)


def room_at(prefill: EngineProcess) -> dict[str, Any]:
    """The bootstrap fields of a fresh room."""
    return {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": prefill.bootstrap_port,
        "bootstrap_room": random.SystemRandom().getrandbits(63),
    }


def greedy(prompt: list[int], new: int = 16, **more: Any) -> dict[str, Any]:
    """A /generate body."""
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        **more,
    }


def some_prompt(length: int, seed: int = 0) -> list[int]:
    chance = random.Random(f"{length} {seed}")
    return [chance.randrange(10, 250) for _ in range(length)]


@pytest.fixture(scope="session")
def trio() -> Iterator[Trio]:
    """Healthy engines whose faults can be set at run time; whoever sets some takes them back."""
    launched = [launch_engine(role, faults="none", extra_args=LIMITS) for role in ("unified", "prefill", "decode")]
    with running_engines(*launched) as (unified, prefill, decode):
        yield Trio(unified, prefill, decode)
        for engine in (unified, prefill, decode):
            assert "Traceback" not in engine.log


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session)


# --- engines in the process of a test ---


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Random weights in the demo model's shape: their output depends on every single page, a trained model's may not."""
    loaded = load_checkpoint(DEMO_MODEL)
    chance = np.random.default_rng(1)

    def noise(table: Floats) -> Floats:
        return chance.standard_normal(table.shape, np.float32) * np.float32(0.15)

    matrices = ("qkv", "output", "gate_up", "down")
    layers = tuple(dataclasses.replace(layer, **{name: noise(getattr(layer, name)) for name in matrices}) for layer in loaded.layers)
    embedding = noise(loaded.embedding)
    return dataclasses.replace(loaded, embedding=embedding, lm_head=embedding, layers=layers)


class House:
    """Builds engines in this event loop, which a test may look into.

    Attributes:
        tokenizer: theirs.
    """

    def __init__(self, checkpoint: Checkpoint, tasks: asyncio.TaskGroup) -> None:
        self._checkpoint = checkpoint
        self.tokenizer = Tokenizer.load(DEMO_MODEL)
        self._tasks = tasks
        self._running: list[asyncio.Task[None]] = []

    async def build(self, settings: Settings, pool: type[PagePool] = PagePool) -> Engine:
        engine = Engine(Transformer(self._checkpoint), self.tokenizer, "0" * 16, settings, pool_type=pool)
        started = asyncio.Event()
        run = engine.run(bootstrap_host="127.0.0.1", started=started)
        self._running.append(self._tasks.create_task(run, name=f"{settings.role} engine"))
        await started.wait()
        return engine

    def stop(self) -> None:
        for task in self._running:
            task.cancel()


async def finished(generation: Generation, inbox: Inbox) -> list[int]:
    while generation.finish is None:
        await inbox.take()
    return generation.ids
