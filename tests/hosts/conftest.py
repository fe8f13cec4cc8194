"""One cluster on five hosts for all tests of this folder; each of them finds it well, and leaves it so."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.engines import running_engines, start_engine
from tests.hosts.rig import HOSTS, START_LIMIT_S, Answer, Load, Rig, Watch, ask, running_rig

HEALED_WITHIN_S = 15.0


class Cluster:
    """A running rig, what its streams must say, and eyes on it for the length of one test."""

    def __init__(self, rig: Rig, watch: Watch, bodies: list[dict[str, Any]], texts: list[str]) -> None:
        self.rig = rig
        self.watch = watch
        self.bodies = bodies
        self.texts = texts

    def load(self) -> Load:
        return Load(self.rig, self.bodies)

    def is_whole(self, answer: Answer) -> bool:
        """It came to its end, and says what an engine alone would have said, to the byte."""
        return answer.done and not answer.error and answer.text == self.texts[answer.body]

    async def healed(self, limit_s: float = HEALED_WITHIN_S) -> None:
        """Waits until all is as it was: every engine ready, in use, and free."""
        await self.watch.until(
            lambda g: g.all_ready and all(h["state"] == "online" for h in g.hosts.values()), "all engines ready", limit_s
        )
        await self._flows()
        await self.free(limit_s)

    async def _flows(self) -> None:
        """Requests flow, several at a time, until each engine had some: one that was slow under much work counts as slow for a while."""
        answers: list[Answer] = []

        def served() -> Counter[str]:
            return Counter(name for a in answers if a.done for name in (a.prefill, a.decode))

        async def worker(session: aiohttp.ClientSession) -> None:
            while served().keys() < set(HOSTS):
                answers.append(answer := Answer(0.0, len(answers) % len(self.bodies)))
                await ask(session, self.rig, {**self.bodies[answer.body], "max_tokens": 4}, answer)
                assert answer.done, answer
                assert self.texts[answer.body].startswith(answer.text)

        try:
            async with self.rig.session() as session, asyncio.timeout(HEALED_WITHIN_S), asyncio.TaskGroup() as tasks:
                for number in range(3):
                    tasks.create_task(worker(session), name=f"asks {number}")
        except TimeoutError:
            raise AssertionError(
                f"not each engine got work within {HEALED_WITHIN_S:g} s: {served()}; {self.watch.seen[-1].engines}"
            ) from None

    async def free(self, limit_s: float) -> None:
        """Waits until no engine holds or runs anything."""
        for host in HOSTS:
            load: dict[str, Any] = {}
            try:
                async with asyncio.timeout(limit_s):
                    while not _holds_nothing(load := await self.rig.engine_loads(host)):  # noqa: ASYNC110  HTTP has no event
                        await asyncio.sleep(0.05)
            except TimeoutError:
                raise AssertionError(f"the engine of {host} still holds something after {limit_s:g} s: {load}") from None


def _holds_nothing(load: dict[str, Any]) -> bool:
    queued = sum(value for name, value in load.items() if name.endswith("_queue_reqs"))
    return not (load["num_used_tokens"] or load["num_running_reqs"] or load["num_waiting_reqs"] or load["kv_quarantined_pages"] or queued)


@pytest.fixture(scope="module")
def bodies() -> list[dict[str, Any]]:
    """Long answers: three seconds each, and more under load, on the paced engines."""
    prompts = ["Tell a story about a fox and a lantern.", "The old bridge over the river", "Why do the days grow longer in spring?"]
    return [{"prompt": prompt, "max_tokens": 130, "temperature": 0, "ignore_eos": True} for prompt in prompts]


@pytest.fixture(scope="module")
def texts(bodies: list[dict[str, Any]]) -> list[str]:
    """What an engine that does both phases alone says."""

    async def read() -> list[str]:
        with running_engines(start_engine("unified")) as (engine,):
            async with aiohttp.ClientSession() as session:
                answers = [await (await session.post(f"{engine.url}/v1/completions", json=body)).json() for body in bodies]
        return [answer["choices"][0]["text"] for answer in answers]

    return asyncio.run(read())


@pytest.fixture(scope="module")
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        with running_rig(Path(folder)) as made:
            yield made
        if request.session.testsfailed:
            sys.stdout.write(made.logs())
        assert made.engine_pids() == []


@pytest.fixture
async def cluster(rig: Rig, bodies: list[dict[str, Any]], texts: list[str]) -> AsyncIterator[Cluster]:
    async with Watch(rig).running() as watch:
        made = Cluster(rig, watch, bodies, texts)
        assert not rig.broken, f"an earlier test left the cluster broken: {rig.broken}"
        try:
            await watch.until(lambda g: g.all_ready, "all engines ready", START_LIMIT_S)
        except AssertionError as error:
            rig.broken = str(error)
            raise
        yield made
