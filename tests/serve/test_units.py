"""Engines as systemd units. systemd itself does not run here; a script of its name starts a unit's command as systemd would."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import Site, is_engine, wait_for

pytestmark = pytest.mark.slow

SYSTEMCTL = """#!/bin/bash
# start, stop and show of one template unit, with a pid file each: what the agent asks of systemd.
set -u
verb=$1; shift
for unit in "$@"; do :; done
name=${{unit#disagg-engine@}}; name=${{name%.service}}
pids={folder}/$name.pid
echo "$verb $unit" >> {folder}/calls
alive() {{ [ -s "$pids" ] && kill -0 "$(cat "$pids")" 2>/dev/null; }}
case $verb in
    start)
        for fd in $(ls /proc/self/fd); do [ "$fd" -gt 2 ] && eval "exec $fd>&-"; done  # systemd's units inherit nothing from systemctl
        setsid {python} -m disagg engine run "$name" --state-dir {state} < /dev/null >> {folder}/$name.log 2>&1 &
        echo $! > "$pids" ;;
    stop) if alive; then kill "$(cat "$pids")"; fi; rm -f "$pids" ;;
    show) if alive; then cat "$pids"; else echo 0; fi ;;
esac
"""


@pytest.fixture
def units(site: Site, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of an agent that finds this systemctl first."""
    folder = tmp_path / "units"
    folder.mkdir()
    script = folder / "systemctl"
    script.write_text(SYSTEMCTL.format(folder=folder, python=sys.executable, state=tmp_path / "u"))
    script.chmod(0o755)
    yield {"PATH": f"{folder}:{os.environ['PATH']}"}
    for file in folder.glob("*.pid"):
        pid = int(file.read_text())
        if is_engine(pid):
            os.kill(pid, signal.SIGKILL)


def test_an_engine_in_a_unit_of_its_own_outlives_a_restart_of_its_agent(site: Site, units: dict[str, str], tmp_path: Path) -> None:
    site.start_host("u", "unified", "--supervise", "systemd", env=units)
    before = site.wait_engine("u", "ready")
    assert site.ask().status_code == 200
    assert "start disagg-engine@u.service" in (tmp_path / "units" / "calls").read_text()

    assert site.hosts["u"].end(signal.SIGTERM) == 0  # `systemctl restart disagg-unified`: stop …
    assert is_engine(before["pid"])
    wait_for(lambda: site.host("u")["state"] == "left")
    assert "its engines go on" in site.host("u")["reason"]

    site.start_host("u", "unified", "--supervise", "systemd", env=units)  # … and start
    after = site.wait_engine("u", "ready")
    assert after["pid"] == before["pid"]
    assert site.ask().status_code == 200
    assert (tmp_path / "units" / "calls").read_text().count("start disagg-engine@u.service") == 1


def test_an_engine_that_dies_in_its_unit_is_started_by_the_agent(site: Site, units: dict[str, str], tmp_path: Path) -> None:
    site.start_host("u", "unified", "--supervise", "systemd", env=units)
    before = site.wait_engine("u", "ready")
    os.kill(before["pid"], signal.SIGKILL)
    site.wait_engine("u", "dead", 2.0)
    after = site.wait_engine("u", "ready")
    assert after["pid"] != before["pid"]
    done = site.run("restart", "u")
    assert done.returncode == 0, done.stderr
    assert site.wait_engine("u", "ready")["pid"] != after["pid"]
