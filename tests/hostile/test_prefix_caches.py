"""What engines hold travels over the encrypted control plane, from an engine's sockets to the router's table; nobody speaks for others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from disagg.cluster.agent import Agent
from disagg.cluster.courier import HASHES_PER_MESSAGE
from disagg.cluster.follower import KvFollower
from disagg.cluster.transport import ControlServer
from disagg.model import EngineId, EngineState, Role
from disagg.observe.log import make_logger
from disagg.security.keys import make_key
from disagg.wire.codec import encode, to_router
from disagg.wire.kv_events import Cache
from disagg.wire.messages import Ack, Heartbeat, Hello, KvDelta, KvResync, KvSnapshot, Message, Refused, Welcome
from tests.fake_engine import until
from tests.fake_publisher import FakePublisher
from tests.hostile.conftest import Scene
from tests.hostile.test_peers import met, peer
from tests.rig.hosts import StubKeeper, joined, running, simulated_agent
from tests.wire.test_kv_events import removed, started, stored


def shown(scene: Scene, engine: str) -> dict[str, Any] | None:
    """What the admin listener says of an engine's cache."""
    found: dict[str, Any] | None = next((e.get("cache") for e in scene.router.cluster()["engines"] if e["id"] == engine), None)
    if found is not None:
        del found["routing"]  # follows from the others
    return found


def holds(scene: Scene, engine: str, blocks: int) -> Callable[[], bool]:
    return lambda: shown(scene, engine) == {"known": True, "blocks": blocks, "block_size": 1 if blocks else 0, "reason": ""}


def agent_of(scene: Scene, keeper: StubKeeper) -> Agent:
    router = scene.router
    return simulated_agent("good", port=router.control, router_key=router.key.public, key=scene.keys["good"], keepers=[keeper])


@pytest.mark.slow
async def test_the_router_follows_an_engine_through_deltas_restarts_and_ends(scene: Scene, tmp_path: Path) -> None:
    with FakePublisher(tmp_path) as publisher:
        follower = KvFollower(publisher.source, log=make_logger("critical", "text"))
        keeper = StubKeeper("good-p", Role.PREFILL)
        keeper.cache = follower.cache
        async with asyncio.TaskGroup() as tasks, running(agent_of(scene, keeper)) as (_,):
            tasks.create_task(follower.run(), name="follower")
            publisher.publish(stored(1, [1]), stored(2, [2]))
            await until(holds(scene, "good-p", 2), 20)
            await until(publisher.subscribed)
            publisher.publish(stored(3, [3]), removed(1), stored(4, [4]))
            await until(holds(scene, "good-p", 3))
            metrics = httpx2.get(f"http://127.0.0.1:{scene.router.admin}/metrics").text
            assert 'disagg_prefix_blocks{engine="good-p"} 3.0' in metrics
            assert "disagg_prefix_resyncs_total 0.0" in metrics

            scene.router.stop()
            publisher.publish(removed(2), stored(5, [5]), stored(6, [6]))
            scene.router.start()
            await until(holds(scene, "good-p", 4), 20)

            keeper.state = EngineState.DEAD
            await until(lambda: shown(scene, "good-p") == {"known": False, "blocks": 0, "block_size": 1, "reason": "it is dead"})
            keeper.cache, keeper.state = started(*(stored(n, [n]) for n in range(9))), EngineState.READY
            await until(holds(scene, "good-p", 9))
            follower.stop()


@pytest.mark.slow
async def test_a_large_cache_comes_in_parts(scene: Scene) -> None:
    keeper = StubKeeper("good-p", Role.PREFILL)
    count = 5 * HASHES_PER_MESSAGE + 7
    keeper.cache = started(*(stored(n, [n]) for n in range(count)))
    async with running(agent_of(scene, keeper)):
        await until(holds(scene, "good-p", count), 20)


def complained(scene: Scene, why: str) -> int:
    """How often the router has said that it refused something for this reason."""
    return sum(int(line.fields.get(why, 0)) for line in scene.complaints(0.0))


@pytest.mark.slow
async def test_a_host_speaks_for_its_own_engines_only_and_only_from_its_seat(scene: Scene) -> None:
    keeper = StubKeeper("good-p", Role.PREFILL)
    keeper.cache = started(stored(1, [1]))
    heard: list[bytes] = []
    async with running(agent_of(scene, keeper)):
        await until(holds(scene, "good-p", 1), 20)
        own, foreign = StubKeeper("evil-p", Role.PREFILL).report(), EngineId("good-p")
        with peer(scene, scene.keys["evil"], heard) as evil:
            await met(evil, heard)
            evil.send(encode(Hello("evil", 1, "n", "", (own,))))
            for message in (
                KvSnapshot(1, "n", foreign, 99, 99, block_size=1),
                KvDelta(1, "n", foreign, 1, 2, cleared=True),
                KvSnapshot(1, "other nonce", own.id, 50, 1, blocks=bytes(8)),
                KvSnapshot(1, "n", own.id, 1, 1, blocks=b"123"),
                KvSnapshot(1, "n", own.id, 1, 2, block_size=1),
            ):
                evil.send(encode(message))
            await until(lambda: shown(scene, "evil-p") is not None)
            assert shown(scene, "evil-p") == {"known": True, "blocks": 0, "block_size": 1, "reason": ""}
            assert holds(scene, "good-p", 1)()
            await until(lambda: complained(scene, "foreign_engine") >= 2 and complained(scene, "garbage") >= 1)  # a line a second
            assert (complained(scene, "foreign_engine"), complained(scene, "garbage")) == (2, 1)


# --- an agent and whoever says it is a router


class Pretender:
    """Welcomes an agent and acknowledges its heartbeats, as a router of some release does."""

    def __init__(self, minor: int) -> None:
        self.key = make_key()
        self.minor = minor
        self.acks = True
        self.heard: list[Message] = []
        self.server = ControlServer("127.0.0.1", 0, key=self.key, allows=lambda _: True, log=make_logger("critical", "text"))
        self.server.on_message = self._hear
        self._session = b""

    def _hear(self, session: bytes, _key: str, frame: bytes) -> bool:
        message = to_router.decode(frame)
        self._session = session
        self.heard.append(message)
        if isinstance(message, Hello):
            self.say(Welcome("r", 0.05))
        elif isinstance(message, Heartbeat) and self.acks:
            self.say(Ack(message.seq))
        return True

    def say(self, message: Message) -> None:
        frame = encode(message)
        self.server.send(self._session, frame[:4] + bytes((self.minor,)) + frame[5:])

    def count(self, *kinds: type[Message]) -> int:
        return sum(isinstance(message, kinds) for message in self.heard)


@asynccontextmanager
async def pretending(minor: int, cache: Cache) -> AsyncIterator[Pretender]:
    pretender = Pretender(minor)
    keeper = StubKeeper("good-p", Role.PREFILL)
    keeper.cache = cache
    agent = simulated_agent(
        "good", port=pretender.server.port, router_key=pretender.key.public, key=make_key(), keepers=[keeper], incarnation=7
    )
    try:
        async with running(agent):
            await joined(agent)
            yield pretender
    finally:
        pretender.server.close()


async def test_a_router_of_an_older_release_is_told_nothing_of_caches() -> None:
    async with pretending(0, started(stored(1, [1]))) as old:
        await until(lambda: old.count(Heartbeat) >= 10)
        assert old.count(KvSnapshot, KvDelta) == 0


async def test_a_snapshot_comes_once_and_again_when_it_is_asked_for() -> None:
    async with pretending(1, started(stored(1, [1]))) as router:
        await until(lambda: router.count(KvSnapshot) == 1)
        beats = router.count(Heartbeat)
        await until(lambda: router.count(Heartbeat) >= beats + 6)
        assert router.count(KvSnapshot, KvDelta) == 1
        router.say(KvResync(EngineId("good-p")))
        await until(lambda: router.count(KvSnapshot) == 2)
        first, second = (m for m in router.heard if isinstance(m, KvSnapshot))
        assert (first.seq, second.seq, first.epoch, first.incarnation) == (1, 2, 1, 7)


async def test_a_snapshot_comes_at_each_join() -> None:
    async with pretending(1, started(stored(1, [1]))) as router:
        await until(lambda: router.count(KvSnapshot) == 1)
        router.say(Refused("say hello again"))
        await until(lambda: router.count(Hello) == 2 and router.count(KvSnapshot) == 2)


async def test_a_router_that_does_not_keep_up_gets_heartbeats_and_nothing_else() -> None:
    async with pretending(1, started()) as router:
        await until(lambda: router.count(KvSnapshot) == 1)
        router.acks = False
        beats = router.count(Heartbeat)
        await until(lambda: router.count(Heartbeat) >= beats + 5)
        router.say(KvResync(EngineId("good-p")))
        await until(lambda: router.count(Heartbeat) >= beats + 12)
        assert router.count(KvSnapshot) == 1
        router.acks = True
        await until(lambda: router.count(KvSnapshot) == 2)
