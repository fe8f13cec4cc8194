"""Choosing a pair: a function of the view and of what is in flight."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from disagg.errors import NoCapacityError, UnknownModelError
from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineState, EngineView, Pool, Role
from disagg.policy.route import InFlight, choose, pool_of

P, D, U = Role.PREFILL, Role.DECODE, Role.UNIFIED


def view(*engines: tuple[Role, str], down: Iterable[int] = ()) -> ClusterView:
    """Engines by role and model, ready unless their slot is `down`."""
    down = set(down)
    return ClusterView.of(
        EngineView(
            EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1),
            slot,
            EngineState.DEAD if slot in down else EngineState.READY,
            EngineFacts(model=model),
        )
        for slot, (role, model) in enumerate(engines)
    )


def pool(*roles: Role) -> Pool:
    return view(*((r, "m") for r in roles)).pools["m"]


def loads(*now: int, ever: tuple[int, ...] = ()) -> InFlight:
    made = InFlight()
    made.now = list(now)
    made.ever = list(ever or [0] * len(now))
    return made


def chosen(pool: Pool, in_flight: InFlight, exclude: Iterable[str] = ()) -> tuple[str | None, str]:
    choice = choose(pool, in_flight, exclude={EngineId(e) for e in exclude})
    return (choice.prefill.id if choice.prefill else None), choice.decode.id


def test_a_request_that_a_pair_must_not_see_goes_to_a_unified_engine_however_loaded() -> None:
    choice = choose(pool(P, D, U), loads(0, 0, 9), unified_only=True)
    assert (choice.prefill, choice.decode.id) == (None, "unified-2")
    with pytest.raises(NoCapacityError):
        choose(pool(P, D), loads(0, 0), unified_only=True)


# --- which pool


def test_a_model_has_its_own_pool() -> None:
    both = view((P, "a"), (D, "a"), (U, "b"))
    assert [e.id for e in pool_of(both, "a").decode] == ["decode-1"]
    assert [e.id for e in pool_of(both, "b").unified] == ["unified-2"]


def test_without_a_name_the_only_model_is_meant() -> None:
    assert pool_of(view((U, "a")), "").unified[0].id == "unified-0"


def test_without_a_name_and_with_several_models_the_client_must_choose() -> None:
    with pytest.raises(UnknownModelError, match=r"name the model: several are served; there is a, b"):
        pool_of(view((U, "a"), (U, "b")), "")


def test_an_unknown_model_is_named_with_those_that_exist() -> None:
    with pytest.raises(UnknownModelError, match=r"no engine serves the model 'c'; there is a, b") as caught:
        pool_of(view((U, "a"), (U, "b")), "c")
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


@pytest.mark.parametrize("asked", ["a", ""])
@pytest.mark.parametrize("down", [{0}, {1}, {0, 1}])
def test_a_known_model_whose_engines_are_down_is_no_capacity_and_not_unknown(asked: str, down: set[int]) -> None:
    with pytest.raises(NoCapacityError) as caught:
        pool_of(view((P, "a"), (D, "a"), down=down), asked)
    assert caught.value.retry_after_s >= 1
    assert "no ready" in str(caught.value)


@pytest.mark.parametrize("asked", ["a", ""])
def test_without_engines_there_is_no_capacity(asked: str) -> None:
    with pytest.raises(NoCapacityError, match="no engine is configured"):
        pool_of(ClusterView(), asked)


def test_a_model_that_only_half_a_pair_serves_is_no_capacity_while_another_is_served() -> None:
    with pytest.raises(NoCapacityError, match="'a'"):
        pool_of(view((P, "a"), (U, "b")), "a")


def test_a_long_name_is_cut_in_the_sentence() -> None:
    with pytest.raises(UnknownModelError) as caught:
        pool_of(view((U, "a")), "x" * 5000)
    assert len(str(caught.value)) < 200


# --- which engines


def test_the_least_loaded_of_each_role() -> None:
    assert chosen(pool(P, P, D, D), loads(3, 1, 2, 5)) == ("prefill-1", "decode-2")


def test_equal_loads_go_to_the_one_used_least_and_then_to_the_lower_slot() -> None:
    assert chosen(pool(P, P, D, D), loads(1, 1, 0, 0, ever=(9, 4, 7, 7))) == ("prefill-1", "decode-2")


def test_a_unified_engine_is_taken_where_it_has_less_to_do_than_decode() -> None:
    assert chosen(pool(P, D, U), loads(0, 1, 0)) == (None, "unified-2")
    assert chosen(pool(P, D, U), loads(0, 1, 1)) == ("prefill-0", "decode-1")


def test_half_a_pair_is_no_pair() -> None:
    assert chosen(pool(P, U), loads(0, 5)) == (None, "unified-1")


def test_engines_that_were_tried_are_left_out() -> None:
    assert chosen(pool(P, P, D), loads(0, 9, 0), exclude={"prefill-0"}) == ("prefill-1", "decode-2")
    assert chosen(pool(P, D, U), loads(0, 0, 9), exclude={"decode-1"}) == (None, "unified-2")


def test_when_all_were_tried_there_is_no_capacity() -> None:
    with pytest.raises(NoCapacityError):
        chosen(pool(P, D), loads(0, 0), exclude={"decode-1"})


def test_a_choice_says_why() -> None:
    assert choose(pool(P, D), loads(2, 3)).reason == "fewest in flight: prefill-0 2, decode-1 3"
    assert choose(pool(P, D, U), loads(0, 4, 1)).reason == "unified-2 has 1 in flight, decode-1 4"
    assert "unified-0" in choose(pool(U), loads(0)).reason


def test_in_flight_grows_without_forgetting() -> None:
    made = InFlight()
    made.grow(1)
    made.start(0)
    made.grow(3)
    made.grow(2)
    assert (made.now, made.ever) == ([1, 0, 0], [1, 0, 0])
    made.end(0)
    assert (made.now, made.ever) == ([0, 0, 0], [1, 0, 0])


def test_equal_engines_share_evenly_and_the_same_history_gives_the_same_choices() -> None:
    def run(seed: int) -> list[tuple[str | None, str]]:
        chance = random.Random(seed)
        six = pool(P, P, P, D, D, U)
        counts = InFlight()
        counts.grow(6)
        running: list[list[int]] = []
        story: list[tuple[str | None, str]] = []
        for _ in range(2000):
            choice = choose(six, counts)
            slots = [e.slot for e in (choice.prefill, choice.decode) if e is not None]
            least = min(counts.now[s] for s in (3, 4, 5))
            assert counts.now[choice.decode.slot] == least, "never one that has more to do than another"
            for slot in slots:
                counts.start(slot)
            running.append(slots)
            story.append((choice.prefill.id if choice.prefill is not None else None, choice.decode.id))
            while len(running) > 12 or (running and chance.random() < 0.3):
                for slot in running.pop(chance.randrange(len(running))):
                    counts.end(slot)
        assert max(counts.ever[:3]) - min(counts.ever[:3]) < 0.2 * max(counts.ever[:3])
        assert min(counts.now) >= 0
        return story

    assert run(5) == run(5)
