"""Work on one engine that no entry of the router's explains, as a state machine.

Theory of operation. Several times a second the machine is told how many requests the engine says it has, and how many of them the router
knows of (its *entries*: live attempts, canaries among them). What an engine says is old when it arrives: its agent looks four times a
second, a heartbeat takes as long, and an engine that is slow to answer is believed for `UNANSWERED_S` of its keeper's. So the number of
requests is held against the greatest number of entries within the last `LATE_S`. What is more is an *excess*:

    CLEAN ──excess──► SUSPECTED ──grace──► ABORTING ──still there after STAYS_S──► STAYING
      ▲                    │                   │                                      │
      └──── no excess ─────┴───────────────────┴──────────────────────────────────────┘

SUSPECTED   nothing is done for `GRACE_S`, with entries on the same engine for `GRACE_BESIDE_S`: counts may be off by a little for a while
ABORTING    first the rids of attempts that failed there lately without the engine's word (it may still work for a connection that was
            closed); then, as long as no entry is there at all and the engine is the router's alone, all of it; again and again, ever slower
STAYING     aborts did not help: the engine is to be started anew, asked for every `RETRY_S` for as long as it stays

An engine that is met for the first time with work is another case: nothing of this router's can be there, so that its work is that of a
router before it. It is aborted at once, before the engine gets work from us.

An engine that is not the router's alone (given by URL, or attached) may have other clients: only the router's own rids are aborted there,
and what else it does is no orphan. Pages that an idle engine keeps (SGLang's quarantine) are no work and not looked at here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from disagg.model import EngineId
from disagg.policy.holds import Unexplained

LATE_S = 2.5
GRACE_S = 2.5
"""After `LATE_S` without an entry: five seconds in all."""
GRACE_BESIDE_S = 5.0
STAYS_S = 30.0
RETRY_S = 30.0
REPEAT_S = 1.0
REPEAT_MOST_S = 8.0
RIDS_FOR_S = 300.0
RIDS_KEPT = 1024
HISTORY_LIMIT = 64


class Phase(StrEnum):
    """Where the machine is."""

    CLEAN = "clean"
    SUSPECTED = "suspected"
    ABORTING = "aborting"
    STAYING = "staying"


class Looked(msgspec.Struct, frozen=True):
    """The engine says what it has.

    Attributes:
        process: its pid; another one has nothing of the earlier one's work. 0 where it is not known, which is no news.
        requests: how many it has.
        tokens: of the KV pool that they use.
        entries: how many of them the router knows of now.
        lone: all its work comes from this router.
    """

    process: int
    requests: int
    tokens: int
    entries: int
    lone: bool


class Met(msgspec.Struct, frozen=True):
    """The router heard of the engine for the first time, and has sent nothing there."""

    look: Looked


class Ended(msgspec.Struct, frozen=True):
    """An attempt with these rids failed here, and the engine may not know."""

    rids: tuple[str, ...]


class ReapAsked(msgspec.Struct, frozen=True):
    """A person wants what no entry explains aborted now."""


class Unseen(msgspec.Struct, frozen=True):
    """What the engine has is not known: it is not heard, or out of life."""


class Stalled(msgspec.Struct, frozen=True):
    """The router itself did not run for this long."""

    lag_s: float


class Found(msgspec.Struct, frozen=True):
    """Say that there are orphans."""

    engine: EngineId
    requests: int
    tokens: int
    for_s: float


class AbortRids(msgspec.Struct, frozen=True):
    """Abort these on the engine."""

    engine: EngineId
    rids: tuple[str, ...]


class AbortAll(msgspec.Struct, frozen=True):
    """Abort everything on the engine. Only if nothing of ours is there at that very moment."""

    engine: EngineId


class Restart(msgspec.Struct, frozen=True):
    """Drain the engine and start it anew."""

    engine: EngineId
    reason: str


class Gone(msgspec.Struct, frozen=True):
    """Say that the orphans are gone. `requests`: the most that there were."""

    engine: EngineId
    requests: int
    for_s: float


Event = Looked | Met | Ended | ReapAsked | Unseen | Stalled
Command = Found | AbortRids | AbortAll | Restart | Gone


class Orphans:
    """The machine of one engine.

    Attributes:
        phase: where it is.
        excess: requests that no entry explains, as of the last look.
    """

    def __init__(self, engine: EngineId) -> None:
        self.engine = engine
        self.phase = Phase.CLEAN
        self.excess = 0
        self.history: deque[tuple[float, str]] = deque(maxlen=HISTORY_LIMIT)
        self._look: Looked | None = None
        self._process = 0
        self._entries: deque[tuple[float, int]] = deque()
        self._rids: deque[tuple[float, str]] = deque(maxlen=RIDS_KEPT)
        self._clear()

    def _clear(self) -> None:
        self._since: float | None = None
        self._worst = 0
        self._act_at = 0.0
        self._restart_at = 0.0
        self._wait_s = REPEAT_S
        self._asked_rids = False
        self._dark_at: float | None = None

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it."""
        before = self.phase
        commands = _MOVES[type(event)](self, event, now)
        if self.phase is not before:
            self.history.append((now, f"{type(event).__name__}: {before} -> {self.phase}, {self.excess} unexplained"))
        return commands

    def next_deadline(self) -> float | None:
        """When the next look brings something, if nothing changes until then; None while everything is explained."""
        return None if self._since is None else self._act_at

    def unexplained(self, now: float) -> Unexplained | None:
        """What people are shown; None while there is no orphan."""
        if self.phase not in _AT_WORK or self._since is None or self._look is None:
            return None
        return Unexplained(self.excess, self._tokens(), now - self._since, _NOTES[self.phase].format(self.excess))

    def check(self) -> None:
        """Asserts what is always true."""
        assert (self.phase is Phase.CLEAN) == (self._since is None)
        assert (self.phase is Phase.CLEAN) == (self.excess == 0)
        assert self._worst >= self.excess
        assert len(self._rids) <= RIDS_KEPT
        assert self._wait_s <= REPEAT_MOST_S
        assert self.phase not in _AT_WORK or self._look is not None

    def __repr__(self) -> str:
        return f"<Orphans {self.engine} {self.phase} excess={self.excess} rids={len(self._rids)}>"

    # --- moves

    def _on_look(self, look: Looked, now: float) -> list[Command]:
        commands: list[Command] = []
        if self._dark_at is not None:
            self._on_stall(Stalled(now - self._dark_at), now)
            self._dark_at = None
        if look.process and look.process != self._process:
            commands = self._end(now) if self._process else []
            self._process = look.process
            self._entries.clear()
            self._rids.clear()
        self._look = look
        expected = self._expected(look.entries, now)
        self.excess = max(0, look.requests - expected)
        self._worst = max(self._worst, self.excess)
        if not self.excess:
            return commands + self._end(now)
        if self._since is None:
            self.phase, self._since = Phase.SUSPECTED, now
        if self.phase is Phase.SUSPECTED:
            self._act_at = self._since + (GRACE_BESIDE_S if expected else GRACE_S)
        return commands + (self._act(look, now) if now >= self._act_at else [])

    def _on_meeting(self, event: Met, now: float) -> list[Command]:
        commands = self._on_look(event.look, now)
        return self._act(event.look, now) if self.phase is Phase.SUSPECTED and event.look.lone else commands

    def _on_end(self, event: Ended, now: float) -> list[Command]:
        self._rids.extend((now, rid) for rid in event.rids)
        return []

    def _on_order(self, _event: Any, now: float) -> list[Command]:
        if self._since is None or self._look is None:
            return []
        self._wait_s = REPEAT_S
        return self._act(self._look, now)

    def _on_darkness(self, _event: Any, now: float) -> list[Command]:
        self._entries.clear()
        if self.phase in _AT_WORK:  # a new process, or the next look, says what became of it
            self._dark_at = now if self._dark_at is None else self._dark_at
            return []
        self.phase, self.excess = Phase.CLEAN, 0
        self._clear()
        return []

    def _on_stall(self, event: Stalled, now: float) -> list[Command]:
        """Nothing was looked at meanwhile, so nothing has lasted longer."""
        self._entries = deque((min(now, at + event.lag_s), count) for at, count in self._entries)
        if self._since is not None:
            self._since = min(now, self._since + event.lag_s)
            self._act_at += event.lag_s
            self._restart_at += event.lag_s
        return []

    # --- what moves share

    def _expected(self, entries: int, now: float) -> int:
        self._entries.append((now, entries))
        while self._entries[0][0] < now - LATE_S:
            self._entries.popleft()
        return max(count for _, count in self._entries)

    def _act(self, look: Looked, now: float) -> list[Command]:
        rids = self._rids_to_ask(now)
        if not look.lone:  # the rest may be somebody else's work
            self._rids.clear()
            return [AbortRids(self.engine, rids)] if rids else []
        commands = self._find(now) if self.phase is Phase.SUSPECTED else []
        if rids:
            commands.append(AbortRids(self.engine, rids))
        if look.entries == 0 and (self._asked_rids or not rids):
            commands.append(AbortAll(self.engine))
        self._asked_rids = self._asked_rids or bool(rids)
        if now >= self._restart_at:
            self.phase = Phase.STAYING
            self._restart_at = now + RETRY_S
            commands.append(Restart(self.engine, self._reason(now)))
        if commands:
            self._act_at = now + self._wait_s
            self._wait_s = min(2 * self._wait_s, REPEAT_MOST_S)
        return commands

    def _find(self, now: float) -> list[Command]:
        assert self._since is not None
        self.phase = Phase.ABORTING
        self._restart_at = now + STAYS_S
        return [Found(self.engine, self.excess, self._tokens(), now - self._since)]

    def _rids_to_ask(self, now: float) -> tuple[str, ...]:
        while self._rids and self._rids[0][0] < now - RIDS_FOR_S:
            self._rids.popleft()
        return tuple(dict.fromkeys(rid for _, rid in self._rids))

    def _reason(self, now: float) -> str:
        assert self._since is not None
        return f"it holds KV pages for {self.excess} requests that nobody sent and does not let go of them for {now - self._since:.0f} s"

    def _tokens(self) -> int:
        """The share of the excess: no engine says whose pages are whose."""
        assert self._look is not None
        return self._look.tokens * self.excess // max(1, self._look.requests)

    def _end(self, now: float) -> list[Command]:
        found, since, worst = self.phase in _AT_WORK, self._since, self._worst
        self.phase, self.excess = Phase.CLEAN, 0
        self._clear()
        if not found or since is None:
            return []
        self._rids.clear()
        return [Gone(self.engine, worst, now - since)]


_AT_WORK = frozenset({Phase.ABORTING, Phase.STAYING})
_NOTES = {
    Phase.ABORTING: "{} requests run there that nobody sent; they are being aborted",
    Phase.STAYING: "{} requests run there that nobody sent and that no abort ends; it is to be started anew",
}
_MOVES: Mapping[type, Callable[[Orphans, Any, float], list[Command]]] = {
    Looked: Orphans._on_look,
    Met: Orphans._on_meeting,
    Ended: Orphans._on_end,
    ReapAsked: Orphans._on_order,
    Unseen: Orphans._on_darkness,
    Stalled: Orphans._on_stall,
}
