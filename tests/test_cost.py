"""What work costs: lines that are fitted to noisy work, while it is done, by an engine that may change."""

from __future__ import annotations

import math
import random
import re

import pytest

from disagg.policy.cost import ENOUGH, RECENT, Features, Fit, Line, Prior, at, robust_line, square

DECODE: Line = (29.57e-3, 0.198e-3, 2.20e-7)
"""Seconds: a 70B model on eight H100, fitted to Splitwise's table."""
PREFILL: Line = (20e-3, 60e-6, 3e-9)


def batch(chance: random.Random) -> Features:
    running = chance.randint(1, 96)
    return float(running), float(sum(chance.randint(200, 4000) for _ in range(running)))


def prompts(chance: random.Random) -> Features:
    """One pass: one to four prompts, some of them with a cached prefix."""
    new = [int(chance.lognormvariate(6.5, 1.3)) + 1 for _ in range(chance.randint(1, 4))]
    cached = [chance.choice((0, 0, 512, 4096)) for _ in new]
    return float(sum(new)), float(sum(map(square, cached, new)))


def noisy(line: Line, work: Features, chance: random.Random, *, outliers: float = 0.0) -> float:
    seconds = at(line, work) * chance.lognormvariate(0.0, 0.03)
    if chance.random() < outliers:  # it waited for something else, or was not what it was taken for
        seconds *= chance.uniform(3.0, 20.0) ** chance.choice((1, -1))
    return seconds


def error(fit: Fit, line: Line, work: Features, now: float) -> float:
    said = fit.predict(work, now=now)
    assert said is not None
    return abs(said / at(line, work) - 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("line", "work"), [(DECODE, batch), (PREFILL, prompts)], ids=["decode", "prefill"])
def test_a_line_is_found_though_one_sample_of_ten_is_nonsense(line: Line, work: object, seed: int) -> None:
    chance = random.Random(seed)
    fit = Fit(2)
    for i in range(300):
        some = work(chance)  # type: ignore[operator]
        fit.seen(some, noisy(line, some, chance, outliers=0.1), now=i * 0.1)
        fit.check()
    others = [work(chance) for _ in range(200)]  # type: ignore[operator]
    errors = sorted(error(fit, line, some, 30.0) for some in others)
    assert errors[len(errors) // 2] < 0.03
    assert errors[int(len(errors) * 0.95)] < 0.10


def test_without_robust_weights_the_nonsense_bends_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.policy.cost._HUBER", 1e9)
    with pytest.raises(AssertionError):
        test_a_line_is_found_though_one_sample_of_ten_is_nonsense(DECODE, batch, 0)


def test_a_long_prompt_is_remembered_through_a_thousand_short_ones() -> None:
    chance = random.Random(1)
    fit = Fit(2)
    for i in range(4):
        long = (60_000.0 + i, float(square(0, 60_000 + i)))
        fit.seen(long, noisy(PREFILL, long, chance), now=float(i))
    for i in range(1000):
        n = chance.randint(100, 200)
        short = (float(n), float(square(0, n)))
        fit.seen(short, noisy(PREFILL, short, chance), now=10 + i * 0.1)
    assert error(fit, PREFILL, (50_000.0, 50_000.0**2), 110.0) < 0.15


@pytest.mark.parametrize("scale", [5.0, 0.2])
def test_an_engine_that_is_five_times_slower_is_believed_after_some_samples(scale: float) -> None:
    chance = random.Random(2)
    fit = Fit(2)
    for i in range(200):
        some = batch(chance)
        fit.seen(some, noisy(DECODE, some, chance), now=i * 0.05)
        fit.line(now=i * 0.05)
    assert fit.trust.doubt == ""
    changed = tuple(c * scale for c in DECODE)
    for i in range(RECENT):
        some = batch(chance)
        fit.seen(some, noisy(changed, some, chance), now=10 + i * 0.05)
    assert re.fullmatch(rf"it has just become (4\.[89]|5\.[0-2]) times {'slower' if scale > 1 else 'faster'} than it was", fit.trust.doubt)
    for work in ((1.0, 300.0), (90.0, 300_000.0)):
        assert error(fit, changed, work, 10.5) < 0.1
    for i in range(RECENT):
        some = batch(chance)
        fit.seen(some, noisy(changed, some, chance), now=11 + i * 0.05)
    assert fit.trust.doubt == ""


def test_without_the_comparison_a_slower_engine_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.policy.cost.SHIFT", 1e9)
    with pytest.raises(AssertionError):
        test_an_engine_that_is_five_times_slower_is_believed_after_some_samples(5.0)


@pytest.mark.parametrize("scale", [5.0, 0.2])
def test_the_samples_that_showed_a_change_are_not_scaled_with_those_from_before_it(scale: float) -> None:
    """Of work that is always the same they are all that is remembered."""
    fit = Fit(2)
    for i in range(20):
        fit.seen((8.0, 4_000.0), 0.04, now=float(i))
        fit.line(now=float(i))
    for i in range(RECENT):
        assert fit.trust.doubt == ""
        fit.seen((8.0, 4_000.0), 0.04 * scale, now=100.0 + 0.1 * i)
    assert "has just become" in fit.trust.doubt
    for i in range(20):
        fit.seen((8.0, 4_000.0), 0.04 * scale, now=200.0 + 10 * i)
        assert fit.predict((8.0, 4_000.0), now=201.0 + 10 * i) == pytest.approx(0.04 * scale)


def test_a_few_late_ones_are_no_change() -> None:
    chance = random.Random(3)
    fit = Fit(2)
    for i in range(100):
        some = batch(chance)
        late = i % RECENT != 0  # all but one in each run of them
        fit.seen(some, noisy(DECODE, some, chance) * (1.0 if i < 60 or not late else 4.0), now=i * 0.05)
        assert "has just become" not in fit.trust.doubt


def prior_of(line: Line) -> Prior:
    return Prior(line, ((1.0, 500.0), (8.0, 8_000.0), (64.0, 100_000.0)), "eight H100, a 70B model")


def test_a_prior_is_believed_before_there_is_anything_else_and_then_less_and_less() -> None:
    chance = random.Random(4)
    slower = tuple(c * 1.3 for c in DECODE)
    fit = Fit(2, prior_of(DECODE))
    assert error(fit, DECODE, (10.0, 9_000.0), 0.0) < 1e-9
    assert fit.trust.doubt == "0 samples so far; taken from eight H100, a 70B model"
    seen = []
    for i in range(400):
        some = batch(chance)
        fit.seen(some, noisy(slower, some, chance), now=float(i))
        seen.append(error(fit, slower, (10.0, 9_000.0), float(i)))
    assert seen[-1] < 0.03 < seen[0]
    assert fit.trust.samples == 400


@pytest.mark.parametrize("scale", [50.0, 10.0, 2.0, 0.5, 0.1, 0.02])
def test_of_a_prior_the_shape_is_believed_and_not_the_scale(scale: float) -> None:
    chance = random.Random(6)
    real = tuple(c * scale for c in DECODE)
    fit = Fit(2, prior_of(DECODE))
    for i in range(4):
        some = (float(1 + i), 1000.0 * (1 + i))
        fit.seen(some, noisy(real, some, chance), now=float(i))
        fit.line(now=float(i))
    assert error(fit, real, (64.0, 100_000.0), 4.0) < 0.1, "of a batch of which nothing like it was seen"


def test_a_first_sample_that_went_wrong_does_not_scale_a_prior() -> None:
    fit = Fit(2, prior_of(DECODE))
    fit.seen((8.0, 8_000.0), 30 * at(DECODE, (8.0, 8_000.0)), now=0.0)
    assert error(fit, DECODE, (64.0, 100_000.0), 1.0) < 0.5


def test_an_old_sample_is_still_worth_more_than_a_prior() -> None:
    chance = random.Random(7)
    flat = (0.03, 1e-6, 0.0)
    fit = Fit(2, prior_of(DECODE))
    for i in range(400):
        some = batch(chance)
        fit.seen(some, noisy(flat, some, chance), now=i * 0.1)
    fit.line(now=40.0)
    for i in range(3):
        fit.seen((1.0, 500.0), at(flat, (1.0, 500.0)), now=40_000.0 + 20 * i)
    assert error(fit, flat, (64.0, 100_000.0), 41_000.0) < 0.05


def test_without_a_prior_nothing_is_said_until_there_are_as_many_samples_as_coefficients() -> None:
    fit = Fit(2)
    for i in range(2):
        fit.seen((1.0 + i, 100.0 * (i + 1)), 0.03, now=0.0)
        assert fit.predict((1.0, 100.0), now=0.0) is None
    fit.seen((9.0, 50.0), 0.03, now=0.0)
    assert fit.predict((1.0, 100.0), now=0.0) is not None
    assert fit.trust.doubt == "3 samples so far"


def test_work_that_is_always_the_same_says_what_it_costs_and_invents_nothing() -> None:
    fit = Fit(2)
    for i in range(50):
        fit.seen((8.0, 4_000.0), 0.04, now=float(i))
    assert fit.predict((8.0, 4_000.0), now=50.0) == pytest.approx(0.04)
    twice = fit.predict((16.0, 8_000.0), now=50.0)
    assert twice is not None
    assert 0.04 - 1e-9 <= twice <= 0.08 + 1e-9


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_measurement_changes_nothing(seconds: float) -> None:
    fit = Fit(1)
    for i in range(ENOUGH):
        fit.seen((1e6 * i,), 0.001 + 1e-3 * i, now=0.0)
    before = (fit.line(now=9.0), fit.trust)
    fit.seen((1e6,), seconds, now=10.0)
    fit.seen((math.nan,), 1.0, now=10.0)
    fit.seen((-1.0,), 1.0, now=10.0)
    assert (fit.line(now=20.0), fit.trust) == before


def test_another_process_begins_with_the_prior() -> None:
    fit = Fit(2, prior_of(DECODE))
    for i in range(50):
        fit.seen((8.0, 4_000.0), 4.0, now=float(i))
    fit.forget()
    assert error(fit, DECODE, (10.0, 9_000.0), 60.0) < 1e-9
    assert fit.trust.samples == 0


def test_a_clock_that_jumps_back_harms_nothing() -> None:
    fit = Fit(1)
    for i in range(20):
        fit.seen((float(i + 1),), 0.01 * (i + 1), now=1000.0 - i * 100.0)
        fit.check()
    assert fit.predict((10.0,), now=1000.0) == pytest.approx(0.1, rel=0.01)
    for i in range(20):
        fit.seen((float(i + 1),), 0.013 * (i + 1), now=-1e6 + i)
        fit.line(now=-1e6 + i)
    assert fit.predict((10.0,), now=-1e6 + 30) == pytest.approx(0.13, rel=0.1), "it is fitted by the clock as it is now"


def test_a_random_walk_keeps_its_books() -> None:
    chance = random.Random(5)
    fit = Fit(2, prior_of(DECODE))
    now = 0.0
    for _ in range(3000):
        now += chance.expovariate(5.0)
        work = (float(chance.randrange(0, 1 << chance.randrange(20))), float(chance.randrange(0, 1 << chance.randrange(40))))
        fit.seen(work, chance.choice((1e-9, 0.01, 1.0, 1e6)), now=now)
        fit.check()
        if chance.random() < 0.01:
            fit.forget()


def test_a_line_that_would_fall_is_flat() -> None:
    line = robust_line([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0], [1.0] * 3)
    assert min(line) >= 0.0
    assert line[1] == 0.0
