"""The routers that are compared: how each is installed, started and asked whether it is ready."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.ports import free_port
from tests.rig.binary import RigError, cache_dir
from tests.rig.processes import BOOTSTRAP_PORT, Fakes, Rig, Router

if TYPE_CHECKING:
    from collections.abc import Callable

INSTALL_LIMIT_S = 900.0

# With one pair there is nothing to choose, so a policy only costs. round_robin is the cheapest that both peers have: they must
# not be charged for a policy that the comparison does not use. Everybody logs warnings only; everything else is as it comes.
# smg and sglang-router share their ancestry and these flags.
PEER_FLAGS = ("--pd-disaggregation", "--policy", "round_robin", "--log-level", "warn", "--host", "127.0.0.1")


@dataclass(frozen=True)
class Ports:
    """Where a router listens, and where its engines do."""

    http: int
    admin: int
    prefill: int
    decode: int


@dataclass(frozen=True)
class Contestant:
    """One router.

    Attributes:
        name: what it is called on the command line and in the tables.
        requirement: what pip installs, or None for what stands in this checkout.
        arguments: of the Python that has it installed.
    """

    name: str
    requirement: str | None
    ready_path: str
    arguments: Callable[[Ports], list[str]]

    @property
    def title(self) -> str:
        """Its name and version."""
        return (self.requirement or self.name).replace("==", " ")


def _disagg(ports: Ports) -> list[str]:
    return [
        str(Path(sys.executable).with_name("disagg")),
        *("serve", "--role", "router", "--log-level", "warning"),
        *("--http", f"127.0.0.1:{ports.http}", "--admin", f"127.0.0.1:{ports.admin}"),
        *("--prefill", f"http://127.0.0.1:{ports.prefill},{BOOTSTRAP_PORT}"),
        *("--decode", f"http://127.0.0.1:{ports.decode}"),
    ]


def _peer(module: str) -> Callable[[Ports], list[str]]:
    def arguments(ports: Ports) -> list[str]:
        return [
            *("-m", module, *PEER_FLAGS, "--port", str(ports.http)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports.admin)),
            *("--prefill", f"http://127.0.0.1:{ports.prefill}", str(BOOTSTRAP_PORT)),
            *("--decode", f"http://127.0.0.1:{ports.decode}"),
        ]

    return arguments


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("disagg", None, "/readyz", _disagg),
        Contestant("sglang-router", "sglang-router==0.3.2", "/readiness", _peer("sglang_router.launch_router")),
        Contestant("smg", "smg==1.13.0", "/readiness", _peer("smg.launch_router")),
    )
}


def install(contestant: Contestant, say: Callable[[str], None]) -> Path:
    """The Python that has this router; the first time in an environment of its own, so that nobody's pins meet."""
    if contestant.requirement is None:
        return Path(sys.executable)
    home = cache_dir() / "bench-venvs" / contestant.requirement
    python, complete = home / "bin" / "python", home / ".complete"
    if complete.exists():
        return python
    say(f"installing {contestant.requirement} into {home} (once)")
    venv.create(home, clear=True, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", contestant.requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    if done.returncode:
        raise RigError(f"cannot install {contestant.requirement} (leave it out with --routers):\n{done.stderr.strip()}")
    complete.touch()
    return python


def router_of(contestant: Contestant, rig: Rig, fakes: Fakes, python: Path, scratch: Path, *, profile: Path | None = None) -> Router:
    """The router in front of these engines, ready to be entered. ``profile`` gets cProfile's numbers when it ends."""
    ports = Ports(http=free_port(), admin=free_port(), prefill=fakes.prefill, decode=fakes.decode)
    profiler = ["-m", "cProfile", "-o", str(profile)] if profile else []
    return Router(
        name=contestant.name,
        command=rig.pinned(rig.router_core, [python, *profiler, *contestant.arguments(ports)]),
        environment={"DISAGG_STATE_DIR": str(scratch / "state"), "HF_HUB_OFFLINE": "1"},
        port=ports.http,
        ready_path=contestant.ready_path,
        log=scratch / f"{contestant.name}.log",
    )
