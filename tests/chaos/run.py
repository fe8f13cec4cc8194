"""One run of chaos: a town, a load, faults at random, and the log of it all."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.faults import FAULTS, Blow, NobodyFreeError
from tests.chaos.judge import After, Log, Mark
from tests.chaos.load import Load
from tests.chaos.town import GIVEN, JOINED, Town, TownError, running_town

EVERY_S = 10.0
STORM_EVERY_S = 1.5
AT_ONCE_IN_A_STORM = 3
HOLD_S = (2.0, 6.0)
SETTLE_S = 60.0
REST_S = 10.0
TELL_S = 10.0
RATE = 5.0


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        only: names of fault classes; empty: all.
    """

    minutes: float
    seed: int
    storm: bool = False
    rate: float = RATE
    only: tuple[str, ...] = ()
    keep: Path | None = None


@dataclass
class _Run:
    plan: Plan
    town: Town
    load: Load
    log: Log
    say: Callable[[str], None]
    chance: random.Random
    busy: set[str] = field(default_factory=set)
    deck: list[str] = field(default_factory=list)

    @property
    def until(self) -> float:
        return 60 * self.plan.minutes

    def draw(self) -> str:
        """The next class: every one comes once before one comes again."""
        if not self.deck:
            self.deck = sorted(self.plan.only or FAULTS)
            self.chance.shuffle(self.deck)
        return self.deck.pop()

    async def blow(self, name: str) -> None:
        """One fault from its beginning until everything is in service again, unless it storms."""
        clock = self.town.clock
        blow = Blow(self.town, self.load, self.chance, self.chance.uniform(*HOLD_S), self.busy)
        began = clock()
        try:
            await FAULTS[name](blow)
        except NobodyFreeError:
            return
        except TownError as error:
            self.log.notes.append(f"{began:.0f} s, {name} ({blow.target}): {error}")
        finally:
            self.busy.discard(blow.held)
        mended = clock()
        self.log.marks.append(Mark(name, blow.target, began, mended))
        if not self.plan.storm and (unready := await self.town.settle(SETTLE_S)):
            self.log.notes.append(f"{clock():.0f} s: {SETTLE_S:g} s after {name} ({blow.target}) not in service: {unready}")
        served = "" if self.plan.storm else f", all in service after {clock() - began:.1f} s"
        self.say(f"{began:6.1f} s  {name}: {blow.target}; mended after {mended - began:.1f} s{served}")

    async def one_by_one(self) -> None:
        clock = self.town.clock
        while (began := clock()) < self.until:
            await self.blow(self.draw())
            await asyncio.sleep(max(0.0, min(began + EVERY_S, self.until) - clock()))

    async def storm(self) -> None:
        clock = self.town.clock
        gate = asyncio.Semaphore(AT_ONCE_IN_A_STORM)

        async def gated(name: str) -> None:
            try:
                await self.blow(name)
            finally:
                gate.release()

        async with asyncio.TaskGroup() as group:
            while clock() < self.until:
                await gate.acquire()
                group.create_task(gated(self.draw()), name="a fault")
                await asyncio.sleep(STORM_EVERY_S)

    async def tell(self) -> None:
        """Progress, and the router's counters before they are gone with it."""
        last = 0.0
        while True:
            await self.town.count()
            if (now := self.town.clock()) - last >= TELL_S:
                last = now
                outcomes = [entry.outcome for entry in self.load.entries]
                bad = {name: outcomes.count(name) for name in ("lost", "shed", "wrong", "stuck") if name in outcomes}
                told = f"{len(outcomes)} answered, {outcomes.count('right')} right, {bad or 'none bad'}, {self.load.live} under way"
                self.say(f"{now:6.1f} s  {told}")
            await asyncio.sleep(1.0)

    async def go(self) -> None:
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(self.load.run(enough), name="load")
            telling = group.create_task(self.tell(), name="progress")
            await (self.storm() if self.plan.storm else self.one_by_one())
            enough.set()
            await asyncio.wait([asking])
            telling.cancel()

    async def look_after(self, before: tuple[int, float]) -> After:
        """What is left, at its best within the rest: canaries and idle connections come and go."""
        clock = self.town.clock
        await self.town.settle(SETTLE_S)
        until = clock() + REST_S
        used = dict.fromkeys((*JOINED, *GIVEN), -1)
        live, fds = -1, 0
        while clock() < until:
            for name in [n for n, tokens in used.items() if tokens]:
                used[name] = await self.town.used_tokens(name)
            live = live and await self.town.entries()
            fds = self.town.size()[0]
            await asyncio.sleep(0.2)
        return After(used, live, (before[0], fds), (before[1], self.town.size()[1]), await self.town.unready())


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """A new folder: for good within one that is given, else until the end."""
    folder = Path(tempfile.mkdtemp(prefix="disagg-chaos-", dir=keep))
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


async def run(plan: Plan, say: Callable[[str], None]) -> Log:
    """The whole run; everything that it started is gone afterwards. The log folder stays if the plan says where."""
    began = time.monotonic()

    def clock() -> float:
        return time.monotonic() - began

    log = Log(plan.seed, plan.storm)
    with _folder(plan.keep) as folder:
        async with running_town(folder, clock) as town:
            load = Load(town.url, clock, random.Random(f"load {plan.seed}"), plan.rate)
            await load.learn()
            say(f"all in service and all right answers known after {clock():.0f} s; logs are in {folder}")
            await asyncio.sleep(1.0)
            before = town.size()
            log.load_average = (os.getloadavg()[0], 0.0)
            began = time.monotonic()
            this = _Run(plan, town, load, log, say, random.Random(f"faults {plan.seed}"))
            await this.go()
            log.seconds = clock()
            say(f"{clock():6.1f} s  the load is over; {REST_S:g} s of rest")
            log.after = await this.look_after(before)
            with suppress(OSError):
                await town.count()
            log.entries, log.away = load.entries, town.away
            log.resumes, log.replays = ({k: float(v) for k, v in town.counts[kind].items()} for kind in ("resumes", "replays"))
            log.load_average = (log.load_average[0], os.getloadavg()[0])
    return log
