"""Clients that mean harm, against a real router process: too many of them, and a log that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import httpx2
import pytest

from disagg.model import Role
from disagg.router.gate import Gate
from tests.fake_engine import HUNG_S, Call, FakeEngine, answer_well, chat_chunk, fake_engine, until
from tests.ports import free_port
from tests.rig.hosts import RouterProcess, end, wait_for, wall
from tests.router.conftest import CHAT
from tests.router.raw import Answer, answers

pytestmark = pytest.mark.slow

FILES = 256
CLIENTS = 1_000


@contextlib.asynccontextmanager
async def served(folder: Path, files: int | None) -> AsyncIterator[tuple[RouterProcess, FakeEngine, FakeEngine]]:
    async with fake_engine(Role.PREFILL) as prefill, fake_engine(Role.DECODE) as decode:
        flags = ("--prefill", f"http://127.0.0.1:{prefill.port},8998", "--decode", f"http://127.0.0.1:{decode.port}")
        router = RouterProcess(folder, *flags, files=files)
        await asyncio.to_thread(router.start)
        try:
            await asyncio.to_thread(wait_for, lambda: router.cluster()["ready"], 20.0, "no engine is ready")
            yield router, prefill, decode
        finally:
            await asyncio.to_thread(router.stop)


async def crowd(port: int, number: int, stack: contextlib.AsyncExitStack) -> list[Answer | None]:
    """Many clients that connect at once, ask for something small, and stay. None for those who got no answer."""

    async def one() -> Answer | None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                stack.callback(writer.close)
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                assert length is not None
                return answers(head + await reader.readexactly(int(length[1])))[0]
        return None

    return await asyncio.gather(*(one() for _ in range(number)))


async def recovers(session: aiohttp.ClientSession, url: str) -> None:
    """Requests are served again, as soon as the router has seen that the crowd is gone."""
    async with asyncio.timeout(HUNG_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(url, json=CHAT) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.02)


async def test_a_thousand_connections_to_a_router_of_256_files_hurt_nobody_who_was_there(tmp_path: Path) -> None:
    async with served(tmp_path, FILES) as (router, _, decode), contextlib.AsyncExitStack() as stack:
        may_end = asyncio.Event()

        async def long(call: Call) -> None:
            while not may_end.is_set():
                await call.event(chat_chunk("word"))
                await asyncio.sleep(0.05)
            await call.event(chat_chunk("", finish="stop"))
            await call.done()

        decode.behave = long
        session = await stack.enter_async_context(aiohttp.ClientSession())
        url = f"http://127.0.0.1:{router.http}/v1/chat/completions"
        running = await session.post(url, json={**CHAT, "stream": True})
        await running.content.readuntil(b"\n\n")
        decode.behave = answer_well
        since = wall()
        async with contextlib.AsyncExitStack() as held:
            seen = await crowd(router.http, CLIENTS, held)
            statuses = [a.status for a in seen if a is not None]
            assert set(statuses) == {200, 503}
            assert FILES * 0.5 < statuses.count(200) < FILES * 0.8
            refused = [a for a in seen if a is not None and a.status == 503]
            assert all(b"Retry-After: 1" in a.head and a.error["type"] == "service_unavailable" for a in refused)
            assert len(statuses) > CLIENTS * 0.9, "nearly all who are refused are told so"
            states = await asyncio.to_thread(router.engines)
            assert set(states.values()) == {"ready"}, "the admin listener answers, and nobody took an engine for dead"
            assert running.content.exception() is None
        await recovers(session, url)
        may_end.set()
        rest = await running.text()
        assert "[DONE]" in rest
        assert '"error"' not in rest
        lines = router.lines(since)
        assert 1 <= len(lines) <= wall() - since + 2, lines
        assert {line.event for line in lines} == {"connections were refused"}


async def test_requests_that_need_more_files_than_there_are_get_a_503_and_no_engine_is_blamed(tmp_path: Path) -> None:
    """Each client is let in, but its request would need two more files."""
    async with (
        served(tmp_path, FILES) as (router, prefill, decode),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):

        async def forever(call: Call) -> None:
            await call.aborted.wait()

        prefill.behave = decode.behave = forever
        url = f"http://127.0.0.1:{router.http}/v1/chat/completions"
        refusals: list[tuple[int, str]] = []
        unheard: list[aiohttp.ClientError] = []

        async def ask() -> None:
            try:
                async with session.post(url, json={**CHAT, "max_tokens": 1}) as response:  # small: the engines have room for all
                    refusals.append((response.status, (await response.json())["error"]["message"]))
            except aiohttp.ClientError as error:  # refused with its request still on the way: the answer may be lost with the connection
                unheard.append(error)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask()) for _ in range(FILES // 2)]
            await until(lambda: len(refusals) + len(unheard) + len(decode.calls) >= FILES // 2, HUNG_S)
            told = Gate(per_address=FILES, file_limit=FILES).farewells
            assert len(refusals) >= min(told, len(refusals) + len(unheard)), "so many at once are told, however slowly their requests come"
            assert set(refusals) == {(503, "this router has as many connections as it can take; come again")}
            assert decode.calls
            states = await asyncio.to_thread(router.engines)
            assert set(states.values()) == {"ready"}
            for task in tasks:
                task.cancel()
        prefill.behave = decode.behave = answer_well
        await until(lambda: not decode.live)
        await recovers(session, url)


# --- a log that nobody reads


@pytest.fixture
def stuffed() -> Iterator[int]:
    """A pipe that is full, and that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 65536)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    os.set_blocking(writer, True)
    yield writer
    os.close(writer)
    os.close(reader)


def test_a_router_serves_and_ends_though_nobody_reads_what_it_says(tmp_path: Path, stuffed: int) -> None:
    """Debug logs of an engine that is not there, requests that fail: each wants to be logged, to a pipe that is full from the beginning."""
    http, admin, nothing = free_port(), free_port(), free_port()
    command = [sys.executable, "-m", "disagg", "serve", "--role", "router", "--http", f"127.0.0.1:{http}", "--admin", f"127.0.0.1:{admin}"]
    command += ["--control", "127.0.0.1:0", "--state-dir", str(tmp_path / "state"), "--log-level", "debug"]
    command += ["--unified", f"http://127.0.0.1:{nothing}", "--queue-timeout-s", "0.05"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=stuffed, stderr=stuffed)
    try:

        def ask(path: str, port: int = http) -> int:
            with contextlib.suppress(httpx2.HTTPError):
                return httpx2.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code
            return 0

        wait_for(lambda: ask("/healthz") == 200, 20.0, "the router does not start")
        body = {"model": "x" * 2000, "messages": []}
        with httpx2.Client(timeout=30) as client, ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: client.post(f"http://127.0.0.1:{http}/v1/chat/completions", json=body), range(200)))
        assert {answer.status_code for answer in answers} == {503}
        assert ask("/metrics", admin) == 200
        assert process.poll() is None
    finally:
        status = end(process)
    assert status == 0, "it drains and ends, too"


@pytest.mark.parametrize("without", [True, False])
def test_a_router_does_not_start_without_the_strict_parser(tmp_path: Path, without: bool) -> None:
    command = [sys.executable, "-m", "disagg", "serve", "--role", "router", "--state-dir", str(tmp_path / "state")]
    for flag, port in (("--http", free_port()), ("--admin", free_port()), ("--control", 0)):
        command += [flag, f"127.0.0.1:{port}"]
    environ = {**os.environ, "AIOHTTP_NO_EXTENSIONS": "1"} if without else dict(os.environ)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            if not without:
                assert process.stdout is not None
                assert any(line.startswith("Started") for line in process.stdout)
                process.terminate()
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == int(without)
    assert (said.count("\n"), "C parser" in said) == ((1, True) if without else (0, False)), said
