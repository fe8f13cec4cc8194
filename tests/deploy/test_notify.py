"""What systemd hears, on a real datagram socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg.observe.notify import STATUS_LIMIT, Notifier

LIMIT_S = 10.0


class Systemd:
    """The other end of `$NOTIFY_SOCKET`."""

    def __init__(self, address: str, bound: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(bound)
        self.socket.settimeout(LIMIT_S)

    def heard(self) -> list[str]:
        return self.socket.recv(65536).decode().splitlines()

    def heard_nothing(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(65536)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(LIMIT_S)
        return False


@pytest.fixture(params=["a path", "an abstract name"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    path, name = str(tmp_path / "notify"), f"disagg-test-{os.getpid()}"
    listener = Systemd(path, path) if request.param == "a path" else Systemd(f"@{name}", f"\0{name}")
    yield listener
    listener.socket.close()


@pytest.fixture
def notifier(systemd: Systemd) -> Iterator[Notifier]:
    made = Notifier.from_environ({"NOTIFY_SOCKET": systemd.address})
    yield made
    made.close()


def test_each_word_as_systemd_reads_it(systemd: Systemd, notifier: Notifier) -> None:
    assert notifier.enabled
    notifier.ready("2 engines")
    assert systemd.heard() == ["READY=1", "STATUS=2 engines"]
    notifier.status("3 engines")
    assert systemd.heard() == ["STATUS=3 engines"]
    notifier.watchdog()
    assert systemd.heard() == ["WATCHDOG=1"]
    notifier.stopping("draining")
    assert systemd.heard() == ["STOPPING=1", "STATUS=draining"]


def test_a_text_cannot_smuggle_in_another_word(systemd: Systemd, notifier: Notifier) -> None:
    notifier.status("fine\nMAINPID=1\r\nFDSTORE=1")
    assert systemd.heard() == ["STATUS=fine MAINPID=1 FDSTORE=1"]
    notifier.status("x" * 100_000)
    assert systemd.heard() == ["STATUS=" + "x" * STATUS_LIMIT]


def test_what_did_not_go_out_goes_out_with_the_next(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": path})
    notifier.ready("early")  # nobody listens yet
    notifier.status("later")
    listener = Systemd(path, path)
    notifier.watchdog()
    assert sorted(listener.heard()) == ["READY=1", "STATUS=later", "WATCHDOG=1"]
    notifier.watchdog()
    assert listener.heard() == ["WATCHDOG=1"]
    listener.socket.close()
    notifier.close()


def test_a_full_queue_neither_blocks_nor_loses_ready(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    listener = Systemd(path, path)
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": path})
    for _ in range(10_000):
        notifier.watchdog()
    notifier.ready("at last")
    assert "READY" in repr(notifier)
    while not listener.heard_nothing():
        pass
    notifier.watchdog()
    assert "READY=1" in listener.heard()
    listener.socket.close()
    notifier.close()


@pytest.mark.parametrize(
    "environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "relative/path"}], ids=str
)
def test_without_systemd_every_call_does_nothing(environ: dict[str, str]) -> None:
    notifier = Notifier.from_environ(dict(environ))
    assert not notifier.enabled
    notifier.ready("a")
    notifier.stopping("b")
    notifier.status("c")
    notifier.watchdog()
    notifier.close()


@pytest.mark.parametrize("address", ["/nowhere/at/all", "/" + "x" * 500, "@"], ids=["missing", "too long", "no name"])
def test_a_socket_that_is_not_there_is_no_error(address: str) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": address})
    notifier.ready("a")
    notifier.close()
    notifier.watchdog()


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
        ({}, None),
    ],
    ids=["ten seconds", "for this process", "for another process", "0", "no number", "a digit of another kind", "none"],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_must(environ: dict[str, str], interval_s: float | None) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": "/nowhere", **environ})
    assert notifier.watchdog_interval_s == interval_s
    notifier.close()
    assert Notifier.from_environ(dict(environ)).watchdog_interval_s is None  # nobody to tell


def test_children_do_not_inherit_the_socket() -> None:
    code = (
        "import os, subprocess, sys; from disagg.observe.notify import Notifier; Notifier.from_environ(os.environ).close(); "
        "subprocess.run([sys.executable, '-c', 'import os; print(sorted(k for k in os.environ if k[:6] in (\"NOTIFY\", \"WATCHD\")))'])"
    )
    environ = {**os.environ, "NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert result.stdout == "[]\n"
