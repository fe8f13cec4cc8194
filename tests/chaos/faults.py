"""The classes of faults. Each breaks one thing, lets it be broken for some seconds, and mends it."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from tests.chaos.load import Load
from tests.chaos.town import GIVEN, JOINED, Town, until

CHANGE_LIMIT_S = 45.0
AGENT_AWAY_S = (0.5, 3.0)
BURST = 5.0


@dataclass
class Blow:
    """One fault while it happens.

    Attributes:
        busy: what other faults are at just now; ``take`` keeps off it.
        target: whom it meets, once that is known.
        held: what it has taken.
    """

    town: Town
    load: Load
    chance: random.Random
    hold_s: float
    busy: set[str]
    target: str = ""
    held: str = ""

    def take(self, names: Collection[str]) -> str:
        """One of these that nobody is at."""
        free = sorted(set(names) - self.busy)
        if not free:
            raise NobodyFreeError
        self.held = self.target = self.chance.choice(free)
        self.busy.add(self.held)
        return self.held

    async def rest(self) -> None:
        await asyncio.sleep(self.hold_s)


class NobodyFreeError(Exception):
    """Other faults are at everybody whom this one could meet."""


Fault = Callable[[Blow], Awaitable[None]]


def of_role(role: str) -> list[str]:
    return [name for name, its in {**JOINED, **GIVEN}.items() if its == role]


def kill_engine(role: str) -> Fault:
    async def fault(blow: Blow) -> None:
        await killed(blow, blow.take(of_role(role)))

    return fault


async def killed(blow: Blow, engine: str) -> None:
    """Kills it and waits for the next process: its agent starts one, and where there is none the script does."""
    before = await blow.town.pid(engine)
    blow.town.send(before, signal.SIGKILL)
    if engine in GIVEN:
        await blow.rest()
        given = blow.town.given[engine]
        await asyncio.to_thread(given.again)
        await asyncio.to_thread(given.process.wait_ready)
        return

    async def lives_again() -> bool:
        return await blow.town.pid(engine) not in {before, 0}

    await until(lives_again, f"{engine} has no new process", CHANGE_LIMIT_S)


async def stop_engine(blow: Blow) -> None:
    engine = blow.take([*JOINED, *GIVEN])
    pid = await blow.town.pid(engine)
    blow.town.send(pid, signal.SIGSTOP)
    try:
        await blow.rest()
    finally:
        blow.town.send(pid, signal.SIGCONT)


async def kill_agent(blow: Blow) -> None:
    host = blow.take(JOINED)
    await asyncio.to_thread(blow.town.site.hosts[host].end, signal.SIGKILL)
    await asyncio.sleep(blow.chance.uniform(*AGENT_AWAY_S))
    await blow.town.start_host(host)


async def end_agent(blow: Blow) -> None:
    """An ordered stop: it drains, and takes its engine down."""
    host = blow.take(JOINED)
    await asyncio.to_thread(blow.town.site.hosts[host].end, signal.SIGTERM)
    await asyncio.sleep(blow.chance.uniform(*AGENT_AWAY_S))
    await blow.town.start_host(host)


def restart_router(number: signal.Signals) -> Fault:
    async def fault(blow: Blow) -> None:
        blow.take(["router"])
        await blow.town.restart_router(number)

    return fault


async def flip(blow: Blow) -> None:
    """There and back."""
    engine = blow.take([name for name, role in JOINED.items() if role != "unified"])
    home = JOINED[engine]
    away = "decode" if home == "prefill" else "prefill"
    blow.target = f"{engine} to {away} and back"
    await changed(blow, engine, away)
    await blow.rest()
    await changed(blow, engine, home)


async def changed(blow: Blow, engine: str, role: str) -> None:
    """Orders it as soon as that is possible, and waits until it serves so."""
    ordered = False

    async def serves() -> bool:
        nonlocal ordered
        row = (await blow.town.engines()).get(engine, {})
        if row.get("state") == "ready" and row["role"] != role and not ordered:
            ordered = (await blow.town.order(engine, "flip", role=role))[0] == 202
        return bool(row.get("state") == "ready" and row["role"] == role)

    await until(serves, f"{engine} is not {role}", CHANGE_LIMIT_S)


async def drain(blow: Blow) -> None:
    engine = blow.take([*JOINED, *GIVEN])
    ids = {name: row["id"] for name, row in (await blow.town.engines()).items()}
    await blow.town.order(ids.get(engine, engine), "drain")
    try:
        await blow.rest()
    finally:

        async def undrained() -> bool:
            return (await blow.town.order(ids.get(engine, engine), "undrain"))[0] == 200

        await until(undrained, f"{engine} is not undrained", CHANGE_LIMIT_S)


def engine_breaks(spec: str, *roles: str) -> Fault:
    """By POST /faults; {} is a small number of tokens."""

    async def fault(blow: Blow) -> None:
        engine = blow.take([name for role in roles for name in of_role(role)])
        wanted = spec.format(blow.chance.randint(0, 15))
        blow.target = f"{engine} {wanted}"
        await blow.town.set_faults(engine, wanted)
        try:
            await blow.rest()
        finally:
            await blow.town.set_faults(engine, "none")

    return fault


async def engine_hangs(blow: Blow) -> None:
    """Its steps stop and HTTP goes on; somebody kills it in the end."""
    engine = blow.take([*JOINED, *GIVEN])
    await blow.town.set_faults(engine, "hang@token:3")
    await asyncio.sleep(blow.hold_s + 4.0)
    await killed(blow, engine)


async def deaf_to_aborts(blow: Blow) -> None:
    """Clients leave, and an engine goes on for them."""
    engine = blow.take([*of_role("decode"), *of_role("prefill")])
    await blow.town.set_faults(engine, "ignore-abort,ignore-gone")
    blow.load.leaving = 0.5
    try:
        await blow.rest()
    finally:
        blow.load.leaving = 0.0
        await blow.town.set_faults(engine, "none")


def network(kind: str, place: str) -> Fault:
    """Between the router and an engine (front), or between decode engines and a prefill engine (transfer)."""

    async def fault(blow: Blow) -> None:
        engine = blow.take(["px"] if place == "transfer" else GIVEN)
        given = blow.town.given[engine]
        proxy = given.transfer if place == "transfer" else given.front
        if kind == "delay":
            proxy.delay_s = blow.chance.uniform(0.05, 0.4)
            blow.target = f"{engine} {proxy.delay_s:.2f} s"
        elif kind == "cut":
            at = blow.chance.randint(0, 200_000 if place == "transfer" else 20_000)
            proxy.cut_at(at)
            blow.target = f"{engine} after {at} bytes"
        else:
            proxy.silence("up" if kind == "silence up" else "down")
        try:
            await blow.rest()
        finally:
            proxy.heal()

    return fault


async def clients_leave(blow: Blow) -> None:
    blow.take(["leaving clients"])
    blow.load.leaving = 0.5
    try:
        await blow.rest()
    finally:
        blow.load.leaving = 0.0


async def slow_readers(blow: Blow) -> None:
    blow.take(["slow readers"])
    blow.load.slow = 0.7
    try:
        await blow.rest()
    finally:
        blow.load.slow = 0.0


async def burst(blow: Blow) -> None:
    blow.take(["burst"])
    blow.load.burst = BURST
    try:
        await asyncio.sleep(min(4.0, blow.hold_s))
    finally:
        blow.load.burst = 1.0


SPEAKERS = ("decode", "unified")
FAULTS: dict[str, Fault] = {
    "kill -9 prefill engine": kill_engine("prefill"),
    "kill -9 decode engine": kill_engine("decode"),
    "kill -9 unified engine": kill_engine("unified"),
    "SIGSTOP engine": stop_engine,
    "kill -9 agent": kill_agent,
    "SIGTERM agent": end_agent,
    "kill -9 router": restart_router(signal.SIGKILL),
    "SIGTERM router": restart_router(signal.SIGTERM),
    "flip": flip,
    "drain": drain,
    "slow engine": engine_breaks("slow:x5", "prefill", "decode", "unified"),
    "stalled stream": engine_breaks("stall@token:{}", *SPEAKERS),
    "stalled head": engine_breaks("stall@head", *SPEAKERS),
    "garbage": engine_breaks("garbage@token:{}", *SPEAKERS),
    "early end": engine_breaks("early-end@token:{}", *SPEAKERS),
    "refuses 500": engine_breaks("refuse:500", "prefill", "decode", "unified"),
    "refuses 503": engine_breaks("refuse:503", "prefill", "decode", "unified"),
    "stalled transfer": engine_breaks("stall@transfer:20000", "prefill"),
    "corrupt transfer": engine_breaks("corrupt@transfer:0", "prefill"),
    "late writes": engine_breaks("late-write", "prefill"),
    "hang": engine_hangs,
    "deaf to aborts": deaf_to_aborts,
    "net delay": network("delay", "front"),
    "net cut": network("cut", "front"),
    "net silence up": network("silence up", "front"),
    "net silence down": network("silence down", "front"),
    "transfer delay": network("delay", "transfer"),
    "transfer cut": network("cut", "transfer"),
    "transfer silence": network("silence down", "transfer"),
    "clients leave": clients_leave,
    "slow readers": slow_readers,
    "burst": burst,
}
