"""F36: a disk that is full, or read-only. Serving goes on; what must be written is refused in one sentence, and is never half done."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import DISAGG, Site, is_engine, wait_for

pytestmark = pytest.mark.slow


class Disk:
    """A file system of 1 MB; for who may not mount one, a folder that can be closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", str(folder)]
        self.is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if os.geteuid() == 0 and not self.is_mounted:
            pytest.skip("root, to whom every folder is open, may not mount a file system here")

    @property
    def refusal(self) -> str:
        return "the disk is full" if self.is_mounted else "not permitted"

    def fill(self) -> None:
        if not self.is_mounted:
            self._close_folders(0o500)
            return
        with (self.folder / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))

    def free(self) -> None:
        if self.is_mounted:
            (self.folder / "ballast").unlink(missing_ok=True)
        else:
            self._close_folders(0o700)

    def lock(self) -> None:
        """Read-only from here on."""
        if self.is_mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)
        else:
            self._close_folders(0o500)

    def _close_folders(self, mode: int) -> None:
        for path in [self.folder, *self.folder.rglob("*")]:
            if path.is_dir():
                path.chmod(mode)

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
        else:
            self._close_folders(0o700)

    def drafts(self) -> list[Path]:
        return list(self.folder.rglob("*.tmp"))


class Disks:
    """Where the router and the host `u` keep their state."""

    def __init__(self, folder: Path) -> None:
        self.router = Disk(folder / "router")
        self.host = Disk(folder / "u")
        self.both = (self.router, self.host)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    made = Disks(tmp_path)
    try:
        yield made
    finally:
        for disk in made.both:
            disk.close()


@pytest.fixture
def small(disks: Disks, tmp_path: Path) -> Iterator[Site]:
    """A router and a unified host on these disks, which are not full yet."""
    assert disks
    site = Site(tmp_path)
    try:
        site.start_router()
        site.start_host("u", "unified", token=site.token("unified"))
        site.wait_engine("u", "ready")
        yield site
    finally:
        site.close()


def refused(done: subprocess.CompletedProcess[str], disk: Disk) -> None:
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert disk.refusal in line


def test_serving_goes_on_while_the_disks_are_full(small: Site, disks: Disks) -> None:
    for disk in disks.both:
        disk.fill()
    for _ in range(3):
        assert small.ask().status_code == 200
    assert "takes no new work" in small.run("drain", "u").stdout
    assert "back in service" in small.run("undrain", "u").stdout
    wait_for(lambda: "record cannot be written" in small.hosts["u"].said(), small.hosts["u"].said)
    assert small.ask().status_code == 200
    for disk in disks.both:
        assert disk.drafts() == []


def test_without_that_care_the_agent_falls(small: Site, disks: Disks) -> None:
    """The defence off: an agent to which a record that cannot be written is an error like any other."""
    careless = (
        "from disagg import cli\n"
        "from disagg.cluster import keeper\n"
        "async def save(self, record): keeper.write_private(self._record_path, keeper.encode_kept(record))\n"
        "keeper.EngineKeeper._save = save\n"
        "cli.main()\n"
    )
    small.hosts["u"].end(signal.SIGKILL)
    host = small.start_host("u", "unified", program=("-c", careless))
    wait_for(lambda: small.host("u").get("incarnation") == 2)
    disks.host.fill()
    small.run("drain", "u")
    assert host.process.wait(20) != 0


def test_keys_tokens_and_registrations_are_refused_in_one_sentence(small: Site, disks: Disks) -> None:
    known = (disks.router.folder / "router" / "hosts.json").read_bytes()
    key = (disks.router.folder / "router" / "key").read_bytes()
    token = small.token("unified")
    disks.router.fill()
    refused(small.run("token", "create", "--role", "decode", "--state-dir", str(disks.router.folder), admin=False), disks.router)
    refused(small.run("keygen", "--state-dir", str(disks.router.folder / "other"), admin=False), disks.router)
    done = small.run("hosts", "revoke", "u")
    assert done.returncode == 1
    assert disks.router.refusal in done.stderr
    disks.router.free()
    disks.router.lock()
    late = small.start_host("v", "unified", token=token)
    assert late.process.wait(20) == 1
    assert "the router refused to register this host: cannot remove" in late.said()
    assert (disks.router.folder / "router" / "hosts.json").read_bytes() == known
    assert (disks.router.folder / "router" / "key").read_bytes() == key
    assert not list((disks.router.folder / "other").rglob("key*"))
    assert disks.router.drafts() == []


def test_an_engine_that_dies_while_the_disk_is_full_is_back_when_there_is_room(small: Site, disks: Disks) -> None:
    pid = small.engine("u")["pid"]
    disks.host.fill()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: disks.host.refusal in small.engine("u")["reason"], lambda: str(small.engine("u")), 20)
    assert disks.host.refusal in small.run("status").stdout
    disks.host.free()
    small.wait_engine("u", "ready", 60)
    assert small.ask().status_code == 200


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_router_starts_again_on_a_disk_that_takes_nothing(small: Site, disks: Disks, how: str) -> None:
    """Its key, its registrations and its lock are there; nothing needs to be written."""
    assert small.router is not None
    if how == "full":
        disks.router.fill()
    else:
        disks.router.lock()
    small.router.end(signal.SIGKILL)
    small.start_router()
    small.wait_engine("u", "ready")
    assert small.ask().status_code == 200
    assert small.router.end() == 0


def test_an_agent_that_cannot_count_its_start_leaves_its_engine_alone(small: Site, disks: Disks) -> None:
    """The number of its incarnation must be on the disk before anybody hears it: it is refused in one sentence, and the engine serves."""
    pid = small.engine("u")["pid"]
    small.engine_pids.add(pid)
    small.hosts["u"].end(signal.SIGKILL)
    disks.host.fill()
    again = small.start_host("u", "unified")
    assert again.process.wait(20) == 1
    assert disks.host.refusal in again.said()
    assert is_engine(pid)
    disks.host.free()
    small.start_host("u", "unified")
    assert small.wait_engine("u", "ready")["pid"] == pid
    assert small.ask().status_code == 200


def test_units_and_config_are_written_whole_or_not_at_all(disks: Disks, tmp_path: Path) -> None:
    root = disks.host.folder
    command = [*DISAGG, "systemd", "router", "--install", "--root", str(root)]
    assert subprocess.run(command, capture_output=True, check=False, cwd=tmp_path).returncode == 0
    unit = root / "etc/systemd/system/disagg-router.service"
    before = unit.read_bytes()
    disks.host.fill()
    done = subprocess.run([*command, "--user", "other"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert unit.read_bytes() == before
    assert not [p for p in unit.parent.iterdir() if p.name.startswith(".")]
