"""F35: a second signal, and a stop while something starts: out within 2 s, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.serve.conftest import Process, Site, is_engine, wait_for
from tests.serve.streams import Answer

pytestmark = pytest.mark.slow

BOUND_S = 2.0
SLACK_S = 1.0
"""For a machine on which others want the processor too; what is measured against is 10 s and more."""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
"""An engine that hears no SIGTERM while it loads its model."""


def left_of(folder: Path) -> list[int]:
    """Processes that have something to do with this folder: whatever a command of it started, and has left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in said:
                found.append(int(entry.name))
    return found


def ends_soon(process: Process, numbers: tuple[signal.Signals, ...], bound_s: float = BOUND_S) -> None:
    """The last of these signals ends it within the bound, and with a clean exit."""
    for number in numbers[:-1]:
        process.process.send_signal(number)
        wait_for(lambda: "once more" in process.said(), process.said)
    process.process.send_signal(numbers[-1])
    began = time.monotonic()
    assert process.process.wait(30) == 0, process.said()
    assert time.monotonic() - began < bound_s + SLACK_S, process.said()
    assert "Traceback" not in process.said()


TWICE = (signal.SIGTERM, signal.SIGTERM)
TWO_INTERRUPTS = (signal.SIGINT, signal.SIGINT)


@pytest.mark.parametrize("numbers", [TWICE, TWO_INTERRUPTS], ids=["SIGTERM", "SIGINT"])
def test_a_router_with_a_stream_ends_at_the_second_signal(site: Site, numbers: tuple[signal.Signals, ...]) -> None:
    site.start_host("u", "unified", "--engine-arg=--paced", "--engine-arg=1,0;40,0")
    site.wait_engine("u", "ready")
    answer = Answer(site.url, "go on", 1000)
    wait_for(lambda: bool(answer.text), lambda: answer.error)
    assert site.router is not None
    ends_soon(site.router, numbers)
    answer.join(10)
    assert "shutting down" in answer.error, "it was told, and not just cut"


def test_a_second_signal_hastens_an_engine_that_is_being_stopped(site: Site) -> None:
    """It comes when the drain is over and the engine does not hear its SIGTERM: a minute would be left to it."""
    impatient = ("-c", "from disagg import host, cli; host.MOVE_S = 0.0; cli.main()")
    site.start_host("u", "unified", "--stop-timeout-s", "60", "--drain-timeout-s", "0.1", program=impatient)
    pid = site.wait_engine("u", "ready")["pid"]
    site.hosts["u"].process.send_signal(signal.SIGTERM)
    os.kill(pid, signal.SIGSTOP)  # deaf from here on
    wait_for(lambda: has_pending_sigterm(pid), site.hosts["u"].said)
    ends_soon(site.hosts["u"], (signal.SIGTERM,))
    assert not is_engine(pid)


def has_pending_sigterm(pid: int) -> bool:
    """Its agent has sent the SIGTERM, which waits in the stopped process."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next((line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")), "0")
    return bool(int(pending, 16) & (1 << (signal.SIGTERM - 1)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_host_that_is_stopped_while_its_engine_starts_leaves_nobody(site: Site, number: signal.Signals) -> None:
    fake = site.folder / "python"
    fake.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{DEAF}' \"$@\"\n")
    fake.chmod(0o755)
    host = site.start_host(
        "u", "unified", program=("-c", f"import sys; from disagg import cli; sys.executable = {str(fake)!r}; cli.main()")
    )
    wait_for(lambda: bool(left_of(fake)) and site.engine("u")["state"] == "starting", host.said)
    ends_soon(host, (number,))
    assert left_of(fake) == []


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.8, 1.3, 1.8])
def test_up_that_is_stopped_at_any_moment_of_its_start_leaves_nobody(after_s: float, tmp_path: Path) -> None:
    """Before its first line Python itself ends it, by the signal."""
    command = [sys.executable, "-m", "disagg", "up", "--http", f"127.0.0.1:{free_port()}", "--admin", f"127.0.0.1:{free_port()}"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=out, stderr=out)
    try:
        time.sleep(after_s)
        process.terminate()
        began = time.monotonic()
        code = process.wait(30)
        assert time.monotonic() - began < BOUND_S + SLACK_S, log.read_text()
    finally:
        process.kill()
    assert code == (0 if "Stopping" in log.read_text() else -signal.SIGTERM), log.read_text()
    wait_for(lambda: left_of(tmp_path) == [], lambda: str(left_of(tmp_path)), 5)
    assert not list(tmp_path.glob("disagg-up-*")) or code != 0
