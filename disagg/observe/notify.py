"""sd_notify: what this process tells systemd of itself. Without systemd every call does nothing.

The protocol is a datagram of `KEY=value` lines to the socket that `$NOTIFY_SOCKET` names, as in sd_notify(3). A datagram that does not
go out (the socket's queue is full, systemd is being restarted) is not lost: what it said is owed, and goes out with the next one.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

STATUS_LIMIT = 512  # characters; `systemctl status` shows one line


class Notifier:
    """Speaks to systemd. Never raises, never blocks. Use `from_environ` to make one; `close` gives its socket back.

    Args:
        address: what `$NOTIFY_SOCKET` held: an absolute path, or a name in the abstract namespace after an @; empty for no systemd.
        watchdog_interval_s: how often to call `watchdog`, in seconds; None when systemd does not watch this process.
    """

    def __init__(self, address: str = "", *, watchdog_interval_s: float | None = None) -> None:
        self.watchdog_interval_s = watchdog_interval_s
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._owed: dict[str, str] = {}
        self._socket: socket.socket | None = None
        if address.startswith(("/", "@")):
            with contextlib.suppress(OSError):  # no descriptor left: no reason not to serve
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Takes the three variables of systemd out of the environment, so that no engine inherits them and speaks in our name.

        A process that is watched must call `watchdog` at least once in `$WATCHDOG_USEC`; half of it leaves room for one late call.
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = not pid or pid == str(os.getpid())
        number = int(microseconds) if microseconds.isascii() and microseconds.isdigit() and len(microseconds) <= 20 else 0
        return cls(address, watchdog_interval_s=number / 2e6 if address and ours and number else None)

    @property
    def enabled(self) -> bool:
        """True when somebody listens."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The start is over. With `Type=notify`, `systemctl start` returns now."""
        self._send(READY="1", STATUS=status)

    def stopping(self, status: str) -> None:
        """The way down has begun."""
        self._send(STOPPING="1", STATUS=status)

    def status(self, text: str) -> None:
        """One line for people who ask `systemctl status`."""
        self._send(STATUS=text)

    def watchdog(self) -> None:
        """The loop turns: `WatchdogSec=` begins anew. Call it from the loop that does the work, or it proves nothing."""
        self._send(WATCHDOG="1")

    def close(self) -> None:
        """Gives the socket back; later calls do nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, **words: str) -> None:
        if self._socket is None:
            return
        self._owed.update({key: _one_line(value) for key, value in words.items()})
        message = "".join(f"{key}={value}\n" for key, value in self._owed.items())
        with contextlib.suppress(OSError):
            self._socket.sendto(message.encode(errors="replace"), self._address)
            self._owed.clear()

    def __repr__(self) -> str:
        return f"<Notifier enabled={self.enabled} watchdog_interval_s={self.watchdog_interval_s} owed={sorted(self._owed)}>"


def _one_line(text: str) -> str:
    """A line end within a text would begin another word of the protocol."""
    return " ".join(text.split())[:STATUS_LIMIT]
