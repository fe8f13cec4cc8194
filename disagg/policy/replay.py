"""Which failures are made good by another attempt, on which engines, and how many attempts may be made again at a time. Pure.

A request that fails is sent anew where the fault was an engine's, to other engines. What would fail everywhere is not: the request's own
fault, the client's leaving, its deadline, the router's stop. Every replay is load on engines that have just become fewer, so at most
max(`FLOOR`, `SHARE` of the requests in flight) run at a time, and one request is replayed at most `PER_REQUEST` times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable
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
from disagg.model import ClusterView, EngineAddress, EngineId, EngineView

PER_REQUEST = 2
FLOOR = 3
SHARE = 0.2
SAME_AGAIN_S = 1.0
"""How long an engine that failed a request is left alone by it where there is no other one."""


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


class Avoided:
    """The engines that failed one request, as they were then: one that was started anew since is another one. False if there are none."""

    __slots__ = ("_engines", "_pairs")

    def __init__(self) -> None:
        self._engines: dict[EngineId, tuple[EngineAddress, float]] = {}  # and when
        self._pairs: list[tuple[EngineView, EngineView]] = []

    def __bool__(self) -> bool:
        return bool(self._engines)

    def add(self, engines: Iterable[EngineView], now: float, *, pair: tuple[EngineView, EngineView] | None = None) -> None:
        """These failed it; `pair`: their handoff did, so that either may be well with another partner."""
        for engine in engines:
            self._engines[engine.id] = (engine.address, now)
        if pair is not None:
            self._pairs.append(pair)

    def options(self, view: ClusterView, now: float, *, others_only: bool) -> list[Collection[EngineId]]:
        """Sets of engines that are not to be asked; the first one that leaves somebody who can serve is to be kept to.

        The first has all that failed it. Then one side of the pairs that failed may be asked with another partner: prefill, or else decode.
        At last only those are left alone that failed it just now.

        Args:
            view: the engines as they are.
            now: monotonic seconds.
            others_only: leaves out the last set: the same engines would do the same again.
        """
        there = {e.id: e.address for e in view.engines}
        same = {e for e, (address, _) in self._engines.items() if there.get(e) == address}
        options: list[Collection[EngineId]] = [same]
        if self._pairs:
            prefills, decodes = ({e.id for e in side if there.get(e.id) == e.address} for side in zip(*self._pairs, strict=True))
            options += [(same - prefills) | decodes, (same - decodes) | prefills]
        if not others_only:
            options.append({e for e in same if now - self._engines[e][1] < SAME_AGAIN_S})
        return options

    def next_change(self, now: float) -> float | None:
        """When the last of the `options` is another one, monotonic seconds; None if it stays."""
        return min((at + SAME_AGAIN_S for _, at in self._engines.values() if at + SAME_AGAIN_S > now), default=None)

    def __repr__(self) -> str:
        return f"<Avoided engines={len(self._engines)} pairs={len(self._pairs)}>"


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
