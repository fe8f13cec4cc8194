"""Pages are in one place at a time, and a page that somebody else may write is nobody's."""

from __future__ import annotations

import random

import numpy as np
import pytest

from disagg.engines.embedded.pages import OutOfPagesError, PagePool, PrefixCache, pages_for

SHAPE = (2, 2, 4, 1, 2)


def tokens(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def test_page_bytes_are_the_pages_memory() -> None:
    pool = PagePool(3, SHAPE)
    pool.page_bytes(1)[:] = np.full(SHAPE, 7, np.float32).tobytes()
    assert (pool.kv[1] == 7).all()
    assert not pool.kv[0].any()
    assert not pool.kv[2].any()
    assert len(pool.page_bytes(0)) == pool.page_bytes_count == 2 * 2 * 4 * 1 * 2 * 4


def test_an_allocation_is_whole_or_nothing() -> None:
    pool = PagePool(3, SHAPE)
    taken = pool.allocate(2)
    with pytest.raises(OutOfPagesError):
        pool.allocate(2)
    assert pool.free == 1
    pool.release(taken)
    pool.check()
    assert pool.free == 3


def test_a_shared_page_is_free_after_its_last_release() -> None:
    pool = PagePool(2, SHAPE)
    taken = pool.allocate(1)
    pool.share(taken)
    pool.release(taken)
    assert pool.free == 1
    pool.release(taken)
    assert pool.free == 2
    with pytest.raises(AssertionError):
        pool.release(taken)


def test_quarantined_pages_are_not_given_out_until_acquitted() -> None:
    pool = PagePool(2, SHAPE)
    taken = pool.allocate(2)
    pool.quarantine(taken, "room 1")
    assert (pool.free, pool.held, pool.quarantined) == (0, 0, 2)
    assert pool.is_quarantined(taken[0])
    with pytest.raises(OutOfPagesError):
        pool.allocate(1)
    assert pool.acquit("room 1") == 2
    assert pool.acquit("room 1") == 0
    pool.check()
    assert pool.free == 2


def test_prefix_match_shares_whole_pages_and_leaves_one_token() -> None:
    pool = PagePool(8, SHAPE)
    cache = PrefixCache(pool, 4)
    prompt = tokens(*range(10))
    pages = pool.allocate(pages_for(10, 4))
    cache.insert(prompt, pages)
    assert cache.match(prompt, limit=9) == pages[:2]
    pool.release(pages[:2])
    assert cache.match(prompt[:8], limit=7) == pages[:1]
    pool.release(pages[:1])
    assert cache.match(tokens(9, 1, 2, 3, 4, 5, 6, 7), limit=8) == []
    pool.release(pages)
    assert pool.free == 8
    assert len(cache) == 2
    pool.check()
    cache.check()


def test_the_same_block_after_another_prefix_is_another_page() -> None:
    pool = PagePool(8, SHAPE)
    cache = PrefixCache(pool, 4)
    first = pool.allocate(2)
    cache.insert(tokens(1, 1, 1, 1, 5, 5, 5, 5), first)
    assert cache.match(tokens(2, 2, 2, 2, 5, 5, 5, 5), limit=8) == []


def test_the_tail_of_the_oldest_prompt_is_evicted_first() -> None:
    pool = PagePool(4, SHAPE)
    cache = PrefixCache(pool, 4)
    old, new = tokens(*range(8)), tokens(*range(100, 108))
    for prompt in (old, new):
        pages = pool.allocate(2)
        cache.insert(prompt, pages)
        pool.release(pages)
    pool.allocate(1)
    assert len(cache.match(old, limit=8)) == 1
    assert len(cache.match(new, limit=8)) == 2
    pool.check()
    cache.check()


def test_clear_forgets_only_what_nobody_uses() -> None:
    pool = PagePool(4, SHAPE)
    cache = PrefixCache(pool, 4)
    pages = pool.allocate(2)
    cache.insert(tokens(*range(8)), pages)
    pool.release(pages[1:])
    assert cache.clear() == 1
    assert len(cache) == 1
    pool.release(pages[:1])
    assert cache.clear() == 1
    pool.check()
    assert pool.free == 4


@pytest.mark.parametrize("seed", range(5))
def test_random_walk_keeps_every_page_in_one_place(seed: int) -> None:
    chance = random.Random(seed)
    pool = PagePool(24, SHAPE)
    cache = PrefixCache(pool, 4)
    held: list[list[int]] = []
    owners: list[str] = []
    for step in range(2_000):
        move = chance.randrange(5)
        prompt = tokens(*(chance.randrange(2) for _ in range(chance.randrange(1, 21))))
        if move <= 1:
            found = cache.match(prompt, limit=len(prompt) - 1)
            try:
                fresh = pool.allocate(pages_for(len(prompt), 4) - len(found))
            except OutOfPagesError:
                pool.release(found)
            else:
                cache.insert(prompt, found + fresh)
                held.append(found + fresh)
        elif move == 2 and held:
            pool.release(held.pop(chance.randrange(len(held))))
        elif move == 3 and pool.free >= 2:
            pool.quarantine(pool.allocate(2), f"owner {step}")
            owners.append(f"owner {step}")
        elif owners:
            pool.acquit(owners.pop())
        pool.check()
        cache.check()
    for pages in held:
        pool.release(pages)
    for owner in owners:
        pool.acquit(owner)
    pool.check()
    assert pool.free == 24
