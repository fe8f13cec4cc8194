"""The command line as a person or systemd meets it: real processes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

import disagg
from disagg.config import settings
from tests.ports import free_port

SECTIONS = ("cluster", "router", "engine", "security", "observe")
LIMIT_S = 20.0
DISAGG = (sys.executable, "-m", "disagg")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DISAGG, *arguments], cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def one_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The only line that a failing command says."""
    assert (result.returncode, result.stdout) == (code, ""), result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("disagg: ")
    return lines[0]


class Router:
    """A router process without engines."""

    def __init__(self, process: subprocess.Popen[str], port: int, admin: int) -> None:
        self.process = process
        self.port = port
        self.admin = admin

    def ask(self, path: str, body: Any = None, port: int = 0) -> tuple[int, Message, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port or self.port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def lines_until(self, start: str) -> list[str]:
        """Its output up to the line that begins like this."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return lines
        raise AssertionError(f"it ended without a line {start!r}: {lines}")


@contextmanager
def router(cwd: Path, *arguments: str) -> Iterator[Router]:
    port, admin = free_port(), free_port()
    places = ["--http", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin}", "--control", "127.0.0.1:0", "--state-dir", str(cwd / "state")]
    command = [*DISAGG, "serve", "--role", "router", *places, *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield Router(process, port, admin)
    finally:
        process.kill()
        process.wait(LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


# --- what the commands say of themselves


def test_version(tmp_path: Path) -> None:
    result = run("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"disagg {disagg.__version__}\n", "")


def test_help_lists_the_commands_that_exist_and_no_stub(tmp_path: Path) -> None:
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    listed = [line.split()[0] for line in result.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(listed) == [
        *("check", "drain", "flip", "hosts", "keygen", "kv", "replay", "restart", "serve", "status", "systemd", "token", "undrain", "up"),
    ]


@pytest.mark.parametrize(("command", "sections"), [("serve", SECTIONS), ("up", ("router", "engine", "observe"))])
def test_help_names_the_flag_and_the_default_of_each_setting(command: str, sections: tuple[str, ...], tmp_path: Path) -> None:
    result = run(command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for setting in settings(*sections):
        if command == "up" and setting.key in {"prefill", "decode", "unified", "control", "attach", "supervise"}:
            continue
        assert f" {setting.flag} " in text
        assert setting.text.replace("- ", "-") in text.replace("- ", "-")  # a line may be broken at a hyphen
        if isinstance(setting.default, int | float):
            assert f"{setting.text} [default: {setting.default}]" in text


def test_serve_takes_the_roles_of_the_contract(tmp_path: Path) -> None:
    assert "--role <router|prefill|decode|unified>\n" in run("serve", "--help", cwd=tmp_path).stdout
    result = run("serve", "--role", "nonsense", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_host_without_the_routers_address_is_one_line_that_names_the_flag(tmp_path: Path) -> None:
    assert "--join" in one_line(run("serve", "--role", "prefill", cwd=tmp_path), 78)


def test_a_host_that_never_joined_is_told_how_to_get_a_token(tmp_path: Path) -> None:
    result = run("serve", "--role", "decode", "--join", "127.0.0.1:1", "--state-dir", str(tmp_path / "s"), cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "disagg token create --role decode" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("serve",),
        ("serve", "--role", "router", "--nonsense"),
        ("serve", "--role", "router", "--body-limit-mib", "many"),
        ("check", "--config"),
        ("up", "--prefill", "-1"),
        ("up", "--decode", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_says_how(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result
    assert any(line.startswith("Error: ") for line in result.stderr.splitlines())
    assert "Traceback" not in result.stderr


# --- check


def test_check_without_a_file_shows_every_setting(tmp_path: Path) -> None:
    result = run("check", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for setting in settings("router", "engine", "observe"):
        assert f"  {setting.section}.{setting.key} " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("The config is valid.")


def test_check_marks_what_differs_from_the_default(tmp_path: Path) -> None:
    (tmp_path / "disagg.toml").write_text("[router]\nbody_limit_mib = 3\n")
    marked = [line for line in run("check", cwd=tmp_path).stdout.splitlines() if line.startswith("*")]
    assert [line.split()[1:3] for line in marked] == [["router.body_limit_mib", "3"]]


def test_check_prints_a_default_file_that_is_valid(tmp_path: Path) -> None:
    (tmp_path / "disagg.toml").write_text(run("check", "--default", cwd=tmp_path).stdout)
    result = run("check", cwd=tmp_path)
    assert result.returncode == 0
    assert not [line for line in result.stdout.splitlines() if line.startswith("*")]


@pytest.mark.parametrize("command", [("check",), ("serve", "--role", "router"), ("up",)], ids=" ".join)
def test_an_unknown_key_is_one_line_with_the_nearest_name_and_exit_78(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "disagg.toml").write_text("[router]\n\nconect_timeout_s = 1\n")
    line = one_line(run(*command, cwd=tmp_path), 78)
    assert line == "disagg: disagg.toml:3: router.conect_timeout_s = 1 is not a setting; did you mean connect_timeout_s?"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe", "cannot be read"), (b"[router", "not valid TOML"), (b'[router]\nhttp = "x:\xc2\xb2"', "write HOST:PORT")],
    ids=["not text", "not TOML", "no port"],
)
def test_a_file_that_makes_no_sense_is_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(content)
    line = one_line(run("check", "--config", "my.toml", cwd=tmp_path), 78)
    assert "my.toml" in line
    assert words in line


@pytest.mark.parametrize("path", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_one_line(path: str, tmp_path: Path) -> None:
    assert f"{path} cannot be read" in one_line(run("check", "--config", path, cwd=tmp_path), 78)


def test_a_wrong_flag_is_one_line_that_names_the_flag(tmp_path: Path) -> None:
    line = one_line(run("serve", "--role", "router", "--decode", "10.0.0.1", cwd=tmp_path), 78)
    assert line == "disagg: --decode = '10.0.0.1' is not allowed: write http://10.0.0.1:30000"


# --- serve


@pytest.mark.parametrize("flag", ["--http", "--admin"])
def test_a_port_in_use_is_one_line_that_names_it(flag: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = "--admin" if flag == "--http" else "--http"
        places = [flag, address, other, f"127.0.0.1:{free_port()}", "--control", "127.0.0.1:0", "--state-dir", str(tmp_path / "s")]
        line = one_line(run("serve", "--role", "router", *places, cwd=tmp_path), 1)
    assert (
        line
        == f"disagg: cannot listen on {address}: another program listens there; stop that program or choose another address with {flag}"
    )


def test_a_router_without_engines_says_so_and_ends_on_sigterm(tmp_path: Path) -> None:
    with router(tmp_path) as running:
        said = running.lines_until("Started in ")
        assert said[0] == f"disagg {disagg.__version__} router"
        assert said[1] == f"made the router's key, {tmp_path}/state/router/key"
        assert said[2].split() == ["clients", f"http://127.0.0.1:{running.port}"]
        assert said[3].split() == ["admin", f"http://127.0.0.1:{running.admin}"]
        assert said[4].split()[:2] == ["hosts", "join"]
        assert "disagg token create" in said[5]

        assert running.ask("/healthz")[0] == 200
        assert running.ask("/v1/models")[0] == 200

        status, headers, body = running.ask("/readyz")
        assert (status, headers["Retry-After"].isdigit()) == (503, True)
        assert "no host has joined yet" in json.loads(body)["error"]["message"]

        for path, request in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/completions", {"prompt": "hi", "stream": True}),
            ("/generate", {"text": "hi", "sampling_params": {"n": 2}}),
        ):
            status, headers, body = running.ask(path, request)
            assert status == 503
            assert int(headers["Retry-After"]) >= 1
            error = json.loads(body)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["type"] == "service_unavailable"

        assert b'disagg_shed_total{reason="no_engine"} 3.0' in running.ask("/metrics", port=running.admin)[2]

        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(LIMIT_S) == 0
        assert running.process.stdout is not None
        rest = running.process.stdout.read()
        assert "Stopping: running requests may finish; once more stops at once.\n" in rest
        assert "Traceback" not in rest


def test_ctrl_c_ends_it_too(tmp_path: Path) -> None:
    with router(tmp_path) as running:
        running.lines_until("Started in ")
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(LIMIT_S) == 0


def test_a_signal_while_it_starts_ends_it_as_well(tmp_path: Path) -> None:
    with router(tmp_path) as running:
        running.lines_until("disagg ")  # the handlers stand before the first line
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(LIMIT_S) == 0


def test_a_second_signal_does_not_wait_for_running_requests(tmp_path: Path) -> None:
    with socket.socket() as engine:  # it takes connections and never answers
        engine.bind(("127.0.0.1", 0))
        engine.listen()
        with router(tmp_path, "--unified", f"http://127.0.0.1:{engine.getsockname()[1]}", "--drain-timeout-s", "3600") as running:
            running.lines_until("Started in ")
            with socket.create_connection(("127.0.0.1", running.port)) as client:
                client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")  # its body never comes
                wait_for(lambda: b"disagg_inflight 1.0" in running.ask("/metrics", port=running.admin)[2])
                running.process.send_signal(signal.SIGTERM)
                running.lines_until("Stopping")
                assert running.process.poll() is None
                running.process.send_signal(signal.SIGTERM)
                assert running.process.wait(LIMIT_S) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_wide_listener_without_keys_is_warned_of_once(tmp_path: Path) -> None:
    port = free_port()
    with router(tmp_path, "--http", f"0.0.0.0:{port}", "--log-format", "json") as running:
        said = running.lines_until("Started in ")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(LIMIT_S) == 0
        assert running.process.stdout is not None
        said += running.process.stdout.read().splitlines()  # the log is written beside the lines for people, at its own pace
    warnings = [json.loads(line) for line in said if line.startswith("{")]
    assert [w["level"] for w in warnings] == ["warning"]
    assert warnings[0]["http"] == f"0.0.0.0:{port}"
