"""Moves engines between the pools as the load wants it, and says why or why not: the hands of `disagg.policy.balance`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import msgspec
import structlog

from disagg.cluster.change import FINAL, Change, Phase
from disagg.errors import OrderError
from disagg.model import ClusterView, EngineId, Role
from disagg.policy.balance import Balance, Move, Pace, Situation, Verdict
from disagg.policy.books import Books
from disagg.policy.matching import by_hand, is_there, mover, situation_of

URGENT_S = 1.0
FAILURES_LIMIT = 6
LOST_S = 3.0
"""How long a pool may be without any engine before one is moved there: one that is started anew is mostly back by then."""
SAID_KEPT = 5
_NUMBERS = re.compile(r"[0-9][0-9.,e+-]*")


class Table(Protocol):
    """What the matcher needs of the controller."""

    @property
    def view(self) -> ClusterView:
        """The current view."""

    @property
    def changes(self) -> Mapping[int, Change]:
        """Those under way and the last ones that ended, by number."""

    def flip(self, engine: str, role: Role, cause: str) -> int:
        """Begins to move an engine; returns the number of the change. Raises OrderError."""


class Standing(msgspec.Struct, frozen=True):
    """How the pools of one model stand, for people.

    Attributes:
        model: the served name.
        flips: the setting.
        prefill, decode: engines that there are, those on their way included.
        wanted: that would be best.
        offered: engine-seconds per second of prefill and decode.
        pressures: what is offered, by what the engines may be loaded with.
        watched_s: for how long that was seen.
        reason: of the last decision, one sentence.
        decided_s_ago: when that was.
        history: what happened last, newest first: how many seconds ago, and what.
    """

    model: str
    flips: str
    prefill: int
    decode: int
    wanted: tuple[int, int]
    offered: tuple[float, float]
    pressures: tuple[float | None, float | None]
    watched_s: float
    reason: str
    decided_s_ago: float
    history: Sequence[tuple[float, str]]


class _Pools:
    """The pools of one model."""

    def __init__(self, pace: Pace, now: float) -> None:
        self.balance = Balance(pace)
        self.due_at = now
        self.alone_since: float | None = None
        self.situation: Situation | None = None
        self.verdict: Verdict | None = None
        self.decided_at = now
        self.said = ""
        self.number: int | None = None  # of the move under way
        self.flip_s = pace.flip_s
        self.began_at = now
        self.had: set[Role] = set()  # roles of which an engine was ready, ever
        self.moved: EngineId | None = None
        self.failures: dict[EngineId, tuple[int, float]] = {}  # how often a move failed, and until when it is not tried again


class Matcher:
    """One decision per model and interval.

    Args:
        table: the controller.
        books: what the router knows of its engines.
        flips: auto, advise or off.
        pace: how fast all of this goes.
        waiting: how many requests of a model wait for room.
    """

    def __init__(
        self,
        *,
        table: Table,
        books: Books,
        flips: str,
        pace: Pace,
        waiting: Callable[[str], int],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._table = table
        self._books = books
        self._flips = flips
        self._pace = pace
        self._waiting = waiting
        self._log = log
        self._pools: dict[str, _Pools] = {}
        self._now = 0.0

    # --- what happens

    def ordered(self, engine: EngineId) -> None:
        """A person moves this engine."""
        now = self._now
        for model, pools in self._pools.items():
            if any(e.id == engine and e.facts.model == model for e in self._table.view.engines):
                pools.balance.ordered(now=now)

    def stalled(self) -> None:
        """The router itself stood still: how long a pool has been without engines is not known."""
        for pools in self._pools.values():
            pools.alone_since = None

    def look(self, now: float) -> None:
        """Called at each beat."""
        self._now = now
        view = self._table.view
        models = {e.facts.model for e in view.engines if e.facts.model and e.address.role is not Role.UNIFIED}
        for model in sorted(models):
            pools = self._pools.get(model)
            if pools is None:
                pools = self._pools[model] = _Pools(self._pace, now)
            self._look_at(model, pools, now)

    def _look_at(self, model: str, pools: _Pools, now: float) -> None:
        self._look_at_move(pools, now)
        lost = self._lost(model, pools, now)
        urgent = lost is not None and now - pools.decided_at >= URGENT_S
        if now < pools.due_at and not urgent:
            return
        situation = pools.situation = self._situation(model, pools, lost, now)
        pools.due_at = now + self._pace.interval_s
        verdict = pools.balance.decide(situation, now=now)
        pools.decided_at, pools.verdict = now, verdict
        if verdict.move is not Move.STAY:
            verdict = self._carry_out(model, pools, verdict, now)
            pools.verdict = verdict
        self._say(model, pools, verdict)

    def _lost(self, model: str, pools: _Pools, now: float) -> Role | None:
        """The pool whose last engine was lost `LOST_S` ago, so that nothing can be served."""
        view, moving, ordered = self._table.view, self._moving(), self._busy()
        pool = view.pools.get(model)
        if pool is not None:
            pools.had |= {role for role, engines in ((Role.PREFILL, pool.prefill), (Role.DECODE, pool.decode)) if engines}
        missing = [role for role in sorted(pools.had) if not is_there(view, model, role, moving, ordered)]
        if not missing or (pool is not None and pool.can_serve):
            pools.alone_since = None
            return None
        if pools.alone_since is None:
            pools.alone_since = now
        return missing[0] if now - pools.alone_since >= LOST_S else None

    def _look_at_move(self, pools: _Pools, now: float) -> None:
        """Has the move ended?"""
        if pools.number is None:
            return
        change = self._table.changes.get(pools.number)
        if change is not None and change.phase not in FINAL:
            return
        done = change is not None and change.phase is Phase.DONE
        pools.number = None
        if pools.moved is not None and not done:
            failed = pools.failures.get(pools.moved, (0, 0.0))[0]
            pools.failures[pools.moved] = (failed + 1, now + self._pace.hand_s * 2 ** min(failed, FAILURES_LIMIT))
        pools.balance.ended(now=now, done=done)
        if done:
            pools.flip_s = now - pools.began_at

    def _situation(self, model: str, pools: _Pools, lost: Role | None, now: float) -> Situation:
        return situation_of(
            self._table.view,
            model,
            self._books,
            moving=self._moving(),
            waiting=self._waiting(model),
            flip_s=pools.flip_s,
            horizon_s=self._pace.horizon_s,
            now=now,
            lost=lost,
        )

    def _moving(self) -> dict[EngineId, Role]:
        """Engines on their way to another role, by whoever's order."""
        return {c.engine: c.role for c in self._table.changes.values() if c.phase not in FINAL and c.role is not c.was}

    def _busy(self) -> Collection[EngineId]:
        return {c.engine for c in self._table.changes.values() if c.phase not in FINAL}

    def _carry_out(self, model: str, pools: _Pools, verdict: Verdict, now: float) -> Verdict:
        """Begins the move; a verdict that says why not where that cannot be."""
        was, role = (Role.DECODE, Role.PREFILL) if verdict.move is Move.TO_PREFILL else (Role.PREFILL, Role.DECODE)
        if self._flips == "off":
            reason = f'[policy] flips is "off": {verdict.reason}'
            return msgspec.structs.replace(verdict, move=Move.STAY, reason=reason)
        shunned = {e for e, (_, until) in pools.failures.items() if now < until}
        engine = mover(self._table.view, model, was, self._books, busy={*self._busy(), *shunned}, now=now)
        if engine is None:
            why = f"but no {was} engine can be moved: {self._why_none(model, shunned)}"
            return msgspec.structs.replace(verdict, move=Move.STAY, reason=f"{verdict.reason}; {why}")
        if self._flips == "advise":
            reason = f'{engine.id} should become a {role} engine, but [policy] flips is "advise": {verdict.reason}'
            return msgspec.structs.replace(verdict, move=Move.STAY, reason=reason)
        try:
            pools.number = self._table.flip(engine.id, role, f"the load wants it: {verdict.reason}")
        except OrderError as error:
            return msgspec.structs.replace(verdict, move=Move.STAY, reason=f"{verdict.reason}; but {error}")
        pools.began_at, pools.moved = now, engine.id
        pools.balance.began(verdict, now=now)
        return msgspec.structs.replace(verdict, reason=f"{engine.id} becomes a {role} engine: {verdict.reason}")

    def _why_none(self, model: str, shunned: Collection[EngineId]) -> str:
        pool = self._table.view.pools.get(model)
        if pool is not None and pool.islands:
            return "not every prefill engine can hand over to every decode engine"
        if several := by_hand(self._table.view, model):
            return several
        if shunned:
            return f"the others were given by URL, are not ready or the last, and moving {', '.join(sorted(shunned))} has failed"
        return "they were given by URL or attached, are not ready, are being changed, or only one of them takes work"

    def _say(self, model: str, pools: _Pools, verdict: Verdict) -> None:
        """One log line for each decision that is another one than the last; numbers alone make none."""
        kind = f"{verdict.wanted} {_NUMBERS.sub('#', verdict.reason)}"
        if kind != pools.said or verdict.move is not Move.STAY:
            pools.said = kind
            self._log.info("ratio", model=model, move=verdict.move.value, wanted=verdict.wanted, reason=verdict.reason)

    # --- what people look at

    def standings(self) -> list[Standing]:
        """How the pools of each model stand."""
        return [self._standing(model, pools) for model, pools in sorted(self._pools.items())]

    def _standing(self, model: str, pools: _Pools) -> Standing:
        now, situation, verdict = self._now, pools.situation or Situation(0, 0, (0.0, 0.0)), pools.verdict
        pressures = situation.pressures(situation.prefill, situation.decode)
        known = [p if p != float("inf") else None for p in pressures]
        return Standing(
            model=model,
            flips=self._flips,
            prefill=situation.prefill,
            decode=situation.decode,
            wanted=verdict.wanted if verdict is not None else (situation.prefill, situation.decode),
            offered=situation.offered,
            pressures=(known[0], known[1]),
            watched_s=situation.watched_s,
            reason=verdict.reason if verdict is not None else "nothing was decided yet",
            decided_s_ago=now - pools.decided_at,
            history=[(now - at, what) for at, what in reversed(pools.balance.history[-SAID_KEPT:])],
        )

    def __repr__(self) -> str:
        return f"<Matcher {', '.join(f'{s.model} {s.prefill}P{s.decode}D wants {s.wanted}' for s in self.standings()) or 'nothing'}>"
