"""A simulated network: streams with latency, cuts, resets, back-pressure; and messages with faults of their own.

TCP as far as a program can tell: bytes in order or not at all; what is sent over a cut link arrives when the link heals (the kernel repeats
it) unless its receiver has gone by then; a FIN is repeated too, a reset is not; who sends to a closed socket is reset; a process that
stands still goes on receiving into its buffers; a machine that loses power says nothing to anybody.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.loop import KERNEL, PROCESS, Process, SimLoop

WINDOW = 64 * 1024
"""Bytes of one direction that the two kernels hold."""
HIGH_WATER = 64 * 1024
LOW_WATER = 16 * 1024
SPLIT_ONE_IN = 50
SYN_AGAIN_S = 1.0
ASK_AGAIN_S = 0.2

_DATA, _FIN, _RST = "data", "fin", "rst"


class Link:
    """One direction between two hosts. Seconds and probabilities.

    Attributes:
        cut: nothing arrives.
        drop, double, delay: of messages of the control plane, not of streams.
    """

    def __init__(self) -> None:
        self.latency_s = 0.0002
        self.jitter_s = 0.0002
        self.cut = False
        self.drop = 0.0
        self.double = 0.0
        self.delay = 0.0


class Listener:
    """What `create_server` returns."""

    def __init__(self, network: Network, process: Process, address: tuple[str, int], factory: Callable[[], Any]) -> None:
        self.process = process
        self.factory = factory
        self.context = contextvars.copy_context()
        self.address = address
        self.sockets: list[Any] = []
        self.answers: Callable[[Any, str, str, bytes], None] | None = None  # see `Question`
        self._network = network

    def close(self) -> None:
        """Listens no more."""
        if self._network.listeners.get(self.address) is self:
            del self._network.listeners[self.address]

    async def wait_closed(self) -> None:
        """It is closed at once."""

    def is_serving(self) -> bool:
        return self._network.listeners.get(self.address) is self

    async def start_serving(self) -> None:
        """It does."""


class Network:
    """All links and listeners.

    Args:
        note: told what happens, for the trace.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, note: Callable[..., None]) -> None:
        self.loop = loop
        self.chance = chance
        self.note = note
        self.listeners: dict[tuple[str, int], Listener] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self.ends: dict[End, None] = {}
        self.down: dict[str, None] = {}
        self._ports = 40000
        loop.network = self

    # --- links

    def link(self, source: str, target: str) -> Link:
        """The direction from one host to another."""
        found = self.links.get((source, target))
        if found is None:
            found = self.links[source, target] = Link()
        return found

    def is_cut(self, source: str, target: str) -> bool:
        """Whether nothing arrives there from here."""
        if source == target:
            return False
        return self.link(source, target).cut or source in self.down or target in self.down

    def flight_s(self, source: str, target: str) -> float:
        """How long something takes now."""
        if source == target:
            return 0.00005
        link = self.link(source, target)
        return link.latency_s + link.jitter_s * self.chance.random()

    def cut(self, source: str, target: str) -> None:
        """Nothing arrives any more in this direction."""
        self.link(source, target).cut = True

    def heal(self, source: str, target: str) -> None:
        """What was sent and not lost arrives now."""
        self.link(source, target).cut = False
        self._wake(lambda end: end.process.ip == source and end.peer_ip == target)

    def power(self, ip: str, on: bool) -> None:
        """A machine loses its power, or boots."""
        if on:
            self.down.pop(ip, None)
            self._wake(lambda end: ip in {end.process.ip, end.peer_ip})
        else:
            self.down[ip] = None

    def _wake(self, is_meant: Callable[[End], bool]) -> None:
        for end in [e for e in self.ends if is_meant(e)]:
            end.retransmit()

    # --- connections

    def listen(self, factory: Callable[[], Any], host: str, port: int) -> Listener:
        """Raises OSError: the address is taken."""
        process = PROCESS.get()
        assert process is not None, "who listens must be a process"
        if (host, port) in self.listeners:
            raise OSError(98, "address in use")
        listener = self.listeners[host, port] = Listener(self, process, (host, port), factory)
        process.on_death.append(lambda _quiet: listener.close())
        return listener

    def free_port(self) -> int:
        """A port that nobody has."""
        self._ports += 1
        return self._ports

    async def connect(self, factory: Callable[[], Any], host: str, port: int) -> tuple[End, Any]:
        """Raises OSError: it is refused."""
        process = PROCESS.get()
        assert process is not None, "who connects must be a process"
        end = End(self, process, (process.ip, self.free_port()), (host, port), contextvars.copy_context())
        made = self.loop.create_future()
        self._send_syn(end, made, SYN_AGAIN_S)
        try:
            await made
        except BaseException:
            end.vanish()
            raise
        end.open(factory())
        return end, end.protocol

    def _send_syn(self, end: End, made: asyncio.Future[None], again_s: float) -> None:
        if not made.done() and not end.process.dead:
            self.loop.call_later(self.flight_s(end.process.ip, end.peer_ip), self._syn_arrives, end, made, again_s, context=KERNEL)

    def _syn_arrives(self, end: End, made: asyncio.Future[None], again_s: float) -> None:
        if made.done() or end.process.dead:
            return
        here, there = end.process.ip, end.peer_ip
        if self.is_cut(here, there) or self.is_cut(there, here):
            self.loop.call_later(again_s, self._send_syn, end, made, again_s * 2, context=KERNEL)
            return
        listener = self.listeners.get(end.remote)
        back_s = self.flight_s(there, here)
        if listener is None:
            self.loop.call_later(back_s, _settle, made, ConnectionRefusedError(111, "refused"), context=end.context)
            return
        other = End(self, listener.process, end.remote, end.local, listener.context.copy())
        other.peer, end.peer = end, other
        self.note("connected", end.process.name, other.process.name)
        self.loop.call_soon(self._accept, other, listener, context=other.context)
        self.loop.call_later(back_s, _settle, made, None, context=end.context)

    def _accept(self, end: End, listener: Listener) -> None:
        if not end.gone:
            end.open(listener.factory())


class Question:
    """One HTTP exchange of a prober, without the streams that would carry it: looking at engines is most of what an idle cluster does.

    It meets what a connection would: refusals, cuts (it is repeated until its asker gives up), processes that stand still or end.

    Attributes:
        answer: status and body.
    """

    def __init__(self, network: Network, place: tuple[str, int], method: str, path: str, body: bytes) -> None:
        process = PROCESS.get()
        assert process is not None, "who asks must be a process"
        self.answer: asyncio.Future[tuple[int, bytes]] = network.loop.create_future()
        self._network = network
        self._here, self._place = process.ip, place
        self._what = (method, path, body)
        self._context = contextvars.copy_context()
        self._process = process
        self._go()

    def _go(self) -> None:
        network, there = self._network, self._place[0]
        if self.answer.done() or self._process.dead:
            return
        if network.is_cut(self._here, there) or network.is_cut(there, self._here):
            network.loop.call_later(ASK_AGAIN_S, self._go, context=KERNEL)
            return
        listener = network.listeners.get(self._place)
        flight_s = network.flight_s(self._here, there)
        if listener is None:
            network.loop.call_later(2 * flight_s, self._refused, context=self._context)
        else:
            network.loop.call_later(flight_s, self._arrive, listener, context=listener.context)

    def _refused(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionRefusedError(111, "refused"))

    def _arrive(self, listener: Listener) -> None:
        """Runs in the process that is asked."""
        if listener.process.dead:
            self._network.loop.call_soon(self._broken, context=self._context)
        else:
            assert listener.answers is not None
            listener.answers(self, *self._what)

    def _broken(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionResetError(104, "reset"))

    def reply(self, status: int, body: bytes) -> None:
        """Called by who was asked."""
        network, there = self._network, self._place[0]
        network.note("looked", self._process.name, there, status, len(body))
        if network.is_cut(there, self._here):
            network.loop.call_later(ASK_AGAIN_S, self.reply, status, body, context=KERNEL)
        elif not self.answer.done():
            network.loop.call_later(network.flight_s(there, self._here), self._replied, status, body, context=self._context)

    def _replied(self, status: int, body: bytes) -> None:
        if not self.answer.done() and not self._process.dead:
            self.answer.set_result((status, body))


def _settle(made: asyncio.Future[None], error: OSError | None) -> None:
    if not made.done():
        if error is None:
            made.set_result(None)
        else:
            made.set_exception(error)


class End(asyncio.Transport):
    """One end of a connection.

    Attributes:
        gone: closed on this side; nothing is received any more.
    """

    def __init__(
        self, network: Network, process: Process, local: tuple[str, int], remote: tuple[str, int], context: contextvars.Context
    ) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.local = local
        self.remote = remote
        self.peer_ip = remote[0]
        self.context = context
        self.peer: End | None = None
        self.protocol: Any = None
        self.gone = False
        self._closing = False
        self._reading = True
        self._writing_paused = False
        self._eof_sent = False
        self._told = False
        self._wire: deque[tuple[str, bytes]] = deque()  # on its way to the peer
        self._late = 0  # of them, those that came to a cut
        self._skip = 0  # of their timers, those whose segment was taken together with an earlier one
        self._last_at = 0.0
        self._flight = 0
        self._buffer: deque[bytes] = deque()
        self._buffered = 0
        self._unread: deque[tuple[str, bytes]] = deque()
        network.ends[self] = None
        process.on_death.append(self._process_died)

    # --- asyncio.Transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self.remote, "sockname": self.local}.get(name, default)

    def is_closing(self) -> bool:
        return self._closing

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            if self._unread:
                self.network.loop.call_soon(self._read_on, context=self.context)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self._buffered

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._eof_sent = True
        self._pump()

    def write(self, data: Any) -> None:
        if self._closing or self._eof_sent or self.process.dead or not data:
            return
        if self._buffer or self._flight + len(data) > WINDOW:
            self._buffer.append(bytes(data))
            self._buffered += len(data)
            self._pump()
            if self._buffered > HIGH_WATER and not self._writing_paused:
                self._writing_paused = True
                self.protocol.pause_writing()
        else:
            self._send(bytes(data))

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._buffer:
                self._finish(None)

    def abort(self) -> None:
        self._closing = True
        self._buffer.clear()
        self._finish(None)

    # --- sending

    def _send(self, data: bytes) -> None:
        chance = self.network.chance
        self._flight += len(data)
        if len(data) > 1 and chance.random() * SPLIT_ONE_IN < 1.0:
            at = chance.randrange(1, len(data))
            self._carry(_DATA, data[:at])
            data = data[at:]
        self._carry(_DATA, data)

    def _carry(self, kind: str, data: bytes) -> None:
        if self.peer is None:
            return
        network = self.network
        self._last_at = max(self._last_at, network.loop.time() + network.flight_s(self.process.ip, self.peer_ip))
        self._wire.append((kind, data))
        network.loop.call_at(self._last_at, self._arrive, context=self.peer.context)

    def _pump(self) -> None:
        while self._buffer and self._flight + len(self._buffer[0]) <= max(WINDOW, len(self._buffer[0])):
            data = self._buffer.popleft()
            self._buffered -= len(data)
            self._send(data)
        if self._writing_paused and self._buffered <= LOW_WATER and not self._told:
            self._writing_paused = False
            self.protocol.resume_writing()
        if not self._buffer and self._eof_sent and not self.gone:
            self._carry(_FIN, b"")
        if not self._buffer and self._closing:
            self._finish(None)

    def retransmit(self) -> None:
        """The link healed: what was lost on it comes now."""
        late, self._late = self._late, 0
        assert self.peer is not None or not late
        for _ in range(late):
            assert self.peer is not None
            at = self.network.loop.time() + self.network.flight_s(self.process.ip, self.peer_ip)
            self._last_at = max(self._last_at, at)
            self.network.loop.call_at(self._last_at, self._arrive, context=self.peer.context)
        self.network.loop.call_at(self._last_at, self._forget_if_done, context=KERNEL)

    def _arrive(self) -> None:
        """Runs in the peer's process: one segment of ours has come there."""
        if self._skip:
            self._skip -= 1
            return
        network, peer = self.network, self.peer
        if not self._wire or peer is None:
            return  # a reset has taken away what was under way
        if network.is_cut(self.process.ip, self.peer_ip):
            if self._wire and self._wire[0][0] == _RST:
                self._wire.popleft()
            else:
                self._late += 1
            return
        kind, data = self._wire.popleft()
        if kind is _DATA and self._wire and self._wire[0][0] is _DATA and self._last_at <= network.loop.time():
            data = self._merge(data)
        peer.receive(kind, data)
        self._forget_if_done()

    def _merge(self, data: bytes) -> bytes:
        """All that came while its receiver stood still is read at once."""
        parts = [data]
        while self._wire and self._wire[0][0] is _DATA:
            parts.append(self._wire.popleft()[1])
            if self._late:
                self._late -= 1
            else:
                self._skip += 1
        return b"".join(parts)

    # --- receiving

    def open(self, protocol: Any) -> None:
        """Connects it with a protocol, and hands over what has come already."""
        self.protocol = protocol
        protocol.connection_made(self)
        if self._unread:
            self._read_on()

    def receive(self, kind: str, data: bytes) -> None:
        """A segment came."""
        if kind is _RST:
            self._reset()
        elif self.gone or self.process.dead:
            if kind is _DATA and self.peer is not None and not self.peer.gone:
                self._answer_with_reset()
        elif self.protocol is None or not self._reading or self._unread:
            self._unread.append((kind, data))
        else:
            self._deliver(kind, data)

    def _read_on(self) -> None:
        while self._unread and self._reading and not self.gone:
            self._deliver(*self._unread.popleft())

    def _deliver(self, kind: str, data: bytes) -> None:
        if self._closing:
            return
        if kind is _DATA:
            self.network.note("data", self.peer.process.name if self.peer else "?", self.process.name, len(data))
            self.protocol.data_received(data)
            if self.peer is not None:
                self.peer.taken(len(data))
        elif not self.protocol.eof_received():
            self.close()

    def taken(self, size: int) -> None:
        """The peer has read so much of what was sent."""
        self._flight -= size
        if self._buffer and not self.process.dead:
            self.network.loop.call_soon(self._pump_if_open, context=self.context)

    def _pump_if_open(self) -> None:
        if not self.gone:
            self._pump()

    # --- ends

    def _answer_with_reset(self) -> None:
        assert self.peer is not None
        self._last_at = max(self._last_at, self.network.loop.time() + self.network.flight_s(self.process.ip, self.peer_ip))
        self._wire.append((_RST, b""))
        self.network.loop.call_at(self._last_at, self._arrive, context=self.peer.context)

    def _reset(self) -> None:
        self._closing = True
        self._buffer.clear()
        self._wire.clear()
        self._late = self._skip = 0
        if not self.gone:
            self.gone = True
            self._lose(ConnectionResetError(104, "Connection reset by peer"))

    def _finish(self, error: Exception | None) -> None:
        if self.gone:
            return
        self.gone = True
        if not self.process.dead:
            self._carry(_FIN, b"")
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        if not self.process.dead and self.protocol is not None and not self._told:
            self._told = True
            self.network.loop.call_soon(self._tell, error, context=self.context)
        self._forget_if_done()

    def _tell(self, error: Exception | None) -> None:
        if not self.process.dead:
            self.network.note("closed", self.process.name, self.remote[0], type(error).__name__ if error else "")
            self.protocol.connection_lost(error)

    def vanish(self) -> None:
        """Given up before it was open."""
        self._closing = True
        if self.peer is not None:
            self._finish(None)
        self.gone = True
        self._forget_if_done()

    def _process_died(self, quiet: bool) -> None:
        if self.gone:
            return
        self._closing = self.gone = True
        self._buffer.clear()
        if not quiet and self.peer is not None:
            kind = _RST if self._unread or self.network.chance.random() < 0.3 else _FIN
            self._carry(kind, b"")
        self._forget_if_done()

    def _forget_if_done(self) -> None:
        """An end is kept as long as something of it may still arrive."""
        if self.gone and not self._wire and self in self.network.ends:
            del self.network.ends[self]
            if not self.process.dead:
                self.process.on_death.remove(self._process_died)

    def __hash__(self) -> int:
        return id(self) >> 4

    def __repr__(self) -> str:
        return f"<End {self.process.name} {self.local} -> {self.remote}{' gone' if self.gone else ''}>"
