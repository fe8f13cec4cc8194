"""How many engines read and how many write: each condition of a move, and the whole in a fluid model of two pools."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from itertools import pairwise

import msgspec
import pytest

from disagg.model import Role
from disagg.policy.balance import (
    GAIN,
    HISTORY_LIMIT,
    IN_A_ROW,
    RHO,
    Balance,
    Demand,
    Move,
    Pace,
    Situation,
    Verdict,
    backlog_s,
    wanted_ratio,
)

SOME_MOVE = Verdict(Move.TO_PREFILL, (3, 1), "of what was decided")

HEAVY = Situation(2, 6, (2.5, 2.5), prompt_s=0.3)
"""Too few engines read: the best would be four and four."""


def decided(balance: Balance, situation: Situation, times: int = IN_A_ROW, *, at: float = 1000.0) -> Verdict:
    verdict = None
    for number in range(times):
        verdict = balance.decide(situation, now=at + number * balance.pace.interval_s)
        balance.check()
        if verdict.move is not Move.STAY:
            break
    assert verdict is not None
    return verdict


def but(situation: Situation, **other: object) -> Situation:
    return msgspec.structs.replace(situation, **other)


# --- the wanted ratio


@pytest.mark.parametrize(
    ("offered", "wanted"), [((3.4, 3.6), (4, 4)), ((6.0, 0.5), (7, 1)), ((0.0, 5.0), (1, 7)), ((0.0, 0.0), (3, 5)), ((1.0, 3.0), (2, 6))]
)
def test_the_wanted_ratio_is_the_one_whose_greater_pressure_is_least(offered: tuple[float, float], wanted: tuple[int, int]) -> None:
    situation = Situation(3, 5, offered)
    assert wanted_ratio(situation) == wanted
    greatest = max(situation.pressures(*wanted))
    assert all(max(situation.pressures(p, 8 - p)) >= greatest for p in range(1, 8))


@pytest.mark.parametrize("engines", [(0, 0), (1, 0), (0, 1)])
def test_one_engine_cannot_be_shared(engines: tuple[int, int]) -> None:
    assert wanted_ratio(Situation(*engines, (9.0, 9.0))) == engines
    assert decided(Balance(), Situation(*engines, (9.0, 9.0))).move is Move.STAY


# --- the conditions


def test_a_move_is_made_when_it_was_wanted_often_enough_and_says_why() -> None:
    balance = Balance()
    first = balance.decide(HEAVY, now=0.0)
    assert (first.move, first.wanted) == (Move.STAY, (4, 4))
    assert first.reason == "4 and 4 would be better, but that was so 1 of 3 times"
    last = decided(balance, HEAVY, IN_A_ROW - 1, at=10.0)
    assert last.move is Move.TO_PREFILL
    assert last.reason == "prefill is at 147% and decode at 46%; with 3 and 5 engines prefill is at 98% and decode at 56%"


def test_what_is_best_stays_and_says_so() -> None:
    verdict = decided(Balance(), but(HEAVY, prefill=4, decode=4))
    assert verdict == Verdict(
        Move.STAY, (4, 4), "4 prefill and 4 decode engines are the best there is: prefill is at 74% and decode at 69%"
    )


def test_a_small_gain_is_not_worth_a_move() -> None:
    verdict = decided(Balance(), Situation(4, 4, (3.0, 2.9), prompt_s=0.3))
    assert verdict.move is Move.STAY
    near = Situation(40, 40, (35.0, 28.0), prompt_s=0.3)
    assert near.pressures(40, 40)[0] > 1.0
    assert "would drop by" in decided(Balance(), near).reason


def test_a_pool_that_would_be_full_itself_gives_nothing() -> None:
    verdict = decided(Balance(), Situation(2, 6, (1.683, 3.726), prompt_s=0.3))
    assert verdict == Verdict(Move.STAY, (3, 5), "3 and 5 would be better, but the pool that gives one would be at 83%")


def test_the_last_engine_of_a_pool_is_never_taken() -> None:
    for offered in ((0.9, 0.0), (0.0, 0.9), (5.0, 0.0), (0.0, 5.0)):
        assert decided(Balance(), Situation(1, 1, offered, prompt_s=0.3), 10).move is Move.STAY


def test_when_both_pools_have_more_than_they_can_do_no_move_helps() -> None:
    verdict = decided(Balance(), Situation(2, 6, (6.0, 6.0), prompt_s=0.3))
    assert verdict.move is Move.STAY
    assert "both pools have more than they can do" in verdict.reason


def test_a_change_of_mind_begins_anew() -> None:
    balance = Balance()
    other = but(HEAVY, prefill=6, decode=2)
    for number in range(10):
        assert balance.decide(HEAVY if number % 2 else other, now=number * 10.0).move is Move.STAY


def test_who_waits_far_too_long_is_helped_at_once() -> None:
    full = but(HEAVY, prefill=6, decode=2, kv_share=0.96, waiting=1)
    late = but(HEAVY, late_s=2.1, late_limit_s=1.0)
    for situations, move in (
        ([late, but(late, late_s=2.5)], Move.TO_PREFILL),
        ([late, late], Move.STAY),  # it does not get worse
        ([but(late, late_s=1.5), but(late, late_s=1.9)], Move.STAY),
        ([full, but(full, waiting=2)], Move.TO_DECODE),
        ([full, full], Move.STAY),
        ([but(full, kv_share=0.9), but(full, kv_share=0.9, waiting=2)], Move.STAY),
    ):
        balance = Balance()
        assert decided(balance, situations[0], 1).move is Move.STAY, "once may be a burst"
        assert decided(balance, situations[1], 1).move is move


def test_one_move_at_a_time_and_not_soon_after_the_last() -> None:
    balance = Balance()
    balance.began(SOME_MOVE, now=900.0)
    assert "a move is under way" in decided(balance, HEAVY).reason
    balance.ended(now=1100.0, done=True)
    assert "the last move was too short a time ago: 170 s more" in decided(balance, HEAVY, at=1110.0).reason, "it took 200 s"
    assert decided(balance, HEAVY, at=1310.0).move is Move.TO_PREFILL


def test_a_quick_move_is_followed_by_the_ordinary_cooldown() -> None:
    balance = Balance()
    balance.began(SOME_MOVE, now=1000.0)
    balance.ended(now=1002.0, done=False)
    assert decided(balance, HEAVY, at=1012.0).move is Move.STAY
    assert decided(balance, HEAVY, at=1062.0).move is Move.TO_PREFILL
    assert balance.history[1] == (1002.0, "a move failed in 2.0 s")


def test_what_was_moved_by_hand_is_respected_for_a_while() -> None:
    balance = Balance()
    balance.ordered(now=990.0)
    assert "moved by hand, which is respected for 870 s more" in decided(balance, HEAVY).reason
    assert decided(balance, HEAVY, at=990.0 + balance.pace.hand_s).move is Move.TO_PREFILL


def test_an_expensive_move_is_not_made_for_little() -> None:
    some = Situation(3, 5, (2.2, 1.5), prompt_s=0.05)
    assert decided(Balance(), some).move is Move.STAY
    assert "it would avert" in decided(Balance(), some).reason
    assert decided(Balance(), but(some, offered=(2.7, 1.5))).move is Move.TO_PREFILL


def test_a_decode_engine_must_pay_twice() -> None:
    def most(prefill: int, decode: int, offered: tuple[float, float]) -> float:
        """The longest move that is still made."""
        made = [
            s / 10 for s in range(1, 3000) if decided(Balance(), Situation(prefill, decode, offered, flip_s=s / 10)).move is not Move.STAY
        ]
        return max(made)

    share = RHO[Role.DECODE] / RHO[Role.PREFILL]
    assert most(5, 3, (1.5 / share, 3.0)) == pytest.approx(2 * most(3, 5, (3.0 / share, 1.5)), rel=0.05)


@pytest.mark.parametrize(("engines", "move"), [((0, 3), Move.TO_PREFILL), ((3, 0), Move.TO_DECODE)])
def test_a_pool_that_lost_its_last_engine_gets_one_at_once(engines: tuple[int, int], move: Move) -> None:
    balance, lost = Balance(), Role.PREFILL if move is Move.TO_PREFILL else Role.DECODE
    balance.began(SOME_MOVE, now=999.0)
    balance.ended(now=999.5, done=True)
    assert balance.decide(Situation(*engines, (0.0, 0.0)), now=1000.0).move is Move.STAY, "it was not lost: perhaps it was never there"
    verdict = balance.decide(Situation(*engines, (0.0, 0.0), lost=lost), now=1000.0)
    assert verdict.move is move
    balance.began(verdict, now=1000.0)
    assert balance.decide(Situation(*engines, (0.0, 0.0), lost=lost), now=1010.0).move is Move.STAY, "one is on its way"


def test_who_moved_the_last_engine_away_by_hand_is_not_corrected() -> None:
    balance = Balance()
    balance.ordered(now=1000.0)
    situation = Situation(0, 3, (0.0, 0.0), lost=Role.PREFILL)
    assert balance.decide(situation, now=1010.0).move is Move.STAY
    assert balance.decide(situation, now=1001.0 + balance.pace.hand_s).move is Move.TO_PREFILL


def test_engines_are_not_moved_by_what_was_never_measured() -> None:
    balance = Balance()
    for number in range(20):
        verdict = balance.decide(Situation(2, 2, (3.0, 0.4), unknown="how long prompts take was not measured yet"), now=number * 10.0)
        assert verdict.move is Move.STAY
    assert "was not measured yet" in verdict.reason


# --- what is offered


def test_demand_is_the_mean_of_what_came() -> None:
    demand = Demand(60.0)
    for number in range(6000):
        demand.arrived(0.2, 0.3, now=number * 0.1)
    assert demand.offered(600.0) == pytest.approx((2.0, 3.0), rel=0.01)
    assert demand.offered(660.0) == pytest.approx((2.0 / math.e, 3.0 / math.e), rel=0.01)


def test_demand_is_right_from_the_first_seconds_on() -> None:
    demand = Demand(60.0)
    assert demand.offered(0.0) == (0.0, 0.0)
    for number in range(100):
        demand.arrived(0.2, 0.3, now=number * 0.1)
    assert demand.offered(10.0) == pytest.approx((2.0, 3.0), rel=0.02)


def test_a_clock_that_jumps_back_invents_no_demand() -> None:
    demand = Demand(60.0)
    for number in range(1000):
        demand.arrived(0.2, 0.3, now=number * 0.1)
    demand.arrived(0.2, 0.3, now=-5000.0)
    assert demand.offered(-5000.0) == (0.0, 0.0) or max(demand.offered(-5000.0)) < 5.0
    assert demand.offered(100.0) == pytest.approx((2.0, 3.0), rel=0.05)


def demanded(load: Callable[[float], float], until: float) -> Demand:
    """Ten arrivals a second, decode half as much as prefill."""
    demand = Demand(120.0)
    for number in range(int(until * 10)):
        at = number / 10
        demand.arrived(load(at) / 10, load(at) / 20, now=at)
    return demand


@pytest.mark.parametrize("slope", [0.004, -0.004, 0.0])
def test_what_changes_steadily_is_expected_to_go_on(slope: float) -> None:
    demand = demanded(lambda at: 4.0 + slope * at, 700.0)
    assert demand.trend(700.0) == pytest.approx((slope, slope / 2), rel=0.02, abs=1e-9)
    assert demand.offered(700.0)[0] == pytest.approx(4.0 + slope * 580, rel=0.02), "the mean is one window late"
    assert demand.expected(700.0, 60.0) == pytest.approx((4.0 + slope * 760, 2.0 + slope * 380), rel=0.02)


@pytest.mark.parametrize(
    "load",
    [
        lambda at: 4.0 if at < 600 else 7.0,
        lambda at: 20.0 if 640 <= at < 650 else 2.0,
        lambda at: 20.0 if at % 300 < 10 else 2.0,
        lambda at: 4.0 + 2.0 * math.sin(2 * math.pi * at / 300.0),
        lambda at: 4.0 + 2.0 * math.sin(2 * math.pi * at / 100.0),
    ],
    ids=["step", "burst", "bursts", "sine of 300 s", "sine of 100 s"],
)
def test_what_does_not_is_expected_to_be_as_it_was(load: Callable[[float], float]) -> None:
    for until in range(600, 1000, 17):
        demand = demanded(load, until)
        assert demand.trend(until) == pytest.approx((0.0, 0.0), abs=1e-3)


def test_nothing_is_expected_of_a_load_that_is_younger_than_a_trend() -> None:
    demand = demanded(lambda at: at / 100, 290.0)
    assert demand.trend(290.0) == (0.0, 0.0)
    assert demand.expected(290.0, 60.0) == demand.offered(290.0)


def test_what_falls_is_never_expected_to_be_less_than_nothing() -> None:
    assert demanded(lambda at: max(0.0, 4.0 - at / 150), 590.0).expected(590.0, 600.0) == (0.0, 0.0)


# --- all of it, in a fluid model


class Fluid:
    """Two pools that get so much work a second; what they cannot do waits."""

    def __init__(
        self, prefill: int, decode: int, *, drain_s: float = 20.0, seed: int = 1, flips: bool = True, pace: Pace | None = None
    ) -> None:
        self.balance = Balance(pace)
        self.engines = [prefill, decode]
        self.demand = Demand(self.balance.pace.window_s)
        self.waiting = [0.0, 0.0]
        self.drain_s = drain_s
        self.flips = flips
        self.moves: list[tuple[float, Move]] = []
        self.arrives_at = math.inf
        self.to = 0
        self.chance = random.Random(seed)
        self.now = 0.0
        self.served = 0.0

    def second(self, offered: tuple[float, float]) -> None:
        """Work comes in pieces of random size."""
        pieces = [[self.chance.expovariate(1.0) * mean for _ in range(20)] for mean in (offered[0] / 20, offered[1] / 20)]
        for p, d in zip(*pieces, strict=True):
            self.demand.arrived(p, d, now=self.now)
        for i in range(2):
            self.waiting[i] = max(0.0, self.waiting[i] + sum(pieces[i]) - self.engines[i])
        if self.now >= self.arrives_at:
            self.engines[self.to] += 1
            self.arrives_at = math.inf
            self.balance.ended(now=self.now, done=True)
        if self.flips and self.now % self.balance.pace.interval_s < 1.0:
            self.decide()
        self.now += 1.0

    def decide(self) -> None:
        coming = [int(self.arrives_at < math.inf and self.to == i) for i in range(2)]
        prefill, decode = (n + c for n, c in zip(self.engines, coming, strict=True))
        situation = Situation(
            prefill,
            decode,
            self.demand.expected(self.now, self.drain_s),
            self.demand.watched_s(self.now),
            prompt_s=0.3,
            late_s=self.waiting[0] / max(1, prefill),
            late_limit_s=5.0,
        )
        verdict = self.balance.decide(situation, now=self.now)
        self.balance.check()
        if verdict.move is Move.STAY:
            return
        self.to = 0 if verdict.move is Move.TO_PREFILL else 1
        self.engines[1 - self.to] -= 1
        assert min(prefill, decode) >= 1
        self.arrives_at = self.now + self.drain_s
        self.balance.began(SOME_MOVE, now=self.now)
        self.moves.append((self.now, verdict.move))

    def run(self, load: Callable[[float], tuple[float, float]], seconds: float) -> Fluid:
        until = self.now + seconds
        while self.now < until:
            self.second(load(self.now))
        return self


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("load", [(1.0, 1.0), (2.8, 2.9), (3.2, 3.3), (1.2, 4.4), (5.0, 5.0)])
def test_a_steady_load_moves_engines_to_where_they_belong_and_then_nothing(load: tuple[float, float], seed: int) -> None:
    fluid = Fluid(4, 4, seed=seed).run(lambda _: load, 1800.0)
    settled = len(fluid.moves)
    assert settled <= 3
    fluid.run(lambda _: load, 3600.0)
    assert len(fluid.moves) == settled


@pytest.mark.parametrize("seed", range(5))
def test_bursts_of_seconds_move_nothing(seed: int) -> None:
    """Ten seconds of 12.8 times the mean, every five minutes, as in Azure's code trace."""
    quiet = 2.0 / (1 + 11.8 * 10 / 300)

    def load(now: float) -> tuple[float, float]:
        return (quiet * (12.8 if 100 <= now % 300 < 110 else 1.0), 1.5)

    assert Fluid(4, 4, seed=seed).run(load, 3600.0).moves == []


@pytest.mark.parametrize("period_s", [20.0, 60.0, 120.0, 200.0, 300.0])
def test_a_sine_that_is_faster_than_a_move_can_follow_moves_nothing(period_s: float) -> None:
    def load(now: float) -> tuple[float, float]:
        swing = math.sin(2 * math.pi * now / period_s)
        return (2.6 + 1.2 * swing, 2.7 - 1.2 * swing)

    assert Fluid(4, 4).run(load, 3600.0).moves == []


@pytest.mark.parametrize("seed", range(5))
def test_a_step_leads_to_the_new_ratio_without_a_step_back(seed: int) -> None:
    def load(now: float) -> tuple[float, float]:
        return (1.2, 4.6) if now < 1200 else (4.6, 1.2)

    fluid = Fluid(2, 6, seed=seed).run(load, 4000.0)
    assert {move for at, move in fluid.moves if at >= 1200} == {Move.TO_PREFILL}
    assert not [move for at, move in fluid.moves if at < 1200]
    assert fluid.engines[0] in {5, 6}
    assert max(fluid.waiting) < 30.0


def swing(now: float) -> tuple[float, float]:
    """Prompt-heavy to answer-heavy and back within half an hour."""
    share = 0.5 + 0.36 * math.sin(2 * math.pi * now / 1800.0)
    return 5.6 * share, 5.6 * (1 - share)


def lost(fluid: Fluid) -> float:
    """How much work waited at the worst, seconds of one engine."""
    worst = 0.0
    for _ in range(3600):
        fluid.second(swing(fluid.now))
        worst = max(worst, *fluid.waiting)
    return worst


def test_a_slow_swing_is_followed_where_no_fixed_ratio_can_serve_it() -> None:
    fixed = [lost(Fluid(p, 8 - p, flips=False)) for p in range(2, 7)]
    moving = Fluid(4, 4)
    assert lost(moving) < 0.5 * min(fixed)
    directions = [move for _, move in moving.moves]
    turns = sum(a is not b for a, b in pairwise(directions))
    assert turns <= 4, "two swings: it turns with them, and not in between"


def test_a_factor_makes_everything_faster() -> None:
    pace = Pace().scaled(10.0)
    assert (pace.interval_s, pace.window_s, pace.cooldown_s, pace.flip_s) == (1.0, 12.0, 6.0, 0.5)
    fluid = Fluid(2, 6, pace=pace, drain_s=2.0).run(lambda now: (1.2, 4.6) if now < 120 else (4.6, 1.2), 400.0)
    assert fluid.engines[0] in {5, 6}


@pytest.mark.parametrize("pressure", [0.0, 0.5, 0.9, 0.99, 1.0, 1.5, 20.0])
def test_more_pressure_never_means_less_waiting(pressure: float) -> None:
    less = backlog_s(pressure, 4, 0.3, 300.0)
    assert 0.0 <= less <= backlog_s(pressure + 0.05, 4, 0.3, 300.0)


def events(chance: random.Random) -> Iterable[str]:
    return chance.choices(("decide", "began", "done", "failed", "hand"), (80, 5, 8, 2, 1), k=3000)


@pytest.mark.parametrize("seed", range(10))
def test_a_random_walk_never_empties_a_pool_and_never_moves_two_at_once(seed: int) -> None:
    chance = random.Random(seed)
    balance, now, engines, coming = Balance(), 0.0, [chance.randrange(1, 6), chance.randrange(1, 6)], None
    for event in events(chance):
        now += chance.expovariate(0.1)
        if event == "hand":
            balance.ordered(now=now)
        elif event in {"done", "failed"} and coming is not None:
            engines[coming if event == "done" else 1 - coming] += 1
            coming = None
            balance.ended(now=now, done=event == "done")
        elif event == "decide":
            there = [n + (i == coming) for i, n in enumerate(engines)]
            offered = (chance.uniform(0, 8), chance.uniform(0, 8))
            verdict = balance.decide(
                Situation(
                    there[0],
                    there[1],
                    offered,
                    chance.uniform(0, 1000),
                    chance.uniform(0, 2),
                    chance.uniform(0, 20),
                    5.0,
                    chance.random(),
                    chance.randrange(3),
                ),
                now=now,
            )
            assert verdict.reason
            assert sum(verdict.wanted) == sum(there)
            if verdict.move is not Move.STAY:
                assert coming is None
                coming = 0 if verdict.move is Move.TO_PREFILL else 1
                engines[1 - coming] -= 1
                assert engines[1 - coming] >= 1
                balance.began(SOME_MOVE, now=now)
        balance.check()
    assert 0 < len(balance.history) <= HISTORY_LIMIT
    assert GAIN > 0
