from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from disagg.engines.embedded import transformer
from disagg.engines.embedded.checkpoint import Rope
from disagg.engines.embedded.transformer import Segment, rope_frequencies
from tests.embedded.random_model import SMALL, Pool, random_checkpoint, random_tokens

CHECKPOINT = random_checkpoint()
LENGTH = 300


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    """Logits of every position, computed in one go."""
    pool = Pool(CHECKPOINT, page_size=64)
    return pool.prefill(random_tokens(LENGTH), pool.pages(LENGTH), LENGTH, all_logits=True)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_chunks_and_pages_do_not_matter(whole: np.ndarray, chunk: int, page_size: int) -> None:
    pool = Pool(CHECKPOINT, page_size=page_size, seed=chunk)
    logits = pool.prefill(random_tokens(LENGTH), pool.pages(LENGTH), chunk, all_logits=True)
    np.testing.assert_allclose(logits, whole, atol=2e-5)


def test_only_the_last_position_by_default(whole: np.ndarray) -> None:
    pool = Pool(CHECKPOINT)
    logits = pool.prefill(random_tokens(LENGTH), pool.pages(LENGTH), 128)
    assert logits.shape == (1, SMALL.vocab_size)
    np.testing.assert_allclose(logits, whole[-1:], atol=2e-5)


def test_a_mixed_batch_is_its_segments_one_at_a_time() -> None:
    """Decode segments of many lengths, chunks in the middle of a prompt and whole prompts, shuffled into one step."""
    shares = [(0, 40), (100, 1), (17, 1), (250, 50), (16, 1), (15, 1), (64, 33), (0, 1), (300, 1), (31, 1)]
    answers = []
    together, alone = Pool(CHECKPOINT), Pool(CHECKPOINT)
    segments = []
    for seed, (start, count) in enumerate(shares):
        tokens = random_tokens(start + count, seed=seed)
        for pool in (together, alone):
            pages = pool.pages(start + count)
            if start:
                pool.prefill(tokens[:start], pages, 512)
        segments.append(Segment(tokens[start:], start, pages, seed % 2 == 0))
        answers.append(alone.forward(segments[-1])[0])
    for got, expected in zip(together.forward(*segments), answers, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_allclose(np.nan_to_num(together.kv), np.nan_to_num(alone.kv), atol=2e-5)


def test_decode_groups_are_cut_and_put_together_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 200, 16, 17, 90, 1, 33]
    answers = []
    for group in (transformer._GROUP, 1, 100 * SMALL.kv_heads * SMALL.head_dim):
        monkeypatch.setattr(transformer, "_GROUP", group)
        pool = Pool(CHECKPOINT)
        segments = []
        for seed, length in enumerate(lengths):
            tokens, pages = random_tokens(length + 1, seed=seed), pool.pages(length + 1)
            pool.prefill(tokens[:length], pages, 64)
            segments.append(Segment(tokens[length:], length, list(pages)))
        answers.append(np.concatenate(pool.forward(*segments)))
    np.testing.assert_allclose(answers[1], answers[0], atol=2e-5)
    np.testing.assert_allclose(answers[2], answers[0], atol=2e-5)


def test_a_sequence_never_reads_another_ones_leftovers() -> None:
    """Pages that broke (NaN all over) serve the next sequence, whose answer must be as on fresh pages."""
    tokens = random_tokens(50)
    fresh, used = Pool(CHECKPOINT), Pool(CHECKPOINT)
    pages = used.pages(64)
    used.prefill(random_tokens(64, seed=9), pages, 64)
    used.kv[pages] = np.nan
    for pool in (fresh, used):
        pool.prefill(tokens[:20], pages, 20)
    longer = used.pages(200)
    used.prefill(random_tokens(200, seed=8), longer, 64)
    neighbour = Segment(random_tokens(1), 199, longer)  # makes the group wide, so that padding is read
    for at in range(20, 50):
        expected = fresh.forward(Segment(tokens[at : at + 1], at, pages))[0]
        got = used.forward(neighbour, Segment(tokens[at : at + 1], at, pages))[1]
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_broken_pages_give_nan_and_not_a_plausible_answer() -> None:
    pool = Pool(CHECKPOINT)
    tokens, pages = random_tokens(40), pool.pages(40)
    pool.prefill(tokens[:39], pages, 39)
    pool.kv[pages[1], 0, 0, 3] = np.nan
    assert np.isnan(pool.forward(Segment(tokens[39:], 39, pages))[0]).all()


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_large_scores_do_not_overflow(scale: float) -> None:
    """With large weights the scores leave the range in which the maximum need not be subtracted."""
    checkpoint = random_checkpoint(scale=scale)
    layers = tuple(dataclasses.replace(layer, q_norm=None, k_norm=None) for layer in checkpoint.layers)
    pool = Pool(dataclasses.replace(checkpoint, layers=layers))
    pages, tokens = pool.pages(200), random_tokens(200)
    chunked = pool.prefill(tokens, pages, 200, all_logits=True)
    stepped = pool.prefill(tokens, pages, 1, all_logits=True)
    assert np.isfinite(chunked).all()
    np.testing.assert_allclose(chunked, stepped, rtol=1e-3, atol=scale * 1e-2)


@pytest.mark.parametrize("shift", [0.0, 59.0, -59.0, 61.0, -61.0, 1000.0, -1000.0])
def test_the_softmax_wherever_the_scores_lie(shift: float) -> None:
    relative = np.array([[0.0, -1.0, -2.0], [0.0, -100.0, -np.inf]], np.float32)
    scores = relative + np.float32(shift)
    total = transformer._exponentiate(scores)
    expected = np.exp(relative) / np.exp(relative).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(scores / total, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("start", "count", "pages"), [(0, 17, [0]), (16, 1, [0]), (0, 1, [-1]), (0, 1, [256]), (0, 20, [3, 999]), (0, 0, [0])]
)
def test_wrong_pages_are_refused_before_anything_is_written(start: int, count: int, pages: list[int]) -> None:
    pool = Pool(CHECKPOINT)
    good = Segment(random_tokens(3), 0, pool.pages(3))
    with pytest.raises(IndexError):
        pool.forward(Segment(random_tokens(count), start, pages), good)
    assert np.isnan(pool.kv).all()


def test_one_page_is_one_range_of_bytes() -> None:
    """The handoff copies pages; a sequence whose pages were copied elsewhere continues as if nothing had happened."""
    prefill, decode = Pool(CHECKPOINT), Pool(CHECKPOINT, seed=5)
    tokens = random_tokens(61)
    here, there = prefill.pages(61), decode.pages(61)
    prefill.prefill(tokens[:60], here, 32)
    for source, target in zip(here, there, strict=True):
        decode.kv[target] = np.frombuffer(prefill.kv[source].tobytes(), np.float32).reshape(decode.kv[target].shape)
    expected = prefill.forward(Segment(tokens[60:], 60, here))[0]
    assert np.array_equal(decode.forward(Segment(tokens[60:], 60, there))[0], expected)


def test_llama3_rope_by_hand() -> None:
    """Short wavelengths stay, long ones are divided by the factor, and between them both are blended."""
    rope = Rope(theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
    plain, stretched = rope_frequencies(Rope(theta=10_000.0), 8), rope_frequencies(rope, 8)
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    kept = (64 * 0.1 / (2 * np.pi) - 1) / 3  # the second: 1.02 turns in the original context
    np.testing.assert_allclose(stretched, [1.0, kept * 0.1 + (1 - kept) * 0.1 / 8, 0.01 / 8, 0.001 / 8], rtol=1e-5)
