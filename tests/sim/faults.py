"""Faults, drawn from a seed. Each begins, lasts, and ends; to add one, write a class here and name it in `KINDS`."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from disagg.errors import OrderError
from disagg.model import EngineState, Role
from tests.sim.engine import Strike
from tests.sim.launcher import Machine
from tests.sim.loop import Process

if TYPE_CHECKING:
    from tests.sim.world import World


class Fault:
    """One fault.

    Attributes:
        after_s: how long after the last one it strikes; and `lasts_s`.
    """

    name = ""
    longest_s = 5.0

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.after_s = world.plan.gap_s * chance.uniform(0.5, 1.5)
        self.lasts_s = chance.uniform(0.2, 1.0) * self.longest_s
        self.pick = chance.random()

    async def begin(self) -> str | None:
        """Strikes; says whom. None when there is nobody to strike."""
        raise NotImplementedError

    async def end(self) -> None:
        """Ends it."""

    @property
    def machine(self) -> Machine:
        """One of the hosts."""
        machines = list(self.world.machines.values())
        return machines[int(self.pick * len(machines))]

    def ends(self) -> tuple[str, str]:
        """Router and host, or prefill host and decode host."""
        machines = list(self.world.machines.values())
        if self.chance.random() < 0.7:
            return self.world.router_process.ip, self.machine.ip
        first, second = self.chance.sample(machines, 2)
        return first.ip, second.ip


class EngineCrash(Fault):
    name = "engine crash"

    async def begin(self) -> str | None:
        live = self.machine.live()
        if not live:
            return None
        self.machine.kill(live[-1].process.number, self.chance.choice((-9, 137, 1)))
        return live[-1].name


class EngineKnob(Fault):
    """An engine misbehaves: something about its knobs."""

    knob = ""
    longest_s = 12.0

    async def begin(self) -> str | None:
        live = self.machine.live()
        if not live:
            return None
        self._knobs = live[-1].knobs
        self._was = getattr(self._knobs, self.knob)
        setattr(self._knobs, self.knob, self.value())
        return live[-1].name

    def value(self) -> Any:
        """What the knob is turned to."""
        return True

    async def end(self) -> None:
        setattr(self._knobs, self.knob, self._was)


class EngineHang(EngineKnob):
    name, knob = "engine hang", "hung"


class EngineSlow(EngineKnob):
    name, knob = "engine slow", "slow"

    def value(self) -> float:
        return 8.0


class EngineRefuses(EngineKnob):
    name, knob = "engine refuses", "refuse"
    longest_s = 5.0

    def value(self) -> int:
        return 503


class EngineGarbage(EngineKnob):
    name, knob = "engine garbage", "garbage"
    longest_s = 3.0


class EngineEndsEarly(EngineKnob):
    name, knob = "engine ends early", "early_end"
    longest_s = 3.0

    def value(self) -> int:
        return 3


class EngineCuts(EngineKnob):
    name, knob = "engine cuts streams", "cut"
    longest_s = 3.0

    def value(self) -> Strike:
        return Strike(5, 1000)


class EngineDies(EngineKnob):
    """It ends at the next request that has made so many tokens."""

    name, knob = "engine dies at a token", "die"
    longest_s = 5.0

    def value(self) -> Strike:
        return Strike(7, 1)


class EngineDeaf(EngineKnob):
    name, knob = "engine ignores aborts", "ignore_abort"
    longest_s = 3.0


class Cut(Fault):
    name = "cut"
    longest_s = 8.0

    async def begin(self) -> str | None:
        one, other = self.ends()
        self._ways = self.chance.choice(([(one, other)], [(other, one)], [(one, other), (other, one)]))
        for way in self._ways:
            self.world.network.cut(*way)
        return str(self._ways)

    async def end(self) -> None:
        for way in self._ways:
            self.world.network.heal(*way)


class BadMail(Fault):
    name = "bad messages"
    longest_s = 15.0

    async def begin(self) -> str | None:
        ip, router = self.machine.ip, self.world.router_process.ip
        self._links = [self.world.network.link(ip, router), self.world.network.link(router, ip)]
        for link in self._links:
            link.drop, link.double, link.delay = self.chance.choice(((0.3, 0, 0), (0, 0.5, 0), (0, 0, 0.8), (0.1, 0.2, 0.5)))
        return self.machine.name

    async def end(self) -> None:
        for link in self._links:
            link.drop = link.double = link.delay = 0.0


class AgentCrash(Fault):
    name = "agent crash"

    async def begin(self) -> str | None:
        if self.world.agents[self.machine.name][0].dead:
            return None
        await self.world.kill_agent(self.machine.name)
        return self.machine.name

    async def end(self) -> None:
        self.world.start_agent(self.machine.name)


class Freeze(Fault):
    """Some processes stand still."""

    def whom(self) -> list[Process]:
        raise NotImplementedError

    async def begin(self) -> str | None:
        self._frozen = self.whom()
        for process in self._frozen:
            self.world.loop.freeze(process)
        return ", ".join(p.name for p in self._frozen)

    async def end(self) -> None:
        for process in self._frozen:
            self.world.loop.thaw(process)


class HostPause(Freeze):
    name = "host pause"

    def whom(self) -> list[Process]:
        return [*(e.process for e in self.machine.live()), self.world.agents[self.machine.name][0]]


class EnginePause(Freeze):
    name = "engine pause"
    longest_s = 10.0

    def whom(self) -> list[Process]:
        return [e.process for e in self.machine.live()]


class RouterBlock(Freeze):
    name = "router block"
    longest_s = 3.0

    def whom(self) -> list[Process]:
        return [self.world.router_process]


class PowerLoss(Fault):
    name = "power loss"
    longest_s = 8.0

    async def begin(self) -> str | None:
        machine = self.machine
        if self.world.agents[machine.name][0].dead:
            return None
        self.world.network.power(machine.ip, on=False)
        for engine in machine.live():
            machine.kill(engine.process.number, quiet=True)
        await self.world.kill_agent(machine.name, quiet=True)
        return machine.name

    async def end(self) -> None:
        self.world.network.power(self.machine.ip, on=True)
        self.world.start_agent(self.machine.name)


class WallStep(Fault):
    name = "wall clock step"

    async def begin(self) -> str | None:
        self.world.wall_step_s += self.chance.choice((-3600.0, 3600.0))
        return f"to {self.world.wall_step_s:g}"


class RouterCrash(Fault):
    """The router is killed and started again."""

    name = "router crash"
    longest_s = 2.0

    async def begin(self) -> str | None:
        if self.world.router_process.dead:
            return None
        await self.world.kill_router()
        return "the router"

    async def end(self) -> None:
        await self.world.start_router()


class Flip(Fault):
    """A person moves an engine to the other role, where its pool has another one."""

    name = "flip"

    async def begin(self) -> str | None:
        router = self.world.router
        assert router is not None
        engines = [e for e in router.controller.view.engines if e.state is EngineState.READY]
        roles = Counter(e.address.role for e in engines)
        able = [e for e in engines if roles[e.address.role] > 1]
        if not able:
            return None
        engine = able[int(self.pick * len(able))]
        role = Role.DECODE if engine.address.role is Role.PREFILL else Role.PREFILL

        async def order() -> None:
            with contextlib.suppress(OrderError):
                router.controller.flip(engine.id, role, "a fault")

        await self.world.start(self.world.router_process, order())
        return f"{engine.id} to {role}"


class Drain(Fault):
    """A person takes an engine out of service, and puts it back."""

    name = "drain"

    async def begin(self) -> str | None:
        router = self.world.router
        assert router is not None
        engines = router.controller.view.engines
        if not engines:
            return None
        self._engine = engines[int(self.pick * len(engines))].id
        await self._order("drain")
        return self._engine

    async def end(self) -> None:
        await self._order("undrain")

    async def _order(self, verb: str) -> None:
        router = self.world.router
        assert router is not None

        async def order() -> None:
            with contextlib.suppress(OrderError):
                await getattr(router.controller, verb)(self._engine, "a fault")

        self.world.start(self.world.router_process, order())


KINDS: tuple[type[Fault], ...] = (
    EngineCrash,
    EngineHang,
    EngineSlow,
    EngineRefuses,
    EngineGarbage,
    EngineEndsEarly,
    EngineCuts,
    EngineDies,
    EngineDeaf,
    EnginePause,
    Cut,
    BadMail,
    AgentCrash,
    HostPause,
    RouterBlock,
    PowerLoss,
    WallStep,
    RouterCrash,
    Flip,
    Drain,
)


def schedule(world: World, chance: random.Random) -> Iterator[Fault]:
    """Faults one after the other, until the load stops."""
    wanted = [kind for kind in KINDS if not world.plan.faults or kind.name in world.plan.faults]
    until = world.loop.time() + world.plan.load_s
    while wanted:
        fault = chance.choice(wanted)(world, chance)
        if world.loop.time() + fault.after_s > until:
            return
        yield fault
