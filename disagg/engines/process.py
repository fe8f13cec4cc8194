"""Engines as processes that outlive whoever started them: start, adopt, watch, signal, end.

Who owns what. An engine is the leader of a session of its own, reads /dev/null and writes to a file, so nothing of it hangs on the agent:
when the agent dies, the engine serves on. The next agent finds it by its record: pid, start time and boot id name one process for all time.

    agent ── pidfd ──► engine (pid = process group = session) ──► helpers of the engine, same group
      └── record on disk ── next agent ── pidfd ──► the same engine

A pidfd is one process, not a number: it becomes readable when the process ends, its own child or not, and a signal through it can never hit
a stranger that got the number later. The order is what makes it safe: first open the pidfd, then compare the start time. Of a child we are
the ones who reap; of an adopted engine init is, so its exit code is not known here. Only ``waitid`` on our own pidfd is called, hence
asyncio's and uvloop's own children are left to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple, NoReturn, Self

import msgspec

from disagg.engines.base import HIDDEN, EngineLaunch, EngineRecord, ReadyFile, RunningEngine, decode_kept
from disagg.errors import StartError
from disagg.model import EngineId

POLL_S = 0.02
LOG_TAIL_BYTES = 64 * 1024
LOG_KEPT_BYTES = 64 << 20
MASK_BYTES = 1 << 20
LAUNCH_BYTES = 1 << 20
KILL_LIMIT_S = 5.0
"""How long a killed process may take to vanish; longer means that it hangs in the kernel."""
SYSTEMCTL_LIMIT_S = 90.0
SIGNAL_PROCESS_GROUP = 1 << 2
"""PIDFD_SIGNAL_PROCESS_GROUP of Linux 6.9: the whole group, and still no number that could be reused."""
NOT_FOR_ENGINES = frozenset(
    {
        *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
        *("CREDENTIALS_DIRECTORY", "DISAGG_TOKEN"),
    }
)
"""What the agent was told by its own supervisor, or what lets a host join: none of an engine's business."""


class EngineProcess:
    """A running engine, watched by pidfd. `start` and `adopt` make one; both want a running event loop.

    Args:
        record: who it is.
        pidfd: of the process; this object closes it.
    """

    def __init__(self, record: EngineRecord, pidfd: int) -> None:
        self._record = record
        self._pidfd: int | None = pidfd
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.code: int | None = None
        self._masked_to = 0
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    async def start(cls, launch: EngineLaunch) -> EngineProcess:
        """Starts it. Its output goes to a file and never into a pipe of ours: a full pipe would stop it, a broken one end it.

        Raises:
            StartError: the command cannot be executed, or its log cannot be written.
        """
        log, log_from = await asyncio.to_thread(_prepare, launch)
        try:
            # Not in a thread: fork and exec hold the interpreter's lock anyway, and PR_SET_PDEATHSIG is bound to the thread.
            child = _spawn(launch, log)
        finally:
            os.close(log)
        return cls(*_identify_child(child, launch, log_from))

    @classmethod
    def adopt(cls, record: EngineRecord) -> EngineProcess | None:
        """Watches an engine that somebody else started; None when that very process is gone.

        Raises:
            StartError: this process has no file descriptor left.
        """
        if record.boot_id != boot_id():
            return None
        pidfd = _open_pidfd(record.pid)
        if pidfd is None:
            return None
        known = _stat(record.pid)  # after the pidfd was opened: from here on the number cannot change hands unnoticed
        if known is None or known.start_ticks != record.start_ticks or known.ended:
            _reap(pidfd)  # nothing, unless it is a dead child of this very process
            os.close(pidfd)
            return None
        return cls(record, pidfd)

    @property
    def id(self) -> EngineId:
        """The engine's id."""
        return self._record.id

    @property
    def pid(self) -> int:
        """Its process on this host."""
        return self._record.pid

    @property
    def alive(self) -> bool:
        """False once its end was seen."""
        return not self._ended.is_set()

    @property
    def ready(self) -> ReadyFile | None:
        """What it said when it became ready, as far as known here."""
        return self._record.ready

    def record(self, *, ready: ReadyFile | None = None) -> EngineRecord:
        """What to keep on disk, mode 0600, for the next agent; what is left out is as it was known."""
        if ready is not None:
            self._record = msgspec.structs.replace(self._record, ready=ready)
        return self._record

    async def wait_ready(self, limit_s: float) -> ReadyFile:
        """Waits until it wrote its ready file; an engine that writes none will be where its launch says.

        Raises:
            StartError: it ended, or was not ready within `limit_s` seconds; the sentence holds the end of its log.
        """
        launch = self._record.launch
        if launch.ready_file is None:
            return ReadyFile(self.pid, launch.url, launch.bootstrap_port)
        try:
            async with asyncio.timeout(limit_s):
                while not launch.ready_file.exists():
                    if not self.alive:
                        raise StartError(f"the engine {self.id} ended with code {self.code} while it started: {self.log_tail()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise StartError(f"the engine {self.id} was not ready after {limit_s:g} s; see {launch.log_file}") from error
        ready = _read_ready(self.id, launch.ready_file)
        self.record(ready=ready)
        return ready

    def log_tail(self) -> str:
        """The last line of its log that says something, without the engine's key."""
        lines = self.log_text().strip().splitlines()
        return lines[-1].strip() if lines else f"its log {self._record.launch.log_file} is empty"

    def log_text(self) -> str:
        """The end of its log, as far as this process wrote it, without the engine's key."""
        launch = self._record.launch
        text = _tail(launch.log_file, self._record.log_from)
        return text.replace(launch.api_key, HIDDEN) if launch.api_key else text

    def mask_key(self) -> int:
        """Overwrites the engine's key where its log shows it; SGLang prints all of its settings. Returns how often that was.

        In place and of the same length: the engine goes on writing into the same file. What was looked at before is not read again.
        """
        launch = self._record.launch
        if not launch.api_key:
            return 0
        found, self._masked_to = _mask(launch.log_file, launch.api_key.encode(), max(self._masked_to, self._record.log_from))
        return found

    async def wait(self) -> int | None:
        """Waits for its end: the exit code, negative for a signal. None when it was adopted: its code is known to init only."""
        await self._ended.wait()
        return self.code

    async def stop(self, limit_s: float) -> bool:
        """SIGTERM, then SIGKILL to its whole group after `limit_s` seconds. False: it hangs in the kernel and is still there."""
        self.terminate()
        return await self._end_within(limit_s)

    def terminate(self) -> None:
        """SIGTERM to the engine alone: it tells its helpers itself, in its own order."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the engine and its helpers."""
        if self._pidfd is not None:
            _kill_group(self._pidfd, self._record)

    def close(self) -> None:
        """Looks away; the engine goes on. A child that ends later is reaped by init once this process is gone."""
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    async def _end_within(self, limit_s: float) -> bool:
        """Waits for the end that was asked for, kills after `limit_s` seconds."""
        for limit in (limit_s, KILL_LIMIT_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self.wait()
                    return True
            self.kill()
        return not self.alive

    def _on_exit(self) -> None:
        assert self._pidfd is not None
        # Helpers without their engine serve nobody and hold its memory. They go before the engine is reaped: its pid, the
        # name of their group, is taken until then.
        _kill_group(self._pidfd, self._record)
        self.code = _reap(self._pidfd)
        self.close()
        self._ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EngineProcess {self.id} pid={self.pid} {'alive' if self.alive else f'code={self.code}'}>"


# --- ways to start


class ChildLauncher:
    """Engines as processes of this one, which they outlive."""

    async def start(self, launch: EngineLaunch) -> EngineProcess:
        """Starts it. Raises StartError."""
        return await EngineProcess.start(launch)

    async def adopt(self, record: EngineRecord) -> EngineProcess | None:
        """The running engine of this record, or None when that very process is gone."""
        return EngineProcess.adopt(record)

    async def stop(self, engine: RunningEngine, limit_s: float) -> bool:
        """SIGTERM, then SIGKILL after `limit_s` seconds."""
        return await engine.stop(limit_s)


class UnitLauncher:
    """Engines as systemd units ``disagg-engine@NAME.service``, which a restart of the agent's own unit leaves alone.

    The unit runs ``disagg engine run NAME``, which reads the launch that the agent wrote before (see `exec_launch`).

    Args:
        user: the units belong to the user's service manager and not to the system's.
    """

    def __init__(self, *, user: bool = False) -> None:
        self._systemctl = ("systemctl", *(["--user"] if user else []))

    async def start(self, launch: EngineLaunch) -> EngineProcess:
        """Starts its unit.

        Raises:
            StartError: systemd refuses, or the engine ended at once.
        """
        unit = unit_name(launch.id)
        if await self._main_pid(unit):
            await self._run("stop", unit)  # what runs there was started for another launch, or nobody knows for which
        log, log_from = await asyncio.to_thread(_prepare, launch)
        os.close(log)  # the unit opens it itself
        await self._run("start", unit)
        return EngineProcess(*await self._identify(unit, launch, log_from))

    async def adopt(self, record: EngineRecord) -> EngineProcess | None:
        """The running engine of this record, or None when that very process is gone."""
        return EngineProcess.adopt(record)

    async def stop(self, engine: RunningEngine, limit_s: float) -> bool:
        """Has systemd stop the unit, so that it is not taken for a crash; SIGKILL after `limit_s` seconds."""
        try:
            await self._run("stop", "--no-block", unit_name(engine.id))
        except StartError:  # systemd is out of order; the process is still here to be ended
            return await engine.stop(limit_s)
        try:
            async with asyncio.timeout(limit_s):
                await engine.wait()
        except TimeoutError:
            return await engine.stop(0.0)
        return True

    async def _identify(self, unit: str, launch: EngineLaunch, log_from: int) -> tuple[EngineRecord, int]:
        pid = await self._main_pid(unit)
        pidfd = _open_pidfd(pid) if pid else None
        known = _stat(pid) if pidfd is not None else None
        # Asked again with the pidfd at hand: had the process ended in between, systemd would no longer name this pid.
        if pidfd is not None and known is not None and await self._main_pid(unit) == pid:
            return _record(launch, pid, known.start_ticks, log_from), pidfd
        if pidfd is not None:
            os.close(pidfd)
        raise StartError(f"the engine {launch.id} ended while it started; see {launch.log_file} and `journalctl -u {unit}`")

    async def _main_pid(self, unit: str) -> int:
        answer = (await self._run("show", "-p", "MainPID", "--value", unit)).strip()
        return int(answer) if answer.isdigit() else 0

    async def _run(self, *arguments: str) -> str:
        what = f"`{' '.join((*self._systemctl, *arguments))}`"
        try:
            process = await asyncio.create_subprocess_exec(
                *self._systemctl,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise StartError(f"{what} cannot be run: {error.strerror}; engines as units need systemd") from error
        try:
            async with asyncio.timeout(SYSTEMCTL_LIMIT_S):
                out, err = await process.communicate()
        except TimeoutError as error:
            raise StartError(f"{what} did not end within {SYSTEMCTL_LIMIT_S:g} s") from error
        finally:
            await _end(process)
        if process.returncode:
            said = err.decode(errors="replace").strip().splitlines()
            raise StartError(f"{what} failed with code {process.returncode}: {said[-1] if said else 'it said nothing'}")
        return out.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def unit_name(engine: EngineId) -> str:
    """The unit of an engine.

    Raises:
        StartError: the name cannot stand in a unit's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.:-]{0,127}", engine):
        raise StartError(f"the engine name {engine!r} cannot name a unit: use letters, digits, '-', '_' and '.'")
    return f"disagg-engine@{engine}.service"


def exec_launch(path: Path) -> NoReturn:
    """Becomes the engine of a launch file: what ``disagg engine run NAME`` does in the engine's unit.

    Raises:
        StartError: the file is missing, is not ours alone (it holds the engine's key), makes no sense, or its command cannot be run.
    """
    launch = read_launch(path)
    log, _ = _open_log(launch)
    own = os.dup(2)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what is ignored stays so in the engine
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        os.execvpe(launch.argv[0], launch.argv, environment(launch))  # noqa: S606  # the whole point, and no shell
    except OSError as error:
        os.dup2(own, 2)  # this is for the journal, where people look for a unit's failure
        raise _cannot_start(launch, error) from error


def read_launch(path: Path) -> EngineLaunch:
    """A launch file, mode 0600 and owned by this user.

    Raises:
        StartError: it is missing, others may read or write it, or it makes no sense.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StartError(
            f"the launch file {path} cannot be read: {error.strerror}; the agent writes it before it starts the unit"
        ) from error
    with open(file, "rb") as content:  # noqa: PTH123  # the open descriptor is what was checked
        _refuse_loose(path, os.fstat(file))
        try:
            launch = decode_kept(content.read(LAUNCH_BYTES), EngineLaunch)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StartError(f"the launch file {path} makes no sense: {error}; let the agent write it anew") from error
    if not launch.argv:
        raise StartError(f"the launch file {path} names no command: argv is empty")
    return launch


def _refuse_loose(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise StartError(f"the launch file {path} is not a plain file")
    if found.st_uid != os.geteuid():
        raise StartError(f"the launch file {path} belongs to user {found.st_uid}, not to {os.geteuid()} who is to run it")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise StartError(f"the launch file {path} has mode {mode:04o} and holds a key: nobody else may read it, make it 0600")


def environment(launch: EngineLaunch) -> dict[str, str]:
    """This process's environment without what is meant for the agent alone, and with the launch's own."""
    return {name: value for name, value in os.environ.items() if name not in NOT_FOR_ENGINES} | launch.env


# --- spawning


def _prepare(launch: EngineLaunch) -> tuple[int, int]:
    """Opens the log and forgets what an earlier life said. Returns the log's descriptor, and where this life begins in it."""
    try:
        if launch.ready_file is not None:
            launch.ready_file.unlink(missing_ok=True)
    except OSError as error:
        raise StartError(f"the engine {launch.id} cannot be started: {launch.ready_file}: {error.strerror}") from error
    return _open_log(launch)


def _open_log(launch: EngineLaunch) -> tuple[int, int]:
    """Readable by this user alone: engines print settings. A long one of earlier lives is put aside, one of them is kept."""
    try:
        path = launch.log_file
        if path.exists() and path.stat().st_size > LOG_KEPT_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return log, os.fstat(log).st_size
    except OSError as error:
        raise StartError(f"the engine {launch.id} cannot be started: its log {launch.log_file}: {error.strerror}") from error


def _spawn(launch: EngineLaunch, log: int) -> int:
    try:
        child = subprocess.Popen(  # noqa: S603  # the command is the operator's own
            launch.argv,
            env=environment(launch),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            close_fds=True,
            start_new_session=True,  # a ctrl-C in the terminal is ours to pass on, in order; and the group is all ours to kill
        )
    except OSError as error:
        raise _cannot_start(launch, error) from error
    child.returncode = 0  # reaping is ours, by pidfd: this object must neither do it nor warn that it did not
    return child.pid


def _cannot_start(launch: EngineLaunch, error: OSError) -> StartError:
    return StartError(f"the engine {launch.id} cannot be started: {launch.argv[0]}: {error.strerror}")


def _identify_child(pid: int, launch: EngineLaunch, log_from: int) -> tuple[EngineRecord, int]:
    """Nobody else reaps our child, so its number is its own until we do."""
    try:
        pidfd = os.pidfd_open(pid)
        known = _stat(pid)
        assert known is not None
    except OSError as error:  # too many open files: what cannot be watched must not run
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise StartError(f"the engine {launch.id} cannot be watched: {error.strerror}") from error
    return _record(launch, pid, known.start_ticks, log_from), pidfd


def _record(launch: EngineLaunch, pid: int, start_ticks: int, log_from: int) -> EngineRecord:
    return EngineRecord(launch, launch.role, pid, start_ticks, boot_id(), log_from)


# --- processes by pidfd


class _Stat(NamedTuple):
    """What /proc/PID/stat says.

    Attributes:
        ended: a zombie: it only waits to be reaped.
    """

    start_ticks: int
    ended: bool


def boot_id() -> str:
    """The kernel's id of this boot: after the next one the same pid and start time may be somebody else."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses, and a command may hold anything, parentheses and spaces too.
    fields = text[text.rindex(b")") + 2 :].split()
    return _Stat(int(fields[19]), fields[0] in {b"Z", b"X"})


def _open_pidfd(pid: int) -> int | None:
    """None when there is no such process (or the number is that of a thread).

    Raises:
        StartError: there is no file descriptor left.
    """
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise StartError(f"the process {pid} cannot be watched: {error.strerror}") from error


def _reap(pidfd: int) -> int | None:
    """The exit code of our child, negative for a signal; None when it is not our child."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _kill_group(pidfd: int, record: EngineRecord) -> None:
    """SIGKILL to the engine's process group, even when only its helpers are left."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL, None, SIGNAL_PROCESS_GROUP)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left, or nobody whom we may signal
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _kill_group_by_number(record)  # a kernel before 6.9


def _kill_group_by_number(record: EngineRecord) -> None:
    """The same, by number: only while that number is this engine's.

    It is when the process is the one that we know, and when there is none: the kernel gives a number to nobody as long as it names a group.
    """
    known = _stat(record.pid)
    if known is None or known.start_ticks == record.start_ticks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(record.pid, signal.SIGKILL)


# --- files


def _read_ready(engine: EngineId, path: Path) -> ReadyFile:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReadyFile)
    except (OSError, msgspec.DecodeError) as error:
        raise StartError(f"the engine {engine} wrote a ready file that cannot be used, {path}: {error}") from error


def _tail(path: Path, start: int) -> str:
    """The end of a file, but nothing of what stands before `start`."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _mask(path: Path, secret: bytes, start: int) -> tuple[int, int]:
    """Overwrites a secret in a file from `start` on. Returns how often it was found, and from where to look the next time."""
    found = 0
    try:
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            while chunk := file.read(MASK_BYTES):
                at = chunk.find(secret)
                while at >= 0:
                    os.pwrite(file.fileno(), b"*" * len(secret), start + at)
                    found += 1
                    at = chunk.find(secret, at + len(secret))
                if len(chunk) < MASK_BYTES:
                    return found, start + max(0, len(chunk) - len(secret))
                start += len(chunk) - len(secret)  # it may lie across two of these
                file.seek(start)
    except OSError:
        pass  # the log is gone; the next look finds what is there then
    return found, start
