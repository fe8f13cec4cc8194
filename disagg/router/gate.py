"""Who may connect to the public listener, and when a request comes too slowly. Pure.

Files are counted by their numbers: the kernel gives the lowest free one, so a connection that gets number N says that N files are open,
whoever opened them. Of all that the process may open, clients get the first four fifths and connections to engines a tenth more; the rest
stays for the control plane, the probes and the admin listener.
"""

from __future__ import annotations

import ipaddress
from collections import Counter

CLIENT_SHARE = 0.8
ENGINE_SHARE = 0.9
FAREWELL_SHARE = 0.05
FAREWELLS_LIMIT = 64

HEAD_LIMIT_S = 10.0
BODY_LIMIT_S = 30.0
BODY_GRACE_S = 5.0
BODY_RATE = 1024
"""Bytes per second that a body must bring, after the grace."""
CHUNKS_LIMIT = 16_384
"""HTTP chunks of one body: 16 MiB in chunks of 1 KiB."""

_NETWORK_BITS = 64  # one customer of an IPv6 provider has at least as many addresses


class Gate:
    """Counts connections.

    Args:
        per_address: how many one address may have; loopback may have any number, for a reverse proxy on this host speaks for many clients.
        file_limit: how many files the process may open.

    Attributes:
        refused: how many connections were refused, by reason.
    """

    def __init__(self, *, per_address: int, file_limit: int) -> None:
        self.refused: Counter[str] = Counter()
        self.files = int(file_limit * CLIENT_SHARE)
        self.farewells = max(1, min(FAREWELLS_LIMIT, int(file_limit * FAREWELL_SHARE)))
        self._per_address = per_address
        self._open: Counter[str] = Counter()

    def enter(self, address: str, file: int) -> str:
        """A connection arrived.

        Args:
            address: of the peer, as a socket names it; empty where it has none.
            file: the number of its file.

        Returns:
            Why it is refused: ``files`` or ``address``; empty if it may stay, and then `leave` must be called with the same address.
        """
        reason = "files" if file >= self.files else ""
        key = _counted_as(address)
        if not reason and key:
            if self._open[key] < self._per_address:
                self._open[key] += 1
            else:
                reason = "address"
        if reason:
            self.refused[reason] += 1
        return reason

    def leave(self, address: str) -> None:
        """A connection that was let in is gone."""
        key = _counted_as(address)
        if not key:
            return
        self._open[key] -= 1
        if self._open[key] <= 0:
            del self._open[key]

    def __repr__(self) -> str:
        return f"<Gate addresses={len(self._open)} open={self._open.total()} refused={self.refused.total()}>"


def _counted_as(address: str) -> str:
    """The address, or its network for IPv6; empty for what is not counted."""
    address = address.removeprefix("::ffff:").partition("%")[0]
    if not address or address == "::1" or address.startswith("127."):
        return ""
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Network((address, _NETWORK_BITS), strict=False).network_address)


def body_due_s(size: int) -> float:
    """How long after its beginning the next bytes of a body must be here.

    Args:
        size: bytes that have come so far.
    """
    return min(BODY_LIMIT_S, max(BODY_GRACE_S, size / BODY_RATE))
