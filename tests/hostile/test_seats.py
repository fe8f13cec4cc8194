"""Who holds a host's seat: clones and old copies stay out, with the reason where a person looks; revoking shuts out at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import pytest

from disagg.cluster.agent import Agent
from disagg.model import Role
from disagg.security.keys import make_key
from tests.hostile.conftest import Scene
from tests.hostile.test_peers import until
from tests.rig.hosts import joined, running, wall

pytestmark = pytest.mark.slow


def reason_told(scene: Scene, since: float, words: str) -> Callable[[], bool]:
    """Whether the router's log gives this reason."""
    return lambda: any(words in line.fields["example"] for line in scene.complaints(since))


async def test_a_clone_stays_out_as_long_as_the_original_lives(scene: Scene, good: Agent) -> None:
    since = wall()
    clone = scene.agent("good", incarnation=1, nonce="of the clone")
    async with running(clone):
        await until(reason_told(scene, since, "a clone: good incarnation 1 is alive elsewhere with the same state directory"))
        assert not clone.was_joined
        row = scene.router.hosts()["good"]
        assert row["state"] == "online"
        assert "a clone" in row["reason"]
    assert len(scene.complaints(since)) <= 1 + wall() - since


async def test_an_agent_that_was_started_twice_stays_out_and_gets_in_when_the_first_is_gone(scene: Scene) -> None:
    since = wall()
    first, second = scene.agent("other"), scene.agent("other", incarnation=2, nonce="of the second")
    async with contextlib.AsyncExitStack() as stack:
        async with running(first):
            await joined(first)
            await stack.enter_async_context(running(second))
            await until(reason_told(scene, since, "two agents must not share one state directory"))
            assert first.joined.is_set()
            assert not second.was_joined
        await joined(second)
        assert scene.router.hosts()["other"]["incarnation"] == 2


async def test_an_old_copy_of_a_state_directory_is_refused_for_good(scene: Scene) -> None:
    since = wall()
    later = scene.agent("other", incarnation=7, nonce="of the later one")
    async with running(later):
        await joined(later)
    await until(lambda: scene.router.hosts()["other"]["state"] != "online")
    old = scene.agent("other", incarnation=3, nonce="of the old one")
    async with running(old) as tasks:
        await until(tasks[0].done)  # told to give up, and not to try for ever
        assert not old.was_joined
    await until(reason_told(scene, since, "incarnation 3 of other, and incarnation 7 was here before"))


async def test_revoking_takes_effect_within_a_second(scene: Scene, good: Agent) -> None:
    token = scene.router.token(Role.PREFILL, Role.DECODE)
    agent = scene.newcomer("brief", token, make_key())
    async with running(agent) as tasks:
        await joined(agent)
        await until(lambda: "brief-d" in scene.router.engines())
        began = time.monotonic()
        status = await asyncio.to_thread(scene.router.revoke, "brief")
        await until(tasks[0].done, limit_s=1.0)  # the agent was told
        assert time.monotonic() - began < 1.0
    assert status == 200
    assert not {"brief-p", "brief-d"} & scene.router.engines().keys()
    assert "brief" not in scene.router.hosts()
    again = scene.newcomer("brief", token, make_key())
    async with running(again) as tasks:
        await until(tasks[0].done)
        assert not again.was_joined
