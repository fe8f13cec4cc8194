"""Is an engine fit for new work, and must its old work go elsewhere? A state machine per engine.

Theory of operation. What is known of an engine comes from up to four sides: its agent's reports (several times a second), the router's own
looks at it (*probes*: `/v1/loads`, at first `/v1/models` and `/server_info`), what the router knows of its host, and what a person ordered.
The machine keeps the last word of each side and derives the state from them, worst news first:

    DEAD         its process ended; two connections in a row were refused; its host left; its host is silent and so is the engine itself
    HELD         its agent gave up on starting it
    QUARANTINED  it runs in another mode than it should
    STARTING     it has not said yet what it serves
    SUSPECT      its host is not heard, or it does not answer, or it makes no progress under work: no new work, what runs goes on
    SWITCHING, DRAINING   ordered
    READY        none of these

An engine without an agent is looked at every `probe_interval_s`; one with an agent only while there is trouble: its host is not heard, or a
connection to it failed. Silence of the agent is not death of the engine. When the host has been silent for long enough, the engine's own
signs of life decide: an answered probe, or bytes of a running answer, within the last `SIGN_OF_LIFE_S`.

Whoever is DEAD, or stands still for `HANG_S` under work, loses its running requests too (`FailOver`), once. The answer of a health endpoint
proves nothing (sglang#6624: 200 for over an hour with a dead scheduler); counters that move do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from disagg.engines.progress import Progress
from disagg.model import EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, HostId, HostState, Role
from disagg.wire.messages import EngineReport

REFUSALS_UNTIL_DEAD = 2
SIGN_OF_LIFE_S = 1.0
HANG_S = 5.0
HASTY_PROBE_S = 0.25
HASTY_PATIENCE_S = 0.8
HISTORY_LIMIT = 64


class Answered(msgspec.Struct, frozen=True):
    """The engine told what it is and how it fares.

    Attributes:
        mode: its live role as it says itself (SGLang's ``disaggregation_mode``), empty if it does not say.
        counter: the sum of its progress counters.
        working: it has work that does not merely wait for a peer.
    """

    facts: EngineFacts
    load: EngineLoad
    mode: str = ""
    counter: int = 0
    working: bool = False


class Refused(msgspec.Struct, frozen=True):
    """It refused a connection."""


class TimedOut(msgspec.Struct, frozen=True):
    """It did not answer a probe in time, or not with sense."""

    why: str


class Exited(msgspec.Struct, frozen=True):
    """Its process ended."""

    code: int | None


class Reported(msgspec.Struct, frozen=True):
    """Its agent says how it is."""

    report: EngineReport


class HostJudged(msgspec.Struct, frozen=True):
    """What the router thinks of its host changed.

    Attributes:
        last_bytes_at: when the last bytes of a running answer came from the engine; 0 for never.
        engines_gone: the host left and took its engines down.
    """

    state: HostState
    reason: str
    last_bytes_at: float = 0.0
    engines_gone: bool = False


class Ordered(msgspec.Struct, frozen=True):
    """A person, or an operation, takes it out of service or brings it back.

    Attributes:
        state: DRAINING or SWITCHING; None to bring it back.
    """

    state: EngineState | None
    reason: str


class Troubled(msgspec.Struct, frozen=True):
    """Somebody had trouble with this engine: look at it soon."""


class ProbeVoided(msgspec.Struct, frozen=True):
    """The probe that was under way proves nothing: the router slept through it."""


class Stalled(msgspec.Struct, frozen=True):
    """The router itself did not run for this long: nobody's silence."""

    lag_s: float


class Tick(msgspec.Struct, frozen=True):
    """Its next probe may be due. `last_bytes_at` as in `HostJudged`."""

    last_bytes_at: float = 0.0


class Probe(msgspec.Struct, frozen=True):
    """Look at the engine now. `patience_s`: None for as long as the config says."""

    patience_s: float | None = None


class Publish(msgspec.Struct, frozen=True):
    """Its view changed."""


class FailOver(msgspec.Struct, frozen=True):
    """End what runs on it: it will not answer."""

    cause: str


Event = Answered | Refused | TimedOut | Exited | Reported | HostJudged | Ordered | Troubled | ProbeVoided | Stalled | Tick
Command = Probe | Publish | FailOver


class EngineDetector:
    """The machine of one engine.

    Args:
        slot: the engine's index in the router's lists.
        probe_interval_s: how often a ready engine without an agent is looked at.
        host: whose agent owns it; empty without one.
    """

    def __init__(
        self, address: EngineAddress, *, slot: int, probe_interval_s: float, now: float, host: HostId | None = None, hang_s: float = HANG_S
    ) -> None:
        self.history: deque[tuple[float, str]] = deque(maxlen=HISTORY_LIMIT)
        self._view = EngineView(address, slot, EngineState.STARTING, reason="it has not answered yet", host=host or HostId(""))
        self._interval_s = probe_interval_s
        self._hang_s = hang_s
        self._probe_at: float | None = now if host is None else None
        self._probing = False
        self._has_agent = host is not None
        self._host_state, self._host_reason = HostState.ONLINE, ""
        self._agent: EngineReport | None = None
        self._order: EngineState | None = None
        self._order_reason = ""
        self._expects = address.role
        self._forget_process(now)

    def _forget_process(self, now: float) -> None:
        """A new process has none of the old one's sins."""
        self._dead = ""
        self._trouble = ""
        self._mode_fault = ""
        self._refusals = 0
        self._answered_at = 0.0
        self._last_bytes_at = 0.0
        self._progress = Progress()
        self._hung = False
        self._failed_over = False

    @property
    def id(self) -> EngineId:
        """The engine's id."""
        return self._view.id

    @property
    def view(self) -> EngineView:
        """What the router sees of the engine."""
        return self._view

    @property
    def order(self) -> EngineState | None:
        """What was ordered: DRAINING, SWITCHING or nothing."""
        return self._order

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it."""
        before = self._view
        commands = _MOVES[type(event)](self, event, now)
        self._judge(now)
        if self._view.state is not before.state:
            self.history.append((now, f"{type(event).__name__}: {before.state} -> {self._view.state}: {self._view.reason}"))
        commands += self._fail_over_once()
        return commands if self._view == before else [*commands, Publish()]

    def next_deadline(self) -> float | None:
        """When it wants a `Tick`; None while a probe is under way, or none is needed."""
        return None if self._probing else self._probe_at

    def check(self) -> None:
        """Asserts what is always true."""
        assert self._refusals >= 0
        assert self._view.state is not EngineState.READY or self._view.facts.model
        assert self._view.state is not EngineState.READY or self._host_state is HostState.ONLINE
        assert self._has_agent or self._probing or self._probe_at is not None
        assert self._view.reason

    def __repr__(self) -> str:
        return f"<EngineDetector {self._view.id} {self._view.state} refusals={self._refusals}>"

    # --- moves: each notes what one side says

    def _on_answer(self, event: Answered, now: float) -> list[Command]:
        self._probing = False
        self._dead = self._trouble = ""
        self._refusals = 0
        self._answered_at = now
        self._progress.seen(event.counter, event.working, now)
        self._take(event.facts, event.load)
        self._check_mode(event.mode)
        self._probe_again(now)
        return []

    def _on_refusal(self, _event: Any, now: float) -> list[Command]:
        self._probing = False
        self._refusals += 1
        self._trouble = "it refused a connection"
        if self._refusals >= REFUSALS_UNTIL_DEAD and self._view.state is not EngineState.STARTING:
            self._dead = self._dead or f"it refused {REFUSALS_UNTIL_DEAD} connections in a row"
        self._probe_again(now)
        return []

    def _on_timeout(self, event: TimedOut, now: float) -> list[Command]:
        self._probing = False
        self._refusals = 0  # something listens
        self._trouble = event.why
        self._probe_again(now)
        return []

    def _on_exit(self, event: Exited, now: float) -> list[Command]:
        self._dead = f"its process ended with code {event.code}" if event.code is not None else "its process ended"
        self._probe_again(now)
        return []

    def _on_report(self, event: Reported, now: float) -> list[Command]:
        report, last = event.report, self._agent
        if last is not None and (last.pid, last.start_ticks) != (report.pid, report.start_ticks):
            self._forget_process(now)
            self._view = msgspec.structs.replace(self._view, facts=EngineFacts(), load=EngineLoad())
        self._agent = report
        address = EngineAddress(
            report.id, report.role, report.host, report.port, report.bootstrap_port, api_key=report.api_key, pid=report.pid
        )
        if address != self._view.address:  # the same object as long as it is the same place: connections hang on it
            self._view = msgspec.structs.replace(self._view, address=address)
        self._expects = report.role
        self._progress.seen(report.counter, report.working, now)
        if report.facts.model:
            self._take(report.facts, report.load)
        return []

    def _on_host(self, event: HostJudged, now: float) -> list[Command]:
        self._host_state, self._host_reason = event.state, event.reason
        self._note_bytes(event.last_bytes_at)
        if event.engines_gone:
            self._dead = event.reason
        if event.state is HostState.ONLINE:
            self._probe_again(now)
        else:
            self._probe_at = now
        return []

    def _on_order(self, event: Ordered, _now: float) -> list[Command]:
        self._order, self._order_reason = event.state, event.reason
        return []

    def _on_trouble(self, _event: Any, now: float) -> list[Command]:
        self._probe_at = now
        return []

    def _on_void(self, _event: Any, now: float) -> list[Command]:
        self._probing = False
        self._probe_at = now
        return []

    def _on_stall(self, event: Stalled, now: float) -> list[Command]:
        self._answered_at = min(now, self._answered_at + event.lag_s)
        self._last_bytes_at = min(now, self._last_bytes_at + event.lag_s)
        self._progress.slept(event.lag_s)
        return []

    def _on_tick(self, event: Tick, now: float) -> list[Command]:
        self._note_bytes(event.last_bytes_at)
        if self._probing or self._probe_at is None or now < self._probe_at:
            return []
        self._probing, self._probe_at = True, None
        return [Probe(None if self._host_state is HostState.ONLINE else HASTY_PATIENCE_S)]

    # --- what moves share

    def _note_bytes(self, at: float) -> None:
        self._last_bytes_at = max(self._last_bytes_at, at)

    def _take(self, facts: EngineFacts, load: EngineLoad) -> None:
        view = self._view
        self._view = msgspec.structs.replace(view, facts=view.facts if facts == view.facts else facts, load=load)

    def _check_mode(self, mode: str) -> None:
        wrong = bool(mode) and mode != _MODES[self._expects]
        self._mode_fault = f"it was given as a {self._expects} engine but runs in mode {mode!r}" if wrong else ""

    def _probe_again(self, now: float) -> None:
        if self._host_state is not HostState.ONLINE:
            self._probe_at = now + HASTY_PROBE_S
        elif self._dead or self._trouble:
            self._probe_at = now + self._interval_s / 4
        elif not self._has_agent:
            self._probe_at = now + (self._interval_s if self._view.facts.model else self._interval_s / 4)
        else:
            self._probe_at = None

    def _judge(self, now: float) -> None:
        still_s = self._progress.still_s(now)
        self._hung = still_s >= self._hang_s
        state, reason = self._verdict(now)
        shown_s = round(still_s, 1) if self._hung else 0.0
        self._view = msgspec.structs.replace(self._view, state=state, reason=reason, still_s=shown_s)

    def _verdict(self, now: float) -> tuple[EngineState, str]:
        return self._why_out_of_life(now) or self._why_not_started() or self._why_suspect() or self._why_ordered()

    def _why_out_of_life(self, now: float) -> tuple[EngineState, str] | None:
        agent = self._agent
        if agent is not None and agent.state in _OUT_OF_LIFE:
            return agent.state, agent.reason or "its agent says so"
        if self._dead:
            return EngineState.DEAD, self._dead
        if self._host_state in {HostState.SILENT, HostState.LEFT} and not self._shows_life(now):
            return EngineState.DEAD, f"its host is not heard ({self._host_reason}) and it gives no sign of life itself"
        if self._mode_fault:
            return EngineState.QUARANTINED, self._mode_fault
        return None

    def _shows_life(self, now: float) -> bool:
        return now - max(self._answered_at, self._last_bytes_at) <= SIGN_OF_LIFE_S

    def _why_not_started(self) -> tuple[EngineState, str] | None:
        if self._agent is not None and self._agent.state is EngineState.STARTING:
            return EngineState.STARTING, self._agent.reason or "it is starting"
        if self._view.facts.model:
            return None
        if self._answered_at:
            return EngineState.SUSPECT, "it does not say which model it serves"
        listens = f"nothing listens at {self._view.address.url} yet" if self._refusals else "it has not answered yet"
        return EngineState.STARTING, listens

    def _why_suspect(self) -> tuple[EngineState, str] | None:
        if self._hung:
            return EngineState.SUSPECT, f"it has work and its counters have not moved for {self._hang_s:g} s"
        if self._host_state is not HostState.ONLINE:
            return EngineState.SUSPECT, f"its host: {self._host_reason}"
        if self._trouble:
            return EngineState.SUSPECT, self._trouble
        if self._agent is not None and self._agent.state is EngineState.SUSPECT:
            return EngineState.SUSPECT, self._agent.reason
        return None

    def _why_ordered(self) -> tuple[EngineState, str]:
        if self._order is not None:
            return self._order, self._order_reason
        if self._agent is not None and self._agent.state in {EngineState.DRAINING, EngineState.SWITCHING}:
            return self._agent.state, self._agent.reason
        return EngineState.READY, "it answers"

    def _fail_over_once(self) -> list[Command]:
        lost = self._hung or self._view.state in {EngineState.DEAD, EngineState.HELD}
        if not lost:
            self._failed_over = False
            return []
        if self._failed_over:
            return []
        self._failed_over = True
        return [FailOver(self._view.reason)]


_OUT_OF_LIFE = frozenset({EngineState.DEAD, EngineState.HELD, EngineState.QUARANTINED})
_MODES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNIFIED: "null"}

_MOVES: Mapping[type, Callable[[EngineDetector, Any, float], list[Command]]] = {
    Answered: EngineDetector._on_answer,
    Refused: EngineDetector._on_refusal,
    TimedOut: EngineDetector._on_timeout,
    Exited: EngineDetector._on_exit,
    Reported: EngineDetector._on_report,
    HostJudged: EngineDetector._on_host,
    Ordered: EngineDetector._on_order,
    Troubled: EngineDetector._on_trouble,
    ProbeVoided: EngineDetector._on_void,
    Stalled: EngineDetector._on_stall,
    Tick: EngineDetector._on_tick,
}
