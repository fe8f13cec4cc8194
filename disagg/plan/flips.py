"""Who moves engines between the pools in virtual time: the live balance, and how what it decides is carried out. Pure.

An engine that is moved gets no new work, finishes what it has, is nobody's for as long as a switch takes, and comes back in its other role
with an empty cache. Of the prefill engines the one that is through with its prompts soonest is taken, of the decode engines the one that is
promised the fewest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from disagg.model import EngineState, EngineView, Role
from disagg.plan.dispatch import MODEL, Dispatch
from disagg.plan.hardware import Hardware
from disagg.policy.balance import Balance, Demand, Move, Situation, Verdict


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
        hardware: of the engines.
        balance: decides; None for a fixed ratio.
        plan: decides instead of it.

    Attributes:
        done: what was moved, in the order of the decisions.
    """

    def __init__(self, dispatch: Dispatch, hardware: Hardware, balance: Balance | None, plan: Plan | None = None) -> None:
        self._dispatch = dispatch
        self._hardware = hardware
        self._balance = balance
        self._plan = plan
        self._under_way: dict[int, Flip] = {}
        self._took_s = hardware.switch_s
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
        dispatch, pool = self._dispatch, self._dispatch.pool
        demand = dispatch.books.demand(MODEL) or Demand(1.0)
        readers_s, writers_s = demand.expected(now, self._took_s)
        writers = [view for view in dispatch.views if view.address.role is Role.DECODE]
        offered = (readers_s, max(writers_s, dispatch.books.writers_busy(writers)))
        arrivals, saved_s = dispatch.saved.offered(now)
        readers = self.count(Role.PREFILL)
        promised = sum(dispatch.books.ledger.reserved(view.slot) for view in pool.decode)
        horizon_s = self._balance.pace.horizon_s if self._balance is not None else 0.0
        return Situation(
            readers,
            self.count(Role.DECODE),
            offered,
            demand.watched_s(now),
            prompt_s=offered[0] / arrivals if arrivals else 0.0,
            late_s=min((dispatch.books.forecast.wait_s(view.slot, now=now) for view in pool.prefill), default=0.0),
            late_limit_s=dispatch.books.slo.ttft_s,
            kv_share=promised / (len(pool.decode) * self._hardware.kv_tokens) if pool.decode else 0.0,
            waiting=len(dispatch.waiting),
            flip_s=self._took_s,
            lost_cache_s=saved_s / max(1, readers) * horizon_s / 2,  # a cache that is filled again is worth as much from then on
        )

    def decide(self, now: float) -> None:
        """To be asked every `Pace.interval_s`."""
        if self._plan is not None:
            self._follow(self._plan(now), now)
        elif self._balance is not None:
            self.verdict = verdict = self._balance.decide(self.situation(now), now=now)
            if verdict.move is not Move.STAY:
                self._begin(Role.PREFILL if verdict.move is Move.TO_PREFILL else Role.DECODE, verdict.reason, now)
                self._balance.began(now=now)

    def _follow(self, readers: int, now: float) -> None:
        while (missing := readers - self.count(Role.PREFILL)) and not self._under_way_other(missing):
            self._begin(Role.PREFILL if missing > 0 else Role.DECODE, f"{readers} prefill engines are planned", now)

    def _under_way_other(self, missing: int) -> bool:
        """Nothing is left that could be moved, or what is under way goes the other way."""
        giver = self._dispatch.pool.decode if missing > 0 else self._dispatch.pool.prefill
        return len(giver) < 2

    def _begin(self, role: Role, reason: str, now: float) -> None:
        dispatch = self._dispatch

        def soon(view: EngineView) -> tuple[float, int]:
            if role is Role.DECODE:
                return dispatch.books.forecast.wait_s(view.slot, now=now), view.slot
            return dispatch.books.ledger.reserved(view.slot), view.slot

        view = min(dispatch.pool.prefill if role is Role.DECODE else dispatch.pool.decode, key=soon)
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
