"""The composition root of the router, and of a whole cluster on one machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web

from disagg import __version__
from disagg.activation import place, public_socket
from disagg.cluster.change import Limits as ChangeLimits
from disagg.cluster.controller import CHANGES_KEPT, Controller
from disagg.cluster.examiner import Examiner
from disagg.cluster.head import Head
from disagg.cluster.matcher import Matcher
from disagg.cluster.prober import Prober
from disagg.cluster.reaper import Reaper
from disagg.cluster.registrar import Registrar
from disagg.cluster.transport import ControlServer
from disagg.config import Config, RouterSection, SecuritySection, engine_addresses, parse_listen
from disagg.errors import OrderError, StartError
from disagg.handoff import Limits
from disagg.host import Host, HostPlan, host_running, only_one
from disagg.ids import Ids
from disagg.launches import EngineSpec, Launches, model_of
from disagg.life import Say, Stop, file_limit, owned_tasks, set_limits, settle_memory, spawned, voice
from disagg.model import EngineAddress, EngineId, EngineState, EngineView, Role
from disagg.observe.log import Sink, make_logger
from disagg.observe.metrics import RouterMetrics
from disagg.policy.balance import Pace as Tempo
from disagg.policy.books import Books, Slo
from disagg.policy.holds import Hold
from disagg.policy.pace import Pace
from disagg.router.admin import admin_app, no_control_plane
from disagg.router.admission import Admission
from disagg.router.app import PublicListener
from disagg.router.connection import Server
from disagg.router.gate import Gate
from disagg.router.owner import Owner
from disagg.router.relay import Relay
from disagg.security.keys import KeyPair, load_given_key, load_key, load_or_make_key, publish_key
from disagg.security.state import router_key_path, router_public_path, router_tokens_path, state_root
from disagg.security.token import Token, TokenStore

__all__ = ["Router", "router_running", "run_up", "serve_router"]

START_POLL_S = 0.02
DRAIN_POLL_S = 0.02
CUT_LIMIT_S = 0.5
"""How long the last words to clients may take."""
STALL_S = 1.0
"""The books are looked after ten times a second: when nobody did for so long, the process stood still, and no time across that counts."""
ARRIVAL_S = 1.0
"""How long a client that has connected may take to begin a request, when the router drains. A connection that is closed while a request is
on its way to it loses that; it is said with the answer that the connection ends."""
HELD_BACKLOG = 4096
"""Clients that the kernel keeps while nobody accepts, as far as net.core.somaxconn allows."""
RETURN_S = 2.0
"""How long a router that was restarted behind an open socket waits for its engines before it accepts: its first clients must not hear that
there are none."""


# --- the router


class Door:
    """Where clients come in.

    Args:
        server: accepts them.
        clients: the connections of those who came.
        stays_open: systemd holds the socket: who connects while nobody accepts waits for the next process.
    """

    def __init__(self, server: asyncio.Server, clients: Server, *, stays_open: bool) -> None:
        self.stays_open = stays_open
        self._server = server
        self._clients = clients
        self._closed_at = 0.0

    async def open(self) -> None:
        """Begins to accept."""
        await self._server.start_serving()

    def close(self) -> None:
        """Accepts nobody any more."""
        self._server.close()
        self._closed_at = asyncio.get_running_loop().time()

    def is_empty(self) -> bool:
        """True when nobody is left. Sends off who has asked for nothing for a while."""
        if asyncio.get_running_loop().time() - self._closed_at < ARRIVAL_S:
            return not self._clients.connections
        return self._clients.close_idle()


class Router:
    """A running router. Made by `router_running`.

    Attributes:
        control: where hosts join; None for a router without a control plane.
    """

    def __init__(
        self,
        config: Config,
        controller: Controller,
        listener: PublicListener,
        metrics: RouterMetrics,
        control: ControlServer | None,
        root: Path | None,
        relay: Relay,
        wall_now: Callable[[], float],
        door: Door,
        head: Head | None,
    ) -> None:
        self.config = config
        self.controller = controller
        self.listener = listener
        self.metrics = metrics
        self.control = control
        self._root = root
        self._relay = relay
        self._wall = wall_now
        self._door = door
        self._head = head

    async def open(self) -> None:
        """Accepts clients; behind a socket that others hold open only once its engines are back, at most `RETURN_S` later."""
        if self._door.stays_open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETURN_S):
                    while not self._is_whole():  # noqa: ASYNC110  # hosts that were there before are known only to the head
                        await asyncio.sleep(START_POLL_S)
        await self._door.open()

    def _is_whole(self) -> bool:
        away = self._head is not None and any(row.state == "away" for row in self._head.hosts())
        return not away and all(e.state is not EngineState.STARTING for e in self.controller.view.engines)

    def make_token(self, roles: Sequence[Role]) -> Token:
        """A token with which one host may join within a minute."""
        assert self._root is not None, "this router has no control plane"
        key = load_key(router_key_path(self._root))
        return TokenStore(router_tokens_path(self._root)).create(roles, 60, now_wall=self._wall(), router_key=key.public)

    async def drain(self, stop: Stop) -> None:
        """Takes no new requests and waits for the running ones, at most ``drain_timeout_s``, or until the second signal."""
        self.listener.draining = True
        if self._door.stays_open:  # who has connected is served to the end; who connects from now on meets the next process
            self.listener.refuses = False
            self._door.close()
            await asyncio.sleep(DRAIN_POLL_S)  # who was accepted last must have become a connection before they are counted
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.cluster.drain_timeout_s):
                while self._is_busy() and not stop.urgent.is_set():  # noqa: ASYNC110  # the hot path sets no event
                    await asyncio.sleep(DRAIN_POLL_S)
        self.listener.refuses = True
        self._relay.give_up("this router is shutting down and cannot wait for this answer any longer")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CUT_LIMIT_S):
                while self.metrics.inflight:  # noqa: ASYNC110  # as above
                    await asyncio.sleep(DRAIN_POLL_S)

    def _is_busy(self) -> bool:
        gone = self._door.is_empty() if self._door.stays_open else True
        return bool(self.metrics.inflight) or not gone


@contextlib.asynccontextmanager
async def router_running(
    config: Config,
    addresses: Sequence[EngineAddress],
    log: structlog.typing.FilteringBoundLogger,
    *,
    root: Path | None = None,
    say: Say = print,
    canaries: bool = True,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
    control_server: type[ControlServer] = ControlServer,
    prober: Prober | None = None,
    public: socket.socket | None = None,
) -> AsyncIterator[Router]:
    """Runs a router as long as the context is open.

    Args:
        config: the sections cluster, router and observe count.
        addresses: engines that were given by URL.
        log: where events go.
        root: the state directory; None for a router that no host can join.
        say: tells people what was made.
        canaries: pairs are tried with fixed prompts; not for engines that are none.
        clock: monotonic seconds; this and the rest are for simulations, which bring their own time, chance and wires.
        wall_clock: seconds since 1970; None for `wall`.
        entropy: returns that many random bytes, for ids.
        control_server: where hosts join.
        prober: asks engines; None for one that asks over HTTP.
        public: where clients are served, listening already and held open by somebody else; None to listen at ``router.http``.

    Raises:
        StartError: an address to listen on is not free, or the state cannot be read.
    """
    loop = asyncio.get_running_loop()
    section = config.router
    wall_now = wall_clock or wall
    async with contextlib.AsyncExitStack() as stack:
        group = await stack.enter_async_context(owned_tasks())

        def spawn(work: Coroutine[Any, Any, None], name: str) -> Any:
            return spawned(group, work, name, log)

        controller = Controller(
            addresses,
            probe_interval_s=section.probe_interval_s,
            probe_timeout_s=section.probe_timeout_s,
            spawn=spawn,
            change_limits=ChangeLimits(drain_s=config.cluster.drain_timeout_s),
            may_join=root is not None,
            log=log,
            prober=prober,
        )
        metrics = RouterMetrics(lambda: controller.view)
        ids = Ids(entropy)
        pace = Pace(_limits(config), section.whole_answer_timeout_s)
        tempo = Tempo().scaled(config.policy.speed)
        books = Books(Slo(config.slo.ttft_s, config.slo.itl_s), window_s=tempo.window_s, prefixes=controller.prefixes, stall_s=STALL_S)
        admission = Admission(
            books=books,
            pace=pace,
            on_waited=metrics.queue.observe,
            view=lambda: controller.view,
            timeout_s=section.queue_timeout_s,
            chance=ids.chance,
            unified_share=config.policy.unified_share,
            loop=loop,
            clock=clock,
        )
        relay = Relay(
            view=lambda: controller.view,
            limits=_limits(config),
            metrics=metrics,
            admission=admission,
            pace=pace,
            on_handed_over=controller.handed_over,
            random_room=ids.room,
            spawn=spawn,
            on_refused=controller.refused,
            loop=loop,
            clock=clock,
        )
        stack.callback(relay.close)
        owner = Owner(
            relay=relay,
            admission=admission,
            watch=controller,
            view=lambda: controller.view,
            metrics=metrics,
            queue_s=section.queue_timeout_s,
            spawn=spawn,
            log=log,
        )
        controller.on_view = owner.changed
        metrics.waiting = lambda: owner.waiting
        gate = Gate(per_address=section.connections_per_address, file_limit=file_limit())
        metrics.refused = gate.refused
        listener = PublicListener(
            relay=relay,
            owner=owner,
            view=lambda: controller.view,
            metrics=metrics,
            ids=ids,
            body_limit=section.body_limit_mib * 1024 * 1024,
            gate=gate,
            started_at=int(wall_now()),
            log=log,
        )
        stack.callback(listener.close)
        head, control = _control_plane(stack, config, controller, root, spawn, ids, log, say, wall_now, control_server)
        examiner = Examiner(
            view=lambda: controller.view, ask=relay.ask, spawn=spawn, new_salt=ids.request_id, on_judged=controller.judged, log=log
        )
        controller.attach(relay, head, examiner if canaries else None, pace)
        metrics.canaries = examiner.outcomes
        if canaries and config.policy.measure_at_start:
            measurer = controller.measure_engines(
                forecast=books.forecast,
                time=relay.time,
                legs_of=relay.legs_of,
                on_measuring=admission.measuring,
                new_salt=ids.request_id,
                clock=clock,
            )
            metrics.benchmarks = measurer.outcomes
        reaper = controller.watch_for_orphans(relay)
        metrics.orphans = reaper.actions
        matcher = controller.match_rates(books=books, flips=config.policy.flips, pace=tempo, waiting=admission.waiting_for)
        metrics.holds = lambda: relay.holds(relay.clock())
        orders = Orders(controller, head, reaper, matcher)
        metrics.ejections = controller.ejections
        metrics.control = orders
        metrics.prefixes = controller.prefixes
        metrics.hits = lambda: (books.hit_tokens, books.prompt_tokens)
        await _listen_admin(
            stack,
            config,
            admin_app(
                view=lambda: controller.view,
                why_not_ready=listener.why_not_ready,
                prefixes=controller.prefixes,
                relay=relay,
                standings=matcher.standings,
                measuring=lambda: controller.measuring,
                metrics=metrics,
                orders=orders,
            ),
        )
        door = await _listen_public(stack, config, listener, public)
        group.create_task(controller.run(), name="controller")
        relay.start()
        router = Router(config, controller, listener, metrics, control, root, relay, wall_now, door, head)
        await router.open()
        yield router


def _control_plane(
    stack: contextlib.AsyncExitStack,
    config: Config,
    controller: Controller,
    root: Path | None,
    spawn: Callable[[Coroutine[Any, Any, None], str], Any],
    ids: Ids,
    log: structlog.typing.FilteringBoundLogger,
    say: Say,
    wall_now: Callable[[], float],
    control_server: type[ControlServer],
) -> tuple[Head | None, ControlServer | None]:
    if root is None:
        return None, None
    try:
        registrar, control = _control_socket(stack, config, root, log, say, wall_now, control_server)
    except StartError as error:
        if config.router.control != RouterSection().control or not engine_addresses(config.router):
            raise
        log.warning("no host can join this router; it serves the engines that were given by URL", why=str(error))
        return None, None
    stack.callback(control.close)
    head = Head(
        router=ids.request_id(),
        registrar=registrar,
        controller=controller,
        send=control.send,
        complaints=control.complaints,
        spawn=spawn,
        heartbeat_interval_s=config.cluster.heartbeat_interval_s,
        log=log,
    )
    control.on_message = head.hear
    controller.on_beat = head.beat
    return head, control


def _control_socket(
    stack: contextlib.AsyncExitStack,
    config: Config,
    root: Path,
    log: structlog.typing.FilteringBoundLogger,
    say: Say,
    wall_now: Callable[[], float],
    control_server: type[ControlServer],
) -> tuple[Registrar, ControlServer]:
    """Raises StartError: the state cannot be used, or another router uses it, or the address is not free."""
    otherwise = f"another router runs with the state directory {root}: stop it, or give another --state-dir"
    stack.enter_context(only_one(root / "router", otherwise))
    key = _router_key(config, root, say)
    registrar = Registrar(root, wall=wall_now, log=log)
    host, port = parse_listen("router.control", config.router.control)
    return registrar, control_server(host, port, key=key, allows=registrar.allows, log=log)


def _router_key(config: Config, root: Path, say: Say) -> KeyPair:
    if config.security.key_file:
        given = load_given_key(Path(config.security.key_file), os.environ)
        if given is not None:
            publish_key(router_public_path(root), given)
            return given
    path = router_key_path(root)
    key, made = load_or_make_key(path)
    if made:
        say(f"made the router's key, {path}")
    return key


class Orders:
    """What the admin listener may ask for: the controller's and the control plane's, in one place."""

    def __init__(self, controller: Controller, head: Head | None, reaper: Reaper, matcher: Matcher) -> None:
        self._head = head
        self._reaper = reaper
        self._matcher = matcher
        self._controller = controller
        self.drain = controller.drain
        self.undrain = controller.undrain
        self.restart = controller.restart
        self.story = controller.story
        self.beware = controller.beware

    def flip(self, engine: str, role: Role, cause: str) -> int:
        """Another role; returns the number of the change."""
        number = self._controller.flip(engine, role, cause)
        self._matcher.ordered(EngineId(engine))
        return number

    def change(self, number: int) -> dict[str, Any]:
        """How a change fares."""
        change = self._controller.changes.get(number)
        if change is None:
            raise OrderError(f"there is no change {number}: the last {CHANGES_KEPT} are kept", status=404)
        began = change.steps[0][0]
        steps = [{"after_s": round(at - began, 3), "what": what} for at, what in change.steps]
        return {"engine": change.engine, "verb": change.verb, "was": change.was, "role": change.role, "phase": change.phase, "steps": steps}

    def hosts(self) -> Sequence[msgspec.Struct]:
        """Everybody who is registered."""
        return [] if self._head is None else self._head.hosts()

    async def revoke(self, host: str) -> str:
        """Shuts a host out."""
        if self._head is None:
            raise no_control_plane()
        return await self._head.revoke(host)

    def kv_accounts(self, holds: Sequence[Hold]) -> Sequence[msgspec.Struct]:
        """The KV pool of every engine, and what of it no entry explains."""
        return self._reaper.accounts(holds)

    def reaped(self) -> int:
        """Requests that no entry explained and that are gone."""
        return self._reaper.reaped

    def reap(self, engine: str | None) -> Sequence[str]:
        """Aborts what no entry explains, now."""
        return self._reaper.reap(self._controller.engine(engine).id if engine else None, asyncio.get_running_loop().time())

    def control_messages(self) -> Mapping[str, int]:
        """Messages of the control plane, by kind, and what was refused, by why."""
        return {} if self._head is None else self._head.counts()

    def flips(self) -> Mapping[tuple[str, str, str], int]:
        """Flips that ended, by roles and outcome."""
        return self._controller.flips


def wall() -> float:
    """The wall clock, for what people read and for the expiry of tokens; nothing else is decided by it."""
    return time.clock_gettime(time.CLOCK_REALTIME)


def _limits(config: Config) -> Limits:
    section = config.router
    return Limits(
        connect_s=section.connect_timeout_s,
        handover_s=section.first_token_timeout_s,
        first_token_s=section.first_token_timeout_s,
        between_tokens_s=section.between_tokens_timeout_s,
    )


async def _listen_public(stack: contextlib.AsyncExitStack, config: Config, listener: PublicListener, public: socket.socket | None) -> Door:
    loop, factory = asyncio.get_running_loop(), listener.server()
    if public is not None:
        server = await loop.create_server(factory, sock=public, backlog=HELD_BACKLOG, start_serving=False)
    else:
        host, port = parse_listen("router.http", config.router.http)
        try:
            server = await loop.create_server(factory, host, port, backlog=1024, start_serving=False)
            await server.start_serving()
        except OSError as error:
            raise _cannot_listen("--http", config.router.http, error) from error
    stack.push_async_callback(factory.shutdown, 1.0)
    stack.callback(server.close)
    return Door(server, factory, stays_open=public is not None)


async def _listen_admin(stack: contextlib.AsyncExitStack, config: Config, app: web.Application) -> None:
    host, port = parse_listen("router.admin", config.router.admin)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise _cannot_listen("--admin", config.router.admin, error) from error


def _cannot_listen(flag: str, address: str, error: OSError) -> StartError:
    why = "another program listens there" if error.errno == 98 else (error.strerror or str(error))
    return StartError(f"cannot listen on {address}: {why}; stop that program or choose another address with {flag}")


async def serve_router(config: Config, say: Say) -> None:
    """``disagg serve --role router``: takes hosts that join, and engines that were given by URL."""
    with voice(config.observe) as (log, sink):
        await _serve_router(config, say, log, sink)


async def _serve_router(config: Config, say: Say, log: structlog.typing.FilteringBoundLogger, sink: Sink) -> None:
    began = time.monotonic()
    stop = Stop(asyncio.get_running_loop(), say)
    set_limits()
    addresses = engine_addresses(config.router)
    root = state_root(config.security.state_dir or None, os.environ)
    notes: list[str] = []
    public = public_socket(os.environ)
    if public is not None:
        config = _served_at(place(public), config, log)
    async with router_running(config, addresses, log, root=root, say=notes.append, public=public) as router:
        router.metrics.log_dropped = lambda: sink.dropped
        for line in (f"disagg {__version__} router", *notes):
            say(line)
        for address in addresses:
            say(f"  {address.id:<12} {address.url}" + (f"  bootstrap port {address.bootstrap_port}" if address.bootstrap_port else ""))
        say_listeners(config, say)
        if router.control is not None:
            host, _ = parse_listen("router.control", config.router.control)
            say(f"  hosts join   {host or '*'}:{router.control.port}")
        if not addresses:
            say("  no host has joined yet, so requests get 503. On this machine: disagg token create --role prefill")
            say("  On another:  disagg serve --role prefill --join THIS_HOST:PORT --token …  (and the same for decode)")
        warn_if_wide(config, log)
        say(f"Started in {time.monotonic() - began:.1f} s.")
        stop.notifier.ready(f"serving on {config.router.http}")
        settle_memory()
        await stop.wait()
        async with stop.watched():
            await router.drain(stop)


def _served_at(where: str, config: Config, log: structlog.typing.FilteringBoundLogger) -> Config:
    if parse_listen("router.http", config.router.http) != parse_listen("the socket unit", where):
        advice = "run `disagg systemd router --install` again, or change ListenStream= of the socket unit"
        log.warning("systemd's socket is served and not router.http", socket=where, http=config.router.http, advice=advice)
    return msgspec.structs.replace(config, router=msgspec.structs.replace(config.router, http=where))


def say_listeners(config: Config, say: Say) -> None:
    """Where people find it."""
    say(f"  clients      http://{config.router.http}")
    say(f"  admin        http://{config.router.admin}")


def warn_if_wide(config: Config, log: structlog.typing.FilteringBoundLogger) -> None:
    """One line when anybody on the network may ask."""
    host, _ = parse_listen("router.http", config.router.http)
    if host not in {"127.0.0.1", "::1", "localhost"}:
        log.warning("the public listener is open to the network without keys and without TLS", http=config.router.http)


# --- a cluster on this machine


async def run_up(config: Config, counts: dict[Role, int], say: Say) -> None:
    """``disagg up``: a router and a host with its engines on this machine, until a signal. The host joins as any other does.

    Raises:
        ConfigError: settings contradict each other.
        StartError: an engine or the router cannot start.
    """
    with voice(config.observe) as (log, sink):
        await _run_up(config, counts, say, log, sink)


async def _run_up(config: Config, counts: dict[Role, int], say: Say, log: structlog.typing.FilteringBoundLogger, sink: Sink) -> None:
    began = time.monotonic()
    stop = Stop(asyncio.get_running_loop(), say)
    set_limits()
    config = _throw_away(config)
    model, name = model_of(config)
    specs = tuple(EngineSpec(EngineId(f"{role}-{i}"), role) for role, n in counts.items() for i in range(n))
    for spec in specs:
        Launches(config, "127.0.0.1", Path(), is_child=True).check(spec)
    run_dir = Path(tempfile.mkdtemp(prefix="disagg-up-"))
    say(f"disagg {__version__} on this machine: {config.engine.engine} engine, model {name} ({model})")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        router = await stack.enter_async_context(router_running(config, [], log, root=run_dir, say=lambda _: None))
        assert router.control is not None
        router.metrics.log_dropped = lambda: sink.dropped
        roles = tuple(role for role, n in counts.items() if n)
        token = router.make_token(roles)
        plan = HostPlan(
            name="local",
            join=("127.0.0.1", router.control.port),
            advertise="127.0.0.1",
            engines=specs,
            root=run_dir,
            token=token,
            is_child=True,
        )
        quiet = make_logger("error" if config.observe.log_level == "error" else "warning", config.observe.log_format, sink)
        host = await stack.enter_async_context(host_running(config, plan, quiet))  # the router says the same of its engines
        await _wait_ready(router, host, stop, say)
        for engine in router.controller.view.engines:
            _say_engine(engine, say)
        say_listeners(config, say)
        warn_if_wide(config, log)
        if not stop.asked.is_set():
            say(f"Ready in {time.monotonic() - began:.1f} s. Logs of the engines: {run_dir}")
        settle_memory()
        await stop.wait(host.task)
        await router.drain(stop)
        if host.task.done():
            await host.task
        await host.stop_engines(stop.urgent, config.engine.stop_timeout_s)


def _throw_away(config: Config) -> Config:
    """The config of a cluster that ends with this process: what it says of keys, of engines that run already and of units is for others."""
    return msgspec.structs.replace(
        config,
        router=msgspec.structs.replace(config.router, control="127.0.0.1:0"),
        engine=msgspec.structs.replace(config.engine, attach="", supervise="child"),
        security=SecuritySection(),
    )


async def _wait_ready(router: Router, host: Host, stop: Stop, say: Say) -> None:
    """Until every engine serves, a signal came, or one of them cannot start. Tells how far each has come.

    Raises:
        StartError: an engine cannot start.
    """
    told: dict[EngineId, str] = {}
    async with owned_tasks() as group:
        group.create_task(_set_when(router.controller.wait_all_ready(len(host.keepers)), ready := asyncio.Event()), name="wait until ready")
        while not ready.is_set() and not stop.asked.is_set():
            failed = next((r for r in host.agent.reports() if r.state in {EngineState.DEAD, EngineState.HELD} and r.reason), None)
            if failed is not None and host.deaths(failed.id):
                raise StartError(f"the engine {failed.id} does not start: {failed.reason.partition('; it is started again')[0]}")
            if host.task.done():
                await host.task
            for keeper in host.keepers:
                progress = host.progress(keeper.id)
                if progress and told.get(keeper.id) != progress:
                    told[keeper.id] = progress
                    say(f"  {keeper.id:<12} {progress}")
            await asyncio.sleep(START_POLL_S)


async def _set_when(done: Coroutine[Any, Any, None], event: asyncio.Event) -> None:
    await done
    event.set()


def _say_engine(engine: EngineView, say: Say) -> None:
    address = engine.address
    bootstrap = f"  bootstrap port {address.bootstrap_port}" if address.role is Role.PREFILL else ""
    say(f"  {engine.id:<12} {address.url}{bootstrap}  pid {address.pid}")
