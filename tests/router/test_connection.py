"""Clients that are slow, many, or large, on real sockets: each is ended with a reason, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from disagg.model import Role
from disagg.router import connection, gate, relay
from disagg.router.app import LARGE_BODY
from disagg.router.client import Client
from disagg.router.connection import Server
from disagg.router.gate import Gate
from disagg.router.openai import Route, parse_request
from tests.fake_engine import Call, answer_well, until
from tests.router.conftest import CHAT, Rig, running_rig
from tests.router.raw import BODY, answers, exchange, post

SHORT_S = 0.3
STREAM = {**CHAT, "stream": True}


@contextlib.asynccontextmanager
async def listening(rig: Rig, *, head_limit_s: float = SHORT_S, doors: Gate | None = None) -> AsyncIterator[tuple[str, Server]]:
    """The rig's router at one more address, with limits that a test can wait for."""
    server = rig.router.listener.server()
    assert isinstance(server, Server)
    server.head_limit_s = head_limit_s
    server.gate = doors or server.gate
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", server
    finally:
        listener.close()
        await server.shutdown(0.1)


# --- heads


@pytest.mark.parametrize("begun", [b"G", b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"POST /generate HTTP/1.1\r\nX: " + b"a" * 9000])
async def test_a_head_that_does_not_end_gets_a_408(rig: Rig, begun: bytes) -> None:
    async with listening(rig) as (url, _):
        (answer,) = answers(await exchange(url, begun))
    assert answer.status == 408
    assert answer.error["type"] == "invalid_request_error"
    assert b"connection: close" in answer.head.lower()


async def test_a_byte_now_and_then_does_not_move_the_limit(rig: Rig) -> None:
    async with listening(rig) as (url, _):
        host, _, port = url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nX: ")
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(reader.read(12))  # before the next byte is sent, which may end the connection the hard way
            while not answer.done() and time.monotonic() < began + 10:
                writer.write(b"G")
                await asyncio.sleep(SHORT_S / 5)
        assert answer.result() == b"HTTP/1.1 408"
        writer.close()


async def test_who_says_nothing_is_closed_without_a_word(rig: Rig) -> None:
    """An answer to no question would be taken for that of the next one."""
    async with listening(rig) as (url, _):
        assert await exchange(url) == b""


async def test_between_requests_the_longer_limit_counts_and_within_the_next_head_the_short_one(rig: Rig) -> None:
    async with listening(rig) as (url, _):
        host, _, port = url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for pause_s in (0.0, SHORT_S * 3):
            await asyncio.sleep(pause_s)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert b" 200 " in head
            await reader.readexactly(len(b'{"status": "alive"}'))
        writer.write(b"GET /he")
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_without_the_limit_the_head_is_waited_for(rig: Rig) -> None:
    async with listening(rig, head_limit_s=600) as (url, _):
        with pytest.raises(TimeoutError):
            await exchange(url, b"G", limit_s=SHORT_S * 3)


async def test_a_slow_answer_is_no_slow_head(rig: Rig) -> None:
    async def slow(call: Call) -> None:
        await asyncio.sleep(SHORT_S * 3)
        await answer_well(call)

    rig.decode.behave = slow
    async with listening(rig) as (url, _):
        (answer,) = answers(await exchange(url, post(BODY, "Connection: close")))
    assert answer.status == 200


async def test_five_hundred_slow_heads_are_all_ended_and_others_are_served_meanwhile(rig: Rig) -> None:
    async with listening(rig, head_limit_s=3.0) as (url, _), asyncio.TaskGroup() as group:
        slow = [group.create_task(exchange(url, b"GET / HTTP/1.1\r\nX: ", limit_s=60)) for _ in range(500)]
        for _ in range(20):
            (answer,) = answers(await exchange(url, post(BODY, "Connection: close")))
            assert answer.status == 200
        assert {answers(await task)[0].status for task in slow} == {408}


# --- bodies


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_GRACE_S", SHORT_S)


@pytest.mark.parametrize("framing", ["Content-Length: 4000000", "Transfer-Encoding: chunked"])
async def test_a_body_that_stops_gets_a_408(rig: Rig, hasty: None, framing: str) -> None:
    (answer,) = answers(await exchange(rig.url, post(b"5\r\nhello\r\n", framing)))
    assert answer.status == 408
    assert "too slowly" in answer.error["message"]
    assert not rig.decode.calls


async def test_a_body_below_the_rate_gets_a_408_and_one_above_it_is_served(rig: Rig, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_RATE", 1_000_000)

    async def send(pause_s: float) -> int:
        body = msgspec.json.encode({**CHAT, "x": "y" * 2_000_000})
        host, _, port = rig.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(post(b"", f"Content-Length: {len(body)}"))
        for at in range(0, len(body), 200_000):
            writer.write(body[at : at + 200_000])
            await asyncio.sleep(pause_s)
            if reader._buffer:  # type: ignore[attr-defined]
                break
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        writer.close()
        return int(head.split()[1])

    assert await send(1.0) == 408
    monkeypatch.setattr(gate, "BODY_GRACE_S", 20.0)
    assert await send(0.1) == 200


async def test_a_body_over_the_limit_is_refused_before_it_comes(rig: Rig) -> None:
    (answer,) = answers(await exchange(rig.url, post(b"", f"Content-Length: {1 << 40}")))
    assert answer.status == 413


@pytest.mark.parametrize("defended", [True, False])
async def test_a_body_in_a_million_chunks_is_not_read_to_its_end(rig: Rig, defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = 1_000_000 if defended else 40_000
    if not defended:
        monkeypatch.setattr(connection, "CHUNKS_LIMIT", 1 << 30)
    flood = b"1\r\nx\r\n" * chunks + b"0\r\n\r\n"
    data = await exchange(rig.url, post(flood, "Transfer-Encoding: chunked", "Connection: close"), limit_s=60)
    answer = answers(data)[0]
    assert answer.status == 400
    assert ("chunks" in answer.error["message"]) == defended


async def test_chunks_that_break_in_the_middle_are_a_400(rig: Rig) -> None:
    host, _, port = rig.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(post(b"5\r\nhello\r\n", "Transfer-Encoding: chunked"))
    await until(lambda: rig.router.metrics.inflight == 1)
    writer.write(b"zz\r\n")
    (answer,) = answers(await asyncio.wait_for(reader.read(), 10))
    assert answer.status == 400
    assert 'outcome="internal_error"' not in rig.metrics()
    writer.close()


async def test_samples_times_body_are_limited(rig: Rig) -> None:
    body = io.BytesIO(msgspec.json.encode({**CHAT, "n": 64, "x": "y" * (2 << 20)}))
    async with rig.session.post(rig.url + "/v1/chat/completions", data=body) as response:
        assert response.status == 413
        assert "fewer samples" in (await response.json())["error"]["message"]


# --- numbers


class Outside(Gate):
    """As if everybody came from the same other machine."""

    def enter(self, address: str, file: int) -> str:
        return super().enter("198.51.100.7", file)

    def leave(self, address: str) -> None:
        super().leave("198.51.100.7")


async def test_one_address_has_its_number_of_connections_and_gets_a_429_beyond(rig: Rig) -> None:
    doors = Outside(per_address=3, file_limit=100_000)
    async with listening(rig, head_limit_s=60, doors=doors) as (url, server):
        host, _, port = url.removeprefix("http://").rpartition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        await until(lambda: len(server.connections) == 3)
        (answer,) = answers(await exchange(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert answer.status == 429
        assert b"Retry-After: 1" in answer.head
        assert answer.error["type"] == "rate_limit_exceeded"
        for _, writer in held:
            writer.close()
        await until(lambda: not doors._open)
        (answer,) = answers(await exchange(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
        assert answer.status == 200
        await until(lambda: not doors._open and server.farewells == 0)


# --- readers


@pytest.mark.parametrize("defended", [True, False])
async def test_a_reader_that_does_not_read_holds_a_bounded_buffer(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    readers, bound = 20, 64 * 1024 + 256_000  # the transport's high water, and one read of the loop
    if not defended:
        monkeypatch.setattr(Client, "write", lambda self, data: self._write(data) is None)

    async def endless(call: Call) -> None:
        if call.engine.role is Role.PREFILL:
            await answer_well(call)
            return
        while True:
            await call.write(b'data: {"x":"' + b"x" * 8000 + b'"}\n\n')
            await asyncio.sleep(0)

    async with running_rig(Role.PREFILL, Role.DECODE) as rig, listening(rig, head_limit_s=60) as (url, server):
        rig.decode.behave = endless
        host, _, port = url.removeprefix("http://").rpartition(":")
        held = []
        for _ in range(readers):
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            writer.write(post(msgspec.json.encode(STREAM)))
            held.append((reader, writer))

        def sizes() -> list[int]:
            return [c.transport.get_write_buffer_size() for c in server.connections if c.transport is not None]

        if defended:
            await until(lambda: sum(size > 0 for size in sizes()) == readers, 60)
            for _ in range(20):
                assert max(sizes()) <= bound
                await asyncio.sleep(0.05)
        else:
            await until(lambda: max(sizes()) > 4 * bound, 60)
        for _, writer in held:
            writer.transport.abort()
        await until(lambda: not rig.decode.live, 30)


async def test_a_reader_that_does_not_read_is_given_up_and_its_engine_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "CLIENT_STALL_S", SHORT_S)

    async def endless(call: Call) -> None:
        if call.engine.role is Role.PREFILL:
            await answer_well(call)
            return
        while True:
            await call.write(b'data: {"x":"' + b"x" * 60_000 + b'"}\n\n')

    async with running_rig(Role.PREFILL, Role.DECODE) as rig:
        rig.decode.behave = endless
        host, _, port = rig.url.removeprefix("http://").rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(post(msgspec.json.encode(STREAM)))
        await until(lambda: len(rig.decode.calls) == 1)
        await until(lambda: not rig.decode.live and rig.router.metrics.inflight == 0, 30)
        writer.transport.abort()


# --- the loop


async def longest_stop(work: asyncio.Future[object]) -> float:
    """How long the loop stood still at most while this ran, seconds."""
    longest, before = 0.0, time.perf_counter()
    while not work.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    await work
    return longest


async def test_the_loop_turns_while_a_large_body_is_read(rig: Rig) -> None:
    body = b'{"messages":[' + b",".join([b'"["'] * 3_000_000) + b"]}"
    assert len(body) > LARGE_BODY

    async def here() -> object:
        return parse_request(Route.CHAT, body)

    stops: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(3):
        stops["off"].append(await longest_stop(asyncio.ensure_future(rig.router.listener._parse(Route.CHAT, body))))  # noqa: TID251
        stops["on"].append(await longest_stop(asyncio.ensure_future(here())))  # noqa: TID251
    assert min(stops["off"]) < min(stops["on"]) / 2, stops
    assert threading.active_count() < 20
