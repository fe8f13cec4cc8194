"""Orders to a host that is not heard for a moment: a flip is half done then, and must not be called off."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from disagg.cluster.controller import Controller
from disagg.cluster.head import Head
from disagg.cluster.registrar import Registrar
from disagg.cluster.transport import Complaints
from disagg.model import EngineId, HostId, HostState, HostView, Role
from disagg.observe.log import make_logger
from disagg.wire.messages import Answer

HOST = HostId("box")


class Table:
    """What the head asks its members' table: one host, in the state that a test sets."""

    def __init__(self) -> None:
        self.now = HostState.ONLINE

    def session(self, _host: HostId) -> bytes:
        return b"session"

    def state(self, _host: HostId) -> HostState:
        return self.now

    def engines_stay(self, _host: HostId) -> bool:
        return True


class Deaf:
    """A controller that only listens."""

    def tell(self, *_: Any, **__: Any) -> None:
        pass

    def host_changed(self, *_: Any, **__: Any) -> None:
        pass


def made() -> tuple[Head, Table, list[bytes]]:
    sent: list[bytes] = []
    head = Head(
        router="r",
        registrar=cast("Registrar", None),
        controller=cast("Controller", Deaf()),
        send=lambda _session, frame: sent.append(frame),
        complaints=cast("Complaints", None),
        spawn=lambda _work, _name: None,
        heartbeat_interval_s=0.25,
        log=make_logger("critical", "text"),
    )
    table = Table()
    head._members = cast("Any", table)
    return head, table, sent


async def ordered(head: Head) -> tuple[bool, str]:
    return await head.order(HOST, EngineId("e"), "switch", Role.DECODE, "a test")


async def test_an_order_waits_for_a_host_that_is_suspect() -> None:
    head, table, sent = made()
    table.now = HostState.SUSPECT
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        order = tasks.create_task(ordered(head))
        await asyncio.sleep(0)
        assert sent == []
        table.now = HostState.ONLINE
        while not sent:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        head._answered(HOST, Answer(1, ok=True, sentence="done"))
    assert order.result() == (True, "done")


async def test_what_was_ordered_stands_while_its_host_is_suspect_and_falls_when_it_is_silent() -> None:
    head, _, sent = made()
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        order = tasks.create_task(ordered(head))
        while not sent:  # noqa: ASYNC110
            await asyncio.sleep(0)
        head._publish(HostView(HOST, HostState.SUSPECT))
        await asyncio.sleep(0)
        assert not order.done()
        head._publish(HostView(HOST, HostState.SILENT, reason="no heartbeat"))
    done, why = order.result()
    assert not done
    assert "silent" in why
