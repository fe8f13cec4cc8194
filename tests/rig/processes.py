"""The processes of a measurement: the fake engines, one run of the load, a router. Each on its core, none outlives the bench."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import msgspec

from tests.rig.binary import RigError

if TYPE_CHECKING:
    from collections.abc import Sequence

BOOTSTRAP_PORT = 8998  # rig.c checks that this is what the engines are told
STOP_LIMIT_S = 15.0
LOAD_SPARE_S = 30.0  # over the load's own time: its drain and a slow machine


class Quantiles(msgspec.Struct, frozen=True):
    """Of one kind of waiting, in µs."""

    count: int
    p50: float
    p99: float


class Measured(msgspec.Struct, frozen=True):
    """What one run of the load saw.

    Attributes:
        seconds: the length of the window; requests, events and CPU seconds are what fell into it.
        first_us: from the request to its first event.
        event_us: from an engine's write of an event to the client's read of it.
        cpu_s: per process asked for, then the load's own.
        errors: by kind, over the whole run, warm-up and drain included.
    """

    seconds: float
    requests: int
    events: int
    latency_us: Quantiles
    first_us: Quantiles
    event_us: Quantiles
    cpu_s: list[float]
    errors: dict[str, int]


class Counters(msgspec.Struct, frozen=True):
    """What the fake engines saw since they started; ``faults`` is the router's share."""

    connections: int
    pairs: int
    answers: int
    unknown: int
    last_unknown: str
    faults: dict[str, int]


@dataclass(frozen=True)
class Rig:
    """The binary and the two cores: one for the router, one for everything around it."""

    binary: Path
    router_core: int
    rig_core: int

    def pinned(self, core: int, command: Sequence[str | Path]) -> list[str]:
        """The command line that runs a command on one core and ends it with us."""
        return [str(self.binary), "run", "--core", str(core), *map(str, command)]


def get(port: int, path: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body of one GET on loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that we started, politely first."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait(STOP_LIMIT_S)


class Fakes:
    """Both engines of a pair in one process, as a context manager.

    Attributes:
        prefill: its HTTP port.
        decode: its HTTP port.
        pid: of the process that plays both.
    """

    def __init__(self, rig: Rig, *, solo: bool = False) -> None:
        command = rig.pinned(rig.rig_core, [rig.binary, "fakes", *(["--solo"] if solo else [])])
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        ports = msgspec.json.decode(self._process.stdout.readline(), type=dict[str, int])
        self.prefill, self.decode, self.pid = ports["prefill"], ports["decode"], self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def counters(self) -> Counters:
        """What they have seen so far."""
        return msgspec.json.decode(get(self.decode, "/rig/counters")[1], type=Counters)


@dataclass(frozen=True)
class Load:
    """One run of the load, as ``rig load`` takes it."""

    connections: int = 1
    stream: bool = False
    chunks: int = 128
    pace_us: int = 0
    prompt_bytes: int = 512
    path: str = "/v1/chat/completions"
    seconds: float = 1.5
    warmup_s: float = 0.5

    def run(self, rig: Rig, port: int, *, cpu_of: Sequence[int] = ()) -> Measured:
        """Runs it against a port, which takes ``warmup_s + seconds`` and what is then under way."""
        options = {
            "port": port,
            "connections": self.connections,
            "stream": "yes" if self.stream else "no",
            "chunks": self.chunks,
            "pace-us": self.pace_us,
            "prompt-bytes": self.prompt_bytes,
            "path": self.path,
            "seconds": self.seconds,
            "warmup": self.warmup_s,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += [word for pid in cpu_of for word in ("--cpu-of", str(pid))]
        command = rig.pinned(rig.rig_core, [rig.binary, "load", *words])
        limit_s = self.warmup_s + self.seconds + LOAD_SPARE_S
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit_s, check=False)
        if done.returncode:
            raise RigError(f"the load stopped: {' '.join(command[5:])}")
        return msgspec.json.decode(done.stdout, type=Measured)


@dataclass
class Router:
    """A router under test, as a context manager: entered when it says that it is ready.

    ``log`` gets what it prints; ``ready_path`` answers 200 when it can serve.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    port: int
    ready_path: str
    log: Path
    ready_limit_s: float = 60.0
    _process: subprocess.Popen[bytes] = field(init=False)
    _log_file: IO[bytes] = field(init=False)

    def __enter__(self) -> Self:
        self._log_file = self.log.open("ab")
        self._process = subprocess.Popen(
            self.command,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            cwd=self.log.parent,  # no router finds a configuration by chance
            env=os.environ | self.environment,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)
        self._log_file.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.ready_limit_s
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if get(self.port, self.ready_path)[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.1)
        last_words = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        raise RigError(f"{self.name} is not ready; its last words:\n" + "\n".join(last_words))

    def pids(self) -> list[int]:
        """Its process and all below it."""
        found, unseen = [], [self._process.pid]
        while unseen:
            pid = unseen.pop()
            found.append(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                unseen += map(int, task.read_text().split())
        return found

    def memory_mb(self) -> tuple[float, float]:
        """Resident now, and the most it has been, summed over its processes."""
        now = peak = 0.0
        for pid in self.pids():
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            now += int(status["VmRSS"].split()[0]) / 1024
            peak += int(status["VmHWM"].split()[0]) / 1024
        return now, peak
