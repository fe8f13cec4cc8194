"""The cluster that is broken on purpose: a router, hosts that joined it, and a pair that was given to it by URL, behind proxies.

            ┌─► p1, p2 (prefill) ─┐            each with an agent and a token, over CURVE
    router ─┼─► d1, d2 (decode) ◄─┘
            ├─► u1 (unified)
            ├─► proxy ─► px (prefill) ◄─ proxy ─ whoever decodes
            └─► proxy ─► dx (decode)

Everything is a process of its own. Every engine can be broken over POST /faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx2

from tests.chaos.judge import Away
from tests.engines import EngineProcess, launch_engine
from tests.ports import free_port
from tests.rig.proxy import Proxy
from tests.serve.conftest import Process, Site

JOINED = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode", "u1": "unified"}
GIVEN = {"px": "prefill", "dx": "decode"}
ENGINE_FLAGS = ("--faults=none", "--paced", "30,0.1;30,0")
"""As tests/cluster/test_kill.py does: steps that last as long as a big model's, and leave the processor to the others."""
READY_LIMIT_S = 60.0
STEP_S = 0.1
ROUTER_FLAGS = ("--log-level", "info")
BREAKS = (aiohttp.ClientError, TimeoutError, OSError)


class TownError(Exception):
    """The run cannot begin or go on; the sentence says why."""


@dataclass
class Given:
    """An engine without an agent, and what stands before it."""

    role: str
    http: int
    bootstrap: int
    process: EngineProcess
    front: Proxy
    transfer: Proxy

    def stop(self) -> None:
        self.process.stop()

    def again(self) -> None:
        """A new process in the place of one that ended."""
        self.process.stop()
        self.process = _launched(self.role, self.http, self.bootstrap)


@dataclass
class Town:
    """The processes and what is known of them.

    Attributes:
        away: when the router was away.
        counts: resumes and replays of all routers so far, by kind and label.
    """

    site: Site
    session: aiohttp.ClientSession
    clock: Callable[[], float]
    given: dict[str, Given] = field(default_factory=dict)
    away: list[Away] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {"resumes": Counter(), "replays": Counter()})
    _last: dict[str, Counter[str]] = field(default_factory=dict)

    # --- looking ---

    @property
    def url(self) -> str:
        return self.site.url

    async def look(self, path: str) -> Any:
        """A page of the admin listener."""
        async with self.session.get(self.site.admin + path) as got:
            return await got.json()

    async def engines(self) -> dict[str, dict[str, Any]]:
        """By our names; an absent router has none."""
        try:
            rows = (await self.look("/admin/cluster"))["engines"]
        except BREAKS:
            return {}
        fronts = {f"http://127.0.0.1:{given.front.port}": name for name, given in self.given.items()}
        found = {fronts.get(row["url"], row["id"]): row for row in rows}
        self.site.engine_pids |= {row["pid"] for row in rows if row["pid"]}
        return found

    async def unready(self) -> dict[str, str]:
        """Engines that are not in service, and why."""
        found = await self.engines()
        states = {name: found.get(name, {"state": "absent", "reason": ""}) for name in (*JOINED, *GIVEN)}
        return {name: f"{row['state']}: {row['reason']}" for name, row in states.items() if row["state"] != "ready"}

    async def settle(self, limit_s: float) -> dict[str, str]:
        """Waits until every engine is in service; whoever is held is started again, as an operator would. Returns who is not."""
        until = self.clock() + limit_s
        asked: set[str] = set()
        while (unready := await self.unready()) and self.clock() < until:
            for name in [n for n, why in unready.items() if why.startswith("held") and n not in asked]:
                asked.add(name)
                await self.order(name, "restart")
            await asyncio.sleep(STEP_S)
        return unready

    async def order(self, engine: str, verb: str, **body: str) -> tuple[int, Any]:
        """An operator's order."""
        try:
            async with self.session.post(f"{self.site.admin}/admin/engines/{engine}/{verb}", json={"cause": "chaos", **body}) as got:
                return got.status, await got.json()
        except BREAKS as error:
            return 0, repr(error)

    # --- engines ---

    async def pid(self, engine: str) -> int:
        """Of its process; 0 if it has none now."""
        if engine in self.given:
            return self.given[engine].process.pid
        row = (await self.engines()).get(engine)
        return int(row["pid"] or 0) if row else 0

    async def direct(self, engine: str) -> tuple[str, dict[str, str]]:
        """An engine's own address and the headers it demands, past router and proxies."""
        if engine in self.given:
            return f"http://127.0.0.1:{self.given[engine].http}", {}
        launch = json.loads((self.site.folder / engine / "engines" / engine / "launch.json").read_bytes())
        row = (await self.engines()).get(engine)
        return (row["url"] if row else ""), {"Authorization": f"Bearer {launch['api_key']}"}

    async def set_faults(self, engine: str, spec: str) -> bool:
        """Breaks an engine by what it was built to break."""
        with contextlib.suppress(*BREAKS, ValueError):
            url, headers = await self.direct(engine)
            async with self.session.post(url + "/faults", json={"spec": spec}, headers=headers) as got:
                return got.status == 200
        return False

    async def used_tokens(self, engine: str) -> int:
        """KV tokens that are neither free nor in quarantine; -1: it does not say."""
        with contextlib.suppress(*BREAKS, ValueError, LookupError):
            url, headers = await self.direct(engine)
            async with self.session.get(url + "/v1/loads?include=all", headers=headers) as got:
                load = (await got.json())["loads"][0]
            return int(load["num_used_tokens"]) + int(load["num_running_reqs"]) + int(load["num_waiting_reqs"])
        return -1

    def send(self, pid: int, number: signal.Signals) -> None:
        """To one of ours; one that is gone hears nothing."""
        with contextlib.suppress(ProcessLookupError):
            if pid:
                os.kill(pid, number)

    # --- hosts ---

    async def start_host(self, name: str) -> None:
        flags = [f"--engine-arg={word}" for word in ENGINE_FLAGS]
        await asyncio.to_thread(self.site.start_host, name, JOINED[name], *flags)

    # --- the router ---

    @property
    def router(self) -> Process:
        assert self.site.router is not None
        return self.site.router

    async def start_router(self) -> None:
        given = []
        for engine in self.given.values():
            place = f"http://127.0.0.1:{engine.front.port}"
            given += ["--prefill", f"{place},{engine.transfer.port}"] if engine.role == "prefill" else ["--decode", place]
        await asyncio.to_thread(self.site.start_router, *given, *ROUTER_FLAGS)
        self._last = {}

    async def restart_router(self, number: signal.Signals) -> None:
        """Ends it and starts it again; notes how long it was away."""
        await self.count()
        began = self.clock()
        await asyncio.to_thread(self.router.end, number)
        await self.start_router()
        await self.wait_serving()
        self.away.append(Away(began, self.clock(), killed=number == signal.SIGKILL))

    async def wait_serving(self) -> None:
        await until(self._serves, "the router is not ready", READY_LIMIT_S)

    async def _serves(self) -> bool:
        with contextlib.suppress(*BREAKS):
            async with self.session.get(self.url + "/readyz") as got:
                return got.status == 200
        return False

    async def count(self) -> None:
        """Adds what the router's counters grew by since the last look."""
        with contextlib.suppress(*BREAKS):
            async with self.session.get(self.site.admin + "/metrics") as got:
                lines = (await got.text()).splitlines()
            for kind, total in self.counts.items():
                now = _labelled(lines, f"disagg_{kind}_total{{")
                total.update(now - self._last.get(kind, Counter()))
                self._last[kind] = now

    def size(self) -> tuple[int, float]:
        """Descriptors and resident MB of the router."""
        process = Path(f"/proc/{self.router.process.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return len(list((process / "fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    async def entries(self) -> int:
        """Legs that the router has an entry for."""
        return len((await self.look("/admin/kv"))["holds"])


def _labelled(lines: list[str], start: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in lines:
        if line.startswith(start):
            label, _, value = line.removeprefix(start).rpartition("} ")
            found[label.partition('"')[2].rstrip('"')] += int(float(value))
    return found


def _launched(role: str, http: int, bootstrap: int) -> EngineProcess:
    places = ("--port", str(http), "--disaggregation-bootstrap-port", str(bootstrap))
    flags = ("--bootstrap-timeout", "60", "--transfer-stall-timeout", "10")
    _, *rest = ENGINE_FLAGS
    return launch_engine(role, faults="none", extra_args=(*places, *flags, *rest))


async def until(condition: Callable[[], Awaitable[bool]], what: str, limit_s: float) -> None:
    """Waits for what happens in other processes."""
    try:
        async with asyncio.timeout(limit_s):
            while not await condition():  # noqa: ASYNC110
                await asyncio.sleep(STEP_S)
    except TimeoutError as error:
        raise TownError(f"{what} after {limit_s:g} s") from error


@asynccontextmanager
async def running_town(folder: Path, clock: Callable[[], float]) -> AsyncIterator[Town]:
    """Everything up and proved; nothing of it is left afterwards."""
    async with AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=5.0)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True))
        )
        site = Site(folder)
        town = Town(site, session, clock)
        stack.callback(_sweep, folder)
        stack.callback(_close, site)
        for name, role in GIVEN.items():
            http, bootstrap = free_port(), free_port()
            front = await stack.enter_async_context(Proxy(http).running())
            transfer = await stack.enter_async_context(Proxy(bootstrap).running())
            engine = Given(role, http, bootstrap, _launched(role, http, bootstrap), front, transfer)
            stack.callback(engine.stop)
            town.given[name] = engine
        for engine in town.given.values():
            await asyncio.to_thread(engine.process.wait_ready)
        await town.start_router()
        for name in JOINED:
            await town.start_host(name)
        if unready := await town.settle(READY_LIMIT_S):
            raise TownError(f"not every engine came up: {unready}; see {folder}")
        yield town


def _close(site: Site) -> None:
    with contextlib.suppress(httpx2.TransportError):  # the router may not be there: then they are swept away
        site.close()


def _sweep(folder: Path) -> None:
    """Engines outlive their agents: those of this folder end with the run."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
