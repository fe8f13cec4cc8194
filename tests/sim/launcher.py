"""Starts simulated engines where production starts processes; they outlive the agent that started them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable

import msgspec

from disagg.engines.base import EngineLaunch, EngineRecord, ReadyFile, RunningEngine
from disagg.errors import StartError
from disagg.model import MODES, EngineId
from tests.sim.engine import SimEngine
from tests.sim.loop import PROCESS, Process, SimLoop
from tests.sim.net import Network

STOP_S = 0.2


class Machine:
    """A host's hardware: what runs on it whether or not an agent looks at it.

    Attributes:
        engines: by pid, the dead ones too.
    """

    def __init__(self, name: str, ip: str, loop: SimLoop, network: Network, new_process: Callable[[str, str], Process]) -> None:
        self.name = name
        self.ip = ip
        self.loop = loop
        self.network = network
        self.new_process = new_process
        self.engines: dict[int, SimEngine] = {}
        self.ended: dict[int, asyncio.Event] = {}
        self.codes: dict[int, int] = {}
        self.records: dict[int, EngineRecord] = {}
        self.tokens = 16384
        self.start_s = 1.0

    def spawn(self, launch: EngineLaunch) -> int:
        """Starts an engine; returns its pid."""
        process = self.new_process(f"{launch.id}", self.ip)
        pid = process.number
        http, bootstrap = self.network.free_port(), self.network.free_port()
        mode = MODES[launch.role]
        engine = SimEngine(process, self.loop, self.network, name=launch.id, mode=mode, tokens=self.tokens, http=http, bootstrap=bootstrap)
        engine.on_end = lambda: self.kill(pid, 137)
        self.engines[pid] = engine
        self.ended[pid] = asyncio.Event()
        self.records[pid] = EngineRecord(launch, launch.role, pid, pid, "boot")
        context = contextvars.Context()
        context.run(PROCESS.set, process)
        self.loop.call_later(self.start_s, self._serve, engine, context=context)
        return pid

    def _serve(self, engine: SimEngine) -> None:
        if not engine.process.dead:
            engine.serve()

    def kill(self, pid: int, code: int = -9, *, quiet: bool = False) -> None:
        """Ends an engine at once."""
        engine = self.engines[pid]
        if engine.process.dead:
            return
        self.network.note("engine ends", engine.name, pid, code)
        self.codes[pid] = code
        end_process(self.loop, engine.process, quiet=quiet)
        self.ended[pid].set()

    def live(self) -> list[SimEngine]:
        return [engine for engine in self.engines.values() if not engine.process.dead]


def end_process(loop: SimLoop, process: Process, *, quiet: bool = False) -> None:
    """As SIGKILL does: its connections are closed by the kernel, and nothing that is left of it has any effect."""
    process.dead = True
    loop.thaw(process)
    for listener in list(process.on_death):
        listener(quiet)
    process.on_death.clear()
    for task in loop.of(process):
        task.cancel()


class Running:
    """`RunningEngine` of a simulated engine, as one agent sees it."""

    def __init__(self, machine: Machine, pid: int, record: EngineRecord) -> None:
        self._machine = machine
        self._record = record
        self.pid = pid
        self.closed = False

    @property
    def id(self) -> EngineId:
        return self._record.launch.id

    @property
    def alive(self) -> bool:
        return not self._machine.engines[self.pid].process.dead

    def record(self, *, ready: ReadyFile | None = None) -> EngineRecord:
        if ready is not None:
            self._record = msgspec.structs.replace(self._record, ready=ready)
        return self._record

    async def wait(self) -> int | None:
        await self._machine.ended[self.pid].wait()
        return self._machine.codes[self.pid]

    async def wait_ready(self, limit_s: float) -> ReadyFile:
        engine = self._machine.engines[self.pid]
        if not self.alive:
            raise StartError("it ended before it was ready")
        return ReadyFile(self.pid, f"http://{self._machine.ip}:{engine.http}", engine.bootstrap, "sim", self._machine.start_s)

    def log_tail(self) -> str:
        return ""

    def log_text(self) -> str:
        return ""

    def mask_key(self) -> int:
        return 0

    def terminate(self) -> None:
        self._soon(-15)

    def kill(self) -> None:
        self._soon(-9)

    def _soon(self, code: int) -> None:
        process = PROCESS.get()
        if process is None or not process.dead:
            self._machine.loop.call_later(STOP_S if code == -15 else 0.01, self._machine.kill, self.pid, code)

    async def stop(self, limit_s: float) -> bool:
        self.terminate()
        return True

    def close(self) -> None:
        self.closed = True


class SimLauncher:
    """A `Launcher`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def start(self, launch: EngineLaunch) -> RunningEngine:
        pid = self._machine.spawn(launch)
        return Running(self._machine, pid, self._machine.records[pid])

    async def adopt(self, record: EngineRecord) -> RunningEngine | None:
        engine = self._machine.engines.get(record.pid)
        if engine is None or engine.process.dead:
            return None
        return Running(self._machine, record.pid, record)

    async def stop(self, engine: RunningEngine, limit_s: float) -> bool:
        process = PROCESS.get()
        if process is not None and process.dead:
            return True
        engine.terminate()
        try:
            async with asyncio.timeout(limit_s):
                await engine.wait()
        except TimeoutError:
            engine.kill()
        return True
