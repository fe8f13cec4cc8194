"""`disagg up`: start, ports, signals, no orphans."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg.security.keys import load_or_make_key
from tests.cluster.conftest import running_cluster
from tests.ports import free_port


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def wait_gone(pids: list[int], limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while any(map(alive, pids)):
        assert time.monotonic() < until, f"still running: {[p for p in pids if alive(p)]}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_cluster_cleanly(number: signal.Signals) -> None:
    with running_cluster() as cluster:
        pids = [e["pid"] for e in cluster.engines()]
        assert len(pids) == 2
        assert cluster.stop(number) == 0
        wait_gone(pids)
        assert "Traceback" not in cluster.log.read_text()


@pytest.mark.slow
def test_the_start_says_what_listens_where() -> None:
    with running_cluster("--prefill", "2", "--decode", "1", "--unified", "1") as cluster:
        wait_for(lambda: "Ready in" in cluster.log.read_text())
        text = cluster.log.read_text()
        for word in ("prefill-0", "prefill-1", "decode-0", "unified-0", "bootstrap port", cluster.url, cluster.admin, "Ready in"):
            assert word in text
        for engine in cluster.engines():
            assert engine["url"] in text
            assert engine["state"] == "ready"


@pytest.mark.slow
def test_engines_do_not_outlive_a_killed_cluster() -> None:
    with running_cluster() as cluster:
        pids = [e["pid"] for e in cluster.engines()]
        cluster.process.kill()
        cluster.process.wait()
        wait_gone(pids)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_although_a_request_runs() -> None:
    with running_cluster("--engine-arg=--paced", "--engine-arg=200,0;200,0", "--drain-timeout-s", "60") as cluster:
        pids = [e["pid"] for e in cluster.engines()]
        body = b'{"model":"demo","messages":[{"role":"user","content":"hi"}],"max_tokens":500,"ignore_eos":true,"stream":true}'
        with socket.create_connection(("127.0.0.1", int(cluster.url.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            cluster.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 5
            while "once more" not in cluster.log.read_text():
                assert time.monotonic() < until
                time.sleep(0.02)
            assert cluster.process.poll() is None
            cluster.process.send_signal(signal.SIGTERM)
            assert cluster.process.wait(15) == 0
        wait_gone(pids)


def test_a_port_in_use_is_one_line_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "disagg", "up", "--http", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{free_port()}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"127.0.0.1:{port}" in line
    assert "--http" in line


def test_a_missing_model_folder_is_one_line_that_names_it() -> None:
    command = [sys.executable, "-m", "disagg", "up", "--model", "/nonexistent/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "/nonexistent/model" in line


@pytest.mark.slow
def test_a_dead_engine_is_shown_as_dead_and_started_again() -> None:
    with running_cluster() as cluster:
        decode = cluster.engine("decode")
        os.kill(decode["pid"], signal.SIGKILL)
        wait_for(lambda: cluster.engine("decode")["state"] == "dead")
        assert "signal 9" in cluster.engine("decode")["reason"]
        assert "decode-0" in cluster.log.read_text()
        wait_for(lambda: cluster.engine("decode")["state"] == "ready")
        assert cluster.engine("decode")["pid"] != decode["pid"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    ['[security]\nkey_file = "{folder}/own.key"', '[engine]\nattach = "http://127.0.0.1:9"', '[engine]\nsupervise = "systemd"'],
    ids=["key", "attach", "systemd"],
)
def test_what_a_file_says_of_lasting_hosts_is_not_for_a_throw_away_cluster(lines: str, tmp_path: Path) -> None:
    load_or_make_key(tmp_path / "own.key")
    file = tmp_path / "disagg.toml"
    file.write_text(lines.format(folder=tmp_path))
    with running_cluster("--config", str(file)) as cluster:
        assert {(e["id"], e["state"]) for e in cluster.engines()} == {("prefill-0", "ready"), ("decode-0", "ready")}
        pids = [e["pid"] for e in cluster.engines()]
        assert all(map(alive, pids))
    wait_gone(pids)
