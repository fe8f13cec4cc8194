"""What is measured of engines, and the limits that follow."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.handoff import Limits
from disagg.policy.pace import ENOUGH, FLOOR_S, GAPS_WINDOW, READS_WINDOW, Pace

CAPS = Limits(connect_s=2.0, first_token_s=60.0, between_tokens_s=60.0, linger_s=5.0)
WHOLE_S = 600.0
P, D = 0, 1


def pace() -> Pace:
    made = Pace(CAPS, WHOLE_S)
    made.grow(2)
    return made


def read(measured: Pace, prompt_bytes: int, seconds: float, times: int = 1) -> None:
    for _ in range(times):
        work = measured.sent(P, prompt_bytes)
        measured.first_token(P, D, work, seconds)
        measured.left(P, prompt_bytes)


def test_what_is_unknown_gets_what_is_configured() -> None:
    assert pace().limits(P, D, 1000) == CAPS
    assert pace().limits(None, D, 1000, whole=True, max_tokens=10).first_token_s == WHOLE_S


def test_few_samples_are_unknown() -> None:
    measured = pace()
    read(measured, 1000, 0.1, ENOUGH - 1)
    measured.token_gap(D, 0.01, ENOUGH - 1)
    assert measured.limits(P, D, 1000) == CAPS
    read(measured, 1000, 0.1)
    measured.token_gap(D, 0.01, 1)
    assert measured.limits(P, D, 1000).first_token_s == FLOOR_S
    assert measured.limits(P, D, 1000).between_tokens_s == FLOOR_S


def test_three_times_what_the_queue_and_the_prompt_are_to_take() -> None:
    measured = pace()
    read(measured, 10_000, 1.0, 10)
    assert abs(measured.limits(P, D, 30_000).first_token_s - 9.0) < 1e-6
    assert measured.sent(P, 20_000) == 20_000
    assert abs(measured.limits(P, D, 30_000).first_token_s - 15.0) < 1e-6, "20,000 bytes are before it"
    measured.left(P, 20_000)
    assert abs(measured.limits(P, D, 30_000).first_token_s - 9.0) < 1e-6


def test_a_wait_behind_others_does_not_make_an_engine_slow() -> None:
    measured = pace()
    for _ in range(20):  # ten prompts at once, each a second of work
        works = [measured.sent(P, 10_000) for _ in range(10)]
        for number, work in enumerate(works):
            measured.first_token(P, D, work, 1.0 * (number + 1))
            measured.left(P, 10_000)
    rate = measured.byte_s(P)
    assert rate is not None
    assert abs(rate - 1e-4) < 1e-6


def test_a_prompt_that_is_larger_by_far_than_any_seen_is_unknown() -> None:
    measured = pace()
    read(measured, 1000, 0.01, 10)
    assert measured.limits(P, D, 1000).first_token_s == FLOOR_S
    assert measured.limits(P, D, 100_000).first_token_s == CAPS.first_token_s


def test_an_engine_that_mostly_answers_from_its_cache_is_not_given_up_over_what_it_has_to_read() -> None:
    measured = pace()
    for number in range(200):
        read(measured, 100_000, 12.0 if number % 100 == 0 else 0.05)
    assert measured.limits(P, D, 100_000).first_token_s >= 12.0


def test_a_whole_answer_gets_time_for_its_tokens() -> None:
    measured = pace()
    read(measured, 1000, 0.1, 10)
    measured.token_gap(D, 0.05, 100)
    assert abs(measured.limits(P, D, 1000, whole=True, max_tokens=100).first_token_s - (FLOOR_S + 15.0)) < 1e-6
    assert measured.limits(P, D, 1000, whole=True, max_tokens=100_000).first_token_s == WHOLE_S
    assert measured.limits(P, D, 1000, whole=True).first_token_s == WHOLE_S, "nobody said how long it may be"


def test_limits_that_were_too_short_are_doubled_until_the_engine_is_in_time() -> None:
    measured = pace()
    read(measured, 1000, 0.1, 10)
    measured.timed_out(P)
    assert measured.limits(P, D, 1000).first_token_s == 2 * FLOOR_S
    measured.timed_out(P)
    assert measured.limits(P, D, 1000).first_token_s == 4 * FLOOR_S
    read(measured, 1000, 0.1)
    assert measured.limits(P, D, 1000).first_token_s == FLOOR_S


def test_all_that_an_engine_has_when_it_begins_may_be_read_in_one_pass() -> None:
    """Seven prompts that came while the first was read: they end together, the first of them as late as the last."""
    measured = pace()
    read(measured, 4000, 4.0, 10)
    measured.sent(P, 1000)
    assert measured.limits(P, D, 1000).first_token_s == pytest.approx(6.0)
    for _ in range(7):
        measured.sent(P, 1000)
    assert measured.reads_until(P, D, 0.0) == -math.inf, "nothing was seen of it"
    measured.left(P, 1000)
    measured.handed_over(P, now=1.0)
    assert measured.reads_until(P, D, 0.1) == pytest.approx(22.0)
    assert measured.reads_until(P, D, 1.0) == -math.inf, "nothing since this one was sent"
    for _ in range(100):
        measured.sent(P, 1000)
    assert measured.reads_until(P, D, 0.1) == pytest.approx(22.0), (
        "who comes later is not in that pass: a hang is found out no later for them"
    )
    measured.handed_over(P, now=1.2)
    assert measured.reads_until(P, D, 0.1) == 60.1, "one more of the same pass, so that a hundred are left; no longer than is configured"
    measured.handed_over(P, now=9.0)
    assert measured.reads_until(P, D, 0.1) == -math.inf, "two passes have left it behind: it is lost"


def test_another_process_starts_anew_and_what_is_in_flight_is_counted_on() -> None:
    measured = pace()
    read(measured, 1000, 0.1, 10)
    measured.token_gap(D, 0.05, 100)
    measured.sent(P, 500)
    measured.forget(P)
    measured.forget(D)
    assert measured.limits(P, D, 1000) == CAPS
    assert (measured.samples(P), measured.samples(D), measured.queued(P)) == ((0, 0), (0, 0), 500)
    measured.left(P, 500)
    assert measured.queued(P) == 0


def test_tokens_that_came_together_say_nothing_of_the_pace() -> None:
    measured = pace()
    measured.token_gap(D, 0.02, 50)
    measured.token_gap(D, 0.0, 50)
    assert measured.step_s(D) == 0.02


@given(st.lists(st.tuples(st.integers(1, 200_000), st.floats(0.001, 100.0)), min_size=ENOUGH, max_size=READS_WINDOW))
def test_no_limit_is_under_what_was_seen_lately(samples: list[tuple[int, float]]) -> None:
    measured = pace()
    for prompt_bytes, seconds in samples:
        read(measured, prompt_bytes, seconds)
    for prompt_bytes, seconds in samples:
        limit = measured.limits(P, D, prompt_bytes).first_token_s
        assert min(FLOOR_S, seconds) <= min(seconds, CAPS.first_token_s) <= limit <= CAPS.first_token_s
        assert limit >= FLOOR_S


@given(st.lists(st.tuples(st.floats(0.0001, 20.0), st.integers(1, 32)), min_size=ENOUGH, max_size=GAPS_WINDOW // 32))
def test_no_pause_is_too_long_that_was_seen_lately(gaps: list[tuple[float, int]]) -> None:
    measured = pace()
    for seconds, count in gaps:
        measured.token_gap(D, seconds, count)
    limit = measured.limits(P, D, 1).between_tokens_s
    assert FLOOR_S <= limit <= CAPS.between_tokens_s
    assert all(limit >= min(CAPS.between_tokens_s, seconds * count) for seconds, count in gaps)


def test_a_long_pause_is_forgotten() -> None:
    measured = pace()
    measured.token_gap(D, 40.0, 1)
    chance = random.Random(5)
    for _ in range(3 * GAPS_WINDOW):
        measured.token_gap(D, chance.uniform(0.01, 0.02), 1)
    assert measured.limits(P, D, 1).between_tokens_s == FLOOR_S
