"""What systemd hears of a router and of a host: ready, alive, stopping."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.serve.conftest import Process, Site, wait_for

pytestmark = pytest.mark.slow


class Manager:
    """The end of systemd."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000"}
        self.heard: list[str] = []

    def has_heard(self, word: str, times: int = 1) -> bool:
        while True:
            try:
                self.heard += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.heard.count(word) >= times

    def close(self) -> None:
        self._socket.close()


def follow(manager: Manager, process: Process) -> None:
    wait_for(lambda: manager.has_heard("READY=1"), process.said)
    wait_for(lambda: manager.has_heard("WATCHDOG=1", 5), process.said)
    assert process.end() == 0
    assert manager.has_heard("STOPPING=1")
    assert manager.heard.index("READY=1") < manager.heard.index("STOPPING=1")


def test_a_router_tells_systemd_how_it_is(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    places = [*("--http", f"127.0.0.1:{free_port()}", "--admin", f"127.0.0.1:{free_port()}"), "--control", "127.0.0.1:0"]
    process = Process("router", tmp_path, ["serve", "--role", "router", *places, "--state-dir", str(tmp_path / "s")], manager.env)
    try:
        follow(manager, process)
    finally:
        process.end()
        manager.close()


def test_a_host_tells_systemd_how_it_is_and_its_engine_does_not_speak_for_it(site: Site) -> None:
    manager = Manager(site.folder / "notify")
    try:
        host = site.start_host("u", "unified", env=manager.env)
        pid = site.wait_engine("u", "ready")["pid"]
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
        follow(manager, host)
    finally:
        manager.close()
