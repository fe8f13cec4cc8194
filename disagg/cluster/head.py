"""The router's end of the control plane: frames in, frames out, and who belongs to the cluster.

ControlServer ──► Head ──► Registrar   (may this key speak, and under which name)
                    ├────► Members     (which hosts are there; decides)
                    └────► Controller  (their engines)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import msgspec
import structlog

from disagg import __version__
from disagg.cluster.controller import Controller
from disagg.cluster.members import (
    Command,
    Event,
    ForgetHost,
    GoodbyeSeen,
    HeartbeatSeen,
    HelloSeen,
    HostRevoked,
    Members,
    PublishHost,
    SendAck,
    SendRefusal,
    SendWelcome,
    Stalled,
    TakeReports,
    Tick,
)
from disagg.cluster.registrar import Registrar
from disagg.cluster.transport import Complaints
from disagg.errors import OrderError, StartError
from disagg.model import EngineId, HostId, HostState, HostView, Role
from disagg.wire.codec import FrameError, UnknownKindError, encode, to_router
from disagg.wire.messages import (
    Ack,
    Answer,
    Goodbye,
    Heartbeat,
    Hello,
    KvDelta,
    KvResync,
    KvSnapshot,
    Message,
    Order,
    Refused,
    Register,
    ToRouter,
    Welcome,
)

SUSPECT_PATIENCE_S = 3.0
SUSPECT_POLL_S = 0.05
ORDER_LIMIT_S = {"switch": 70.0, "restart": 10.0, "drain": 3.0, "undrain": 3.0}
REFUSAL_SHOWN_S = 60.0

Send = Callable[[bytes, bytes], None]
SpawnTask = Callable[[Coroutine[Any, Any, None], str], Any]


class HostRow(msgspec.Struct, frozen=True):
    """A registered host, as `disagg hosts ls` shows it."""

    name: str
    roles: tuple[Role, ...]
    key: str
    state: str
    reason: str
    release: str = ""
    incarnation: int = 0


class Head:
    """Speaks with the agents.

    Args:
        router: random, one per start of the router.
        send: sends a frame to a session.
        complaints: where what is refused is counted.
        spawn: runs a coroutine as a task that somebody owns.

    Attributes:
        messages: how many came, by kind; what could not be read by why.
    """

    def __init__(
        self,
        *,
        router: str,
        registrar: Registrar,
        controller: Controller,
        send: Send,
        complaints: Complaints,
        spawn: SpawnTask,
        heartbeat_interval_s: float,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._router = router
        self._registrar = registrar
        self._controller = controller
        self._send_frame = send
        self._complaints = complaints
        self._spawn = spawn
        self._interval_s = heartbeat_interval_s
        self._log = log
        self._members = Members()
        self._orders: dict[int, tuple[HostId, asyncio.Future[Answer]]] = {}
        self._order_ids = 0
        self._faults: dict[HostId, tuple[str, ...]] = {}
        self._refusals: dict[HostId, tuple[float, str]] = {}  # the last one of each host, and when
        self.messages: Counter[str] = Counter()

    # --- frames in

    def hear(self, session: bytes, key: str, frame: bytes) -> bool:
        """A frame came over a connection that this key was authenticated for. Never raises for what a peer sends.

        Returns:
            False for a frame that makes no sense. One of a kind that only a newer release knows is none of these.
        """
        try:
            message = to_router.decode(frame)
        except FrameError as error:
            self._unreadable(session, error)
            return isinstance(error, UnknownKindError)
        self.messages[type(message).__name__.lower()] += 1
        host = self._registrar.host_of(key)
        if isinstance(message, Register):
            self._spawn(self._register(session, key, message), "register a host")
        elif host is None:
            self._complaints.add("unknown_key", "a message came with a key that is registered no more")
            self._send(session, Refused("this host's key is not registered: it was revoked; join again with a new token", final=True))
        else:
            self._from_host(host, session, message)
        return True

    def _unreadable(self, session: bytes, error: FrameError) -> None:
        self.messages[error.why] += 1
        self._complaints.add(error.why, str(error))
        if error.why == "version":
            self._send(session, Refused(str(error), final=True))

    async def _register(self, session: bytes, key: str, register: Register) -> None:
        answer = await self._registrar.exchange(key, register)
        if isinstance(answer, Refused):
            self._complaints.add("registration", answer.reason)
        self._send(session, answer)

    def _from_host(self, host: HostId, session: bytes, message: ToRouter) -> None:
        match message:
            case Heartbeat():
                self._feed(HeartbeatSeen(host, session, message.incarnation, message.nonce, message.seq, message.acked, message.engines))
            case Hello(name=name) if name != host:
                self._send(
                    session, Refused(f"this key is registered as {host} and not as {name[:63]}: start it with --name {host}", final=True)
                )
            case Hello():
                self._feed(HelloSeen(host, session, message.incarnation, message.nonce, "", message.release[:40], message.engines))
            case Goodbye():
                self._feed(GoodbyeSeen(host, message.incarnation, message.nonce, message.engines_stay))
            case Answer():
                self._answered(host, message)
            case KvDelta() | KvSnapshot():
                self._cache_told(host, session, message)

    def _cache_told(self, host: HostId, session: bytes, message: KvDelta | KvSnapshot) -> None:
        """What an engine's prefix cache holds; a host speaks for its own engines only, and only the agent that holds its seat does."""
        if not self._members.holds_seat(host, message.incarnation, message.nonce):
            return  # its heartbeats are fenced, and it is told so
        if not self._controller.owns(host, message.engine):
            self._complaints.add("foreign_engine", f"{host} speaks of the prefix cache of an engine that is not its own")
            return
        prefixes = self._controller.prefixes
        try:
            if isinstance(message, KvSnapshot):
                prefixes.take_snapshot(message)
            elif prefixes.take_delta(message, now=self._loop.time()):
                self._send(session, KvResync(message.engine))
        except ValueError as error:
            self._complaints.add("garbage", f"{host}: {error}")

    # --- the machine at work

    def beat(self, now: float, lag_s: float) -> None:
        """Called by the controller's beat. `lag_s`: how long the router stood still, 0 usually."""
        if lag_s:
            self._members.handle(Stalled(lag_s), now=now)
        due = self._members.next_deadline()
        if due is not None and now >= due:
            self._feed(Tick())

    def _feed(self, event: Event) -> None:
        for command in self._members.handle(event, now=self._loop.time()):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case SendAck(session=session, seq=seq):
                self._send(session, Ack(seq))
            case TakeReports(host=host, engines=engines):
                self._take(host, engines)
            case PublishHost(view=view):
                self._publish(view)
            case SendWelcome(session=session):
                self._send(session, Welcome(self._router, self._interval_s, __version__))
            case SendRefusal(host=host, session=session, reason=reason, final=final):
                self._complaints.add("refused_host", f"{host}: {reason}")
                if final or self._members.state(host) is HostState.ONLINE:  # a newcomer who says heartbeats must only say hello first
                    self._refusals[host] = (self._loop.time(), reason)
                self._send(session, Refused(reason, final))
            case ForgetHost(host=host, cause=cause):
                self._log.info("host gone", host=host, reason=cause)
                self._controller.host_forgotten(host, cause)

    def _take(self, host: HostId, engines: Iterable[Any]) -> None:
        allowed = [r for r in engines if self._registrar.may_be(host, r.role)]
        faults = [f"its token was not for a {r.role} engine as {r.id[:64]} is" for r in engines if r not in allowed]
        faults += self._controller.reported(host, allowed)
        if tuple(faults) != self._faults.get(host, ()):
            self._faults[host] = tuple(faults)
            for fault in faults:
                self._complaints.add("refused_engine", f"{host}: {fault}")

    def _publish(self, view: HostView) -> None:
        self._controller.tell(view.id, "host changed", host=view.id, state=view.state.value, reason=view.reason)
        if view.state not in _MAY_ANSWER:  # who was merely not heard for a second goes on with what it was told
            self._void_orders(view.id, f"its host is {view.state}: {view.reason}")
        gone = view.state is HostState.LEFT and not self._members.engines_stay(view.id)
        self._controller.host_changed(view, engines_gone=gone)

    def _send(self, session: bytes, message: Message) -> None:
        self._send_frame(session, encode(message))

    # --- orders

    async def order(self, host: HostId, engine: EngineId, action: str, role: Role | None, cause: str) -> tuple[bool, str]:
        """Tells a host's agent to do something; what it answered, or why there is no answer."""
        await self._back(host)
        session = self._members.session(host)
        if session is None or self._members.state(host) is not HostState.ONLINE:
            return False, f"the host {host} cannot be reached"
        self._order_ids += 1
        number = self._order_ids
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._orders[number] = (host, answer)
        self._send(session, Order(number, engine, action, role, cause))
        try:
            async with asyncio.timeout(ORDER_LIMIT_S[action]):
                found = await answer
        except TimeoutError:
            return False, f"the agent of {host} did not answer within {ORDER_LIMIT_S[action]:g} s"
        finally:
            del self._orders[number]
        return found.ok, found.sentence[:500]

    async def _back(self, host: HostId) -> None:
        """Waits a moment for a host that was not heard for a second: on a busy machine that happens, and a flip is half done."""
        until = self._loop.time() + SUSPECT_PATIENCE_S
        while self._members.state(host) is HostState.SUSPECT and self._loop.time() < until:  # noqa: ASYNC110  # its end is seldom waited for
            await asyncio.sleep(SUSPECT_POLL_S)

    def _answered(self, host: HostId, answer: Answer) -> None:
        asked, waiter = self._orders.get(answer.order, (None, None))
        if asked == host and waiter is not None and not waiter.done():
            waiter.set_result(answer)

    def _void_orders(self, host: HostId, why: str) -> None:
        for number, (asked, waiter) in list(self._orders.items()):
            if asked == host and not waiter.done():
                waiter.set_result(Answer(number, ok=False, sentence=why))

    # --- what people ask

    def hosts(self) -> list[HostRow]:
        """Every registered host and how it is."""
        views = {view.id: view for view in self._members.hosts}
        return [self._row(r.name, r.roles, r.public_key, views.get(HostId(r.name))) for r in self._registrar.hosts()]

    def _row(self, name: str, roles: tuple[Role, ...], key: str, view: HostView | None) -> HostRow:
        if view is None:
            return HostRow(name, roles, key, "away", "it has not said hello since this router started")
        reason = "; ".join((view.reason, *self._faults.get(view.id, ()), *self._refused_lately(view.id)))
        return HostRow(name, roles, key, view.state.value, reason, view.release, view.incarnation)

    def _refused_lately(self, host: HostId) -> Iterable[str]:
        at, reason = self._refusals.get(host, (float("-inf"), ""))
        ago_s = self._loop.time() - at
        return [f"{ago_s:.0f} s ago an agent of this name was refused: {reason}"] if ago_s < REFUSAL_SHOWN_S else []

    async def revoke(self, name: str) -> str:
        """Shuts a host out at once. Says what happened.

        Raises:
            OrderError: nobody is registered under this name.
        """
        try:
            found = await self._registrar.revoke(name)
        except StartError as error:
            self._feed(HostRevoked(HostId(name)))
            raise OrderError(
                f"{name} is shut out until this router restarts, but that could not be stored: {error}; revoke it again"
            ) from error
        if not found:
            known = ", ".join(r.name for r in self._registrar.hosts()) or "none"
            raise OrderError(f"no host is registered as {name!r}; there is {known}", status=404)
        self._feed(HostRevoked(HostId(name)))
        self._refusals.pop(HostId(name), None)
        what = "what runs on its engines ends, they get no more work, and its key opens nothing"
        return f"{name} is shut out: {what}; it can come back with a new token only"

    def counts(self) -> dict[str, int]:
        """Messages by kind, and what was refused, by why."""
        return dict(self._complaints.counts) | dict(self.messages)

    def __repr__(self) -> str:
        return f"<Head {self._members!r} orders={len(self._orders)}>"


_MAY_ANSWER = frozenset({HostState.ONLINE, HostState.SUSPECT})
