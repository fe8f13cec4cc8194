"""Engines as child processes: start, wait until ready, watch, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import msgspec

from disagg.engines.base import EngineLaunch, ReadyFile
from disagg.errors import StartError

POLL_S = 0.02
LOG_TAIL_BYTES = 4096


class EngineProcess:
    """A running engine.

    Use `start` to make one.
    """

    def __init__(self, launch: EngineLaunch, process: asyncio.subprocess.Process) -> None:
        self.launch = launch
        self.process = process

    @classmethod
    async def start(cls, launch: EngineLaunch) -> EngineProcess:
        """Starts it. Its output goes to a file and never into a pipe of ours: a full pipe would stop it.

        Raises:
            StartError: the command cannot be executed.
        """
        log = await asyncio.to_thread(launch.log_file.open, "ab")
        with log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *launch.argv,
                    env={**os.environ, **launch.env},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,  # a ctrl-C in the terminal is ours to pass on, in order
                )
            except OSError as error:
                raise StartError(f"the engine {launch.id} cannot be started: {launch.argv[0]}: {error.strerror}") from error
        return cls(launch, process)

    async def wait_ready(self, limit_s: float) -> ReadyFile:
        """Waits until it wrote its ready file.

        Raises:
            StartError: it ended, or was not ready within `limit_s` seconds; the sentence holds the end of its log.
        """
        launch = self.launch
        try:
            async with asyncio.timeout(limit_s):
                while not launch.ready_file.exists():
                    if self.process.returncode is not None:
                        raise StartError(
                            f"the engine {launch.id} ended with code {self.process.returncode} while it started: {self.log_tail()}"
                        )
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise StartError(f"the engine {launch.id} was not ready after {limit_s:g} s; see {launch.log_file}") from error
        return msgspec.json.decode(launch.ready_file.read_bytes(), type=ReadyFile)

    def log_tail(self) -> str:
        """The last line of its log that says something."""
        lines = _tail(self.launch.log_file).strip().splitlines()
        return lines[-1].strip() if lines else f"its log {self.launch.log_file} is empty"

    async def wait(self) -> int:
        """Waits for its end; returns the exit code, negative for a signal."""
        return await self.process.wait()

    async def stop(self, limit_s: float) -> None:
        """SIGTERM, then SIGKILL after `limit_s` seconds."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(limit_s):
                await self.process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self.process.wait()

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
                self.process.send_signal(number)

    def __repr__(self) -> str:
        return f"<EngineProcess {self.launch.id} pid={self.process.pid} code={self.process.returncode}>"


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
