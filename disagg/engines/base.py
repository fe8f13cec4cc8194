"""What an engine must offer: SGLang's own HTTP surface. Here: how one is started, and what is kept to find it again.

Any process that serves SGLang's routes (``/generate``, ``/v1/...``, ``/v1/loads``, ``/server_info``, ``/abort_request``) can be an engine;
the router never knows which one it talks to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from disagg.model import EngineAddress, EngineId, Role

HIDDEN = "***"


class KvSource(msgspec.Struct, frozen=True):
    """Where an engine publishes what its prefix cache holds: SGLang's ``--kv-events-config``. ZeroMQ endpoints on this machine.

    Attributes:
        events: PUB; subscribe to everything.
        replay: ROUTER; a REQ-shaped request with a sequence number gets the batches from there on.
    """

    events: str
    replay: str


class EngineLaunch(msgspec.Struct, frozen=True):
    """How to start an engine on this host.

    Attributes:
        argv: the command.
        env: added to this process's environment.
        log_file: gets its standard output and error.
        ready_file: where the engine writes its ports as one JSON object when it is ready; None for one that writes none, as SGLang.
        url: where an engine without a ready file will serve; and `bootstrap_port`, where it meets its decode engines.
        api_key: what the engine demands of its callers; it stands in `env` or in a secret file as well, where the engine reads it.
        secret_files: to be written before the start, mode 0600: path and content.
        settings: what was configured: `argv` without what differs from start to start; empty for all of `argv`.
        kv_events: where it publishes its KV events; None where it does not.
        model_hash: of its model folder, for an engine that does not say it itself.
        part: which part of an engine over several hosts; only part 0 serves requests.
        parts: how many it has.
    """

    id: EngineId
    role: Role
    argv: tuple[str, ...]
    env: dict[str, str]
    log_file: Path
    ready_file: Path | None = None
    url: str = ""
    bootstrap_port: int = 0
    api_key: str = ""
    secret_files: tuple[tuple[Path, str], ...] = ()
    settings: tuple[str, ...] = ()
    kv_events: KvSource | None = None
    model_hash: str = ""
    part: int = 0
    parts: int = 1

    def __repr__(self) -> str:
        return f"<EngineLaunch {self.id} {self.role}>"  # argv and env may hold secrets


class ReadyFile(msgspec.Struct, frozen=True):
    """What an engine says when it is ready. Seconds."""

    pid: int
    url: str
    bootstrap_port: int | None = None
    model: str = ""
    startup_s: float = 0.0

    def address(self, record: EngineRecord) -> EngineAddress:
        """Where the router reaches it."""
        host, _, port = self.url.removeprefix("http://").rstrip("/").rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        return EngineAddress(record.id, record.role, host, int(port), self.bootstrap_port or 0, api_key=record.launch.api_key, pid=self.pid)


class EngineRecord(msgspec.Struct, frozen=True):
    """What the next agent must know to find a running engine again. It holds the engine's key: the file is 0600.

    Attributes:
        launch: how it was started.
        role: now; it may have been switched since its start.
        start_ticks: when the process started, clock ticks since boot; with pid and `boot_id` it names one process for all time.
        boot_id: the kernel's id of this boot.
        log_from: where its output begins in the log, in bytes: before that stands what earlier lives wrote.
        ready: what the engine said when it became ready; None while it starts.
        host: the name of the host whose agent started it.
        drained: why a person took it out of service; empty when nobody did.
        switches: how often it has been switched since its start.
    """

    launch: EngineLaunch
    role: Role
    pid: int
    start_ticks: int
    boot_id: str
    log_from: int = 0
    ready: ReadyFile | None = None
    host: str = ""
    drained: str = ""
    switches: int = 0

    @property
    def id(self) -> EngineId:
        """The engine's id."""
        return self.launch.id

    def __repr__(self) -> str:
        return f"<EngineRecord {self.id} {self.role} pid={self.pid} start_ticks={self.start_ticks} ready={self.ready is not None}>"


Kept = TypeVar("Kept", EngineLaunch, EngineRecord)


def encode_kept(kept: EngineLaunch | EngineRecord) -> bytes:
    """A launch or a record as JSON, for a file of mode 0600."""
    return msgspec.json.encode(kept, enc_hook=str)  # paths are what JSON does not know


def decode_kept(content: bytes, kind: type[Kept]) -> Kept:
    """The way back.

    Raises:
        msgspec.DecodeError: it makes no sense, or is not one of these.
    """
    return msgspec.json.decode(content, type=kind, dec_hook=_path)


def _path(kind: type, value: Any) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise TypeError(f"a path is a string, not {type(value).__name__}")
    return Path(value)


class RunningEngine(Protocol):
    """An engine process that somebody watches. `EngineProcess` is the real one; a simulation brings its own."""

    @property
    def id(self) -> EngineId:
        """The engine's id."""

    @property
    def pid(self) -> int:
        """Its process on this host."""

    @property
    def alive(self) -> bool:
        """False once its end was seen."""

    def record(self, *, ready: ReadyFile | None = None) -> EngineRecord:
        """What to keep for the next agent; what is left out is as it was known."""

    async def wait(self) -> int | None:
        """Waits for its end: the exit code, negative for a signal, None where only init knows it."""

    async def wait_ready(self, limit_s: float) -> ReadyFile:
        """Waits until it wrote its ready file."""

    def log_tail(self) -> str:
        """The last line of its log that says something."""

    def log_text(self) -> str:
        """The end of its log."""

    def mask_key(self) -> int:
        """Overwrites the engine's key where its log shows it; says how often that was."""

    def terminate(self) -> None:
        """Asks it to end."""

    def kill(self) -> None:
        """Ends it and all that it started."""

    async def stop(self, limit_s: float) -> bool:
        """Asks it to end and kills it after `limit_s` seconds. False: not even that helped."""

    def close(self) -> None:
        """Looks away; the engine goes on."""


class Launcher(Protocol):
    """A way to start engines that survive whoever started them."""

    async def start(self, launch: EngineLaunch) -> RunningEngine:
        """Starts an engine and returns before it is ready. Raises StartError."""

    async def adopt(self, record: EngineRecord) -> RunningEngine | None:
        """The running engine of this record, or None when that very process is gone."""

    async def stop(self, engine: RunningEngine, limit_s: float) -> bool:
        """Ends an engine that `start` or `adopt` gave; SIGKILL after `limit_s` seconds. False: not even that helped."""
