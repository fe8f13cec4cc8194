"""A real router, a host that means well, and what is needed to attack the one without disturbing the other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from disagg.cluster.agent import Agent
from disagg.security.keys import KeyPair
from disagg.security.token import Token
from tests.rig.hosts import LogLine, RouterProcess, joined, running, simulated_agent

NAMES = ("good", "evil", "other")


class Scene:
    """A router, and the keys of hosts that are registered with it."""

    def __init__(self, router: RouterProcess, keys: dict[str, KeyPair]) -> None:
        self.router = router
        self.keys = keys

    def agent(self, name: str, *, incarnation: int = 1, nonce: str = "") -> Agent:
        """The agent of a registered host."""
        router = self.router
        key = self.keys[name]
        return simulated_agent(name, port=router.control, router_key=router.key.public, key=key, incarnation=incarnation, nonce=nonce)

    def newcomer(self, name: str, token: Token, key: KeyPair) -> Agent:
        """The agent of a host that joins with a token."""
        return simulated_agent(name, port=self.router.control, router_key=self.router.key.public, key=key, token=token)

    def complaints(self, since: float) -> list[LogLine]:
        """What the router said about peers that it refused."""
        return [line for line in self.router.lines(since) if line.event == "the control plane refused peers"]

    def refused(self) -> int:
        """How many messages and peers were refused, by its own count in the log."""
        return sum(v for line in self.complaints(0.0) for v in line.fields.values() if isinstance(v, int))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A router that runs, and three hosts that may join it."""
    router = RouterProcess(tmp_path)
    keys = router.enrol(*NAMES)
    with router:
        yield Scene(router, keys)


@pytest.fixture
async def good(scene: Scene) -> AsyncIterator[Agent]:
    """A host that has joined and must not be disturbed: at the end it is there as it was all the time."""
    agent = scene.agent("good")
    async with running(agent):
        await joined(agent)
        yield agent
        lines = [line for line in scene.router.lines() if line.event == "host changed" and line.fields["host"] == "good"]
        assert [line.fields["state"] for line in lines] == ["online"]
        assert agent.joined.is_set()


class HostProcess:
    """`disagg serve --role …` of a host whose engine runs elsewhere, so that nothing but the agent starts."""

    def __init__(self, router: RouterProcess, root: Path, name: str, *, role: str = "decode", token: str = "") -> None:
        command = [sys.executable, "-m", "disagg", "serve", "--role", role, "--name", name, "--join", f"127.0.0.1:{router.control}"]
        command += ["--attach", "http://127.0.0.1:9", "--state-dir", str(root), "--log-level", "error", "--log-format", "json"]
        command += ["--token", token] if token else []
        self.process = subprocess.Popen(command, cwd=router.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def sentence(self, limit_s: float = 15.0) -> str:
        """Waits until it gives up; the one line that it says to a person."""
        _, said = self.process.communicate(timeout=limit_s)
        assert self.process.returncode == 1
        assert len(said.splitlines()) == 1, said
        line = said.strip()
        assert line.startswith("disagg: ")
        return line

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
