"""How many engines should read prompts and how many write answers, and whether to move one now. Pure.

Theory of operation. A fixed number of engines is shared between two pools. What is offered to each is measured in *engine-seconds per
second* (`Demand`): how many engines it would keep busy, as it will be when a move is done. The *pressure* of a pool is that, by its
engines, by what an engine may be loaded with (`RHO`): over 1, its queue is about to grow. The wanted ratio is the one whose greater
pressure is least; one engine at a time is moved towards it, and only when all of this holds:

1. the greater pressure drops by `GAIN` or more;
2. the pool that gives stays under `DONOR_LIMIT` with one engine less: else the next decision would take it back. But where the other pool
   has more than it can do already, what counts is the greater pressure (1);
3. the same was wanted `IN_A_ROW` times, one after the other: bursts of seconds are for routing and admission (Azure's code trace has peaks
   of 12.8 times its mean over 10 s), drifts of minutes are for flips;
4. the wait that it averts within `horizon_s` is more than it costs: the engine serves nobody while it drains and switches, and its prefix
   cache is gone. A decode engine has answers to finish, so that taking one must pay twice (`DECODE_TIMES`);
5. no move is under way, the last one was long enough ago (`cooldown_s`, or as long as it took: an engine that drains still works, so a
   long drain is no reason to wait for much longer), nobody moved one by hand lately, and the load was watched for long enough.

When prompts wait for twice as long as they may, or KV is nearly full while requests wait, and that has become worse since the last decision
and the one before, (3) is skipped. A burst that is over has stopped to make it worse. When both pools are over their limit no flip helps:
that is for admission. A pool that has lost its last engine gets one at once, whatever the rest says.

All times can be scaled by one factor, to see in a minute what takes an hour. (DistServe and Splitwise place engines once; NVIDIA Dynamo's
planner adds replicas every 180 s; its check of the pool that gives is where (2) comes from.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from statistics import median

import msgspec

from disagg.model import Role

RHO = {Role.PREFILL: 0.85, Role.DECODE: 0.9}
"""What an engine may be loaded with. Prompts differ more in length than steps do, and wait for one another."""
GAIN = 0.15
DONOR_LIMIT = 0.8
IN_A_ROW = 3
DECODE_TIMES = 2.0
WATCHED_TIMES = 2.0
"""The load is watched for so many windows before anything is moved: what is younger may be one burst."""
KV_LIMIT = 0.95
LATE_TIMES = 2.0
SPANS = 4
SPAN_SHARE = 0.625
PARTS = 5
"""A trend is looked for in so many spans of time, of this share of a window each; they move on by a part of one."""
HISTORY_LIMIT = 64


class Pace(msgspec.Struct, frozen=True):
    """How fast all of this happens, in seconds.

    Attributes:
        interval_s: between two decisions.
        window_s: over which demand is averaged: what is older than that weighs little.
        horizon_s: for so long what is measured now is expected to last.
        cooldown_s: between two moves.
        hand_s: a move that was ordered by hand is respected for so long.
        flip_s: what a move is expected to take before one was made.
    """

    interval_s: float = 10.0
    window_s: float = 120.0
    horizon_s: float = 300.0
    cooldown_s: float = 60.0
    hand_s: float = 900.0
    flip_s: float = 5.0

    def scaled(self, factor: float) -> Pace:
        """Everything that many times as fast."""
        return Pace(*(getattr(self, name) / factor for name in self.__struct_fields__))


class Demand:
    """What is offered to both pools, in engine-seconds per second: an exponentially weighted mean.

    Args:
        window_s: its time constant.
    """

    __slots__ = ("_at", "_began_at", "_parts", "_rates", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._parts: deque[list[float]] = deque(maxlen=SPANS * PARTS + 1)  # number of the part, then engine-seconds; the last is not over
        self._rates = [0.0, 0.0]
        self._at = -math.inf
        self._began_at = math.inf

    def arrived(self, prefill_s: float, decode_s: float, *, now: float) -> None:
        """A request came, which will keep a prefill and a decode engine busy for so long; its share of them, where they are shared."""
        self._began_at = now if self._began_at == math.inf else self._began_at
        self._fade(now)
        self._rates[0] += prefill_s / self._window_s
        self._rates[1] += decode_s / self._window_s
        number = now // self._part_s
        if not self._parts or self._parts[-1][0] < number:
            self._parts.append([number, 0.0, 0.0])
        self._parts[-1][1] += prefill_s
        self._parts[-1][2] += decode_s

    def offered(self, now: float) -> tuple[float, float]:
        """Engine-seconds per second of prefill and of decode; 0 before anything came. What is too young to be a mean is scaled up."""
        self._fade(now)
        known = 1.0 - math.exp(-max(0.0, now - self._began_at) / self._window_s) if self._began_at <= now else 0.0
        return (self._rates[0] / known, self._rates[1] / known) if known > 0.0 else (0.0, 0.0)

    @property
    def _part_s(self) -> float:
        return self._window_s * SPAN_SHARE / PARTS

    def trend(self, now: float) -> tuple[float, float]:
        """How fast that changes, engine-seconds per second, each second; 0 where it does not change steadily.

        The mean over each of the last `SPANS` spans is compared with the one before. Only if all of them rose, or all of them fell, there
        is a trend, and it is the middle one of these differences: a burst or a step makes one of them large, and a sine that is faster than
        all spans together turns between them.
        """
        newest = now // self._part_s - 1.0  # the last that is over
        if self._began_at > (newest + 1.0 - SPANS * PARTS) * self._part_s:
            return 0.0, 0.0
        sums = [[0.0, 0.0] for _ in range(SPANS)]
        for number, prefill_s, decode_s in self._parts:
            age = int((newest - number) // PARTS)
            if 0 <= age < SPANS and number <= newest:
                sums[age][0] += prefill_s
                sums[age][1] += decode_s
        span_s = self._part_s * PARTS
        p, d = (_steady([(new[i] - old[i]) / span_s**2 for new, old in pairwise(sums)]) for i in range(2))
        return p, d

    def expected(self, now: float, ahead_s: float) -> tuple[float, float]:
        """What will be offered so much later, if it goes on as it does: the mean is what was offered one window ago."""
        (p, d), (up, down) = self.offered(now), self.trend(now)
        return max(0.0, p + up * (self._window_s + ahead_s)), max(0.0, d + down * (self._window_s + ahead_s))

    def watched_s(self, now: float) -> float:
        """Since the first arrival."""
        return max(0.0, now - self._began_at)

    def _fade(self, now: float) -> None:
        if now > self._at:
            share = math.exp(-(now - self._at) / self._window_s) if self._at > -math.inf else 0.0
            self._rates = [rate * share for rate in self._rates]
            self._at = now


def _steady(differences: Sequence[float]) -> float:
    """The middle one of them if all have one direction, else 0."""
    return median(differences) if min(differences) > 0.0 or max(differences) < 0.0 else 0.0


class Situation(msgspec.Struct, frozen=True):
    """What a decision is made of.

    Attributes:
        prefill: engines that read prompts, those on their way there included.
        decode: engines that write answers, likewise.
        offered: engine-seconds per second of prefill and decode, as `Demand` says.
        watched_s: for how long that was watched.
        prompt_s: what a prompt keeps a prefill engine busy for, on average.
        late_s: how long a prompt that came now would wait in the prefill pool.
        late_limit_s: how long it may take to its first token.
        kv_share: of the decode pool's room, in KV or in requests, that is promised.
        waiting: requests that wait for room.
        flip_s: what the last move took, or is expected to.
        lost: the pool that had engines and has none any more, for a while, so that nothing can be served; None where there is no such.
        unknown: why too little is known, or can be done, to move any; empty where that is not so.
        lost_cache_s: prefill time that the prefix cache of the engine would save within a horizon.
    """

    prefill: int
    decode: int
    offered: tuple[float, float]
    watched_s: float = math.inf
    prompt_s: float = 0.0
    late_s: float = 0.0
    late_limit_s: float = math.inf
    kv_share: float = 0.0
    waiting: int = 0
    flip_s: float = 5.0
    lost_cache_s: float = 0.0
    lost: Role | None = None
    unknown: str = ""

    def pressures(self, prefill: int, decode: int) -> tuple[float, float]:
        """Of both pools, had they so many engines."""
        shares = zip(self.offered, (prefill, decode), RHO.values(), strict=True)
        p, d = (offered / (count * rho) if count else math.inf for offered, count, rho in shares)
        return p, d


class Move(StrEnum):
    """What to do."""

    STAY = "stay"
    TO_PREFILL = "to prefill"
    TO_DECODE = "to decode"


class Verdict(msgspec.Struct, frozen=True):
    """A decision.

    Attributes:
        move: one engine that way, or none.
        wanted: engines of each pool that would be best.
        reason: one sentence, also for what is not done.
    """

    move: Move
    wanted: tuple[int, int]
    reason: str


def wanted_ratio(situation: Situation) -> tuple[int, int]:
    """The engines of each pool for which the greater pressure is least; of equal ones the one that is nearest to what is there."""
    total = situation.prefill + situation.decode
    if total < 2:
        return situation.prefill, situation.decode

    def badness(prefill: int) -> tuple[float, int]:
        return max(situation.pressures(prefill, total - prefill)), abs(prefill - situation.prefill)

    prefill = min(range(1, total), key=badness)
    return prefill, total - prefill


def backlog_s(pressure: float, servers: int, work_s: float, horizon_s: float) -> float:
    """Engine-seconds of work that wait in a pool, on average over a horizon.

    Below its limit as in an M/G/1 queue for each engine, with work of one length; above it what comes in excess piles up.

    Args:
        pressure: of the pool.
        servers: its engines.
        work_s: one piece of work.
        horizon_s: over which the excess grows.
    """
    excess = max(0.0, pressure - 1.0) * servers * horizon_s / 2
    rho = min(pressure, 0.98)
    return servers * work_s * rho * rho / (2 * (1.0 - rho)) + excess


class Balance:
    """The state machine: one decision every `Pace.interval_s`.

    Args:
        pace: how fast it goes.

    Attributes:
        history: moves and when they were decided, oldest first.
    """

    __slots__ = ("_began_at", "_ended_at", "_hand_until", "_in_a_row", "_last", "_took_s", "_trouble", "_worse", "history", "pace")

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self._last = Move.STAY
        self._in_a_row = 0
        self._trouble = (0.0, 0.0)  # at the last decision: how late prompts were, how many waited for KV
        self._worse = [0, 0]  # for how many decisions it has become worse
        self._began_at: float | None = None  # of the move that is under way
        self._ended_at = -math.inf
        self._took_s = 0.0
        self._hand_until = -math.inf
        self.history: list[tuple[float, str]] = []

    # --- what happens

    def began(self, verdict: Verdict, *, now: float) -> None:
        """What was decided is being done."""
        self._began_at = now
        self._in_a_row = 0
        self._note(now, f"{verdict.move}: {verdict.reason}")

    def ended(self, *, now: float, done: bool) -> None:
        """It is over; `done` if the engine has its new role."""
        if self._began_at is None:
            return
        self._took_s = now - self._began_at
        self._began_at, self._ended_at = None, now
        self._in_a_row = 0
        self._note(now, f"a move {'was made' if done else 'failed'} in {self._took_s:.1f} s")

    def ordered(self, *, now: float) -> None:
        """Somebody moved an engine by hand: they may know something."""
        self._hand_until = now + self.pace.hand_s
        self._in_a_row = 0
        self._note(now, "an engine was moved by hand")

    # --- decisions

    def decide(self, situation: Situation, *, now: float) -> Verdict:
        """What to do now. To be asked once per interval; who follows it says `began` and `ended`."""
        self._look(situation)
        wanted = wanted_ratio(situation)
        return self._replace_the_last(situation, wanted, now) or self._weigh(situation, wanted, now)

    def _look(self, situation: Situation) -> None:
        """Is it getting worse?"""
        prefill = situation.late_s if situation.late_s > LATE_TIMES * situation.late_limit_s else 0.0
        decode = float(situation.waiting) if situation.kv_share > KV_LIMIT else 0.0
        for i, (now, last) in enumerate(zip((prefill, decode), self._trouble, strict=True)):
            self._worse[i] = self._worse[i] + 1 if now > last else 0
        self._trouble = (prefill, decode)

    def _replace_the_last(self, situation: Situation, wanted: tuple[int, int], now: float) -> Verdict | None:
        """Nothing can be served without one of each, unless a person wants it so."""
        if self._began_at is not None or situation.lost is None or now < self._hand_until:
            return None
        if situation.lost is Role.PREFILL and situation.decode > 1:
            return Verdict(Move.TO_PREFILL, wanted, "the last prefill engine is gone, and nothing can be served without one")
        if situation.lost is Role.DECODE and situation.prefill > 1:
            return Verdict(Move.TO_DECODE, wanted, "the last decode engine is gone, and nothing can be served without one")
        return None

    def _weigh(self, situation: Situation, wanted: tuple[int, int], now: float) -> Verdict:
        here = (situation.prefill, situation.decode)
        if sum(here) <= 2:
            least = "one engine of each is the least there can be" if min(here) else "there is no engine too many"
            return Verdict(Move.STAY, here, f"{least}: there is nothing to move")
        move = Move.TO_PREFILL if wanted[0] > here[0] else Move.TO_DECODE if wanted[0] < here[0] else Move.STAY
        self._in_a_row = self._in_a_row + 1 if move is self._last else 1
        self._last = move
        if move is Move.STAY:
            return Verdict(move, wanted, f"{here[0]} prefill and {here[1]} decode engines are the best there is: {_say(situation, here)}")
        step = 1 if move is Move.TO_PREFILL else -1
        then = (here[0] + step, here[1] - step)
        why_not = self._why_not(situation, move, then, now)
        if why_not:
            return Verdict(Move.STAY, wanted, f"{wanted[0]} and {wanted[1]} would be better, but {why_not}")
        return Verdict(move, wanted, f"{_say(situation, here)}; with {then[0]} and {then[1]} engines {_say(situation, then)}")

    def _why_not(self, situation: Situation, move: Move, then: tuple[int, int], now: float) -> str:
        """The first of the conditions that does not hold, one clause; empty when all hold."""
        before, after = situation.pressures(situation.prefill, situation.decode), situation.pressures(*then)
        giver = 1 if move is Move.TO_PREFILL else 0
        if min(then) < 1:
            return "the last engine of a pool is never taken"
        if min(before) > 1.0:
            return f"both pools have more than they can do ({_percent(before[0])} and {_percent(before[1])}): no move helps"
        gain = 1.0 - max(after) / max(before)
        if gain < GAIN:
            return f"the greater pressure would drop by {gain:.0%} only"
        if after[giver] >= DONOR_LIMIT and max(before) < 1.0:
            return f"the pool that gives one would be at {_percent(after[giver])}"
        if self._in_a_row < IN_A_ROW and self._worse[1 - giver] < IN_A_ROW - 1:
            return f"that was so {self._in_a_row} of {IN_A_ROW} times"
        return self._not_now(situation, now) or self._not_worth_it(situation, move, before, after, then)

    def _not_now(self, situation: Situation, now: float) -> str:
        if self._began_at is not None:
            return "a move is under way"
        if now < self._hand_until:
            return f"an engine was moved by hand, which is respected for {self._hand_until - now:.0f} s more"
        if situation.unknown:
            return situation.unknown
        unknown_s = WATCHED_TIMES * self.pace.window_s - situation.watched_s
        if unknown_s > 0:
            return f"the load was watched for {situation.watched_s:.0f} s only, and for {unknown_s:.0f} s more it may be anything"
        left_s = self._ended_at + max(self.pace.cooldown_s, self._took_s) - now
        return f"the last move was too short a time ago: {left_s:.0f} s more" if left_s > 0 else ""

    def _not_worth_it(
        self, situation: Situation, move: Move, before: tuple[float, float], after: tuple[float, float], then: tuple[int, int]
    ) -> str:
        horizon_s, work_s = self.pace.horizon_s, max(situation.prompt_s, 1e-3)
        here = (situation.prefill, situation.decode)
        waits = [sum(backlog_s(p, n, work_s, horizon_s) for p, n in zip(*pair, strict=True)) for pair in ((before, here), (after, then))]
        averted_s = waits[0] - waits[1]
        times = DECODE_TIMES if move is Move.TO_PREFILL else 1.0
        cost_s = times * (situation.flip_s + situation.lost_cache_s) / 2  # it waits until there is room for it: half a horizon, say
        if averted_s > cost_s:
            return ""
        return f"it would avert {max(0.0, averted_s):.1f} s of waiting work and cost {cost_s:.1f} s"

    def _note(self, now: float, sentence: str) -> None:
        self.history.append((now, sentence))
        del self.history[:-HISTORY_LIMIT]

    def check(self) -> None:
        """Asserts what is always true."""
        assert self._in_a_row >= 0
        assert len(self.history) <= HISTORY_LIMIT
        assert self._began_at is None or self._began_at > -math.inf

    def __repr__(self) -> str:
        return f"<Balance {self._last} {self._in_a_row} times, {'a move is under way' if self._began_at is not None else 'still'}>"


def _say(situation: Situation, engines: tuple[int, int]) -> str:
    pressures = situation.pressures(*engines)
    return f"prefill is at {_percent(pressures[0])} and decode at {_percent(pressures[1])}"


def _percent(pressure: float) -> str:
    return f"{pressure:.0%}" if math.isfinite(pressure) else "no engine"
