from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from disagg.engines.embedded.sampler import (
    Sampler,
    SamplingParams,
    best_tokens,
    candidates,
    greedy_batch,
    input_logprobs,
    log_softmax,
)
from disagg.errors import EngineError, RequestError

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def sampler(params: SamplingParams, seed: int = 0, **options: object) -> Sampler:
    return Sampler(params, vocab_size=5, generator=np.random.default_rng(seed), **options)  # type: ignore[arg-type]


def frequencies(params: SamplingParams, draws: int = 6_000) -> np.ndarray:
    chooser = sampler(params)
    return np.bincount([chooser.sample(LOGITS).token for _ in range(draws)], minlength=5)


def assert_distribution(counts: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square at one in a thousand; the generator's seed is fixed, so a failure is no accident."""
    assert counts[expected == 0].sum() == 0
    wanted = counts.sum() * expected[expected > 0] / expected.sum()
    statistic = ((counts[expected > 0] - wanted) ** 2 / wanted).sum()
    limits = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}
    assert statistic < limits[len(wanted) - 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    assert_distribution(frequencies(SamplingParams(temperature=temperature)), PROBABILITIES ** (1 / temperature))


def test_top_k_top_p_and_min_p_draw_from_what_they_keep() -> None:
    kept = np.where([False, True, False, True, True], PROBABILITIES, 0)
    assert_distribution(frequencies(SamplingParams(top_k=3)), kept)
    assert_distribution(frequencies(SamplingParams(top_p=0.8)), kept)
    assert_distribution(frequencies(SamplingParams(min_p=0.3)), kept)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), {0, 1, 2, 3, 4}),
        (SamplingParams(top_k=1), {1}),
        (SamplingParams(top_k=2), {1, 3}),
        (SamplingParams(top_k=5), {0, 1, 2, 3, 4}),
        (SamplingParams(top_k=99), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.01), {1}),
        (SamplingParams(top_p=0.39), {1}),
        (SamplingParams(top_p=0.41), {1, 3}),
        (SamplingParams(top_p=0.71), {1, 3, 4}),
        (SamplingParams(top_p=0.99), {0, 1, 2, 3, 4}),
        (SamplingParams(min_p=0.74), {1, 3}),
        (SamplingParams(min_p=0.76), {1}),
        (SamplingParams(min_p=1.0), {1}),
        (SamplingParams(top_k=2, top_p=0.8, min_p=0.1), {1, 3}),
        # Top-p is judged on the full distribution, not on what top-k leaves: 0.4 / 0.7 would reach 0.5 at once.
        (SamplingParams(top_k=2, top_p=0.5), {1, 3}),
    ],
)
def test_candidates(params: SamplingParams, kept: set[int]) -> None:
    tokens, weights = candidates(LOGITS, params)
    assert set(tokens.tolist()) == kept
    np.testing.assert_allclose(weights / weights.sum(), PROBABILITIES[tokens] / PROBABILITIES[tokens].sum(), rtol=1e-6)


def test_equal_probabilities_are_cut_by_id() -> None:
    tokens, _ = candidates(np.zeros(6, np.float32), SamplingParams(top_k=2))
    assert tokens.tolist() == [0, 1]


def test_top_p_stops_where_it_is_reached() -> None:
    tokens, _ = candidates(np.zeros(4, np.float32), SamplingParams(top_p=0.5))
    assert tokens.tolist() == [0, 1]


class Extreme(np.random.Generator):
    """Draws one end of [0, 1)."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self._value = value

    def random(self, *_: Any, **__: Any) -> Any:
        return self._value


@pytest.mark.parametrize(("value", "token"), [(0.0, 1), (np.nextafter(1, 0), 3)])
def test_a_token_of_no_probability_is_never_drawn(value: float, token: int) -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    chooser = Sampler(SamplingParams(), vocab_size=5, generator=Extreme(value))
    assert chooser.sample(logits).token == token


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=1), SamplingParams(temperature=1e-7)])
def test_greedy(params: SamplingParams) -> None:
    assert params.greedy
    assert {sampler(params, seed).sample(LOGITS).token for seed in range(20)} == {1}


def test_greedy_batch_is_the_sampler_row_by_row() -> None:
    logits = np.random.default_rng(0).standard_normal((7, 5), np.float32)
    logits[3] = 0  # among equals the lowest id
    chosen = [sampler(SamplingParams(temperature=0)).sample(row).token for row in logits]
    assert greedy_batch(logits).tolist() == chosen
    assert chosen[3] == 0


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_with_a_seed_a_token_depends_on_its_position_only() -> None:
    """A request that moves to another engine after token k goes on as if it had stayed."""
    params = SamplingParams(seed=42)
    whole = sampler(params, seed=1)
    tokens = [whole.sample(LOGITS).token for _ in range(40)]
    for k in (1, 7, 39):
        moved = sampler(params, seed=2, generated=tokens[:k])
        assert [moved.sample(LOGITS).token for _ in range(40 - k)] == tokens[k:]
        again = sampler(params, seed=2, start=k)
        assert [again.sample(LOGITS).token for _ in range(40 - k)] == tokens[k:], "what was made stands at the prompt's end now"
    assert len(set(tokens)) > 2
    other = sampler(SamplingParams(seed=43))
    assert [other.sample(LOGITS).token for _ in range(40)] != tokens


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_seed_will_do(seed: int) -> None:
    assert sampler(SamplingParams(seed=seed)).sample(LOGITS).token in range(5)


def test_seeded_draws_follow_the_distribution() -> None:
    counts = np.bincount([sampler(SamplingParams(seed=seed)).sample(LOGITS).token for seed in range(5000)], minlength=5)
    assert_distribution(counts, PROBABILITIES)
    assert_distribution(frequencies(SamplingParams(seed=7), 5000), PROBABILITIES)


def test_without_a_seed_the_generator_decides() -> None:
    a, b, c = (sampler(SamplingParams(), seed) for seed in (1, 1, 2))
    tokens = [[s.sample(LOGITS).token for _ in range(30)] for s in (a, b, c)]
    assert tokens[0] == tokens[1] != tokens[2]


# --- penalties, bias, min_new_tokens --------------------------------------------------------------------------------


def test_penalties_by_hand() -> None:
    """Token 1 twice and token 3 once: additive penalties first, then the multiplicative one by the sign."""
    params = SamplingParams(temperature=0, frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0)
    logits = np.array([1.0, 4.0, -1.0, 0.5, 2.0], np.float32)
    chooser = sampler(params, generated=[1, 3, 1], top_logprobs=5)
    adjusted = [1.0, (4 - 2 * 0.5 - 0.25) / 2, -1.0, (0.5 - 0.5 - 0.25) * 2, 2.0]
    sampled = chooser.sample(logits)
    assert sampled.token == 4
    expected = log_softmax(np.array(adjusted, np.float32))
    np.testing.assert_allclose([p for _, p in sorted(sampled.top)], expected, rtol=1e-5)
    assert logits.tolist() == [1.0, 4.0, -1.0, 0.5, 2.0]


def test_a_sampled_token_is_counted_for_the_next() -> None:
    chooser = sampler(SamplingParams(temperature=0, frequency_penalty=2.0))
    logits = np.array([3.0, 2.5, 0.0, 0.0, 0.0], np.float32)
    assert [chooser.sample(logits).token for _ in range(4)] == [0, 1, 0, 1]


def test_logit_bias() -> None:
    assert sampler(SamplingParams(temperature=0, logit_bias={2: 5.0})).sample(LOGITS).token == 2
    assert_distribution(frequencies(SamplingParams(logit_bias={1: -100.0})), np.where([1, 0, 1, 1, 1], PROBABILITIES, 0))


def test_the_end_does_not_come_before_min_new_tokens() -> None:
    params = SamplingParams(temperature=0, min_new_tokens=2, stop_token_ids=(3,))
    chooser = sampler(params, eos_ids=[1])
    assert [chooser.sample(LOGITS).token for _ in range(3)] == [4, 4, 1]


def test_plain_says_when_a_batched_argmax_will_do() -> None:
    greedy = SamplingParams(temperature=0)
    assert sampler(greedy, top_logprobs=None).plain
    assert not sampler(greedy, top_logprobs=0).plain
    assert not sampler(SamplingParams(), top_logprobs=None).plain
    assert not sampler(SamplingParams(temperature=0, logit_bias={1: 1.0}), top_logprobs=None).plain
    assert not sampler(SamplingParams(temperature=0, presence_penalty=1.0), top_logprobs=None).plain
    waiting = sampler(SamplingParams(temperature=0, min_new_tokens=1), top_logprobs=None)
    assert not waiting.plain
    waiting.accept(0)
    assert waiting.plain


# --- logprobs -------------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_distribution_before_the_cuts() -> None:
    sampled = sampler(SamplingParams(temperature=2.0, top_k=1), top_logprobs=2).sample(LOGITS)
    np.testing.assert_allclose(sampled.logprob, math.log(0.4), rtol=1e-5)  # greedy: no temperature
    warm = PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()
    sampled = sampler(SamplingParams(temperature=2.0, top_k=2, seed=1), top_logprobs=2).sample(LOGITS)
    np.testing.assert_allclose(sampled.logprob, math.log(warm[sampled.token]), rtol=1e-5)
    assert [token for token, _ in sampled.top] == [1, 3]
    np.testing.assert_allclose([p for _, p in sampled.top], np.log(warm[[1, 3]]), rtol=1e-5)


def test_no_logprobs_when_none_are_wanted() -> None:
    sampled = sampler(SamplingParams(), top_logprobs=None).sample(LOGITS)
    assert math.isnan(sampled.logprob)
    assert sampled.top == []


def test_input_logprobs() -> None:
    logits = np.stack([LOGITS, LOGITS + 7])
    np.testing.assert_allclose(input_logprobs(logits, np.array([3, 0])), np.log([0.3, 0.05]), rtol=1e-5)
    with pytest.raises(EngineError):
        input_logprobs(np.full((2, 5), np.nan, np.float32), np.array([0, 1]))


def test_best_tokens() -> None:
    assert [token for token, _ in best_tokens(LOGITS, 3)] == [1, 3, 4]
    assert [token for token, _ in best_tokens(np.zeros(6, np.float32), 2)] == [0, 1]
    assert best_tokens(LOGITS, 0) == []
    assert len(best_tokens(LOGITS, 20)) == 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_engine_error(value: float, temperature: float) -> None:
    broken = LOGITS.copy()
    broken[2] = value
    with pytest.raises(EngineError):
        sampler(SamplingParams(temperature=temperature)).sample(broken)
    with pytest.raises(EngineError):
        greedy_batch(np.stack([LOGITS, broken]))


# --- parameters -----------------------------------------------------------------------------------------------------


def test_parse_takes_a_clients_object() -> None:
    raw = {
        "temperature": 0,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "logit_bias": {"2": 1},
        "sampling_seed": 5,
        "top_p": None,
        "spaces_between_special_tokens": True,
    }
    params = SamplingParams.parse(raw)
    assert params == SamplingParams(temperature=0, stop=("a", "b"), stop_token_ids=(3,), logit_bias={2: 1.0}, seed=5)
    assert SamplingParams.parse({"stop": "x"}).stops == ("x",)
    assert SamplingParams.parse({}).stops == ()


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"temperatur": 1}, "temperatur"),
        ({"temperature": "warm"}, "temperature"),
        ({"n": True}, "n"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
    ],
)
def test_parse_refuses(raw: dict[str, object], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        SamplingParams.parse(raw)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("max_new_tokens", 0),
        ("n", 10**400),
        ("n", -(10**400)),
        ("stop_token_ids", (10**400,)),
        ("stop", ("a\ud800",)),
        ("min_new_tokens", 129),
        ("min_new_tokens", -1),
        ("n", 0),
        ("n", 129),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop", ("x",) * 65),
        ("stop_token_ids", (5,)),
        ("logit_bias", {5: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_validate_names_the_parameter(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value}).validate(5)  # type: ignore[arg-type]
    assert caught.value.param == name


def test_a_number_too_long_to_print() -> None:
    with pytest.raises(RequestError, match="so large a number"):
        SamplingParams(max_new_tokens=-(10**5000)).validate(5)


def test_validate_accepts_the_edges() -> None:
    SamplingParams().validate(5)
    SamplingParams(top_p=1, min_p=1, top_k=1, n=128, max_new_tokens=1, min_new_tokens=1, stop="x" * 1024).validate(5)
    SamplingParams(repetition_penalty=2, frequency_penalty=-2, logit_bias={4: -100.0}, stop_token_ids=(0, 4)).validate(5)
