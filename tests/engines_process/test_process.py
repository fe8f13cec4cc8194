"""Processes as engines: start, watch, signal, end; real ones, and none is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import stat
import sys
import time
from pathlib import Path

import msgspec
import pytest

from disagg.engines.base import EngineLaunch, EngineRecord, Launcher, ReadyFile, RunningEngine, decode_kept, encode_kept
from disagg.engines.process import ChildLauncher, EngineProcess, UnitLauncher, _kill_group_by_number, boot_id
from disagg.errors import StartError
from disagg.model import EngineId, Role
from tests.engines_process.conftest import Make, gone, state, wait_until

FOREVER = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
WITH_HELPER = """
import subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(helper.pid, flush=True)
time.sleep(600)
"""
NOTICED_WITHIN_S = 0.5
LAUNCHERS: list[Launcher] = [ChildLauncher(), UnitLauncher()]


def log(launch: EngineLaunch) -> str:
    return launch.log_file.read_text() if launch.log_file.exists() else ""


def open_files(pid: int) -> dict[str, Path]:
    return {p.name: p.readlink() for p in Path(f"/proc/{pid}/fd").iterdir()}


async def test_its_exit_code_is_told_and_it_is_reaped(make: Make) -> None:
    engine = await EngineProcess.start(make("raise SystemExit(137)"))
    assert await engine.wait() == 137
    assert not engine.alive
    assert state(engine.pid) == ""
    assert await engine.wait() == 137
    assert "code=137" in repr(engine)


async def test_a_signal_is_a_negative_code_and_is_noticed_at_once(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    killed_at = time.monotonic()
    os.kill(engine.pid, signal.SIGKILL)
    assert await engine.wait() == -9
    assert time.monotonic() - killed_at < NOTICED_WITHIN_S


async def test_many_waiters_hear_of_the_same_end(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    async with asyncio.TaskGroup() as group:
        waits = [group.create_task(engine.wait()) for _ in range(5)]
        await asyncio.sleep(0)
        engine.kill()
    assert [w.result() for w in waits] == [-9] * 5


async def test_the_loops_own_children_and_ours_do_not_disturb_each_other(make: Make) -> None:
    """uvloop handles SIGCHLD for what it spawned itself."""
    engines = [await EngineProcess.start(make(f"import time; time.sleep(0.2); raise SystemExit({n})", name=f"e-{n}")) for n in range(5)]
    others = [await asyncio.create_subprocess_exec(sys.executable, "-c", f"raise SystemExit({n + 20})") for n in range(5)]
    assert [await o.wait() for o in others] == [20, 21, 22, 23, 24]
    assert [await e.wait() for e in engines] == [0, 1, 2, 3, 4]


async def test_stop_is_sigterm_first(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    assert await engine.stop(10.0) is True
    assert await engine.wait() == -signal.SIGTERM
    engine.terminate()  # to a process that is gone: nothing
    engine.kill()
    assert await engine.stop(0.1) is True


async def test_what_does_not_hear_sigterm_is_killed(make: Make) -> None:
    launch = make(DEAF)
    engine = await EngineProcess.start(launch)
    await asyncio.to_thread(wait_until, lambda: "deaf" in log(launch))
    assert await engine.stop(0.05) is True
    assert await engine.wait() == -9


async def test_a_stopped_process_is_ended_too(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    os.kill(engine.pid, signal.SIGSTOP)
    assert await engine.stop(0.05) is True
    assert await engine.wait() in {-9, -15}  # the kill wakes it, and SIGTERM waits there


@pytest.mark.parametrize("way", ["kill", "the leader dies", "by number"])
async def test_helpers_go_with_their_engine(make: Make, way: str, kill_afterwards: list[int]) -> None:
    launch = make(WITH_HELPER)
    engine = await EngineProcess.start(launch)
    await asyncio.to_thread(wait_until, lambda: log(launch).endswith("\n"))
    helper = int(log(launch))
    kill_afterwards.append(helper)
    if way == "kill":
        engine.kill()
    elif way == "by number":
        _kill_group_by_number(engine.record())
    else:
        os.kill(engine.pid, signal.SIGKILL)
    await engine.wait()
    await asyncio.to_thread(wait_until, lambda: gone(helper))


async def test_a_group_whose_number_belongs_to_another_process_is_left_alone(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    record = engine.record()
    _kill_group_by_number(msgspec.structs.replace(record, start_ticks=record.start_ticks - 1))
    await asyncio.sleep(0.1)
    assert engine.alive
    await engine.stop(5.0)


async def test_nothing_of_it_hangs_on_us(make: Make) -> None:
    leaked, other = os.pipe()
    os.set_inheritable(leaked, True)
    launch = make("import time; print('up', flush=True); time.sleep(600)")
    engine = await EngineProcess.start(launch)
    await asyncio.to_thread(wait_until, lambda: log(launch))  # Python opens files while it starts
    try:
        fds = open_files(engine.pid)
        assert fds == {"0": Path("/dev/null"), "1": launch.log_file, "2": launch.log_file}
        assert stat.S_IMODE(launch.log_file.stat().st_mode) == 0o600
        assert (os.getsid(engine.pid), os.getpgid(engine.pid)) == (engine.pid, engine.pid)
    finally:
        os.close(leaked)
        os.close(other)
        await engine.stop(5.0)


async def test_its_output_is_appended(make: Make) -> None:
    launch = make("import sys; print('to stdout', flush=True); print('to stderr', file=sys.stderr)")
    for _ in range(2):
        await (await EngineProcess.start(launch)).wait()
    assert log(launch).split("\n") == ["to stdout", "to stderr"] * 2 + [""]


async def test_what_the_agent_was_told_is_none_of_its_business(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/somewhere")
    monkeypatch.setenv("DISAGG_TOKEN", "secret")
    monkeypatch.setenv("PASSED_ON", "yes")
    program = (
        "import os; print(os.environ.get('NOTIFY_SOCKET'), os.environ.get('DISAGG_TOKEN'), os.environ['PASSED_ON'], os.environ['OWN'])"
    )
    launch = make(program, env={"OWN": "value"})
    await (await EngineProcess.start(launch)).wait()
    assert log(launch) == "None None yes value\n"


async def test_a_command_that_does_not_exist_is_one_sentence(make: Make, tmp_path: Path) -> None:
    launch = EngineLaunch(EngineId("e"), Role.PREFILL, ("/nonexistent/engine",), {}, tmp_path / "log", tmp_path / "ready")
    with pytest.raises(StartError, match=r"engine e cannot be started: /nonexistent/engine: No such file"):
        await EngineProcess.start(launch)


async def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    launch = EngineLaunch(EngineId("e"), Role.PREFILL, ("true",), {}, tmp_path / "no folder" / "log")
    with pytest.raises(StartError, match=r"its log .*no folder.*No such file"):
        await EngineProcess.start(launch)


# --- ready


async def test_ready_is_what_it_wrote_in_this_life(make: Make) -> None:
    said = {"pid": 5, "url": "http://127.0.0.1:9"}
    launch = make(f"import json, os, time; time.sleep(0.2); open(os.environ['READY'], 'w').write(json.dumps({said})); time.sleep(600)")
    launch = msgspec.structs.replace(launch, env={"READY": str(launch.ready_file)})
    assert launch.ready_file is not None
    launch.ready_file.write_text('{"pid": 1, "url": "http://127.0.0.1:1"}')
    engine = await EngineProcess.start(launch)
    ready = await engine.wait_ready(10.0)
    assert ready == ReadyFile(5, "http://127.0.0.1:9")
    assert engine.record().ready == engine.ready == ready
    await engine.stop(5.0)


async def test_an_end_before_ready_is_told_with_the_last_line_of_its_log(make: Make) -> None:
    engine = await EngineProcess.start(make("import sys; sys.exit('no such model')"))
    with pytest.raises(StartError, match="ended with code 1 while it started: no such model"):
        await engine.wait_ready(10.0)


async def test_not_ready_in_time(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    with pytest.raises(StartError, match=r"not ready after 0\.1 s"):
        await engine.wait_ready(0.1)
    await engine.stop(5.0)


async def test_a_ready_file_of_garbage_is_one_sentence(make: Make) -> None:
    launch = make(FOREVER)
    engine = await EngineProcess.start(launch)
    assert launch.ready_file is not None
    launch.ready_file.write_text("garbage")
    with pytest.raises(StartError, match="ready file that cannot be used"):
        await engine.wait_ready(5.0)
    await engine.stop(5.0)


async def test_its_key_is_shown_nowhere(make: Make) -> None:
    launch = make("import os; print('started with', os.environ['KEY'])", env={"KEY": "top-secret"}, api_key="top-secret")
    engine = await EngineProcess.start(launch)
    await engine.wait()
    assert engine.log_tail() == "started with ***"
    assert "top-secret" not in f"{engine!r} {launch!r} {engine.record()!r}"
    assert engine.record().launch.api_key == "top-secret"


async def test_a_key_that_the_engine_prints_is_overwritten_in_its_log(make: Make) -> None:
    program = "import os; print('x' * (1 << 20) + 'api_key=' + os.environ['KEY'], flush=True); print('goes on')"
    launch = make(program, env={"KEY": "top-secret"}, api_key="top-secret")
    launch.log_file.write_text("an earlier life\n")
    engine = await EngineProcess.start(launch)
    await engine.wait()
    assert engine.mask_key() == 1
    assert engine.mask_key() == 0
    text = launch.log_file.read_text()
    assert text.startswith("an earlier life\nx")
    assert text.endswith("api_key=**********\ngoes on\n")


async def test_only_the_present_life_speaks_in_its_log(make: Make) -> None:
    launch = make("print('out of memory')")
    engine = await EngineProcess.start(launch)
    await engine.wait()
    again = await EngineProcess.start(msgspec.structs.replace(launch, argv=(sys.executable, "-c", "pass")))
    await again.wait()
    assert "is empty" in again.log_tail()
    assert again.log_text() == ""


async def test_a_long_log_is_put_aside_at_the_next_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.engines.process.LOG_KEPT_BYTES", 10)
    launch = make("print('a line that is long')")
    for _ in range(3):
        await (await EngineProcess.start(launch)).wait()
    assert launch.log_file.read_text() == launch.log_file.with_name("log.1").read_text() == "a line that is long\n"


async def test_an_engine_without_a_ready_file_is_where_its_launch_says(make: Make) -> None:
    launch = msgspec.structs.replace(make(FOREVER), ready_file=None, url="http://127.0.0.1:9", bootstrap_port=8)
    engine = await EngineProcess.start(launch)
    assert await engine.wait_ready(0.0) == ReadyFile(engine.pid, "http://127.0.0.1:9", 8)
    await engine.stop(5.0)


# --- looking away, and adoption


async def test_an_engine_whose_watcher_goes_away_lives_on_without_a_warning(make: Make, kill_afterwards: list[int]) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    pid, record = engine.pid, engine.record()
    kill_afterwards.append(pid)
    engine.close()
    del engine
    gc.collect()  # warnings are errors here
    assert state(pid) == "S"
    with EngineProcess.adopt(record) or pytest.fail("not adopted") as again:
        again.kill()
        assert await again.wait() == -9  # still our own child


async def test_a_reused_pid_is_not_adopted(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    record = engine.record()
    replace = msgspec.structs.replace
    assert EngineProcess.adopt(replace(record, start_ticks=record.start_ticks + 1)) is None
    assert EngineProcess.adopt(replace(record, boot_id="another boot")) is None
    assert EngineProcess.adopt(replace(record, pid=2**22 + 1)) is None
    assert EngineProcess.adopt(replace(record, pid=2**70)) is None
    assert engine.alive
    await engine.stop(5.0)
    assert EngineProcess.adopt(record) is None


async def test_a_zombie_is_not_alive(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER))
    record = engine.record()
    engine.close()
    os.kill(record.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: state(record.pid) == "Z")
    assert EngineProcess.adopt(record) is None


async def test_a_command_with_parentheses_and_spaces_in_its_name_is_known_again(tmp_path: Path) -> None:
    odd = tmp_path / "a) R (b"
    odd.symlink_to(sys.executable)
    launch = EngineLaunch(EngineId("e"), Role.DECODE, (str(odd), "-c", FOREVER), {}, tmp_path / "log", tmp_path / "ready")
    engine = await EngineProcess.start(launch)
    await asyncio.to_thread(wait_until, lambda: "(a) R (b)" in Path(f"/proc/{engine.pid}/stat").read_text())
    with EngineProcess.adopt(engine.record()) or pytest.fail("not adopted"):
        pass
    await engine.stop(5.0)


async def test_a_record_survives_its_file(make: Make) -> None:
    engine = await EngineProcess.start(make(FOREVER, api_key="k"))
    record = engine.record(ready=ReadyFile(engine.pid, "http://[::1]:80", 90))
    assert record.boot_id == boot_id()
    again = decode_kept(encode_kept(record), EngineRecord)
    assert again == record
    assert again.ready is not None
    address = again.ready.address(again)
    assert (address.host, address.port, address.bootstrap_port, address.api_key) == ("::1", 80, 90, "k")
    await engine.stop(5.0)


async def test_a_child_launcher_starts_adopts_and_stops(make: Make) -> None:
    launcher: Launcher = ChildLauncher()
    engine = await launcher.start(make(FOREVER))
    again: RunningEngine | None = await launcher.adopt(engine.record())
    assert again is not None
    assert await launcher.stop(again, 5.0) is True
    assert await engine.wait() in {-15, None}  # one of the two reaped it
