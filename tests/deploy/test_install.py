"""`disagg systemd` as a person runs it, installing into a folder that stands for /."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.deploy.install import Installer, closed_to_others, write_atomically
from disagg.deploy.systemd import POLKIT_FILE, SYSUSERS_FILE, Site, unit_files
from disagg.errors import InstallError
from tests.deploy.units import HOSTS, analyze, needs_systemd

LIMIT_S = 30.0
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def disagg(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "disagg", "systemd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def files_in(root: Path) -> list[str]:
    return sorted(f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("role", HOSTS)
def test_printing_shows_each_file_under_its_path_and_writes_nothing(role: str, tmp_path: Path) -> None:
    result = disagg(role, "--root", str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    files = unit_files(role, Site("/x"))
    assert [line[2:] for line in result.stdout.splitlines() if line.startswith("# /") and line[2:] in files] == list(files)
    assert files_in(tmp_path) == []


@needs_systemd
@pytest.mark.parametrize("role", HOSTS)
def test_installing_into_a_folder(role: str, tmp_path: Path) -> None:
    result = disagg(role, "--install", "--root", str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    files = list(unit_files(role, Site("/x")))
    for path in files:
        assert f"Wrote {tmp_path}{path}.\n" in result.stdout
        assert (tmp_path / path[1:]).stat().st_mode & 0o777 == 0o644
    assert {*files, "/etc/disagg/disagg.toml"} <= set(files_in(tmp_path))
    assert "Did not tell systemd" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("Next: ")
    assert last.endswith(f"systemctl enable --now {'disagg-router.socket ' if role == 'router' else ''}disagg-{role}")
    assert ("/etc/disagg/token" in last) == (role != "router")
    service = tmp_path / "etc/systemd/system" / f"disagg-{role}.service"
    assert (analyze("verify", str(service)).returncode, analyze("verify", str(service)).stderr) == (0, "")  # its program exists, too


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="systemd-sysusers is not installed")
def test_the_user_is_made_without_a_shell(tmp_path: Path) -> None:
    result = disagg("router", "--install", "--root", str(tmp_path), "--user", "serving")
    assert "The system user serving is there.\n" in result.stdout
    line = (tmp_path / "etc/passwd").read_text()
    assert line.startswith("serving:x:")
    assert line.endswith(":disagg:/var/lib/disagg:/usr/sbin/nologin\n")
    assert "User=serving\n" in (tmp_path / "etc/systemd/system/disagg-router.service").read_text()


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    disagg("decode", "--install", "--root", str(tmp_path))
    before = {path: (tmp_path / path[1:]).stat().st_mtime_ns for path in files_in(tmp_path)}
    again = disagg("decode", "--install", "--root", str(tmp_path))
    assert again.returncode == 0
    assert again.stdout.count(" is as it should be.\n") == 4
    assert "Wrote " not in again.stdout
    assert {path: (tmp_path / path[1:]).stat().st_mtime_ns for path in files_in(tmp_path)} == before


def test_an_older_unit_is_replaced_and_the_config_of_the_person_is_not(tmp_path: Path) -> None:
    unit, config = tmp_path / "etc/systemd/system/disagg-router.service", tmp_path / "etc/disagg/disagg.toml"
    for path in (unit, config):
        path.parent.mkdir(parents=True)
        path.write_text("mine\n")
    result = disagg("router", "--install", "--root", str(tmp_path))
    assert f"{config} exists and stays as it is.\n" in result.stdout
    assert config.read_text() == "mine\n"
    assert "[Service]" in unit.read_text()


def test_the_config_that_is_written_is_valid(tmp_path: Path) -> None:
    disagg("router", "--install", "--root", str(tmp_path), "--config", "/srv/my.toml")
    check = [sys.executable, "-m", "disagg", "check", "--config", str(tmp_path / "srv/my.toml")]
    assert subprocess.run(check, capture_output=True, timeout=LIMIT_S, check=False).returncode == 0
    assert "--config /srv/my.toml --key-file" in (tmp_path / "etc/systemd/system/disagg-router.service").read_text()


@as_root
def test_installing_without_root_is_one_sentence_and_changes_nothing() -> None:
    said: list[str] = []
    os.seteuid(NOBODY)
    try:
        with pytest.raises(InstallError) as caught:
            Installer(Site("/opt/disagg"), root=Path("/"), say=said.append).install("router")
    finally:
        os.seteuid(0)
    assert str(caught.value) == ("installing units needs root: run `sudo disagg systemd router --install`, or try it with --root DIR")
    assert said == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file where a folder should be")
    result = disagg("router", "--install", "--root", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"disagg: {tmp_path}/etc/systemd/system/disagg-router.service cannot be written: ")
    assert result.stderr.count("\n") == 1


def test_a_wrong_user_is_one_line(tmp_path: Path) -> None:
    result = disagg("prefill", "--install", "--root", str(tmp_path), "--user", "root")
    assert (result.returncode, result.stdout) == (78, "")
    assert result.stderr.startswith("disagg: --user = 'root' is not allowed")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(("arguments"), [(), ("head",), ("router", "--nonsense")], ids=" ".join)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert disagg(*arguments).returncode == 2


def test_an_agent_without_polkit_is_warned_of(tmp_path: Path) -> None:
    said = disagg("prefill", "--install", "--root", str(tmp_path)).stdout
    assert "Warning: polkit is not installed" in said
    (tmp_path / "usr/share/polkit-1/rules.d").mkdir(parents=True)
    assert "Warning: polkit" not in disagg("prefill", "--install", "--root", str(tmp_path)).stdout
    assert "Warning: polkit" not in disagg("router", "--install", "--root", str(tmp_path)).stdout
    assert {POLKIT_FILE, SYSUSERS_FILE} <= set(files_in(tmp_path))


def test_a_program_that_the_user_cannot_reach_is_found(tmp_path: Path) -> None:
    program = tmp_path / "disagg"
    program.write_text("")
    program.chmod(0o755)
    tmp_path.chmod(0o700)
    closed = closed_to_others(program)
    assert closed is not None
    assert not closed.stat().st_mode & 0o001
    assert closed_to_others(Path(shutil.which("true") or "/bin/true")) is None
    assert closed_to_others(tmp_path / "missing") == tmp_path / "missing"


def test_the_socket_listens_where_the_config_says(tmp_path: Path) -> None:
    config = tmp_path / "disagg.toml"
    config.write_text('[router]\nhttp = "0.0.0.0:9000"\n')
    assert "ListenStream=0.0.0.0:9000\n" in disagg("router", "--config", str(config)).stdout


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "unit"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(target, "new \udcff")
    assert target.read_text() == "old"
    assert files_in(tmp_path) == ["/unit"]
