"""Why there is a quarantine: a writer that is deaf to CANCEL, and a pool composed without the defence.

Three engines live in this process, so that one of them can be given another pool. Request A is cancelled on decode while
prefill still writes; request B comes from another prefill engine and needs A's pages.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from disagg.engines.embedded import links
from disagg.engines.embedded.engine import Settings
from disagg.engines.embedded.faults import Faults
from disagg.engines.embedded.generation import Ask, Generation, Inbox, Room
from disagg.engines.embedded.pace import Pace
from disagg.engines.embedded.pages import PagePool
from disagg.engines.embedded.sampler import SamplingParams
from tests.embedded_server.conftest import House, finished, some_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from disagg.engines.embedded.checkpoint import Checkpoint
    from disagg.engines.embedded.engine import Engine

pytestmark = pytest.mark.alone

NEW = 16


class PoolWithoutQuarantine(PagePool):
    """Gives pages back although their writer may still write: what must not be done."""

    def quarantine(self, pages: Sequence[int], owner: str) -> None:
        self.release(pages)


def start(engine: Engine, prompt: list[int], room: Room | None) -> tuple[Generation, Inbox]:
    inbox = Inbox()
    params = SamplingParams(max_new_tokens=NEW, temperature=0, ignore_eos=True)
    ask = Ask(f"{engine.settings.role} {room}", np.array(prompt, np.int32), params, room=room)
    return engine.submit([ask], inbox)[0], inbox


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  an engine has no event for what tests look into
        await asyncio.sleep(0.002)


async def play(house: House, pool: type[PagePool]) -> tuple[list[int], list[int], Engine]:
    """Returns B's ids alone, B's ids after A's late writes, and the decode engine."""
    victim, innocent = some_prompt(64, 1), some_prompt(64, 2)
    base = Settings(context_length=256, chunked_prefill_size=16, bootstrap_port=0)
    slow = base._replace(role="prefill", faults=Faults(late_write=True), pace=Pace(150, 0, 150, 0))
    deaf, good = await house.build(slow), await house.build(base._replace(role="prefill"))
    # Room for one request; its steps are slow enough for the late writes to come in the middle of its answer.
    small = base._replace(role="decode", max_total_tokens=80, pace=Pace(0, 0, 60, 0))
    decode, alone = await house.build(small, pool), await house.build(base)

    expected = await finished(*start(alone, innocent, None))
    room_a, room_b = (Room("127.0.0.1", engine.bootstrap_port, at) for at, engine in enumerate((deaf, good), 1))
    start(deaf, victim, room_a)
    begun, _ = start(decode, victim, room_a)
    await until(lambda: any(link.machine.bytes_received for link in decode._receivers.values()))
    decode.cancel([begun], "the client is gone")
    start(good, innocent, room_b)
    asked, inbox = start(decode, innocent, room_b)
    await until(lambda: len(asked.ids) >= 2 or decode.pool.quarantined > 0)
    for link in list(deaf._links):
        link.stop_late()
    made = await finished(asked, inbox)
    await until(lambda: decode.pool.free == decode.pool.size)
    decode.scheduler.check()
    return expected, made, decode


@pytest.mark.parametrize("pool", [PagePool, PoolWithoutQuarantine])
async def test_a_late_write_never_reaches_another_requests_pages(
    checkpoint: Checkpoint, pool: type[PagePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "LATE_WRITE_S", 1e6)  # the test says when
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        house = House(checkpoint, tasks)
        expected, made, decode = await play(house, pool)
        house.stop()
    assert decode.totals.late_writes > 0
    assert len(made) == NEW
    if pool is PagePool:
        assert made == expected
    else:
        assert made != expected, "without the defence this scenario must go wrong, or it proves nothing"
