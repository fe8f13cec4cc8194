"""The handoff machine: events in, commands out, time as an argument."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

import pytest

from disagg.errors import ClientGoneError, DisaggError, EngineError, EngineTimeoutError
from disagg.handoff import (
    ABORT_REPEAT_S,
    CLOSE_AFTER_S,
    FINAL,
    HISTORY_LIMIT,
    AbortDecode,
    AbortPrefill,
    ClientLeft,
    CloseDecode,
    ClosePrefill,
    Command,
    DecodeFailed,
    DecodeFinished,
    Dispatched,
    Event,
    FailClient,
    FinishClient,
    FirstTokenSeen,
    Handoff,
    IllegalMoveError,
    LegsSent,
    Limits,
    PrefillFailed,
    PrefillFinished,
    SendLegs,
    State,
    Tick,
)

LIMITS = Limits(connect_s=2.0, first_token_s=60.0, between_tokens_s=30.0, linger_s=5.0)
BROKEN = EngineError("the engine broke")

START: tuple[Event, ...] = (Dispatched(), LegsSent())
TO_STATE: dict[State, tuple[Event, ...]] = {
    State.NEW: (),
    State.BOOTSTRAPPING: START[:1],
    State.PREFILLING: START,
    State.TRANSFERRING: (*START, PrefillFinished()),
    State.DECODING: (*START, FirstTokenSeen()),
    State.DONE: (*START, FirstTokenSeen(), DecodeFinished()),
    State.FAILED: (*START, DecodeFailed(BROKEN)),
    State.ABORTED: (*START, ClientLeft()),
}
UNIFIED_LACKS = {State.TRANSFERRING}
EVENTS: tuple[Event, ...] = (
    *(Dispatched(), LegsSent(), PrefillFinished(), PrefillFailed(BROKEN), FirstTokenSeen(), DecodeFinished()),
    *(DecodeFailed(BROKEN), ClientLeft(), Tick(last_read_at=1.0)),
)
LEGAL: dict[type, set[State]] = {
    Dispatched: {State.NEW},
    LegsSent: {State.BOOTSTRAPPING},
    PrefillFinished: {State.PREFILLING, State.DECODING, *FINAL},
    PrefillFailed: {State.BOOTSTRAPPING, State.PREFILLING, State.DECODING, *FINAL},
    FirstTokenSeen: {State.PREFILLING, State.TRANSFERRING, *FINAL},
    DecodeFinished: {State.PREFILLING, State.TRANSFERRING, State.DECODING, *FINAL},
    DecodeFailed: set(State) - {State.NEW},
    ClientLeft: set(State) - FINAL,
    Tick: set(State) - {State.NEW},
}


def machine(*, paired: bool = True, deadline_at: float | None = None) -> Handoff:
    return Handoff(paired=paired, limits=LIMITS, deadline_at=deadline_at)


def play(handoff: Handoff, events: Iterable[Event], *, now: float = 1.0) -> list[Command]:
    """Feeds events; returns the commands of the last one."""
    commands: list[Command] = []
    for event in events:
        commands = handoff.handle(event, now=now)
        handoff.check()
    return commands


def kinds(commands: Sequence[Command]) -> list[type]:
    return [type(c) for c in commands]


def picture(handoff: Handoff) -> tuple[object, ...]:
    """Everything that a machine knows."""
    return tuple(getattr(handoff, name) if name != "history" else tuple(handoff.history) for name in Handoff.__slots__)


def error_of(commands: Sequence[Command]) -> DisaggError:
    first = commands[0]
    assert isinstance(first, FailClient)
    return first.error


# --- the good ways


def test_the_usual_way_of_a_pair() -> None:
    handoff = machine()
    assert handoff.handle(Dispatched(), now=1.0) == [SendLegs()]
    assert handoff.handle(LegsSent(), now=1.1) == []
    assert (handoff.state, handoff.prefill_live, handoff.decode_live) == (State.PREFILLING, True, True)
    events = (FirstTokenSeen(), PrefillFinished(), DecodeFinished())
    told = [(handoff.handle(event, now=1.5), handoff.state) for event in events]
    assert told == [([], State.DECODING), ([], State.DECODING), ([FinishClient()], State.DONE)]
    assert handoff.settled
    assert handoff.next_deadline() is None
    assert handoff.error is None


def test_prefill_ends_before_the_first_token() -> None:
    handoff = machine()
    play(handoff, START)
    assert handoff.handle(PrefillFinished(), now=1.0) == []
    assert handoff.state is State.TRANSFERRING
    assert play(handoff, [FirstTokenSeen(), DecodeFinished()]) == [FinishClient()]
    assert handoff.settled


@pytest.mark.parametrize("before", [(), (PrefillFinished(),)])
def test_a_whole_answer_ends_without_a_first_token(before: tuple[Event, ...]) -> None:
    handoff = machine()
    assert play(handoff, [*START, *before, DecodeFinished()]) == [FinishClient()]
    assert handoff.settled is bool(before)


def test_a_unified_engine_has_no_prefill_leg() -> None:
    handoff = machine(paired=False)
    play(handoff, START)
    assert (handoff.state, handoff.prefill_live, handoff.decode_live) == (State.PREFILLING, False, True)
    assert play(handoff, [FirstTokenSeen(), DecodeFinished()]) == [FinishClient()]
    assert handoff.settled


@pytest.mark.parametrize("event", [PrefillFinished(), PrefillFailed(BROKEN)])
@pytest.mark.parametrize("state", sorted(set(State) - UNIFIED_LACKS))
def test_a_unified_engine_cannot_report_a_prefill_leg(event: Event, state: State) -> None:
    handoff = machine(paired=False)
    play(handoff, TO_STATE[state])
    with pytest.raises(IllegalMoveError):
        handoff.handle(event, now=2.0)


# --- the bad ways


@pytest.mark.parametrize("event", [PrefillFailed(BROKEN), DecodeFailed(BROKEN)])
def test_an_engine_that_cannot_be_connected_fails_the_attempt_and_nothing_is_aborted(event: Event) -> None:
    handoff = machine()
    assert play(handoff, [Dispatched(), event]) == [FailClient(BROKEN)]
    assert handoff.settled
    assert handoff.error is BROKEN


def test_prefill_fails_and_decode_is_aborted() -> None:
    handoff = machine()
    assert kinds(play(handoff, [*START, PrefillFailed(BROKEN)])) == [FailClient, AbortDecode]
    assert (handoff.state, handoff.prefill_live, handoff.decode_live) == (State.FAILED, False, True)


@pytest.mark.parametrize(
    ("before", "aborted"), [((), [AbortPrefill]), ((PrefillFinished(),), []), ((FirstTokenSeen(),), [AbortPrefill])], ids=str
)
def test_decode_fails_and_prefill_is_aborted_where_it_lives(before: tuple[Event, ...], aborted: list[type]) -> None:
    handoff = machine()
    assert kinds(play(handoff, [*START, *before, DecodeFailed(BROKEN)])) == [FailClient, *aborted]
    assert handoff.state is State.FAILED
    assert handoff.settled is not bool(aborted)


def test_what_becomes_of_prefill_after_the_first_token_is_of_no_interest() -> None:
    handoff = machine()
    assert play(handoff, [*START, FirstTokenSeen(), PrefillFailed(BROKEN)]) == []
    assert handoff.state is State.DECODING
    assert play(handoff, [DecodeFinished()]) == [FinishClient()]
    assert handoff.error is None


@pytest.mark.parametrize(
    ("state", "aborted"),
    [
        (State.NEW, []),
        (State.BOOTSTRAPPING, []),
        (State.PREFILLING, [AbortPrefill, AbortDecode]),
        (State.TRANSFERRING, [AbortDecode]),
        (State.DECODING, [AbortPrefill, AbortDecode]),
    ],
)
def test_a_client_that_leaves_aborts_what_lives(state: State, aborted: list[type]) -> None:
    handoff = machine()
    play(handoff, TO_STATE[state])
    assert kinds(handoff.handle(ClientLeft(), now=2.0)) == aborted
    assert handoff.state is State.ABORTED
    assert isinstance(handoff.error, ClientGoneError)
    assert handoff.settled is not bool(aborted)
    handoff.check()


@pytest.mark.parametrize("state", sorted(FINAL))
@pytest.mark.parametrize(
    "ends",
    [(PrefillFinished(), DecodeFinished()), (DecodeFinished(), PrefillFinished()), (PrefillFailed(BROKEN), DecodeFailed(BROKEN))],
)
def test_legs_that_end_late_settle_a_final_machine_and_say_nothing_to_the_client(state: State, ends: Sequence[Event]) -> None:
    handoff = machine()
    play(handoff, TO_STATE[state])
    error = handoff.error
    for event in ends:
        assert handoff.handle(event, now=2.0) == []
        handoff.check()
    assert handoff.settled
    assert (handoff.state, handoff.error) == (state, error)


@pytest.mark.parametrize("state", sorted(FINAL))
def test_a_first_token_that_comes_too_late_changes_nothing(state: State) -> None:
    handoff = machine()
    play(handoff, TO_STATE[state])
    assert handoff.handle(FirstTokenSeen(), now=1.0) == []
    assert handoff.state is state


# --- limits


@pytest.mark.parametrize(
    ("state", "limit_s", "word"),
    [
        (State.BOOTSTRAPPING, LIMITS.connect_s, "connected"),
        (State.PREFILLING, LIMITS.first_token_s, "no answer began"),
        (State.DECODING, LIMITS.between_tokens_s, "in the middle"),
    ],
)
def test_each_phase_has_a_limit(state: State, limit_s: float, word: str) -> None:
    handoff = machine()
    play(handoff, TO_STATE[state], now=10.0)
    due = 10.0 + limit_s
    assert handoff.next_deadline() == due
    assert handoff.handle(Tick(last_read_at=10.0), now=due - 0.001) == []
    commands = handoff.handle(Tick(last_read_at=10.0), now=due)
    assert isinstance(error_of(commands), EngineTimeoutError)
    assert word in str(handoff.error)
    assert handoff.state is State.FAILED


def test_transferring_has_the_limit_of_the_first_token_counted_from_sending() -> None:
    handoff = machine()
    play(handoff, START, now=10.0)
    play(handoff, [PrefillFinished()], now=40.0)
    assert handoff.next_deadline() == 10.0 + LIMITS.first_token_s
    assert kinds(handoff.handle(Tick(), now=70.0)) == [FailClient, AbortDecode]


def test_who_waits_behind_an_engine_that_is_at_work_waits_for_longer_but_not_than_its_client() -> None:
    handoff = Handoff(paired=True, limits=Limits(handover_s=5.0, first_token_s=5.0, linger_s=2.0), deadline_at=30.0)
    for event in START:
        handoff.handle(event, now=0.0)
    assert handoff.next_deadline() == 5.0
    handoff.wait_longer(4.0)
    assert handoff.next_deadline() == 5.0, "never for less"
    handoff.wait_longer(12.0)
    assert handoff.next_deadline() == 12.0
    handoff.handle(PrefillFinished(), now=11.0)
    assert handoff.next_deadline() == 13.0, "the KV has its time, too, though the limit is long over"
    handoff.wait_longer(20.0)
    assert handoff.next_deadline() == 13.0, "it waits for decode now, of which this says nothing"


def test_the_clients_own_deadline_is_not_moved() -> None:
    handoff = Handoff(paired=True, limits=LIMITS, deadline_at=8.0)
    for event in START:
        handoff.handle(event, now=0.0)
    handoff.wait_longer(100.0)
    assert handoff.next_deadline() == 8.0


def test_bytes_from_decode_move_its_limit() -> None:
    handoff = machine()
    play(handoff, TO_STATE[State.DECODING], now=10.0)
    assert handoff.handle(Tick(last_read_at=39.0), now=40.0) == []
    assert handoff.next_deadline() == 39.0 + LIMITS.between_tokens_s
    assert kinds(handoff.handle(Tick(last_read_at=39.0), now=69.0)) == [FailClient, AbortPrefill, AbortDecode]


@pytest.mark.parametrize("state", [State.BOOTSTRAPPING, State.PREFILLING, State.TRANSFERRING, State.DECODING])
def test_the_clients_own_deadline_counts_in_each_phase(state: State) -> None:
    handoff = machine(deadline_at=11.5)
    play(handoff, TO_STATE[state], now=10.0)
    assert handoff.next_deadline() == 11.5
    assert handoff.handle(Tick(last_read_at=11.4), now=11.4) == []
    assert handoff.next_deadline() == 11.5
    error = error_of(handoff.handle(Tick(last_read_at=11.4), now=11.5))
    phase = "its answer was made" if state is State.TRANSFERRING else state
    assert str(error) == f"the request's own deadline passed while {phase}"


def test_a_deadline_far_away_changes_nothing() -> None:
    handoff = machine(deadline_at=1000.0)
    play(handoff, TO_STATE[State.PREFILLING], now=10.0)
    assert handoff.next_deadline() == 10.0 + LIMITS.first_token_s


# --- after the end


def ticks(handoff: Handoff, until: float) -> list[tuple[float, list[type]]]:
    """Ticks exactly when the machine wants it; returns when it did what."""
    seen = []
    while (due := handoff.next_deadline()) is not None and due <= until:
        seen.append((round(due, 6), kinds(handoff.handle(Tick(), now=due))))
        handoff.check()
    return seen


@pytest.mark.parametrize("last", [DecodeFailed(BROKEN), ClientLeft()])
def test_an_abort_is_repeated_and_after_a_second_the_connection_is_closed(last: Event) -> None:
    handoff = machine()
    play(handoff, [*START, last], now=10.0)
    abort, close = (
        ([AbortPrefill], [ClosePrefill]) if handoff.state is State.FAILED else ([AbortPrefill, AbortDecode], [ClosePrefill, CloseDecode])
    )
    assert ticks(handoff, 11.25) == [(10.25, abort), (10.5, abort), (10.75, abort), (11.0, close), (11.25, close)]
    play(handoff, [PrefillFailed(BROKEN)], now=11.3)
    if handoff.decode_live:
        assert kinds(handoff.handle(Tick(), now=11.5)) == [CloseDecode]
        play(handoff, [DecodeFailed(BROKEN)], now=11.5)
    assert handoff.settled
    assert handoff.next_deadline() is None
    assert handoff.handle(Tick(), now=20.0) == []


def test_only_the_leg_that_lives_is_aborted_again() -> None:
    handoff = machine()
    play(handoff, [*START, ClientLeft()], now=10.0)
    play(handoff, [PrefillFinished()], now=10.1)
    assert kinds(handoff.handle(Tick(), now=10.25)) == [AbortDecode]
    assert handoff.handle(Tick(), now=10.3) == []


def test_prefill_may_linger_after_the_answer_and_is_aborted_then() -> None:
    handoff = machine()
    play(handoff, [*START, FirstTokenSeen(), DecodeFinished()], now=10.0)
    first = 10.0 + LIMITS.linger_s
    assert handoff.handle(Tick(), now=first - 0.01) == []
    assert ticks(handoff, first + 1.0) == [
        *((first + i * ABORT_REPEAT_S, [AbortPrefill]) for i in range(4)),
        (first + CLOSE_AFTER_S, [ClosePrefill]),
    ]
    assert handoff.state is State.DONE
    assert handoff.error is None


def test_a_late_timer_does_not_abort_in_a_burst() -> None:
    handoff = machine()
    play(handoff, [*START, ClientLeft()], now=10.0)
    assert kinds(handoff.handle(Tick(), now=10.9)) == [AbortPrefill, AbortDecode]
    assert handoff.handle(Tick(), now=10.91) == []
    assert kinds(handoff.handle(Tick(), now=30.0)) == [ClosePrefill, CloseDecode]


# --- the surface


@pytest.mark.parametrize("paired", [True, False])
def test_illegal_moves_raise_and_change_nothing(paired: bool) -> None:
    for state, event in itertools.product(sorted(State), EVENTS):
        if not paired and state in UNIFIED_LACKS:
            continue
        handoff = machine(paired=paired)
        play(handoff, TO_STATE[state])
        legal = state in LEGAL[type(event)] and (paired or not isinstance(event, PrefillFinished | PrefillFailed))
        before = picture(handoff)
        if legal:
            handoff.handle(event, now=1.0)
            continue
        with pytest.raises(IllegalMoveError, match=f"{type(event).__name__} in state {state}"):
            handoff.handle(event, now=1.0)
        assert picture(handoff) == before


def test_history_tells_the_story_and_ticks_that_do_nothing_are_not_in_it() -> None:
    handoff = machine()
    for at, event in ((1.0, Dispatched()), (1.1, LegsSent()), (1.2, Tick()), (1.5, PrefillFinished()), (1.6, ClientLeft()), (1.85, Tick())):
        handoff.handle(event, now=at)
    assert handoff.history == [
        *((1.0, "Dispatched"), (1.1, "LegsSent"), (1.5, "PrefillFinished"), (1.6, "ClientLeft"), (1.85, "Tick")),
    ]


def test_history_is_bounded() -> None:
    handoff = machine()
    play(handoff, [*START, ClientLeft()])
    for i in range(10 * HISTORY_LIMIT):
        handoff.handle(Tick(), now=2.0 + i)
    assert len(handoff.history) == HISTORY_LIMIT


def test_repr_says_state_and_live_legs() -> None:
    handoff = machine()
    play(handoff, START)
    assert repr(handoff) == "<Handoff prefilling live=prefill+decode events=2>"


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefill_live", True), ("error", BROKEN), ("_until", None), ("state", State.FAILED)],
)
def test_check_notices_a_machine_that_cannot_be(name: str, value: object) -> None:
    handoff = machine(paired=name != "prefill_live")
    play(handoff, START)
    setattr(handoff, name, value)
    with pytest.raises(AssertionError):
        handoff.check()


class Walk:
    """A random life. What an engine does is limited to what engines can do: a leg ends once."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.paired = self.chance.random() < 0.8
        self.now = 100.0
        self.deadline_at = self.now + self.chance.uniform(0.5, 90) if self.chance.random() < 0.3 else None
        self.handoff = machine(paired=self.paired, deadline_at=self.deadline_at)
        self.last_read_at = 0.0
        self.told: list[Command] = []

    def possible(self) -> list[Event]:
        h = self.handoff
        events: list[Event] = []
        if h.state is State.NEW:
            return [Dispatched()]
        if h.state is State.BOOTSTRAPPING:
            events += [LegsSent(), LegsSent(), DecodeFailed(BROKEN), ClientLeft()]
        if h.prefill_live:
            events += [PrefillFinished(), PrefillFailed(BROKEN)]
        if h.decode_live:
            events += [DecodeFinished(), DecodeFailed(BROKEN)]
        if h.state in {State.PREFILLING, State.TRANSFERRING}:
            events += [FirstTokenSeen(), FirstTokenSeen(), ClientLeft()]
        if h.state is State.DECODING:
            events += [ClientLeft()]
        if h.state in FINAL and h.decode_live and self.chance.random() < 0.2:
            events += [FirstTokenSeen()]
        return events

    def step(self) -> None:
        h, chance = self.handoff, self.chance
        self.now += chance.choice([0.0, 0.01, 0.1, 0.3, 1.0, 10.0, 40.0])
        if h.state is State.DECODING and chance.random() < 0.5:
            self.last_read_at = self.now
        events = self.possible()
        tick = h.state is not State.NEW and (not events or chance.random() < 0.4)
        event: Event = Tick(self.last_read_at) if tick else chance.choice(events)
        was = h.state
        before = picture(h)
        commands = h.handle(event, now=self.now)
        if isinstance(event, FirstTokenSeen):
            self.last_read_at = self.now
        h.check()
        self.told += [c for c in commands if isinstance(c, FinishClient | FailClient)]
        names = set(kinds(commands))
        if not isinstance(event, Tick):
            assert h.history[-1] == (self.now, type(event).__name__) or len(h.history) == HISTORY_LIMIT
        elif not commands and h.state is was is not State.DECODING:
            assert picture(h) == before
        if h.state in FINAL and was not in FINAL and h.state is not State.DONE:
            assert (AbortPrefill in names) is h.prefill_live, "a final list of commands aborts what lives, and nothing else"
            assert (AbortDecode in names) is h.decode_live
        if names & {AbortPrefill, ClosePrefill}:
            assert h.prefill_live
        if names & {AbortDecode, CloseDecode}:
            assert h.decode_live
        due = h.next_deadline()
        assert due is None or self.deadline_at is None or h.state in FINAL or due <= self.deadline_at


def test_random_lives_keep_every_invariant_and_each_client_hears_one_end() -> None:
    ends = set()
    for seed in range(1500):
        walk = Walk(seed)
        steps = 0
        while not walk.handoff.settled:
            walk.step()
            steps += 1
            assert steps < 500, "a machine that never settles"
        expected = 0 if walk.handoff.state is State.ABORTED else 1
        assert len(walk.told) == expected, walk.handoff.history
        ends.add((walk.paired, walk.handoff.state))
    assert ends == set(itertools.product([True, False], FINAL))
