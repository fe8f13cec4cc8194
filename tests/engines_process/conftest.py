"""Commands as engines, and an eye on every process that they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from disagg.engines.base import EngineLaunch
from disagg.model import EngineId, Role

Make = Callable[..., EngineLaunch]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A launch of a Python program instead of an engine."""

    def made(program: str, *, name: str = "decode-0", env: dict[str, str] | None = None, api_key: str = "") -> EngineLaunch:
        argv = (sys.executable, "-c", program)
        return EngineLaunch(EngineId(name), Role.DECODE, argv, env or {}, tmp_path / "log", tmp_path / "ready.json", api_key=api_key)

    return made


def state(pid: int) -> str:
    """The letter of /proc/PID/stat; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    return state(pid) in {"", "Z", "X"}  # an orphan is init's to reap


@pytest.fixture
def kill_afterwards() -> Iterator[list[int]]:
    """Pids that a test notes here are gone at its end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
            wait_until(partial(gone, pid))


@pytest.fixture(autouse=True)
def no_zombies_and_no_descriptors_left() -> Iterator[None]:
    before = pidfds()
    yield
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert [pid for pid in children if state(int(pid)) == "Z"] == []
    assert pidfds() - before == set()


def pidfds() -> set[str]:
    found = set()
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found |= {str(number)} if "pidfd" in str(number.readlink()) else set()
    return found
