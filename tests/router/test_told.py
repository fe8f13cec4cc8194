"""Engines that publish what their prefix caches hold, over real sockets down to the router: prompts of token ids go where their KV is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from disagg.cluster.courier import Courier
from disagg.cluster.follower import KvFollower
from disagg.model import EngineId, Role
from disagg.observe.log import make_logger
from disagg.policy.cost import Fit
from disagg.router.admission import Wanting, _prompt
from disagg.router.openai import Route, parse_request
from disagg.wire.kv_events import AllBlocksCleared, BlockStored
from disagg.wire.messages import KvSnapshot
from tests.fake_engine import until
from tests.fake_publisher import FakePublisher
from tests.router.conftest import Rig, running_rig
from tests.router.test_lost import nothing_left, relay_of

P, D = Role.PREFILL, Role.DECODE
PAGE = 16
MANY = 4096
NAMES = [EngineId(f"prefill-{number}") for number in range(3)]


class Town:
    """A router over fake engines, of which those that read publish: the test says what."""

    def __init__(self, rig: Rig, publishers: dict[EngineId, FakePublisher]) -> None:
        self.rig = rig
        self.index = rig.router.controller.prefixes
        self.publishers = publishers
        self._blocks = 0

    def stored(self, engine: EngineId, tokens: list[int]) -> None:
        """It has read a prompt."""
        blocks = len(tokens) // PAGE
        names = list(range(self._blocks, self._blocks + blocks))
        self._blocks += blocks
        self.publishers[engine].publish(BlockStored(names, [*tokens[: blocks * PAGE]], PAGE))

    async def ask(self, tokens: list[int]) -> EngineId:
        """Returns the prefill engine."""
        async with await self.rig.post({"model": "fake", "prompt": tokens, "max_tokens": 4}, "/v1/completions") as response:
            assert response.status == 200, await response.text()
            await response.read()
            return EngineId(response.headers["x-disagg-prefill"])

    async def reason(self) -> str:
        """Of the newest choice."""
        async with self.rig.session.get(self.rig.admin + "/admin/requests") as response:
            newest = (await response.json())["requests"][0]["id"]
        async with self.rig.session.get(f"{self.rig.admin}/admin/requests/{newest}") as response:
            reason: str = (await response.json())["attempts"][0]["reason"]
            return reason

    async def engine(self, name: EngineId) -> dict[str, Any]:
        async with self.rig.session.get(self.rig.admin + "/admin/cluster") as response:
            found: dict[str, Any] = next(e for e in (await response.json())["engines"] if e["id"] == name)
            return found

    async def told(self, engine: EngineId, tokens: int) -> None:
        await until(lambda: self.index.tokens(engine) == tokens)


@contextmanager
def publishing(folder: Path) -> Iterator[FakePublisher]:
    folder.mkdir()
    with FakePublisher(folder) as publisher:
        yield publisher


async def forward(rig: Rig, engine: EngineId, follower: KvFollower) -> None:
    """As an agent and the head do it, but for the link between them."""
    courier, loop, index = Courier(1, "n"), asyncio.get_running_loop(), rig.router.controller.prefixes
    while True:
        while (message := courier.next({engine: follower.cache}, now=loop.time())) is not None:
            if isinstance(message, KvSnapshot):
                index.take_snapshot(message)
            elif index.take_delta(message, now=loop.time()):
                courier.resync(engine)
        await asyncio.sleep(0.01)


@asynccontextmanager
async def running_town(folder: Path) -> AsyncIterator[Town]:
    async with running_rig(P, P, P, D) as rig, asyncio.TaskGroup() as tasks:
        publishers, work, followers = {}, [], []
        with ExitStack() as stack:
            for name in NAMES:
                publishers[name] = stack.enter_context(publishing(folder / name))
                followers.append(KvFollower(publishers[name].source, log=make_logger("critical", "text")))
                work.append(tasks.create_task(forward(rig, name, followers[-1]), name=f"agent of {name}"))
                tasks.create_task(followers[-1].run(), name=f"follower of {name}")
            town = Town(rig, publishers)
            try:
                admission = relay_of(rig).admission
                await until(lambda: admission.ids_wanted and all(town.index.tokens(name) is not None for name in NAMES))
                yield town
            finally:
                for follower in followers:
                    follower.stop()
                for task in work:
                    task.cancel()


@pytest.fixture
async def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Town]:
    monkeypatch.setattr(Fit, "seen", lambda *_, **__: 1.0)  # engines are taken to read as fast as a GPU does, though these read nothing
    async with running_town(tmp_path) as made:
        yield made


def prompt_of(number: int) -> list[int]:
    return [100_000 * number + at for at in range(MANY)]


async def test_a_prompt_goes_where_its_kv_is_though_this_router_never_sent_it_there(town: Town) -> None:
    town.stored(NAMES[2], prompt_of(1))
    await town.told(NAMES[2], MANY)
    for _ in range(3):
        assert await town.ask([*prompt_of(1), 7]) == NAMES[2]
    assert f"it holds {MANY} of {MANY + 1} tokens" in await town.reason()
    assert len({await town.ask(prompt_of(number)) for number in (2, 3, 4)}) == 3, "of others nobody holds anything: they take turns"
    await nothing_left(town.rig)


async def test_the_second_time_it_goes_where_it_went_and_not_after_the_cache_was_flushed(town: Town) -> None:
    first = await town.ask(prompt_of(1))
    assert await town.ask(prompt_of(1)) == first, "before it has told of it"
    assert "it should hold" in await town.reason()
    town.stored(first, prompt_of(1))
    await town.told(first, MANY)
    assert await town.ask(prompt_of(1)) == first
    assert "it holds" in await town.reason()

    town.publishers[first].publish(AllBlocksCleared())
    await town.told(first, 0)
    history, slot = relay_of(town.rig).admission.books.history, NAMES.index(first)
    await until(lambda: history.blocks(slot) == 0)
    assert await town.ask(prompt_of(1)) != first, "the others were not used for longer, and it has nothing that they have not"
    await nothing_left(town.rig)


async def test_an_engine_that_gave_a_prompt_up_draws_it_no_more(town: Town) -> None:
    first = await town.ask(prompt_of(1))
    town.stored(first, prompt_of(1))
    await town.told(first, MANY)
    other = next(name for name in NAMES if name != first)
    town.stored(other, prompt_of(1)[: MANY // 2])
    await town.told(other, MANY // 2)
    await until(lambda: not relay_of(town.rig).admission.books.forecast.wait_s(0, now=relay_of(town.rig).clock()))
    assert await town.ask(prompt_of(1)) == first
    town.publishers[first].publish(AllBlocksCleared())
    await town.told(first, 0)
    history, slot = relay_of(town.rig).admission.books.history, NAMES.index(first)
    await until(lambda: history.blocks(slot) == 0)
    assert await town.ask(prompt_of(1)) == other


async def test_what_is_shown_says_by_what_prompts_are_sent(town: Town) -> None:
    town.stored(NAMES[0], prompt_of(1))
    await town.told(NAMES[0], MANY)
    assert (await town.engine(NAMES[0]))["cache"] == {
        "known": True, "blocks": MANY // PAGE, "block_size": PAGE, "reason": "", "routing": "exact for token ids",
    }  # fmt: skip
    town.publishers[NAMES[0]].publish(spoil=True)
    await until(lambda: town.index.tokens(NAMES[0]) is None)
    assert (await town.engine(NAMES[0]))["cache"]["routing"] == "guessed from what it was sent"


def test_a_prompt_that_is_longer_than_the_context_is_none_that_an_engine_reads() -> None:
    """It is refused there. Taken for what it says it would be hours of work, and everybody else would be refused for it."""
    ids = parse_request(Route.COMPLETIONS, json.dumps({"prompt": [1] * 100_000}).encode(), with_ids=True).ids
    wanting = cast("Wanting", SimpleNamespace(tokens=0, ids=ids, prompt_bytes=200_000, names=()))
    assert _prompt(wanting, 40_000, 4096).tokens == 4096
    assert _prompt(wanting, 40_000, 0).tokens == 100_000, "the context is not known"
