"""The host's loop: joins the router, proves who it is, says how its engines are, does what the router orders.

    connect with the token's key ── Register ──► Registered      once; from then on the host's own key is enough
    connect with the own key ────── Hello ─────► Welcome
                                    Heartbeat ─► Ack             every interval, and at once when an engine changed
                              ◄──── Order ────── Answer

A link on which nothing was acknowledged for `LINK_LOST_S` is given up and made anew: TCP would believe in it for minutes. The engines
notice nothing of all that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import structlog
import zmq

from disagg import __version__
from disagg.cluster.courier import Courier
from disagg.cluster.keeper import Keeper
from disagg.cluster.transport import ControlClient
from disagg.errors import DisaggError, StartError
from disagg.model import EngineState, Role
from disagg.security.keys import KeyPair
from disagg.wire.codec import KV_MINOR, FrameError, encode, minor_of, to_host
from disagg.wire.messages import (
    Ack,
    Answer,
    EngineReport,
    Goodbye,
    Heartbeat,
    Hello,
    KvResync,
    Message,
    Order,
    Refused,
    Register,
    Registered,
    ToHost,
    Welcome,
)

HELLO_S = 0.25
JOIN_LIMIT_S = 3.0
LINK_LOST_S = 2.0
RETRY_S = 0.2
GRUMBLE_S = 10.0
GOODBYE_MS = 500
DRAIN_POLL_S = 0.05
DRAIN_GRACE_S = 0.1
KV_FLUSH_S = 0.1
KV_MESSAGES = 4
"""What is said of prefix caches in one flush: with the heartbeats that is less than half of what a router listens to from one host."""
KV_UNACKED = 2
"""With more heartbeats than that not acknowledged nothing is said of prefix caches: heartbeats must not queue behind it."""


class Identity(msgspec.Struct, frozen=True):
    """Who this host is.

    Attributes:
        name: under which it is registered.
        roles: of its engines.
        key: its own.
        router_key: the router's public one.
        token_key: the one-time key of a join token, or None.
        registered: this key was registered before.
        incarnation, nonce: see `disagg.wire.messages.Hello`.
    """

    name: str
    roles: tuple[Role, ...]
    key: KeyPair
    router_key: str
    token_key: KeyPair | None
    registered: bool
    incarnation: int
    nonce: str

    def __repr__(self) -> str:
        return f"<Identity {self.name} incarnation={self.incarnation}>"


class _LinkLostError(DisaggError):
    """This connection is no good any more; the next one may be."""


class _NotYetError(_LinkLostError):
    """Another incarnation of this host holds its seat."""


class _DeniedError(_LinkLostError):
    """The router does not know the key that this connection was made with."""


class Agent:
    """One host's part of the control plane.

    Args:
        host, port: the router's control address.
        identity: who this host is.
        keepers: its engines.
        on_registered: called once when the router took the host's own key; remembers it on disk.
        connect: makes the connection to the router.

    Attributes:
        joined: set while the link stands.
        was_joined: it stood at least once.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        identity: Identity,
        keepers: Sequence[Keeper],
        on_registered: Callable[[], Coroutine[Any, Any, None]],
        log: structlog.typing.FilteringBoundLogger,
        connect: type[ControlClient] = ControlClient,
    ) -> None:
        self._host, self._port = host, port
        self._connect = connect
        self._identity = identity
        self._keepers = {keeper.id: keeper for keeper in keepers}
        self._on_registered = on_registered
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._client: ControlClient | None = None
        self._inbox: deque[ToHost | DisaggError] = deque()
        self._courier = Courier(identity.incarnation, identity.nonce)
        self._router_minor = 0
        self._pressing = False  # an engine changed: the next heartbeat is due now
        self._stir = asyncio.Event()  # something came, or something changed
        self._interval_s = HELLO_S
        self._seq = self._acked = 0
        self._acked_at = 0.0
        self._registered = identity.registered
        self._stopping = ""
        self._leaving = False
        self._grumbled_at = float("-inf")
        self._tasks: asyncio.TaskGroup | None = None
        self._admitted = asyncio.Event()  # the router took this host, or took it once and cannot be asked now
        self.joined = asyncio.Event()
        self.was_joined = False

    def changed(self) -> None:
        """An engine changed: the next heartbeat goes out now."""
        self._pressing = True
        self._stir.set()

    def reports(self) -> tuple[EngineReport, ...]:
        """How the engines are; those of a host that stops take no new work."""
        reports = (keeper.report() for keeper in self._keepers.values())
        return tuple(self._as_stopping(r) for r in reports)

    def _as_stopping(self, report: EngineReport) -> EngineReport:
        if self._leaving:
            report = msgspec.structs.replace(report, leaving=True)
        if not self._stopping or report.state is not EngineState.READY:
            return report
        return msgspec.structs.replace(report, state=EngineState.DRAINING, reason=self._stopping)

    # --- life

    async def run(self) -> None:
        """Keeps the engines and the link until cancelled.

        Raises:
            StartError: the router refuses this host for good.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for keeper in self._keepers.values():  # before the link: a hello must not report a running engine as none
                    await keeper.begin()
                tasks.create_task(self._start_engines(), name="start the engines")
                for keeper in self._keepers.values():
                    tasks.create_task(keeper.run(), name=f"keep {keeper.id}")
                tasks.create_task(self._keep_link(), name="control link")
                tasks.create_task(self._forward_caches(), name="forward KV events")
        except* StartError as group:
            raise StartError(str(group.exceptions[0])) from None
        finally:
            self._tasks = None

    async def _start_engines(self) -> None:
        """Not for a host that the router does not want: a large model loads for minutes, and a refused host would do it again and again."""
        await self._admitted.wait()
        for keeper in self._keepers.values():
            keeper.start()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Runs a coroutine as a task of this agent's."""
        if self._tasks is None:
            work.close()  # the agent has ended; nobody waits for this any more
        else:
            self._tasks.create_task(work, name=name)

    async def drain(self, limit_s: float, urgent: asyncio.Event, *, move_s: float = 0.0, reason: str = "its host stops") -> bool:
        """Says that no new work may come, and waits until what runs has ended.

        Args:
            limit_s: for requests to end by themselves.
            urgent: ends the wait.
            reason: what the router is told.
            move_s: from then on, for the router to let them go on on other engines; 0 where the engines stay.

        Returns:
            False when all that time was not enough, or `urgent` was set.
        """
        self._stopping = reason
        self.changed()
        if await self._idle_within(limit_s, urgent):
            return True
        if not move_s or urgent.is_set():
            return False
        self._leaving = True
        self.changed()
        return await self._idle_within(move_s, urgent)

    async def _idle_within(self, limit_s: float, urgent: asyncio.Event) -> bool:
        told, heard_at = self._seq + 1, 0.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not urgent.is_set():  # the poll's own interval is what one waits for
                    if not heard_at and (self._acked >= told or not self.joined.is_set()):
                        heard_at = self._loop.time()  # what was sent here before that may only now be arriving
                    if heard_at and all(keeper.is_idle(heard_at + DRAIN_GRACE_S) for keeper in self._keepers.values()):
                        return True
                    await asyncio.sleep(DRAIN_POLL_S)
        return False

    async def stop_engines(self, limit_s: float) -> None:
        """Ends the engines that are this host's to end, all at once."""
        async with asyncio.TaskGroup() as tasks:
            for keeper in self._keepers.values():
                if keeper.adopted and not self.was_joined:
                    keeper.let_go()  # who never held the seat must not end what may belong to the one who does
                else:
                    tasks.create_task(keeper.stop(limit_s), name=f"stop {keeper.id}")

    def leave(self, *, engines_stay: bool) -> None:
        """Says goodbye and closes the link; lets the engines go on where they stay."""
        if engines_stay:
            self.forget_engines()
        if self._client is not None:
            me = self._identity
            self._send(Goodbye(me.incarnation, me.nonce, engines_stay))
            self._close(linger_ms=GOODBYE_MS)

    def forget_engines(self) -> None:
        """Lets the engines go on: stopping has nothing to stop any more."""
        for keeper in self._keepers.values():
            keeper.let_go()
        self._keepers.clear()

    # --- the link

    async def _keep_link(self) -> None:
        while True:
            try:
                if not self._registered and self._identity.token_key is not None:
                    await self._register(self._identity.token_key)
                await self._stay_joined()
            except _LinkLostError as error:
                if self._registered and not isinstance(error, _DeniedError | _NotYetError):
                    self._admitted.set()
                self._grumble(str(error))
            finally:
                self.joined.clear()
                self._close()
            await asyncio.sleep(RETRY_S)

    def _open(self, key: KeyPair) -> None:
        inbox = self._inbox = deque()  # of this connection: what an older one still says is of no interest

        def take(frame: bytes) -> None:
            self._router_minor = minor_of(frame) if len(frame) > 4 else 0
            deliver(_read(frame))

        def deliver(found: ToHost | DisaggError) -> None:
            inbox.append(found)
            self._stir.set()

        try:
            self._client = self._connect(
                self._host,
                self._port,
                key=key,
                router_key=self._identity.router_key,
                on_frame=take,
                on_denied=lambda why: deliver(_DeniedError(why)),
            )
        except zmq.ZMQError as error:
            raise _LinkLostError(f"no connection can be made: {error.strerror}") from error

    def _close(self, *, linger_ms: int = 0) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close(linger_ms=linger_ms)

    def _send(self, message: Message) -> None:
        if self._client is not None:
            self._client.send(encode(message))

    async def _receive(self, limit_s: float) -> ToHost | None:
        """The next message; None when none came in time."""
        until = self._loop.time() + limit_s
        while not self._inbox:
            if not await self._stirred(until):
                return None
        found = self._inbox.popleft()
        if isinstance(found, DisaggError):
            raise found
        return found

    async def _ask(self, message: Message, limit_s: float) -> ToHost:
        """Says it until an answer comes.

        Raises:
            _LinkLostError: nobody answers.
        """
        until = self._loop.time() + limit_s
        while self._loop.time() < until:
            self._send(message)
            answer = await self._receive(HELLO_S)
            if answer is not None:
                return answer
        raise _LinkLostError(
            f"no router answers at {self._host}:{self._port}: is it running, is the port open, and did this host's token come from it?"
        )

    async def _register(self, token_key: KeyPair) -> None:
        me = self._identity
        self._open(token_key)
        try:
            answer = await self._ask(Register(me.name, me.key.public, me.roles, __version__), JOIN_LIMIT_S)
        except _DeniedError as error:
            if await self._is_known():  # the answer to an earlier attempt was lost on its way
                return
            raise StartError(
                f"the router at {self._host}:{self._port} refused the token: it has expired, was used before, or belongs to another router;"
                " make a new one with `disagg token create`"
            ) from error
        if isinstance(answer, Refused):
            raise StartError(f"the router refused to register this host: {answer.reason}")
        if not isinstance(answer, Registered):
            raise _LinkLostError("the router did not answer a registration with one")
        await self._remember()

    async def _is_known(self) -> bool:
        self._close()
        self._open(self._identity.key)
        try:
            await self._ask(self._hello(), JOIN_LIMIT_S)
        except _DeniedError:
            return False
        await self._remember()
        return True

    async def _remember(self) -> None:
        self._close()
        self._registered = True
        await self._on_registered()
        self._log.info("this host is registered; its own key is enough from now on", name=self._identity.name)

    def _hello(self) -> Hello:
        me = self._identity
        return Hello(me.name, me.incarnation, me.nonce, __version__, self.reports())

    async def _stay_joined(self) -> None:
        self._open(self._identity.key)
        try:
            answer = await self._ask(self._hello(), JOIN_LIMIT_S)
        except _DeniedError as error:
            self._denied(error)
        else:
            self._welcomed(answer)
            await self._beat()

    def _denied(self, error: _DeniedError) -> None:
        if self._identity.token_key is not None and self._registered and not self.was_joined:
            self._registered = False  # what was registered is gone, but a token is at hand
            return
        sentence = (
            f"the router at {self._host}:{self._port} does not know this host's key: it was revoked, or the router lost its state;"
            " join again with a new token from `disagg token create`"
        )
        if not self.was_joined:
            raise StartError(sentence) from error
        raise _DeniedError(sentence) from error

    def _welcomed(self, answer: ToHost) -> None:
        if isinstance(answer, Refused):
            if answer.final:
                raise StartError(f"the router refused this host: {answer.reason}")
            raise _NotYetError(f"the router refused this host for now: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise _LinkLostError("the router did not answer a hello with one")
        self._interval_s = min(max(answer.heartbeat_interval_s, 0.05), 5.0)
        self._acked_at = self._loop.time()
        self.was_joined = True
        self._admitted.set()
        self._courier.joined()
        self.joined.set()
        self._grumbled_at = float("-inf")
        self._log.info("joined", router=f"{self._host}:{self._port}", release=answer.release)

    async def _beat(self) -> None:
        """Heartbeats and orders, until the link is lost."""
        next_at = self._loop.time()
        while True:
            now = self._loop.time()
            if now - self._acked_at > LINK_LOST_S:
                raise _LinkLostError(f"the router has not acknowledged anything for {LINK_LOST_S:g} s")
            if now >= next_at or self._pressing:
                self._pressing = False
                self._heartbeat()
                next_at = now + self._interval_s
            await self._stirred(next_at)
            while self._inbox:
                self._take(self._inbox.popleft())

    async def _stirred(self, until: float) -> bool:
        """Waits until something came or changed; False when the time is over."""
        try:
            async with asyncio.timeout_at(until):
                await self._stir.wait()
        except TimeoutError:
            return False
        self._stir.clear()
        return True

    def _heartbeat(self) -> None:
        me = self._identity
        self._seq += 1
        self._send(Heartbeat(me.incarnation, me.nonce, self._seq, self._acked, self.reports()))

    def _take(self, message: ToHost | DisaggError) -> None:
        match message:
            case DisaggError():
                raise message
            case Ack(seq=seq):
                self._acked = max(self._acked, seq)
                self._acked_at = self._loop.time()
            case Order():
                self.spawn(self._obey(message), f"order {message.id}")
            case KvResync(engine=engine):
                self._courier.resync(engine)
            case Refused(reason=reason, final=True):
                raise StartError(f"the router refused this host: {reason}")
            case Refused(reason=reason):
                raise _LinkLostError(f"the router refused this host for now: {reason}")
            case _:
                pass  # a welcome that was said twice

    def _grumble(self, sentence: str) -> None:
        """A line now and then, and not five a second for as long as a router is away."""
        now = self._loop.time()
        if now - self._grumbled_at >= GRUMBLE_S:
            self._grumbled_at = now
            self._log.warning("not joined", why=sentence)

    # --- prefix caches

    async def _forward_caches(self) -> None:
        while True:
            await asyncio.sleep(KV_FLUSH_S)
            if self.joined.is_set() and self._router_minor >= KV_MINOR and self._seq - self._acked <= KV_UNACKED:
                self._forward_some()

    def _forward_some(self) -> None:
        """What the link has no room for stays where it is, and changes that cancel out are never sent."""
        caches = {keeper.id: keeper.cache for keeper in self._keepers.values() if keeper.cache is not None}
        for _ in range(KV_MESSAGES):
            if self._client is None or not self._client.has_room:
                return
            message = self._courier.next(caches, now=self._loop.time())
            if message is None:
                return
            self._send(message)

    # --- orders

    async def _obey(self, order: Order) -> None:
        self._log.info("order", engine=order.engine, action=order.action, role=order.role, cause=order.cause)
        done, sentence = await self._carry_out(order)
        self._send(Answer(order.id, done, sentence))
        self.changed()

    async def _carry_out(self, order: Order) -> tuple[bool, str]:
        keeper = self._keepers.get(order.engine)
        if keeper is None:
            return False, f"this host has no engine {order.engine}"
        role = order.role or keeper.report().role
        match order.action:
            case "switch":
                return await keeper.switch(role)
            case "restart":
                return await keeper.restart(role, order.cause or "it was ordered")
            case "drain":
                keeper.drain(order.cause or "it was ordered")
                return True, "it takes no new work"
            case "undrain":
                keeper.drain("")
                return True, "it takes work again"
            case _:
                return False, f"this release does not know how to {order.action!r}: bring it to the router's release"

    def __repr__(self) -> str:
        return f"<Agent {self._identity.name} joined={self.joined.is_set()} seq={self._seq} acked={self._acked}>"


def _read(frame: bytes) -> ToHost | DisaggError:
    try:
        return to_host.decode(frame)
    except FrameError as error:
        return _LinkLostError(f"the router sent something that cannot be read: {error}")
