"""Stories that are told on purpose, where `faults` draws them: each gets a world whose engines are ready, and moves its time."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable

from disagg.model import HostState
from tests.sim.client import ROUTES, Ask
from tests.sim.engine import Strike
from tests.sim.world import Script, World

LENGTH = 24


def nobody(_: int) -> None:
    """Is told how far a story is."""


def cuts(count: int, *, gap_s: float = 0.5, told: Callable[[int], None] = nobody) -> Script:
    """Cuts one stream after the other, at each token index in turn; what became of them is in the world's requests.

    Args:
        count: how many.
        gap_s: simulated seconds between two.
        told: how many there were.
    """

    async def tell(world: World) -> None:
        chance = random.Random(f"cuts {world.plan.seed}")
        for number in range(count):
            strike = Strike(number % LENGTH, 1)
            for engine in world.engines():
                engine.knobs.cut = strike
            prompt = tuple(chance.randrange(50_000) for _ in range(chance.randrange(1, 40)))
            await world.ask(Ask(number, ROUTES[number % len(ROUTES)], prompt, LENGTH + 1, stream=True))
            await asyncio.sleep(gap_s)
            told(number + 1)

    return tell


def leavings(count: int, *, tokens: int = 0, within_s: float = 1.0, told: Callable[[int], None] = nobody) -> Script:
    """Clients that leave at random points of their request's life, several at a time.

    Args:
        tokens: of each prompt; 0 for random ones.
        within_s: simulated seconds after which all have left.
        told: how many there were.
    """

    async def tell(world: World) -> None:
        chance = random.Random(f"leavings {world.plan.seed}")
        done = itertools.count(1)

        async def some(first: int) -> None:
            for number in range(first, count, 8):
                prompt = tuple(chance.randrange(50_000) for _ in range(tokens or chance.randrange(1, 90)))
                leaves_s = within_s * chance.random() ** 3 + 1e-6  # most of them early: there the states change
                stream = chance.random() < 0.5
                await world.ask(Ask(number, chance.choice(ROUTES), prompt, LENGTH, stream=stream, leaves_s=leaves_s))
                told(next(done))

        async with asyncio.TaskGroup() as group:
            for first in range(8):
                group.create_task(some(first), name=f"clients {first}")

    return tell


def stall(seconds: float) -> Script:
    """The router stands still."""

    async def tell(world: World) -> None:
        world.note("story", "the router stands still")
        world.loop.freeze(world.router_process)
        await asyncio.sleep(seconds)
        world.loop.thaw(world.router_process)
        await asyncio.sleep(5.0)

    return tell


def step(seconds: float) -> Script:
    """Somebody sets the wall clock, in the middle of an answer; then another one is asked for."""

    async def tell(world: World) -> None:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(world.ask(Ask(0, "/generate", (1, 2, 3), 100, stream=True)), name="the running one")
            await asyncio.sleep(0.2)
            assert not running.done(), "the clock is to be set while it runs"
            world.wall_step_s += seconds
        await world.ask(Ask(1, "/generate", (1, 2, 3), 8, stream=True))
        await asyncio.sleep(5.0)

    return tell


class Cutting:
    """A host is cut off for a while; when the router came to think so.

    Args:
        inwards, outwards: to the router, from the router.

    Attributes:
        seen: when each state of the host was seen first, in seconds since the cut; and `back_s`, when it was online again, since the heal.
    """

    def __init__(self, *, inwards: bool, outwards: bool, lasts_s: float = 5.0) -> None:
        self.seen: dict[HostState, float] = {}
        self.back_s = float("inf")
        self._ways = (inwards, outwards)
        self._lasts_s = lasts_s

    async def __call__(self, world: World) -> None:
        ip, router = world.ips["d3"], world.router_process.ip
        ways = [way for way, cut in zip(((ip, router), (router, ip)), self._ways, strict=True) if cut]
        began = world.loop.time()
        for way in ways:
            world.network.cut(*way)
        while world.loop.time() < began + self._lasts_s:
            self.seen.setdefault(self._state(world), world.loop.time() - began)
            await asyncio.sleep(0.01)
        for way in ways:
            world.network.heal(*way)
        healed = world.loop.time()
        while self._state(world) is not HostState.ONLINE:  # noqa: ASYNC110  # simulated time costs nothing
            await asyncio.sleep(0.01)
        self.back_s = world.loop.time() - healed

    def _state(self, world: World) -> HostState:
        assert world.router is not None
        return next(host.state for host in world.router.controller.view.hosts if host.id == "d3")


def crowd(loss: float, delay_s: float, lasts_s: float) -> Script:
    """All messages of the control plane are now and then lost, or late."""

    async def tell(world: World) -> None:
        router = world.router_process.ip
        for ip in world.ips.values():
            for link in (world.network.link(ip, router), world.network.link(router, ip)):
                link.drop, link.delay, link.double = loss, delay_s, loss
        await asyncio.sleep(lasts_s)

    return tell
