"""Pairs against unified engines, on the same traffic: what each arm's clients saw, and what an engine-hour brought. Pure.

Only streams are compared: of other answers nobody sees when the first token came. A stream is *good* when its first token and the mean of
its later ones came within the objectives. Goodput is given per engine-hour, because the arms have different numbers of engines.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec

KEPT = 2048
"""The newest streams of an arm; percentiles are theirs."""
ENOUGH = 100
"""Streams of each arm before a difference is called one."""


class Row(msgspec.Struct, frozen=True):
    """One arm, as it is shown. Times in seconds; None where nothing was seen.

    Attributes:
        arm: pairs or unified.
        streams: that ended well since the router started.
        good: of these.
        engine_hours: of the engines that served this arm.
        good_per_engine_hour: goodput.
    """

    arm: str
    streams: int
    good: int
    engine_hours: float
    good_per_engine_hour: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None


class _Arm:
    __slots__ = ("engine_s", "good", "itl", "streams", "ttft")

    def __init__(self) -> None:
        self.streams = 0
        self.good = 0
        self.engine_s = 0.0
        self.ttft: deque[float] = deque(maxlen=KEPT)
        self.itl: deque[float] = deque(maxlen=KEPT)

    def row(self, name: str) -> Row:
        hours = self.engine_s / 3600
        return Row(
            name,
            self.streams,
            self.good,
            hours,
            self.good / hours if hours > 0.0 else None,
            _quantile(self.ttft, 0.5),
            _quantile(self.ttft, 0.99),
            _quantile(self.itl, 0.5),
            _quantile(self.itl, 0.99),
        )


class Comparison:
    """Both arms.

    Args:
        ttft_s, itl_s: the objectives.
    """

    __slots__ = ("_at", "_itl_s", "_pairs", "_ttft_s", "_unified")

    def __init__(self, ttft_s: float, itl_s: float) -> None:
        self._ttft_s = ttft_s
        self._itl_s = itl_s
        self._pairs = _Arm()
        self._unified = _Arm()
        self._at = math.inf

    def ended(self, *, unified: bool, ttft_s: float, itl_s: float) -> None:
        """A stream ended well.

        Args:
            unified: it was served by a unified engine.
            ttft_s: from the request's coming to its first token.
            itl_s: the mean of the pauses after that; 0 for one token.
        """
        arm = self._unified if unified else self._pairs
        arm.streams += 1
        arm.good += ttft_s <= self._ttft_s and itl_s <= self._itl_s
        arm.ttft.append(ttft_s)
        arm.itl.append(itl_s)

    def tick(self, paired: int, unified: int, *, now: float) -> None:
        """So many engines were ready since the last tick."""
        seconds = max(0.0, now - self._at)
        self._at = now
        self._pairs.engine_s += paired * seconds
        self._unified.engine_s += unified * seconds

    def rows(self) -> tuple[Row, Row]:
        """Pairs, then unified."""
        return self._pairs.row("pairs"), self._unified.row("unified")

    def verdict(self) -> str:
        """Which arm brought more, one sentence."""
        pairs, unified = self.rows()
        few = [f"{row.streams} streams of {row.arm}" for row in (pairs, unified) if row.streams < ENOUGH]
        if few:
            return f"too little was seen to compare: {' and '.join(few)}, {ENOUGH} of each are wanted"
        mine, other = pairs.good_per_engine_hour or 0.0, unified.good_per_engine_hour or 0.0
        if not mine and not other:
            return "neither pairs nor unified engines served anybody within the objectives"
        better, worse = ("pairs", other / mine) if mine >= other else ("unified engines", mine / other)
        if worse > 1 - _noise(pairs, unified):
            return f"pairs and unified engines bring the same within what {pairs.streams + unified.streams} streams can tell"
        return (
            f"{better} bring {1 / worse:.2f} times as many good streams per engine-hour" if worse else f"only {better} bring good streams"
        )


def _noise(*rows: Row) -> float:
    """Two standard errors of the ratio, if streams came at random."""
    return 2 * math.sqrt(sum(1 / max(1, row.good) for row in rows))


def _quantile(values: Sequence[float] | deque[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
