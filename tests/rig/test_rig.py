"""The bench's fakes and load tell the truth: an honest router passes, and each lie is named by the end that can see it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from disagg.cluster import canary
from tests.rig.bench import pick_cores
from tests.rig.binary import build
from tests.rig.processes import BOOTSTRAP_PORT, Counters, Fakes, Load, Measured, Rig, get

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    Body = dict[str, Any]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the rig needs a C compiler")

WHOLE = Load(connections=2, seconds=0.2, warmup_s=0)
STREAM = replace(WHOLE, stream=True, chunks=20)


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(build(), *pick_cores())


@pytest.fixture
def fakes(rig: Rig) -> Iterator[Fakes]:
    with Fakes(rig) as fakes:
        yield fakes


# ---- a router small enough to be seen through ----------------------------------------------------------------------------


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@dataclass
class Honest:
    """Does everything right. A liar overrides the one step in which it lies."""

    prefill: int
    decode: int

    def __post_init__(self) -> None:
        self._rooms = count(1)
        self.serving: set[asyncio.Task[None] | None] = set()
        self.content_type = "application/json"

    def room(self) -> int:
        return next(self._rooms)

    def legs(self, body: Body) -> tuple[Body, Body]:
        bootstrap = {"bootstrap_host": "127.0.0.1", "bootstrap_port": BOOTSTRAP_PORT, "bootstrap_room": self.room()}
        return bootstrap | body, bootstrap | body

    async def relay(self, answer: bytes) -> bytes:
        return answer

    async def enough(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.read(-1)

    async def exchange(self, port: int, path: str, body: Body) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\ncontent-type: {self.content_type}\r\nconnection: close\r\ncontent-length: {len(raw)}\r\n\r\n"
        try:
            writer.write(head.encode() + raw)
            return await self.enough(reader)
        finally:
            await leave(writer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving.add(asyncio.current_task())
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                to_prefill, to_decode = self.legs(json.loads(await reader.readexactly(size)))
                path = head.split()[1]
                _, answer = await asyncio.gather(self.exchange(self.prefill, path, to_prefill), self.exchange(self.decode, path, to_decode))
                writer.write(await self.relay(answer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            await leave(writer)


class Slow(Honest):
    async def relay(self, answer: bytes) -> bytes:
        await asyncio.sleep(0.05)
        return answer


class DropsAnEvent(Honest):
    async def relay(self, answer: bytes) -> bytes:
        head, first, second, *rest = answer.split(b"data: ")
        return b"data: ".join([head, first, *rest]).replace(second, b"")


class SwapsEvents(Honest):
    async def relay(self, answer: bytes) -> bytes:
        return answer.replace(b" 0003 ", b" xxxx ").replace(b" 0004 ", b" 0003 ").replace(b" xxxx ", b" 0004 ")


class CutsTheEnd(Honest):
    """Ends in good HTTP, but without the finish and [DONE]."""

    async def relay(self, answer: bytes) -> bytes:
        events = answer.split(b"\r\n\r\n", 1)[1].split(b"\n\n\r\n")
        return answer.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n" + b"".join(e + b"\n\n\r\n" for e in events[:-3]) + b"0\r\n\r\n"


class SaysTooMuch(Honest):
    async def relay(self, answer: bytes) -> bytes:
        return answer + b"more"


class StoresAnswers(Honest):
    """Gives everyone the first answer."""

    first: bytes | None = None

    async def relay(self, answer: bytes) -> bytes:
        self.first = self.first or answer
        return self.first


class Garbles(Honest):
    async def relay(self, answer: bytes) -> bytes:
        return answer.replace(b"quick brown", b"quick green").replace(b"\r\n0\r\n\r\n", b"\r\nzero\r\n\r\n")


class GivesUp(Honest):
    async def relay(self, answer: bytes) -> bytes:
        return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


class SaysError(Honest):
    async def relay(self, answer: bytes) -> bytes:
        event = b'data: {"error": {"message": "lost"}}\n\n'
        return answer.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


class ReusesARoom(Honest):
    def room(self) -> int:
        return super().room() // 2 + 1


class ForgetsTheRoom(Honest):
    def legs(self, body: Body) -> tuple[Body, Body]:
        return body, body


class ChangesTheLimit(Honest):
    def legs(self, body: Body) -> tuple[Body, Body]:
        return super().legs(body | {"max_tokens": 1})


class ChangesThePrompt(Honest):
    def legs(self, body: Body) -> tuple[Body, Body]:
        body["messages"][0]["content"] = body["messages"][0]["content"].replace("fox", "cat")
        return super().legs(body)


class MixesLegs(Honest):
    def legs(self, body: Body) -> tuple[Body, Body]:
        prefill, decode = super().legs(body)
        return prefill | {"stream": False}, decode


class ForgetsTheType(Honest):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.content_type = "text/plain"


class LeavesEarly(Honest):
    """Has heard enough after the first bytes of decode."""

    async def enough(self, reader: asyncio.StreamReader) -> bytes:
        await reader.read(100)
        return b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"


class SendsOneLeg(Honest):
    async def exchange(self, port: int, path: str, body: Body) -> bytes:
        return await super().exchange(port, path, body) if port == self.decode else b""


@asynccontextmanager
async def standing(router: Honest) -> AsyncIterator[int]:
    async with await asyncio.start_server(router.serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*filter(None, router.serving))  # the load has gone, so each ends with the exchange it is in


async def through(router: Honest, load: Load, rig: Rig, fakes: Fakes) -> tuple[Measured, Counters, set[str]]:
    """What both ends say, and the names of what they complain of."""
    async with standing(router) as port:
        measured = await asyncio.to_thread(load.run, rig, port)
    counters = await asyncio.to_thread(fakes.counters)
    return measured, counters, {name for name, number in (measured.errors | counters.faults).items() if number}


# ---- no lie ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
@pytest.mark.parametrize("load", [WHOLE, STREAM], ids=["whole", "stream"])
def test_without_a_router_nothing_is_wrong(rig: Rig, load: Load, path: str) -> None:
    with Fakes(rig, solo=True) as fakes:
        measured = replace(load, path=path).run(rig, fakes.decode)
        counters = fakes.counters()
    assert measured.requests > 0
    assert not any(measured.errors.values())
    assert not any(counters.faults.values())
    assert counters.answers >= measured.requests


async def test_an_honest_router_passes(rig: Rig, fakes: Fakes) -> None:
    for load in (WHOLE, STREAM, replace(WHOLE, prompt_bytes=32 * 1024), replace(STREAM, pace_us=2000)):
        measured, counters, complaints = await through(Honest(fakes.prefill, fakes.decode), load, rig, fakes)
        assert not complaints
        assert measured.requests > 0
        assert counters.answers == 2 * counters.pairs
        fakes.__exit__()
        fakes.__init__(rig)  # type: ignore[misc]  # rooms start at 1 again


class Probes(Honest):
    """Asks one engine something of its own before each request, as a router does that looks whether answers are right."""

    question: ClassVar[Body] = json.loads(canary.request("is this right?", "salt"))

    def legs(self, body: Body) -> tuple[Body, Body]:
        self.probing = asyncio.ensure_future(self.exchange(self.decode, "/generate", self.question))  # noqa: TID251
        return super().legs(body)

    async def relay(self, answer: bytes) -> bytes:
        assert b"400" in await self.probing
        return answer


async def test_a_routers_own_requests_are_no_lies(rig: Rig, fakes: Fakes) -> None:
    measured, counters, complaints = await through(Probes(fakes.prefill, fakes.decode), WHOLE, rig, fakes)
    assert not complaints
    assert measured.requests > 0
    assert counters.answers == 2 * counters.pairs


async def test_a_slow_router_is_seen_to_be_slow(rig: Rig, fakes: Fakes) -> None:
    measured, _, complaints = await through(Slow(fakes.prefill, fakes.decode), STREAM, rig, fakes)
    assert not complaints
    for waited in (measured.latency_us, measured.first_us, measured.event_us):
        assert 50_000 <= waited.p50 <= waited.p99 <= 1_000_000
    assert measured.event_us.count == measured.events


def test_paced_events_come_at_their_pace(rig: Rig) -> None:
    with Fakes(rig, solo=True) as fakes:
        measured = Load(connections=4, stream=True, chunks=20, pace_us=10_000, seconds=0.5, warmup_s=0.2).run(rig, fakes.decode)
    assert measured.events == pytest.approx(4 * 100 * measured.seconds, rel=0.25)
    assert measured.latency_us.p50 >= 19 * 10_000 * 0.99


def test_cpu_time_is_that_of_the_process(rig: Rig) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as idle,
        Fakes(rig, solo=True) as fakes,
    ):
        measured = replace(WHOLE, warmup_s=0.3).run(rig, fakes.decode, cpu_of=[busy.pid, idle.pid, fakes.pid])
        busy.kill()
        idle.kill()
    of_busy, of_idle, of_fakes, of_load = measured.cpu_s
    assert of_idle < 0.01 < min(of_busy, of_fakes, of_load)
    assert max(measured.cpu_s) <= measured.seconds * 1.1


# ---- lies -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("liar", "load", "complaint"),
    [
        (DropsAnEvent, STREAM, "out_of_order"),
        (SwapsEvents, STREAM, "out_of_order"),
        (StoresAnswers, STREAM, "out_of_order"),
        (StoresAnswers, WHOLE, "wrong_text"),
        (Garbles, WHOLE, "wrong_text"),
        (Garbles, STREAM, "garbled"),
        (CutsTheEnd, STREAM, "incomplete"),
        (SaysTooMuch, STREAM, "incomplete"),
        (GivesUp, WHOLE, "status"),
        (SaysError, STREAM, "error_event"),
        (ReusesARoom, WHOLE, "room_reused"),
        (ForgetsTheRoom, WHOLE, "no_bootstrap"),
        (ChangesTheLimit, WHOLE, "body_changed"),
        (ChangesThePrompt, WHOLE, "text_damaged"),
        (MixesLegs, STREAM, "legs_differ"),
        (ForgetsTheType, WHOLE, "not_json"),
        (LeavesEarly, replace(STREAM, pace_us=1000), "left_early"),
        pytest.param(SendsOneLeg, WHOLE, "partner_missing", marks=pytest.mark.slow),
    ],
)
async def test_a_lie_is_named(rig: Rig, fakes: Fakes, liar: type[Honest], load: Load, complaint: str) -> None:
    _, _, complaints = await through(liar(fakes.prefill, fakes.decode), load, rig, fakes)
    assert complaint in complaints


def test_the_engines_say_who_they_are(fakes: Fakes) -> None:
    for port, role in ((fakes.prefill, "prefill"), (fakes.decode, "decode")):
        for path in ("/health", "/ready", "/health_generate", "/metrics", "/flush_cache", "/v1/models", "/model_info"):
            assert get(port, path)[0] == 200
        info = json.loads(get(port, "/server_info")[1])
        assert info["internal_states"][0]["disaggregation_mode"] == role
        assert json.loads(get(port, "/v1/loads?include=core,disagg")[1])["loads"][0]["disaggregation"]["mode"] == role
        assert json.loads(get(port, "/v1/models")[1])["data"][0]["id"] == "fake"
        assert get(port, "/nothing")[0] == 404
    assert fakes.counters().last_unknown == "/nothing"
