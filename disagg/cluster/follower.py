"""Follows the KV events of one engine process: the sockets of one `Cache`.

engine ── PUB ────► SUB ────► Cache (decides)
       ── ROUTER ◄► DEALER ─────┘  replays; a socket of its own for each, so that no answer is taken for another one's

The sockets are plain and stay on this machine. An engine that is not up yet is waited for; one that does not answer is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
import zmq
import zmq.asyncio

from disagg.engines.base import KvSource
from disagg.wire.codec import FrameError
from disagg.wire.kv_events import (
    PAYLOAD_LIMIT,
    AskReplay,
    BatchSeen,
    Began,
    Cache,
    Dropped,
    Event,
    QuietSeen,
    ReplayEnded,
    ReplayFailed,
    ReplaySeen,
    Spoiled,
    read_batch,
)

QUEUE_LENGTH = 1000
REPLAY_PATIENCE_S = 5.0
STALL_MS = 1000
"""An answer that has begun is written in one go."""
QUIET_S = 5.0
"""After so long without a batch the engine is asked whether there was one."""

Socket = zmq.asyncio.Socket


class KvFollower:
    """Keeps a `Cache` true to an engine process, for as long as it runs.

    Args:
        source: where the engine publishes.
        patience_s: how long an answer may take to begin.
        quiet_s: see `QUIET_S`.

    Attributes:
        cache: what the engine holds.
    """

    def __init__(
        self,
        source: KvSource,
        *,
        log: structlog.typing.FilteringBoundLogger,
        patience_s: float = REPLAY_PATIENCE_S,
        quiet_s: float = QUIET_S,
        cache: Cache | None = None,
    ) -> None:
        self._source = source
        self._log = log
        self._patience_s = patience_s
        self._quiet_s = quiet_s
        self.cache = cache or Cache()
        self._asked: AskReplay | None = None
        self._stir = asyncio.Event()  # a replay is wanted
        self._stopped = asyncio.Event()
        self._said = ""

    def stop(self) -> None:
        """The process has ended, or somebody else follows it: `run` returns."""
        self._stopped.set()

    def dropped(self) -> None:
        """The engine has emptied its cache, whether it says so or not."""
        self._feed(Dropped())

    async def run(self) -> None:
        """Follows until stopped. Never raises for what the engine does."""
        context = zmq.asyncio.Context(io_threads=1)
        try:
            async with asyncio.TaskGroup() as tasks:
                work = [
                    tasks.create_task(self._listen(context), name="KV events"),
                    tasks.create_task(self._ask_on(context), name="replays of KV events"),
                ]
                self._feed(Began())
                await self._stopped.wait()
                for task in work:
                    task.cancel()
        except* Exception as error:  # noqa: BLE001  # the engine serves all the same; only what it holds is not known
            self._log.exception("KV events cannot be followed", source=repr(self._source), exc_info=error)
            self.cache.handle(Spoiled("its KV events cannot be followed"))
        finally:
            context.destroy(linger=0)

    def _feed(self, event: Event) -> None:
        for command in self.cache.handle(event):
            self._asked = command
            self._stir.set()
        if self.cache.reason != self._said:
            self._said = self.cache.reason
            self._log.info("prefix cache", known=self.cache.known, why=self._said)

    # --- live

    async def _listen(self, context: zmq.asyncio.Context) -> None:
        socket = _socket(context, zmq.SUB, self._source.events)
        socket.subscribe(b"")
        while True:
            if await socket.poll(int(self._quiet_s * 1000)):
                self._take(BatchSeen, await socket.recv_multipart())
                await asyncio.sleep(0)  # a burst must not keep the agent from its heartbeats
            else:
                self._feed(QuietSeen())

    def _take(self, kind: type[BatchSeen | ReplaySeen], frames: Sequence[bytes]) -> bool:
        """False at the end of a replay."""
        try:
            found = read_batch(frames)
        except FrameError as error:
            self._feed(Spoiled(str(error)))
            return True
        if found is not None:
            self._feed(kind(*found))
        return found is not None

    # --- replays

    async def _ask_on(self, context: zmq.asyncio.Context) -> None:
        while True:
            await self._stir.wait()
            self._stir.clear()
            asked = self._asked
            if asked is not None:
                answered = await self._replay(context, asked)
                if asked is self._asked:
                    self._feed(ReplayEnded() if answered else ReplayFailed())

    async def _replay(self, context: zmq.asyncio.Context, asked: AskReplay) -> bool:
        """One request; False when the answer does not end in time. Given up when another one is wanted."""
        socket = _socket(context, zmq.DEALER, self._source.replay)
        limit_ms = int(self._patience_s * 1000)
        try:
            if not await socket.poll(limit_ms, zmq.POLLOUT):  # type: ignore[call-arg]  # with IMMEDIATE it is writable once it is connected
                return False
            await socket.send_multipart((b"", asked.start.to_bytes(8, "big")))
            while asked is self._asked:
                if not await socket.poll(limit_ms):  # the end of a long answer may have been dropped
                    return False
                if not self._take(ReplaySeen, (await socket.recv_multipart())[1:]):
                    return True
                limit_ms = min(limit_ms, STALL_MS)
                await asyncio.sleep(0)
            return False
        finally:
            socket.close(0)

    def __repr__(self) -> str:
        return f"<KvFollower {self._source.events} {self.cache!r}>"


def _socket(context: zmq.asyncio.Context, kind: int, endpoint: str) -> Socket:
    socket: Any = context.socket(kind)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.RCVHWM, QUEUE_LENGTH),
        (zmq.MAXMSGSIZE, PAYLOAD_LIMIT),
        (zmq.RECONNECT_IVL, 100),
        (zmq.RECONNECT_IVL_MAX, 1000),
        (zmq.IMMEDIATE, 1),
        (zmq.IPV6, 1),
    ):
        socket.setsockopt(option, value)
    socket.connect(endpoint)
    found: Socket = socket
    return found
