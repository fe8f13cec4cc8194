"""Who moves engines between the pools in virtual time: the live balance, and how what it decides is carried out. Pure.

An engine that is moved gets no new work, finishes what it has, is nobody's for as long as a switch takes, and comes back in its other role
with an empty cache. Which one it is, and how its pools stand, is said by `disagg.policy.matching`, as in life.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from disagg.model import ClusterView, EngineId, EngineState, Role
from disagg.plan.dispatch import MODEL, Dispatch
from disagg.policy.balance import Balance, Move, Situation, Verdict
from disagg.policy.matching import mover, situation_of


class Flip(msgspec.Struct, frozen=True):
    """An engine was moved.

    Attributes:
        at: when that was decided, seconds.
        engine: its slot.
        role: that it got.
        reason: one sentence.
        took_s: until it was back; NaN if the end came before.
    """

    at: float
    engine: int
    role: Role
    reason: str
    took_s: float


Plan = Callable[[float], int]
"""How many engines are to read prompts at a moment: for those who know the future."""


class Flips:
    """Decides and carries out.

    Args:
        dispatch: the router.
        switch_s: what a move is expected to take before there was one.
        balance: decides; None for a fixed ratio.
        plan: decides instead of it.

    Attributes:
        done: what was moved, in the order of the decisions.
    """

    def __init__(self, dispatch: Dispatch, switch_s: float, balance: Balance | None, plan: Plan | None = None) -> None:
        self._dispatch = dispatch
        self._balance = balance
        self._plan = plan
        self._under_way: dict[int, Flip] = {}
        self._took_s = switch_s
        self.done: list[Flip] = []
        self.verdict: Verdict | None = None

    @property
    def on(self) -> bool:
        """Whether anything can be moved."""
        return self._balance is not None or self._plan is not None

    @property
    def draining(self) -> list[int]:
        """Engines that have nothing left to do and can be switched now."""
        views, in_flight = self._dispatch.views, self._dispatch.books.in_flight.now
        return [slot for slot in self._under_way if views[slot].state is EngineState.DRAINING and not in_flight[slot]]

    def count(self, role: Role) -> int:
        """Engines of a role, those that are on their way to it included, and those that leave it not."""
        views = self._dispatch.views
        return sum((self._under_way[v.slot].role if v.slot in self._under_way else v.address.role) is role for v in views)

    def situation(self, now: float) -> Situation:
        """What the live controller knows of its pools."""
        assert self._balance is not None
        return situation_of(
            self._view,
            MODEL,
            self._dispatch.books,
            moving={EngineId(f"engine-{slot}"): flip.role for slot, flip in self._under_way.items()},
            waiting=len(self._dispatch.waiting),
            flip_s=self._took_s,
            horizon_s=self._balance.pace.horizon_s,
            now=now,
        )

    @property
    def _view(self) -> ClusterView:
        return ClusterView(tuple(self._dispatch.views), {MODEL: self._dispatch.pool})

    def decide(self, now: float) -> None:
        """To be asked every `Pace.interval_s`."""
        if self._plan is not None:
            self._follow(self._plan(now), now)
        elif self._balance is not None:
            self.verdict = verdict = self._balance.decide(self.situation(now), now=now)
            if verdict.move is not Move.STAY:
                self._begin(Role.PREFILL if verdict.move is Move.TO_PREFILL else Role.DECODE, verdict.reason, now)
                self._balance.began(verdict, now=now)

    def _follow(self, readers: int, now: float) -> None:
        while (missing := readers - self.count(Role.PREFILL)) and not self._under_way_other(missing):
            self._begin(Role.PREFILL if missing > 0 else Role.DECODE, f"{readers} prefill engines are planned", now)

    def _under_way_other(self, missing: int) -> bool:
        """Nothing is left that could be moved, or what is under way goes the other way."""
        giver = self._dispatch.pool.decode if missing > 0 else self._dispatch.pool.prefill
        return len(giver) < 2

    def _begin(self, role: Role, reason: str, now: float) -> None:
        dispatch = self._dispatch
        giver = Role.PREFILL if role is Role.DECODE else Role.DECODE
        view = mover(self._view, MODEL, giver, dispatch.books, busy=(), now=now)
        assert view is not None
        self._under_way[view.slot] = Flip(now, view.slot, role, reason, math.nan)
        dispatch.set(view.slot, view.address.role, EngineState.DRAINING)

    def switching(self, slot: int) -> None:
        """The engine has nothing left to do and is being switched."""
        self._dispatch.set(slot, self._dispatch.views[slot].address.role, EngineState.SWITCHING)

    def switched(self, slot: int, now: float) -> None:
        """It has its new role."""
        flip = self._under_way.pop(slot)
        self._dispatch.forget(slot)
        self._dispatch.set(slot, flip.role, EngineState.READY)
        self._took_s = now - flip.at
        self.done.append(msgspec.structs.replace(flip, took_s=self._took_s))
        if self._balance is not None:
            self._balance.ended(now=now, done=True)

    def all(self) -> list[Flip]:
        """What was moved and what is being moved, in the order of the decisions."""
        return sorted([*self.done, *self._under_way.values()], key=lambda flip: (flip.at, flip.engine))
