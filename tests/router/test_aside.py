"""A request that lost its engine and waits for another one: it stands in nobody's way while the first one has room."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.model import Role
from tests.fake_engine import Call, answer_well, chat_chunk, until
from tests.router.conftest import CHAT, Rig, running_rig
from tests.router.test_lost import nothing_left, relay_of


def named(name: str) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": name}]}


async def status(rig: Rig, name: str, *, stream: bool = False) -> int:
    async with await rig.post({**named(name), "stream": stream}) as response:
        await response.read()
        return response.status


async def cut(call: Call) -> None:
    call.cut()


async def refuse(call: Call) -> None:
    await call.json_answer({"error": {"message": "a bad moment"}}, 500)


@pytest.mark.parametrize("fault", [cut, refuse])
async def test_who_waits_for_another_engine_lets_others_pass_to_the_one_that_failed_it(fault: Any) -> None:
    """One engine is full for as long as it takes, the other one failed the request once and has room ever since."""
    async with running_rig(*[Role.UNIFIED] * 2, places=1) as rig, asyncio.TaskGroup() as group:
        may_end = asyncio.Event()

        async def behave(call: Call) -> None:
            if b"the long one" in call.raw:
                while not may_end.is_set():
                    await call.event(chat_chunk("word"))
                    await asyncio.sleep(0.05)
            elif b"the unlucky one" in call.raw and len(seen) == 0:
                seen.append(call.engine)
                await fault(call)
                return
            await answer_well(call)

        seen: list[Any] = []
        for engine in rig.engines:
            engine.behave = behave
        long = group.create_task(status(rig, "the long one", stream=True))
        await until(lambda: any(e.live for e in rig.engines))
        unlucky = group.create_task(status(rig, "the unlucky one"))
        await until(lambda: relay_of(rig).admission.waiting == 1)
        others = [await status(rig, f"another one, which is larger, number {i}") for i in range(5)]
        assert others == [200] * 5
        assert not long.done()
        if fault is cut:
            assert await unlucky == 200, "in the end it goes to the same one again, rather than wait for the other"
            assert not long.done()
        else:
            assert not unlucky.done(), "what an engine refused itself is for another one"
        may_end.set()
        await asyncio.gather(long, unlucky)
        await nothing_left(rig)
    assert (long.result(), unlucky.result()) == (200, 200)
