"""The two ends of a KV handoff on a real socket: thin adapters around ``transfer``'s machines.

A link owns its transport and nothing else. What it learns goes to its owner, the engine, by plain calls in the event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Protocol, cast

from disagg.engines.embedded.frames import (
    Frame,
    FrameReader,
    HandedOver,
    Header,
    Hello,
    Kind,
    ProtocolError,
    frame,
    page_header,
    sentence_frame,
)
from disagg.engines.embedded.transfer import (
    Arrived,
    Close,
    Command,
    Failed,
    HandedToDecode,
    Receiver,
    Send,
    Sender,
    SenderState,
    WriterDone,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg.engines.embedded.faults import Faults

WRITE_BUFFER_BYTES = 256 * 1024
LATE_WRITE_S = 0.3
"""How long the fault ``late-write`` goes on after CANCEL: long enough for the pages to be wanted by somebody else."""


def die() -> None:
    """The fault ``die``: as an out-of-memory kill, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def _no_delay(transport: asyncio.BaseTransport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def leads_to(host: str, bound: str) -> bool:
    """Whether a connection to ``host`` meets a socket of this machine that listens on the address ``bound``.

    A name is not looked up, that would block: it counts as somewhere else.
    """
    try:
        wanted, own = ipaddress.ip_address(host.strip("[]")), ipaddress.ip_address(bound)
    except ValueError:
        return False
    return _is_local(wanted) if own.is_unspecified else wanted == own


def _is_local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """The system routes to its own addresses from those same addresses. Nothing is sent."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))
        except OSError:
            return False
        return ipaddress.ip_address(probe.getsockname()[0]) == address


class ReceiveOwner(Protocol):
    """What a ReceiveLink tells its engine. ``key`` is the job's."""

    faults: Faults

    def kv_arrived(self, key: str, handed: HandedOver) -> None:
        """The pages are complete."""

    def kv_failed(self, key: str, sentence: str) -> None:
        """They will never be."""

    def kv_writer_done(self, key: str, late_writes: int) -> None:
        """Nobody writes into the pages any more."""


class ReceiveLink(asyncio.BufferedProtocol):
    """Decode's end. The transport reads straight into the pool's pages."""

    def __init__(self, key: str, machine: Receiver, owner: ReceiveOwner) -> None:
        self.key = key
        self.machine = machine
        self._owner = owner
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast("asyncio.Transport", transport)
        _no_delay(transport)
        self._do(self.machine.connected(now=time.monotonic()))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong."""
        return self.machine.reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        now = time.monotonic()
        try:
            got = self.machine.reader.filled(nbytes)
        except ProtocolError as error:
            self._do(self.machine.broken(error, now=now))
            return
        if got is not None:
            self._do(self.machine.received(got, now=now))
            if self._owner.faults.strikes("die", "transfer", self.machine.bytes_received):
                die()

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed and drained: nothing can be written any more."""
        self.lost(f"the connection to prefill was lost{f' ({exc})' if exc else ''}")

    def lost(self, sentence: str) -> None:
        """The connection is gone or never came to be."""
        self._do(self.machine.closed(sentence))

    def cancel(self, sentence: str) -> None:
        """The request ended."""
        self._do(self.machine.cancel(sentence, now=time.monotonic()))

    def tick(self, now: float) -> None:
        """Time has passed."""
        self._do(self.machine.tick(now=now))

    def _do(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Send(data) if self._transport is not None:
                    self._transport.write(data)
                case Close(now) if self._transport is not None:
                    self._transport.abort() if now else self._transport.close()
                case Arrived(handed):
                    self._owner.kv_arrived(self.key, handed)
                case Failed(sentence):
                    self._owner.kv_failed(self.key, sentence)
                case WriterDone():
                    self._owner.kv_writer_done(self.key, self.machine.late_writes)
                case _:
                    pass


class SendOwner(Protocol):
    """What a SendLink tells its engine."""

    faults: Faults

    def kv_greeted(self, link: SendLink, hello: Hello) -> None:
        """Decode named its pages: answer with ``link.start`` or ``link.refuse``, now or later."""

    def kv_handed_over(self, key: str, sent_bytes: int, seconds: float) -> None:
        """Decode has acknowledged everything."""

    def kv_send_failed(self, key: str, sentence: str) -> None:
        """The handoff ended without success."""

    def kv_link_gone(self, link: SendLink) -> None:
        """The connection is closed."""


class SendLink(asyncio.BufferedProtocol):
    """Prefill's end: first without a machine, until HELLO is there and its request too."""

    def __init__(self, owner: SendOwner) -> None:
        self.opened_at = time.monotonic()
        self.hello: Hello | None = None
        self.key = ""
        self.machine: Sender | None = None
        self._owner = owner
        self._reader = FrameReader(self._no_pages)
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._first_write: float | None = None
        self._corrupted = False
        self._late: asyncio.TimerHandle | None = None
        self._late_cancel: Frame | None = None

    # --- asyncio calls these ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A decode engine, presumably."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        _no_delay(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        try:
            got = self._reader.filled(nbytes)
            if got is not None:
                self._received(got)
        except ProtocolError as error:
            self.refuse(str(error))

    def pause_writing(self) -> None:
        """Decode reads more slowly than prefill computes."""
        self._paused = True

    def resume_writing(self) -> None:
        """There is room again."""
        self._paused = False
        self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        """Decode is gone."""
        if self._late is not None:
            self._late.cancel()
        if self.machine is not None:
            self._do(self.machine.closed(f"the connection to decode was lost{f' ({exc})' if exc else ''}"))
        self._owner.kv_link_gone(self)

    # --- the engine calls these ---

    def start(self, key: str, machine: Sender) -> None:
        """Both legs are there."""
        self.key = key
        self.machine = machine
        self._do(machine.progress(now=time.monotonic()))

    def refuse(self, sentence: str) -> None:
        """Say why there will be no KV cache, and close."""
        if self.machine is not None:
            if self._late is None:
                self._do(self.machine.abort(sentence))
        elif self._transport is not None and not self._transport.is_closing():
            self._do([Send(sentence_frame(Kind.FAIL, sentence)), Close()])

    def progress(self) -> None:
        """The engine's steps advance."""
        if self.machine is not None:
            self._do(self.machine.progress(now=time.monotonic()))

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.machine is not None and self._late is None:
            self._do(self.machine.tick(now=now))

    def pump(self) -> None:
        """Write what was pushed, as long as the transport has room."""
        machine, transport = self.machine, self._transport
        if machine is None or transport is None:
            return
        faults = self._owner.faults
        while not self._paused and not faults.strikes("stall", "transfer", machine.bytes_sent):
            now = time.monotonic()
            item = machine.pull(now=now)
            if item is None:
                return
            if self._first_write is None:
                self._first_write = now
            header, body = item
            if body and faults.strikes("corrupt", "transfer", machine.bytes_sent) and not self._corrupted:
                self._corrupted = True
                header = header[:-1] + bytes([header[-1] ^ 1])
            transport.write(header)
            if body:
                transport.write(body)
            if faults.strikes("die", "transfer", machine.bytes_sent):
                die()

    # --- inside ---

    def _received(self, got: Frame) -> None:
        if self.machine is not None:
            if got.header.kind is Kind.CANCEL and self._owner.faults.late_write:
                self._write_late(got)
            else:
                self._do(self.machine.received(got))
        elif self.hello is None:
            if got.header.kind is not Kind.HELLO or not got.intact:
                raise ProtocolError(f"a handoff begins with an intact HELLO, not with {got.header.kind.name}")
            self.hello = Hello.unpack(got.payload)
            self._owner.kv_greeted(self, self.hello)
        else:  # parked: nothing was written yet
            self._do([Send(frame(Kind.STOPPED)), Close()])

    def _write_late(self, cancel: Frame) -> None:
        """The fault ``late-write``: deaf to CANCEL for a while."""
        self._late_cancel = cancel
        self._late = asyncio.get_running_loop().call_later(LATE_WRITE_S, self.stop_late)

    def stop_late(self) -> None:
        """The end of ``late-write``: write every page again, and only then say STOPPED."""
        machine, transport, cancel = self.machine, self._transport, self._late_cancel
        if self._late is None or machine is None or transport is None or cancel is None:
            return
        self._late.cancel()
        self._late = None
        for position, own in enumerate(machine.pushed):
            content = machine.page_bytes(own)
            transport.write(page_header(machine.hello.pages[position], position, content))
            transport.write(content)
        self._do(machine.received(cancel))

    @staticmethod
    def _no_pages(_header: Header) -> memoryview:
        raise ProtocolError("decode sent a page to prefill")

    def _do(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Send(data) if self._transport is not None:
                    self._transport.write(data)
                case Close(now) if self._transport is not None:
                    self._transport.abort() if now else self._transport.close()
                case HandedToDecode():
                    assert self.machine is not None
                    self._owner.kv_handed_over(self.key, self.machine.bytes_sent, self._seconds())
                case Failed(sentence):
                    self._owner.kv_send_failed(self.key, sentence)
                case _:
                    pass

    def _seconds(self) -> float:
        return time.monotonic() - (self._first_write if self._first_write is not None else self.opened_at)

    @property
    def sending(self) -> bool:
        """Whether this end still writes or waits for ACK."""
        return self.machine is not None and self.machine.state in {SenderState.SENDING, SenderState.ENDED}
