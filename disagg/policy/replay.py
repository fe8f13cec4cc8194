"""Which failures are made good by another attempt, who is blamed for them, and how many attempts may be made again at a time. Pure.

A request that fails is sent anew where the fault was an engine's, to other engines. What would fail everywhere is not: the request's own
fault, the client's leaving, its deadline, the router's stop. Every replay is load on engines that have just become fewer, so at most
max(`FLOOR`, `SHARE` of the requests in flight) run at a time, and one request is replayed at most `PER_REQUEST` times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from enum import StrEnum

import msgspec

from disagg.errors import (
    ClientGoneError,
    DeadlineError,
    DisaggError,
    EngineError,
    EngineRefusedError,
    EngineTimeoutError,
    NoCapacityError,
    RequestError,
)

PER_REQUEST = 2
FLOOR = 3
SHARE = 0.2


class Blame(StrEnum):
    """Whose fault a failure was, as far as the router can see."""

    NOBODY = "nobody"
    ENGINE = "engine"
    PAIR = "pair"


class Verdict(msgspec.Struct, frozen=True):
    """What a failure means.

    Attributes:
        replay: another attempt, on other engines, may succeed.
        blame: ENGINE is the one whose leg failed; PAIR is either of both, or the link between them.
        why: a few words for logs and stories.
    """

    replay: bool
    blame: Blame
    why: str


def judge(error: DisaggError, *, paired: bool, first_token_seen: bool) -> Verdict:
    """What a failed attempt means. The first row that fits counts.

    Args:
        error: how the attempt, or its leg, ended.
        paired: two engines took part.
        first_token_seen: the handoff was over: decode alone was at work.
    """
    for kind, statuses, replay, blame, why in _ROWS:
        if isinstance(error, kind) and (statuses is None or error.status in statuses):
            only_pair = blame is Blame.PAIR and (not paired or first_token_seen)
            return Verdict(replay, Blame.ENGINE if only_pair else blame, why)
    return Verdict(replay=False, blame=Blame.NOBODY, why="a fault of the router's")


_ROWS: tuple[tuple[type[DisaggError], Container[int] | None, bool, Blame, str], ...] = (
    (ClientGoneError, None, False, Blame.NOBODY, "the client left"),
    (RequestError, None, False, Blame.NOBODY, "the request's own fault"),
    (DeadlineError, None, False, Blame.NOBODY, "the client's deadline passed"),
    (NoCapacityError, None, False, Blame.NOBODY, "no engine can take it, or the router stops"),
    (EngineRefusedError, frozenset({429, 503}), True, Blame.ENGINE, "the engine is busy"),
    (EngineRefusedError, range(400, 500), False, Blame.NOBODY, "the engine refused the content"),
    (EngineRefusedError, None, True, Blame.PAIR, "the engine failed"),
    (EngineTimeoutError, None, True, Blame.PAIR, "a deadline passed"),
    (EngineError, None, True, Blame.ENGINE, "the connection failed or brought garbage"),
)
"""Kind, statuses (None for all), replayed, who is blamed (PAIR as long as two engines are at work), why."""


class ReplayBudget:
    """How many replays run.

    Args:
        per_request: how often one request may be replayed.
        floor: so many may run however few requests are in flight.
        share: of the requests in flight.

    Attributes:
        running: replays that run now.
        refused: by why: ``request`` or ``budget``.
    """

    __slots__ = ("_floor", "_per_request", "_share", "refused", "running")

    def __init__(self, *, per_request: int = PER_REQUEST, floor: int = FLOOR, share: float = SHARE) -> None:
        self.running = 0
        self.refused: Counter[str] = Counter()
        self._per_request = per_request
        self._floor = floor
        self._share = share

    def take(self, *, replayed: int, in_flight: int) -> str:
        """Asks for one replay; it is to be given back when it ends, however it ends.

        Args:
            replayed: how often this request was replayed before.
            in_flight: requests that run or wait at the moment, this one among them.

        Returns:
            Nothing when it may be; else why not, one sentence.
        """
        if replayed >= self._per_request:
            self.refused["request"] += 1
            return f"it was replayed {replayed} times already"
        most = max(self._floor, int(in_flight * self._share))
        if self.running >= most:
            self.refused["budget"] += 1
            return f"{self.running} other requests are being replayed, and more than {most} at a time would make bad things worse"
        self.running += 1
        return ""

    def give_back(self) -> None:
        """A replay that was granted has ended."""
        assert self.running > 0
        self.running -= 1

    def __repr__(self) -> str:
        return f"<ReplayBudget running={self.running} refused={self.refused.total()}>"
