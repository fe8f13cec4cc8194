"""A cluster on several hosts as its users run it: `disagg serve` for each, each with a state directory of its own; and eyes on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from disagg.engines.base import EngineRecord, decode_kept
from tests.hosts.net import ADMIN_PORT, CONTROL_PORT, HTTP_PORT, Network, open_network

HOSTS = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}
POLL_S = 0.02
START_LIMIT_S = 40.0
STOP_LIMIT_S = 15.0
# Streams last for seconds, as with a bigger model.
PACE = "20,0.1;20,1"
HANG_KILL_S = 6.0
"""The default of a minute is for engines that load for minutes."""


class Rig:
    """The router and four hosts. Made by `running_rig`."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.broken = ""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = f"http://{network.router_address}:{HTTP_PORT}"
        self.admin = f"http://{network.router_address}:{ADMIN_PORT}"

    # --- processes

    def start_router(self) -> None:
        """`disagg serve --role router`."""
        where = self.network.router_address
        listeners = [f"--http={where}:{HTTP_PORT}", f"--admin={where}:{ADMIN_PORT}"]
        self._start("router", "serve", "--role=router", f"--control={self.network.address('router')}:{CONTROL_PORT}", *listeners)

    def start_host(self, name: str, token: str = "") -> None:
        """`disagg serve --role prefill --join …`; without a token, as systemd starts a host again."""
        join = f"--join={self.network.address('router')}:{CONTROL_PORT}"
        engine = [
            "--engine-arg=--paced",
            f"--engine-arg={PACE}",
            "--engine-arg=--faults",
            "--engine-arg=none",
            f"--hang-kill-s={HANG_KILL_S}",
        ]
        advertise = [f"--advertise={self.network.address(name)}"] if self.network.why_uncut else []  # on a net of its own it finds that out
        self._start(
            name, "serve", f"--role={HOSTS[name]}", f"--name={name}", join, *advertise, *engine, *([f"--token={token}"] if token else [])
        )

    def _start(self, host: str, *words: str) -> None:
        with (self.folder / f"{host}.log").open("ab") as log:
            self.processes[host] = subprocess.Popen(
                self._command(host, *words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self._env(host)
            )

    def _command(self, host: str, *words: str) -> list[str]:
        return self.network.command(host, [sys.executable, "-m", "disagg", *words])

    def _env(self, host: str) -> dict[str, str]:
        return {**os.environ, "DISAGG_STATE_DIR": str(self.state(host))}

    def state(self, host: str) -> Path:
        """The host's state directory."""
        return self.folder / host

    def make_token(self, role: str) -> str:
        """`disagg token create`, on the router's host."""
        made = subprocess.run(
            self._command("router", "token", "create", f"--role={role}"),
            env=self._env("router"),
            capture_output=True,
            check=True,
            timeout=20,
        )
        return made.stdout.decode().strip()

    def record(self, host: str) -> EngineRecord:
        """What the host's agent keeps of its engine."""
        return decode_kept((self.state(host) / "engines" / host / "record.json").read_bytes(), EngineRecord)

    def kill(self, host: str) -> None:
        """kill -9 of the host's agent, or of the router."""
        self.processes[host].kill()
        self.processes[host].wait(STOP_LIMIT_S)

    def signal_all(self, host: str, number: signal.Signals) -> None:
        """To everything that runs on a host."""
        for pid in (self.processes[host].pid, self.record(host).pid):
            os.kill(pid, number)

    def stop(self) -> None:
        """Ends everything, whatever state it is in."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)  # a stopped process does not hear SIGTERM
                process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_LIMIT_S)
            process.kill()
            process.wait(STOP_LIMIT_S)
        for pid in self.engine_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def engine_pids(self) -> list[int]:
        """Every process whose command line names this rig's folder: the engines, also those that nobody keeps."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if os.fsencode(self.folder) in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def logs(self) -> str:
        """The end of each log."""
        parts = [
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-60:])
            for path in sorted(self.folder.glob("*.log"))
        ]
        return "\n".join(parts)

    # --- the network's vantage points

    @contextlib.asynccontextmanager
    async def session(self, host: str = "router", headers: dict[str, str] | None = None) -> AsyncIterator[aiohttp.ClientSession]:
        """A client on a host."""
        connector = aiohttp.TCPConnector(limit=0, socket_factory=self.network.socket_factory(host))
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as session:
            yield session

    async def engine_loads(self, host: str) -> dict[str, Any]:
        """What an engine says of itself, to a client on its own host; flat."""
        async with self._engine_session(host) as (session, url), session.get(f"{url}/v1/loads?include=all") as response:
            rank: dict[str, Any] = (await response.json())["loads"][0]
        return {**rank, **rank["disaggregation"]}

    async def set_faults(self, host: str, spec: str) -> None:
        """Makes the engine of a host do something wrong."""
        async with self._engine_session(host) as (session, url), session.post(f"{url}/faults", json={"spec": spec}) as response:
            assert response.status == 200, await response.text()

    @contextlib.asynccontextmanager
    async def _engine_session(self, host: str) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
        record = self.record(host)
        assert record.ready is not None
        async with self.session(host, {"Authorization": f"Bearer {record.launch.api_key}"}) as session:
            yield session, record.ready.url


@contextlib.contextmanager
def running_rig(folder: Path) -> Iterator[Rig]:
    """A cluster that has just been started; everything is gone at the end."""
    with open_network(("router", *HOSTS)) as network:
        rig = Rig(network, folder)
        try:
            rig.start_router()
            with ThreadPoolExecutor() as pool:
                tokens = pool.map(rig.make_token, HOSTS.values())
                for name, token in zip(HOSTS, tokens, strict=True):
                    rig.start_host(name, token)
            yield rig
        finally:
            rig.stop()


@dataclass
class Glance:
    """The cluster at one moment, as the router's admin listener shows it. `engines` is empty while no router answers."""

    at: float
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def state(self, engine: str) -> str:
        return str(self.engines.get(engine, {}).get("state", "absent"))

    @property
    def all_ready(self) -> bool:
        return set(self.engines) == set(HOSTS) and all(e["state"] == "ready" for e in self.engines.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {e['state']} ({e['reason']})" for name, e in sorted(self.engines.items())) or "no router"


class Watch:
    """Looks at the cluster every 20 ms and remembers what it saw."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.seen: list[Glance] = [Glance(time.monotonic())]
        self._looked = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Watch]:
        async with self._rig.session() as session, asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self._look_on(session), name="watch")
            try:
                yield self
            finally:
                looking.cancel()

    async def _look_on(self, session: aiohttp.ClientSession) -> None:
        while True:
            glance = await self._look(session)
            async with self._looked:
                self.seen.append(glance)
                self._looked.notify_all()
            await asyncio.sleep(POLL_S)

    async def _look(self, session: aiohttp.ClientSession) -> Glance:
        try:
            async with session.get(f"{self._rig.admin}/admin/cluster") as response:
                shown = await response.json()
        except (aiohttp.ClientError, OSError):
            return Glance(time.monotonic())
        return Glance(time.monotonic(), {e["id"]: e for e in shown["engines"]}, {h["id"]: h for h in shown["hosts"]})

    async def until(self, is_so: Callable[[Glance], bool], what: str, limit_s: float) -> Glance:
        """The first glance from now on of which this is true."""
        try:
            async with asyncio.timeout(limit_s), self._looked:
                await self._looked.wait()
                while not is_so(self.seen[-1]):
                    await self._looked.wait()
        except TimeoutError:
            raise AssertionError(f"not within {limit_s:g} s: {what}; instead {self.seen[-1]}") from None
        return self.seen[-1]

    def first(self, after: float, is_so: Callable[[Glance], bool]) -> float:
        """How long after a moment it was so for the first time, in seconds; infinite when it was never."""
        return next((g.at - after for g in self.seen if g.at >= after and is_so(g)), float("inf"))

    def story(self, engine: str, after: float) -> str:
        """The engine's states since a moment."""
        told: list[tuple[float, str]] = []
        for glance in self.seen:
            now = f"{glance.state(engine)}: {glance.engines.get(engine, {}).get('reason', '')}"
            if glance.at >= after and (not told or told[-1][1] != now):
                told.append((glance.at - after, now))
        return "\n".join(f"{at:+.2f} s {engine} {what}" for at, what in told)


@dataclass
class Answer:
    """One streamed completion. Times are monotonic; `ended_at` is 0 while it runs. `body`: which of the load's."""

    sent_at: float
    body: int = 0
    status: int = 0
    id: str = ""
    prefill: str = ""
    decode: str = ""
    attempts: int = 0
    text: str = ""
    events: int = 0
    last_at: float = 0.0
    ended_at: float = 0.0
    error: str = ""
    done: bool = False

    @property
    def flows(self) -> bool:
        return self.events > 0 and not self.ended_at


async def ask(session: aiohttp.ClientSession, rig: Rig, body: dict[str, Any], answer: Answer) -> None:
    """Streams a completion into `answer`. What goes wrong is kept and not raised."""
    try:
        async with session.post(f"{rig.url}/v1/completions", json={**body, "stream": True}) as response:
            answer.status, answer.id = response.status, response.headers.get("x-request-id", "")
            answer.prefill, answer.decode = response.headers.get("x-disagg-prefill", ""), response.headers.get("x-disagg-decode", "")
            answer.attempts = int(response.headers.get("x-disagg-attempts", "0"))
            if response.status == 200:
                await _read_events(response, answer)
            else:
                answer.error = await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = repr(error)
    answer.ended_at = time.monotonic()


async def _read_events(response: aiohttp.ClientResponse, answer: Answer) -> None:
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        answer.last_at = time.monotonic()
        if line == b"data: [DONE]\n":
            answer.done = True
            continue
        event = msgspec.json.decode(line[6:])
        if "error" in event:
            answer.error = event["error"]["message"]
        else:
            answer.events += 1
            answer.text += event["choices"][0]["text"]


class Load:
    """Requests that come at a steady pace, however the cluster fares, until it is closed; then it waits for the answers.

    Each stream is long, so that engines which get no new work have less and less of it than those which do: an engine that were not left
    out would be chosen.
    """

    def __init__(self, rig: Rig, bodies: list[dict[str, Any]]) -> None:
        self._rig = rig
        self._bodies = bodies
        self.answers: list[Answer] = []
        self._pouring: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def running(self, every_s: float) -> AsyncIterator[Load]:
        """Pours until `stop`, or until the context ends; that ends with the last answer."""
        async with self._rig.session() as session, asyncio.TaskGroup() as streams:
            pouring = self._pouring = streams.create_task(self._pour(session, streams, every_s), name="load")
            try:
                yield self
            finally:
                pouring.cancel()

    def stop(self) -> None:
        """Sends no more; what was sent goes on."""
        if self._pouring is not None:
            self._pouring.cancel()

    async def until(self, is_so: Callable[[list[Answer]], bool], what: str, limit_s: float = 10.0) -> None:
        """Waits until this is true of the answers."""
        try:
            async with asyncio.timeout(limit_s):
                while not is_so(self.answers):  # noqa: ASYNC110  many streams write there
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"not within {limit_s:g} s: {what}") from None

    async def _pour(self, session: aiohttp.ClientSession, streams: asyncio.TaskGroup, every_s: float) -> None:
        next_at = time.monotonic()
        while True:
            which = len(self.answers) % len(self._bodies)
            answer = Answer(time.monotonic(), which)
            self.answers.append(answer)
            streams.create_task(ask(session, self._rig, self._bodies[which], answer), name=f"stream {len(self.answers)}")
            next_at += every_s
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    async def attempts(self) -> list[Attempt]:
        """Everything that the router sent, the attempts that came to nothing too, in the order of the requests."""
        found: list[Attempt] = []
        async with self._rig.session() as session:
            for answer in self.answers:
                async with session.get(f"{self._rig.admin}/admin/requests/{answer.id}") as response:
                    story = await response.json()
                for told in story["attempts"]:
                    times = [answer.sent_at + event["at_s"] for event in told["events"]]
                    found.append(Attempt({told["prefill"], told["decode"]}, times[0], _ended(times, told["events"])))
        return found


@dataclass
class Attempt:
    """What the router tells of one attempt. `ended_at`: when it became final."""

    engines: set[str]
    began_at: float
    ended_at: float


def _ended(times: list[float], events: list[dict[str, Any]]) -> float:
    final = {"DecodeFinished", "DecodeFailed", "PrefillFailed", "ClientLeft"}
    return next((at for at, event in zip(times, events, strict=True) if event["event"] in final), float("inf"))
