"""An engine outlives a killed agent, the next one finds it and notices its death; and the same as systemd units."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import msgspec
import pytest

from disagg.engines.base import EngineLaunch, EngineRecord, Launcher, decode_kept, encode_kept
from disagg.engines.process import EngineProcess, UnitLauncher, _stat, boot_id, read_launch
from disagg.errors import StartError
from disagg.model import EngineId, Role
from tests.engines import DEMO_MODEL
from tests.engines_process.conftest import Make, gone, wait_until

NOTICED_WITHIN_S = 0.5


def embedded(folder: Path) -> EngineLaunch:
    argv = [sys.executable, "-m", "disagg.engines.embedded", "--model-path", str(DEMO_MODEL), "--served-model-name", "demo"]
    argv += ["--host", "127.0.0.1", "--port", "0", "--disaggregation-bootstrap-port", "0", "--ready-file", str(folder / "ready.json")]
    env = {"DISAGG_ENGINE_API_KEY": "k"}
    return EngineLaunch(EngineId("unified-0"), Role.UNIFIED, tuple(argv), env, folder / "log", folder / "ready.json", api_key="k")


def start_by_another(folder: Path, kill_afterwards: list[int]) -> EngineRecord:
    """An agent in a process of its own starts an engine and is killed."""
    (folder / "launch.json").write_bytes(encode_kept(embedded(folder)))
    agent = subprocess.Popen([sys.executable, "-m", "tests.engines_process.starter", str(folder)], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: (folder / "record.json").exists() or agent.poll() is not None, 40.0)
        record = decode_kept((folder / "record.json").read_bytes(), EngineRecord)
        kill_afterwards.append(record.pid)
    finally:
        agent.kill()
        agent.wait()
    return record


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def serves(record: EngineRecord) -> bool:
    assert record.ready is not None
    key = {"Authorization": f"Bearer {record.launch.api_key}"}
    return httpx2.get(record.ready.url + "/v1/models", headers=key).status_code == 200


def has_open(record: EngineRecord, name: str) -> bool:
    """Whether the engine has a file of that name open. A connection may close while the list is read."""
    for file in Path(f"/proc/{record.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if file.readlink().name == name:
                return True
    return False


async def test_an_engine_survives_its_agent_and_the_next_one_adopts_it(tmp_path: Path, kill_afterwards: list[int]) -> None:
    record = await asyncio.to_thread(start_by_another, tmp_path, kill_afterwards)
    assert await asyncio.to_thread(serves, record), "after kill -9 of the agent"
    assert not await asyncio.to_thread(has_open, record, "secret")
    assert EngineProcess.adopt(msgspec.structs.replace(record, start_ticks=record.start_ticks + 1)) is None
    engine = EngineProcess.adopt(record)
    assert engine is not None
    assert engine.ready == record.ready
    assert engine.record() == record
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(engine.wait())
        await asyncio.sleep(0)
        os.kill(record.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        assert await waiting is None, "its code is known to init only"
        assert time.monotonic() - killed_at < NOTICED_WITHIN_S
    assert not engine.alive
    assert EngineProcess.adopt(record) is None


async def test_an_adopted_engine_is_stopped_cleanly(tmp_path: Path, kill_afterwards: list[int]) -> None:
    record = await asyncio.to_thread(start_by_another, tmp_path, kill_afterwards)
    engine = EngineProcess.adopt(record)
    assert engine is not None
    assert await engine.stop(10.0) is True
    assert gone(record.pid)
    assert "stopping: 0 samples run" in record.launch.log_file.read_text()


ORPHAN = """
import subprocess, sys
helper = "import subprocess, sys, time; h = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
helper += "; print(h.pid, flush=True); time.sleep(600)"
engine = subprocess.Popen([sys.executable, "-c", helper], start_new_session=True, stdout=open(sys.argv[1], "wb"), stderr=subprocess.STDOUT)
print(engine.pid)
engine.returncode = 0
"""


async def test_the_helpers_of_an_adopted_engine_go_with_it(tmp_path: Path, kill_afterwards: list[int]) -> None:
    log = tmp_path / "log"
    made = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", ORPHAN, str(log)], capture_output=True, check=True)
    pid = int(made.stdout)
    kill_afterwards.append(pid)
    await asyncio.to_thread(wait_until, lambda: log.exists() and log.read_bytes().endswith(b"\n"))
    helper = int(await asyncio.to_thread(log.read_text))
    kill_afterwards.append(helper)
    known = _stat(pid)
    assert known is not None
    record = EngineRecord(EngineLaunch(EngineId("e"), Role.DECODE, (), {}, log), Role.DECODE, pid, known.start_ticks, boot_id())
    engine = EngineProcess.adopt(record)
    assert engine is not None
    os.kill(pid, signal.SIGKILL)
    assert await engine.wait() is None
    await asyncio.to_thread(wait_until, lambda: gone(helper))


# --- units

SYSTEMCTL = """#!{python}
'''Does for one unit what systemd does: a session of its own, the command of the unit, its main pid.'''
import os, pathlib, signal, subprocess, sys
here = pathlib.Path({here!r})
words = [w for w in sys.argv[1:] if w != "--user"]
with (here / "calls").open("a") as calls:
    calls.write(" ".join(words) + "\\n")
main = here / "main-pid"
unit = words[-1]
if (here / "broken").exists():
    sys.exit("Failed to connect to bus: No such file or directory")
if words[0] == "show":
    print(main.read_text() if main.exists() and os.path.exists("/proc/" + main.read_text()) else 0)
elif words[0] == "start":
    program = "from pathlib import Path; from disagg.engines.process import exec_launch\\n" \\
        "from disagg.errors import StartError; import sys\\n" \\
        "try: exec_launch(Path(sys.argv[1]))\\nexcept StartError as error: sys.exit(str(error))"
    with open(here / "log", "ab") as log:
        child = subprocess.Popen([sys.executable, "-c", program, str(here / "launch.json")], start_new_session=True,
                                 stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    main.write_text(str(child.pid))
    child.returncode = 0
    os.environ.get("DIES") and os.waitpid(child.pid, 0)
elif words[0] == "stop" and main.exists() and os.path.exists("/proc/" + main.read_text()):
    os.kill(int(main.read_text()), signal.SIGTERM)
"""


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `systemctl` that comes first on PATH, and whose one unit runs the folder's launch.json."""
    script = tmp_path / "bin" / "systemctl"
    script.parent.mkdir()
    script.write_text(SYSTEMCTL.format(python=sys.executable, here=str(tmp_path)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return tmp_path


def write_launch(folder: Path, launch: EngineLaunch) -> Path:
    path = folder / "launch.json"
    path.write_bytes(encode_kept(launch))
    path.chmod(0o600)
    return path


SLEEPER = "import os, time; print('key', os.environ['KEY'], flush=True); time.sleep(600)"


async def test_a_unit_is_started_watched_and_stopped(units: Path, make: Make, kill_afterwards: list[int]) -> None:
    launch = make(SLEEPER, env={"KEY": "k"}, api_key="k")
    write_launch(units, launch)
    launcher: Launcher = UnitLauncher()
    engine = await launcher.start(launch)
    kill_afterwards.append(engine.pid)
    await asyncio.to_thread(wait_until, lambda: "key k" in launch.log_file.read_text())
    assert "time.sleep" in command_of(engine.pid), "the engine itself, not what started it"
    again = await launcher.adopt(engine.record())
    assert again is not None
    again.close()
    assert await launcher.stop(engine, 10.0) is True
    assert not engine.alive
    calls = (units / "calls").read_text().splitlines()
    assert calls[1] == "start disagg-engine@decode-0.service"
    assert calls[-1] == "stop --no-block disagg-engine@decode-0.service"


async def test_what_runs_in_the_unit_already_is_ended_first(units: Path, make: Make, kill_afterwards: list[int]) -> None:
    launch = make(SLEEPER, env={"KEY": "k"})
    write_launch(units, launch)
    first = await UnitLauncher().start(launch)
    second = await UnitLauncher().start(launch)
    kill_afterwards += [first.pid, second.pid]
    async with asyncio.timeout(5.0):
        await first.wait()
    assert second.alive
    second.kill()
    await second.wait()


async def test_a_unit_that_does_not_hear_sigterm_is_killed(units: Path, make: Make, kill_afterwards: list[int]) -> None:
    launch = make("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)")
    write_launch(units, launch)
    engine = await UnitLauncher(user=True).start(launch)
    kill_afterwards.append(engine.pid)
    await asyncio.to_thread(wait_until, lambda: "deaf" in launch.log_file.read_text())
    assert await UnitLauncher(user=True).stop(engine, 0.1) is True
    assert gone(engine.pid)


async def test_without_a_bus_the_engine_is_ended_all_the_same(units: Path, make: Make, kill_afterwards: list[int]) -> None:
    launch = make(SLEEPER, env={"KEY": "k"})
    write_launch(units, launch)
    engine = await UnitLauncher().start(launch)
    kill_afterwards.append(engine.pid)
    (units / "broken").touch()
    assert await UnitLauncher().stop(engine, 5.0) is True
    with pytest.raises(StartError, match=r"`systemctl show .*` failed with code 1: Failed to connect to bus"):
        await UnitLauncher().start(launch)


async def test_a_unit_whose_engine_ends_at_once_is_one_sentence(units: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIES", "1")
    write_launch(units, make("raise SystemExit(1)"))
    with pytest.raises(StartError, match=r"journalctl -u disagg-engine@decode-0\.service"):
        await UnitLauncher().start(make("raise SystemExit(1)"))


async def test_no_systemd_is_one_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(StartError, match="cannot be run: No such file or directory; engines as units need systemd"):
        await UnitLauncher().start(make(SLEEPER))


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "ä", "x" * 200])
async def test_a_name_that_cannot_name_a_unit(make: Make, name: str) -> None:
    with pytest.raises(StartError, match="cannot name a unit"):
        await UnitLauncher().start(make(SLEEPER, name=name))


# --- launch files


def test_a_launch_file_is_read_when_it_is_ours_alone(make: Make, tmp_path: Path) -> None:
    launch = make(SLEEPER, env={"KEY": "k"}, api_key="k")
    path = write_launch(tmp_path, launch)
    assert read_launch(path) == launch
    for mode in (0o640, 0o604, 0o660, 0o666, 0o601):
        path.chmod(mode)
        with pytest.raises(StartError, match=f"mode {mode:04o} .* make it 0600"):
            read_launch(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage", b"\xff", b'{"id": 5}', b'{"id":"e","role":"decode","argv":[],"env":{}}'])
def test_a_launch_file_that_makes_no_sense(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "launch.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StartError, match="makes no sense"):
        read_launch(path)


def test_a_launch_file_without_a_command(tmp_path: Path, make: Make) -> None:
    path = write_launch(tmp_path, msgspec.structs.replace(make(""), argv=()))
    with pytest.raises(StartError, match="argv is empty"):
        read_launch(path)


def test_a_launch_file_that_is_missing_a_link_or_a_pipe(tmp_path: Path, make: Make) -> None:
    real = write_launch(tmp_path, make(""))
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(real)
    os.mkfifo(pipe, 0o600)
    for path, words in ((tmp_path / "none", "No such file"), (link, "symbolic link"), (pipe, "not a plain file")):
        with pytest.raises(StartError, match=words):
            read_launch(path)


def test_a_launch_file_of_another_user(tmp_path: Path, make: Make) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = write_launch(tmp_path, make(""))
    os.chown(path, 65534, 65534)
    with pytest.raises(StartError, match="belongs to user 65534"):
        read_launch(path)


def test_a_launch_whose_command_does_not_exist(tmp_path: Path, make: Make) -> None:
    path = write_launch(tmp_path, msgspec.structs.replace(make(""), argv=("/nonexistent/engine",)))
    program = "import sys; from pathlib import Path; from disagg.engines.process import exec_launch; exec_launch(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert "StartError: the engine decode-0 cannot be started: /nonexistent/engine: No such file or directory" in done.stderr


def test_the_engine_of_a_launch_file_gets_sigpipe_as_usual(tmp_path: Path, make: Make) -> None:
    path = write_launch(tmp_path, msgspec.structs.replace(make(""), argv=("grep", "SigIgn", "/proc/self/status")))
    program = "import sys; from pathlib import Path; from disagg.engines.process import exec_launch; exec_launch(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    ignored = int((tmp_path / "log").read_text().split()[1], 16)
    assert not ignored & 1 << (signal.SIGPIPE - 1)
