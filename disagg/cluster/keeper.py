"""Keeps one engine of this host: the hands of one `EngineLife`, and the agent's eyes on the engine.

agent ──► keeper ──► life (decides)
            ├──► launcher ──► the engine's process, which outlives all of this
            ├──► prober: how far is it, several times a second
            └──► record on disk, with which the next agent finds the process again
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
import structlog

from disagg.cluster.detector import Answered, Refused, TimedOut
from disagg.cluster.follower import KvFollower
from disagg.cluster.prober import Prober, Seen, read_bootstrap_port
from disagg.engines import diagnosis
from disagg.engines.base import EngineLaunch, EngineRecord, KvSource, Launcher, RunningEngine, decode_kept, encode_kept
from disagg.engines.restart import (
    Adopted,
    BecameReady,
    Command,
    EngineLife,
    Event,
    Exited,
    Kill,
    Probe,
    ProbeAnswered,
    ProbeFailed,
    ProgressMissed,
    ProgressSeen,
    Report,
    RestartAsked,
    Spawn,
    Spawned,
    SpawnFailed,
    StartAsked,
    State,
    StopAsked,
    Terminate,
    Tick,
)
from disagg.errors import ConfigError, DisaggError, StartError
from disagg.model import MODES, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, Role
from disagg.security.state import read_private, write_private
from disagg.wire.kv_events import Cache
from disagg.wire.messages import EngineReport

POLL_S = 0.25
POLL_PATIENCE_S = 1.0
UNANSWERED_S = 2.0
PROBE_PATIENCE_S = 10.0
SWITCH_PATIENCE_S = 60.0
"""Decode captures its CUDA graphs anew on a flip; that may take long."""

BUSY_PATIENCE_S = 35.0
"""SGLang keeps pages of a handoff whose prefill engine died for 30 s."""

START_STOP_S = 1.0
"""How long an engine that is still starting may take to end: it has nothing to finish, and may be deaf while it loads a model."""

SpawnTask = Callable[[Coroutine[Any, Any, None], str], Any]


class Keeper(Protocol):
    """What an agent needs of an engine of its host.

    Attributes:
        adopted: an earlier agent started it, or somebody else did.
    """

    id: EngineId
    adopted: bool

    @property
    def cache(self) -> Cache | None:
        """What its prefix cache holds; None where it does not say, or no process of it is followed."""

    def report(self) -> EngineReport:
        """How it is."""

    def is_idle(self, since: float) -> bool:
        """It said after this moment that nothing runs on it, or it cannot run anything."""

    async def begin(self) -> None:
        """Finds what is there: after this the reports are true."""

    def start(self) -> None:
        """Starts it, where nothing was found. Called once the router has taken this host, or cannot be asked."""

    async def run(self) -> None:
        """Keeps it until cancelled."""

    async def switch(self, role: Role) -> tuple[bool, str]:
        """Changes its role while it lives; says what came of it."""

    async def restart(self, role: Role, cause: str) -> tuple[bool, str]:
        """Starts it anew in this role; returns when that is under way."""

    def drain(self, reason: str) -> None:
        """No new work; empty: work again."""

    async def stop(self, limit_s: float) -> None:
        """Ends it, if it is ours to end."""

    def let_go(self) -> None:
        """Looks away; the engine goes on."""


class _Watched:
    """What both kinds share: polling, reporting, switching."""

    def __init__(
        self, engine: EngineId, role: Role, prober: Prober, on_change: Callable[[], None], log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self.id = engine
        self._role = role
        self._prober = prober
        self._on_change = on_change
        self._log = log.bind(engine=engine)
        self._loop = asyncio.get_running_loop()
        self._facts = EngineFacts()
        self._own_facts = EngineFacts()  # what its host knows and it does not say
        self._load = EngineLoad()
        self._counter = 0
        self._working = False
        self._answered_at = 0.0
        self._mode_fault = ""
        self._drained = ""
        self._switching = ""
        self._switches = 0  # of the process, since its start
        self._said: tuple[EngineState, Role] | None = None
        self._follower: KvFollower | None = None

    @property
    def cache(self) -> Cache | None:
        """What its prefix cache holds; None where it does not say, or no process of it is followed."""
        return None if self._follower is None else self._follower.cache

    async def _look(self, address: EngineAddress, *, anew: bool = False) -> Seen:
        known = self._facts if self._facts.model and not anew else None
        seen = await self._prober.look(address, known, POLL_PATIENCE_S)
        if not isinstance(seen, Answered):
            return seen
        self._answered_at = self._loop.time()
        facts = seen.facts if seen.facts.model_hash else msgspec.structs.replace(seen.facts, model_hash=self._own_facts.model_hash)
        self._facts = self._facts if facts == self._facts else facts
        self._load, self._counter, self._working = seen.load, seen.counter, seen.working
        if seen.mode:
            self._check_mode(seen.mode)
        return seen

    def _check_mode(self, mode: str) -> None:
        wrong = mode != MODES[self._role]
        self._mode_fault = f"it should be a {self._role} engine but runs in mode {mode!r}" if wrong else ""

    def _report_as(self, state: EngineState, reason: str, address: EngineAddress | None, start_ticks: int) -> EngineReport:
        place = address or EngineAddress(self.id, self._role, "", 0)
        return EngineReport(
            id=self.id,
            role=self._role,
            state=state,
            reason=reason,
            host=place.host,
            port=place.port,
            bootstrap_port=place.bootstrap_port,
            api_key=place.api_key,
            pid=place.pid,
            switches=self._switches,
            start_ticks=start_ticks,
            counter=self._counter,
            working=self._working,
            facts=self._facts,
            load=self._load,
        )

    def _state_in_service(self) -> tuple[EngineState, str]:
        silent_s = self._loop.time() - self._answered_at
        if silent_s >= UNANSWERED_S:
            return EngineState.SUSPECT, f"it has not answered its agent for {UNANSWERED_S:g} s"
        if self._mode_fault:
            return EngineState.QUARANTINED, self._mode_fault
        if self._switching:
            return EngineState.SWITCHING, self._switching
        if self._drained:
            return EngineState.DRAINING, self._drained
        return EngineState.READY, "it answers its agent"

    def _say_changes(self, state: EngineState, reason: str) -> None:
        """Tells the router at once when the state is another one; everything else may wait for the next heartbeat."""
        said = (state, self._role)
        if self._said != said:
            self._log.info("engine", state=state.value, reason=reason, role=self._role.value)
            self._said = said
            self._on_change()

    def is_idle(self, since: float) -> bool:
        """It said after this moment that nothing runs on it, or it cannot run anything."""
        report = self.report()
        if report.state not in _MAY_RUN:
            return True
        return self._answered_at > since and report.load.at_work == 0

    def report(self) -> EngineReport:
        """How it is."""
        raise NotImplementedError

    def drain(self, reason: str) -> None:
        """No new work; empty: work again."""
        self._drained = reason
        self._on_change()

    async def _post_switch(self, address: EngineAddress, role: Role) -> tuple[bool, str]:
        self._switching = f"it switches from {self._role} to {role}"
        self._on_change()
        began = self._loop.time()
        try:
            async with asyncio.timeout(SWITCH_PATIENCE_S):
                refusal = await self._ask_to_switch(address, role)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return False, f"its role switch was not answered ({type(error).__name__})"
        finally:
            self._switching = ""
        if refusal:
            return False, f"the engine refused to switch: {refusal}"
        was, self._role = self._role, role
        self._switches += 1
        self._mode_fault = ""
        if self._follower is not None:
            self._follower.dropped()  # SGLang empties its prefix cache on a switch
        took = f"in {self._loop.time() - began:.2f} s"
        seen = await self._look(address, anew=True)
        self._on_change()
        how = "" if isinstance(seen, Answered) else f"; it does not answer yet: {_why_silent(seen)}"
        return True, f"it switched from {was} to {role} {took} and kept its weights and its KV pool{how}"

    async def _ask_to_switch(self, address: EngineAddress, role: Role) -> str:
        """Returns why not, empty when it did.

        An engine that is not idle is asked again for a while: SGLang counts pages into which a dead peer might still write, and no load
        that it tells shows when the last of its threads has let go. Its refusal says that it serves on (``safe_to_restore``).
        """
        body = {"new_role": MODES[role], "decode_cuda_graph_memory_gb": 0}
        until = self._loop.time() + BUSY_PATIENCE_S
        while True:
            status, answer = await self._prober.post(address, "/pd_role_switch", body)
            if status == 200 and answer.get("success"):
                return ""
            said = str(answer.get("message") or f"HTTP {status}")[:300]
            if not answer.get("safe_to_restore") or "idle" not in said or self._loop.time() >= until:
                return said
            await asyncio.sleep(POLL_S)


class EngineKeeper(_Watched):
    """Keeps an engine that this host starts.

    Args:
        host: the name of this host, for its record.
        launch_for: how to start it in a role; makes a fresh API key each time. May block, so it is called in a thread.
        settings_for: what such a launch's settings would be now, to compare with those of a running engine. Blocks as well.
        folder: where its record is kept.
        life: the machine.
        spawn: runs a coroutine as a task that the agent owns.
        on_change: told when the router should hear something at once.
    """

    def __init__(
        self,
        engine: EngineId,
        role: Role,
        *,
        host: str,
        launch_for: Callable[[Role], EngineLaunch],
        settings_for: Callable[[Role], tuple[str, ...]],
        launcher: Launcher,
        folder: Path,
        life: EngineLife,
        prober: Prober,
        spawn: SpawnTask,
        on_change: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        super().__init__(engine, role, prober, on_change, log)
        self.adopted = False
        self._host = host
        self._launch_for = launch_for
        self._settings_for = settings_for
        self._launcher = launcher
        self._folder = folder
        self._life = life
        self._spawn = spawn
        self._process: RunningEngine | None = None
        self._address: EngineAddress | None = None
        self._start_ticks = 0
        self._progress = ""  # how far its start has come
        self._parts = 1
        self._leaving: RunningEngine | None = None
        self._spawning: asyncio.Event | None = None  # set once the start that is under way has made a process, or failed
        self._outdated = ""
        self._wake = asyncio.Event()

    @property
    def deaths(self) -> int:
        """How often it died lately."""
        return self._life.deaths

    @property
    def progress(self) -> str:
        """How far its start has come, as its log says."""
        return self._progress

    # --- life

    async def begin(self) -> None:
        """Adopts what is there."""
        self.adopted = await self._adopt()

    def start(self) -> None:
        """Starts it, where nothing was adopted."""
        if not self.adopted:
            self._feed(StartAsked("its agent started"))

    async def run(self) -> None:
        """Keeps it until cancelled."""
        poll_at = self._loop.time()
        while True:
            deadline = self._life.next_deadline()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(poll_at if deadline is None else min(poll_at, deadline)):
                    await self._wake.wait()  # an event may have brought the deadline forward
            self._wake.clear()
            self._feed(Tick())
            if self._loop.time() >= poll_at:
                poll_at = self._loop.time() + POLL_S
                await self._poll()
                self._tell()

    async def _adopt(self) -> bool:
        record = await asyncio.to_thread(self._load_record)
        if record is None:
            return False
        if record.launch.log_file != self._folder / self.id / "log":
            self._log.warning("the state directory is a copy of another one: the engine that it names belongs to that one", pid=record.pid)
            return False
        process = await self._launcher.adopt(record)
        if process is None:
            return False
        self._role, self._drained = record.role, record.drained
        await self._compare_settings(record)
        self._watch(process, record)
        self._feed(Adopted(record.pid, ready=record.ready is not None))
        if record.ready is not None:
            await self._poll()
        else:
            self._spawn(self._wait_ready(process), f"wait until {self.id} is ready")
        return True

    async def _compare_settings(self, record: EngineRecord) -> None:
        """With those of the role in which it was started: a switch changes no settings."""
        try:
            now = await asyncio.to_thread(self._settings_for, record.launch.role)
        except DisaggError as error:
            self._log.warning("an adopted engine could not be started with the present settings", pid=record.pid, why=str(error))
            return
        if now != (record.launch.settings or record.launch.argv):
            self._outdated = f", but with older settings than it would be started with now: `disagg restart {self.id}`"
            self._log.warning("an adopted engine runs with older settings than it would be started with now", pid=record.pid)

    def _watch(self, process: RunningEngine, record: EngineRecord) -> None:
        self._process = process
        self._start_ticks, self._switches = record.start_ticks, record.switches
        self._facts, self._load, self._counter, self._working = EngineFacts(), EngineLoad(), 0, False
        self._own_facts = EngineFacts(model_hash=record.launch.model_hash, part=record.launch.part)
        self._parts = record.launch.parts
        self._mode_fault = self._progress = ""
        self._answered_at = self._loop.time()
        self._address = record.ready.address(record) if record.ready is not None else None
        self.follow(record.launch.kv_events)
        self._spawn(self._report_end(process), f"wait for the end of {self.id}")

    def follow(self, source: KvSource | None) -> None:
        """Follows the KV events of the process that is watched now, if it publishes any; an earlier one is followed no more."""
        if self._follower is not None:
            self._follower.stop()
        self._follower = None
        if source is not None:
            self._follower = KvFollower(source, log=self._log)
            self._spawn(self._follower.run(), f"KV events of {self.id}")

    async def _report_end(self, process: RunningEngine) -> None:
        code = await process.wait()
        text = await asyncio.to_thread(_read_log, process)
        if process is self._process:
            why = diagnosis.why(text, code)
            self.follow(None)
            if self._life.state not in {State.STOPPING, State.STOPPED}:
                self._log.warning("an engine ended", pid=process.pid, code=code, why=why)
            self._feed(Exited(code, process.pid, why, diagnosis.is_lasting(text)))

    def _feed(self, event: Event) -> None:
        for command in self._life.handle(event, now=self._loop.time()):
            self._do(command)
        if not isinstance(event, Tick | ProgressSeen):
            self._wake.set()
        self._tell()

    def _do(self, command: Command) -> None:
        match command:
            case Spawn():
                self._progress = ""
                self._spawn(self._start(), f"start {self.id}")
            case Terminate():
                if self._process is not None and self._process is not self._leaving:
                    self._process.terminate()
            case Kill(cause=cause):
                self._log.error("killing the engine", cause=cause)
                if self._process is not None:
                    self._process.kill()
            case Probe():
                self._spawn(self._probe(), f"probe {self.id}")
            case Report(sentence=sentence):
                self._log.warning("engine", story=sentence)

    async def _start(self) -> None:
        self._spawning = spawning = asyncio.Event()
        try:
            process = await self._make_process()
        finally:
            spawning.set()
        if process is not None:
            await self._save(process.record())
            await self._wait_ready(process)

    async def _make_process(self) -> RunningEngine | None:
        try:
            launch = await asyncio.to_thread(self._prepare, self._role)
            process = await self._launcher.start(launch)
        except (StartError, ConfigError) as error:
            self._feed(SpawnFailed(str(error), lasting=isinstance(error, ConfigError)))
            return None
        self._outdated = ""
        self._watch(process, process.record())
        self._feed(Spawned(process.pid))
        return process

    def _prepare(self, role: Role) -> EngineLaunch:
        """Makes the launch and writes what must be on disk before the process is there."""
        launch = self._launch_for(role)
        for path, content in launch.secret_files:
            write_private(path, content.encode())
        write_private(self._launch_path, encode_kept(launch))
        return launch

    async def _wait_ready(self, process: RunningEngine) -> None:
        try:
            ready = await process.wait_ready(3600.0)  # the machine has the limit that counts
        except StartError:
            return  # its end is reported by who waits for it
        if process is not self._process:
            return
        address = ready.address(process.record())
        while process.alive and process is self._process and not await self._is_ready(process, address):  # noqa: ASYNC110  # it cannot call us
            await asyncio.sleep(POLL_S)
        if process is not self._process or not process.alive:
            return
        self._address = address
        await self._save(process.record(ready=ready))
        if self._life.state is State.STARTING:
            self._feed(BecameReady(process.pid))

    async def _is_ready(self, process: RunningEngine, address: EngineAddress) -> bool:
        """It says so, and answers. Until then its log is all that tells how far it is."""
        text = await asyncio.to_thread(_read_log, process)
        progress, stuck = diagnosis.progress(text), diagnosis.hopeless(text)
        if stuck and process is self._process and process.alive:
            self._log.error("killing an engine that cannot get ready", pid=process.pid, why=stuck)
            process.kill()
            return False
        if progress != self._progress and process is self._process:
            self._progress = progress
            self._on_change()
        if not await self._prober.is_ready(address, POLL_PATIENCE_S):
            return False
        return isinstance(await self._look(address, anew=True), Answered)

    async def _look(self, address: EngineAddress, *, anew: bool = False) -> Seen:
        if self._own_facts.part:
            return await self._look_at_part(address)
        return await super()._look(address, anew=anew)

    async def _look_at_part(self, address: EngineAddress) -> Seen:
        """A part of an engine over several hosts that is not its first one serves nothing and says nothing but that it is there."""
        alive = await self._prober.is_ready(address, POLL_PATIENCE_S)
        if not alive:
            return TimedOut("it does not answer")
        self._answered_at = self._loop.time()
        self._facts = self._own_facts
        return Answered(self._facts, EngineLoad(), "", 0, working=False)

    async def _save(self, record: EngineRecord) -> None:
        record = msgspec.structs.replace(record, role=self._role, switches=self._switches, drained=self._drained, host=self._host)
        try:
            await asyncio.to_thread(write_private, self._record_path, encode_kept(record))
        except StartError as error:  # it serves all the same; only the next agent will not find it
            self._log.error("the engine's record cannot be written", error=str(error))

    def _load_record(self) -> EngineRecord | None:
        content = read_private(self._record_path)
        try:
            return None if content is None else decode_kept(content, EngineRecord)
        except msgspec.DecodeError:
            return None  # of another release, or broken: the engine, if there is one, is a stranger then

    @property
    def _record_path(self) -> Path:
        return self._folder / self.id / "record.json"

    @property
    def _launch_path(self) -> Path:
        return self._folder / self.id / "launch.json"

    # --- looking

    async def _poll(self) -> None:
        process, address = self._process, self._address
        if process is None or address is None or self._life.state is not State.RUNNING:
            return
        seen = await self._look(address)
        if process is not self._process or self._life.state is not State.RUNNING:
            return
        if isinstance(seen, Answered):
            self._feed(ProgressSeen(seen.counter, seen.working, process.pid))
        else:
            self._feed(ProgressMissed(process.pid))

    async def _probe(self) -> None:
        process, address = self._process, self._address
        if process is None or address is None:
            return
        why = ""
        try:
            async with asyncio.timeout(PROBE_PATIENCE_S):
                await self._prober.touch(address, "/health_generate")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            why = f"{type(error).__name__} within {PROBE_PATIENCE_S:g} s"
        if process is self._process and self._life.state is State.RUNNING:
            self._feed(ProbeFailed(why, process.pid) if why else ProbeAnswered(process.pid))

    # --- what the agent wants

    def report(self) -> EngineReport:
        """How it is."""
        state, reason = self._state()
        return self._report_as(state, reason, self._address, self._start_ticks)

    def _state(self) -> tuple[EngineState, str]:
        match self._life.state:
            case State.RUNNING:
                state, reason = self._state_in_service()
                return state, reason + self._outdated if state is EngineState.READY else reason
            case State.STARTING:
                return EngineState.STARTING, self._life.reason + (f"; {self._progress}" if self._progress else "")
            case State.HELD:
                return EngineState.HELD, self._life.reason
            case State.STOPPING:
                return (EngineState.DEAD if self._process is None or not self._process.alive else EngineState.DRAINING), self._life.reason
            case _:
                return EngineState.DEAD, self._life.reason

    def _tell(self) -> None:
        self._say_changes(*self._state())

    def drain(self, reason: str) -> None:
        """No new work; empty: work again. It is written down, for the next agent."""
        super().drain(reason)
        if self._process is not None:
            self._spawn(self._save(self._process.record()), f"record of {self.id}")

    async def switch(self, role: Role) -> tuple[bool, str]:
        """Changes its role while it lives; says what came of it."""
        process = self._process
        if self._address is None or process is None or self._life.state is not State.RUNNING:
            return False, f"it does not run: {self._life.reason}"
        if Role.UNIFIED in {role, self._role}:
            return False, "an engine cannot become unified, or stop being it, while it runs"
        if self._parts > 1:
            return False, _ROLE_OF_PARTS
        done, sentence = await self._post_switch(self._address, role)
        if done:
            record = msgspec.structs.replace(process.record(), role=role)
            self._address = record.ready.address(record) if record.ready is not None else self._address
            await self._save(record)
        self._tell()
        return done, sentence

    async def restart(self, role: Role, cause: str) -> tuple[bool, str]:
        """Starts it anew in this role; returns when that is under way."""
        if self._life.state is State.STOPPING:
            return False, "it is stopping already"
        if self._parts > 1 and role is not self._role:
            return False, _ROLE_OF_PARTS
        was, self._role = self._role, role
        self._feed(RestartAsked(cause))
        return True, f"it is started anew{f' as {role} (was {was})' if role is not was else ''}: {cause}"

    async def stop(self, limit_s: float) -> None:
        """SIGTERM, SIGKILL after `limit_s` seconds."""
        if self._life.state is State.STARTING:
            limit_s = min(limit_s, START_STOP_S)
        process = self._process
        self._leaving = process  # the launcher ends it, in its own way; a second SIGTERM would mean "at once" to many a program
        if self._life.state in {State.STARTING, State.RUNNING, State.BACKOFF, State.HELD}:
            self._feed(StopAsked("its agent stops"))
        if process is None and self._spawning is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._spawning.wait()
            process = self._process
        if process is not None and process.alive:
            await self._launcher.stop(process, limit_s)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._record_path.unlink, missing_ok=True)

    def let_go(self) -> None:
        """Looks away; the engine goes on."""
        if self._process is not None:
            self._process.close()

    def __repr__(self) -> str:
        return f"<EngineKeeper {self.id} {self._role} {self._life!r}>"


class AttachedKeeper(_Watched):
    """Watches an engine that somebody else started: it reports, drains and switches, but neither starts nor ends anything."""

    def __init__(
        self,
        engine: EngineId,
        role: Role,
        address: EngineAddress,
        *,
        prober: Prober,
        on_change: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        super().__init__(engine, role, prober, on_change, log)
        self.adopted = True
        self._address = address
        self._why = "it has not answered yet"
        self._refusals = 0
        self._asks_port = role is not Role.UNIFIED and not address.bootstrap_port
        self._has_port = not self._asks_port

    async def begin(self) -> None:
        """Looks at it once."""
        await self._see()

    def start(self) -> None:
        """It is not ours to start."""

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            await self._see()
            self._say_changes(*self._state())
            await asyncio.sleep(POLL_S)

    async def _see(self) -> None:
        """Looks at it; who did not answer the last time may be another engine now, and is asked for everything."""
        anew = self._why != ""
        seen = await self._look(self._address, anew=anew)
        self._refusals = self._refusals + 1 if isinstance(seen, Refused) else 0
        why = "" if isinstance(seen, Answered) else _why_silent(seen)
        if anew and not why and self._asks_port:
            why = await self._learn_port()
        self._why = why

    async def _learn_port(self) -> str:
        """Where decode engines meet it, as it says itself. Returns why that cannot be had now; one that does not say keeps none."""
        try:
            async with asyncio.timeout(POLL_PATIENCE_S):
                port = read_bootstrap_port(await self._prober.get(self._address, "/server_info"))
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            return f"it does not tell its bootstrap port ({type(error).__name__})"
        self._address = msgspec.structs.replace(self._address, bootstrap_port=port or self._address.bootstrap_port)
        self._has_port = True
        return ""

    def report(self) -> EngineReport:
        """How it is."""
        return self._report_as(*self._state(), self._address, 0)

    def _state(self) -> tuple[EngineState, str]:
        if not (self._facts.model and self._has_port):
            return EngineState.STARTING, f"attached to {self._address.url}: {self._why}"
        if self._refusals > 1:
            return EngineState.DEAD, f"attached to {self._address.url}, which refuses connections"
        return self._state_in_service()

    async def switch(self, role: Role) -> tuple[bool, str]:
        """Changes its role while it lives; says what came of it."""
        done, sentence = await self._post_switch(self._address, role)
        if done:
            self._address = msgspec.structs.replace(self._address, role=role)
        return done, sentence

    async def restart(self, role: Role, cause: str) -> tuple[bool, str]:
        """Refuses: whoever started it must."""
        return False, "it was attached and not started by disagg: restart it where it was started"

    async def stop(self, limit_s: float) -> None:
        """It is not ours to end."""

    def let_go(self) -> None:
        """Nothing is held."""


def _why_silent(seen: Refused | TimedOut) -> str:
    return "it refuses connections" if isinstance(seen, Refused) else seen.why


_ROLE_OF_PARTS = "an engine over several hosts keeps its role: change it in the settings of each of them, and restart them"


def _read_log(process: RunningEngine) -> str:
    process.mask_key()
    return process.log_text()


_MAY_RUN = frozenset(
    {EngineState.READY, EngineState.DRAINING, EngineState.SWITCHING, EngineState.SUSPECT, EngineState.QUARANTINED},
)
