"""What tests and benches of the control plane are made of: a router process, hosts that are nothing but real agents over stub engines.

A simulated host runs the agent that a real one runs (`disagg.cluster.agent.Agent`); only its engine is a stub, which answers probes and
computes nothing. So sixty of them fit into one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx2
import msgspec
import structlog

from disagg.cluster.agent import Agent, Identity
from disagg.model import EngineFacts, EngineId, EngineLoad, EngineState, Role
from disagg.observe.log import make_logger
from disagg.security.keys import KeyPair, load_or_make_key, make_key
from disagg.security.registry import Registration, Registry
from disagg.security.state import router_hosts_path, router_key_path, router_tokens_path
from disagg.security.token import Token, TokenStore
from disagg.wire.kv_events import Cache
from disagg.wire.messages import EngineReport
from tests.ports import free_port

START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0
FACTS = EngineFacts(model="demo", model_hash="same", page_size=16, context_tokens=2048, kv_bytes_per_token=64, version="1", dtype="float32")


def wall() -> float:
    """The wall clock, by which tokens expire and log lines are stamped."""
    return time.clock_gettime(time.CLOCK_REALTIME)


class LogLine(msgspec.Struct, frozen=True):
    """A line of a router's log. `at`: wall clock, seconds."""

    at: float
    level: str
    event: str
    fields: dict[str, Any]


class RouterProcess:
    """A real router, with a state directory of its own, on free ports. A context manager; may be started again on the same ports.

    Args:
        folder: for state and log.
        core: which core it is pinned to; None for any.
        files: how many files it may open; None for as many as the test may.
        flags: more of them.
        profile: gets cProfile's numbers when it ends; slows it by half.
    """

    def __init__(self, folder: Path, *flags: str, core: int | None = None, files: int | None = None, profile: Path | None = None) -> None:
        self.folder = folder
        self.root = folder / "state"
        self.log = folder / "router.log"
        self.http, self.admin, self.control = free_port(), free_port(), free_port()
        self.key = load_or_make_key(router_key_path(self.root))[0]
        self._flags = flags
        self._core = core
        self._files = files
        self._profiler = ["-m", "cProfile", "-o", str(profile)] if profile else []
        self._process: subprocess.Popen[bytes] | None = None

    # --- who may join

    def token(self, *roles: Role, ttl_s: int = 60, made_at: float | None = None) -> Token:
        """A join token, as `disagg token create` makes it."""
        made = wall() if made_at is None else made_at
        return TokenStore(router_tokens_path(self.root)).create(roles, ttl_s, now_wall=made, router_key=self.key.public)

    def enrol(self, *names: str, roles: tuple[Role, ...] = (Role.PREFILL, Role.DECODE)) -> dict[str, KeyPair]:
        """Registers hosts; only while the router does not run, for it alone writes that file then."""
        assert self._process is None
        registry = Registry(router_hosts_path(self.root))
        keys = {name: make_key() for name in names}
        for name, key in keys.items():
            registry.register(Registration(name, key.public, roles, wall()))
        return keys

    # --- its process

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def launch(self) -> float:
        """Starts it, does not wait; returns the wall-clock time of the start."""
        command = [sys.executable, *self._profiler, str(Path(__file__).with_name("router.py")), "serve", "--role", "router"]
        command += ["--log-format", "json", "--state-dir", str(self.root)]
        for flag, port in (("--http", self.http), ("--admin", self.admin), ("--control", self.control)):
            command += [flag, f"127.0.0.1:{port}"]
        pinned = ["taskset", "-c", str(self._core)] if self._core is not None else []
        pinned += ["prlimit", f"--nofile={self._files}:{self._files}"] if self._files is not None else []
        began = wall()
        with self.log.open("ab") as out:
            self._process = subprocess.Popen([*pinned, *command, *self._flags], cwd=self.folder, stdout=out, stderr=out)
        return began

    def start(self) -> None:
        """Starts it and waits until it answers people."""
        self.launch()
        self.wait_up()

    def wait_up(self) -> None:
        """Until the admin listener answers."""
        wait_for(lambda: self._answers(), START_LIMIT_S, f"the router does not start: {self.log.read_text()}")  # noqa: PLW0108

    def _answers(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"http://127.0.0.1:{self.admin}/admin/cluster").status_code == 200
        return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it."""
        process, self._process = self._process, None
        if process is not None:
            end(process, number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- what it says

    def cluster(self) -> dict[str, Any]:
        """The view."""
        found: dict[str, Any] = httpx2.get(f"http://127.0.0.1:{self.admin}/admin/cluster", timeout=10).json()
        return found

    def engines(self) -> dict[str, str]:
        """The state of each engine."""
        return {e["id"]: e["state"] for e in self.cluster()["engines"]}

    def hosts(self) -> dict[str, dict[str, Any]]:
        """What `disagg hosts ls` shows, by name."""
        rows: list[dict[str, Any]] = httpx2.get(f"http://127.0.0.1:{self.admin}/admin/hosts", timeout=10).json()["hosts"]
        return {row["name"]: row for row in rows}

    def online(self) -> list[str]:
        """The hosts that are online."""
        return [name for name, row in self.hosts().items() if row["state"] == "online"]

    def revoke(self, name: str) -> int:
        """As `disagg hosts revoke`; the status of the answer."""
        return httpx2.post(f"http://127.0.0.1:{self.admin}/admin/hosts/{name}/revoke", json={}, timeout=10).status_code

    def lines(self, since: float = 0.0) -> list[LogLine]:
        """Its log, from a moment of the wall clock on."""
        found = [line for text in self.log.read_text().splitlines() if (line := _parse(text)) is not None]
        return [line for line in found if line.at >= since]

    def open_files(self) -> int:
        """Its file descriptors; connections are some."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that it has used since it started, by thread name."""
        found: dict[str, float] = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            name = (task / "comm").read_text().strip()
            nanoseconds = int((task / "schedstat").read_text().split()[0])  # what `stat` says is counted in ticks, and misses short turns
            found[name] = found.get(name, 0.0) + nanoseconds / 1e9
        return found


def _parse(text: str) -> LogLine | None:
    if not text.startswith("{"):
        return None  # what it says to people when it starts
    fields = json.loads(text)
    at = datetime.fromisoformat(fields.pop("timestamp")).timestamp()
    return LogLine(at, fields.pop("level"), fields.pop("event"), fields)


def end(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> int:
    """Ends a process that we started; politely first."""
    if process.poll() is None:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def wait_for(is_so: Any, limit_s: float, otherwise: str) -> float:
    """Waits until a condition holds; returns how long that took, s."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > limit_s:
            raise TimeoutError(otherwise)
        time.sleep(0.02)
    return time.monotonic() - began


# --- simulated hosts


class StubKeeper:
    """An engine that computes nothing. A `disagg.cluster.keeper.Keeper`."""

    def __init__(self, engine: str, role: Role, port: int = 9) -> None:
        self.id = EngineId(engine)
        self.role = role
        self.port = port
        self.state = EngineState.READY
        self.adopted = False
        self.drained = ""
        self.cache: Cache | None = None
        self._counter = 0

    def report(self) -> EngineReport:
        """Ready, and different each time, as a busy engine is."""
        self._counter += 1
        return EngineReport(
            id=self.id,
            role=self.role,
            state=EngineState.DRAINING if self.drained else self.state,
            reason=self.drained or "it answers its agent",
            host="127.0.0.1",
            port=self.port,
            bootstrap_port=self.port if self.role is Role.PREFILL else 0,
            pid=1,
            start_ticks=1,
            counter=self._counter,
            facts=FACTS,
            load=EngineLoad(running=self._counter % 7, kv_used_tokens=self._counter % 4096, kv_total_tokens=16384),
        )

    async def begin(self) -> None:
        """Nothing to find."""

    def start(self) -> None:
        """Nothing to start."""

    async def run(self) -> None:
        """Nothing to keep."""
        await asyncio.Event().wait()

    async def switch(self, role: Role) -> tuple[bool, str]:
        """Becomes another one at once."""
        self.role = role
        return True, "it switched"

    async def restart(self, role: Role, cause: str) -> tuple[bool, str]:
        """The same."""
        return await self.switch(role)

    def drain(self, reason: str) -> None:
        """No new work."""
        self.drained = reason

    def is_idle(self, since: float) -> bool:
        """Always."""
        return True

    async def stop(self, limit_s: float) -> None:
        """Nothing to end."""

    def let_go(self) -> None:
        """Nothing to let go."""


class Silenced:
    """A logger that keeps what was said."""

    @staticmethod
    def make() -> structlog.typing.FilteringBoundLogger:
        """For agents of which only the deeds count."""
        return make_logger("error", "json")


def simulated_agent(
    name: str,
    *,
    port: int,
    router_key: str,
    key: KeyPair,
    token: Token | None = None,
    incarnation: int = 1,
    nonce: str = "",
    keepers: Sequence[StubKeeper] | None = None,
) -> Agent:
    """The agent of a host with two stub engines. Registered already, unless there is a token to register with."""

    async def remember() -> None:
        pass

    stubs = [StubKeeper(f"{name}-p", Role.PREFILL), StubKeeper(f"{name}-d", Role.DECODE)] if keepers is None else keepers
    identity = Identity(
        name=name,
        roles=tuple(dict.fromkeys(stub.role for stub in stubs)),
        key=key,
        router_key=router_key,
        token_key=KeyPair(token.public_key, token.secret_key) if token is not None else None,
        registered=token is None,
        incarnation=incarnation,
        nonce=nonce or f"nonce-of-{name}",
    )
    return Agent("127.0.0.1", port, identity=identity, keepers=stubs, on_registered=remember, log=Silenced.make())


@asynccontextmanager
async def running(*agents: Agent) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Runs agents as long as the context is open; what one of them raises stays in its task."""
    tasks: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_kept(agent), name=f"agent {i}") for i, agent in enumerate(agents)]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()


async def _kept(agent: Agent) -> None:
    with contextlib.suppress(Exception):
        await agent.run()


async def joined(*agents: Agent, limit_s: float = 10.0) -> float:
    """Waits until all have joined; how long that took, s."""
    began = time.monotonic()
    async with asyncio.timeout(limit_s):
        for agent in agents:
            await agent.joined.wait()
    return time.monotonic() - began


@asynccontextmanager
async def stub_engine_server() -> AsyncIterator[int]:
    """Answers the looks of routers at stub engines; the port. It serves any number of them."""
    answers = {
        "/v1/models": {"data": [{"id": "demo", "max_model_len": FACTS.context_tokens}]},
        "/server_info": {"model_hash": "same", "page_size": 16, "kv_bytes_per_token": 64, "version": "1", "dtype": "float32"},
        "/v1/loads": {"loads": [{"num_running_reqs": 0, "max_total_num_tokens": 16384}]},
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode().partition("?")[0]
                body = json.dumps(answers.get(path, {})).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


# --- other processes


@contextmanager
def python_module(module: str, *words: str, core: int | None = None, stdin: bytes | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Runs one of our modules until the context ends; its output can be read."""
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    command = [*pinned, sys.executable, "-m", module, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert process.stdin is not None
        if stdin is not None:
            process.stdin.write(stdin + b"\n")
            process.stdin.flush()
        yield process
    finally:
        end(process)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
