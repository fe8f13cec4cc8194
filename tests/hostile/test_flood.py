"""Many connections, many messages: whoever means well joins within a second and stays."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator

import msgspec
import pytest

from disagg.cluster.agent import Agent
from disagg.cluster.transport import PEER_BURST, PEER_RATE
from tests.hostile.conftest import Scene
from tests.hostile.test_peers import quietly, told
from tests.rig.hosts import joined, python_module, running, wall

JOIN_LIMIT_S = 1.0
CONNECTIONS = 5_000
MESSAGES_PER_S = 50_000
FLOOD_S = 6.0

OF_STANDINS = {"orphans", "an abort was not answered"}
"""The hosts here are stand-ins, which say that engines work that are not there."""

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def flooded(scene: Scene) -> AsyncIterator[None]:
    keys = scene.keys["evil"]
    stdin = msgspec.json.encode({"public": keys.public, "secret": keys.secret, "router": scene.router.key.public})
    words = ("flood", str(scene.router.control), str(MESSAGES_PER_S))
    with python_module("tests.rig.attacker", *words, stdin=stdin) as attacker:
        assert attacker.stdout is not None
        await asyncio.to_thread(attacker.stdout.readline)  # it has been at it for a second
        yield


async def joins_and_stays(scene: Scene, seconds: float) -> None:
    """A host that comes while the attack goes on."""
    comer = scene.agent("other")
    async with running(comer):
        assert await joined(comer) <= JOIN_LIMIT_S
        await asyncio.sleep(seconds)  # the attack goes on
        assert comer.joined.is_set()
    states = [line.fields["state"] for line in scene.router.lines() if line.event == "host changed" and line.fields["host"] == "other"]
    assert states[0] == "online"
    assert not {"suspect", "silent"} & set(states[:1])


async def test_five_thousand_idle_connections_keep_nobody_out(scene: Scene, good: Agent) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < CONNECTIONS + 500:
        pytest.skip(f"this user may open {hard} files only, and {CONNECTIONS} connections need as many on each side")
    since = wall()
    with python_module("tests.rig.attacker", "idle", str(scene.router.control), str(CONNECTIONS)) as attacker:
        assert attacker.stdout is not None
        opened = await asyncio.to_thread(attacker.stdout.readline)
        assert opened.startswith(b"5000 "), opened
        assert scene.router.open_files() > CONNECTIONS / 2
        await joins_and_stays(scene, 3.0)
    quietly([line for line in scene.router.lines(since) if line.level != "info" and line.event not in OF_STANDINS])


async def test_a_host_that_sends_fifty_thousand_messages_a_second_is_throttled(scene: Scene, good: Agent) -> None:
    since = wall()
    async with flooded(scene):
        await joins_and_stays(scene, FLOOD_S)
    lines = scene.complaints(since)
    quietly(lines)
    refused = sum(told(scene, since).values())
    assert 0 < refused <= PEER_BURST + PEER_RATE * FLOOD_S + 100, "what a host says beyond its rate is not even read"
    assert good.joined.is_set()
