"""A change that somebody ordered to one engine, as a state machine: take it out, change it, prove it, put it back.

Theory of operation. Both changes begin with a drain: no new work, and what runs may finish within `drain_s`. What still runs then goes on
on other engines, where there are any, and the change waits up to `move_s` more for that.

    flip     DRAINING ─ idle ─► SWITCHING ─ switched ─► PROVING ─ canary answered ─► DONE, back in service
                │ ▲ MOVING ─ idle ─┘└─ refused ─► RESTARTING (in the new role) ◄─ canary failed ─┘
                └─┘  └─ not idle in time, or nothing to move to ─► FAILED, back in service as it was
    restart  DRAINING ─ not idle in time ─► MOVING ─ idle, or not idle in time ─► RESTARTING ─ ready again ─► DONE, back in service

SGLang switches only an engine that is fully idle. A flip that meets work which neither ends nor moves gives up, because the engine is of
use as it is; a restart goes on, because whoever asks for one wants the process gone. An engine that refuses a live switch (feature not
enabled, another backend, half done and not `safe_to_restore`) is restarted in the new role, which always works and costs a start.

Every change ends: each state has its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from disagg.model import EngineId, EngineState, Role

HISTORY_LIMIT = 32


class Phase(StrEnum):
    """Where a change is; the last two are final."""

    DRAINING = "draining"
    MOVING = "moving"
    SWITCHING = "switching"
    PROVING = "proving"
    RESTARTING = "restarting"
    DONE = "done"
    FAILED = "failed"


FINAL = frozenset({Phase.DONE, Phase.FAILED})


class Limits(msgspec.Struct, frozen=True):
    """Seconds.

    Attributes:
        drain_s: until what runs has ended.
        move_s: from then on, until what still ran goes on elsewhere.
        switch_s: until a live switch is answered; decode captures its CUDA graphs anew.
        prove_s: until the canary's answer.
        restart_s: until the engine is ready again.
    """

    drain_s: float = 30.0
    move_s: float = 15.0
    switch_s: float = 75.0
    prove_s: float = 45.0
    restart_s: float = 900.0


class BecameIdle(msgspec.Struct, frozen=True):
    """Nothing runs on it any more, as the router and the engine say."""


class OrderAnswered(msgspec.Struct, frozen=True):
    """Its agent did what it was told, or says why not."""

    done: bool
    sentence: str


class CanaryEnded(msgspec.Struct, frozen=True):
    """The one request that it had to answer ended. `skipped`: nobody was there to answer it with."""

    done: bool
    sentence: str


class BecameReady(msgspec.Struct, frozen=True):
    """A new process of it serves, in this role."""

    role: Role


class WasLost(msgspec.Struct, frozen=True):
    """It is dead, or its host is gone."""

    reason: str


class Tick(msgspec.Struct, frozen=True):
    """A limit may have passed.

    Attributes:
        others: engines are there on which what runs here could go on.
    """

    others: bool = False


class TakeOut(msgspec.Struct, frozen=True):
    """Give it no new work, and show this state."""

    state: EngineState
    reason: str


class SendOrder(msgspec.Struct, frozen=True):
    """Tell its agent: ``switch`` or ``restart``, to this role."""

    action: str
    role: Role
    cause: str


class RunCanary(msgspec.Struct, frozen=True):
    """Have it answer one request with a partner."""


class PutBack(msgspec.Struct, frozen=True):
    """Give it work again."""


Event = BecameIdle | OrderAnswered | CanaryEnded | BecameReady | WasLost | Tick
Command = TakeOut | SendOrder | RunCanary | PutBack


class IllegalMoveError(RuntimeError):
    """The controller sent an event that cannot happen: a fault of ours."""


class Change:
    """The machine of one change.

    Args:
        engine: which.
        was: its role now.
        role: the role to come; the same for a restart.
        live: True for a flip, which tries a live switch first.
        cause: who wants it and why, one sentence.

    Attributes:
        steps: what happened so far, one sentence each, with its time.
    """

    def __init__(self, engine: EngineId, was: Role, role: Role, *, live: bool, cause: str, limits: Limits, now: float) -> None:
        self.engine = engine
        self.was = was
        self.role = role
        self.live = live
        self.cause = cause
        self.phase = Phase.DRAINING
        self.steps: list[tuple[float, str]] = []
        self._limits = limits
        self._until: float | None = now + limits.drain_s

    @property
    def verb(self) -> str:
        """What it is called by people."""
        return "flip" if self.live else "restart"

    @property
    def outcome(self) -> str:
        """The last step, which says how it ended."""
        return self.steps[-1][1] if self.steps else ""

    def begin(self, now: float) -> list[Command]:
        """The first commands."""
        self._step(f"draining: {self.cause}", now)
        return [TakeOut(EngineState.DRAINING, f"it drains for a {self.verb}: {self.cause}")]

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it. What comes too late, or too early, is ignored: engines live on meanwhile."""
        move = _MOVES.get((self.phase, type(event)))
        if self.phase in FINAL:
            raise IllegalMoveError(f"{type(event).__name__} after the change ended")
        return [] if move is None else move(self, event, now)

    def next_deadline(self) -> float | None:
        """When it wants a `Tick`; None once it ended."""
        return self._until

    def check(self) -> None:
        """Asserts what is always true."""
        assert (self._until is None) == (self.phase in FINAL)
        assert self.live or self.phase not in {Phase.SWITCHING, Phase.PROVING}
        assert self.live or self.was is self.role

    def __repr__(self) -> str:
        return f"<Change {self.verb} {self.engine} {self.was}->{self.role} {self.phase}>"

    # --- moves

    def _idle(self, _event: Any, now: float) -> list[Command]:
        self._step("nothing runs on it any more", now)
        return self._switch(now) if self.live else self._restart(self.cause, now)

    def _switch(self, now: float) -> list[Command]:
        self._enter(Phase.SWITCHING, self._limits.switch_s, now)
        taken = TakeOut(EngineState.SWITCHING, f"it switches from {self.was} to {self.role}: {self.cause}")
        return [taken, SendOrder("switch", self.role, self.cause)]

    def _drain_too_slow(self, event: Tick, now: float) -> list[Command]:
        if not self._due(now):
            return []
        late = f"requests still ran after {self._limits.drain_s:g} s"
        if not event.others:
            return self._give_up_waiting(late, now)
        self._step(f"{late}; they go on on other engines", now)
        self._enter(Phase.MOVING, self._limits.move_s, now)
        return []

    def _move_too_slow(self, _event: Any, now: float) -> list[Command]:
        if not self._due(now):
            return []
        after_s = self._limits.drain_s + self._limits.move_s
        return self._give_up_waiting(f"requests that cannot go on elsewhere still ran after {after_s:g} s", now)

    def _give_up_waiting(self, late: str, now: float) -> list[Command]:
        if not self.live:
            self._step(f"{late}; they end with it", now)
            return self._restart(self.cause, now)
        return self._finish(Phase.FAILED, f"not flipped: {late}; it goes on as {self.was}", now)

    def _switched(self, event: OrderAnswered, now: float) -> list[Command]:
        self._step(event.sentence, now)
        if not event.done:
            return self._restart(f"its live switch failed: {event.sentence}", now)
        self._enter(Phase.PROVING, self._limits.prove_s, now)
        return [RunCanary()]

    def _proved(self, event: CanaryEnded, now: float) -> list[Command]:
        if event.done:
            return self._finish(Phase.DONE, f"{event.sentence}; it is back in service as {self.role}", now)
        return self._restart(f"its canaries failed after the switch: {event.sentence}", now)

    def _restart(self, cause: str, now: float) -> list[Command]:
        self._enter(Phase.RESTARTING, self._limits.restart_s, now)
        self._step(f"starting it anew as {self.role}", now)
        return [TakeOut(EngineState.SWITCHING, f"it is started anew as {self.role}: {cause}"), SendOrder("restart", self.role, cause)]

    def _restart_answered(self, event: OrderAnswered, now: float) -> list[Command]:
        if event.done:
            return []
        return self._finish(Phase.FAILED, f"not restarted: {event.sentence}", now)

    def _ready_again(self, event: BecameReady, now: float) -> list[Command]:
        if event.role is not self.role:
            return []  # the old process, a moment before it ends
        return self._finish(Phase.DONE, f"it serves again as {self.role}", now)

    def _lost(self, event: WasLost, now: float) -> list[Command]:
        return self._finish(Phase.FAILED, f"it was lost while {self.phase}: {event.reason}", now)

    def _lost_in_switch(self, event: WasLost, now: float) -> list[Command]:
        return self._restart(f"it died in its switch: {event.reason}", now)

    def _too_slow(self, _event: Any, now: float) -> list[Command]:
        if not self._due(now):
            return []
        late = f"no answer within its limit while {self.phase}"
        if self.phase is Phase.RESTARTING:
            return self._finish(Phase.FAILED, f"{late}; `disagg status` says how it is", now)
        self._step(late, now)
        return self._restart(late, now)

    # --- what moves share

    def _enter(self, phase: Phase, limit_s: float, now: float) -> None:
        self.phase = phase
        self._until = now + limit_s

    def _finish(self, phase: Phase, sentence: str, now: float) -> list[Command]:
        self._step(sentence, now)
        self.phase = phase
        self._until = None
        return [PutBack()]

    def _due(self, now: float) -> bool:
        return self._until is not None and now >= self._until

    def _step(self, sentence: str, now: float) -> None:
        if len(self.steps) < HISTORY_LIMIT:
            self.steps.append((now, sentence))


_Move = Callable[[Change, Any, float], list[Command]]
_MOVES: Mapping[tuple[Phase, type], _Move] = {
    (Phase.DRAINING, BecameIdle): Change._idle,
    (Phase.DRAINING, WasLost): Change._lost,
    (Phase.DRAINING, Tick): Change._drain_too_slow,
    (Phase.MOVING, BecameIdle): Change._idle,
    (Phase.MOVING, WasLost): Change._lost,
    (Phase.MOVING, Tick): Change._move_too_slow,
    (Phase.SWITCHING, OrderAnswered): Change._switched,
    (Phase.SWITCHING, WasLost): Change._lost_in_switch,
    (Phase.SWITCHING, Tick): Change._too_slow,
    (Phase.PROVING, CanaryEnded): Change._proved,
    (Phase.PROVING, WasLost): Change._lost_in_switch,
    (Phase.PROVING, Tick): Change._too_slow,
    (Phase.RESTARTING, OrderAnswered): Change._restart_answered,
    (Phase.RESTARTING, BecameReady): Change._ready_again,
    (Phase.RESTARTING, Tick): Change._too_slow,
}
