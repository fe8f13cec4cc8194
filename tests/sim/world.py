"""A simulated cluster: the production router and hosts, composed as production composes them, on virtual time and wires."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import hashlib
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import structlog

from disagg.config import ClusterSection, Config, EngineSection, PolicySection, RouterSection
from disagg.host import HostPlan, host_running
from disagg.launches import EngineSpec
from disagg.model import EngineId, EngineState, Role
from disagg.security.token import Token
from disagg.server import Router, router_running
from tests.sim import client
from tests.sim.engine import SimEngine
from tests.sim.faults import Fault, schedule
from tests.sim.launcher import Machine, SimLauncher, end_process
from tests.sim.loop import PROCESS, Process, SimLoop, finish
from tests.sim.net import Network
from tests.sim.oracle import LIMIT_S, Found, judge
from tests.sim.wires import SimControlClient, SimControlServer, SimProber

ROUTER_IP, CLIENT_IP = "10.0.0.1", "10.9.0.1"
HTTP, ADMIN, CONTROL = 8000, 8001, 7400
SETTLE_S = 10.0
ORPHAN_S = 1.5
"""How long an engine may work on for a client who left: the bound is 1 s, and the oracle looks now and then."""
ASKS_WATCHED = 300
CALM_S = 5.0
"""So long after a fault what it has left behind is cleaned up."""
READY_LIMIT_S = 120.0


class Plan(msgspec.Struct, frozen=True):
    """What is simulated.

    Attributes:
        seed: everything that is left to chance comes from it.
        prefill, decode: hosts with one engine each.
        load_s: how long clients ask; and `rate`, how often, per second.
        faults: which kinds, all of them if empty; "none" for none.
        gap_s: between two faults, on average.
        at_once: how many faults may be there at the same time.
        tokens: of KV in each engine.
        defect: a bug planted on purpose, for tests of the oracle; one of `DEFECTS`.
    """

    seed: int
    prefill: int = 3
    decode: int = 3
    load_s: float = 60.0
    rate: float = 1.0
    faults: tuple[str, ...] = ()
    gap_s: float = 10.0
    at_once: int = 1
    tokens: int = 16384
    defect: str = ""


class Result(msgspec.Struct):
    """What came of it.

    Attributes:
        trace: a hash of everything that happened, in order; `lines` are its text, if wanted.
        found: what the oracle found, empty for nothing.
        logs: of everybody, with the time in front.
        outcomes: requests by outcome.
        simulated_s, wall_s, cpu_s: how long it took.
    """

    seed: int
    trace: str
    lines: list[str]
    found: list[Found]
    outcomes: dict[str, int]
    faults: list[str]
    logs: list[str] = []
    simulated_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class World:
    """One run."""

    # A script gets the world once all engines are ready. It moves time with `asyncio.sleep`, asks with `ask`, and breaks things through
    # `machines`, `network`, `loop.freeze`, the engines' `knobs`, `kill_agent` and so on.

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        keep: bool = False,
        on_line: Callable[[str], object] | None = None,
        script: Script | None = None,
    ) -> None:
        self.plan = plan
        self._script = script
        self.folder = folder
        self.chance = random.Random(f"world {plan.seed}")
        self.loop = SimLoop(random.Random(f"loop {plan.seed}"))
        self.network = Network(self.loop, random.Random(f"network {plan.seed}"), self.note)
        self._hash = hashlib.blake2b(digest_size=16)
        self._trace: list[tuple[float, tuple[object, ...]]] = []
        self._keep = keep or on_line is not None
        self._on_line = on_line
        self.lines: list[str] = []
        self.logs: list[str] = []
        self.errors: list[str] = []
        self.wall_step_s = 0.0
        self.asks: list[client.Ask] = []
        self.faults: list[str] = []
        self.processes = 0
        self.machines: dict[str, Machine] = {}
        self.agents: dict[str, tuple[Process, asyncio.Future[Any]]] = {}
        self.plans: dict[str, HostPlan] = {}
        self.ips: dict[str, str] = {}
        self.router: Router | None = None
        self.router_process = Process("router", ROUTER_IP, 0)
        self._router_main: asyncio.Future[Any] = self.loop.create_future()
        self.router_down: list[tuple[float, float]] = []
        self.clients = self.new_process("clients", CLIENT_IP)
        self._config = _config()
        self._ids = random.Random(f"ids {plan.seed}")
        self.baseline: tuple[list[str], int] = ([], 0)
        self.found: list[Found] = []
        self.held: object = None
        self.calm_since = 0.0
        self._acting = 0
        self.orphans: list[str] = []

    # --- the trace

    def note(self, *what: object) -> None:
        """An entry of the trace."""
        self._trace.append((self.loop.time(), what))
        if len(self._trace) > 1000:
            self._hash_trace()
        if self._keep:
            line = f"{self.loop.time():.6f} {' '.join(map(str, what))}\n"
            if self._on_line is not None:
                self._on_line(line)
            else:
                self.lines.append(line)

    def _hash_trace(self) -> None:
        self._hash.update(repr(self._trace).encode())
        self._trace.clear()

    def log(self, name: str) -> structlog.typing.FilteringBoundLogger:
        """A logger of a process."""

        def take(_logger: Any, method: str, event: Any) -> Any:
            failure = event.pop("exc_info", None)
            text = f"{name}: {method} {event.pop('event')} " + " ".join(f"{k}={v}" for k, v in event.items())
            text = text.replace(str(self.folder), "ROOT")
            self.logs.append(f"{self.loop.time():.3f} {text}")
            self.note("log", text)
            if failure or method in {"exception", "critical"}:
                self.errors.append(f"{self.loop.time():.3f} {text}{_where(failure)}")
            raise structlog.DropEvent

        made: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
            None, processors=[take], wrapper_class=structlog.make_filtering_bound_logger(20)
        )
        return made

    # --- processes

    def new_process(self, name: str, ip: str) -> Process:
        self.processes += 1
        return Process(name, ip, self.processes)

    def start(self, process: Process, work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        """Runs a coroutine as the main task of a process."""
        context = contextvars.Context()
        context.run(PROCESS.set, process)
        return self.loop.create_task(work, name=f"main of {process.name}", context=context)

    def wall(self) -> float:
        """The wall clock, which people set."""
        return 1_800_000_000.0 + self.loop.time() + self.wall_step_s

    # --- the cluster

    async def run(self) -> None:
        """The whole story."""
        try:
            await self.start_router()
            await self._tell()
        finally:
            self.shutdown()
            await asyncio.sleep(1.0)

    async def start_router(self) -> None:
        """Starts the router; returns when it listens."""
        ready = asyncio.Event()
        self.router_process = self.new_process("router", ROUTER_IP)
        self._router_main = self.start(self.router_process, self._route(ready))
        await ready.wait()
        if self.router_down:
            self.router_down[-1] = (self.router_down[-1][0], self.loop.time())

    async def kill_router(self) -> None:
        """Ends it at once, and waits until nothing is left of it."""
        self.router_down.append((self.loop.time(), float("inf")))
        end_process(self.loop, self.router_process)
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._router_main

    async def _tell(self) -> None:
        self._build_hosts()
        await self._until(self._all_ready, READY_LIMIT_S, "the engines are not ready")
        await asyncio.sleep(6.0)
        self.baseline = self.residue()
        if self.plan.defect:
            DEFECTS[self.plan.defect](self)
        await self._load()
        await asyncio.sleep(SETTLE_S)
        self.note("settled")
        self.found = judge(self)

    async def _route(self, ready: asyncio.Event) -> None:
        async with router_running(
            self._config,
            [],
            self.log("router"),
            root=self.folder / "router",
            say=lambda _: None,
            clock=self.loop.time,
            wall_clock=self.wall,
            entropy=self._ids.randbytes,
            control_server=SimControlServer,
            prober=SimProber(self._config.router.probe_timeout_s),
        ) as router:
            self.router = router
            ready.set()
            await asyncio.get_running_loop().create_future()

    def _build_hosts(self) -> None:
        assert self.router is not None
        roles = [Role.PREFILL] * self.plan.prefill + [Role.DECODE] * self.plan.decode
        for number, role in enumerate(roles):
            name = f"{role[0]}{number}"
            ip = self.ips[name] = f"10.0.1.{number + 1}"
            machine = self.machines[name] = Machine(name, ip, self.loop, self.network, self.new_process)
            machine.tokens = self.plan.tokens
            machine.start_s = self.chance.uniform(0.5, 3.0)
            token = self.router.make_token([role])
            self.plans[name] = self._host_plan(name, ip, role, token)
            self.start_agent(name)

    def _host_plan(self, name: str, ip: str, role: Role, token: Token) -> HostPlan:
        return HostPlan(
            name=name,
            join=(ROUTER_IP, CONTROL),
            advertise=ip,
            engines=(EngineSpec(EngineId(f"{name}-engine"), role),),
            root=self.folder / name,
            token=token,
        )

    def start_agent(self, name: str) -> None:
        """Starts the agent of a host."""
        process = self.new_process(f"agent-{name}", self.ips[name])
        self.agents[name] = process, self.start(process, self._keep_host(name))

    async def _keep_host(self, name: str) -> None:
        config = msgspec.structs.replace(self._config, cluster=msgspec.structs.replace(self._config.cluster, name=name))
        async with host_running(
            config,
            self.plans[name],
            self.log(name),
            connect=SimControlClient,
            prober=SimProber(2.0),
            launcher=SimLauncher(self.machines[name]),
        ) as host:
            await host.task

    async def kill_agent(self, name: str, *, quiet: bool = False) -> None:
        """Ends an agent at once, and waits until nothing is left of it: its lock above all."""
        process, main = self.agents[name]
        end_process(self.loop, process, quiet=quiet)
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await main

    def _all_ready(self) -> bool:
        assert self.router is not None
        engines = self.router.controller.view.engines
        return len(engines) == len(self.machines) and all(e.state is EngineState.READY for e in engines)

    async def _until(self, is_so: Callable[[], bool], limit_s: float, why: str) -> None:
        until = self.loop.time() + limit_s
        while not is_so():
            if self.loop.time() > until:
                raise AssertionError(f"{why} after {limit_s:g} simulated seconds")
            await asyncio.sleep(0.05)

    # --- load and faults

    async def _load(self) -> None:
        watching = self.loop.create_task(self._watch_orphans(), name="watch")
        try:
            await (self._hurt_and_ask() if self._script is None else self._script(self))
        finally:
            watching.cancel()

    async def _hurt_and_ask(self) -> None:
        asking = self.start(self.clients, self._ask_on())
        hurting = [self.loop.create_task(self._hurt(number), name="faults") for number in range(self.plan.at_once)]
        await asyncio.wait({asking}, timeout=self.plan.load_s + LIMIT_S + READY_LIMIT_S)
        await asyncio.gather(*hurting)

    async def _watch_orphans(self) -> None:
        """Looks whether an engine works for a client who left, while nothing is broken that would explain it."""
        while True:
            await asyncio.sleep(0.25)
            now = self.loop.time()
            if now - self.calm_since < CALM_S:
                continue
            lately = self.asks[-ASKS_WATCHED:]
            gone = {ask.ids(): ask for ask in lately if ask.outcome == "left" and ORPHAN_S < now - ask.ended_at < SETTLE_S}
            for engine in self.engines() if gone else ():
                self.orphans += [f"request {gone[tuple(x.prompt)].number} on {engine.name}" for x in engine.legs if tuple(x.prompt) in gone]

    def engines(self) -> list[SimEngine]:
        """Those that live."""
        return [engine for machine in self.machines.values() for engine in machine.live()]

    async def ask(self, ask: client.Ask) -> client.Ask:
        """Sends a request and waits for its end; for scripts."""
        self.asks.append(ask)
        await self.start(self.clients, self._ask(ask))
        return ask

    async def _ask_on(self) -> None:
        chance = random.Random(f"clients {self.plan.seed}")
        until = self.loop.time() + self.plan.load_s
        async with asyncio.TaskGroup() as group:
            while self.loop.time() < until:
                await asyncio.sleep(chance.expovariate(self.plan.rate))
                ask = client.draw(chance, len(self.asks))
                self.asks.append(ask)
                group.create_task(self._ask(ask), name=f"request {ask.number}")

    async def _ask(self, ask: client.Ask) -> None:
        self.note("ask", ask.number, ask.route, len(ask.prompt), ask.limit, ask.stream)
        await client.send(ask, self.loop, ROUTER_IP, HTTP)
        self.note("answer", ask.number, ask.outcome, ask.pieces, ask.why)

    async def _hurt(self, number: int) -> None:
        for fault in schedule(self, random.Random(f"faults {self.plan.seed} {number}")):
            await asyncio.sleep(fault.after_s)
            if not await self._strike(fault):
                continue
            await asyncio.sleep(fault.lasts_s)
            await fault.end()
            self._acting -= 1
            if not self._acting:
                self.calm_since = self.loop.time()
            self.note("fault ends", fault.name)

    async def _strike(self, fault: Fault) -> bool:
        said = await fault.begin()
        if said is None:
            return False
        self.faults.append(f"{self.loop.time():.3f} {fault.name} {said} for {fault.lasts_s:.2f} s")
        self.note("fault", fault.name, said)
        self.calm_since = float("inf")
        self._acting += 1
        return True

    # --- ends

    def residue(self) -> tuple[list[str], int]:
        """The router's tasks, by name, and its open connections."""
        tasks = sorted(task.get_name() for task in self.loop.of(self.router_process))
        ends = [end for end in self.network.ends if end.process is self.router_process and not end.gone]
        return tasks, len(ends)

    def shutdown(self) -> None:
        """Everybody is killed: nothing is left for the next run."""
        for machine in self.machines.values():
            for engine in machine.live():
                end_process(self.loop, engine.process)
        for process, _ in self.agents.values():
            end_process(self.loop, process)
        end_process(self.loop, self.router_process)
        end_process(self.loop, self.clients)

    def result(self) -> Result:
        """What came of it."""
        self._hash_trace()
        return Result(
            self.plan.seed,
            self._hash.hexdigest(),
            self.lines,
            self.found,
            dict(sorted(Counter(a.outcome for a in self.asks).items())),
            self.faults,
            self.logs,
        )


def _every_engine(knob: str, value: Any) -> Callable[[World], None]:
    def plant(world: World) -> None:
        for engine in world.engines():
            setattr(engine.knobs, knob, value)

    return plant


def _in_router(work: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[World], None]:
    def plant(world: World) -> None:
        world.start(world.router_process, work(world))

    return plant


async def _never_end(_world: World) -> None:
    await asyncio.get_running_loop().create_future()


async def _hold_connection(world: World) -> None:
    world.held = await asyncio.get_running_loop().create_connection(asyncio.Protocol, ROUTER_IP, ADMIN)


async def _fail_unseen(_world: World) -> None:
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)


async def _log_prompts(world: World) -> None:
    while not any(len(ask.prompt) >= 5 for ask in world.asks):  # noqa: ASYNC110  # nobody says when
        await asyncio.sleep(0.1)
    ask = next(ask for ask in world.asks if len(ask.prompt) >= 5)
    world.log("router").info("a request came", body=str(ask.body()))


async def _forget_settling(world: World) -> None:
    assert world.router is not None
    world.router._relay.settled = lambda attempt: None  # type: ignore[method-assign]


async def _abort_nothing(world: World) -> None:
    assert world.router is not None
    world.router._relay.abort_rids = lambda upstream, rids: None  # type: ignore[method-assign]
    for engine in world.engines():
        engine.knobs.slow = 8.0
    await asyncio.sleep(CALM_S)
    for number in range(10):  # whole answers: of a closed stream the engine would know at once
        ask = client.Ask(-number, "/generate", (1, 2, 3, number), 60, stream=False, leaves_s=0.5)
        world.asks.append(ask)
        world.start(world.clients, world._ask(ask))


async def _stand_still(world: World) -> None:
    await asyncio.sleep(world.plan.load_s / 2)
    world.loop.freeze(world.router_process)


DEFECTS: dict[str, Callable[[World], None]] = {
    "engines leak pages": _every_engine("leak", True),
    "engines answer wrong": _every_engine("wrong", 20),  # canaries look at fewer tokens
    "engines fail": _every_engine("refuse", 500),
    "a task stays": _in_router(_never_end),
    "a connection stays": _in_router(_hold_connection),
    "a callback fails": _in_router(_fail_unseen),
    "prompts are logged": _in_router(_log_prompts),
    "attempts are kept": _in_router(_forget_settling),
    "nothing is aborted": _in_router(_abort_nothing),
    "the router stands still": _in_router(_stand_still),
}


Script = Callable[[World], Coroutine[Any, Any, None]]


def _where(failure: Any) -> str:
    error = failure if isinstance(failure, BaseException) else failure[1] if isinstance(failure, tuple) else None
    return f" {type(error).__name__}: {error}" if error is not None else ""


def _config() -> Config:
    return Config(
        cluster=ClusterSection(join=f"{ROUTER_IP}:{CONTROL}"),
        router=RouterSection(
            http=f"{ROUTER_IP}:{HTTP}",
            admin=f"{ROUTER_IP}:{ADMIN}",
            control=f"{ROUTER_IP}:{CONTROL}",
            first_token_timeout_s=15.0,
            between_tokens_timeout_s=10.0,
            whole_answer_timeout_s=30.0,
        ),
        engine=EngineSection(served_name="sim"),
        policy=PolicySection(measure_at_start=False),  # what engines do is the load's and the canaries'
    )


def simulate(plan: Plan, *, keep: bool = False, on_line: Callable[[str], object] | None = None, script: Script | None = None) -> Result:
    """Runs one seed to its end.

    Args:
        keep: the text of the trace is wanted.
        on_line: told each line of it as it comes.
        script: what happens once the cluster is ready, in place of random load and faults.
    """
    began, cpu = time.perf_counter(), time.process_time()
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="disagg-sim-", dir=shared if shared.is_dir() else None))
    was = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)  # as production does: most of what lives lives long
    warned = warnings.catch_warnings()
    warned.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # who is killed does not get to begin everything
    try:
        world = World(plan, folder, keep=keep, on_line=on_line, script=script)
        started = world.loop.time()
        contextvars.Context().run(finish, world.run(), world.loop)
        result = world.result()
        result.simulated_s = world.loop.time() - started
    finally:
        gc.set_threshold(*was)
        gc.collect()  # what was killed before it began complains now or never
        warned.__exit__(None, None, None)
        shutil.rmtree(folder, ignore_errors=True)
    result.wall_s, result.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return result
