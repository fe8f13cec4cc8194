"""Which engines and pairs get no new work for a while, because they are sick. A state machine over the pools of a router.

Theory of operation. A detector says whether an engine lives; here it is about engines that live, say that they are well, and fail. What
is known comes from the requests themselves, and from three kinds of trouble follow three kinds of measures:

    its connections fail, `FAULTS_OUT` times in `FAULTS_WITHIN_S`,      ejected: for `OUT_S`, twice as long each time until it was
    and it served nothing in between; or its handoffs with several      quiet, at most `OUT_MAX_S`
    a handoff fails between two that may well work with others          the pair is cut: not used until a probe passes
    it is slower than the median of its pool                            weighted; ejected when `SLOW_TIMES` as slow for `SLOW_FOR_S`

A cut pair is probed after `CUT_S` and then each `CUT_S`, by a request of the router's own over that very pair; one that failed again soon
after its probe is left alone for longer each time, so that a link that comes and goes costs few replays. An engine that comes back is on
probation: one fault is enough. A slow engine keeps its weight when it comes back, and with it little work, until new measurements say
otherwise; where it gets no work at all, the weight is halved now and then, or nobody would ever learn that it is well again.

All that is suspicion, and it must never do more harm than the sickness. No measure takes the last engine of a role out of a pool, nor the
last pair; what becomes the last one because others died is used again at once. Only as much as `SLOW_SHARE` of a role is ejected for
being slow. What the content of a request causes (a 4xx) is nobody's fault and is never told here. An engine that is another process or
has another role than before starts anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median_low
from typing import NamedTuple

import msgspec

from disagg.model import ClusterView, EngineId, EngineState, EngineView, Pool, Role

FAULTS_OUT = 3
FAULTS_WITHIN_S = 10.0
OUT_S = 5.0
OUT_MAX_S = 60.0
QUIET_S = 60.0
"""After so long without trouble an engine or pair is trusted by one doubling more."""
PROBATION_S = 10.0
CUT_S = 5.0
PROBE_LOST_S = 15.0
SLOW_TIMES = 3.0
SLOW_FOR_S = 10.0
SLOW_SHARE = 1 / 3
SLOW_SAMPLES = 5
WEIGHT_MAX = 10.0
WEIGHT_NOISE = 1.5
"""Engines this much slower than the median are as good as the others."""
UNIT_NOISE_S = 0.003
"""Decode engines whose steps do not take longer by more than this are as good as the others: it may be this machine that was busy."""
WHOLE_NOISE_S = 0.02
"""The same of prefill engines, for a whole prompt."""
WEIGHT_STEP = 1.25
STALE_S = 10.0
HISTORY_LIMIT = 256

Pair = tuple[EngineId, EngineId]


# --- events and commands


class ViewChanged(msgspec.Struct, frozen=True):
    """The engines as they would be without the measures of this machine."""

    view: ClusterView


class Faulted(msgspec.Struct, frozen=True):
    """An engine's connection failed or brought garbage: the engine's own fault. `what`: a few words."""

    engine: EngineId
    what: str


class PairFaulted(msgspec.Struct, frozen=True):
    """A handoff failed, or no first token came in time: the fault of either, or of the link between them."""

    prefill: EngineId
    decode: EngineId
    what: str


class HandedOver(msgspec.Struct, frozen=True, gc=False):
    """The first token came: prefill and the handoff work. `prefill`: None where a unified engine did both."""

    prefill: EngineId | None
    decode: EngineId


class Served(msgspec.Struct, frozen=True, gc=False):
    """An engine came to the end of an answer."""

    engine: EngineId


class Measure(NamedTuple):
    """How fast an engine is.

    Attributes:
        unit_s: seconds per unit of its role's work.
        samples: how many that were since it started.
        whole_s: seconds until such work is done, where small pieces of it cost nearly as much as large ones: an engine is slower than
            others only if that is longer, too. One that has little to do reads fewer bytes at a time, and so takes longer for each.
    """

    unit_s: float
    samples: int
    whole_s: float | None = None


class Paced(msgspec.Struct, frozen=True):
    """What was measured, by engine."""

    measures: Mapping[EngineId, Measure]


class Probed(msgspec.Struct, frozen=True):
    """What `ProbePair` brought; `what` says why it failed."""

    prefill: EngineId
    decode: EngineId
    passed: bool
    what: str = ""


class Tick(msgspec.Struct, frozen=True, gc=False):
    """A deadline may have passed."""


class ProbePair(msgspec.Struct, frozen=True):
    """Have this very pair answer a request of the router's own; tell with `Probed`."""

    prefill: EngineId
    decode: EngineId


class Changed(msgspec.Struct, frozen=True):
    """Other engines or pairs are out than before, or with another weight.

    Attributes:
        sentence: for the log.
        reason: faults, handoffs, slow, or cut where something was taken out; empty where something came back.
    """

    sentence: str
    reason: str = ""


Event = ViewChanged | Faulted | PairFaulted | HandedOver | Served | Paced | Probed | Tick
Command = ProbePair | Changed


class _Engine:
    """What is known of one engine."""

    __slots__ = (
        "back_at",
        "faults",
        "fresh_at",
        "handoffs",
        "out_for_s",
        "out_until",
        "process",
        "samples",
        "slow_samples",
        "slow_since",
        "stale",
        "turns",
        "weight",
        "why",
    )

    def __init__(self, process: tuple[int, Role]) -> None:
        self.process = process
        self.faults: deque[float] = deque(maxlen=FAULTS_OUT)
        self.handoffs: deque[tuple[float, EngineId]] = deque(maxlen=64)
        self.out_until: float | None = None
        self.out_for_s = 0.0
        self.why = ""
        self.turns = 0
        self.back_at = float("-inf")
        self.weight = 1.0
        self.samples = 0
        self.fresh_at = float("-inf")
        self.stale = False
        self.slow_since: float | None = None
        self.slow_samples = 0

    def well(self) -> None:
        self.faults.clear()
        self.handoffs.clear()


class _Cut:
    """A pair that is not used."""

    __slots__ = ("hold_s", "probing_since", "until", "why")

    def __init__(self, until: float, hold_s: float, why: str) -> None:
        self.until = until
        self.hold_s = hold_s
        self.why = why
        self.probing_since: float | None = None


class Ejector:
    """The machine. Times are seconds on the caller's monotonic clock.

    Attributes:
        history: what happened, oldest first: time and sentence.
        is_calm: no fault is remembered, so that nobody need be told that something went well.
    """

    def __init__(self) -> None:
        self.is_calm = True
        self._engines: dict[EngineId, _Engine] = {}
        self._cuts: dict[Pair, _Cut] = {}
        self._healed: dict[Pair, tuple[int, float]] = {}  # how often it was cut in a row, and when it came back
        self._pools: tuple[Pool, ...] = ()
        self.history: list[tuple[float, str]] = []

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it. Engines that are not there are nobody's concern."""
        match event:
            case HandedOver() | Served():
                return self._went_well(event)  # once or twice for each request: nothing to note
            case Faulted(engine=engine, what=what):
                commands = self._faulted(engine, what, now)
            case PairFaulted(prefill=prefill, decode=decode, what=what):
                commands = self._pair_faulted((prefill, decode), what, now)
            case Paced(measures=measures):
                commands = self._paced(measures, now)
            case Probed():
                commands = self._probed(event, now)
            case ViewChanged(view=view):
                commands = self._look(view, now)
            case Tick():
                commands = self._tick(now)
        self.history += [(now, command.sentence) for command in commands if isinstance(command, Changed)]
        del self.history[:-HISTORY_LIMIT]
        return commands

    def next_deadline(self) -> float | None:
        """When it wants a `Tick`; None while nobody is out."""
        if not self._cuts and not any(e.out_until is not None for e in self._engines.values()):
            return None
        ends = [e.out_until for e in self._engines.values() if e.out_until is not None]
        return min([*ends, *(_due(cut) for cut in self._cuts.values())])

    @property
    def ejected(self) -> Mapping[EngineId, str]:
        """Who gets no new work, with the reason."""
        return {name: _sentence(e.out_for_s, e.why) for name, e in self._engines.items() if e.out_until is not None}

    @property
    def cut(self) -> Mapping[Pair, str]:
        """Which pairs are not used, with the reason."""
        return {pair: f"until a probe passes: {cut.why}" for pair, cut in self._cuts.items()}

    @property
    def weights(self) -> Mapping[EngineId, float]:
        """How much slower than the median of their pool engines are, where they are."""
        return {name: e.weight for name, e in self._engines.items() if e.weight > 1.0}

    def check(self) -> None:
        """Asserts what is always true."""
        assert all(1.0 <= e.weight <= WEIGHT_MAX for e in self._engines.values())
        assert not self.is_calm or not any(e.faults or e.handoffs for e in self._engines.values())
        assert all(p in self._engines and d in self._engines for p, d in self._cuts)
        assert all(e.out_for_s <= OUT_MAX_S for e in self._engines.values())
        for pool in self._pools:
            assert all(not role or not all(self._is_out(e.id) for e in role) for role in _needed(pool)), "a whole role is out"
            assert self._serves(pool) or not pool.can_serve, "no pair is left of those that could serve"

    def __repr__(self) -> str:
        return f"<Ejector engines={len(self._engines)} ejected={len(self.ejected)} cut={len(self._cuts)} weighted={len(self.weights)}>"

    # --- moves

    def _look(self, view: ClusterView, now: float) -> list[Command]:
        there = {e.id: e for e in view.engines}
        gone = [name for name, engine in self._engines.items() if _is_another(engine, there.get(name))]
        for name in gone:
            del self._engines[name]
        for pair in [pair for pair in self._cuts if pair[0] in gone or pair[1] in gone]:
            del self._cuts[pair]
        for pair in [pair for pair in self._healed if pair[0] in gone or pair[1] in gone]:
            del self._healed[pair]
        self._pools = tuple(view.pools.values())
        for pool in self._pools:
            for engine in (*pool.prefill, *pool.decode, *pool.unified):
                if engine.id not in self._engines:
                    self._engines[engine.id] = _Engine(_process(engine))
        return [Changed(f"{name} is gone, or not what it was: nothing is held against it any more") for name in gone] + self._uphold(now)

    def _went_well(self, event: HandedOver | Served) -> list[Command]:
        if isinstance(event, Served):
            well = self._engines.get(event.engine)
        else:
            well = None if event.prefill is None else self._engines.get(event.prefill)
            decode = self._engines.get(event.decode)
            if decode is not None:
                decode.handoffs.clear()  # its connection may break yet
        if well is not None:
            well.well()
        self.is_calm = not any(e.faults or e.handoffs for e in self._engines.values())
        return []

    def _faulted(self, name: EngineId, what: str, now: float) -> list[Command]:
        engine = self._engines.get(name)
        if engine is None or engine.out_until is not None:
            return []
        engine.faults.append(now)
        self.is_calm = False
        recent = sum(at > now - FAULTS_WITHIN_S for at in engine.faults)
        if now < engine.back_at + PROBATION_S:
            return self._eject(name, "faults", f"it failed again as soon as it was back: {what}", now)
        if recent < FAULTS_OUT:
            return []
        return self._eject(name, "faults", f"{recent} transport faults in {FAULTS_WITHIN_S:g} s, the last one: {what}", now)

    def _pair_faulted(self, pair: Pair, what: str, now: float) -> list[Command]:
        if pair[0] not in self._engines or pair[1] not in self._engines:
            return []
        for name, partner in (pair, pair[::-1]):
            self._engines[name].handoffs.append((now, partner))
            self.is_calm = False
        commands = [c for name in pair for c in self._eject_for_handoffs(name, what, now)]
        if pair in self._cuts or self._is_out(pair[0]) or self._is_out(pair[1]):
            return commands
        return [*commands, *self._cut(pair, what, now)]

    def _eject_for_handoffs(self, name: EngineId, what: str, now: float) -> list[Command]:
        """With one partner it may be the link or the partner; with several, and none that works, it is this engine."""
        recent = [partner for at, partner in self._engines[name].handoffs if at > now - FAULTS_WITHIN_S]
        partners = len(set(recent))
        if self._is_out(name) or len(recent) < FAULTS_OUT or partners < 2:
            return []
        why = f"{len(recent)} handoffs with {partners} others failed in {FAULTS_WITHIN_S:g} s, the last one: {what}"
        return self._eject(name, "handoffs", why, now)

    def _eject(self, name: EngineId, reason: str, why: str, now: float) -> list[Command]:
        engine = self._engines[name]
        engine.out_until = now  # tried out: it must leave enough behind
        if not all(self._stands(pool) for pool in self._pools):
            engine.out_until = None
            return []
        quiet = int(max(0.0, now - engine.back_at) // QUIET_S) if engine.turns else 0
        engine.turns = max(0, engine.turns - quiet)
        engine.out_for_s = min(OUT_MAX_S, OUT_S * 2.0**engine.turns)
        engine.out_until = now + engine.out_for_s
        engine.turns = min(engine.turns + 1, 8)
        engine.why = why
        engine.slow_since = None
        engine.well()
        for pair in [pair for pair in self._cuts if name in pair]:
            del self._cuts[pair]
        return [Changed(f"{name} {_sentence(engine.out_for_s, why)}", reason)]

    def _cut(self, pair: Pair, what: str, now: float) -> list[Command]:
        turns, back_at = self._healed.get(pair, (0, float("-inf")))
        turns = max(0, turns - int(max(0.0, now - back_at) // QUIET_S)) if turns else 0
        hold_s = min(OUT_MAX_S, CUT_S * 2.0**turns)
        self._cuts[pair] = _Cut(now + hold_s, hold_s, what)
        if not all(self._stands(pool) for pool in self._pools):
            del self._cuts[pair]
            return []
        self._healed[pair] = (min(turns + 1, 8), now + hold_s)
        return [Changed(f"{pair[0]} is not paired with {pair[1]} for {hold_s:g} s, and then until a probe passes: {what}", "cut")]

    def _probed(self, probed: Probed, now: float) -> list[Command]:
        pair = (probed.prefill, probed.decode)
        cut = self._cuts.get(pair)
        if cut is None or cut.probing_since is None:
            return []
        if probed.passed:
            del self._cuts[pair]
            self._healed[pair] = (self._healed[pair][0], now)
            return [Changed(f"{pair[0]} is paired with {pair[1]} again: a probe passed")]
        cut.until = max(now, cut.probing_since + CUT_S)
        cut.probing_since = None
        if probed.what in {"", cut.why}:
            return []
        cut.why = probed.what
        return [Changed(f"{pair[0]} is still not paired with {pair[1]}: {cut.why}")]

    def _tick(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for name, engine in self._engines.items():
            if engine.out_until is not None and now >= engine.out_until:
                self._bring_back(engine, now)
                commands.append(Changed(f"{name} gets work again, on probation: {engine.out_for_s:g} s are over"))
        for (prefill, decode), cut in self._cuts.items():
            if now < _due(cut):
                continue
            cut.probing_since = now  # again where nobody has said what the last one brought
            commands.append(ProbePair(prefill, decode))
        return commands

    def _bring_back(self, engine: _Engine, now: float) -> None:
        engine.out_until = None
        engine.back_at = engine.fresh_at = now
        engine.well()

    # --- slowness

    def _paced(self, measures: Mapping[EngineId, Measure], now: float) -> list[Command]:
        for name, measure in measures.items():
            engine = self._engines.get(name)
            if engine is not None and measure.samples != engine.samples:
                engine.samples, engine.fresh_at, engine.stale = measure.samples, now, False
        return [c for pool in self._pools for role in _roles(pool) for c in self._compare(role, measures, now)]

    def _compare(self, role: tuple[EngineView, ...], measures: Mapping[EngineId, Measure], now: float) -> list[Command]:
        known = {e.id: measures[e.id] for e in role if e.id in measures and measures[e.id].unit_s > 0.0 and not self._is_out(e.id)}
        if len(known) < 2:
            return []
        slower = _slower(known)
        commands: list[Command] = []
        for name, times in slower.items():
            commands += self._weigh(name, times, now)
        for name, times in slower.items():
            engine = self._engines[name]
            if engine.slow_since is not None and now - engine.slow_since >= SLOW_FOR_S and self._may_be_too_slow(engine, role):
                commands += self._eject(
                    name, "slow", f"it is {times:.1f} times as slow as the median of its pool for {SLOW_FOR_S:g} s", now
                )
        return commands

    def _may_be_too_slow(self, engine: _Engine, role: tuple[EngineView, ...]) -> bool:
        out = sum(self._is_out(e.id) for e in role)
        return engine.samples - engine.slow_samples >= SLOW_SAMPLES and out + 1 <= len(role) * SLOW_SHARE

    def _weigh(self, name: EngineId, times: float, now: float) -> list[Command]:
        engine = self._engines[name]
        if now - engine.fresh_at >= STALE_S:
            engine.stale, engine.fresh_at = True, now
            return self._weighted(name, max(1.0, engine.weight / 2.0))
        if engine.stale:
            return []
        if times <= SLOW_TIMES:
            engine.slow_since = None
        elif engine.slow_since is None:
            engine.slow_since, engine.slow_samples = now, engine.samples
        return self._weighted(name, 1.0 if times < WEIGHT_NOISE else min(WEIGHT_MAX, times))

    def _weighted(self, name: EngineId, weight: float) -> list[Command]:
        """A change that is small changes nothing, or each second would bring a new view."""
        was = self._engines[name].weight
        if weight == was or (1.0 < weight < was * WEIGHT_STEP and was < weight * WEIGHT_STEP):
            return []
        self._engines[name].weight = weight
        return [Changed(f"a request on {name} counts as {weight:.1f}, by the time that its steps take")]

    # --- what must be left

    def _is_out(self, name: EngineId) -> bool:
        engine = self._engines.get(name)
        return engine is not None and engine.out_until is not None

    def _stands(self, pool: Pool) -> bool:
        """Each role that is needed has an engine, and requests can be served, as far as they could be without any measure."""
        return all(not role or not all(self._is_out(e.id) for e in role) for role in _needed(pool)) and (
            self._serves(pool) or not pool.can_serve
        )

    def _serves(self, pool: Pool) -> bool:
        if any(not self._is_out(e.id) for e in pool.unified) and not pool.can_pair:
            return True
        return any(not self._is_out(p) and not self._is_out(d) and (p, d) not in self._cuts for p, d in _pairs(pool))

    def _uphold(self, now: float) -> list[Command]:
        """Engines went, and what is out may be all that is left: what would be back first is back now."""
        commands: list[Command] = []
        for pool in self._pools:
            while not self._stands(pool):
                commands.append(self._release(pool, now))
        return commands

    def _release(self, pool: Pool, now: float) -> Command:
        members = [e.id for role in _needed(pool) if role and all(self._is_out(e.id) for e in role) for e in role]
        members = members or [e.id for role in _roles(pool) for e in role if self._is_out(e.id)]
        cuts = [pair for pair in _pairs(pool) if pair in self._cuts]
        if cuts and not any(all(self._is_out(e.id) for e in role) for role in _needed(pool) if role):
            pair = min(cuts, key=lambda pair: self._cuts[pair].until)
            del self._cuts[pair]
            return Changed(f"{pair[0]} is paired with {pair[1]} again: no other pair is left")
        name = min(members, key=lambda name: self._engines[name].out_until or 0.0)
        self._bring_back(self._engines[name], now)
        return Changed(f"{name} gets work again: no other is left")


def _slower(measures: Mapping[EngineId, Measure]) -> dict[EngineId, float]:
    """How many times as slow as the median each of them is; where the whole is known of all, whichever says less."""
    units = {name: m.unit_s for name, m in measures.items()}
    wholes = {name: m.whole_s for name, m in measures.items() if m.whole_s}
    if len(wholes) < len(measures):
        return _times(units, UNIT_NOISE_S)
    by_unit, by_whole = _times(units, 0.0), _times(wholes, WHOLE_NOISE_S)
    return {name: min(by_unit[name], by_whole[name]) for name in measures}


def _times(seconds: Mapping[EngineId, float], noise_s: float) -> dict[EngineId, float]:
    median_s = median_low(seconds.values())
    return {name: s / median_s if s - median_s > noise_s else 1.0 for name, s in seconds.items()}


def _sentence(out_for_s: float, why: str) -> str:
    return f"gets no new work for {out_for_s:g} s: {why}"


def _due(cut: _Cut) -> float:
    return cut.until if cut.probing_since is None else cut.probing_since + PROBE_LOST_S


def _needed(pool: Pool) -> tuple[tuple[EngineView, ...], ...]:
    """The roles that must not be empty: unified engines can all be spared where pairs serve."""
    return (pool.prefill, pool.decode) if pool.can_pair else _roles(pool)


def _roles(pool: Pool) -> tuple[tuple[EngineView, ...], ...]:
    return pool.prefill, pool.decode, pool.unified


def _pairs(pool: Pool) -> Iterator[Pair]:
    for part in pool.islands or (pool,):
        yield from ((p.id, d.id) for p in part.prefill for d in part.decode)


def _process(engine: EngineView) -> tuple[int, Role]:
    return engine.address.pid, engine.address.role


_ANEW = frozenset({EngineState.DEAD, EngineState.HELD, EngineState.STARTING})


def _is_another(engine: _Engine, view: EngineView | None) -> bool:
    """Who was away begins anew, too: what failed then was judged by the detector."""
    return view is None or _process(view) != engine.process or view.state in _ANEW
