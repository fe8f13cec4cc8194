"""Sick engines in a small town on a virtual clock: the pure parts of the router together, with and without the defence.

Requests come at a steady pace and go where `choose` says; handoffs over a link that is cut are lost until their deadline, and replayed on
other engines as the router does it. Rows F13, F14 and F15 of the failure catalogue, each with its bound.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import msgspec

from disagg.errors import NoCapacityError
from disagg.handoff import Limits
from disagg.model import Choice, ClusterView, EngineAddress, EngineFacts, EngineId, EngineState, EngineView, Role
from disagg.policy.eject import (
    Command,
    Ejector,
    Event,
    HandedOver,
    Measure,
    Paced,
    PairFaulted,
    Probed,
    ProbePair,
    Served,
    Tick,
    ViewChanged,
)
from disagg.policy.pace import Pace
from disagg.policy.route import InFlight, choose

ARRIVALS_S = 0.025
READ_S = 0.1
STEP_S = 0.01
TOKENS = 20
PROMPT_BYTES = 4000
PROBE_S = 0.2
PROBE_LIMIT_S = 4.0
BEAT_S = 0.1
Pair = tuple[EngineId, EngineId]


class Absent(Ejector):
    """The defence is off: it sees nothing and does nothing."""

    def handle(self, event: Event, *, now: float) -> list[Command]:
        return []


class Sent(msgspec.Struct, frozen=True):
    """One attempt."""

    at: float
    pair: Pair
    attempt: int


class Town:
    """A router's decisions over engines that are numbers.

    Args:
        ejector: the defence.
        is_up: whether a link works at a time.
        slowness: how many times as slow as others an engine is at a time.
        fails_after_s: when a handoff over a link that is down fails; later than any deadline where the packets just vanish.
    """

    def __init__(
        self,
        ejector: Ejector,
        *,
        prefill: int = 2,
        decode: int = 2,
        is_up: Callable[[Pair, float], bool] = lambda _pair, _now: True,
        slowness: Callable[[EngineId, float], float] = lambda _engine, _now: 1.0,
        fails_after_s: float = 1000.0,
    ) -> None:
        roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
        self.engines = [_engine(role, slot) for slot, role in enumerate(roles)]
        self.ejector = ejector
        self.is_up = is_up
        self.slowness = slowness
        self.fails_after_s = fails_after_s
        self.in_flight = InFlight()
        self.in_flight.grow(len(roles))
        self.pace = Pace(Limits(), 600.0)
        self.pace.grow(len(roles))
        self.now = 0.0
        self.sent: list[Sent] = []
        self.first_tokens: list[tuple[float, float]] = []
        self.lost = 0
        self._next: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.view = ClusterView.of(self.engines)
        self._feed(ViewChanged(self.view))

    def run(self, seconds: float) -> None:
        self._at(0.0, lambda: self._arrive(seconds))
        self._at(0.0, lambda: self._beat(seconds))
        while self._next:
            self.now, _, what = heapq.heappop(self._next)
            what()

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._next, (when, next(self._numbers), what))

    def _feed(self, event: Event) -> None:
        commands = self.ejector.handle(event, now=self.now)
        self.ejector.check()
        for command in commands:
            if isinstance(command, ProbePair):
                self._probe(command)
        if commands:
            self.view = ClusterView.of(self.engines, ejected=self.ejector.ejected, cut=self.ejector.cut, weights=self.ejector.weights)

    def _probe(self, asked: ProbePair) -> None:
        passes = self.is_up((asked.prefill, asked.decode), self.now)
        self._at(
            self.now + (PROBE_S if passes else PROBE_LIMIT_S), lambda: self._feed(Probed(asked.prefill, asked.decode, passes, "no answer"))
        )

    def _beat(self, until: float) -> None:
        due = self.ejector.next_deadline()
        if due is not None and self.now >= due:
            self._feed(Tick())
        if round(self.now / BEAT_S) % 10 == 0:
            self._feed(Paced({e.id: m for e in self.engines if (m := self._measure(e)) is not None}))
        if self.now < until:
            self._at(self.now + BEAT_S, lambda: self._beat(until))

    def _measure(self, engine: EngineView) -> Measure | None:
        reads = engine.address.role is Role.PREFILL
        measured = (self.pace.byte_s if reads else self.pace.step_s)(engine.slot)
        if measured is None:
            return None
        whole_s = self.pace.first_token_mean_s(engine.slot) if reads else None
        return Measure(measured, self.pace.samples(engine.slot)[0 if reads else 1], whole_s)

    def _arrive(self, until: float) -> None:
        self._send(self.now, 1, [])
        if self.now < until:
            self._at(self.now + ARRIVALS_S, lambda: self._arrive(until))

    def _send(self, arrived: float, attempt: int, tried: list[EngineId]) -> None:
        try:
            choice = choose(self.view.pools["m"], self.in_flight, exclude=tried)
        except NoCapacityError:
            self.lost += 1
            return
        prefill, decode = _both(choice)
        pair = (prefill.id, decode.id)
        self.sent.append(Sent(self.now, pair, attempt))
        limit = self.pace.limits(prefill.slot, decode.slot, PROMPT_BYTES).first_token_s
        work = self.pace.sent(prefill.slot, PROMPT_BYTES)
        for engine in (prefill, decode):
            self.in_flight.start(engine.slot)
        if self.is_up(pair, self.now):
            read_s = READ_S * self.slowness(prefill.id, self.now)
            sent_at = self.now
            self._at(self.now + read_s, lambda: self._first_token(choice, arrived, sent_at, work))
        else:
            self._at(self.now + min(limit, self.fails_after_s), lambda: self._too_late(choice, arrived, attempt, tried))

    def _first_token(self, choice: Choice, arrived: float, sent_at: float, work: int) -> None:
        prefill, decode = _both(choice)
        self.pace.first_token(prefill.slot, decode.slot, work, self.now - sent_at)
        self.pace.left(prefill.slot, PROMPT_BYTES)
        self.in_flight.end(prefill.slot)
        self.first_tokens.append((arrived, self.now - arrived))
        self._feed(HandedOver(prefill.id, decode.id))
        step_s = STEP_S * self.slowness(decode.id, self.now)
        self._at(self.now + TOKENS * step_s, lambda: self._done(decode, step_s))

    def _done(self, decode: EngineView, step_s: float) -> None:
        self.pace.token_gap(decode.slot, step_s, TOKENS, step_s)
        self.in_flight.end(decode.slot)
        self._feed(Served(decode.id))

    def _too_late(self, choice: Choice, arrived: float, attempt: int, tried: list[EngineId]) -> None:
        prefill, decode = _both(choice)
        for engine in (prefill, decode):
            self.in_flight.end(engine.slot)
        self.pace.left(prefill.slot, PROMPT_BYTES)
        self._feed(PairFaulted(prefill.id, decode.id, "no first token in time"))
        if attempt > 2:
            self.lost += 1
        else:
            self._send(arrived, attempt + 1, [*tried, prefill.id, decode.id])

    def share(self, pair: Pair, began: float, ended: float) -> float:
        """Of the attempts in a time, how many went to a pair."""
        these = [s for s in self.sent if began <= s.at < ended]
        return sum(s.pair == pair for s in these) / len(these)

    @property
    def replays(self) -> float:
        """Attempts that were not the first of their request, by all requests."""
        return sum(s.attempt > 1 for s in self.sent) / sum(s.attempt == 1 for s in self.sent)

    def slowest(self, began: float, ended: float) -> float:
        """The 99th percentile of the first tokens of requests that came in this time."""
        waits = sorted(wait for at, wait in self.first_tokens if began <= at < ended)
        return waits[int(len(waits) * 0.99)]


def _engine(role: Role, slot: int) -> EngineView:
    return EngineView(EngineAddress(EngineId(f"{role[0]}{slot}"), role, "h", 1, pid=1), slot, EngineState.READY, EngineFacts(model="m"))


def _both(choice: Choice) -> tuple[EngineView, EngineView]:
    assert choice.prefill is not None
    return choice.prefill, choice.decode


P0, D2 = EngineId("p0"), EngineId("d2")

# --- F13: only the link between one prefill and one decode engine is cut

CUT_AT, WELL_AT, END = 20.0, 50.0, 80.0
SICK: Pair = (P0, D2)


def cut_link(ejector: Ejector) -> Town:
    town = Town(ejector, decode=3, is_up=lambda pair, now: pair != SICK or not CUT_AT <= now < WELL_AT)
    town.run(END)
    return town


def test_a_cut_between_two_costs_one_deadline_and_heals() -> None:
    town = cut_link(Ejector())
    first = next(s.at for s in town.sent if s.pair == SICK and s.at >= CUT_AT)
    assert town.share(SICK, first + 5.1, WELL_AT) == 0.0, "within five seconds of the first handoff that fails"
    assert town.lost == 0
    healed = next(s.at for s in town.sent if s.pair == SICK and s.at >= WELL_AT)
    assert healed - WELL_AT <= 10.0
    assert town.share(SICK, CUT_AT - 10.0, CUT_AT) > 0.1, "it is used when it is well"


def test_without_the_defence_a_cut_pair_goes_on_to_fail() -> None:
    town = cut_link(Absent())
    assert town.share(SICK, CUT_AT + 10.0, WELL_AT) > 0.01


# --- F14: a link that comes and goes each second


def flapping(ejector: Ejector) -> Town:
    """It refuses at once, so it never looks busy: who fails fast draws the requests of all others."""
    town = Town(ejector, is_up=lambda pair, now: pair[0] != P0 or now < CUT_AT or int(now) % 2 == 0, fails_after_s=0.002)
    town.run(300.0)
    return town


def test_a_flapping_link_makes_no_storm_of_replays() -> None:
    town = flapping(Ejector())
    assert town.replays <= 0.02
    assert town.lost == 0


def test_without_the_defence_a_flapping_link_costs_replays_without_end() -> None:
    assert flapping(Absent()).replays > 0.2


# --- F15: a slow engine

SLOW_AT = 20.0


def slow(ejector: Ejector, sick: EngineId, times: float) -> Town:
    town = Town(ejector, prefill=4, decode=4, slowness=lambda engine, now: times if engine == sick and now >= SLOW_AT else 1.0)
    town.run(120.0)
    return town


def test_a_slow_engine_is_felt_for_ten_seconds() -> None:
    for times in (3.5, 10.0):
        town = slow(Ejector(), P0, times)
        assert town.slowest(SLOW_AT + 11.0, 120.0) <= 1.5 * town.slowest(0.0, SLOW_AT)
        assert any("times as slow as the median" in sentence for _, sentence in town.ejector.history)


def test_without_the_defence_a_slow_engine_is_felt_for_ever() -> None:
    town = slow(Absent(), P0, 10.0)
    assert town.slowest(SLOW_AT + 11.0, 120.0) > 1.5 * town.slowest(0.0, SLOW_AT)


def test_a_slow_decode_engine_gets_less_to_do() -> None:
    sick = EngineId("d4")
    well, ill = (slow(ejector, sick, 10.0) for ejector in (Ejector(), Absent()))
    shares = [sum(s.pair[1] == sick for s in town.sent if s.at > SLOW_AT + 11.0) / len(town.sent) for town in (well, ill)]
    assert shares[0] < shares[1] / 3
