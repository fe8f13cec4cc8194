"""A follower keeps its cache true to an engine that publishes over real sockets."""

from __future__ import annotations

from asyncio import TaskGroup
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from disagg.cluster.follower import KvFollower
from disagg.engines.base import KvSource
from disagg.observe.log import make_logger
from disagg.policy.prefix import hashes
from disagg.wire.kv_events import AllBlocksCleared, Cache
from tests.fake_engine import until
from tests.fake_publisher import FakePublisher
from tests.wire.test_kv_events import removed, stored

ONE, TWO, THREE = (frozenset(hashes([n], 1)) for n in (1, 2, 3))


@asynccontextmanager
async def following(source: KvSource, *, patience_s: float = 5.0, quiet_s: float = 5.0) -> AsyncIterator[Cache]:
    """The cache of a follower that runs; at the end it is stopped, and does stop."""
    follower = KvFollower(source, log=make_logger("critical", "text"), patience_s=patience_s, quiet_s=quiet_s)
    async with TaskGroup() as tasks:
        tasks.create_task(follower.run(), name="follower")
        try:
            yield follower.cache
        finally:
            follower.stop()


async def heard(publisher: FakePublisher, cache: Cache) -> None:
    """Live batches arrive, and what was before has been read."""
    await until(publisher.subscribed)
    await until(lambda: cache.known)


async def test_what_was_before_is_replayed_and_what_comes_is_followed(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        publisher.publish(stored(1, [1]), stored(2, [2]))
        publisher.publish(removed(2))
        async with following(publisher.source) as cache:
            await heard(publisher, cache)
            assert cache.snapshot() == ONE
            publisher.publish(stored(3, [3]))
            await until(lambda: cache.snapshot() == ONE | THREE)
            assert publisher.requests == [0]


async def test_a_gap_is_noticed_and_replayed(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        async with following(publisher.source) as cache:
            await heard(publisher, cache)
            publisher.publish(stored(1, [1]))
            await until(lambda: cache.snapshot() == ONE)
            publisher.publish(stored(2, [2]), lose=True)
            publisher.publish(stored(3, [3]))
            await until(lambda: cache.snapshot() == ONE | TWO | THREE)
            assert cache.counts["gaps"] == 1
            assert publisher.requests == [0, 1]


async def test_a_gap_that_is_gone_makes_the_cache_unknown_until_it_is_emptied(tmp_path: Path) -> None:
    with FakePublisher(tmp_path, buffer=2) as publisher:
        async with following(publisher.source) as cache:
            await heard(publisher, cache)
            publisher.publish(stored(1, [1]))
            await until(lambda: cache.snapshot() == ONE)
            for _ in range(3):
                publisher.publish(stored(2, [2]), lose=True)
            publisher.publish(stored(3, [3]))
            await until(lambda: not cache.known)
            assert cache.reason == "batches 1 to 2 of its events are gone"
            assert cache.snapshot() == frozenset()
            publisher.publish(AllBlocksCleared(), stored(2, [2]))
            await until(lambda: cache.known)
            assert cache.snapshot() == TWO


async def test_a_last_batch_that_was_lost_is_found_when_it_is_quiet(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        async with following(publisher.source, quiet_s=0.05) as cache:
            await heard(publisher, cache)
            publisher.publish(stored(1, [1]), lose=True)
            await until(lambda: cache.snapshot() == ONE)


async def test_an_engine_that_is_not_up_yet_is_waited_for(tmp_path: Path) -> None:
    publisher = FakePublisher(tmp_path)
    async with following(publisher.source, patience_s=0.05) as cache:
        await until(lambda: cache.counts["unanswered"] >= 2)
        assert cache.reason == "its engine has not been heard yet"
        with publisher:
            publisher.publish(stored(1, [1]))
            await until(lambda: cache.snapshot() == ONE)
            await until(lambda: cache.known)


async def test_an_engine_that_does_not_answer_is_asked_three_times(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        async with following(publisher.source, patience_s=0.05) as cache:
            await heard(publisher, cache)
            publisher._answers = False
            publisher.publish(stored(1, [1]), lose=True)
            publisher.publish(stored(2, [2]))
            await until(lambda: not cache.known)
            assert cache.reason == "its engine did not say again what followed batch -1"
            assert publisher.requests == [0, 0, 0, 0]


async def test_what_makes_no_sense_makes_the_cache_unknown_and_ends_nothing(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        async with following(publisher.source) as cache:
            await heard(publisher, cache)
            publisher.publish(spoil=True)
            await until(lambda: not cache.known)
            assert cache.reason == "a batch of KV events is not valid msgpack"
            publisher.publish(AllBlocksCleared(), stored(1, [1]))
            await until(lambda: cache.snapshot() == ONE)


async def test_ten_thousand_batches_are_replayed_although_a_socket_drops_what_does_not_fit(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        for number in range(10_000):
            publisher.publish(stored(number, [number]), lose=True)
        async with following(publisher.source) as cache:
            await until(lambda: cache.known, 20)
            assert len(cache.snapshot()) == 10_000


async def test_an_answer_without_its_end_is_not_waited_for_long(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        publisher.ends_dropped = 1
        publisher.publish(stored(1, [1]))
        async with following(publisher.source, patience_s=60) as cache:
            await until(lambda: cache.known)
            assert publisher.requests == [0, 1]


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://256.0.0.1:x"])
async def test_an_endpoint_that_is_none_makes_the_cache_unknown_and_the_follower_end(endpoint: str) -> None:
    follower = KvFollower(KvSource(endpoint, endpoint), log=make_logger("critical", "text"))
    await follower.run()
    assert follower.cache.reason == "its KV events cannot be followed"
