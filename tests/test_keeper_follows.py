"""A keeper follows the KV events of the process that it watches, and of no other one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from disagg.cluster.detector import TimedOut
from disagg.cluster.keeper import EngineKeeper
from disagg.cluster.prober import Prober
from disagg.engines.base import EngineLaunch, Launcher
from disagg.engines.restart import EngineLife
from disagg.model import EngineAddress, EngineId, Role
from disagg.observe.log import make_logger
from disagg.wire.kv_events import Cache
from tests.fake_engine import until
from tests.fake_publisher import FakePublisher
from tests.wire.test_kv_events import stored


def no_launch(_: Role) -> EngineLaunch:
    raise AssertionError


class Switching:
    """A prober of an engine that switches when it is told to."""

    def __init__(self, *refusals: dict[str, Any]) -> None:
        self.refusals = list(refusals)

    async def post(self, *_: Any) -> tuple[int, dict[str, Any]]:
        return (400, self.refusals.pop(0)) if self.refusals else (200, {"success": True})

    async def look(self, *_: Any) -> TimedOut:
        return TimedOut("it switched a moment ago")


@asynccontextmanager
async def keeping(folder: Path, prober: Switching | None = None) -> AsyncIterator[tuple[EngineKeeper, list[asyncio.Task[None]]]]:
    """A keeper, and the tasks that it has started."""
    work: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as tasks:

        def spawn(coroutine: Coroutine[Any, Any, None], name: str) -> None:
            work.append(tasks.create_task(coroutine, name=name))

        keeper = EngineKeeper(
            EngineId("e"),
            Role.PREFILL,
            host="h",
            launch_for=no_launch,
            settings_for=lambda _: (),
            launcher=cast("Launcher", None),
            folder=folder,
            life=cast("EngineLife", None),
            prober=cast("Prober", prober or Switching()),
            spawn=spawn,
            on_change=lambda: None,
            log=make_logger("critical", "text"),
        )
        yield keeper, work
        keeper.follow(None)


async def followed(keeper: EngineKeeper) -> Cache:
    """Its cache, once one block has been heard of."""
    cache = keeper.cache
    assert cache is not None
    await until(lambda: cache.known)
    assert len(cache.snapshot()) == 1
    return cache


async def test_each_process_has_a_cache_of_its_own_and_none_is_followed_after_its_end(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        publisher.publish(stored(1, [1]))
        async with keeping(tmp_path) as (keeper, work):
            keeper.follow(publisher.source)
            first = await followed(keeper)
            keeper.follow(publisher.source)
            assert await followed(keeper) is not first
            await until(work[0].done)
            keeper.follow(None)
            assert keeper.cache is None
            await until(work[1].done)


async def test_after_a_role_switch_the_cache_is_empty_whether_the_engine_says_so_or_not(tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        publisher.publish(stored(1, [1]))
        async with keeping(tmp_path) as (keeper, _):
            keeper.follow(publisher.source)
            cache = await followed(keeper)
            done, _ = await keeper._post_switch(EngineAddress(EngineId("e"), Role.PREFILL, "h", 1), Role.DECODE)
            assert done
            assert (cache.known, cache.snapshot()) == (True, frozenset())


BUSY = {"success": False, "message": "instance is not idle; drain all requests before switching", "safe_to_restore": True}
BROKEN = {"success": False, "message": "instance is not idle any more, and unhealthy", "safe_to_restore": False}


async def test_an_engine_that_is_not_idle_yet_is_asked_to_switch_again(tmp_path: Path) -> None:
    engine = Switching(BUSY, BUSY)
    async with keeping(tmp_path, engine) as (keeper, _):
        done, said = await keeper._post_switch(EngineAddress(EngineId("e"), Role.PREFILL, "h", 1), Role.DECODE)
    assert done, said
    assert engine.refusals == []


async def test_an_engine_that_is_broken_is_not_asked_again(tmp_path: Path) -> None:
    async with keeping(tmp_path, Switching(BROKEN)) as (keeper, _):
        done, said = await keeper._post_switch(EngineAddress(EngineId("e"), Role.PREFILL, "h", 1), Role.DECODE)
    assert not done
    assert "unhealthy" in said
