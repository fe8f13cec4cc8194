"""Is an engine fit for new work? A state machine per engine, fed with what probes and processes say.

Theory of operation. The router looks at each engine every `probe_interval_s`. An engine is READY after it answered with its facts; one
probe that stays out makes it SUSPECT (no new work, what runs goes on); two refused connections in a row, or the exit of its process, make
it DEAD. A dead or suspect engine that answers again is READY again. Probes come four times as often while an engine is not ready, so that
a start or a recovery is noticed soon.

             Answered                 TimedOut, Refused            Refused again, Exited
  STARTING ───────────► READY ─────────────────────────► SUSPECT ─────────────────────────► DEAD
                          ▲ └───────────── Answered ────────┘ └──────────── Answered ─────────┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from disagg.model import EngineAddress, EngineFacts, EngineLoad, EngineState, EngineView, Role

REFUSALS_UNTIL_DEAD = 2
HISTORY_LIMIT = 64


class Answered(msgspec.Struct, frozen=True):
    """The engine told what it is and how it fares.

    Attributes:
        mode: its live role as it says itself (SGLang's ``disaggregation_mode``), empty if it does not say.
    """

    facts: EngineFacts
    load: EngineLoad
    mode: str = ""


class Refused(msgspec.Struct, frozen=True):
    """It refused a connection."""


class TimedOut(msgspec.Struct, frozen=True):
    """It did not answer a probe in time, or not with sense."""

    why: str


class Exited(msgspec.Struct, frozen=True):
    """Its process ended."""

    code: int


class Tick(msgspec.Struct, frozen=True):
    """Its next probe may be due."""


class Probe(msgspec.Struct, frozen=True):
    """Look at the engine now."""


class Publish(msgspec.Struct, frozen=True):
    """Its view changed."""


Event = Answered | Refused | TimedOut | Exited | Tick
Command = Probe | Publish


class EngineDetector:
    """The machine of one engine.

    Args:
        slot: the engine's index in the router's lists.
        probe_interval_s: how often a ready engine is looked at.
    """

    def __init__(self, address: EngineAddress, *, slot: int, probe_interval_s: float, now: float) -> None:
        self.history: deque[tuple[float, str]] = deque(maxlen=HISTORY_LIMIT)
        self._view = EngineView(address, slot, EngineState.STARTING, reason="it has not answered yet")
        self._interval_s = probe_interval_s
        self._refusals = 0
        self._probe_at: float | None = now

    @property
    def view(self) -> EngineView:
        """What the router sees of the engine."""
        return self._view

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it."""
        before = self._view
        commands = _MOVES[type(event)](self, event, now)
        if self._view.state is not before.state:
            self.history.append((now, f"{type(event).__name__}: {before.state} -> {self._view.state}"))
        return commands if self._view == before else [*commands, Publish()]

    def next_deadline(self) -> float | None:
        """When it wants a `Tick`; None while a probe is under way."""
        return self._probe_at

    def look_soon(self, now: float) -> None:
        """Somebody had trouble with this engine: probe it at once, unless a probe is under way."""
        if self._probe_at is not None:
            self._probe_at = now

    def check(self) -> None:
        """Asserts what is always true."""
        assert self._refusals >= 0
        assert self._view.state is not EngineState.READY or self._view.facts.model

    def __repr__(self) -> str:
        return f"<EngineDetector {self._view.id} {self._view.state} refusals={self._refusals}>"

    # --- moves

    def _on_answer(self, event: Answered, now: float) -> list[Command]:
        self._refusals = 0
        self._probe_again(now, ready=True)
        role = self._view.address.role
        if event.mode and event.mode != _MODES[role]:
            reason = f"it was given as a {role} engine but runs in mode {event.mode!r}"
            self._change(EngineState.QUARANTINED, reason, facts=event.facts, load=event.load)
        elif not event.facts.model:
            self._change(EngineState.SUSPECT, "it does not say which model it serves")
        else:
            self._change(EngineState.READY, "it answers", facts=event.facts, load=event.load)
        return []

    def _on_refusal(self, _event: Any, now: float) -> list[Command]:
        self._refusals += 1
        self._probe_again(now, ready=False)
        if self._view.state is EngineState.STARTING:
            self._change(EngineState.STARTING, f"nothing listens at {self._view.address.url} yet")
        elif self._view.state is EngineState.DEAD:
            pass  # as it should be
        elif self._refusals >= REFUSALS_UNTIL_DEAD:
            self._change(EngineState.DEAD, f"it refused {REFUSALS_UNTIL_DEAD} connections in a row")
        else:
            self._change(EngineState.SUSPECT, "it refused a connection")
        return []

    def _on_timeout(self, event: TimedOut, now: float) -> list[Command]:
        self._refusals = 0  # something listens
        self._probe_again(now, ready=False)
        if self._view.state not in {EngineState.STARTING, EngineState.DEAD}:
            self._change(EngineState.SUSPECT, event.why)
        return []

    def _on_exit(self, event: Exited, now: float) -> list[Command]:
        self._probe_again(now, ready=False)
        self._change(EngineState.DEAD, f"its process ended with code {event.code}")
        return []

    def _on_tick(self, _event: Any, now: float) -> list[Command]:
        if self._probe_at is None or now < self._probe_at:
            return []
        self._probe_at = None
        return [Probe()]

    def _probe_again(self, now: float, *, ready: bool) -> None:
        self._probe_at = now + (self._interval_s if ready else self._interval_s / 4)

    def _change(self, state: EngineState, reason: str, *, facts: EngineFacts | None = None, load: EngineLoad | None = None) -> None:
        view = self._view
        self._view = EngineView(view.address, view.slot, state, facts or view.facts, load or view.load, reason)


_MODES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNIFIED: "null"}

_MOVES: Mapping[type, Callable[[EngineDetector, Any, float], list[Command]]] = {
    Answered: EngineDetector._on_answer,
    Refused: EngineDetector._on_refusal,
    TimedOut: EngineDetector._on_timeout,
    Exited: EngineDetector._on_exit,
    Tick: EngineDetector._on_tick,
}
