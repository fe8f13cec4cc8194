"""Who moves engines: a fake table, a clock, and the real balance."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import structlog

from disagg.cluster.change import Change, Limits
from disagg.cluster.matcher import LOST_S, Matcher
from disagg.errors import OrderError
from disagg.model import ClusterView, EngineId, EngineState, EngineView, Role
from disagg.policy.balance import Pace
from disagg.policy.books import Books
from disagg.policy.cost import ENOUGH
from tests.test_matching import MODEL, D, P, books_of, engine

PACE = Pace()


class Table:
    """A cluster whose engines obey at once, or when they are told to."""

    def __init__(self, *engines: EngineView) -> None:
        self.engines = list(engines)
        self.changes: dict[int, Change] = {}
        self.flipped: list[tuple[str, Role]] = []
        self.refuses = ""

    @property
    def view(self) -> ClusterView:
        return ClusterView.of(self.engines)

    def flip(self, engine: str, role: Role, cause: str) -> int:
        if self.refuses:
            raise OrderError(self.refuses, status=409)
        was = next(e for e in self.engines if e.id == engine).address.role
        number = len(self.flipped) + 1
        self.changes[number] = Change(EngineId(engine), was, role, live=True, cause=cause, limits=Limits(), now=0.0)
        self.flipped.append((engine, role))
        return number

    def become(self, engine: str, **how: Any) -> None:
        for at, one in enumerate(self.engines):
            if one.id == engine:
                role = how.pop("role", one.address.role)
                self.engines[at] = msgspec.structs.replace(one, address=msgspec.structs.replace(one.address, role=role), **how)

    def finish(self, number: int, role: Role) -> None:
        """The change is done."""
        change = self.changes.pop(number)
        self.become(change.engine, role=role)


def measure(books: Books) -> None:
    """Engines have worked for a while."""
    forecast = books.forecast
    for slot in range(forecast.engines):
        for number in range(2 * ENOUGH):
            at = number * 10.0
            forecast.read(forecast.sent(slot, 1000, now=at), now=at + 0.1)
            forecast.stepped(slot, 0.02, now=at)
            forecast.tick(at + 1)
    for _ in range(100):
        forecast.answered(200, 1000)


class Scene:
    def __init__(self, *engines: EngineView, flips: str = "auto", measured: bool = True) -> None:
        self.table = Table(*engines)
        self.books: Books = books_of(self.table.view)
        self.books._window_s = PACE.window_s
        if measured:
            measure(self.books)
        self.told = structlog.testing.CapturingLogger()
        log = structlog.wrap_logger(self.told, processors=[lambda _, __, event: ((), event)])
        self.waiting = 0
        self.matcher = Matcher(table=self.table, books=self.books, flips=flips, pace=PACE, waiting=lambda _: self.waiting, log=log)
        self.now = 1000.0

    def run(self, seconds: float, prefill: float = 0.0, decode: float = 0.0) -> None:
        """Time passes under a load of so many engine-seconds per second."""
        until = self.now + seconds
        demand = None
        while self.now < until:
            self.now += 1.0
            if prefill or decode:
                self.books.asked(MODEL, prefill, self.table.engines[-1], now=self.now)
                demand = self.books.demand(MODEL)
                assert demand is not None
                demand.arrived(0.0, decode - self.books.write_s(self.table.engines[-1]), now=self.now)
            self.matcher.look(self.now)

    @property
    def standing(self) -> Any:
        (standing,) = self.matcher.standings()
        return standing

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [call.kwargs for call in self.told.calls]


def two_and_two(**more: Any) -> Scene:
    return Scene(engine(0, P), engine(1, P), engine(2, D), engine(3, D), **more)


def test_a_load_of_prompts_moves_an_engine_and_says_why() -> None:
    scene = two_and_two()
    scene.run(600, prefill=2.2, decode=0.4)
    assert scene.table.flipped == [("e2", P)], "one at a time, and it is under way"
    assert scene.standing.wanted == (3, 1)
    (moved,) = [line for line in scene.lines if line["move"] == "to prefill"]
    assert re.match(r"e2 becomes a prefill engine: prefill is at 1[23]\d% and decode at 2\d%; with 3 and 1 engines ", moved["reason"])
    assert scene.table.changes[1].cause.startswith("the load wants it")
    assert scene.standing.prefill == 3, "the one on its way counts"
    scene.table.finish(1, P)
    scene.run(600, prefill=2.2, decode=0.4)
    assert len(scene.table.flipped) == 1, "the ratio is what was wanted"
    assert "are the best there is" in scene.standing.reason


def test_advice_is_only_said() -> None:
    scene = two_and_two(flips="advise")
    scene.run(600, prefill=2.2, decode=0.4)
    assert scene.table.flipped == []
    assert any('e2 should become a prefill engine, but [policy] flips is "advise"' in line["reason"] for line in scene.lines)


def test_off_moves_nothing_but_shows_what_would_be_better() -> None:
    scene = two_and_two(flips="off")
    scene.run(600, prefill=2.2, decode=0.4)
    assert scene.table.flipped == []
    assert scene.standing.wanted == (3, 1)


def test_the_reason_why_not_is_in_the_status_and_once_in_the_log() -> None:
    scene = two_and_two()
    scene.run(120, prefill=2.2, decode=0.4)
    assert "the load was watched for" in scene.standing.reason
    lines = [line for line in scene.lines if "the load was watched for" in line["reason"]]
    assert len(lines) == 1, "numbers that change make no new line"


def test_engines_that_nobody_here_may_move_are_named() -> None:
    scene = Scene(*(engine(i, P, owned=False) for i in range(2)), *(engine(i, D, owned=False) for i in range(2, 4)))
    scene.run(600, prefill=2.2, decode=0.4)
    assert scene.table.flipped == []
    assert any("no decode engine can be moved" in line["reason"] for line in scene.lines)


def test_why_engines_over_several_hosts_are_not_moved_is_said_also_where_the_last_one_is_lost() -> None:
    part = engine(4, D)
    scene = Scene(*two_and_two().table.engines, msgspec.structs.replace(part, facts=msgspec.structs.replace(part.facts, part=1)))
    scene.run(10, prefill=0.4, decode=0.4)
    for name in ("e2", "e3"):
        scene.table.become(name, state=EngineState.DEAD)
    scene.run(30, prefill=0.4, decode=0.4)
    assert scene.table.flipped == []
    assert any("which are moved by hand only" in line["reason"] for line in scene.lines)


def test_a_refused_order_is_told_and_tried_again_later() -> None:
    scene = two_and_two()
    scene.table.refuses = "the host h of e2 cannot be reached"
    scene.run(400, prefill=2.2, decode=0.4)
    assert any("cannot be reached" in line["reason"] for line in scene.lines)
    scene.table.refuses = ""
    scene.run(100, prefill=2.2, decode=0.4)
    assert scene.table.flipped == [("e2", P)]


def test_an_engine_that_was_moved_by_hand_is_left_alone_for_a_while() -> None:
    scene = two_and_two()
    scene.run(250, prefill=0.5, decode=0.5)
    scene.matcher.ordered(EngineId("e3"))
    scene.run(PACE.hand_s - 100, prefill=2.2, decode=0.4)
    assert scene.table.flipped == []
    assert "by hand" in scene.standing.reason
    scene.run(200, prefill=2.2, decode=0.4)
    assert scene.table.flipped == [("e2", P)]


@pytest.mark.parametrize(("lost", "role", "moved"), [("prefill", P, "e1"), ("decode", D, "e0")], ids=["prefill", "decode"])
def test_a_lost_last_engine_is_replaced_within_seconds(lost: str, role: Role, moved: str) -> None:
    engines = [engine(0, P), engine(1, D), engine(2, D)] if role is P else [engine(0, P), engine(1, P), engine(2, D)]
    scene = Scene(*engines)
    scene.run(20, prefill=0.1, decode=0.1)
    gone = "e0" if role is P else "e2"
    scene.table.become(gone, state=EngineState.DEAD)
    scene.run(LOST_S - 1, prefill=0.1, decode=0.1)
    assert scene.table.flipped == [], "it may be back in a moment"
    scene.run(3)
    assert scene.table.flipped == [(moved, role)]
    assert f"the last {lost} engine is gone" in scene.lines[-1]["reason"]


def test_one_that_is_back_in_a_moment_is_not_replaced() -> None:
    scene = Scene(engine(0, P), engine(1, D), engine(2, D))
    scene.run(20, prefill=0.1, decode=0.1)
    scene.table.become("e0", state=EngineState.STARTING)
    scene.run(LOST_S - 1)
    scene.table.become("e0", state=EngineState.READY)
    scene.run(60)
    assert scene.table.flipped == []


def test_a_move_that_failed_is_not_tried_again_at_once() -> None:
    scene = two_and_two()
    scene.run(300, prefill=2.2, decode=0.4)
    assert len(scene.table.flipped) == 1
    del scene.table.changes[1]
    scene.run(PACE.cooldown_s - 15, prefill=2.2, decode=0.4)
    assert len(scene.table.flipped) == 1
    assert "too short a time ago" in scene.standing.reason
    scene.run(400, prefill=2.2, decode=0.4)
    assert len(scene.table.flipped) == 2


def test_the_engine_of_a_failed_move_is_left_alone_and_another_is_asked() -> None:
    scene = two_and_two()
    scene.run(260, prefill=2.2, decode=0.4)
    del scene.table.changes[1]
    scene.run(110, prefill=2.2, decode=0.4)
    assert [moved for moved, _ in scene.table.flipped[:2]] == ["e2", "e3"]
    del scene.table.changes[2]
    scene.run(150, prefill=2.2, decode=0.4)
    assert len(scene.table.flipped) == 2
    assert any("moving e2, e3 has failed" in line["reason"] for line in scene.lines)


def test_nothing_is_moved_by_what_was_never_measured() -> None:
    scene = two_and_two(measured=False)
    scene.run(600, prefill=2.2, decode=0.4)
    assert scene.table.flipped == []
    assert "how long prompts take was not measured yet" in scene.standing.reason


def test_engines_that_start_one_after_the_other_are_not_lost() -> None:
    scene = Scene(engine(0, P, EngineState.STARTING), engine(1, P, EngineState.STARTING), engine(2, D), engine(3, D))
    scene.run(120)
    assert scene.table.flipped == [], "they were never there"


def test_an_engine_that_a_person_takes_out_is_not_lost() -> None:
    scene = Scene(engine(0, P), engine(1, D), engine(2, D))
    scene.run(20)
    scene.table.become("e0", state=EngineState.DRAINING)
    scene.run(60)
    assert scene.table.flipped == []
    scene.table.changes[7] = Change(EngineId("e0"), P, P, live=False, cause="an upgrade", limits=Limits(), now=0.0)
    scene.table.become("e0", state=EngineState.STARTING)
    scene.run(60)
    assert scene.table.flipped == [], "it is started anew by order"
    del scene.table.changes[7]
    scene.run(LOST_S + 2)
    assert scene.table.flipped == [("e1", P)]


def test_a_model_that_unified_engines_serve_has_lost_nothing() -> None:
    scene = Scene(engine(0, P), engine(1, D), engine(2, D), engine(3, Role.UNIFIED))
    scene.run(20)
    scene.table.become("e0", state=EngineState.DEAD)
    scene.run(60)
    assert scene.table.flipped == []


def test_time_in_which_the_router_stood_still_is_no_loss() -> None:
    scene = Scene(engine(0, P), engine(1, D), engine(2, D))
    scene.run(20)
    scene.table.become("e0", state=EngineState.DEAD)
    scene.run(1)
    scene.now += 100
    scene.matcher.stalled()
    scene.run(LOST_S - 1)
    assert scene.table.flipped == []
    scene.run(3)
    assert scene.table.flipped == [("e1", P)]


def test_the_only_engine_that_takes_work_is_not_taken() -> None:
    scene = Scene(engine(0, P), engine(1, P, EngineState.SUSPECT), engine(2, D), engine(3, D))
    scene.run(600, prefill=0.1, decode=2.5)
    assert scene.table.flipped == []
    assert "only one of them takes work" in scene.standing.reason


def test_off_says_what_would_be_done_without_a_flood_of_lines() -> None:
    scene = Scene(engine(0, P), engine(1, D), engine(2, D), flips="off")
    scene.run(20)
    scene.table.become("e0", state=EngineState.DEAD)
    scene.run(60)
    assert scene.table.flipped == []
    told = [line for line in scene.lines if "is gone" in line["reason"]]
    assert len(told) == 1
    assert told[0]["reason"].startswith('[policy] flips is "off": the last prefill engine is gone')
    assert scene.standing.history == []
