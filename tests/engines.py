"""Real engine processes for tests: start, wait until ready, stop, and never leave one behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import disagg.engines.embedded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEMO_MODEL = Path(os.environ.get("DISAGG_TEST_MODEL") or Path(disagg.engines.embedded.__file__).parent / "demo_model")
"""The model of all process tests; the variable runs them with another Llama or Qwen folder."""
ROLES = {"unified": "null", "prefill": "prefill", "decode": "decode"}
START_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0


class Ready(msgspec.Struct):
    """What an engine writes to its ready file."""

    pid: int
    url: str
    bootstrap_port: int
    role: str
    model: str
    startup_s: float


@dataclass
class EngineProcess:
    """One engine. ``url``, ``bootstrap_port`` and ``pid`` are known once ``wait_ready`` has returned."""

    role: str
    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]
    url: str = ""
    bootstrap_port: int = 0
    ready: Ready | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return (Path(self.folder.name) / "log").read_text(errors="replace")

    def wait_ready(self) -> EngineProcess:
        path = Path(self.folder.name) / "ready"
        limit = time.monotonic() + START_LIMIT_S
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > limit:
                text = self.log
                self.stop()
                raise RuntimeError(f"the {self.role} engine did not start (exit {self.process.returncode}): {text}")
            time.sleep(0.01)
        self.ready = msgspec.json.decode(path.read_bytes(), type=Ready)
        self.url, self.bootstrap_port = self.ready.url, self.ready.bootstrap_port
        return self

    def kill(self) -> None:
        """As the out-of-memory killer does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP_LIMIT_S)

    def stop(self) -> int:
        """End it in whatever state it is. Returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)  # a stopped process does not hear SIGTERM
            self.process.terminate()
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_LIMIT_S)
        self.folder.cleanup()
        return self.process.returncode


def launch_engine(
    role: str,
    *,
    model: Path = DEMO_MODEL,
    name: str = "demo",
    extra_args: Sequence[str] = (),
    faults: str | None = None,
    cpu: int | None = None,
) -> EngineProcess:
    """Start an engine on free ports and return at once; call ``wait_ready`` on it.

    Args:
        role: unified, prefill or decode.
        model: folder.
        name: served model name.
        extra_args: further flags.
        faults: ``--faults``; None: without the flag.
        cpu: pin it to this core.
    """
    folder = tempfile.TemporaryDirectory(prefix="engine-")
    command = [
        *(["taskset", "-c", str(cpu)] if cpu is not None else []),
        *[sys.executable, "-m", "disagg.engines.embedded", "--model-path", str(model), "--served-model-name", name],
        *["--host", "127.0.0.1", "--port", "0", "--disaggregation-bootstrap-port", "0"],
        *["--disaggregation-mode", ROLES[role], "--ready-file", str(Path(folder.name) / "ready")],
        *["--exit-with-parent", *(["--faults", faults] if faults is not None else []), *extra_args],
    ]
    with (Path(folder.name) / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ})
    return EngineProcess(role, process, folder)


def start_engine(
    role: str,
    *,
    model: Path = DEMO_MODEL,
    name: str = "demo",
    extra_args: Sequence[str] = (),
    faults: str | None = None,
    cpu: int | None = None,
) -> EngineProcess:
    """As ``launch_engine``, and wait until it serves."""
    return launch_engine(role, model=model, name=name, extra_args=extra_args, faults=faults, cpu=cpu).wait_ready()


@contextmanager
def running_engines(*engines: EngineProcess) -> Iterator[tuple[EngineProcess, ...]]:
    """Wait for engines that were launched together, and stop them all at the end."""
    with ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.stop)
        yield tuple(engine.wait_ready() for engine in engines)
