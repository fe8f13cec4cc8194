"""The router's table of engines: feeds each one's detector, publishes a frozen view, carries out what was ordered.

    probes, reports, host verdicts ──► detectors (decide) ──► ClusterView ──► the relay reads it
    orders of people               ──► changes   (decide) ──► orders to agents, canaries, overlays
    what becomes of requests       ──► ejector   (decides) ─► ClusterView, probes of pairs

One beat every `BEAT_S` asks all machines for what is due. It notices how late it is itself: time in which the router did not run is
nobody's silence, and what a probe says that was under way meanwhile proves nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from disagg.cluster.change import (
    FINAL,
    BecameIdle,
    BecameReady,
    CanaryEnded,
    Change,
    Limits,
    OrderAnswered,
    PutBack,
    RunCanary,
    SendOrder,
    TakeOut,
    WasLost,
)
from disagg.cluster.change import Command as ChangeCommand
from disagg.cluster.change import Event as ChangeEvent
from disagg.cluster.change import Phase as ChangePhase
from disagg.cluster.change import Tick as ChangeTick
from disagg.cluster.detector import (
    EngineDetector,
    Event,
    FailOver,
    HostJudged,
    Ordered,
    Probe,
    ProbeVoided,
    Publish,
    Refused,
    Reported,
    Stalled,
    Tick,
    TimedOut,
    Troubled,
)
from disagg.cluster.examiner import Examiner
from disagg.cluster.matcher import Matcher
from disagg.cluster.measurer import Measurer
from disagg.cluster.prober import Prober
from disagg.cluster.reaper import Entries, Reaper
from disagg.cluster.transport import Bucket
from disagg.errors import DisaggError, OrderError
from disagg.model import (
    Choice,
    ClusterView,
    EngineAddress,
    EngineFacts,
    EngineId,
    EngineState,
    EngineView,
    HostId,
    HostState,
    HostView,
    Role,
)
from disagg.policy.eject import Changed, Ejector, Faulted, HandedOver, Measure, Paced, PairFaulted, Probed, ProbePair, Served, ViewChanged
from disagg.policy.eject import Event as Symptom
from disagg.policy.eject import Tick as EjectorTick
from disagg.policy.pace import Pace
from disagg.policy.prefix import PrefixIndex
from disagg.policy.replay import Blame
from disagg.wire.messages import EngineReport

BEAT_S = 0.1
LAG_S = 0.5
LOADS_SHOWN_S = 0.2
"""How old the loads in the view may be; a change of state is published at once."""
FACTS_FOR_S = 10.0  # an engine that was restarted between two probes may serve another model: it is asked again now and then
CHANGES_KEPT = 64
MOVE_AGAIN_S = 1.0
"""How often is looked whether what runs on an engine that leaves can go on elsewhere by now."""
UNDRAIN_SEEN_S = 1.0
LINES_PER_S = 5.0
LINES_BURST = 500.0
ADDITIONS_PER_S = 0.1
ADDITIONS_BURST = 128.0
ENGINES_PER_HOST = 64
AWAKE_S = 1.0
PACE_S = 1.0
PAIR_PROBE_LIMIT_S = 4.0
"""A probe of a cut pair fails before the next one is due: a link is found to be well again within five seconds and a probe's time."""


class DataPath(Protocol):
    """What the controller needs of the relay."""

    def engine_lost(self, engine: EngineId, cause: str) -> None:
        """Nothing that runs on this engine will be answered."""

    def move(self, engine: EngineId, cause: str) -> int:
        """Has what runs there go on on other engines, where that is possible; how many that were."""

    def last_bytes_at(self, engine: EngineId) -> float:
        """When bytes of a running answer last came from it, on the loop's clock; 0 for never."""

    def legs_of(self, slot: int) -> int:
        """How many legs run on the engine in this slot."""

    def long_s(self, slot: int) -> float:
        """For how long the engine in this slot may seem to stand still, because of a long prompt that it was given, seconds."""


class Hosts(Protocol):
    """What the controller needs of the control plane."""

    async def order(self, host: HostId, engine: EngineId, action: str, role: Role | None, cause: str) -> tuple[bool, str]:
        """Tells a host's agent to do something; what it answered."""


class Controller:
    """The table.

    Args:
        addresses: engines without an agent, given by URL; they never go.
        probe_interval_s: how often a ready one of these is looked at.
        probe_timeout_s: how long an engine may take to answer.
        spawn: runs a coroutine as a named task that somebody owns.
        change_limits: of drains, switches and restarts.
        may_join: hosts can join as well.
        prober: asks engines; None for one that asks over HTTP.
        ejector: who decides which engines are sick.

    Attributes:
        view: the current view; replaced whole, never changed.
        changes: those under way and the last ones that ended, oldest first.
        flips: those that ended, by roles and outcome.
        prefixes: what the engines' prefix caches hold, where they say so.
        ejections: engines and pairs that were taken out because they failed, by reason.
        pace: what the relay measures of the engines; None where nothing is measured.
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        *,
        probe_interval_s: float,
        probe_timeout_s: float,
        spawn: Callable[[Coroutine[Any, Any, None], str], Any],
        log: structlog.typing.FilteringBoundLogger,
        change_limits: Limits | None = None,
        may_join: bool = False,
        prober: Prober | None = None,
        ejector: Ejector | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._prober = prober or Prober(probe_timeout_s)
        self._spawn = spawn
        self._interval_s = probe_interval_s
        self._change_limits = change_limits or Limits()
        self._may_join = may_join
        now = self._loop.time()
        self._detectors = {a.id: EngineDetector(a, slot=i, probe_interval_s=probe_interval_s, now=now) for i, a in enumerate(addresses)}
        self._by_host: dict[HostId, list[EngineDetector]] = {}  # asked for with each heartbeat
        self._slots = len(addresses)
        self._hosts: dict[HostId, HostView] = {}
        self._drained: dict[EngineId, str] = {}
        self._kept_out: dict[EngineId, str] = {}
        self._drained_at: dict[EngineId, float] = {}
        self._move_at: dict[EngineId, float] = {}
        self._lines: dict[HostId, Bucket] = {}
        self._additions: dict[HostId, Bucket] = {}
        self._facts_until: dict[EngineId, float] = {}
        self._running: dict[EngineId, tuple[Change, int]] = {}  # with the pid that it began with
        self.changes: dict[int, Change] = {}
        self.flips: Counter[tuple[str, str, str]] = Counter()
        self.prefixes = PrefixIndex()
        self.ejections: Counter[str] = Counter()
        self._ejector = ejector if ejector is not None else Ejector()
        self._roster: tuple[Any, ...] = ()
        self.pace: Pace | None = None
        self._paced_at = now
        self._processes: dict[int, tuple[object, ...]] = {}
        self._change_ids = 0
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._stale_at: float | None = None  # since when the view shows loads that are not the newest
        self._stalled_at = float("-inf")
        self._beat_at = float("inf")
        self._data: DataPath | None = None
        self._control: Hosts | None = None
        self._wake = asyncio.Event()
        self.on_beat: Callable[[float, float], None] | None = None
        self.on_view: Callable[[], None] | None = None
        self.examiner: Examiner | None = None
        self.measurer: Measurer | None = None
        self.reaper: Reaper | None = None
        self.matcher: Matcher | None = None
        self.view = self._make_view()

    def attach(self, data: DataPath, control: Hosts | None = None, examiner: Examiner | None = None, pace: Pace | None = None) -> None:
        """Makes it known to the relay, the control plane and the examiner, which are built after it, and to what the relay measures."""
        self._data = data
        self.pace = pace
        self._control = control
        self.examiner = examiner

    def watch_for_orphans(self, entries: Entries) -> Reaper:
        """From now on work that none of these entries explains is ended."""
        self.reaper = Reaper(table=self, entries=entries, prober=self._prober, spawn=self._spawn)
        return self.reaper

    def measure_engines(self, **settings: Any) -> Measurer:
        """From now on engines that are idle when they come are measured; the settings are those of `Measurer`."""
        self.measurer = Measurer(table=self, spawn=self._spawn, log=self._log, **settings)
        return self.measurer

    def match_rates(self, **settings: Any) -> Matcher:
        """From now on engines are moved as the load wants it; the settings are those of `Matcher`."""
        self.matcher = Matcher(table=self, log=self._log, **settings)
        return self.matcher

    @property
    def measuring(self) -> Collection[EngineId]:
        """The engines that are being measured."""
        return () if self.measurer is None else self.measurer.measuring

    # --- life

    async def run(self) -> None:
        """Watches until cancelled."""
        try:
            await self._beat_on()
        finally:
            await self._prober.close()

    async def _beat_on(self) -> None:
        while True:
            expected = self._beat_at = self._loop.time() + BEAT_S
            try:
                async with asyncio.timeout_at(expected):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            now = self._loop.time()
            lag_s = now - expected
            if lag_s > LAG_S:
                self._slept(lag_s, now)
            if self.on_beat is not None:
                self.on_beat(now, lag_s if lag_s > LAG_S else 0.0)
            self._beat(now)

    def _slept(self, lag_s: float, now: float) -> None:
        self._log.warning("the router itself stood still; nobody's silence in that time counts", seconds=round(lag_s, 2))
        self._stalled_at = now
        for detector in list(self._detectors.values()):
            self._feed(detector, Stalled(lag_s))
        if self.reaper is not None:
            self.reaper.stalled(lag_s)
        if self.matcher is not None:
            self.matcher.stalled()

    def _beat(self, now: float) -> None:
        for detector in list(self._detectors.values()):
            due = detector.next_deadline()
            if due is not None and now >= due:
                long_s = 0.0 if self._data is None else self._data.long_s(detector.view.slot)
                self._feed(detector, Tick(self._last_bytes_at(detector.id), long_s))
        for engine, (change, pid) in list(self._running.items()):
            self._look_at_change(engine, change, pid, now)
        for engine, cause in list(self._leavers(now)):
            self._move_rest(engine, cause, now)
        if self.examiner is not None:
            self.examiner.look(now)
        if self.measurer is not None and (self.examiner is None or self.examiner.rests(now)):
            self.measurer.look(now)
        if self.reaper is not None:
            self.reaper.look(now)
        self._look_at_sick(now)
        if self.matcher is not None:
            self.matcher.look(now)
        if self._stale_at is not None and now - self._stale_at >= LOADS_SHOWN_S:
            self._publish()

    def _last_bytes_at(self, engine: EngineId) -> float:
        return 0.0 if self._data is None else self._data.last_bytes_at(engine)

    # --- waiting

    async def wait_ready(self) -> None:
        """Returns when a request can be served."""
        await self._wait_for(lambda: not self.view.why_not_ready())

    async def wait_settled(self) -> None:
        """Returns when no engine is starting any more."""
        await self._wait_for(lambda: all(e.state is not EngineState.STARTING for e in self.view.engines))

    async def wait_all_ready(self, count: int) -> None:
        """Returns when so many engines are there and all of them are ready."""
        await self._wait_for(lambda: len(self.view.engines) == count and all(e.state is EngineState.READY for e in self.view.engines))

    async def _wait_for(self, is_so: Callable[[], bool]) -> None:
        if is_so():
            return
        waiter = (is_so, self._loop.create_future())
        self._waiting.append(waiter)
        try:
            await waiter[1]
        finally:
            self._waiting.remove(waiter)

    # --- what others report

    def refused(self, engine: EngineId) -> None:
        """The data path was refused a connection: look at that engine at once."""
        detector = self._detectors.get(engine)
        if detector is not None:
            self._feed(detector, Troubled())
            self._wake.set()

    def host_changed(self, host: HostView, *, engines_gone: bool = False) -> None:
        """The control plane thinks otherwise of a host."""
        self._hosts[host.id] = host
        for detector in self._of(host.id):
            self._feed(detector, HostJudged(host.state, host.reason, self._last_bytes_at(detector.id), engines_gone))
        self._publish()

    def host_forgotten(self, host: HostId, cause: str) -> None:
        """The host is no longer part of the cluster, and neither are its engines."""
        self._hosts.pop(host, None)
        for detector in list(self._of(host)):
            self._drop(detector, cause)
        self._by_host.pop(host, None)
        self._publish()

    def reported(self, host: HostId, reports: Iterable[EngineReport]) -> list[str]:
        """An agent says how its engines are. Returns what is wrong with that, one sentence each."""
        faults = []
        seen = set()
        for report in list(reports)[:ENGINES_PER_HOST]:
            detector = self._detectors.get(report.id) or self._add(host, report)
            if detector is None:
                faults.append("it names new engines faster than anybody can start them")
                continue
            if detector.view.host != host:
                faults.append(f"the engine id {report.id} is taken by {detector.view.host or 'an engine that was given by URL'}")
                continue
            seen.add(report.id)
            self._feed(detector, Reported(report))
        gone = [detector for detector in self._of(host) if detector.id not in seen]
        for detector in gone:
            self._drop(detector, "its host does not have it any more")
        if gone:
            self._publish()
        return faults

    def owns(self, host: HostId, engine: EngineId) -> bool:
        """Whether this engine is one of this host's."""
        detector = self._detectors.get(engine)
        return detector is not None and detector.view.host == host

    def _of(self, host: HostId) -> list[EngineDetector]:
        return self._by_host.get(host, [])

    def _add(self, host: HostId, report: EngineReport) -> EngineDetector | None:
        """A new engine; None when this host has named too many lately. Each takes a slot for as long as the router lives."""
        if not self._bucket(self._additions, host, ADDITIONS_PER_S, ADDITIONS_BURST).take(self._loop.time()):
            return None
        address = EngineAddress(report.id, report.role, report.host, report.port, report.bootstrap_port)
        slot = self._slots
        self._slots += 1
        now = self._loop.time()
        detector = EngineDetector(address, slot=slot, probe_interval_s=self._interval_s, now=now, host=host)
        self._detectors[report.id] = detector
        self._by_host.setdefault(host, []).append(detector)
        if self.reaper is not None:
            self.reaper.met(report)
        return detector

    def _drop(self, detector: EngineDetector, cause: str) -> None:
        del self._detectors[detector.id]
        self._of(detector.view.host).remove(detector)
        self._drained.pop(detector.id, None)
        self._kept_out.pop(detector.id, None)
        self._move_at.pop(detector.id, None)
        self.prefixes.forget(detector.id)
        self.tell(detector.view.host, "engine gone", engine=detector.id, reason=cause)
        if self._data is not None:
            self._data.engine_lost(detector.id, cause)

    def tell(self, about: HostId, event: str, *, warn: bool = False, **facts: Any) -> None:
        """Logs what happens to an engine; a host that makes things happen without end is not worth a line each time."""
        if self._bucket(self._lines, about, LINES_PER_S, LINES_BURST).take(self._loop.time()):
            (self._log.warning if warn else self._log.info)(event, **facts)

    def _bucket(self, buckets: dict[HostId, Bucket], host: HostId, rate: float, burst: float) -> Bucket:
        found = buckets.get(host)
        if found is None:
            found = buckets[host] = Bucket(rate, burst, self._loop.time())
        return found

    # --- machines at work

    def _feed(self, detector: EngineDetector, event: Event) -> None:
        before = detector.view
        published = False
        for command in detector.handle(event, now=self._loop.time()):
            match command:
                case Probe(patience_s=patience_s):
                    self._spawn(self._look(detector, patience_s), f"look at {detector.id}")
                case FailOver(cause=cause):
                    self._fail_over(detector, cause)
                case Publish():
                    published = True
        if published:
            self._show(before, detector.view)

    def _show(self, before: EngineView, view: EngineView) -> None:
        """A new state, place or fact is shown at once; new loads with the next beat that is due."""
        if view.state is not before.state:
            self.tell(view.host, "engine changed", engine=view.id, was=before.state.value, now=view.state.value, reason=view.reason)
            if view.state is EngineState.DEAD:
                self.prefixes.lose(view.id, "it is dead")
        if (view.state, view.address, view.facts) != (before.state, before.address, before.facts) or view.id not in self._shown:
            self._publish()
        elif self._stale_at is None:
            self._stale_at = self._loop.time()

    def _fail_over(self, detector: EngineDetector, cause: str) -> None:
        if self._data is not None:
            self._data.engine_lost(detector.id, cause)

    def _publish(self) -> None:
        self._stale_at = None
        self.view = self._make_view()
        if self.on_view is not None:
            self.on_view()
        for is_so, waiter in self._waiting:
            if not waiter.done() and is_so():
                waiter.set_result(None)

    def _make_view(self) -> ClusterView:
        views = sorted((d.view for d in self._detectors.values()), key=lambda v: v.slot)
        self._shown = frozenset(v.id for v in views)
        hosts = (self._hosts[h] for h in sorted(self._hosts))
        bad = self.examiner.quarantined if self.examiner is not None else {}
        view = ClusterView.of(views, hosts, may_join=self._may_join, quarantined=bad)
        self._enrol(view)
        ejected, cut, weights = self._ejector.ejected, self._ejector.cut, self._ejector.weights
        if not (ejected or cut or weights):
            return view
        return ClusterView.of(views, view.hosts, may_join=self._may_join, quarantined=bad, ejected=ejected, cut=cut, weights=weights)

    def judged(self) -> None:
        """Other pairs are quarantined than before."""
        self._publish()

    # --- the sick

    def fault(self, choice: Choice, blame: Blame, what: str, *, engine: EngineId | None = None) -> None:
        """An attempt failed. Not held against anybody when the router itself did not run at the time.

        Args:
            choice: the engines it went to.
            blame: as `disagg.policy.replay.judge` says.
            what: how, a few words of our own: they are shown to people.
            engine: whose leg it was, where one engine is to blame; without it, decode's.
        """
        prefill, decode = choice.prefill, choice.decode
        if self._was_asleep(self._loop.time()):
            return
        if blame is Blame.PAIR and prefill is not None:
            if self._is_current(prefill) and self._is_current(decode):
                self._treat(PairFaulted(prefill.id, decode.id, what))
        elif blame is not Blame.NOBODY:
            one = prefill if prefill is not None and engine == prefill.id else decode
            if self._is_current(one):
                self._treat(Faulted(one.id, what))

    def handed_over(self, choice: Choice) -> None:
        """The first token of an answer came."""
        if not self._ejector.is_calm:  # it usually is, and this is asked for each request
            self._treat(HandedOver(choice.prefill.id if choice.prefill is not None else None, choice.decode.id))

    def served(self, choice: Choice) -> None:
        """An answer came to its end as it should."""
        if not self._ejector.is_calm:
            self._treat(Served(choice.decode.id))

    def _was_asleep(self, now: float) -> bool:
        """What is late just now is late because of the router: its deadlines come before what waits in its sockets is read."""
        return now - self._beat_at > LAG_S or now - self._stalled_at < AWAKE_S

    def _is_current(self, engine: EngineView) -> bool:
        """What a process did that is gone is not held against the one that took its place."""
        detector = self._detectors.get(engine.id)
        return detector is not None and detector.view.address.pid == engine.address.pid

    def _enrol(self, view: ClusterView) -> None:
        roster = (tuple((e.slot, e.address.pid, e.address.role, e.state, e.facts, e.unpaired) for e in view.engines), view.quarantined)
        if roster != self._roster:
            self._roster = roster
            self._note(self._ejector.handle(ViewChanged(view), now=self._loop.time()))
            self._forget_pace(view)

    def _forget_pace(self, view: ClusterView) -> None:
        for engine in view.engines:
            process = (engine.address.pid, engine.address.role, engine.state in _ANEW)
            if self._processes.setdefault(engine.slot, process) != process:
                self._processes[engine.slot] = process
                if self.pace is not None:
                    self.pace.forget(engine.slot)

    def _look_at_sick(self, now: float) -> None:
        due = self._ejector.next_deadline()
        if due is not None and now >= due:
            self._treat(EjectorTick())
        if self.pace is not None and now - self._paced_at >= PACE_S:
            self._paced_at = now
            self._treat(Paced(self._measures(self.pace)))

    def _measures(self, pace: Pace) -> dict[EngineId, Measure]:
        found = {}
        for detector in self._detectors.values():
            slot, reads = detector.view.slot, detector.view.address.role is Role.PREFILL
            measured = pace.byte_s(slot) if reads else pace.step_s(slot)
            if measured is not None:
                samples = pace.samples(slot)[0 if reads else 1]
                found[detector.id] = Measure(measured, samples, pace.first_token_mean_s(slot) if reads else None)
        return found

    def _treat(self, symptom: Symptom) -> None:
        commands = self._ejector.handle(symptom, now=self._loop.time())
        for command in commands:
            if isinstance(command, ProbePair):
                self._spawn(self._probe_pair(command), f"probe of {command.prefill} with {command.decode}")
        if self._note(commands):
            self._publish()

    def _note(self, commands: Iterable[object]) -> bool:
        changes = [c for c in commands if isinstance(c, Changed)]
        for change in changes:
            if change.reason:
                self.ejections[change.reason] += 1
            self.tell(HostId(""), "sick", story=change.sentence)
        return bool(changes)

    async def _probe_pair(self, asked: ProbePair) -> None:
        why = await self._why_not_reached(asked)
        self._treat(Probed(asked.prefill, asked.decode, not why, why))

    async def _why_not_reached(self, asked: ProbePair) -> str:
        """Empty when the pair answers; without an examiner the clients' requests are the probe."""
        if self.examiner is None:
            return ""
        prefill, decode = self._detectors.get(asked.prefill), self._detectors.get(asked.decode)
        if prefill is None or decode is None:
            return "one of them is gone"
        try:
            async with asyncio.timeout(PAIR_PROBE_LIMIT_S):
                await self.examiner.reach(Choice(prefill.view, decode.view, "a probe of a cut pair"))
        except TimeoutError:
            return f"a probe was not answered within {PAIR_PROBE_LIMIT_S:g} s"
        except DisaggError as error:
            return f"a probe failed: {error}"
        return ""

    async def _look(self, detector: EngineDetector, patience_s: float | None) -> None:
        address, began = detector.view.address, self._loop.time()
        known = self._known(detector)
        died_before = detector.view.state is EngineState.DEAD
        event: Event = await self._prober.look(address, known, patience_s)
        if self._detectors.get(detector.id) is not detector or detector.view.address is not address:
            event = ProbeVoided()  # it has moved meanwhile
        elif self._stalled_at >= began and isinstance(event, Refused | TimedOut):
            event = ProbeVoided()
        elif detector.view.state is EngineState.DEAD and not died_before:
            event = ProbeVoided()  # its process ended while the probe was under way: what it said is the past
        elif known is None:
            self._facts_until[detector.id] = self._loop.time() + FACTS_FOR_S
        self._feed(detector, event)
        self._wake.set()

    def _known(self, detector: EngineDetector) -> EngineFacts | None:
        fresh = detector.view.state is EngineState.READY and self._loop.time() < self._facts_until.get(detector.id, 0.0)
        return detector.view.facts if fresh else None

    # --- what people order

    def engine(self, engine: str) -> EngineView:
        """The engine of this id.

        Raises:
            OrderError: there is none.
        """
        detector = self._detectors.get(EngineId(engine))
        if detector is None:
            known = ", ".join(sorted(self._detectors)) or "none"
            raise OrderError(f"there is no engine {engine!r}; there is {known}", status=404)
        return detector.view

    async def drain(self, engine: str, cause: str) -> str:
        """Takes an engine out of service; what runs goes on. Says what happens."""
        view = self.engine(engine)
        if view.id in self._drained:
            return f"{engine} is drained already: {self._drained[view.id]}; {self._load_text(view)}"
        reason = f"drained: {cause}"
        self._drained[view.id] = reason
        self._drained_at[view.id] = self._loop.time()
        self._overlay(view.id)
        await self._tell_agent(view, "drain", reason)
        return f"{engine} takes no new work; {self._load_text(view)}{self._last_one_text(view)}"

    def _leavers(self, now: float) -> Iterable[tuple[EngineId, str]]:
        """The engines that what still runs on them should leave, and why."""
        for engine, reason in self._drained.items():
            if now - self._drained_at[engine] >= self._change_limits.drain_s:
                yield engine, reason
        for engine, (change, _) in self._running.items():
            if change.phase is ChangePhase.MOVING:
                yield engine, f"it is emptied for a {change.verb}: {change.cause}"
        for detector in self._detectors.values():
            if detector.is_leaving:
                yield detector.id, detector.view.reason

    def _move_rest(self, engine: EngineId, cause: str, now: float) -> None:
        view = self._detectors[engine].view
        if self._data is None or now < self._move_at.get(engine, now) or not self._data.legs_of(view.slot) or not self._has_others(view):
            return
        self._move_at[engine] = now + MOVE_AGAIN_S
        if moved := self._data.move(engine, cause):
            self._log.info("requests go on on other engines", engine=engine, requests=moved, cause=cause)

    def _has_others(self, view: EngineView) -> bool:
        """Others serve its model: an engine that takes no new work is in no pool."""
        pool = self.view.pools.get(view.facts.model)
        return pool is not None and pool.can_serve

    async def undrain(self, engine: str, cause: str) -> str:
        """Brings an engine back into service. Says what happens."""
        view = self.engine(engine)
        was = self._drained.pop(view.id, None)
        self._overlay(view.id)
        await self._tell_agent(view, "undrain", cause)
        now = await self._settled(engine)
        if was is None and view.state is not EngineState.DRAINING:
            return f"{engine} was not drained; it is {now.state}: {now.reason}"
        return f"{engine} is back in service; it is {now.state}: {now.reason}"

    async def _settled(self, engine: str) -> EngineView:
        """The engine once its agent has said that it is not drained any more."""
        until = self._loop.time() + UNDRAIN_SEEN_S
        while self.engine(engine).state is EngineState.DRAINING and self._loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(BEAT_S / 2)
        return self.engine(engine)

    def _load_text(self, view: EngineView) -> str:
        legs = 0 if self._data is None else self._data.legs_of(view.slot)
        return f"{legs} running request{'s' * (legs != 1)} may finish" if legs else "nothing runs on it"

    def _last_one_text(self, view: EngineView) -> str:
        why = self.view.why_not_ready()
        return f"; beware: no request can be served now, {why}" if why else ""

    async def _tell_agent(self, view: EngineView, action: str, cause: str) -> None:
        """The agent remembers a drain, so that it outlives a restart of the router."""
        if view.host and self._control is not None:
            done, sentence = await self._control.order(view.host, view.id, action, None, cause)
            if not done:
                self._log.warning("the agent was not told", engine=view.id, action=action, why=sentence)

    def _overlay(self, engine: EngineId) -> None:
        detector = self._detectors.get(engine)
        if detector is None:
            return
        reason = self._drained.get(engine) or self._kept_out.get(engine)
        self._feed(detector, Ordered(EngineState.DRAINING if reason else None, reason or ""))

    # --- what the reaper wants

    def changing(self) -> Sequence[EngineId]:
        """The engines that a change is under way for."""
        return list(self._running)

    def keep_out(self, engine: EngineId, reason: str) -> None:
        """No new work for it, until `let_in`. What a person or a change wants of it stands."""
        self._kept_out[engine] = reason
        if engine not in self._running:
            self._overlay(engine)

    def let_in(self, engine: EngineId) -> None:
        """The reaper is done with it."""
        if self._kept_out.pop(engine, None) is not None and engine not in self._running:
            self._overlay(engine)

    # --- changes

    def flip(self, engine: str, role: Role, cause: str) -> int:
        """Begins to move an engine to another role; returns the number of the change.

        Raises:
            OrderError: it cannot be done, with the reason.
        """
        view = self._changeable(engine)
        if role is view.address.role:
            raise OrderError(f"{engine} is a {role} engine already", status=409)
        if Role.UNIFIED in {role, view.address.role}:
            raise OrderError(f"{engine} cannot be flipped from {view.address.role} to {role}: only prefill and decode change places", 409)
        return self._begin(view, role, live=True, cause=cause)

    def beware(self, engine: str) -> str:
        """What a person should know before this engine is taken out: empty, or a clause."""
        view = self.engine(engine)
        peers = [e for e in self.view.engines if e.state is EngineState.READY and e.address.role is view.address.role and e.id != view.id]
        return "" if peers else f"; beware: it is the last ready {view.address.role} engine"

    def restart(self, engine: str, cause: str) -> int:
        """Begins to restart an engine; returns the number of the change. Raises OrderError."""
        view = self._changeable(engine)
        return self._begin(view, view.address.role, live=False, cause=cause)

    def _changeable(self, engine: str) -> EngineView:
        view = self.engine(engine)
        if not view.host:
            raise OrderError(f"{engine} was given by URL and has no agent that could change it", status=409)
        host = self._hosts.get(view.host)
        if host is None or host.state not in {HostState.ONLINE, HostState.SUSPECT}:
            raise OrderError(f"the host {view.host} of {engine} cannot be reached: {host.reason if host else 'it is gone'}", status=409)
        if view.id in self._running:
            raise OrderError(f"{engine} is being changed already: {self._running[view.id][0].outcome}", status=409)
        return view

    def _begin(self, view: EngineView, role: Role, *, live: bool, cause: str) -> int:
        now = self._loop.time()
        if view.state in {EngineState.DEAD, EngineState.HELD} and live:
            raise OrderError(f"{view.id} is {view.state} ({view.reason}): restart it first", status=409)
        change = Change(view.id, view.address.role, role, live=live, cause=cause, limits=self._change_limits, now=now)
        self._change_ids += 1
        self.changes[self._change_ids] = change
        while len(self.changes) > CHANGES_KEPT:
            self.changes.pop(next(iter(self.changes)))
        self._running[view.id] = (change, view.address.pid)
        self._carry_out(change, change.begin(now))
        return self._change_ids

    def _look_at_change(self, engine: EngineId, change: Change, pid: int, now: float) -> None:
        detector = self._detectors.get(engine)
        view = detector.view if detector is not None else None
        event: ChangeEvent = ChangeTick(others=view is not None and self._has_others(view))
        if view is None:
            event = WasLost("its host does not have it any more")
        elif change.phase in _EMPTYING and (self._is_idle(view) or (not change.live and view.state in _DOWN)):
            event = BecameIdle()
        elif view.state in _DOWN and change.phase is not ChangePhase.RESTARTING:
            event = WasLost(view.reason)
        elif change.phase is ChangePhase.RESTARTING and view.address.pid != pid and self._serves(view):
            event = BecameReady(view.address.role)
        self._advance(change, event, now)

    def _is_idle(self, view: EngineView) -> bool:
        """The router has no leg there, and the engine itself has nothing: old legs may have been sent by a router before this one."""
        legs = 0 if self._data is None else self._data.legs_of(view.slot)
        return legs == 0 and view.load.at_work == 0

    def _serves(self, view: EngineView) -> bool:
        return view.state in {EngineState.SWITCHING, EngineState.DRAINING, EngineState.READY} and bool(view.facts.model or view.facts.part)

    def _advance(self, change: Change, event: ChangeEvent, now: float) -> None:
        if change.phase not in FINAL:
            commands = change.handle(event, now=now)
            if commands:
                self._carry_out(change, commands)
        known = self._running.get(change.engine)
        if change.phase in FINAL and known is not None and known[0] is change:
            del self._running[change.engine]
            if change.live:
                self.flips[change.was, change.role, change.phase] += 1
            self._log.info(change.verb, engine=change.engine, outcome=change.outcome)

    def _carry_out(self, change: Change, commands: Iterable[ChangeCommand]) -> None:
        detector = self._detectors.get(change.engine)
        for command in commands:
            if detector is None:
                return
            match command:
                case TakeOut(state=state, reason=reason):
                    self._feed(detector, Ordered(state, reason))
                case SendOrder(action=action, role=role, cause=cause):
                    self._spawn(self._order(change, detector, action, role, cause), f"order for {change.engine}")
                case RunCanary():
                    self._spawn(self._canary(change, detector), f"canary for {change.engine}")
                case PutBack():
                    self._overlay(change.engine)

    async def _order(self, change: Change, detector: EngineDetector, action: str, role: Role, cause: str) -> None:
        assert self._control is not None
        done, sentence = await self._control.order(detector.view.host, change.engine, action, role, cause)
        self._advance(change, OrderAnswered(done, sentence), self._loop.time())

    async def _canary(self, change: Change, detector: EngineDetector) -> None:
        choice = self._partnered(detector.view, change.role)
        if choice is None or self.examiner is None:
            answer = CanaryEnded(done=True, sentence="no partner was there to prove it with")
        else:
            answer = await self._prove(self.examiner, choice)
        self._advance(change, answer, self._loop.time())

    async def _prove(self, examiner: Examiner, choice: Choice) -> CanaryEnded:
        try:
            return CanaryEnded(done=True, sentence=await examiner.prove(choice))
        except DisaggError as error:
            return CanaryEnded(done=False, sentence=str(error))

    def _partnered(self, view: EngineView, role: Role) -> Choice | None:
        view = msgspec.structs.replace(view, address=msgspec.structs.replace(view.address, role=role))
        pool = self.view.pools.get(view.facts.model)
        others = () if pool is None else pool.decode if role is Role.PREFILL else pool.prefill
        partner = next((e for e in others if e.id != view.id and not e.facts.why_not_paired_with(view.facts)), None)
        if partner is None:
            return None
        prefill, decode = (view, partner) if role is Role.PREFILL else (partner, view)
        return Choice(prefill, decode, f"the canary of {view.id}'s switch")

    # --- what people look at

    def story(self, engine: str) -> list[tuple[float, str]]:
        """What happened to an engine, as far as it is kept."""
        story = list(self._detectors[self.engine(engine).id].history)
        story += [(at, what) for at, what in self._ejector.history if engine in what.replace(":", " ").split()]
        return sorted(story, key=lambda entry: entry[0])

    def counts(self) -> Mapping[str, int]:
        """Engines by state."""
        return Counter(d.view.state.value for d in self._detectors.values())

    def __repr__(self) -> str:
        return f"<Controller {dict(self.counts())} changes={len(self._running)}>"


_DOWN = frozenset({EngineState.DEAD, EngineState.HELD})
_ANEW = frozenset({EngineState.DEAD, EngineState.HELD, EngineState.STARTING})
_EMPTYING = frozenset({ChangePhase.DRAINING, ChangePhase.MOVING})
