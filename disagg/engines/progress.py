"""Does an engine get on with its work? What ``/v1/loads`` says, read as one counter that moves and one word: there is work, or not.

``/v1/loads`` answers with success when the scheduler stands still (it is a snapshot that the HTTP process reads), so only a counter that
moves proves anything. And a counter that stands proves nothing as long as there is no work: a request that waits in a bootstrap or transfer
queue waits for its peer, and a dead peer is not this engine's fault.

A blind spot of SGLang's snapshot: its scheduler writes it after a step, so an engine that was idle and hangs in its very first step goes on
saying "idle", as does a prefill engine whose request is in the step that hangs. Who knows better, because the engine's requests came from
there, passes ``working=True`` to `Progress.seen`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

COUNTERS = ("total_prefill_uncached_tokens", "total_prefill_busy_us", "total_steps", "total_generated_tokens")
WAIT_FOR_PEER = ("prefill_bootstrap_queue_reqs", "decode_prealloc_queue_reqs", "decode_transfer_queue_reqs")
"""``prefill_inflight_queue_reqs`` waits for a peer as well, but no engine counts it among the waiting ones."""


class Progress:
    """How long an engine's counter has been standing under work. Seconds on the caller's clock.

    Args:
        longest_s: the longest step known from an earlier life of the same engine.
    """

    def __init__(self, *, longest_s: float = 0.0) -> None:
        self.longest_s = longest_s
        self._counter: int | None = None
        self._since: float | None = None  # when this counter was first seen with work; None while idle
        self._seen_at = 0.0

    def seen(self, counter: int, working: bool, now: float) -> None:
        """The engine answered.

        Args:
            counter: as `read_progress` gives it; any change is a move, for a new process begins at zero.
            working: the engine has work that only itself can do.
            now: when.
        """
        if counter != self._counter:
            self._learn()
            self._since = None
        self._counter = counter
        if not working:
            self._since = None
        elif self._since is None:
            self._since = now
        self._seen_at = now

    def missed(self, now: float) -> None:
        """The engine did not answer in time: nothing moved, and the work is what it was."""
        self._seen_at = now

    def still_s(self, now: float) -> float:
        """How long the counter has not moved although there was work all the time; 0 when idle."""
        return 0.0 if self._since is None else max(0.0, now - self._since)

    def _learn(self) -> None:
        """A gap ended with a move. It counts as far as it was watched: a watcher that slept has seen no long step."""
        if self._since is not None:
            self.longest_s = max(self.longest_s, self._seen_at - self._since)

    def __repr__(self) -> str:
        return f"<Progress counter={self._counter} {'idle' if self._since is None else 'working'} longest={self.longest_s:.2f}s>"


def read_progress(loads: Any) -> tuple[int, bool]:
    """Reads SGLang's answer to ``/v1/loads?include=core,disagg,queues``. What is missing or odd counts as nothing.

    Returns:
        The sum of everything that advances, over all data-parallel ranks; and whether there is work that waits for nobody else.
    """
    ranks = list(_ranks(loads))
    return sum(map(_counter, ranks)), any(map(_working, ranks))


def _ranks(loads: Any) -> Iterator[dict[Any, Any]]:
    listed = loads.get("loads") if isinstance(loads, dict) else None
    return (rank for rank in (listed if isinstance(listed, list) else []) if isinstance(rank, dict))


def _counter(rank: dict[Any, Any]) -> int:
    """``decode_moments`` is a list of sums in SGLang and a map of named ones in the embedded engine."""
    moments = rank.get("decode_moments")
    sums = moments.values() if isinstance(moments, dict) else moments if isinstance(moments, list) else [moments]
    return sum(_whole(rank.get(name)) for name in COUNTERS) + sum(map(_whole, sums))


def _working(rank: dict[Any, Any]) -> bool:
    """SGLang adds the queues for peers to ``num_waiting_reqs`` and leaves them out of ``queues.waiting``.

    The embedded engine counts only a decode request that waits for pages among the waiting ones, in both. The greater of the two
    differences is right for both, and never more than the truth.
    """
    disaggregation, queues = _section(rank, "disaggregation"), _section(rank, "queues")
    for_peer = sum(_whole(disaggregation.get(name)) for name in WAIT_FOR_PEER)
    by_total = _whole(rank.get("num_waiting_reqs")) - for_peer
    by_queue = _whole(queues.get("waiting")) - _whole(disaggregation.get("decode_prealloc_queue_reqs"))
    return _whole(rank.get("num_running_reqs")) > 0 or max(by_total, by_queue) > 0


def _section(rank: dict[Any, Any], name: str) -> dict[Any, Any]:
    section = rank.get(name)
    return section if isinstance(section, dict) else {}


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 0
    return int(value)
