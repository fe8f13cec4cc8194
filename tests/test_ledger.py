"""What engines are promised: never more than they have, corrected by what they say, and by nothing that is over."""

from __future__ import annotations

import random

import pytest

from disagg.model import EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Role
from disagg.policy.ledger import BYTES_PER_TOKEN, RESERVED_TOKENS, TEMPLATE_TOKENS, Ledger


def engine(*, total: int = 1000, used: int = 0, quarantined: int = 0, most: int = 0, role: Role = Role.DECODE, slot: int = 0) -> EngineView:
    load = EngineLoad(kv_used_tokens=used, kv_total_tokens=total, kv_quarantined_tokens=quarantined)
    facts = EngineFacts(model="m", max_running=most)
    return EngineView(EngineAddress(EngineId(f"e-{slot}"), role, "h", 1), slot, EngineState.READY, facts, load)


def ledger(*reserved: int) -> Ledger:
    made = Ledger()
    made.grow(max(1, len(reserved)))
    for slot, tokens in enumerate(reserved):
        made.reserve(slot, tokens)
    return made


def said(used: int, total: int = 1000, quarantined: int = 0) -> EngineLoad:
    return EngineLoad(kv_used_tokens=used, kv_total_tokens=total, kv_quarantined_tokens=quarantined)


# --- promises


def test_an_engine_is_promised_what_it_has_and_not_a_token_more() -> None:
    made = ledger(600)
    assert made.room(engine(), 400, 1)
    assert not made.room(engine(), 401, 1)
    made.reserve(0, 400)
    assert not made.room(engine(), 1, 2)
    made.release(0, 600)
    assert made.room(engine(), 600, 1)
    assert made.reserved(0) == 400


def test_each_engine_has_its_own_account() -> None:
    made = ledger(1000, 0)
    assert not made.room(engine(slot=0), 1, 1)
    assert made.room(engine(slot=1), 1000, 0)


def test_growing_keeps_what_was_promised() -> None:
    made = ledger(7)
    made.grow(3)
    made.grow(1)
    assert [made.reserved(slot) for slot in range(3)] == [7, 0, 0]


def test_what_was_not_promised_cannot_be_released() -> None:
    made = ledger(5)
    with pytest.raises(AssertionError, match="6 tokens are released in slot 0, where 5 are reserved"):
        made.release(0, 6)
    assert made.reserved(0) == 5
    with pytest.raises(AssertionError, match="cannot be reserved"):
        made.reserve(0, -1)


def test_unknown_limits_are_no_limits() -> None:
    assert ledger(10**9).room(engine(total=0), 10**9, 10**6)


def test_pages_that_a_dead_peer_may_still_write_are_no_room_and_no_drift() -> None:
    made = ledger()
    for _ in range(50):
        assert made.note_report(0, said(300, quarantined=300)) == 0
    view = engine(used=300, quarantined=300)
    assert made.room(view, 700, 0)
    assert not made.room(view, 701, 0)


def test_what_can_never_fit_goes_to_an_empty_engine_whose_answer_is_a_400() -> None:
    made = ledger(0)
    assert made.room(engine(), 1001, 0)
    made.reserve(0, 1001)
    assert not made.room(engine(), 1001, 1)
    assert not made.room(engine(), 1, 1)


@pytest.mark.parametrize("role", [Role.DECODE, Role.UNIFIED])
def test_no_more_requests_than_the_engine_runs_at_once(role: Role) -> None:
    made = ledger(10)
    assert made.room(engine(most=2, role=role), 10, 1)
    assert not made.room(engine(most=2, role=role), 10, 2)


def test_a_prefill_engine_is_bounded_by_its_memory_alone() -> None:
    made = ledger(10)
    assert made.room(engine(most=2, role=Role.PREFILL), 990, 50)
    assert not made.room(engine(most=2, role=Role.PREFILL), 991, 50)


# --- reports


def test_estimates_that_are_too_low_are_corrected() -> None:
    made = ledger(400)
    for _ in range(20):
        made.note_report(0, said(800))
    assert made.drift(0) == 400
    assert made.room(engine(used=800), 200, 4)
    assert not made.room(engine(used=800), 201, 4)


def test_one_report_alone_is_not_believed() -> None:
    made = ledger(400)
    assert 0 < made.note_report(0, said(800)) < 300


def test_what_an_engine_uses_less_than_promised_is_not_promised_twice() -> None:
    made = ledger(800)
    for _ in range(20):
        made.note_report(0, said(100))
    assert made.drift(0) == -700
    assert not made.room(engine(used=100), 201, 4)


def test_a_stale_report_of_work_that_has_ended_throttles_nothing() -> None:
    made = ledger(1000)
    made.note_report(0, said(1000))
    made.release(0, 1000)  # all ended; two reports on their way were taken before that
    for _ in range(2):
        assert made.note_report(0, said(1000)) <= 0
        assert made.room(engine(used=1000), 1000, 0)


def test_what_nobody_here_promised_is_seen_however_idle_we_are_and_forgotten_when_it_is_gone() -> None:
    made = ledger(0)
    for _ in range(20):
        made.note_report(0, said(500))
    assert not made.room(engine(used=500), 600, 0)
    for _ in range(20):
        made.note_report(0, said(0))
    assert made.room(engine(), 990, 0)


def test_an_engine_that_was_started_anew_has_no_drift() -> None:
    made = ledger(300)
    for _ in range(20):
        made.note_report(0, said(900))
    made.forget(0)
    assert (made.drift(0), made.reserved(0)) == (0, 300)
    for _ in range(20):
        made.note_report(0, said(900))
    assert made.note_report(0, said(0, total=0)) == 0  # it says nothing any more


# --- prices


def test_before_anything_is_learned_a_token_has_three_bytes() -> None:
    assert BYTES_PER_TOKEN == 3.0
    assert ledger().price("m", 300, 10)[1] == 100 + TEMPLATE_TOKENS + 10
    assert ledger().prompt_tokens("m", 300) == 100 + TEMPLATE_TOKENS


def test_of_token_ids_nothing_is_estimated() -> None:
    assert ledger().price("m", 5000, 10, tokens=1000) == (1000, 1010)
    assert ledger().price("m", 5000, 10, 600, tokens=1000) == (600, 600)


@pytest.mark.parametrize(("asked", "kept"), [(None, RESERVED_TOKENS), (0, 0), (-3, 0), (512, 512), (100_000, RESERVED_TOKENS)])
def test_for_the_answer_no_more_is_kept_than_sglang_keeps(asked: int | None, kept: int) -> None:
    assert ledger().price("m", 0, asked)[1] == TEMPLATE_TOKENS + kept


def test_bytes_per_token_are_learned_by_model() -> None:
    made = ledger()
    for _ in range(200):
        made.learn("m", 5000, 1000)
    assert made.prompt_tokens("m", 5000) == 1000 + TEMPLATE_TOKENS
    assert made.prompt_tokens("other", 300) == 100 + TEMPLATE_TOKENS


def test_a_picture_does_not_spoil_what_was_learned_of_text() -> None:
    made = ledger()
    for _ in range(200):
        made.learn("m", 4000, 1000)
    made.learn("m", 10_000_000, 1000)
    assert 850 < made.prompt_tokens("m", 4000) <= 1000 + TEMPLATE_TOKENS
    made.learn("m", 0, 5)
    made.learn("m", 5, 0)
    made.check()


def test_nothing_costs_more_than_the_longest_context() -> None:
    assert ledger().price("m", 10_000_000, None, limit=8192)[1] == 8192
    assert ledger().prompt_tokens("m", 10_000_000, limit=8192) == 8192
    assert ledger().price("m", 10_000_000, None)[1] > 3_000_000


# --- at random


@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_walk_promises_no_more_than_there_is(seed: int) -> None:
    """Estimates are wrong by up to a half, reports late by one step: what is really used is seldom much more than there is."""
    chance, made = random.Random(seed), ledger(0, 0)
    legs: list[list[tuple[int, int]]] = [[], []]
    before = [0, 0]
    over = 0
    for step in range(20_000):
        slot = chance.randrange(2)
        view, running = engine(total=10_000, slot=slot, most=40), legs[slot]
        tokens = chance.randrange(1, 1200)
        if made.room(view, tokens, len(running)) and chance.random() < 0.7:
            made.reserve(slot, tokens)
            running.append((tokens, round(tokens * chance.uniform(0.5, 1.5))))
        elif running:
            made.release(slot, running.pop(chance.randrange(len(running)))[0])
        if step % 10 == 0:
            for at in range(2):
                made.note_report(at, said(before[at], total=10_000))
                before[at] = sum(used for _, used in legs[at])
        made.check()
        assert made.reserved(slot) == sum(tokens for tokens, _ in running) <= 10_000
        assert len(running) <= 40
        over += sum(used for _, used in running) > 11_500
    assert over < 200
    for slot in range(2):
        for tokens, _ in legs[slot]:
            made.release(slot, tokens)
        assert made.reserved(slot) == 0
    made.check()
