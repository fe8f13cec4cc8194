"""The control plane's wires and the prober's, in memory: the same encoded frames and the same questions, over the simulated network."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp.client_reqrep import ConnectionKey
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from disagg.cluster.prober import Prober
from disagg.cluster.transport import Complaints, ControlClient, ControlServer, OnMessage
from disagg.model import EngineAddress
from disagg.security.keys import KeyPair
from tests.sim.loop import PROCESS, Process, SimLoop
from tests.sim.net import Network, Question

REDIAL_S = 0.3
HELD_S = 3.0
"""ZeroMQ's TCP_MAXRT: a frame that could not be delivered for so long goes down with its connection."""


def _here() -> tuple[SimLoop, Network, Process]:
    loop = asyncio.get_running_loop()
    process = PROCESS.get()
    assert isinstance(loop, SimLoop)
    assert process is not None
    return loop, loop.network, process


class Mail:
    """Carries frames in one direction between two processes, with faults; what meets a cut is lost, or comes late."""

    def __init__(self, network: Network, source: str, target: str, context: contextvars.Context, take: Callable[[bytes], None]) -> None:
        self._network = network
        self._source, self._target = source, target
        self._context = context
        self._take = take
        self._last_at = 0.0
        self.closed = False

    def post(self, frame: bytes) -> None:
        """Sends a frame."""
        network, chance = self._network, self._network.chance
        link = network.link(self._source, self._target)
        if link.drop and chance.random() < link.drop:
            network.note("frame dropped", self._source, self._target, len(frame))
            return
        self._send(frame, link.delay)
        if link.double and chance.random() < link.double:
            self._send(frame, link.delay)

    def _send(self, frame: bytes, delay: float) -> None:
        network = self._network
        now = network.loop.time()
        at = now + network.flight_s(self._source, self._target)
        if delay:  # overtakes nothing, is overtaken
            at += network.chance.random() * delay
        else:
            at = self._last_at = max(self._last_at, at)
        network.loop.call_at(at, self._arrive, frame, now, context=self._context)

    def _arrive(self, frame: bytes, sent_at: float) -> None:
        network = self._network
        if self.closed:
            return
        if network.is_cut(self._source, self._target):
            if network.loop.time() - sent_at < HELD_S:
                network.loop.call_later(0.1, self._arrive, frame, sent_at, context=self._context)
            return
        network.note("frame", self._source, self._target, len(frame))
        self._take(frame)


class SimControlServer(ControlServer):
    """The router's end."""

    def __init__(self, host: str, port: int, *, key: KeyPair, allows: Callable[[str], bool], log: Any) -> None:
        self._loop, self.network, self.process = _here()
        self.complaints = Complaints(log, self._loop)
        self.key = key
        self.allows = allows
        self.port = port
        self.context = contextvars.copy_context()
        self.on_message: OnMessage | None = None
        self._sessions: dict[bytes, Mail] = {}
        self._number = 0
        self._place = (host, port)
        assert self._place not in _servers(self.network), "two routers at one place"
        _servers(self.network)[self._place] = self
        self.process.on_death.append(lambda _quiet: self._vanish())

    def session(self, mail: Mail) -> bytes:
        """A host has connected."""
        self._number += 1
        name = b"%d" % self._number
        self._sessions[name] = mail
        return name

    def hear(self, session: bytes, key: str, frame: bytes) -> None:
        """A frame has come."""
        if self.on_message is not None and not self.process.dead:
            self.on_message(session, key, frame)

    def send(self, session: bytes, frame: bytes) -> None:
        mail = self._sessions.get(session)
        if mail is not None and not self.process.dead:
            mail.post(frame)

    def close(self) -> None:
        self.complaints.close()
        self._vanish()

    def _vanish(self) -> None:
        if _servers(self.network).get(self._place) is self:
            del _servers(self.network)[self._place]

    def __repr__(self) -> str:
        return f"<SimControlServer sessions={len(self._sessions)}>"


def _servers(network: Network) -> dict[tuple[str, int], SimControlServer]:
    found: dict[tuple[str, int], SimControlServer] = network.__dict__.setdefault("control_servers", {})
    return found


class SimControlClient(ControlClient):
    """A host's end: connects, and connects again when the router is another one."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        key: KeyPair,
        router_key: str,
        on_frame: Callable[[bytes], None],
        on_denied: Callable[[str], None],
    ) -> None:
        self._loop, self._network, self._process = _here()
        self._place = (host, port)
        self._key = key
        self._router_key = router_key
        self._hear = on_frame
        self._deny = on_denied
        self._server: SimControlServer | None = None
        self._out: Mail | None = None
        self._in: Mail | None = None
        self._closed = False
        self._dial()

    @property
    def has_room(self) -> bool:
        return self._out is not None

    def send(self, frame: bytes) -> None:
        if self._out is None or self._closed or self._process.dead:
            return
        if _servers(self._network).get(self._place) is not self._server:
            self._hang_up()
            self._loop.call_later(REDIAL_S, self._dial)
            return
        self._out.post(frame)

    def close(self, *, linger_ms: int = 0) -> None:
        self._closed = True
        if self._in is not None:
            self._in.closed = True
        if self._out is not None and not linger_ms:
            self._out.closed = True

    def _hang_up(self) -> None:
        if self._in is not None:
            self._in.closed = True
        self._server = self._out = self._in = None

    def _dial(self) -> None:
        here, there = self._process.ip, self._place[0]
        if self._closed or self._process.dead:
            return
        server = _servers(self._network).get(self._place)
        if server is None or self._network.is_cut(here, there) or self._network.is_cut(there, here) or server.process in self._loop.frozen:
            self._loop.call_later(REDIAL_S, self._dial)
            return
        self._loop.call_later(self._network.flight_s(here, there) * 3, self._connected, server)

    def _connected(self, server: SimControlServer) -> None:
        here, there = self._process.ip, self._place[0]
        if self._closed or self._process.dead:
            return
        if server.key.public != self._router_key:
            return  # it cannot decrypt our hello and never answers
        if not server.allows(self._key.public):
            self._deny("the router does not know this key")
            self._loop.call_later(REDIAL_S, self._dial)
            return
        self._server = server
        self._in = Mail(self._network, there, here, contextvars.copy_context(), self._give)
        session = server.session(self._in)
        self._out = Mail(self._network, here, there, server.context, lambda frame: server.hear(session, self._key.public, frame))

    def _give(self, frame: bytes) -> None:
        if not self._closed and not self._process.dead:
            self._hear(frame)


class SimProber(Prober):
    """Asks over the simulated network. What is asked, and what becomes of the answer, is production's."""

    async def get(self, address: EngineAddress, path: str) -> dict[str, Any]:
        status, body = await self._exchange(address, "GET", path, b"")
        _raise_for(status, address.url + path)
        return msgspec.json.decode(body, type=dict[str, Any])

    async def touch(self, address: EngineAddress, path: str) -> None:
        status, _ = await self._exchange(address, "GET", path, b"")
        _raise_for(status, address.url + path)

    async def post(self, address: EngineAddress, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        status, text = await self._exchange(address, "POST", path, msgspec.json.encode(body))
        try:
            return status, msgspec.json.decode(text, type=dict[str, Any])
        except ValueError:
            return status, {}

    async def _exchange(self, address: EngineAddress, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        _, network, _ = _here()
        question = Question(network, (address.host, address.port), method, path, body)
        try:
            return await question.answer
        except ConnectionRefusedError as error:
            key = ConnectionKey(address.host, address.port, False, True, None, None, None, None)
            raise aiohttp.ClientConnectorError(key, error) from error
        except ConnectionResetError as error:
            raise aiohttp.ServerDisconnectedError from error
        finally:
            question.answer.cancel()


def _raise_for(status: int, url: str) -> None:
    if status >= 400:
        nothing: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())
        raise aiohttp.ClientResponseError(aiohttp.RequestInfo(URL(url), "GET", nothing, URL(url)), (), status=status)
