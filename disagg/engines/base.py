"""What an engine must offer: SGLang's own HTTP surface. Here: how one is started.

Any process that serves SGLang's routes (``/generate``, ``/v1/...``, ``/v1/loads``, ``/server_info``, ``/abort_request``) can be an engine;
the router never knows which one it talks to.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from disagg.model import EngineAddress, EngineId, Role


class EngineLaunch(msgspec.Struct, frozen=True):
    """How to start an engine on this host.

    Attributes:
        argv: the command.
        env: added to this process's environment.
        ready_file: where the engine writes its ports as one JSON object when it is ready.
        log_file: gets its standard output and error.
    """

    id: EngineId
    role: Role
    argv: tuple[str, ...]
    env: dict[str, str]
    ready_file: Path
    log_file: Path


class ReadyFile(msgspec.Struct, frozen=True):
    """What an engine says when it is ready. Seconds."""

    pid: int
    url: str
    bootstrap_port: int | None = None
    model: str = ""
    startup_s: float = 0.0

    def address(self, launch: EngineLaunch) -> EngineAddress:
        """Where the router reaches it."""
        host, _, port = self.url.removeprefix("http://").rstrip("/").rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        return EngineAddress(launch.id, launch.role, host, int(port), self.bootstrap_port or 0, pid=self.pid)
