"""Which failures are replayed, and how many at a time."""

from __future__ import annotations

import random

import msgspec
import pytest

from disagg.errors import (
    ClientGoneError,
    DeadlineError,
    DisaggError,
    EngineError,
    EngineRefusedError,
    EngineTimeoutError,
    NoCapacityError,
    RequestError,
)
from disagg.model import ClusterView, EngineAddress, EngineId, EngineState, EngineView, Role
from disagg.policy.replay import FLOOR, PER_REQUEST, SAME_AGAIN_S, SHARE, Avoided, Blame, ReplayBudget, judge

N, E, P = Blame.NOBODY, Blame.ENGINE, Blame.PAIR


def refused(status: int) -> EngineRefusedError:
    return EngineRefusedError("it refused", status=status)


@pytest.mark.parametrize(
    ("error", "replay", "before", "after"),
    [
        (ClientGoneError("x"), False, N, N),
        (RequestError("x"), False, N, N),
        (DeadlineError("x"), False, N, N),
        (NoCapacityError("x"), False, N, N),
        (DisaggError("x"), False, N, N),
        (refused(400), False, N, N),
        (refused(404), False, N, N),
        (refused(413), False, N, N),
        (refused(422), False, N, N),
        (refused(429), True, E, E),
        (refused(503), True, E, E),
        (refused(500), True, P, E),
        (refused(502), True, P, E),
        (EngineTimeoutError("x"), True, P, E),
        (EngineError("x"), True, E, E),
    ],
    ids=str,
)
def test_every_failure_has_a_verdict(error: DisaggError, replay: bool, before: Blame, after: Blame) -> None:
    verdicts = [judge(error, paired=True, first_token_seen=seen) for seen in (False, True)]
    assert [v.replay for v in verdicts] == [replay, replay]
    assert [v.blame for v in verdicts] == [before, after]
    assert all(v.why for v in verdicts)


def test_a_unified_engine_has_no_pair_to_blame() -> None:
    assert judge(EngineTimeoutError("x"), paired=False, first_token_seen=False).blame is E


def test_a_request_is_replayed_twice_and_no_more() -> None:
    budget = ReplayBudget()
    assert budget.take(replayed=0, in_flight=1) == ""
    assert budget.take(replayed=1, in_flight=1) == ""
    assert "2 times already" in budget.take(replayed=2, in_flight=1)
    assert budget.refused == {"request": 1}


def test_so_many_at_a_time() -> None:
    budget = ReplayBudget()
    granted = [budget.take(replayed=0, in_flight=50) for _ in range(20)]
    assert granted[:10] == [""] * 10
    assert "more than 10 at a time" in granted[10]
    budget.give_back()
    assert budget.take(replayed=0, in_flight=50) == ""


def test_few_requests_in_flight_leave_the_floor() -> None:
    budget = ReplayBudget()
    assert [bool(budget.take(replayed=0, in_flight=1)) for _ in range(4)] == [False, False, False, True]


def storm(budget: ReplayBudget, in_flight: int) -> int:
    """Everything that is in flight fails at once; how many are sent again at a time."""
    return sum(not budget.take(replayed=0, in_flight=in_flight) for _ in range(in_flight))


def test_a_storm_is_held_back_and_without_the_budget_it_is_not() -> None:
    assert storm(ReplayBudget(), 1000) == 200
    assert storm(ReplayBudget(share=1.0), 1000) == 1000, "the defence is off: everything at once"


@pytest.mark.parametrize("seed", range(20))
def test_never_over_the_budget_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    budget, running = ReplayBudget(), 0
    for _ in range(2000):
        if running and chance.random() < 0.5:
            budget.give_back()
            running -= 1
            continue
        in_flight, replayed = chance.randrange(1, 200), chance.randrange(4)
        refusal = budget.take(replayed=replayed, in_flight=in_flight)
        if not refusal:
            running += 1
            assert replayed < PER_REQUEST
            assert running <= max(FLOOR, int(in_flight * SHARE))
        assert budget.running == running


# --- engines that failed a request


P0, P1, D0, D1 = engines = tuple(
    EngineView(EngineAddress(EngineId(name), role, "127.0.0.1", port, pid=1), port - 1, EngineState.READY)
    for port, (name, role) in enumerate(
        (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)),
        start=1,
    )
)
THERE = ClusterView(engines)


def ids(*engines: EngineView) -> set[EngineId]:
    return {engine.id for engine in engines}


def options(avoided: Avoided, now: float, *, view: ClusterView = THERE, others_only: bool = False) -> list[set[EngineId]]:
    return [set(option) for option in avoided.options(view, now, others_only=others_only)]


def test_who_failed_a_request_is_asked_again_after_a_while_where_nobody_else_is_left() -> None:
    avoided = Avoided()
    assert not avoided
    assert options(avoided, 0.0)[0] == set()
    avoided.add([D0], 1.0)
    assert avoided
    assert options(avoided, 1.5) == [ids(D0), ids(D0)]
    assert avoided.next_change(1.5) == 1.0 + SAME_AGAIN_S
    assert options(avoided, 1.0 + SAME_AGAIN_S) == [ids(D0), set()]
    assert avoided.next_change(1.0 + SAME_AGAIN_S) is None
    assert options(avoided, 1.0 + SAME_AGAIN_S, others_only=True) == [ids(D0)], "it would say the same again"


def test_either_side_of_a_failed_handoff_may_do_better_with_another_partner_and_others_that_failed_stay_out() -> None:
    avoided = Avoided()
    avoided.add([P0, D0], 1.0, pair=(P0, D0))
    avoided.add([D1], 2.0)
    assert options(avoided, 2.0, others_only=True) == [ids(P0, D0, D1), ids(D0, D1), ids(P0, D1)]


def test_a_pair_of_which_one_is_blamed_is_not_tried_again() -> None:
    avoided = Avoided()
    avoided.add([D0], 1.0, pair=(P0, D0))
    assert options(avoided, 2.0, others_only=True) == [ids(D0), ids(D0), ids(P0)]


def test_an_engine_that_was_started_anew_is_another_one() -> None:
    avoided = Avoided()
    avoided.add([P0, D0], 1.0, pair=(P0, D0))
    anew = msgspec.structs.replace(D0, address=msgspec.structs.replace(D0.address, pid=2))
    view = ClusterView((P0, P1, anew, D1))
    assert options(avoided, 1.0, view=view) == [ids(P0), set(), ids(P0), ids(P0)]
    assert options(avoided, 1.0, view=ClusterView()) == [set(), set(), set(), set()]
