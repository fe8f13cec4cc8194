"""What a host tells the router of its engines' prefix caches, and when. Pure: the agent asks for the next message and sends it.

Theory of operation. Each engine process that is followed is an *epoch*. Its words are numbered, snapshots and deltas alike. After each
join, whenever the router asks, and when something else than the blocks changed (whether they are known, why not, how large they are), comes
a snapshot, in parts, under one number. While its parts are on their way no delta of that engine is made: what changes meanwhile is kept by
the cache, where it cancels out. So nothing here grows however slow the link is. A delta that says nothing goes out after `QUIET_S`: when
the word before it was lost, its number tells.

The engines take turns, one message each, so that a large snapshot does not keep the others waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from disagg.model import EngineId
from disagg.policy.prefix import HASH_BYTES, pack
from disagg.wire.kv_events import Cache
from disagg.wire.messages import KvDelta, KvSnapshot

HASHES_PER_MESSAGE = 16_384
"""128 KiB: the router takes it into its table within milliseconds; sixty thousand are allowed."""
QUIET_S = 5.0
REASON_LIMIT = 400

_Standing = tuple[bool, str, int]


class _Told:
    """What the router was told of one engine.

    Attributes:
        cache: of the process of this epoch; None once it has ended.
        standing: what was said besides the blocks; None when a snapshot is due.
        parts: of a snapshot, still to be sent.
    """

    __slots__ = ("cache", "epoch", "parts", "said_at", "seq", "standing")

    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.epoch = self.seq = 0
        self.standing: _Standing | None = None
        self.parts: deque[KvSnapshot] = deque()
        self.said_at = float("-inf")


class Courier:
    """The machine.

    Args:
        incarnation, nonce: of the agent, see `disagg.wire.messages.Hello`.
    """

    def __init__(self, incarnation: int, nonce: str, *, hashes_per_message: int = HASHES_PER_MESSAGE) -> None:
        self._me = (incarnation, nonce)
        self._size = hashes_per_message
        self._told: dict[EngineId, _Told] = {}
        self._turns: deque[EngineId] = deque()

    def joined(self) -> None:
        """The router may know nothing, or be another one: everything is told anew."""
        for engine in self._told:
            self.resync(engine)

    def resync(self, engine: EngineId) -> None:
        """The router asks for a snapshot of this engine."""
        told = self._told.get(engine)
        if told is not None:
            told.standing = None
            told.parts.clear()

    def next(self, caches: Mapping[EngineId, Cache], *, now: float) -> KvSnapshot | KvDelta | None:
        """The next message; None when nothing is to be said. `caches`: of the engines that are followed now."""
        for engine in caches:
            if engine not in self._told:
                self._told[engine] = _Told()
                self._turns.append(engine)
        for _ in range(len(self._turns)):
            engine = self._turns[0]
            self._turns.rotate(-1)
            message = self._say(engine, caches.get(engine), now)
            if message is not None:
                return message
        return None

    def _say(self, engine: EngineId, cache: Cache | None, now: float) -> KvSnapshot | KvDelta | None:
        told = self._told[engine]
        if cache is not told.cache:
            told.cache, told.standing = cache, None
            told.parts.clear()
            if cache is not None:
                told.epoch, told.seq = told.epoch + 1, 0
        if told.parts:
            told.said_at = now
            return told.parts.popleft()
        standing = _standing(cache)
        if standing != told.standing:
            return self._snapshot(engine, told, standing, now)
        return self._delta(engine, told, now)

    def _snapshot(self, engine: EngineId, told: _Told, standing: _Standing, now: float) -> KvSnapshot:
        packed = b""
        if told.cache is not None:
            packed = pack(told.cache.snapshot())
            told.cache.skip_changes()
        told.standing, told.said_at = standing, now
        told.seq += 1
        known, reason, block_size = standing
        step = self._size * HASH_BYTES
        parts = max(1, -(-len(packed) // step))
        for part in range(parts):
            blocks = packed[part * step : (part + 1) * step]
            told.parts.append(KvSnapshot(*self._me, engine, told.epoch, told.seq, part, parts, block_size, blocks, known, reason))
        return told.parts.popleft()

    def _delta(self, engine: EngineId, told: _Told, now: float) -> KvDelta | None:
        if told.cache is None:
            return None
        changes = told.cache.take_changes(self._size)
        if not changes and now - told.said_at < QUIET_S:
            return None
        told.said_at = now
        told.seq += 1
        return KvDelta(*self._me, engine, told.epoch, told.seq, pack(changes.stored), pack(changes.removed), changes.cleared)

    def __repr__(self) -> str:
        waiting = sum(len(told.parts) for told in self._told.values())
        return f"<Courier engines={len(self._told)} parts={waiting}>"


def _standing(cache: Cache | None) -> _Standing:
    if cache is None:
        return False, "its process has ended", 0
    return cache.known, cache.reason[:REASON_LIMIT], cache.block_size
