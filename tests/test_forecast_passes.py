"""What first tokens say about passes over several prompts, whose KV arrives one after the other."""

from __future__ import annotations

import random

import pytest

from disagg.policy.cost import Line, at, square
from disagg.policy.forecast import Forecast

LINE: Line = (0.025, 1.4e-4, 5e-9)


def run(forecast: Forecast, passes: int, together: int, apart_s: float, *, line: Line = LINE, begin: float = 0.0) -> float:
    """An engine that always has prompts to read, so many in a pass; their KV needs so long a token."""
    chance = random.Random(1)
    now = begin
    waiting = [[chance.randrange(500, 4000) for _ in range(together)] for _ in range(passes)]
    readings = [[forecast.sent(0, tokens, now=now) for tokens in group] for group in waiting]
    for group, sent in zip(waiting, readings, strict=True):
        now += at(line, (float(sum(group)), float(sum(square(0, n) for n in group))))
        there = now
        for tokens, reading in zip(group, sent, strict=True):
            there += apart_s * tokens
            forecast.read(reading, now=there)
        forecast.tick(there)
    return now


@pytest.mark.parametrize("together", [1, 2, 4, 8])
@pytest.mark.parametrize("apart_s", [0.0, 1e-6, 1e-5, 2.6e-5, 4e-5])
def test_a_pass_is_known_however_far_apart_its_first_tokens_come(together: int, apart_s: float) -> None:
    forecast = Forecast()
    forecast.grow(1)
    run(forecast, 60, together, apart_s)
    whole = at(LINE, (2000.0, float(square(0, 2000))))
    assert forecast.pass_s(0, 2000) == pytest.approx(whole, rel=0.15), forecast.known(0, now=0.0)
    forecast.check()


def test_an_engine_that_has_become_much_faster_is_believed() -> None:
    """Its first tokens all come too soon for what was known: they are not taken for one endless pass."""
    forecast = Forecast()
    forecast.grow(1)
    now = run(forecast, 40, 1, 0.0)
    run(forecast, 320, 1, 0.0, line=(LINE[0] / 4, LINE[1] / 4, LINE[2] / 4), begin=now)
    whole = at(LINE, (2000.0, float(square(0, 2000))))
    assert forecast.pass_s(0, 2000) == pytest.approx(whole / 4, rel=0.3)


def test_the_kv_of_an_answer_is_a_mean_over_steps() -> None:
    """Long prompts with short answers, and long answers to short prompts: what is written at any moment is mostly the latter."""
    forecast = Forecast()
    forecast.grow(1)
    for _ in range(400):
        for prompt, answer in ((4000, 20), (400, 600)):
            forecast.left(forecast.sent(0, prompt, now=0.0), now=0.0)
            forecast.answered(answer, prompt)
    steps = 20 * (4000 + 10) + 600 * (400 + 300)
    assert forecast.context_tokens == pytest.approx(steps / 620, rel=0.02)
    assert forecast.prompt_tokens + forecast.answer_tokens / 2 > 2 * forecast.context_tokens


def test_without_the_prompt_of_an_answer_the_means_must_do() -> None:
    forecast = Forecast()
    forecast.grow(1)
    forecast.left(forecast.sent(0, 1000, now=0.0), now=0.0)
    forecast.answered(300)
    assert forecast.context_tokens == pytest.approx(forecast.prompt_tokens + forecast.answer_tokens / 2)
