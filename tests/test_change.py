"""A flip or a restart as a machine: what it does next, how it ends, and that it always ends."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from disagg.cluster.change import (
    FINAL,
    BecameIdle,
    BecameReady,
    CanaryEnded,
    Change,
    Event,
    IllegalMoveError,
    Limits,
    OrderAnswered,
    Phase,
    PutBack,
    RunCanary,
    SendOrder,
    TakeOut,
    Tick,
    WasLost,
)
from disagg.model import EngineId, EngineState, Role

LIMITS = Limits(drain_s=30.0, switch_s=75.0, prove_s=15.0, restart_s=900.0)
P, D = Role.PREFILL, Role.DECODE


def flip() -> Change:
    made = Change(EngineId("e"), D, P, live=True, cause="because", limits=LIMITS, now=100.0)
    assert made.begin(100.0) == [TakeOut(EngineState.DRAINING, "it drains for a flip: because")]
    made.check()
    return made


def restart() -> Change:
    made = Change(EngineId("e"), D, D, live=False, cause="because", limits=LIMITS, now=100.0)
    assert made.begin(100.0) == [TakeOut(EngineState.DRAINING, "it drains for a restart: because")]
    made.check()
    return made


def feed(change: Change, *events: Event, now: float = 101.0) -> list[object]:
    commands: list[object] = []
    for event in events:
        commands = list(change.handle(event, now=now))
        change.check()
    return commands


def test_a_flip_that_goes_well() -> None:
    change = flip()
    taken, order = feed(change, BecameIdle())
    assert isinstance(taken, TakeOut)
    assert (taken.state, order) == (EngineState.SWITCHING, SendOrder("switch", P, "because"))
    assert feed(change, OrderAnswered(True, "it switched")) == [RunCanary()]
    assert feed(change, CanaryEnded(True, "it answered")) == [PutBack()]
    assert (change.phase, change.outcome) == (Phase.DONE, "it answered; it is back in service as prefill")
    assert change.next_deadline() is None


def test_an_engine_that_refuses_to_switch_is_started_anew_in_the_new_role() -> None:
    change = flip()
    _, order = feed(change, BecameIdle(), OrderAnswered(False, "no such feature"))
    assert isinstance(order, SendOrder)
    assert (order.action, order.role) == ("restart", P)
    assert "no such feature" in order.cause
    assert feed(change, OrderAnswered(True, "under way")) == []
    assert feed(change, BecameReady(D)) == [], "the old process, a moment before it ends"
    assert feed(change, BecameReady(P)) == [PutBack()]
    assert change.phase is Phase.DONE


def test_an_engine_that_does_not_answer_after_its_switch_is_started_anew() -> None:
    change = flip()
    _, order = feed(change, BecameIdle(), OrderAnswered(True, "it switched"), CanaryEnded(False, "silence"))
    assert isinstance(order, SendOrder)
    assert order.action == "restart"


def test_a_flip_gives_up_when_requests_do_not_end() -> None:
    change = flip()
    assert feed(change, Tick(), now=129.9) == []
    assert feed(change, Tick(), now=130.0) == [PutBack()]
    assert change.phase is Phase.FAILED
    assert "it goes on as decode" in change.outcome


@pytest.mark.parametrize("begin", [flip, restart])
def test_what_does_not_end_moves_where_there_are_others(begin: Callable[[], Change]) -> None:
    change = begin()
    assert feed(change, Tick(others=True), now=130.0) == []
    assert (change.phase, change.next_deadline()) == (Phase.MOVING, 145.0)
    assert change.outcome == "requests still ran after 30 s; they go on on other engines"
    taken, order = feed(change, BecameIdle(), now=131.0)
    assert isinstance(taken, TakeOut)
    assert isinstance(order, SendOrder)
    assert order.action == ("switch" if change.live else "restart")


def test_what_neither_ends_nor_moves_ends_a_flip_and_not_a_restart() -> None:
    for change, phase in ((flip(), Phase.FAILED), (restart(), Phase.RESTARTING)):
        feed(change, Tick(others=True), now=130.0)
        assert feed(change, Tick(others=True), now=144.9) == []
        feed(change, Tick(others=True), now=145.0)
        assert change.phase is phase
        assert "cannot go on elsewhere still ran after 45 s" in str(change.steps)


def test_an_engine_that_dies_while_its_requests_move() -> None:
    change = flip()
    feed(change, Tick(others=True), now=130.0)
    assert feed(change, WasLost("it died"), now=131.0) == [PutBack()]
    assert change.phase is Phase.FAILED


def test_a_restart_goes_on_when_requests_do_not_end() -> None:
    change = restart()
    _, order = feed(change, Tick(), now=130.0)
    assert order == SendOrder("restart", D, "because")
    assert feed(change, BecameReady(D)) == [PutBack()]
    assert change.phase is Phase.DONE


def test_a_restart_that_the_agent_refuses_fails_with_its_sentence() -> None:
    change = restart()
    assert feed(change, BecameIdle(), OrderAnswered(False, "it was attached")) == [PutBack()]
    assert (change.phase, change.outcome) == (Phase.FAILED, "not restarted: it was attached")


@pytest.mark.parametrize(
    ("before", "phase"),
    [
        ((), Phase.FAILED),
        ((BecameIdle(),), Phase.RESTARTING),
        ((BecameIdle(), OrderAnswered(True, "")), Phase.RESTARTING),
        ((BecameIdle(), OrderAnswered(False, "")), Phase.RESTARTING),
    ],
)
def test_an_engine_that_dies_in_between(before: tuple[Event, ...], phase: Phase) -> None:
    change = flip()
    feed(change, *before, WasLost("it died"))
    assert change.phase is phase


@pytest.mark.parametrize(
    ("before", "limit_s", "after"),
    [
        ((BecameIdle(),), LIMITS.switch_s, Phase.RESTARTING),
        ((BecameIdle(), OrderAnswered(True, "")), LIMITS.prove_s, Phase.RESTARTING),
        ((BecameIdle(), OrderAnswered(False, "")), LIMITS.restart_s, Phase.FAILED),
    ],
)
def test_every_phase_has_its_limit(before: tuple[Event, ...], limit_s: float, after: Phase) -> None:
    change = flip()
    feed(change, *before, now=101.0)
    assert change.next_deadline() == 101.0 + limit_s
    phase = change.phase
    feed(change, Tick(), now=100.9 + limit_s)
    assert change.phase is phase
    feed(change, Tick(), now=101.0 + limit_s)
    assert change.phase is after


def test_nothing_moves_a_change_that_ended() -> None:
    change = flip()
    feed(change, WasLost("gone"))
    with pytest.raises(IllegalMoveError):
        change.handle(Tick(), now=200.0)
    assert change.phase is Phase.FAILED


def test_random_changes_keep_every_invariant_and_all_end() -> None:
    chance = random.Random(3)
    events = 0
    while events < 100_000:
        live = chance.random() < 0.5
        now = 0.0
        change = Change(EngineId("e"), D, P if live else D, live=live, cause="c", limits=LIMITS, now=now)
        out = any(isinstance(c, TakeOut) for c in change.begin(now))
        back = 0
        while change.phase not in FINAL:
            now += chance.choice((0.0, 1.0, 20.0, 500.0))
            event = chance.choice(
                (
                    *(Tick(), Tick(others=True), BecameIdle(), WasLost("x"), BecameReady(chance.choice((P, D)))),
                    *(OrderAnswered(chance.random() < 0.6, "o"), CanaryEnded(chance.random() < 0.6, "c")),
                )
            )
            commands = change.handle(event, now=now)
            change.check()
            events += 1
            back += sum(isinstance(c, PutBack) for c in commands)
            due = change.next_deadline()
            assert due is None or due <= now + LIMITS.restart_s
        assert out
        assert back == 1, "whoever was taken out is put back exactly once"
        assert change.outcome
