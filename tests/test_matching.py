"""From the router's books to a situation: who counts, what is asked, and which engine moves."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, HostId, Role
from disagg.policy.books import Books, Prompt, Slo
from disagg.policy.matching import engines_of, mover, situation_of

MODEL = "demo"
P, D, U = Role.PREFILL, Role.DECODE, Role.UNIFIED


def engine(slot: int, role: Role, state: EngineState = EngineState.READY, *, owned: bool = True, model: str = MODEL) -> EngineView:
    address = EngineAddress(EngineId(f"e{slot}"), role, "127.0.0.1", 1000 + slot, pid=slot + 1)
    facts, load = EngineFacts(model=model, max_running=8), EngineLoad(kv_total_tokens=10_000)
    return EngineView(address, slot, state, facts, load, host=HostId("h" if owned else ""), owned=owned)


def books_of(view: ClusterView) -> Books:
    books = Books(Slo(ttft_s=2.0, itl_s=0.1), window_s=10.0)
    books.grow(len(view.engines))
    for one in view.engines:
        books.holds(one, now=0.0)
    return books


def test_an_engine_counts_where_it_is_or_goes_and_not_when_it_is_gone() -> None:
    view = ClusterView.of(
        [
            *(engine(0, P), engine(1, P, EngineState.SUSPECT), engine(2, P, EngineState.DEAD), engine(3, P, EngineState.STARTING)),
            *(
                engine(4, D),
                engine(5, D, EngineState.DRAINING),
                engine(6, D, EngineState.SWITCHING),
                engine(7, U),
                engine(8, P, model="other"),
            ),
        ]
    )
    moving = {EngineId("e6"): P}
    assert [e.id for e in engines_of(view, MODEL, P, moving)] == ["e0", "e1", "e6"]
    assert [e.id for e in engines_of(view, MODEL, D, moving)] == ["e4"]


def test_a_situation_tells_what_is_asked_how_late_prompts_are_and_how_full_decode_is() -> None:
    view = ClusterView.of([engine(0, P), engine(1, P), engine(2, D), engine(3, D)])
    books = books_of(view)
    for number in range(1000):
        books.asked(MODEL, 0.05, view.engines[2], now=number * 0.1)
    for slot, prompts in ((0, 3), (1, 2)):
        for _ in range(prompts):
            books.forecast.sent(slot, 1000, now=100.0)
    for _ in range(6):
        books.in_flight.start(2)
    situation = situation_of(view, MODEL, books, moving={}, waiting=4, flip_s=7.0, horizon_s=300.0, now=100.0)
    assert (situation.prefill, situation.decode, situation.waiting, situation.flip_s) == (2, 2, 4, 7.0)
    assert situation.offered[0] == pytest.approx(0.5, rel=0.02)
    assert situation.watched_s == pytest.approx(100.0)
    assert situation.late_s == pytest.approx(books.forecast.wait_s(1, now=100.0)) != 0.0
    assert situation.late_limit_s == 2.0
    assert situation.kv_share == 6 / 16, "requests are what there is least room for"
    books.ledger.reserve(3, 19_000)
    assert situation_of(view, MODEL, books, moving={}, waiting=0, flip_s=1.0, horizon_s=1.0, now=100.0).kv_share == 19_000 / 20_000


def test_the_engine_that_moves_is_the_one_with_the_least_to_lose() -> None:
    view = ClusterView.of([engine(i, P) for i in range(3)] + [engine(i, D) for i in range(3, 6)])
    books = books_of(view)
    books.ledger.reserve(3, 100)
    books.ledger.reserve(5, 50)
    found = mover(view, MODEL, D, books, busy=(), now=0.0)
    assert found is not None
    assert found.id == "e4", "nothing runs there"
    found = mover(view, MODEL, D, books, busy={EngineId("e4")}, now=0.0)
    assert found is not None
    assert found.id == "e5"
    books.forecast.sent(0, 5000, now=0.0)
    books.history.sent(1, [1, 2, 3])
    found = mover(view, MODEL, P, books, busy=(), now=0.0)
    assert found is not None
    assert found.id == "e2", "the others have something to read, or a cache"


def test_what_nobody_here_may_move_is_not_moved() -> None:
    view = ClusterView.of([engine(0, P, owned=False), engine(1, P, EngineState.DRAINING), engine(2, P), engine(3, D)])
    assert mover(view, MODEL, P, books_of(view), busy={EngineId("e2")}, now=0.0) is None


def test_engines_over_several_hosts_are_moved_by_hand_only() -> None:
    one, other = engine(2, D), engine(3, D)
    part = msgspec.structs.replace(other, facts=msgspec.structs.replace(other.facts, part=1))

    def told(*more: EngineView) -> tuple[str, bool]:
        view = ClusterView.of([engine(0, P), engine(1, P), one, *more])
        books = books_of(view)
        situation = situation_of(view, MODEL, books, moving={}, waiting=0, flip_s=1.0, horizon_s=1.0, now=0.0)
        return situation.unknown, mover(view, MODEL, P, books, busy=(), now=0.0) is not None

    assert told(other) == ("how long prompts take was not measured yet", True)
    assert told(part) == ("there are engines over several hosts, which are moved by hand only", False)
    nameless = msgspec.structs.replace(part, facts=EngineFacts(model_hash="abc", part=1))
    stranger = engine(4, D, model="other")
    stranger = msgspec.structs.replace(stranger, facts=msgspec.structs.replace(stranger.facts, model_hash="abc"))
    assert told(nameless, stranger)[1], "a part names no model: this one's weights are another model's"
    one = msgspec.structs.replace(one, facts=msgspec.structs.replace(one.facts, model_hash="abc"))
    assert not told(nameless)[1]
    assert told(msgspec.structs.replace(nameless, state=EngineState.DEAD))[1], "what is gone holds nobody up"


def test_a_cache_is_worth_what_it_saves_and_at_most_what_it_took_to_fill_it() -> None:
    view = ClusterView.of([engine(0, P), engine(1, D)])
    books = books_of(view)
    assert books.worth_s(view.engines[0], 300.0) == 0.0
    prompt = Prompt(1000, 4096, [1, 2, 3, 4])
    for number in range(50):
        choice_reading = books.forecast.sent(0, 1, now=float(number))
        books.forecast.left(choice_reading, now=float(number))
        books.history.sent(0, prompt.names)
    assert books.worth_s(view.engines[0], 300.0) == 0.0, "what nobody asks for again is worth nothing"
    books._hit_share = 0.5
    worth = books.worth_s(view.engines[0], 300.0)
    assert 0.0 < worth < 0.5
    assert books.worth_s(view.engines[0], 0.01) == 0.005


def test_engines_that_cannot_all_be_paired_are_not_moved() -> None:
    view = ClusterView.of(
        [engine(0, P), engine(1, P), engine(2, D), engine(3, D)], cut={(EngineId("e0"), EngineId("e2")): "its link is down"}
    )
    assert view.pools[MODEL].islands
    assert mover(view, MODEL, D, books_of(view), busy=(), now=0.0) is None
    whole = ClusterView.of([engine(0, P), engine(1, P), engine(2, D), engine(3, D)])
    assert mover(whole, MODEL, D, books_of(whole), busy=(), now=0.0) is not None


def test_a_step_that_is_as_long_as_it_may_be_alone_does_not_make_an_answer_cost_an_engine() -> None:
    view = ClusterView.of([engine(0, P), engine(1, D)])
    costs = []
    for step_s in (0.070, 0.084, 0.086, 0.100, 0.200):
        books = books_of(view)
        for number in range(40):
            books.forecast.stepped(1, step_s, now=number * 1.0)
            books.forecast.tick(number + 0.5)
        for _ in range(100):
            books.forecast.answered(100, 500)
        costs.append(books.write_s(view.engines[1]))
    assert all(after < 4 * before for before, after in itertools.pairwise(costs)), costs
