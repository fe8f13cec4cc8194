"""Which hosts belong to the cluster, and which of them can be reached. One state machine for all of them.

Theory of operation. A host is known by its key; the key was registered under a name before it came here, so nobody can take another one's
name. Its agent says hello with an incarnation, which counts its starts, and a nonce, which tells a clone of its state directory from
itself. One incarnation of a host holds its seat at a time:

- the same incarnation and nonce again is the same agent over a new connection: it keeps its seat, unless it has said goodbye;
- a lower incarnation than the seat's is stale and refused for good, a copy of an old state directory above all;
- another one while anything was heard of the seat's holder within `SUSPECT_S` is refused, with the reason, and may try again: a clone stays
  out as long as the original lives, and an agent that was killed and started again gets in as soon as its predecessor is silent;
- heartbeats of an incarnation that holds no seat are fenced: they change nothing, and their sender is told so.

The heartbeats of one incarnation are numbered. The one with the highest number is the newest word and says by which connection the host is
reached now; what is not higher than the last one, repeated or overtaken on the way, changes nothing.

A host is alive while both directions work. Each heartbeat repeats the number of the last acknowledgement that arrived, so the machine knows
when it last sent something that was heard: that moment, not the arrival of a heartbeat or a hello, counts (`proved_at`).

             hello                  silent for SUSPECT_S            silent for SILENT_S
  (unknown) ──────► ONLINE ─────────────────────► SUSPECT ─────────────────────► SILENT
                      ▲ └──── goodbye ──► LEFT       │                             │
                      └──────────────────────────────┴───── proved again ──────────┘

SUSPECT means: no new work. SILENT means: whoever has work there must ask the engines themselves; that a host cannot be heard does not say
that its engines are dead. Time that the router itself was asleep (`Stalled`) counts for nobody's silence. A state gets worse on a `Tick`
only, which comes after the `Stalled`: a heartbeat that lay in a queue while the router slept accuses nobody. It gets better on a proof
only.

A seat is kept until its host is revoked, so there are no more seats than registered hosts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import msgspec

from disagg.model import HostId, HostState, HostView
from disagg.wire.messages import EngineReport

SUSPECT_S = 1.0
SILENT_S = 2.0
LATELY_S = 0.5
"""Who was heard within this still sends: a proof is older than the heartbeat that brings it, so silence begins before the last one."""
ACKS_KEPT = 64
HISTORY_LIMIT = 256


class HelloSeen(msgspec.Struct, frozen=True):
    """An authenticated host said hello.

    Attributes:
        host: the name under which its key is registered.
        session: where answers to it go.
    """

    host: HostId
    session: bytes
    incarnation: int
    nonce: str
    address: str = ""
    release: str = ""
    engines: tuple[EngineReport, ...] = ()


class HeartbeatSeen(msgspec.Struct, frozen=True):
    """A heartbeat arrived over an authenticated connection."""

    host: HostId
    session: bytes
    incarnation: int
    nonce: str
    seq: int
    acked: int
    engines: tuple[EngineReport, ...] = ()


class GoodbyeSeen(msgspec.Struct, frozen=True):
    """A host's agent ends."""

    host: HostId
    incarnation: int
    nonce: str
    engines_stay: bool = False


class HostRevoked(msgspec.Struct, frozen=True):
    """A person took the host's key away."""

    host: HostId


class Stalled(msgspec.Struct, frozen=True):
    """The router itself did not run for this long."""

    lag_s: float


class Tick(msgspec.Struct, frozen=True):
    """Somebody may have been silent for too long."""


class SendWelcome(msgspec.Struct, frozen=True):
    """Tell the host that it belongs to the cluster."""

    host: HostId
    session: bytes


class SendRefusal(msgspec.Struct, frozen=True):
    """Tell a host why not. `final`: trying again cannot help."""

    host: HostId
    session: bytes
    reason: str
    final: bool = False


class SendAck(msgspec.Struct, frozen=True):
    """Acknowledge a heartbeat."""

    session: bytes
    seq: int


class TakeReports(msgspec.Struct, frozen=True):
    """This is how the host's engines are."""

    host: HostId
    engines: tuple[EngineReport, ...]


class PublishHost(msgspec.Struct, frozen=True):
    """The host's view changed."""

    view: HostView


class ForgetHost(msgspec.Struct, frozen=True):
    """The host is no longer part of the cluster, and neither are its engines."""

    host: HostId
    cause: str


Event = HelloSeen | HeartbeatSeen | GoodbyeSeen | HostRevoked | Stalled | Tick
Command = SendWelcome | SendRefusal | SendAck | TakeReports | PublishHost | ForgetHost


class _Seat:
    """What is known of the incarnation that holds a host's seat.

    Attributes:
        heard_at: when anything of it arrived last.
        proved_at: when the last thing was sent to it of which it is known to have heard.
        seq: of the newest heartbeat.
    """

    __slots__ = ("acks", "engines_stay", "heard_at", "incarnation", "nonce", "proved_at", "seq", "session", "view")

    def __init__(self, event: HelloSeen, now: float) -> None:
        self.incarnation = event.incarnation
        self.nonce = event.nonce
        self.session = event.session
        self.seq = 0
        self.heard_at = self.proved_at = now
        self.acks: deque[tuple[int, float]] = deque(maxlen=ACKS_KEPT)  # (seq, when its acknowledgement was sent)
        self.engines_stay = False
        self.view = HostView(event.host, HostState.ONLINE, event.address, event.incarnation, event.release, "it joined")

    def is_of(self, incarnation: int, nonce: str) -> bool:
        return self.incarnation == incarnation and self.nonce == nonce


class Members:
    """The machine.

    Attributes:
        fenced: messages of incarnations that held no seat, since the start.
    """

    def __init__(self) -> None:
        self.history: deque[tuple[float, HostId, str]] = deque(maxlen=HISTORY_LIMIT)
        self.fenced = 0
        self._seats: dict[HostId, _Seat] = {}

    @property
    def hosts(self) -> list[HostView]:
        """Every host that has a seat, by name."""
        return [self._seats[name].view for name in sorted(self._seats)]

    def state(self, host: HostId) -> HostState | None:
        """Where a host is; None for one that has no seat."""
        seat = self._seats.get(host)
        return None if seat is None else seat.view.state

    def engines_stay(self, host: HostId) -> bool:
        """Whether the engines of a host that left go on without their agent."""
        seat = self._seats.get(host)
        return seat is not None and seat.engines_stay

    def session(self, host: HostId) -> bytes | None:
        """Where messages to this host go; None when nobody is there to hear them."""
        seat = self._seats.get(host)
        return None if seat is None or seat.view.state is HostState.LEFT else seat.session

    def holds_seat(self, host: HostId, incarnation: int, nonce: str) -> bool:
        """Whether this is the agent that speaks for its host."""
        seat = self._seats.get(host)
        return seat is not None and seat.is_of(incarnation, nonce) and seat.view.state is not HostState.LEFT

    def story(self, host: HostId) -> list[tuple[float, str]]:
        """What happened to one host, as far as it is kept."""
        return [(at, what) for at, name, what in self.history if name == host]

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it."""
        return _MOVES[type(event)](self, event, now)

    def next_deadline(self) -> float | None:
        """When the next host would have been silent for too long; None when no host is left to wait for."""
        dues = (seat.proved_at + _WORSE[seat.view.state][1] for seat in self._seats.values() if seat.view.state in _WORSE)
        return min(dues, default=None)

    def check(self) -> None:
        """Asserts what is always true."""
        for name, seat in self._seats.items():
            assert seat.view.id == name
            assert seat.view.incarnation == seat.incarnation
            assert seat.proved_at <= seat.heard_at
            assert all(a < b for (a, _), (b, _) in pairwise(seat.acks))
            assert all(number <= seat.seq for number, _ in seat.acks)
            assert seat.view.reason

    def __repr__(self) -> str:
        counts = {state: sum(s.view.state is state for s in self._seats.values()) for state in HostState}
        return f"<Members {' '.join(f'{state}={n}' for state, n in counts.items() if n) or 'none'} fenced={self.fenced}>"

    # --- moves

    def _hello(self, event: HelloSeen, now: float) -> list[Command]:
        seat = self._seats.get(event.host)
        if seat is None:
            return self._seat_anew(event, now)
        if seat.is_of(event.incarnation, event.nonce):
            return self._welcome_again(seat, event, now)
        if event.incarnation < seat.incarnation:
            return [self._refuse(event, _why_stale(seat, event), final=True)]
        if seat.view.state is not HostState.LEFT and now - seat.heard_at < SUSPECT_S:
            return [self._refuse(event, _why_taken(seat, event))]
        return self._seat_anew(event, now)

    def _seat_anew(self, event: HelloSeen, now: float) -> list[Command]:
        seat = self._seats[event.host] = _Seat(event, now)
        self._note(event.host, f"incarnation {event.incarnation} joined", now)
        return [SendWelcome(event.host, event.session), PublishHost(seat.view), TakeReports(event.host, event.engines)]

    def _welcome_again(self, seat: _Seat, event: HelloSeen, now: float) -> list[Command]:
        """Nothing is proved by it: a host that hears nothing of us would say it again and again."""
        if seat.view.state is HostState.LEFT:
            self.fenced += 1  # it was under way when its agent said goodbye
            return [self._refuse(event, f"incarnation {event.incarnation} of {event.host} said goodbye: start its agent again")]
        seat.session = event.session
        seat.heard_at = now
        return [SendWelcome(event.host, event.session), TakeReports(event.host, event.engines)]

    def _heartbeat(self, event: HeartbeatSeen, now: float) -> list[Command]:
        seat = self._seats.get(event.host)
        if seat is None or not seat.is_of(event.incarnation, event.nonce) or seat.view.state is HostState.LEFT:
            return self._fence(event)
        if event.seq <= seat.seq:
            self.fenced += 1  # repeated or overtaken
            return []
        seat.seq, seat.session = event.seq, event.session
        seat.heard_at = now
        self._prove(seat, event.acked)
        seat.acks.append((event.seq, now))
        return [SendAck(event.session, event.seq), *self._recover(seat, now), TakeReports(event.host, event.engines)]

    def _fence(self, event: HeartbeatSeen) -> list[Command]:
        self.fenced += 1
        return [SendRefusal(event.host, event.session, "this incarnation does not hold the host's seat: say hello again")]

    def _goodbye(self, event: GoodbyeSeen, now: float) -> list[Command]:
        seat = self._seats.get(event.host)
        if seat is None or not seat.is_of(event.incarnation, event.nonce) or seat.view.state is HostState.LEFT:
            self.fenced += 1
            return []
        seat.engines_stay = event.engines_stay
        why = "its agent stopped; its engines go on" if event.engines_stay else "its agent stopped and took its engines down"
        return self._change(seat, HostState.LEFT, why, now)

    def _revoked(self, event: HostRevoked, now: float) -> list[Command]:
        seat = self._seats.pop(event.host, None)
        self._note(event.host, "revoked", now)
        if seat is None:
            return []
        refusal = SendRefusal(event.host, seat.session, "its key was revoked: it can come back with a new token only", final=True)
        return [refusal, ForgetHost(event.host, "its key was revoked")]

    def _stalled(self, event: Stalled, now: float) -> list[Command]:
        for seat in self._seats.values():
            seat.proved_at = min(now, seat.proved_at + event.lag_s)
            seat.heard_at = max(seat.proved_at, min(now, seat.heard_at + event.lag_s))
        return []

    def _tick(self, _event: Any, now: float) -> list[Command]:
        return [command for seat in self._seats.values() for command in self._judge(seat, now)]

    # --- what moves share

    def _prove(self, seat: _Seat, acked: int) -> None:
        """The host heard this acknowledgement: both directions worked when it was sent."""
        while seat.acks and seat.acks[0][0] <= acked:
            seat.proved_at = max(seat.proved_at, seat.acks.popleft()[1])

    def _recover(self, seat: _Seat, now: float) -> list[Command]:
        if now - seat.proved_at < SUSPECT_S and seat.view.state is not HostState.ONLINE:
            return self._change(seat, HostState.ONLINE, "it answers", now)
        return []

    def _judge(self, seat: _Seat, now: float) -> list[Command]:
        due = _WORSE.get(seat.view.state)
        if due is None or now < seat.proved_at + due[1]:
            return []
        state, patience_s = _WORSE[HostState.SUSPECT] if now >= seat.proved_at + SILENT_S else due
        if now - seat.heard_at < LATELY_S:
            return self._change(seat, state, f"its heartbeats arrive, but for {patience_s:g} s it has not heard ours", now)
        return self._change(seat, state, f"no heartbeat for {patience_s:g} s", now)

    def _change(self, seat: _Seat, state: HostState, reason: str, now: float) -> list[Command]:
        before = seat.view
        seat.view = msgspec.structs.replace(before, state=state, reason=reason)
        if state is not before.state:
            self._note(before.id, f"{before.state} -> {state}: {reason}", now)
        return [] if seat.view == before else [PublishHost(seat.view)]

    def _refuse(self, event: HelloSeen, reason: str, *, final: bool = False) -> SendRefusal:
        return SendRefusal(event.host, event.session, reason, final)

    def _note(self, host: HostId, what: str, now: float) -> None:
        self.history.append((now, host, what))


_WORSE = {HostState.ONLINE: (HostState.SUSPECT, SUSPECT_S), HostState.SUSPECT: (HostState.SILENT, SILENT_S)}


def _why_stale(seat: _Seat, event: HelloSeen) -> str:
    return (
        f"it calls itself incarnation {event.incarnation} of {event.host}, and incarnation {seat.incarnation} was here before: either an"
        " agent that was started later runs on this state directory, or the directory is an old copy; stop this one, or remove the copy and"
        " join with a new token"
    )


def _why_taken(seat: _Seat, event: HelloSeen) -> str:
    if seat.incarnation == event.incarnation:
        return (
            f"a clone: {event.host} incarnation {seat.incarnation} is alive elsewhere with the same state directory;"
            " give this machine another --name and a token of its own"
        )
    return f"incarnation {seat.incarnation} of {event.host} is still alive; two agents must not share one state directory"


_Move = Callable[[Members, Any, float], list[Command]]
_MOVES: Mapping[type, _Move] = {
    HelloSeen: Members._hello,
    HeartbeatSeen: Members._heartbeat,
    GoodbyeSeen: Members._goodbye,
    HostRevoked: Members._revoked,
    Stalled: Members._stalled,
    Tick: Members._tick,
}
