"""The fault proxy passes bytes, and breaks what it is told to break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop

from tests.rig.proxy import Direction, Proxy

LIMIT_S = 20.0


@asynccontextmanager
async def echo() -> AsyncIterator[Proxy]:
    """A proxy in front of a server that sends back what it hears."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(LIMIT_S), Proxy(server.sockets[0].getsockname()[1]).running() as proxy:
            yield proxy
    finally:
        server.close()


async def test_bytes_and_ends_pass() -> None:
    async with echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        sent = bytes(range(256)) * 4000

        async def send() -> None:
            writer.write(sent)
            await writer.drain()
            writer.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(send(), name="send")
            got = group.create_task(reader.read(), name="read")
        assert got.result() == sent
        writer.close()


async def test_a_cut_comes_after_so_many_bytes_of_both_directions() -> None:
    async with echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"x" * 100)
        assert await reader.readexactly(100) == b"x" * 100
        proxy.cut_at(150)
        writer.write(b"y" * 100)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(100)
        assert proxy.cuts == 1
        proxy.heal()
        again, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"z" * 500)
        assert await again.readexactly(500) == b"z" * 500
        writer.close()


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_silence_holds_back_until_it_ends(direction: Direction) -> None:
    async with echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.silence(direction)
        writer.write(b"hello")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reader.readexactly(5)
        proxy.heal()
        assert await reader.readexactly(5) == b"hello"
        writer.close()


async def test_everything_is_late_by_the_delay_of_both_directions() -> None:
    async with echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.delay_s = 0.1
        began = time.monotonic()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert time.monotonic() - began >= 0.2
        writer.close()


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_client_that_leaves_in_the_middle_harms_nobody(runner: Callable[[Coroutine[None, None, None]], None]) -> None:
    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"x" * 1000)
                await writer.drain()
                await asyncio.sleep(0.001)

    async def leave() -> None:
        server = await asyncio.start_server(stream, "127.0.0.1", 0)
        async with asyncio.timeout(LIMIT_S), Proxy(server.sockets[0].getsockname()[1]).running() as proxy:
            for _ in range(10):
                proxy.delay_s = 0.02
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                await reader.readexactly(1000)
                writer.transport.abort()
                await asyncio.sleep(0.05)
                proxy.heal()
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await reader.readexactly(5) == b"xxxxx"
            writer.transport.abort()
        server.close()

    runner(leave())


async def test_without_a_target_a_client_is_reset() -> None:
    async with echo() as proxy:
        proxy.target = 1
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
