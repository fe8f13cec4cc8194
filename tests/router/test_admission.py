"""The way in: who waits for what, on a real loop with engines that are views alone."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import aiohttp
import pytest
from aiohttp import TCPConnector

from disagg.handoff import Limits
from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Role
from disagg.policy.blame import Ledger as Blame
from disagg.policy.pace import Pace
from disagg.router.admission import Admission, Exclude, Promise, ShutOutError
from disagg.router.openai import Route, parse_request
from disagg.router.relay import Job, Record
from disagg.router.trial import Trial
from tests.fake_engine import Call, answer_well, until
from tests.router.conftest import CHAT, Rig, running_rig

CONTEXT = 2048
PLACES = 2


class Door:
    """An admission before one unified engine with two places, and the requests that were let in."""

    def __init__(self) -> None:
        address = EngineAddress(EngineId("u"), Role.UNIFIED, "127.0.0.1", 1, pid=1)
        facts = EngineFacts(model="demo", max_running=PLACES, context_tokens=CONTEXT)
        engine = EngineView(address, 0, EngineState.READY, facts, EngineLoad(kv_total_tokens=100_000))
        self.view = ClusterView.of([engine])
        self.order: list[str] = []
        self.now = 100.0
        self.admission = Admission(
            pace=Pace(Limits(), 600.0),
            on_waited=lambda _: None,
            view=lambda: self.view,
            timeout_s=10.0,
            chance=lambda: 0.5,
            loop=asyncio.get_running_loop(),
            clock=lambda: self.now,
        )
        self.admission.changed()

    async def enter(
        self,
        name: str,
        text: str = "x",
        *,
        model: str = "",
        priority: int = 0,
        exclude: Exclude | None = None,
        again: bool = False,
        trial: Trial | None = None,
    ) -> Promise:
        named = f'"model":"{model}",' if model else ""
        body = f'{{{named}"messages":[{{"role":"user","content":"{text}"}}],"max_tokens":5}}'.encode()
        request = parse_request(Route.CHAT, body)
        job = Job(request, request.rest, 0, None, Record(name, "/", self.now), user=name.split(maxsplit=1)[0], priority=priority)
        job.trial = trial
        promise = await self.admission.enter(job, exclude, again=again)
        self.order.append(name)
        return promise

    async def full(self) -> list[Promise]:
        """All places are taken, and it is known how fast they become free."""
        promises = [await self.enter(f"first {place}") for place in range(PLACES)]
        for number in range(20):
            waiting = self.spawn(f"behind {number}")
            await settled()
            self.now += 0.02
            answered(promises.pop(0))
            promises.append(await waiting)
        self.order.clear()
        return promises

    def spawn(self, name: str, text: str = "x", **more: Any) -> asyncio.Task[Promise]:
        return asyncio.get_running_loop().create_task(self.enter(name, text, **more), name=name)


def answered(promise: Promise) -> None:
    """Its answer is whole."""
    for engine in (promise.choice.prefill, promise.choice.decode):
        if engine is not None:
            promise.end(engine.slot)


async def settled() -> None:
    """Whoever can go on has gone on."""
    for _ in range(5):
        await asyncio.sleep(0)


async def gone(*tasks: asyncio.Task[Promise]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_body_that_no_engine_takes_sends_nobody_away() -> None:
    door = Door()
    await door.full()
    small = [door.spawn(f"small {number}") for number in range(5)]
    await settled()
    big = door.spawn("big", "x" * 3_000_000)
    await settled()
    assert not any(task.done() for task in small)
    await gone(*small, big)


async def test_some_more_clients_than_places_wait_and_none_is_sent_away() -> None:
    """Each asks again as soon as it is answered: the queue never empties, and that is no overload."""
    door = Door()
    running = [await door.enter(f"client{place} at first") for place in range(PLACES)]
    waiting = [door.spawn(f"client{PLACES + place} at first") for place in range(PLACES)]
    for number in range(30):
        await settled()
        door.now += 0.8
        answered(running.pop(0))
        running.append(await waiting.pop(0))
        waiting.append(door.spawn(f"client{number % (2 * PLACES)} again"))
    await gone(*waiting)


async def test_who_names_the_model_stands_in_one_queue_with_who_does_not() -> None:
    door = Door()
    promises = await door.full()
    low, high, middle = (
        door.spawn(name, model=model, priority=priority)
        for name, model, priority in (("low", "", -100), ("high", "demo", 50), ("middle", "", 0))
    )
    await settled()
    for promise in promises:
        promise.end_all()
    await settled()
    assert door.order == ["high", "middle"]
    await gone(low, high, middle)


async def test_who_lost_its_engine_goes_before_those_who_came_earlier() -> None:
    door = Door()
    promises = await door.full()
    important = door.spawn("important", priority=100)
    await settled()
    again = door.spawn("again", again=True)
    await settled()
    promises.pop().end_all()
    await settled()
    assert door.order == ["again"]
    await gone(important, again)


async def test_who_may_not_go_anywhere_stands_in_nobodys_way() -> None:
    """It lost its engine and waits for room; another one that did gets there first, and closes the engine to it."""
    door, ledger, unified = Door(), Blame(), EngineId("u")
    promises = await door.full()
    ledger.died(EngineId("x"), {1: 0, 2: 0}, door.now)
    suspect = door.spawn("suspect", again=True, trial=Trial(ledger, 1, lambda: door.now, lambda: None))
    newcomer = door.spawn("newcomer")
    await settled()
    ledger.sent(2, [unified])
    promises.pop().end_all()
    await settled()
    assert door.order == ["newcomer"]
    with pytest.raises(ShutOutError):
        await suspect
    await gone(newcomer)


async def test_who_is_not_to_be_asked_is_looked_up_each_time() -> None:
    """An engine that failed a request and was started anew since is another one."""
    door = Door()
    closed = [EngineId("u")]
    waiting = door.spawn("again", exclude=lambda: tuple(closed), again=True)
    await settled()
    assert not waiting.done()
    closed.clear()
    door.admission.changed()
    await settled()
    assert door.order == ["again"]
    await gone(waiting)


# --- whose request it is, over real sockets


@pytest.mark.parametrize("by", ["address", "key"])
async def test_a_lone_client_passes_another_ones_flood(by: str) -> None:
    """Clients are told apart by their API key, and where they send none by their address."""
    async with running_rig(Role.UNIFIED) as rig, aiohttp.ClientSession(connector=TCPConnector(limit=0)) as many:
        other = TCPConnector(local_addr=("127.0.0.2", 0)) if by == "address" else TCPConnector()
        keys = ({}, {}) if by == "address" else ({"Authorization": "Bearer a"}, {"Authorization": "Bearer b"})
        may_end = asyncio.Semaphore(0)
        reached: list[bytes] = []

        async def behave(call: Call) -> None:
            reached.append(b"lone" if b"lone" in call.raw else b"flood")
            await may_end.acquire()
            await answer_well(call)

        rig.engines[0].behave = behave

        async def ask(session: aiohttp.ClientSession, word: str, headers: dict[str, str]) -> int:
            text = word + " x" * 8_000  # a few of them fill the engine's KV cache
            body = {**CHAT, "messages": [{"role": "user", "content": text}]}
            async with session.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
                return response.status

        async with aiohttp.ClientSession(connector=other) as lone, asyncio.TaskGroup() as group:
            flood = [group.create_task(ask(many, "flood", keys[0])) for _ in range(20)]
            await until(lambda: count(rig, "disagg_waiting") + len(reached) == 20)
            one = group.create_task(ask(lone, "lone", keys[1]))
            await until(lambda: count(rig, "disagg_waiting") + len(reached) == 21)
            for _ in range(21):
                may_end.release()
        assert reached.index(b"lone") < 10, "it came last"
        assert [t.result() for t in (*flood, one)] == [200] * 21


def count(rig: Rig, name: str) -> int:
    found = re.search(rf"^{name} (\d+)", rig.metrics(), re.MULTILINE)
    return int(found[1]) if found else 0


async def test_of_an_engine_that_was_removed_nothing_is_kept() -> None:
    door = Door()
    books = door.admission.books
    for number in range(20):
        books.forecast.read(books.forecast.sent(0, 100 + number, now=10.0 * number), now=10.0 * number + 1.0)
        books.forecast.tick(10.0 * number + 5.0)
    books.contradictions.look(0, EngineLoad(), 1, now=0.0)
    assert books.forecast.known(0, now=200.0).reads_trust.samples
    door.view = ClusterView.of([])
    door.admission.changed()
    trust = books.forecast.known(0, now=200.0).reads_trust
    assert (trust.samples, trust.own) == (0, False), "one that was started anew would have its line; no other will come here"
    assert not books.contradictions.doubt(0, now=1e6)
    assert not books._slots
    assert not books._cleared
