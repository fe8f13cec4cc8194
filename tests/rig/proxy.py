"""A TCP proxy that breaks on purpose: delay, a cut after so many bytes, silence in one direction. It runs in the event loop of its caller.

    client ──up──► proxy ──up──► target
    client ◄─down─ proxy ◄─down─ target

Silence holds bytes back and passes them on when it ends, as TCP does when packets come through again; whoever connects meanwhile is
connected to the proxy and hears nothing. A cut resets both sides.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

Direction = Literal["up", "down"]

_CHUNK_BYTES = 64 * 1024
_UNDER_WAY = 64  # chunks of one direction that a delay may hold at a time
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """One listening port in front of one target on loopback.

    Attributes:
        port: where it listens.
        target: the port behind it; may be changed, which only new connections see.
        delay_s: how much later everything arrives, in both directions.
        cut_after: bytes of both directions together after which a connection is reset, counted from when this was set; None: never.
        cuts: connections that were reset on purpose.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay_s = 0.0
        self.cut_after: int | None = None
        self.cuts = 0
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._connections: set[_Connection] = set()
        self.heal()

    def heal(self) -> None:
        """Everything passes again."""
        self.delay_s, self.cut_after = 0.0, None
        for direction in self._open.values():
            direction.set()

    def silence(self, direction: Direction) -> None:
        """Nothing more arrives in this direction."""
        self._open[direction].clear()

    def cut_at(self, bytes_more: int) -> None:
        """Every connection, those that come too, is reset when so many bytes more have passed through it."""
        for connection in self._connections:
            connection.passed = 0
        self.cut_after = bytes_more

    async def heard(self, direction: Direction) -> None:
        """Returns as soon as there is no silence in this direction."""
        await self._open[direction].wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        """Listens until the caller leaves; then every connection is reset."""
        async with asyncio.TaskGroup() as tasks:
            server = await asyncio.start_server(
                lambda reader, writer: self._came(tasks, reader, writer), "127.0.0.1", 0, limit=_CHUNK_BYTES
            )
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                for connection in list(self._connections):
                    connection.cancel()

    def _came(self, tasks: asyncio.TaskGroup, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self)
        self._connections.add(connection)
        connection.task = tasks.create_task(connection.run(reader, writer), name="a connection through the proxy")
        connection.task.add_done_callback(lambda _: self._connections.discard(connection))


class _Connection:
    """Two pumps that end together."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.passed = 0
        self.task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward: asyncio.StreamWriter | None = None
        try:
            back, onward = await asyncio.open_connection("127.0.0.1", self._proxy.target, limit=_CHUNK_BYTES)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump("up", reader, onward), name="up")
                pumps.create_task(self._pump("down", back, writer), name="down")
        except* (OSError, RuntimeError):
            pass  # one side is gone, or was cut: so is the other; uvloop tells by a RuntimeError that a transport was closed already
        finally:
            for side in (writer, onward):
                _reset(side)

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)
        async with asyncio.TaskGroup() as ends:
            ends.create_task(self._take(reader, under_way), name="take")
            ends.create_task(self._give(direction, writer, under_way), name="give")

    async def _take(self, reader: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            data = await reader.read(_CHUNK_BYTES)
            await under_way.put((clock() + self._proxy.delay_s, data))
            if not data:
                return

    async def _give(self, direction: Direction, writer: asyncio.StreamWriter, under_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, data = await under_way.get()
            if (wait_s := due - clock()) > 0:
                await asyncio.sleep(wait_s)
            await self._proxy.heard(direction)
            if writer.is_closing():
                raise ConnectionResetError("the other side is gone")
            if not data:
                writer.write_eof()
                return
            room = self._room(len(data))
            writer.write(data[:room])
            await writer.drain()
            if room < len(data):
                self._proxy.cuts += 1
                raise ConnectionResetError("cut on purpose")

    def _room(self, size: int) -> int:
        """How much of so many bytes may pass."""
        limit = self._proxy.cut_after
        room = size if limit is None else max(0, min(size, limit - self.passed))
        self.passed += room
        return room


def _reset(writer: asyncio.StreamWriter | None) -> None:
    """Ends a connection with a reset where bytes are under way, as a machine that vanished and came back does."""
    if writer is None or writer.is_closing():
        return
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
