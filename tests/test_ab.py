"""Pairs against unified engines: what is counted, and when a difference is called one."""

from __future__ import annotations

import pytest

from disagg.policy.ab import ENOUGH, Comparison


def compared(pairs: int, unified: int, *, engines: tuple[int, int] = (2, 2), late: int = 0) -> Comparison:
    """One hour with so many streams of each arm, of which the last ones of the unified arm were late."""
    found = Comparison(ttft_s=1.0, itl_s=0.05)
    found.tick(*engines, now=10.0)
    for number in range(pairs):
        found.ended(unified=False, ttft_s=0.1 + number / pairs / 10, itl_s=0.01)
    for number in range(unified):
        found.ended(unified=True, ttft_s=2.0 if number >= unified - late else 0.2, itl_s=0.02)
    found.tick(*engines, now=10.0 + 3600)
    return found


def test_goodput_is_given_per_engine_hour() -> None:
    pairs, unified = compared(1000, 600, engines=(4, 1)).rows()
    assert (pairs.streams, pairs.good, pairs.engine_hours, pairs.good_per_engine_hour) == (1000, 1000, 4.0, 250.0)
    assert (unified.engine_hours, unified.good_per_engine_hour) == (1.0, 600.0)
    assert pairs.ttft_p50_s == pytest.approx(0.15)
    assert pairs.ttft_p99_s == pytest.approx(0.199)
    assert unified.itl_p99_s == 0.02


@pytest.mark.parametrize(("ttft_s", "itl_s", "good"), [(1.0, 0.05, 1), (1.01, 0.05, 0), (1.0, 0.051, 0), (0.5, 0.0, 1)])
def test_a_stream_is_good_within_both_objectives(ttft_s: float, itl_s: float, good: int) -> None:
    found = Comparison(ttft_s=1.0, itl_s=0.05)
    found.ended(unified=True, ttft_s=ttft_s, itl_s=itl_s)
    assert found.rows()[1].good == good


def test_the_verdict_names_the_better_arm_and_by_how_much() -> None:
    assert compared(3000, 1000).verdict() == "pairs bring 3.00 times as many good streams per engine-hour"
    assert compared(1000, 1000, engines=(4, 1)).verdict() == "unified engines bring 4.00 times as many good streams per engine-hour"
    assert compared(1000, 1000, late=500).verdict().startswith("pairs bring 2.00 times")


def test_small_differences_and_few_streams_are_no_verdict() -> None:
    assert "the same" in compared(1000, 980).verdict()
    assert compared(1000, ENOUGH - 1).verdict() == "too little was seen to compare: 99 streams of unified, 100 of each are wanted"
    assert "0 streams of pairs and 0 streams of unified" in Comparison(1.0, 1.0).verdict()
    nobody = Comparison(0.01, 0.01)
    for unified in (False, True) * ENOUGH:
        nobody.ended(unified=unified, ttft_s=1.0, itl_s=1.0)
    assert nobody.verdict().startswith("neither")


def test_an_arm_without_engines_has_no_goodput_and_a_clock_that_jumps_back_adds_no_time() -> None:
    found = Comparison(1.0, 1.0)
    found.tick(2, 0, now=100.0)
    found.tick(2, 0, now=50.0)
    found.tick(2, 0, now=60.0)
    pairs, unified = found.rows()
    assert pairs.engine_hours == pytest.approx(20 / 3600)
    assert unified.good_per_engine_hour is None
