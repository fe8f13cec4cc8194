"""`disagg serve` as its users run it: a router and hosts, each a process with a state directory of its own, on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.ports import free_port

START_LIMIT_S = 30.0
STOP_LIMIT_S = 20.0
DISAGG = [sys.executable, "-m", "disagg"]


class Process:
    """One `disagg` command that runs."""

    def __init__(
        self,
        name: str,
        folder: Path,
        arguments: list[str],
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "disagg"),
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder,
                env={**os.environ, **(env or {})},
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


class Site:
    """A router and hosts that join it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http, self.admin_port, self.control = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http}"
        self.admin = f"http://127.0.0.1:{self.admin_port}"
        self.router: Process | None = None
        self.hosts: dict[str, Process] = {}
        self.engine_pids: set[int] = set()

    def start_router(self, *arguments: str) -> Process:
        places = ["--http", f"127.0.0.1:{self.http}", "--admin", f"127.0.0.1:{self.admin_port}", "--control", f"127.0.0.1:{self.control}"]
        state = ["--state-dir", str(self.folder / "router")]
        known = ["--log-format", "json", "--no-measure-at-start"]  # tests count what engines do; who wants it says so
        self.router = Process("router", self.folder, ["serve", "--role", "router", *places, *state, *known, *arguments])
        router = self.router
        wait_for(lambda: self.answers("/healthz") or router.process.poll() is not None, router.said)
        assert router.process.poll() is None, router.said()
        return router

    def token(self, *roles: str) -> str:
        wanted = [word for role in roles for word in ("--role", role)]
        done = self.run("token", "create", *wanted, "--state-dir", str(self.folder / "router"), admin=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    def start_host(
        self,
        name: str,
        role: str,
        *arguments: str,
        token: str | None = None,
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "disagg"),
    ) -> Process:
        """Joins with a new token the first time, with its own key afterwards.

        Args:
            program: what Python runs; a test composes it without a defence.
        """
        state = self.folder / name
        if token is None and not state.exists():
            token = self.token(role)
        given = ["--token", token] if token else []
        command = ["serve", "--role", role, "--name", name, "--join", f"127.0.0.1:{self.control}", "--state-dir", str(state)]
        self.hosts[name] = Process(name, self.folder, [*command, *given, "--log-format", "json", *arguments], env, program)
        return self.hosts[name]

    def run(self, *arguments: str, admin: bool = True) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        where = ["--admin", f"127.0.0.1:{self.admin_port}"] if admin else []
        return subprocess.run([*DISAGG, *arguments, *where], capture_output=True, text=True, timeout=60, check=False, cwd=self.folder)

    def answers(self, path: str) -> bool:
        try:
            return httpx2.get(self.url + path).status_code == 200
        except httpx2.TransportError:
            return False

    def cluster(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx2.get(self.admin + "/admin/cluster").json()
        self.engine_pids |= {e["pid"] for e in found["engines"] if e["pid"]}
        return found

    def engine(self, name: str) -> dict[str, Any]:
        return next((e for e in self.cluster()["engines"] if e["id"] == name), {"state": "absent", "reason": "", "pid": None, "role": ""})

    def host(self, name: str) -> dict[str, Any]:
        return next((h for h in self.cluster()["hosts"] if h["id"] == name), {"state": "absent", "reason": ""})

    def wait_engine(self, name: str, state: str, limit_s: float = START_LIMIT_S) -> dict[str, Any]:
        wait_for(lambda: self.engine(name)["state"] == state, lambda: f"{name} {state}: {json.dumps(self.cluster(), indent=1)}", limit_s)
        return self.engine(name)

    def ask(self, text: str = "Say the word lantern.", **fields: Any) -> httpx2.Response:
        body = {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return httpx2.post(self.url + "/v1/chat/completions", json=body, timeout=30)

    def close(self) -> None:
        if self.router is not None and self.router.process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                self.cluster()  # remember the pids of engines that are left over on purpose
        for process in [*self.hosts.values(), *([self.router] if self.router else [])]:
            if process.process.poll() is None:
                process.process.send_signal(signal.SIGCONT)
            process.end()
        for pid in self.engine_pids:
            if is_engine(pid):
                os.kill(pid, signal.SIGKILL)


def is_engine(pid: int) -> bool:
    """True for a living process that is one of our engines: a pid alone may be somebody else's by now."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"disagg.engines.embedded" in command or b"sglang.launch_server" in command
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], what: Callable[[], str] | str = "", limit_s: float = START_LIMIT_S) -> float:
    """Waits until it is so; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, what() if callable(what) else what
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A router without hosts."""
    made = Site(tmp_path)
    try:
        made.start_router()
        yield made
    finally:
        made.close()


@pytest.fixture
def pair(site: Site) -> Site:
    """A router, a prefill host `p` and a decode host `d`."""
    site.start_host("p", "prefill")
    site.start_host("d", "decode")
    wait_for(lambda: site.answers("/readyz"), lambda: json.dumps(site.cluster()))
    return site
