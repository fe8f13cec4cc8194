"""The composition root of a host: who it is, which engines it has, how they are started; and its agent."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import structlog

from disagg import __version__
from disagg.cluster.agent import Agent, Identity
from disagg.cluster.keeper import AttachedKeeper, EngineKeeper, Keeper
from disagg.cluster.prober import Prober
from disagg.cluster.transport import ControlClient
from disagg.config import Config, EngineEntry, parse_attach, parse_join
from disagg.engines.base import Launcher
from disagg.engines.process import ChildLauncher, UnitLauncher
from disagg.engines.restart import EngineLife, Limits
from disagg.errors import ConfigError, StartError
from disagg.launches import KEY_VARIABLE, EngineSpec, Launches
from disagg.life import Say, Stop, owned_tasks, set_limits, settle_memory, voice
from disagg.model import EngineAddress, EngineId, Role
from disagg.security.keys import KeyPair, load_given_key, load_or_make_key
from disagg.security.state import create_private, host_folder, read_private, state_root, write_private
from disagg.security.token import Token

__all__ = ["Host", "HostPlan", "host_running", "make_plan", "serve_host"]

PROBE_PATIENCE_S = 2.0
TOKEN_VARIABLE = "DISAGG_TOKEN"  # noqa: S105  # the variable's name
URGENT_STOP_S = 1.0
MOVE_S = 15.0
"""After the drain: how long the router may take to have what still runs go on on other hosts."""


class HostPlan(msgspec.Struct, frozen=True):
    """What a host is made of.

    Attributes:
        join: the router's control address.
        advertise: the address of this host for the others; engines bind to it.
        root: the state directory.
        token: to join with; None for a host that has joined before.
        is_child: the engines end with this process (`disagg up`), and demand no key, as nobody else can reach them.
    """

    name: str
    join: tuple[str, int]
    advertise: str
    engines: tuple[EngineSpec, ...]
    root: Path
    token: Token | None = None
    is_child: bool = False

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those of its engines, each once."""
        return tuple(dict.fromkeys(engine.role for engine in self.engines))


class _Membership(msgspec.Struct, frozen=True):
    """What a host remembers of the cluster that it joined."""

    router_key: str


class Host:
    """A running host. Made by `host_running`."""

    def __init__(self, agent: Agent, keepers: list[Keeper], task: asyncio.Future[None]) -> None:
        self.agent = agent
        self.keepers = keepers
        self.task = task

    async def stop_engines(self, urgent: asyncio.Event, limit_s: float) -> None:
        """Ends its engines within `limit_s` seconds, or within `URGENT_STOP_S` from the moment that `urgent` is set."""
        async with owned_tasks() as group:
            group.create_task(self._stop_at_once(urgent), name="a second signal")
            await self.agent.stop_engines(URGENT_STOP_S if urgent.is_set() else limit_s)

    async def _stop_at_once(self, urgent: asyncio.Event) -> None:
        await urgent.wait()
        await self.agent.stop_engines(URGENT_STOP_S)

    def deaths(self, engine: EngineId) -> int:
        """How often an engine of this host died lately."""
        return next((k.deaths for k in self.keepers if k.id == engine and isinstance(k, EngineKeeper)), 0)

    def progress(self, engine: EngineId) -> str:
        """How far the start of an engine of this host has come; empty where its log says nothing of that."""
        return next((k.progress for k in self.keepers if k.id == engine and isinstance(k, EngineKeeper)), "")


@contextlib.asynccontextmanager
async def host_running(
    config: Config,
    plan: HostPlan,
    log: structlog.typing.FilteringBoundLogger,
    *,
    connect: type[ControlClient] = ControlClient,
    prober: Prober | None = None,
    launcher: Launcher | None = None,
) -> AsyncIterator[Host]:
    """Runs a host as long as the context is open; the engines that it started end with the context, unless they were let go.

    Args:
        config: the sections cluster, engine and security count.
        plan: what the config means for this machine.
        log: where events go.
        connect: makes the connection to the router; this and the next two are for simulations.
        prober: asks engines; None for one that asks over HTTP.
        launcher: starts engines; None for what the config says.

    Raises:
        StartError: it cannot start, or the router refuses it.
    """
    folder = host_folder(plan.root, plan.name)
    async with contextlib.AsyncExitStack() as stack:
        given = load_given_key(Path(config.security.key_file), os.environ) if config.security.key_file else None
        key = given or load_or_make_key(folder / "key")[0]
        stack.enter_context(
            only_one(folder, f"another agent runs on this machine under the name {plan.name}: stop it, or give this one another --name")
        )
        identity = _identity(folder, plan, key)
        prober = prober or Prober(PROBE_PATIENCE_S)
        stack.push_async_callback(prober.close)
        parts = _Parts(config, plan, prober, launcher, log)
        keepers = [parts.keeper(spec) for spec in plan.engines]
        router_key = identity.router_key

        async def remember() -> None:
            await asyncio.to_thread(write_private, folder / "router", msgspec.json.encode(_Membership(router_key)))

        agent = Agent(*plan.join, identity=identity, keepers=keepers, on_registered=remember, log=log, connect=connect)
        parts.agent = agent
        group = await stack.enter_async_context(owned_tasks())
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        group.create_task(_held(agent.run(), ended), name="agent")
        host = Host(agent, keepers, ended)
        try:
            yield host
        finally:
            if ended.done() and not plan.is_child:  # the router refused this host: that is no reason to end what serves
                agent.forget_engines()
            await agent.stop_engines(config.engine.stop_timeout_s)
            agent.leave(engines_stay=False)


async def _held(work: Coroutine[Any, Any, None], ended: asyncio.Future[None]) -> None:
    """A failure stays in the future until somebody awaits it; the group of tasks must not fall over it."""
    try:
        await work
    except Exception as error:  # noqa: BLE001  # raised again where the future is awaited
        ended.set_exception(error)
        ended.exception()  # whoever leaves for another reason need not look at it
    else:
        ended.set_result(None)


@contextlib.contextmanager
def only_one(folder: Path, otherwise: str) -> Iterator[None]:
    """Holds a folder of the state for this process alone: two would undo each other's changes.

    Raises:
        StartError: somebody else holds it; the sentence is `otherwise`.
    """
    if not (folder / "lock").exists():  # a disk that is full, or read-only, keeps nobody from starting again
        create_private(folder / "lock", b"")  # once: the lock hangs on the file and not on its name
    with (folder / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartError(otherwise) from error
        yield


def _identity(folder: Path, plan: HostPlan, key: KeyPair) -> Identity:
    known = _membership(folder)
    token = plan.token
    if token is None and known is None:
        roles = " ".join(f"--role {role}" for role in plan.roles)
        raise StartError(
            f"the host {plan.name} has not joined a cluster yet: make a token on the router's host with `disagg token create {roles}`"
            " and give it with --token, --token-file or DISAGG_TOKEN"
        )
    router_key = token.router_key if token is not None else known.router_key if known is not None else ""
    return Identity(
        name=plan.name,
        roles=plan.roles,
        key=key,
        router_key=router_key,
        token_key=KeyPair(token.public_key, token.secret_key) if token is not None else None,
        registered=known is not None and known.router_key == router_key,
        incarnation=_next_incarnation(folder),
        nonce=secrets.token_hex(8),
    )


def _membership(folder: Path) -> _Membership | None:
    content = read_private(folder / "router")
    try:
        return None if content is None else msgspec.json.decode(content, type=_Membership)
    except msgspec.DecodeError as error:
        raise StartError(f"{folder / 'router'} is broken: remove it and join again with a new token") from error


def _next_incarnation(folder: Path) -> int:
    content = read_private(folder / "incarnation") or b"0"
    if not content.strip().isdigit() or len(content) > 15:
        raise StartError(f"{folder / 'incarnation'} is broken: it should hold a number; remove the host's folder and join with a new token")
    number = int(content) + 1
    write_private(folder / "incarnation", b"%d\n" % number)
    return number


class _Parts:
    """Makes the keepers of a host."""

    def __init__(
        self, config: Config, plan: HostPlan, prober: Prober, launcher: Launcher | None, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self.agent: Agent | None = None
        self._config = config
        self._plan = plan
        self._prober = prober
        self._log = log
        self._launcher = launcher or (UnitLauncher() if config.engine.supervise == "systemd" else ChildLauncher())
        self._launches = Launches(
            config, plan.advertise, plan.root / "engines", is_child=plan.is_child, warn=lambda note: log.warning("engine", note=note)
        )

    def keeper(self, spec: EngineSpec) -> Keeper:
        section = self._config.engine
        if section.attach:
            host, port, bootstrap = parse_attach("--attach", section.attach)
            address = EngineAddress(spec.id, spec.role, host, port, bootstrap, api_key=os.environ.get(KEY_VARIABLE, ""))
            return AttachedKeeper(spec.id, spec.role, address, prober=self._prober, on_change=self._changed, log=self._log)
        limits = Limits(start_limit_s=section.start_timeout_s, stop_limit_s=section.stop_timeout_s, hang_kill_s=section.hang_kill_s)
        return EngineKeeper(
            spec.id,
            spec.role,
            host=self._plan.name,
            launch_for=lambda role: self._launches.of(spec, role),
            settings_for=lambda role: self._launches.settings(spec, role),
            launcher=self._launcher,
            folder=self._plan.root / "engines",
            life=EngineLife(limits),
            prober=self._prober,
            spawn=self._spawn,
            on_change=self._changed,
            log=self._log,
        )

    def _changed(self) -> None:
        if self.agent is not None:
            self.agent.changed()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        assert self.agent is not None
        self.agent.spawn(work, name)


# --- disagg serve --role prefill | decode | unified


async def serve_host(config: Config, role: Role, token: str, say: Say) -> None:
    """Runs one host's part of a cluster until a signal.

    Args:
        config: the sections cluster, engine, engines, security and observe count.
        role: of its engines, where an entry of ``[[engines]]`` does not say otherwise.
        token: as it was given with ``--token``; empty for none.
        say: tells people what happens.

    Raises:
        ConfigError: a setting does not do for a host.
        StartError: it cannot start, or the router refuses it.
    """
    with voice(config.observe) as (log, _):
        await _serve_host(config, role, token, say, log)


async def _serve_host(config: Config, role: Role, token: str, say: Say, log: structlog.typing.FilteringBoundLogger) -> None:
    began = time.monotonic()
    stop = Stop(asyncio.get_running_loop(), say)
    set_limits()
    plan = make_plan(config, role, token)
    say(f"disagg {__version__} {role} host {plan.name}, engines at {plan.advertise}, joining {_place(plan.join)}")
    engines_stay = config.engine.supervise == "systemd"
    async with host_running(config, plan, log) as host:
        for keeper in host.keepers:
            say(f"  {keeper.id}")
        if _is_loopback(plan.advertise):
            say("  only this machine can reach these engines; for a cluster of several give --join the router's real address")
        stop.notifier.ready(f"{len(host.keepers)} engines, joining {_place(plan.join)}")
        say(f"Started in {time.monotonic() - began:.1f} s; `disagg status` on the router's host says when the engines are ready.")
        settle_memory()
        await stop.wait(host.task)
        if host.task.done():
            await host.task
        async with stop.watched():
            await host.agent.drain(config.cluster.drain_timeout_s, stop.urgent, move_s=0.0 if engines_stay else MOVE_S)
            if not engines_stay:
                await host.stop_engines(stop.urgent, config.engine.stop_timeout_s)
        host.agent.leave(engines_stay=engines_stay)


def make_plan(config: Config, role: Role, token: str) -> HostPlan:
    """What the config means for this machine.

    Raises:
        ConfigError: a setting does not do for a host.
        StartError: the address of this machine cannot be found out.
    """
    if not config.cluster.join:
        raise ConfigError(f"a {role} host needs the router's address: give it with --join HOST:PORT, or as cluster.join in the file")
    join = parse_join("cluster.join", config.cluster.join)
    advertise = config.cluster.advertise or own_address(*join)
    if config.engine.attach and _is_loopback(parse_attach("--attach", config.engine.attach)[0]) and not _is_loopback(advertise):
        raise ConfigError(
            f"engine.attach = {config.engine.attach!r} is an address that only this machine can reach, and the router is on another:"
            f" start the engine at {advertise} and give that"
        )
    name = config.cluster.name or default_name(socket.gethostname(), role)
    specs = _specs(config.engines, name, role)
    root = state_root(config.security.state_dir or None, os.environ)
    for spec in specs if not config.engine.attach else ():
        Launches(config, advertise, root / "engines", is_child=False).check(spec)
    given = token or _token_in_file(config.security.token_file) or os.environ.get(TOKEN_VARIABLE, "").strip()
    return HostPlan(
        name=name,
        join=join,
        advertise=advertise,
        engines=specs,
        root=root,
        token=Token.decode(given) if given else None,
    )


def _specs(entries: tuple[EngineEntry, ...], name: str, role: Role) -> tuple[EngineSpec, ...]:
    if not entries:
        return (EngineSpec(EngineId(name), role),)
    return tuple(
        EngineSpec(EngineId(f"{name}-{e.name}"), e.role or role, e.gpus, e.ib_device, e.numa, e.ports, e.engine_args) for e in entries
    )


def _token_in_file(path: str) -> str:
    """The token of a file; a file that is gone or empty is none, for a host that has joined does not need it any more."""
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"the token file {path} cannot be read: {error.strerror}; mend that, or give the token with --token") from error


def default_name(hostname: str, role: Role) -> str:
    """The machine's short name and the role, so that two roles on one machine do not collide."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", hostname.partition(".")[0]).strip("-._")[:48] or "host"
    return f"{short}-{role}"


def own_address(host: str, port: int) -> str:
    """The local address of the route to the router: what the others can reach. Nothing is sent.

    Raises:
        StartError: there is no route.
    """
    try:
        (family, _, _, _, target), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            found = str(probe.getsockname()[0])
    except OSError as error:
        raise StartError(
            f"there is no route to the router at {host}: {error.strerror or error}; check --join, or give --advertise"
        ) from error
    if found == "127.0.1.1":  # Debian's name for itself, which nobody else can reach
        raise StartError(
            "the route to the router leads to 127.0.1.1, which no other host can reach: give this host's address with --advertise"
        )
    return found


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in {"::1", "localhost"}


def _place(join: tuple[str, int]) -> str:
    host, port = join
    return f"{f'[{host}]' if ':' in host else host}:{port}"
