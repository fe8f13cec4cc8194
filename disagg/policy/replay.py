"""Which failures are worth another attempt, and how many may be made at a time. Pure."""

from __future__ import annotations

from disagg.errors import DisaggError, EngineError, EngineRefusedError

REPLAYS_LIMIT = 2
SHARE = 0.2
LEAST = 3


def is_replayable(error: DisaggError) -> bool:
    """True where other engines may do better: not for the client's own faults, nor where the client or the router is leaving."""
    return isinstance(error, EngineError) and not (isinstance(error, EngineRefusedError) and 400 <= error.status < 500)


class ReplayBudget:
    """How many requests are being made again at the moment, router-wide. Source: Envoy's retry budget."""

    def __init__(self) -> None:
        self.now = 0

    def take(self, made: int, in_flight: int) -> str:
        """Takes one replay out of the budget; says why there is none, else nothing.

        Args:
            made: replays of this request so far.
            in_flight: requests in flight.
        """
        if made >= REPLAYS_LIMIT:
            return f"it was made again {made} times already"
        allowed = max(LEAST, int(SHARE * in_flight))
        if self.now >= allowed:
            return f"{self.now} requests are being made again, and no more than {allowed} may be"
        self.now += 1
        return ""

    def release(self, made: int) -> None:
        """A request ended after so many replays."""
        self.now -= made
