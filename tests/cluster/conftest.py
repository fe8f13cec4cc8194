"""`disagg up` as its users run it: a process of its own, with real engines, on free ports."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import pytest

from tests import canaries
from tests.ports import free_port

START_LIMIT_S = 40.0
STOP_LIMIT_S = 15.0


class Cluster:
    """A running `disagg up`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, http: int, admin: int) -> None:
        self.process = process
        self.log = log
        self.url = f"http://127.0.0.1:{http}"
        self.admin = f"http://127.0.0.1:{admin}"

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> None:
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"`disagg up` ended with {self.process.returncode}: {self.log.read_text()}")
            try:
                if httpx2.get(self.url + "/readyz").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"`disagg up` was not ready in {limit_s} s: {self.log.read_text()}")

    def wait_proved(self) -> None:
        """Until no canary is under way any more: a test that looks at an engine's load sees its own requests alone."""
        until = time.monotonic() + START_LIMIT_S
        while time.monotonic() < until:
            if canaries.are_over(self.admin):
                return
            time.sleep(0.05)
        raise RuntimeError(f"canaries are not answered: {self.log.read_text()}")

    def engines(self, role: str | None = None) -> list[dict[str, Any]]:
        """The engines as the admin listener shows them."""
        shown: list[dict[str, Any]] = httpx2.get(self.admin + "/admin/cluster").json()["engines"]
        return [e for e in shown if role in {None, e["role"]}]

    def engine(self, role: str) -> dict[str, Any]:
        return self.engines(role)[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


@contextmanager
def running_cluster(*flags: str, wait: bool = True, limit_s: float = START_LIMIT_S) -> Iterator[Cluster]:
    http, admin = free_port(), free_port()
    known = ["--no-measure-at-start"]  # tests count what engines do; who wants it says so
    command = [sys.executable, "-m", "disagg", "up", "--http", f"127.0.0.1:{http}", "--admin", f"127.0.0.1:{admin}", *known, *flags]
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder)
        cluster = Cluster(process, log, http, admin)
        try:
            if wait:
                cluster.wait_ready(limit_s)
                cluster.wait_proved()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def pair() -> Iterator[Cluster]:
    """One prefill and one decode engine; nobody may harm it."""
    with running_cluster("--log-level", "warning") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def collocated() -> Iterator[Cluster]:
    """One unified engine."""
    with running_cluster("--prefill", "0", "--decode", "0", "--unified", "1", "--log-level", "warning") as cluster:
        yield cluster


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as made:
        yield made


async def load_of(session: aiohttp.ClientSession, engine: dict[str, Any]) -> dict[str, Any]:
    """What an engine says of itself, in one flat dict."""
    async with session.get(engine["url"] + "/v1/loads?include=core,disagg,queues,memory") as response:
        rank: dict[str, Any] = (await response.json())["loads"][0]
    return {**rank, **rank["disaggregation"]}


def holds_nothing(load: dict[str, Any]) -> bool:
    return not (load["num_used_tokens"] or load["num_running_reqs"] or load["num_waiting_reqs"] or load["kv_quarantined_pages"])
