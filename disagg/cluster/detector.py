"""Is an engine fit for new work, and must its old work go elsewhere? A state machine per engine.

Theory of operation. What is known of an engine comes from up to four sides: its agent's reports (several times a second), the router's own
looks at it (*probes*: `/v1/loads`, at first `/v1/models` and `/server_info`), what the router knows of its host, and what a person ordered.
The machine keeps the last word of each side and derives the state from them, worst news first:

    DEAD         its process ended; two connections in a row were refused; its host took it down; its host is not heard and neither is it
    HELD         its agent gave up on starting it
    QUARANTINED  it runs in another mode than it should
    STARTING     it has not said yet what it serves
    SUSPECT      its host is not heard, or it does not answer, or it makes no progress under work: no new work, what runs goes on
    SWITCHING, DRAINING   ordered
    READY        none of these

An engine without an agent is looked at every `probe_interval_s`; one with an agent only while there is trouble: its host is not heard, a
connection to it failed, or it runs in another mode than it should. Silence of the agent is not death of the engine. When the host has
been silent for long enough, or has left, the engine is lost only if it was asked in vain (`HASTY_PATIENCE_S`) and gave no sign of life
within the last `SIGN_OF_LIFE_S`: an answered probe, or bytes of a running answer.

An engine hangs when its counters stood still under work for `HANG_S` and no bytes came in that time. The counters are read by the agent as
long as its host is heard, and by the router otherwise; stillness counts as far as it was watched, so nobody hangs because nobody looked.
They stand still for as long as a pass takes, too, and a chunk of a very long prompt may take longer than that. So an engine has as long as
the longest prompt that it was given should take (`Tick.long_s`), if that is more.
The answer of a health endpoint proves nothing (sglang#6624: 200 for over an hour with a dead scheduler); counters that move do. Starting
and switching are exempt: loading, warm-up and graph capture take as long as they take.

Whoever is DEAD or HELD, or hangs, loses its running requests too (`FailOver`), once; so does a process that was replaced by another between
two reports. What only the passing of time says (it hangs, it gives no sign of life) is decided on a `Tick`, which comes after a `Stalled`
and brings the time of the last bytes. An answer to a probe that was under way when the process was replaced is the past.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from disagg.engines.progress import Progress
from disagg.model import MODES, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, HostId, HostState
from disagg.policy.reports import Reports
from disagg.wire.messages import EngineReport

REFUSALS_UNTIL_DEAD = 2
SIGN_OF_LIFE_S = 0.5
"""Where only the way to an engine is cut, its bytes arrive for about a second more; a longer wait would make the verdict late."""
HANG_S = 4.25
"""Five seconds from the last move to the verdict: up to a quarter each for the agent's look, its heartbeat and our beat come on top."""
PATIENCE_LOOK_S = 1.0
HASTY_PROBE_S = 0.25
HASTY_PATIENCE_S = 0.8
HISTORY_LIMIT = 64
REASON_LIMIT = 400
"""Characters of a reason that an agent gave: it is kept in a history."""
NEVER = float("-inf")


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
        reason: one sentence; nobody reads it when it is brought back.
    """

    state: EngineState | None
    reason: str = ""


class Troubled(msgspec.Struct, frozen=True):
    """Somebody had trouble with this engine: look at it soon."""


class ProbeVoided(msgspec.Struct, frozen=True):
    """The probe that was under way proves nothing: the router slept through it."""


class Stalled(msgspec.Struct, frozen=True):
    """The router itself did not run for this long: nobody's silence."""

    lag_s: float


class Tick(msgspec.Struct, frozen=True):
    """Its next probe may be due, or its time is up.

    Attributes:
        last_bytes_at: as in `HostJudged`.
        long_s: for how long its counters may stand still, by what it was given to read; what is less than `HANG_S` counts as that.
    """

    last_bytes_at: float = 0.0
    long_s: float = 0.0


class Probe(msgspec.Struct, frozen=True):
    """Look at the engine now. `patience_s`: None for as long as the config says."""

    patience_s: float | None = None


class Publish(msgspec.Struct, frozen=True):
    """Its view changed."""


class FailOver(msgspec.Struct, frozen=True):
    """End what runs on it: it will not answer."""

    cause: str


Event = Answered | Refused | TimedOut | Reported | HostJudged | Ordered | Troubled | ProbeVoided | Stalled | Tick
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
        self._gone = ""
        self._agent: EngineReport | None = None
        self._process = (0, 0)
        self._order: EngineState | None = None
        self._order_reason = ""
        self._replaced = ""
        self._begin_process()

    def _begin_process(self) -> None:
        """A new process has none of the old one's sins."""
        self._outdated = self._probing
        self._dead = ""
        self._trouble = ""
        self._mode = ""
        self._refusals = 0
        self._answered_at = NEVER
        self._last_bytes_at = NEVER
        self._vain_at: float | None = None  # when a question that was not answered yet counts as asked in vain
        self._lifeless = False
        self._progress = Progress()
        self._reports = Reports()
        self._watched_at = NEVER
        self._ticked_at = NEVER
        self._patience_s = self._hang_s
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
    def is_leaving(self) -> bool:
        """Its agent says that it ends soon: what runs on it should go on elsewhere."""
        return self._agent is not None and self._agent.leaving

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
        """When it wants a `Tick`, to probe or to judge what time brings; None when only an event from elsewhere can change anything."""
        dues = (None if self._probing else self._probe_at, self._hang_look_at(), self._lifeless_at())
        return min((due for due in dues if due is not None), default=None)

    def check(self) -> None:
        """Asserts what is always true."""
        assert self._refusals >= 0
        assert self._view.state is not EngineState.READY or self._view.facts.model or self._view.facts.part
        assert self._view.state is not EngineState.READY or self._host_state is HostState.ONLINE
        assert self._probing or self._probe_at is not None or (self._agent_is_heard and not self._wants_a_look)
        assert self._view.state is not EngineState.READY or not (self._hung or self._lifeless or self._dead or self._gone)
        assert self._view.state is not EngineState.DEAD or self._failed_over, "who is dead has lost what ran on it"
        assert self._failed_over is self._is_lost()
        assert not self._outdated or self._probing
        assert self._view.reason

    def __repr__(self) -> str:
        return f"<EngineDetector {self._view.id} {self._view.state} refusals={self._refusals}>"

    # --- moves: each notes what one side says

    def _on_answer(self, event: Answered, now: float) -> list[Command]:
        if self._is_past():
            return self._probe_anew(now)
        self._dead = self._trouble = ""
        self._refusals = 0
        self._answered_at = now
        self._vain_at, self._lifeless = None, False
        self._take(event.facts, event.load)
        self._mode = event.mode or self._mode
        if not self._agent_is_heard:
            self._watch(event.counter, event.working and not self._is_exempt, now)
        self._probe_again(now)
        return []

    def _on_refusal(self, _event: Any, now: float) -> list[Command]:
        if self._is_past():
            return self._probe_anew(now)
        self._refusals += 1
        if self._refusals >= REFUSALS_UNTIL_DEAD and self._view.state is not EngineState.STARTING:
            self._dead = self._dead or f"it refused {REFUSALS_UNTIL_DEAD} connections in a row"
        self._fail_probe("it refused a connection", now)
        return []

    def _on_timeout(self, event: TimedOut, now: float) -> list[Command]:
        if self._is_past():
            return self._probe_anew(now)
        self._refusals = 0  # something listens
        self._fail_probe(event.why, now)
        return []

    def _on_report(self, event: Reported, now: float) -> list[Command]:
        report = event.report
        self._note_process(report)
        if report.role is not self._view.address.role:
            self._mode = ""
        self._agent = report
        self._note_place(report)
        if report.owned is not self._view.owned:
            self._view = msgspec.structs.replace(self._view, owned=report.owned)
        if report.facts.model or report.facts.part:
            self._take(report.facts, report.load)
        elif report.state in _NOTHING_RUNS:
            # What ran on the process before has ended with it.
            self._view = msgspec.structs.replace(self._view, load=EngineLoad(), distrust="")
        if self._agent_is_heard:
            self._gone, self._lifeless = "", False
            self._watch(report.counter, report.working and not self._is_exempt, now)
        self._look_if_wanted(now)
        return []

    def _note_place(self, report: EngineReport) -> None:
        """The address stays the same object as long as it is the same place: connections hang on it."""
        known = self._view.address
        address = EngineAddress(
            report.id,
            report.role,
            report.host,
            report.port,
            report.bootstrap_port,
            api_key=report.api_key,
            pid=report.pid,
            switches=report.switches,
        )
        if address != known:
            self._view = msgspec.structs.replace(self._view, address=address)

    def _on_host(self, event: HostJudged, now: float) -> list[Command]:
        self._host_state, self._host_reason = event.state, event.reason
        self._note_bytes(event.last_bytes_at)
        self._gone = event.reason if event.engines_gone else self._gone
        if event.state is HostState.ONLINE:  # whether the engine is back as well, the report says that comes next
            self._vain_at = None
            self._probe_at = now if self._wants_a_look else None
            return []
        self._probe_at = now
        if self._probing:
            self._expect_answer_by(now + HASTY_PATIENCE_S)  # this probe has more patience than we have now
        return []

    def _on_order(self, event: Ordered, now: float) -> list[Command]:
        self._order, self._order_reason = event.state, event.reason
        self._look_if_wanted(now)
        return []

    def _on_trouble(self, _event: Any, now: float) -> list[Command]:
        self._probe_at = now
        return []

    def _on_void(self, _event: Any, now: float) -> list[Command]:
        self._vain_at = None
        return self._probe_anew(now)

    def _on_stall(self, event: Stalled, now: float) -> list[Command]:
        self._answered_at = min(now, self._answered_at + event.lag_s)
        self._last_bytes_at = min(now, self._last_bytes_at + event.lag_s)
        self._vain_at = None if self._vain_at is None else self._vain_at + event.lag_s
        self._progress.slept(event.lag_s)
        return []

    def _on_tick(self, event: Tick, now: float) -> list[Command]:
        self._note_bytes(event.last_bytes_at)
        self._ticked_at = now
        if self._is_still:
            self._patience_s = max(self._hang_s, event.long_s)
        hangs_at, lifeless_at = self._hangs_at(), self._lifeless_at()
        self._hung = self._hung or (hangs_at is not None and now >= hangs_at)
        self._lifeless = self._lifeless or (lifeless_at is not None and now >= lifeless_at)
        if self._probing or self._probe_at is None or now < self._probe_at:
            return []
        self._probing, self._probe_at = True, None
        if self._host_state is HostState.ONLINE:
            return [Probe()]
        self._expect_answer_by(now + HASTY_PATIENCE_S)
        return [Probe(HASTY_PATIENCE_S)]

    # --- what moves share

    @property
    def _agent_is_heard(self) -> bool:
        return self._has_agent and self._host_state is HostState.ONLINE

    @property
    def _is_exempt(self) -> bool:
        """What it does now takes as long as it takes."""
        return self._order is EngineState.SWITCHING or (self._agent is not None and self._agent.state in _EXEMPT)

    def _note_process(self, report: EngineReport) -> None:
        """Another pid is another process; none at all is no news, for an agent may not know it yet, or any more."""
        process, last = (report.pid, report.start_ticks), self._process
        if not report.pid or process == last:
            return
        self._process = process
        if not last[0]:
            return
        self._replaced = "" if self._failed_over else f"its process {last[0]} was replaced by {report.pid}"
        self._begin_process()
        self._view = msgspec.structs.replace(self._view, facts=EngineFacts(), load=EngineLoad(), distrust="")

    def _note_bytes(self, at: float) -> None:
        if not at or at <= self._last_bytes_at:
            return
        self._last_bytes_at = at
        self._hung = self._lifeless = False

    def _watch(self, counter: int, working: bool, now: float) -> None:
        self._progress.seen(counter, working, now)
        self._watched_at = now
        if self._progress.still_s(now) == 0.0:
            self._hung, self._patience_s = False, self._hang_s

    def _fail_probe(self, why: str, now: float) -> None:
        self._trouble = why
        if not self._agent_is_heard:
            self._watched_at = now  # nothing moved, and the work is what it was
        if self._host_state is not HostState.ONLINE:
            self._expect_answer_by(now)
        self._probe_again(now)

    def _expect_answer_by(self, at: float) -> None:
        self._vain_at = at if self._vain_at is None else min(at, self._vain_at)

    def _is_past(self) -> bool:
        """True when a probe ended that was asked of an earlier process."""
        self._probing, past = False, self._outdated
        self._outdated = False
        return past

    def _probe_anew(self, now: float) -> list[Command]:
        self._probing = self._outdated = False
        self._probe_at = now
        return []

    def _take(self, facts: EngineFacts, load: EngineLoad) -> None:
        view, load = self._view, self._reports.take(load)
        facts = view.facts if facts == view.facts else facts
        self._view = msgspec.structs.replace(view, facts=facts, load=load, distrust=self._reports.doubt)

    @property
    def _mode_fault(self) -> str:
        role = self._view.address.role
        wrong = bool(self._mode) and self._mode != MODES[role] and not self._is_switching
        return f"it was given as a {role} engine but runs in mode {self._mode!r}" if wrong else ""

    @property
    def _is_switching(self) -> bool:
        agents = self._agent is not None and self._agent.state is EngineState.SWITCHING
        return agents or self._order is EngineState.SWITCHING

    def _look_if_wanted(self, now: float) -> None:
        """A fault that a switch hid comes to light when the switch is over, and only an answer can take it back."""
        if self._wants_a_look and self._probe_at is None and not self._probing:
            self._probe_at = now

    @property
    def _wants_a_look(self) -> bool:
        return not self._has_agent or bool(self._dead or self._trouble or self._mode_fault)

    def _probe_again(self, now: float) -> None:
        if self._host_state is not HostState.ONLINE:
            self._probe_at = now + HASTY_PROBE_S
        elif 0 < self._refusals < REFUSALS_UNTIL_DEAD:  # who judges a broken request waits for the verdict, but not for long
            self._probe_at = now + min(HASTY_PROBE_S, self._interval_s / 4)
        elif self._dead or self._trouble or self._mode_fault or (not self._has_agent and not self._view.facts.model):
            self._probe_at = now + self._interval_s / 4
        else:
            self._probe_at = None if self._has_agent else now + self._interval_s

    def _hangs_at(self) -> float | None:
        """When what was seen of it so far makes it hung; None when it does not, or it hangs already."""
        if self._hung or not self._is_still:
            return None
        since = self._watched_at - self._progress.still_s(self._watched_at)
        return max(self._watched_at, self._last_bytes_at + self._hang_s, since + self._patience_s)

    @property
    def _is_still(self) -> bool:
        """Its counters stand still for so long that it hangs, unless there is a reason."""
        return self._progress.still_s(self._watched_at) >= self._hang_s

    def _hang_look_at(self) -> float | None:
        """The same, or sooner where it has patience: who asked for what takes long may leave."""
        hangs_at = self._hangs_at()
        if hangs_at is None or self._patience_s <= self._hang_s:
            return hangs_at
        return min(hangs_at, max(self._watched_at, self._ticked_at + PATIENCE_LOOK_S))

    def _lifeless_at(self) -> float | None:
        """When it is lost for want of a sign of life; None when it is not to be, or is already."""
        if self._lifeless or self._vain_at is None or self._host_state not in _NOT_HEARD:
            return None
        return max(self._vain_at, max(self._answered_at, self._last_bytes_at) + SIGN_OF_LIFE_S)

    def _judge(self, now: float) -> None:
        state, reason = self._why_out_of_life() or self._why_not_started() or self._why_suspect() or self._why_ordered()
        still_s = round(self._progress.still_s(now), 1) if self._hung else 0.0
        view = self._view
        if (state, reason, still_s) != (view.state, view.reason, view.still_s):
            self._view = msgspec.structs.replace(view, state=state, reason=reason, still_s=still_s)

    def _why_out_of_life(self) -> tuple[EngineState, str] | None:
        agent = self._agent
        if agent is not None and agent.state in _OUT_OF_LIFE:
            return agent.state, agent.reason[:REASON_LIMIT] or "its agent says so"
        if self._dead:
            return EngineState.DEAD, self._dead
        if self._gone:
            return EngineState.DEAD, f"its host: {self._gone}"
        if self._lifeless:
            return EngineState.DEAD, f"its host is not heard ({self._host_reason}) and it gives no sign of life itself"
        if agent is not None and agent.state is EngineState.QUARANTINED:
            return EngineState.QUARANTINED, agent.reason[:REASON_LIMIT] or "its agent says so"
        fault = self._mode_fault
        return (EngineState.QUARANTINED, fault) if fault else None

    def _why_not_started(self) -> tuple[EngineState, str] | None:
        agent = self._agent
        if agent is not None and agent.state is EngineState.STARTING:
            return EngineState.STARTING, agent.reason[:REASON_LIMIT] or "it is starting"
        if self._view.facts.model or self._view.facts.part:
            return None
        if self._answered_at > NEVER:
            return EngineState.SUSPECT, "it does not say which model it serves"
        listens = f"nothing listens at {self._view.address.url} yet" if self._refusals else "it has not answered yet"
        return EngineState.STARTING, listens

    def _why_suspect(self) -> tuple[EngineState, str] | None:
        agent = self._agent
        if self._hung:
            return EngineState.SUSPECT, f"it has work and its counters have not moved for {self._patience_s:.4g} s"
        if self._host_state is not HostState.ONLINE:
            return EngineState.SUSPECT, f"its host: {self._host_reason}"
        if self._trouble:
            return EngineState.SUSPECT, self._trouble
        if agent is not None and agent.state is EngineState.SUSPECT:
            return EngineState.SUSPECT, agent.reason[:REASON_LIMIT] or "its agent says so"
        return None

    def _why_ordered(self) -> tuple[EngineState, str]:
        agent = self._agent
        if self._order is not None:
            return self._order, self._order_reason or "ordered"
        if agent is not None and agent.state in {EngineState.DRAINING, EngineState.SWITCHING}:
            return agent.state, agent.reason[:REASON_LIMIT] or "its agent says so"
        if self._agent is not None and ", but " in self._agent.reason:
            return EngineState.READY, self._agent.reason[:REASON_LIMIT]
        return EngineState.READY, "it answers"

    def _is_lost(self) -> bool:
        return self._hung or self._view.state in _OUT_OF_LIFE

    def _fail_over_once(self) -> list[Command]:
        before, self._failed_over = self._failed_over, self._is_lost()
        cause, self._replaced = self._replaced, ""
        if self._failed_over and not before:
            return [FailOver(self._view.reason)]
        return [FailOver(cause)] if cause else []


_OUT_OF_LIFE = frozenset({EngineState.DEAD, EngineState.HELD})
_EXEMPT = frozenset({EngineState.STARTING, EngineState.SWITCHING})
_NOT_HEARD = frozenset({HostState.SILENT, HostState.LEFT})

_MOVES: Mapping[type, Callable[[EngineDetector, Any, float], list[Command]]] = {
    Answered: EngineDetector._on_answer,
    Refused: EngineDetector._on_refusal,
    TimedOut: EngineDetector._on_timeout,
    Reported: EngineDetector._on_report,
    HostJudged: EngineDetector._on_host,
    Ordered: EngineDetector._on_order,
    Troubled: EngineDetector._on_trouble,
    ProbeVoided: EngineDetector._on_void,
    Stalled: EngineDetector._on_stall,
    Tick: EngineDetector._on_tick,
}
_NOTHING_RUNS = frozenset({EngineState.STARTING, EngineState.DEAD, EngineState.HELD})
