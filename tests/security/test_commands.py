"""`disagg keygen` and `disagg token create` as an admin runs them: real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from disagg.model import Role
from disagg.security.keys import load_key
from disagg.security.token import Grant, Token, TokenStore
from tests.security.users import NOBODY, as_nobody, folder_of_nobody, mode, needs_root, umask

LIMIT_S = 30.0
DISAGG = (sys.executable, "-m", "disagg")


def environ(**more: str) -> dict[str, str]:
    ours = {"DISAGG_STATE_DIR", "STATE_DIRECTORY", "XDG_STATE_HOME"}
    return {key: value for key, value in os.environ.items() if key not in ours} | more


def run(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*DISAGG, *arguments]
    return subprocess.run(command, cwd=cwd, env=env or environ(), capture_output=True, text=True, timeout=LIMIT_S, check=False)


def wall() -> float:
    return time.clock_gettime(time.CLOCK_REALTIME)


def test_keygen_makes_a_key_once(tmp_path: Path) -> None:
    with umask(0):
        first = run("keygen", "--state-dir", "state", cwd=tmp_path)
    path = tmp_path / "state" / "router" / "key"
    key, text = load_key(path), path.read_bytes()
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == f"Made the router's key.\n  file        {path}\n  public key  {key.public}\n"
    assert [mode(p) for p in (path, path.parent, tmp_path / "state")] == [0o600, 0o700, 0o700]

    again = run("keygen", cwd=tmp_path, env=environ(DISAGG_STATE_DIR=str(tmp_path / "state")))
    assert again.returncode == 0
    assert again.stdout == f"The router's key exists already; it stays as it is.\n  file        {path}\n  public key  {key.public}\n"
    assert path.read_bytes() == text
    assert key.secret not in first.stdout + again.stdout


def test_many_keygens_at_once_agree_on_one_key(tmp_path: Path) -> None:
    command = [*DISAGG, "keygen", "--state-dir", str(tmp_path)]
    running = [subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=LIMIT_S)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sum(text.startswith("Made") for text in said) == 1
    assert {text.split()[-1] for text in said} == {load_key(tmp_path / "router" / "key").public}


def test_a_token_is_alone_on_the_last_line_and_can_be_used(tmp_path: Path) -> None:
    before = wall()
    result = run("token", "create", "--role", "prefill", "--role", "decode", "--ttl", "2h", "--state-dir", str(tmp_path), cwd=tmp_path)
    after = wall()
    assert result.returncode == 0
    assert re.fullmatch(r"dgt1_[A-Za-z0-9_-]+\n", result.stdout)
    token = Token.decode(result.stdout)
    assert token.router_key == load_key(tmp_path / "router" / "key").public
    assert int(before) + 7200 <= token.expires_at <= after + 7200

    store = TokenStore(tmp_path / "router" / "tokens")
    grant = Grant(token.public_key, (Role.PREFILL, Role.DECODE), token.expires_at)
    assert store.find(token.public_key, now_wall=after) == grant

    said = result.stderr
    assert f"Made the router's key, {tmp_path}/router/key" in said
    assert "within 2h, as prefill or decode" in said
    assert token.secret_key not in said
    assert result.stdout.strip() not in said


def test_with_both_outputs_in_one_stream_the_token_is_still_last(tmp_path: Path) -> None:
    command = [*DISAGG, "token", "create", "--role", "unified", "--state-dir", str(tmp_path)]
    merged = subprocess.run(
        command, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=True
    )
    lines = merged.stdout.splitlines()
    assert len(lines) > 1
    assert Token.decode(lines[-1]).roles == (Role.UNIFIED,)


def test_the_default_is_15_minutes_and_expired_tokens_are_cleared_away(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "router" / "tokens")
    store.create([Role.DECODE], 60, now_wall=0.0, router_key="")
    before = wall()
    result = run("token", "create", "--role", "decode", "--state-dir", str(tmp_path), cwd=tmp_path)
    token = Token.decode(result.stdout)
    assert int(before) + 900 <= token.expires_at <= wall() + 900
    assert len(list((tmp_path / "router" / "tokens").iterdir())) == 1

    again = run("token", "create", "--role", "decode", "--state-dir", str(tmp_path), cwd=tmp_path)
    assert "Made" not in again.stderr
    other = Token.decode(again.stdout)
    assert (other.router_key, other.secret_key == token.secret_key) == (token.router_key, False)


@pytest.mark.parametrize("ttl", ["0s", "8d", "169h", "15", "m", "-1m", "1.5h", "15 m", "1h30m", "\u0661m", "", "99999999999s"])
def test_a_wrong_ttl_exits_2_and_makes_nothing(ttl: str, tmp_path: Path) -> None:
    result = run("token", "create", "--role", "prefill", f"--ttl={ttl}", "--state-dir", str(tmp_path / "state"), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "write a time like 90s, 15m, 2h or 1d, at most 7d" in line
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("ttl", ["1s", "7d", "168h"])
def test_the_outermost_ttls_are_allowed(ttl: str, tmp_path: Path) -> None:
    assert run("token", "create", "--role", "prefill", "--ttl", ttl, "--state-dir", str(tmp_path), cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("arguments", [("--role", "king"), ("--role", "router"), ()], ids=" ".join)
def test_a_wrong_or_missing_role_exits_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run("token", "create", *arguments, "--state-dir", str(tmp_path / "state"), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert any(line.startswith("Error: ") and "--role" in line for line in result.stderr.splitlines())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", [("keygen",), ("token", "create", "--role", "prefill")], ids=" ".join)
def test_a_loose_key_is_one_line_and_exit_1(command: tuple[str, ...], tmp_path: Path) -> None:
    run("keygen", "--state-dir", str(tmp_path), cwd=tmp_path)
    path = tmp_path / "router" / "key"
    path.chmod(0o644)
    result = run(*command, "--state-dir", str(tmp_path), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"disagg: {path} can be read by others (mode 0644): chmod 600 {path}\n"


def test_a_state_directory_that_cannot_be_is_one_line_and_exit_1(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    result = run("token", "create", "--role", "prefill", "--state-dir", str(tmp_path / "state"), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        r"disagg: cannot read .*/router/(key|public): Not a directory; choose another folder with --state-dir\n", result.stderr
    )


@needs_root
def test_a_token_that_root_makes_for_a_service_can_be_spent_by_it() -> None:
    with folder_of_nobody() as folder:
        result = run("token", "create", "--role", "decode", "--state-dir", str(folder), cwd=folder)
        token = Token.decode(result.stdout)
        assert {p.stat().st_uid for p in folder.rglob("*")} == {NOBODY}
        with as_nobody():
            store = TokenStore(folder / "router" / "tokens")
            assert load_key(folder / "router" / "key").public == token.router_key
            assert store.find(token.public_key, now_wall=wall()) is not None
            assert store.spend(token.public_key)
        assert run("token", "create", "--role", "decode", "--state-dir", str(folder), cwd=folder).returncode == 0
