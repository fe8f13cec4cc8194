"""Sockets that systemd holds open for this process while it is restarted: sd_listen_fds(3).

A socket unit listens before the service starts and goes on when it ends. The kernel completes connections meanwhile and keeps them in the
socket's queue until the next process accepts them, so that a restart refuses nobody.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

from disagg.errors import StartError

FIRST = 3
NAME = "http"
"""What the socket is called: ``FileDescriptorName=`` of the unit that `disagg.deploy.systemd` writes."""
MOST = 64


def public_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The listening socket that was handed to this process; None where there is none.

    The three variables are taken out of the environment, so that no child believes that they were meant for it.

    Raises:
        StartError: what was handed over cannot be listened on, or is not one socket.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()) or not 0 < int(count[:3]) <= MOST:
        return None
    called = names.split(":") if names else []
    numbers = range(FIRST, FIRST + int(count))
    ours = [n for n in numbers if called[n - FIRST : n - FIRST + 1] == [NAME]] or list(numbers)
    for number in set(numbers) - set(ours):
        with contextlib.suppress(OSError):
            os.close(number)
    if len(ours) > 1:
        raise StartError(
            f"systemd handed over {len(ours)} sockets, and the router listens on one: keep one ListenStream= in its socket unit"
        )
    return _listening(ours[0])


def _listening(number: int) -> socket.socket:
    try:
        found = socket.socket(fileno=number)
    except OSError as error:
        raise StartError(
            f"what systemd handed over is no socket ({error.strerror}): write its unit anew, `disagg systemd router`"
        ) from error
    if found.family not in {socket.AF_INET, socket.AF_INET6} or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        found.close()
        raise StartError("the socket that systemd handed over does not listen for TCP: its unit needs ListenStream=ADDRESS:PORT")
    found.set_inheritable(False)
    return found


def place(listener: socket.socket) -> str:
    """Where it listens, HOST:PORT."""
    host, port, *_ = listener.getsockname()
    return f"{f'[{host}]' if ':' in host else host}:{port}"
