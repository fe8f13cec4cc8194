"""The life of one engine of a host: when it is started, ended, started again, or left alone. A state machine, fed by the host's agent.

Theory of operation. The agent says what it wants (start, stop, restart) and what happens to the process; the machine answers with commands.
A process that ends unasked has died, and so has one that cannot be spawned, does not become ready in time, or had to be killed because it
hung. After a death the engine waits 1, 2, 4 … 60 s (BACKOFF); the row begins anew after a life that was ready for `well_s`. Five deaths in
ten minutes hold it (HELD): a sixth start would say no more than the fifth, and only a person goes on from there. So do two in a row whose
cause another start does not mend, such as an argument that the engine does not know.

    STOPPED  ── StartAsked ─────────────► STARTING     spawn
    STARTING ── BecameReady ────────────► RUNNING
    STARTING, RUNNING ── it dies ───────► BACKOFF      or HELD, at the fifth death
    BACKOFF  ── its time is over ───────► STARTING     spawn
    HELD     ── a person asks ──────────► STARTING     spawn; its deaths are forgiven
    STARTING, RUNNING ── StopAsked, RestartAsked, too slow to start, hung ──► STOPPING    terminate, or kill at once
    STOPPING ── it ends ────────────────► STOPPED, STARTING (spawn) or BACKOFF, as was asked for
    BACKOFF, HELD ── StopAsked ─────────► STOPPED

STOPPING remembers what comes after the end: nothing, another start, or the account of a death. A stop is never a death.

Hang. Only a RUNNING engine can hang: loading, warm-up and graph capture take as long as they take. When its counters stood still for
`hang_s` under work of its own (see `progress`), it is `hung`: others give it no new work. That is cheap and taken back at the first move. A
kill costs minutes of loading, so it needs more: stillness of `hang_kill_s` and of three times the longest step ever seen, and then a probe
that this machine asked for and that failed. Stillness counts as far as it was observed: without `ProgressSeen` or `ProgressMissed` no
verdict falls, so an agent that slept accuses nobody.

Commands may overlap with what happens: an event about a process that is gone already is ignored where a pid says so or where it can only be
late. Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from disagg.engines.progress import Progress

HISTORY_LIMIT = 64
KILL_REPEAT_S = 5.0
"""A kill that was not followed by an end is repeated: the first may have met a process that hung in the kernel."""


class State(StrEnum):
    """Where an engine's process is in its life."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    HELD = "held"


class After(StrEnum):
    """What comes after STOPPING."""

    STOPPED = "stopped"
    START = "start"
    DEATH = "death"


class Limits(msgspec.Struct, frozen=True):
    """Seconds, where the name says so.

    Attributes:
        start_limit_s: from spawned to ready; a large model may load for minutes.
        stop_limit_s: from SIGTERM to SIGKILL.
        backoff_first_s: the wait after the first death; it doubles up to `backoff_max_s`.
        well_s: a life that was ready for so long makes the next death a first one.
        hold_deaths: so many deaths within `hold_window_s` hold the engine.
        hold_lasting: so many in a row whose cause another start does not mend.
        hang_s: stillness under work that makes it hung.
        hang_kill_s: the least stillness that may end in a kill.
        hang_steps: and the least in longest steps seen.
        probe_again_s: the next probe after one that was answered although nothing moves.
    """

    start_limit_s: float = 600.0
    stop_limit_s: float = 45.0
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    well_s: float = 60.0
    hold_deaths: int = 5
    hold_window_s: float = 600.0
    hold_lasting: int = 2
    hang_s: float = 5.0
    hang_kill_s: float = 60.0
    hang_steps: float = 3.0
    probe_again_s: float = 10.0


# --- events: what happened. `pid` says of which process; 0 means the present one.


class StartAsked(msgspec.Struct, frozen=True):
    """It is wanted: by the agent that begins, or by a person."""

    cause: str


class StopAsked(msgspec.Struct, frozen=True):
    """It is not wanted any more."""

    cause: str


class RestartAsked(msgspec.Struct, frozen=True):
    """A person, or a switch of roles, wants it anew."""

    cause: str


class Spawned(msgspec.Struct, frozen=True):
    """Its process runs."""

    pid: int


class SpawnFailed(msgspec.Struct, frozen=True):
    """It could not be started at all. `lasting`: nor would it be the next time."""

    why: str
    lasting: bool = False


class Adopted(msgspec.Struct, frozen=True):
    """A process of an earlier agent was found alive.

    Attributes:
        ready: it was ready when it was last recorded; else it still starts.
    """

    pid: int
    ready: bool = True


class BecameReady(msgspec.Struct, frozen=True):
    """It can serve."""

    pid: int = 0


class Exited(msgspec.Struct, frozen=True):
    """Its process ended.

    Attributes:
        code: negative for a signal, None where it is not known.
        why: what its log says about that, a clause; empty where nothing was found.
        lasting: another start with the same settings would end in the same way.
    """

    code: int | None
    pid: int = 0
    why: str = ""
    lasting: bool = False


class ProgressSeen(msgspec.Struct, frozen=True):
    """It said how far it is; see `progress.read_progress`."""

    counter: int
    working: bool
    pid: int = 0


class ProgressMissed(msgspec.Struct, frozen=True):
    """It was asked how far it is and did not answer in time."""

    pid: int = 0


class ProbeAnswered(msgspec.Struct, frozen=True):
    """The probe that the machine asked for came back well."""

    pid: int = 0


class ProbeFailed(msgspec.Struct, frozen=True):
    """The probe that the machine asked for did not come back well, or not in time."""

    why: str
    pid: int = 0


class Tick(msgspec.Struct, frozen=True):
    """A deadline may have passed."""


Event = (
    StartAsked
    | StopAsked
    | RestartAsked
    | Spawned
    | SpawnFailed
    | Adopted
    | BecameReady
    | Exited
    | ProgressSeen
    | ProgressMissed
    | ProbeAnswered
    | ProbeFailed
    | Tick
)


# --- commands: what to do


class Spawn(msgspec.Struct, frozen=True):
    """Start the process; answer with `Spawned` or `SpawnFailed`, then with `BecameReady`."""

    cause: str


class Terminate(msgspec.Struct, frozen=True):
    """SIGTERM."""

    cause: str


class Kill(msgspec.Struct, frozen=True):
    """SIGKILL to all of it."""

    cause: str


class Probe(msgspec.Struct, frozen=True):
    """Ask it for one token, with a limit; answer with `ProbeAnswered` or `ProbeFailed`."""

    cause: str


class Report(msgspec.Struct, frozen=True):
    """Tell people, in one sentence."""

    sentence: str


Command = Spawn | Terminate | Kill | Probe | Report


class IllegalMoveError(RuntimeError):
    """The agent sent an event that cannot happen in this state: a fault of ours, never of an engine."""


class EngineLife:
    """The machine of one engine.

    Args:
        limits: how patient it is.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.state = State.STOPPED
        self.reason = "nobody has asked for it yet"
        self.pid: int | None = None
        self.history: deque[tuple[float, str]] = deque(maxlen=HISTORY_LIMIT)
        self._limits = limits or Limits()
        self._deaths: deque[float] = deque()
        self._streak = 0  # deaths since it last ran well
        self._lasting = 0  # of which the last so many will not go away by themselves
        self._ready_at = 0.0
        self._until: float | None = None  # the one deadline: of the start, of the stop, or of the wait
        self._killing = False
        self._after = After.STOPPED
        self._cause = ""  # why it stops
        self._progress = Progress()
        self._hung = False
        self._probing = False  # a probe is under way: never more than one
        self._probe_void = False  # and its failure would prove nothing, for the counters have moved since
        self._probe_at = 0.0

    @property
    def deaths(self) -> int:
        """How often it died within the last `hold_window_s` before the latest event; a person's start in HELD forgives them."""
        return len(self._deaths)

    @property
    def hung(self) -> bool:
        """True while its counters stand still under work: no new work for it. `reason` says so."""
        return self._hung

    @property
    def longest_step_s(self) -> float:
        """The longest step seen in all its lives; what a kill waits for is learnt from it."""
        return self._progress.longest_s

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it.

        Raises:
            IllegalMoveError: the event cannot happen in this state; nothing was changed.
        """
        kind = type(event)
        if kind in _OF_PROCESS and self._is_of_another(event):
            return []
        move = _MOVES[self.state].get(kind)
        if move is None or (kind in _NEEDS_PID and self.pid is None) or (kind in _NEEDS_NO_PID and self.pid is not None):
            raise IllegalMoveError(f"{kind.__name__} in state {self.state} with {f'pid {self.pid}' if self.pid else 'no process'}")
        self._forget_deaths(now)
        before = self.state
        commands = move(self, event, now)
        if self.state is not before or commands:
            self.history.append((now, f"{kind.__name__}: {before} -> {self.state}: {self.reason}"))
        return commands

    def next_deadline(self) -> float | None:
        """When it wants a `Tick`; None when only events can move it."""
        return self._until

    def check(self) -> None:
        """Asserts what is always true."""
        assert self.reason
        assert self.pid is None or self.state in _LIVE
        assert self.pid is not None or self.state is not State.RUNNING
        assert (self._until is not None) == (self.state is State.BACKOFF or (self.state in _BOUNDED and self.pid is not None))
        assert not self._hung or self.state is State.RUNNING
        assert not self._probing or self.state is State.RUNNING
        assert not self._probing or self._hung or self._probe_void
        assert not self._killing or self.state is State.STOPPING
        assert self.state is not State.BACKOFF or 0 < len(self._deaths) < self._limits.hold_deaths
        assert self.state is not State.BACKOFF or self._lasting < self._limits.hold_lasting
        assert len(self._deaths) <= self._limits.hold_deaths
        assert self._after is not After.DEATH or self.pid is not None

    def __repr__(self) -> str:
        return f"<EngineLife {self.state}{' hung' if self._hung else ''} pid={self.pid} deaths={len(self._deaths)}>"

    # --- moves: what somebody asks for

    def _start(self, event: StartAsked | RestartAsked, _now: float) -> list[Command]:
        return self._spawn(event.cause)

    def _start_anew(self, event: StartAsked | RestartAsked, _now: float) -> list[Command]:
        """Out of HELD by a person, who has looked at it: its past is forgiven."""
        self._deaths.clear()
        self._streak = self._lasting = 0
        return self._spawn(event.cause)

    def _start_after_stop(self, event: StartAsked | RestartAsked, _now: float) -> list[Command]:
        if self.pid is None:
            self._change(State.STARTING, f"it starts: {event.cause}")  # the spawn is still under way
        else:
            self._after = After.START
            self._cause = event.cause
        return []

    def _stop_live(self, event: StopAsked, now: float) -> list[Command]:
        return self._terminate(event.cause, After.STOPPED, now)

    def _restart_live(self, event: RestartAsked, now: float) -> list[Command]:
        return self._terminate(event.cause, After.START, now)

    def _stop_stopping(self, event: StopAsked, _now: float) -> list[Command]:
        self._after = After.STOPPED
        self._cause = event.cause
        return []

    def _stop_idle(self, event: StopAsked, _now: float) -> list[Command]:
        self._change(State.STOPPED, f"it was stopped: {event.cause}")
        return []

    def _stop_held(self, event: StopAsked, now: float) -> list[Command]:
        self._deaths.clear()  # whoever starts it after this is a person as well
        self._streak = self._lasting = 0
        return self._stop_idle(event, now)

    # --- moves: what happens to the process

    def _spawned(self, event: Spawned, now: float) -> list[Command]:
        self.pid = event.pid
        self._until = now + self._limits.start_limit_s
        return []

    def _spawned_late(self, event: Spawned, now: float) -> list[Command]:
        self.pid = event.pid
        return self._terminate(self._cause, self._after, now)

    def _adopted(self, event: Adopted, now: float) -> list[Command]:
        self.pid = event.pid
        if event.ready:
            self._run(f"pid {event.pid} of an earlier agent was adopted", now)
        else:
            self._change(
                State.STARTING, f"pid {event.pid} of an earlier agent was adopted while it starts", now + self._limits.start_limit_s
            )
        return [Report(self.reason)]

    def _became_ready(self, _event: Any, now: float) -> list[Command]:
        if self.pid is None:
            return []  # of the process before: the new one is not even spawned
        self._run("it is ready", now)
        self._lasting = 0
        return []

    def _spawn_failed(self, event: SpawnFailed, now: float) -> list[Command]:
        return self._die(event.why, now, lasting=event.lasting)

    def _exited(self, event: Exited, now: float) -> list[Command]:
        if self.state is State.RUNNING and now - self._ready_at >= self._limits.well_s:
            self._streak = 0
        when = " while it started" if self.state is State.STARTING else ""
        return self._die(
            f"it ended {_with(event.code)}{when}{f': {event.why}' if event.why else ''}", now, lasting=event.lasting and bool(when)
        )

    def _ended_as_asked(self, _event: Any, now: float) -> list[Command]:
        self.pid = None
        if self._after is After.DEATH:
            return self._die(self._cause, now)
        if self._after is After.START:
            return self._spawn(self._cause)
        self._change(State.STOPPED, f"it was stopped: {self._cause}")
        return []

    # --- moves: progress

    def _progress_seen(self, event: ProgressSeen, now: float) -> list[Command]:
        self._progress.seen(event.counter, event.working, now)
        return self._judge(now)

    def _progress_missed(self, _event: Any, now: float) -> list[Command]:
        self._progress.missed(now)
        return self._judge(now)

    def _judge(self, now: float) -> list[Command]:
        still_s = self._progress.still_s(now)
        if still_s < self._limits.hang_s:
            return self._recover()
        commands: list[Command] = []
        self.reason = f"its counters have stood still for {still_s:.1f} s although it has work"
        if not self._hung:
            self._hung = True
            commands.append(Report(f"it hangs: {self.reason}"))
        if still_s >= self._kill_after_s() and not self._probing and now >= self._probe_at:
            self._probing = True
            commands.append(Probe(self.reason))
        return commands

    def _recover(self) -> list[Command]:
        if not self._hung:
            return []
        self._hung = False
        self._probe_void = self._probing
        self.reason = "its counters move again, or it has no work left"
        return [Report(self.reason)]

    def _probe_answered(self, _event: Any, now: float) -> list[Command]:
        self._probing = self._probe_void = False
        self._probe_at = now + self._limits.probe_again_s
        return []

    def _probe_failed(self, event: ProbeFailed, now: float) -> list[Command]:
        counts = self._probing and not self._probe_void
        self._probing = self._probe_void = False
        if not counts:
            return []  # its counters moved meanwhile, or nobody asked
        return self._kill(f"{self.reason}, and a probe failed: {event.why}", now)

    # --- moves: time

    def _tick_starting(self, _event: Any, now: float) -> list[Command]:
        if not self._due(now):
            return []
        return self._kill(f"it was not ready {self._limits.start_limit_s:g} s after its start", now)

    def _tick_stopping(self, _event: Any, now: float) -> list[Command]:
        if not self._due(now):
            return []
        self._until = now + KILL_REPEAT_S
        if self._killing:
            return [Kill(f"it outlived a kill: {self._cause}")]
        self._killing = True
        return [Kill(f"it did not end within {self._limits.stop_limit_s:g} s: {self._cause}")]

    def _tick_backoff(self, _event: Any, now: float) -> list[Command]:
        return self._spawn(f"again after a death: {self.reason}") if self._due(now) else []

    def _nothing(self, _event: Any, _now: float) -> list[Command]:
        return []

    # --- what moves share

    def _spawn(self, cause: str) -> list[Command]:
        self._change(State.STARTING, f"it starts: {cause}")
        return [Spawn(cause)]

    def _run(self, reason: str, now: float) -> None:
        self._change(State.RUNNING, reason)
        self._ready_at = now
        self._progress = Progress(longest_s=self._progress.longest_s)

    def _terminate(self, cause: str, after: After, now: float) -> list[Command]:
        live = self.pid is not None
        self._change(State.STOPPING, f"it stops: {cause}", now + self._limits.stop_limit_s if live else None)
        self._after = after
        self._cause = cause
        return [Terminate(cause)] if live else []

    def _kill(self, cause: str, now: float) -> list[Command]:
        """Ends it for a fault of its own, which is a death."""
        if self.state is State.RUNNING and now - self._ready_at >= self._limits.well_s:
            self._streak = 0
        self._change(State.STOPPING, f"it is killed: {cause}", now + KILL_REPEAT_S)
        self._after = After.DEATH
        self._cause = cause
        self._killing = True
        return [Kill(cause), Report(self.reason)]

    def _die(self, why: str, now: float, *, lasting: bool = False) -> list[Command]:
        limits = self._limits
        self.pid = None
        self._deaths.append(now)
        self._lasting = self._lasting + 1 if lasting else 0
        if len(self._deaths) >= limits.hold_deaths or self._lasting >= limits.hold_lasting:
            when = f"{len(self._deaths)} deaths within {limits.hold_window_s:g} s"
            when = f"{self._lasting} starts that ended alike" if self._lasting >= limits.hold_lasting else when
            self._change(State.HELD, f"it is held after {when}, the last: {why}; start it when its cause is mended")
            return [Report(self.reason)]
        wait_s = min(limits.backoff_max_s, limits.backoff_first_s * 2.0 ** min(self._streak, 32))
        self._streak += 1
        self._change(State.BACKOFF, f"{why}; it is started again in {wait_s:g} s", now + wait_s)
        return [Report(self.reason)]

    def _change(self, state: State, reason: str, until: float | None = None) -> None:
        self.state = state
        self.reason = reason
        self._until = until
        self._killing = False
        self._after = After.STOPPED
        self._forget_hang()

    def _forget_hang(self) -> None:
        self._hung = self._probing = self._probe_void = False
        self._probe_at = 0.0

    def _forget_deaths(self, now: float) -> None:
        """Not in HELD, which they explain, nor the one that a BACKOFF waits for."""
        while self.state not in _EXPLAINED and self._deaths and now - self._deaths[0] > self._limits.hold_window_s:
            self._deaths.popleft()

    def _kill_after_s(self) -> float:
        return max(self._limits.hang_kill_s, self._limits.hang_steps * self._progress.longest_s)

    def _due(self, now: float) -> bool:
        return self._until is not None and now >= self._until

    def _is_of_another(self, event: Any) -> bool:
        return event.pid not in {0, self.pid}


def _with(code: int | None) -> str:
    if code is None:
        return "with a code that only init knows"
    return f"by signal {-code}" if code < 0 else f"with code {code}"


_LIVE = frozenset({State.STARTING, State.RUNNING, State.STOPPING})
_BOUNDED = frozenset({State.STARTING, State.STOPPING})
_EXPLAINED = frozenset({State.HELD, State.BACKOFF})
_OF_PROCESS = frozenset({BecameReady, Exited, ProgressSeen, ProgressMissed, ProbeAnswered, ProbeFailed})
_NEEDS_PID = frozenset({Exited})
_NEEDS_NO_PID = frozenset({Spawned, SpawnFailed, Adopted})

_Move = Callable[[EngineLife, Any, float], list[Command]]
_LATE = (BecameReady, ProgressSeen, ProgressMissed, ProbeAnswered, ProbeFailed)  # of a process that was there a moment ago


def _by_state(moves: Mapping[tuple[State, type], _Move]) -> Mapping[State, Mapping[type, _Move]]:
    return {state: {kind: move for (s, kind), move in moves.items() if s is state} for state in State}


_MOVES = _by_state(
    {
        **{(s, kind): EngineLife._nothing for s in State for kind in (*_LATE, Tick)},
        **{(s, kind): EngineLife._start for s in (State.STOPPED, State.BACKOFF) for kind in (StartAsked, RestartAsked)},
        **{(State.HELD, kind): EngineLife._start_anew for kind in (StartAsked, RestartAsked)},
        **{(State.STOPPING, kind): EngineLife._start_after_stop for kind in (StartAsked, RestartAsked)},
        **{(s, StartAsked): EngineLife._nothing for s in (State.STARTING, State.RUNNING)},
        **{(s, RestartAsked): EngineLife._restart_live for s in (State.STARTING, State.RUNNING)},
        **{(s, StopAsked): EngineLife._stop_live for s in (State.STARTING, State.RUNNING)},
        **{(s, StopAsked): EngineLife._stop_idle for s in (State.STOPPED, State.BACKOFF)},
        (State.HELD, StopAsked): EngineLife._stop_held,
        (State.STOPPING, StopAsked): EngineLife._stop_stopping,
        (State.STOPPED, Adopted): EngineLife._adopted,
        (State.STARTING, Spawned): EngineLife._spawned,
        (State.STOPPING, Spawned): EngineLife._spawned_late,
        (State.STARTING, SpawnFailed): EngineLife._spawn_failed,
        (State.STOPPING, SpawnFailed): EngineLife._ended_as_asked,
        (State.STARTING, BecameReady): EngineLife._became_ready,
        **{(s, Exited): EngineLife._exited for s in (State.STARTING, State.RUNNING)},
        (State.STOPPING, Exited): EngineLife._ended_as_asked,
        (State.RUNNING, ProgressSeen): EngineLife._progress_seen,
        (State.RUNNING, ProgressMissed): EngineLife._progress_missed,
        (State.RUNNING, ProbeAnswered): EngineLife._probe_answered,
        (State.RUNNING, ProbeFailed): EngineLife._probe_failed,
        (State.STARTING, Tick): EngineLife._tick_starting,
        (State.STOPPING, Tick): EngineLife._tick_stopping,
        (State.BACKOFF, Tick): EngineLife._tick_backoff,
    }
)
