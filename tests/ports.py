"""Free ports on loopback."""

from __future__ import annotations

import random
import socket
from pathlib import Path

FIRST = 15_000
_given: set[int] = set()


def free_port() -> int:
    """A port that was free a moment ago, and that nobody gets by chance: the kernel takes none from below its range for connections.

    Never the same one twice.
    """
    while True:
        port = random.randrange(FIRST, _first_ephemeral())
        if port in _given:
            continue
        _given.add(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _first_ephemeral() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
