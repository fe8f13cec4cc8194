"""Where the router's ids come from: chance, handed in as an object so that tests and simulations can hand in another."""

from __future__ import annotations

import os
from collections.abc import Callable

_BATCH_BYTES = 4096


class Ids:
    """Mints request ids and rooms.

    They come from the kernel's generator: who sees one id must not be able to guess the next.

    Args:
        entropy: returns that many random bytes.
    """

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy
        self._batch = b""
        self._at = 0

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._batch):
            self._batch, self._at = self._entropy(_BATCH_BYTES), 0
        self._at += size
        return self._batch[self._at - size : self._at]

    def request_id(self) -> str:
        """32 hex digits."""
        return self._take(16).hex()

    def room(self) -> int:
        """SGLang's ``bootstrap_room``: 63 random bits, unique per attempt. Never 0, which is the engine's own health probe."""
        return (int.from_bytes(self._take(8), "big") >> 1) or 1

    def chance(self) -> float:
        """A number in [0, 1)."""
        return int.from_bytes(self._take(6), "big") / 2**48


def engine_rid(request_id: str, serial: int) -> str:
    """The engine-side id of one prompt in one attempt: 32 hex digits that begin like the request's id, so that logs can be joined.

    Fixed width, because an engine that compares prefixes must not abort a stranger's request (CVE-2026-112266).
    """
    return f"{request_id[:24]}{serial:08x}"
