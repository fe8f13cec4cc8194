"""One attempt of a request over two engines, as a state machine.

Theory of operation. The router posts the same body to a prefill and a decode engine at once (SGLang's protocol: prefill's answer comes only
after its KV cache was handed over, which needs the decode leg). What the router can see of an attempt is when the legs were sent, when
prefill's answer ended, when decode's first byte came and when decode's answer ended. The states keep SGLang's words and mean, seen from
here:

    NEW ──► BOOTSTRAPPING ──► PREFILLING ──► TRANSFERRING ──► DECODING ──► DONE
             connecting        both legs      prefill's        decode's      decode's answer
             to both           were sent      answer ended     first byte    ended as it should
                └──────────────────┴───────────────┴──────────────┴─────► FAILED (an engine, a deadline)
                                                                   └────► ABORTED (the client left)

TRANSFERRING is skipped when decode's first token overtakes the end of prefill's answer, which is usual. A unified engine has no prefill leg
and goes from PREFILLING to DECODING. DONE, FAILED and ABORTED are final for the client, but a leg may still live on an engine then: its KV
pages are held until it ends. So a final machine keeps asking for ticks until it is `settled`: it aborts by rid, repeats that every 250 ms
(an abort that overtakes its own request is lost in SGLang) and closes the connection after 1 s. Closing alone is not enough: SGLang notices
a closed whole-answer request only after seconds.

One machine is one attempt and has one room; a retry is a new machine with a new room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from disagg.errors import ClientGoneError, DeadlineError, DisaggError, EngineError, EngineTimeoutError

ABORT_REPEAT_S = 0.25
CLOSE_AFTER_S = 1.0
HISTORY_LIMIT = 64


class State(StrEnum):
    """Where an attempt is; the last three are final."""

    NEW = "new"
    BOOTSTRAPPING = "bootstrapping"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


FINAL = frozenset({State.DONE, State.FAILED, State.ABORTED})


class Limits(msgspec.Struct, frozen=True):
    """How long each phase may take, in seconds.

    Attributes:
        connect_s: until both engines are connected.
        handover_s: from sending to the end of prefill's answer, which comes when the KV cache is handed over.
        first_token_s: from sending to decode's first byte (for a whole answer: to its end, as nothing is seen before).
        between_tokens_s: between two reads from decode.
        linger_s: how long prefill's answer may outlive decode's before it is aborted.
    """

    connect_s: float = 2.0
    handover_s: float = 60.0
    first_token_s: float = 60.0
    between_tokens_s: float = 60.0
    linger_s: float = 5.0


# --- events: what happened


class Dispatched(msgspec.Struct, frozen=True, gc=False):
    """The pair was chosen and is being connected."""


class LegsSent(msgspec.Struct, frozen=True, gc=False):
    """Every leg's request was written to its connection."""


class PrefillFinished(msgspec.Struct, frozen=True, gc=False):
    """Prefill's answer ended with success: its KV pages are handed over."""


class PrefillFailed(msgspec.Struct, frozen=True):
    """Prefill refused, closed early, or could not be connected."""

    error: EngineError


class FirstTokenSeen(msgspec.Struct, frozen=True, gc=False):
    """The first bytes of decode's answer arrived."""


class DecodeFinished(msgspec.Struct, frozen=True, gc=False):
    """Decode's answer is whole."""


class DecodeFailed(msgspec.Struct, frozen=True):
    """Decode refused, closed early, sent garbage, or could not be connected."""

    error: EngineError


class ClientLeft(msgspec.Struct, frozen=True, gc=False):
    """Nobody is left to read the answer."""


class Tick(msgspec.Struct, frozen=True, gc=False):
    """A deadline may have passed.

    Attributes:
        last_read_at: when decode's bytes were last seen; the hot path notes it instead of sending an event per chunk.
    """

    last_read_at: float = 0.0


Event = Dispatched | LegsSent | PrefillFinished | PrefillFailed | FirstTokenSeen | DecodeFinished | DecodeFailed | ClientLeft | Tick


# --- commands: what to do


class SendLegs(msgspec.Struct, frozen=True, gc=False):
    """Connect and send both legs (or the only one)."""


class AbortPrefill(msgspec.Struct, frozen=True, gc=False):
    """Tell the prefill engine to abort, by rid."""

    cause: str


class AbortDecode(msgspec.Struct, frozen=True, gc=False):
    """Tell the decode engine to abort, by rid."""

    cause: str


class ClosePrefill(msgspec.Struct, frozen=True, gc=False):
    """The abort did not end prefill's leg in time: close its connection."""


class CloseDecode(msgspec.Struct, frozen=True, gc=False):
    """The abort did not end decode's leg in time: close its connection."""


class FinishClient(msgspec.Struct, frozen=True, gc=False):
    """The client has the whole answer."""


class FailClient(msgspec.Struct, frozen=True):
    """The client gets this error (or another attempt is made, where nothing was lost yet)."""

    error: DisaggError


Command = SendLegs | AbortPrefill | AbortDecode | ClosePrefill | CloseDecode | FinishClient | FailClient


class IllegalMoveError(RuntimeError):
    """The relay sent an event that cannot happen in this state: a fault of ours, never of a peer."""


class Handoff:
    """The machine of one attempt.

    Args:
        paired: True for a prefill and a decode leg, False for one unified engine.
        limits: how long each phase may take.
        deadline_at: when the client's patience ends, on the same clock as ``now``; None without one.
    """

    __slots__ = (
        "_abort_at",
        "_close_at",
        "_deadline_at",
        "_limits",
        "_sent_at",
        "_until",
        "decode_live",
        "error",
        "history",
        "paired",
        "prefill_live",
        "state",
    )

    def __init__(self, *, paired: bool, limits: Limits, deadline_at: float | None = None) -> None:
        self.state = State.NEW
        self.paired = paired
        self.prefill_live = False
        self.decode_live = False
        self.error: DisaggError | None = None
        self.history: list[tuple[float, str]] = []
        self._limits = limits
        self._deadline_at = deadline_at
        self._sent_at = 0.0
        self._until: float | None = None
        self._abort_at = 0.0
        self._close_at: float | None = None

    @property
    def settled(self) -> bool:
        """True when the attempt is final and no engine works for it any more."""
        return self.state in FINAL and not self.prefill_live and not self.decode_live

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it.

        Raises:
            IllegalMoveError: the event cannot happen in this state; nothing was changed.
        """
        kind = type(event)
        move = _MOVES[self.state].get(kind)
        if move is None or (not self.paired and kind in _OF_PREFILL):
            raise IllegalMoveError(f"{type(event).__name__} in state {self.state}{'' if self.paired else ' of a unified engine'}")
        commands = move(self, event, now)
        if (kind is not Tick or commands) and len(self.history) < HISTORY_LIMIT:
            self.history.append((now, kind.__name__))
        return commands

    def next_deadline(self) -> float | None:
        """When this machine wants a `Tick`; None when it is settled."""
        if self.state in FINAL:
            return self._abort_at if self.prefill_live or self.decode_live else None
        return self._until

    def check(self) -> None:
        """Asserts what is always true."""
        assert self.paired or not self.prefill_live
        assert self.state not in {State.NEW, State.BOOTSTRAPPING} or not (self.prefill_live or self.decode_live)
        assert (self.error is not None) == (self.state in {State.FAILED, State.ABORTED})
        assert not self.settled or self.next_deadline() is None
        assert self.settled or self.state is State.NEW or self.next_deadline() is not None

    def __repr__(self) -> str:
        legs = [name for name, live in (("prefill", self.prefill_live), ("decode", self.decode_live)) if live]
        return f"<Handoff {self.state} live={'+'.join(legs) or 'none'} events={len(self.history)}>"

    # --- moves

    def wait_longer(self, until: float) -> None:
        """The engine that reads the prompt was seen to be at work: it may take until then. The client's own deadline stays."""
        if self.state is State.PREFILLING and self._until is not None and until > self._until:
            self._wait_until(until)

    def _wait_until(self, at: float) -> None:
        self._until = at if self._deadline_at is None else min(at, self._deadline_at)

    def _dispatched(self, _event: Any, now: float) -> list[Command]:
        self.state = State.BOOTSTRAPPING
        self._wait_until(now + self._limits.connect_s)
        return [SendLegs()]

    def _legs_sent(self, _event: Any, now: float) -> list[Command]:
        self.state = State.PREFILLING
        self.prefill_live = self.paired
        self.decode_live = True
        self._sent_at = now
        limits = self._limits
        self._wait_until(now + (min(limits.handover_s, limits.first_token_s) if self.paired else limits.first_token_s))
        return []

    def _prefill_finished(self, _event: Any, now: float) -> list[Command]:
        self.prefill_live = False
        if self.state is State.PREFILLING:
            self.state = State.TRANSFERRING
            limits = self._limits
            later_s = now - (self._sent_at + min(limits.handover_s, limits.first_token_s))  # than the limit: it was waited for longer
            until = self._sent_at + limits.first_token_s
            self._wait_until(until if later_s <= 0.0 else until + later_s + limits.linger_s)
        return []

    def _prefill_failed(self, event: PrefillFailed, now: float) -> list[Command]:
        self.prefill_live = False
        return self._fail(event.error, now)

    def _prefill_failed_late(self, _event: Any, _now: float) -> list[Command]:
        # Decode has the KV cache: what becomes of prefill no longer matters to this request.
        self.prefill_live = False
        return []

    def _first_token_seen(self, _event: Any, now: float) -> list[Command]:
        self.state = State.DECODING
        self._wait_until(now + self._limits.between_tokens_s)
        return []

    def _first_token_too_late(self, _event: Any, _now: float) -> list[Command]:
        return []  # the abort is on its way

    def _decode_finished(self, _event: Any, now: float) -> list[Command]:
        self.state = State.DONE
        self.decode_live = False
        self._abort_at = now + self._limits.linger_s
        return [FinishClient()]

    def _decode_failed(self, event: DecodeFailed, now: float) -> list[Command]:
        self.decode_live = False
        return self._fail(event.error, now)

    def _client_left(self, _event: Any, now: float) -> list[Command]:
        self.state = State.ABORTED
        self.error = ClientGoneError("the client closed its connection before the answer was complete")
        return self._abort_legs("the client left", now)

    def _decode_ended_late(self, _event: Any, _now: float) -> list[Command]:
        self.decode_live = False
        return []

    def _tick(self, event: Tick, now: float) -> list[Command]:
        if self.state is State.DECODING:
            self._wait_until(event.last_read_at + self._limits.between_tokens_s)
        if self._until is None or now < self._until:
            return []
        return self._fail(self._why_late(now), now)

    def _tick_final(self, _event: Any, now: float) -> list[Command]:
        if self.settled or now < self._abort_at:
            return []
        if self._close_at is not None and now >= self._close_at:
            self._abort_at = now + ABORT_REPEAT_S  # the connection's end reports the leg's end
            return self._for_live_legs(ClosePrefill(), CloseDecode())
        return self._abort_legs("its leg has not ended", now)

    # --- what moves share

    def _why_late(self, now: float) -> DisaggError:
        if self._deadline_at is not None and now >= self._deadline_at:
            phase = "its answer was made" if self.state is State.TRANSFERRING else self.state
            return DeadlineError(f"the request's own deadline passed while {phase}")
        if self.state is State.BOOTSTRAPPING:
            return EngineTimeoutError(f"the engines could not be connected within {self._limits.connect_s:g} s")
        if self.state is State.DECODING:
            why = f"the decode engine sent nothing for {self._limits.between_tokens_s:g} s in the middle of its answer"
            return EngineTimeoutError(why)
        if self.state is State.PREFILLING and self.paired and self._limits.handover_s < self._limits.first_token_s:
            return EngineTimeoutError(f"the prompt was not read and handed over within {self._allowed_s():.3g} s")
        return EngineTimeoutError(f"no answer began within {self._allowed_s():.3g} s")

    def _allowed_s(self) -> float:
        return self._limits.first_token_s if self._until is None else self._until - self._sent_at

    def _fail(self, error: DisaggError, now: float) -> list[Command]:
        self.state = State.FAILED
        self.error = error
        return [FailClient(error), *self._abort_legs("the attempt failed", now)]

    def _abort_legs(self, cause: str, now: float) -> list[Command]:
        self._abort_at = now + ABORT_REPEAT_S
        if self._close_at is None:
            self._close_at = now + CLOSE_AFTER_S
        return self._for_live_legs(AbortPrefill(cause), AbortDecode(cause))

    def _for_live_legs(self, prefill: Command, decode: Command) -> list[Command]:
        return [c for c, live in ((prefill, self.prefill_live), (decode, self.decode_live)) if live]


_Move = Callable[[Handoff, Any, float], list[Command]]
_CONNECTING = (State.NEW, State.BOOTSTRAPPING)
_WAITING = (State.PREFILLING, State.TRANSFERRING)
_OF_PREFILL = frozenset({PrefillFinished, PrefillFailed})


def _by_state(moves: Mapping[tuple[State, type], _Move]) -> Mapping[State, Mapping[type, _Move]]:
    return {state: {kind: move for (s, kind), move in moves.items() if s is state} for state in State}


_MOVES = _by_state(
    {
        (State.NEW, Dispatched): Handoff._dispatched,
        (State.BOOTSTRAPPING, LegsSent): Handoff._legs_sent,
        **{(s, PrefillFailed): Handoff._prefill_failed for s in (State.BOOTSTRAPPING, State.PREFILLING)},
        **{(s, DecodeFailed): Handoff._decode_failed for s in (State.BOOTSTRAPPING, *_WAITING, State.DECODING)},
        **{(s, PrefillFinished): Handoff._prefill_finished for s in (State.PREFILLING, State.DECODING, *FINAL)},
        **{(s, PrefillFailed): Handoff._prefill_failed_late for s in (State.DECODING, *FINAL)},
        **{(s, FirstTokenSeen): Handoff._first_token_seen for s in _WAITING},
        **{(s, FirstTokenSeen): Handoff._first_token_too_late for s in FINAL},
        **{(s, DecodeFinished): Handoff._decode_finished for s in (*_WAITING, State.DECODING)},
        **{(s, event): Handoff._decode_ended_late for s in FINAL for event in (DecodeFinished, DecodeFailed)},
        **{(s, ClientLeft): Handoff._client_left for s in (*_CONNECTING, *_WAITING, State.DECODING)},
        **{(s, Tick): Handoff._tick for s in (State.BOOTSTRAPPING, *_WAITING, State.DECODING)},
        **{(s, Tick): Handoff._tick_final for s in FINAL},
    }
)
