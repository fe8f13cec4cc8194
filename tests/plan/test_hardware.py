"""Engines in virtual time: steps in one go are steps one by one, caches give up what is old, links send one prompt after the other."""

from __future__ import annotations

import random

import pytest

from disagg.plan.hardware import Cache, Hardware, Reader, Work, Writer

HARDWARE = Hardware()


def work(prompt: int, answer: int = 1, names: tuple[int, ...] = (), number: int = 0) -> Work:
    return Work(number, 0.0, prompt, answer, names)


@pytest.mark.parametrize("seed", range(5))
def test_many_steps_in_one_go_are_the_same_steps_one_by_one(seed: int) -> None:
    chance = random.Random(seed)
    at_once, one_by_one = Writer(HARDWARE), Writer(HARDWARE)
    for writer in (at_once, one_by_one):
        draw = random.Random(seed)
        writer.joining = [work(draw.randrange(1, 5000), draw.randrange(2, 300), number=n) for n in range(30)]
        writer.admit(0.0)
    while at_once.batch:
        steps = min(chance.randrange(1, 40), at_once.to_first_end())
        ended = {w.number for w in at_once.advance(steps)}
        assert ended == {w.number for _ in range(steps) for w in one_by_one.advance(1)}
        assert at_once.at == pytest.approx(one_by_one.at, rel=1e-12)
        assert at_once.kv == one_by_one.kv
    assert at_once.kv == 0


def test_the_step_that_is_under_way_is_found_without_counting() -> None:
    writer = Writer(HARDWARE)
    writer.joining = [work(2000, 10_000, number=n) for n in range(50)]
    writer.admit(0.0)
    for now in (1e-9, 0.01, 0.08, 1.0, 17.3, 300.0):
        steps = writer.steps_until(now)
        assert writer.steps_s(steps - 1) < now <= writer.steps_s(steps)
    assert writer.steps_until(writer.steps_s(7)) == 7
    assert writer.steps_until(0.0) == 0


def test_a_cache_gives_up_the_end_of_what_was_used_least_recently() -> None:
    cache = Cache(5)
    cache.used((1, 2, 3))
    cache.used((1, 4, 5))
    assert (cache.leading((1, 2, 3)), cache.leading((1, 4, 5))) == (3, 3)
    cache.used((1, 6))
    assert (cache.leading((1, 2, 3)), cache.leading((1, 4, 5)), cache.leading((1, 6))) == (2, 3, 2)


def test_a_pass_reads_what_fits_into_a_chunk_and_one_whole_prompt_always() -> None:
    reader = Reader(HARDWARE, 0)
    for tokens in (5000, 3000, 500, 20_000, 10):
        reader.add(work(tokens))
    a, b, c = HARDWARE.read
    assert reader.start(0.0) == pytest.approx(a + b * 8000 + c * (5000**2 + 3000**2))
    assert [w.prompt for w in reader.done()] == [5000, 3000]
    assert [(reader.start(0.0) > 0.0, [w.prompt for w in reader.done()]) for _ in range(3)] == [
        (True, [500]),
        (True, [20_000]),
        (True, [10]),
    ]


def test_what_was_read_is_found_and_the_last_token_is_computed_always() -> None:
    reader = Reader(HARDWARE, 512)
    first, second = work(1024, names=(1, 2)), work(1024, names=(1, 2))
    reader.add(first)
    assert reader.foreseen(second) == 1023, "it will be there when this one is read"
    reader.start(0.0)
    reader.done()
    reader.add(second)
    reader.start(1.0)
    assert (first.hit, second.hit) == (0, 1023)
    reader.done()
    assert reader.coming == {}
    reader.empty()
    assert reader.foreseen(second) == 0


def test_only_the_last_chunk_is_waited_for_unless_the_link_is_behind() -> None:
    each = HARDWARE.kv_bytes / HARDWARE.bandwidth
    reader = Reader(HARDWARE, 0)
    one, two = work(4000), work(4000)
    reader.add(one)
    reader.add(two)
    now = reader.start(0.0)
    reader.done()
    assert reader.delivered_at(one, now) == pytest.approx(now + 4000 * each + HARDWARE.rtt_s)
    assert reader.delivered_at(two, now) == pytest.approx(now + 8000 * each + HARDWARE.rtt_s)
    slow = Hardware(bandwidth=1e9)
    reader = Reader(slow, 0)
    reader.add(long := work(100_000))
    now = reader.start(0.0)
    assert reader.delivered_at(long, now) == pytest.approx(max(now + 8192 * 327_680e-9, 100_000 * 327_680e-9) + slow.rtt_s)
