"""Which engine holds which prefix: the hash that names a block of tokens, and the router's table of what is where. Pure.

A block is named by what it holds and by all that comes before it: its hash is made of its parent's hash and its own tokens. Agents make
these hashes of what their engines store, the router makes them of a prompt; the tokens themselves never leave either. A salt or an adapter
changes the root of the chain, so that equal tokens of another tenant are other blocks.

The table follows each engine through what its agent says: a *snapshot*, in parts, and then numbered *deltas*. Both are numbered together;
a number that is missing makes the engine's cache unknown until the next snapshot, which is asked for, once a second at most. What is older
than what is known, by life (the agent's incarnation, the engine's epoch) or number, changes nothing.

Where a prompt comes as token ids the router names its blocks itself (`Ids`), and the table says how much of it an engine holds. Of text it
says nothing: only the engine knows the tokens of it.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from hashlib import blake2b
from sys import byteorder

import msgspec

from disagg.model import EngineId
from disagg.wire.messages import KvDelta, KvSnapshot

ROOT = 0
BLOCKS_LIMIT = 4_000_000
"""Per engine; beyond it nothing is kept. The router needs about 100 bytes for each block, in one set of ints."""
PARTS_LIMIT = 4096
RESYNC_S = 1.0
HASH_BYTES = 8
_HEAD = 16
IDS_NAMED = 16_384
"""Of one prompt: naming a page of 16 takes a microsecond."""

Life = tuple[int, int]
"""The incarnation of the agent that speaks, and its epoch of the engine: what is greater is newer."""


# --- names of blocks


def root_hash(salt: str = "", adapter: str = "") -> int:
    """What stands for the parent of a first block: 0 unless a cache salt or an adapter sets it apart."""
    if not salt and not adapter:
        return ROOT
    words = [word.encode("utf-8", "surrogatepass") for word in (salt, adapter)]
    content = b"".join(len(word).to_bytes(8, "big") + word for word in words)
    return int.from_bytes(blake2b(content, digest_size=HASH_BYTES).digest(), "big")


def block_hash(parent: int, tokens: Sequence[int]) -> int:
    """The name of a block: 64 bits of BLAKE2b over its parent's 8 bytes (big-endian) and its token ids (little-endian, 4 bytes each).

    Raises:
        struct.error: a token id is no number of 32 bits.
    """
    content = struct.pack(f"<{len(tokens)}I", *tokens)
    return int.from_bytes(blake2b(parent.to_bytes(HASH_BYTES, "big") + content, digest_size=HASH_BYTES).digest(), "big")


def hashes(tokens: Sequence[int], block_size: int, salt: str = "", adapter: str = "") -> list[int]:
    """The names of a prompt's blocks, the first one first; an incomplete block at the end has none.

    Args:
        tokens: token ids, shape (n,).
        block_size: tokens in a block, the engine's page size.
        salt: of the request, as SGLang's ``cache_salt``.
        adapter: the name of the request's LoRA adapter.

    Returns:
        n // block_size hashes.
    """
    found = []
    parent = root_hash(salt, adapter)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = block_hash(parent, tokens[start : start + block_size])
        found.append(parent)
    return found


def pack(names: Iterable[int]) -> bytes:
    """Hashes as they travel: 8 bytes each, big-endian."""
    packed = array("Q", names)
    if byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> array[int]:
    """The way back.

    Raises:
        ValueError: these are not whole hashes.
    """
    found = array("Q")
    found.frombytes(packed)
    if byteorder == "little":
        found.byteswap()
    return found


class Ids:
    """The token ids of a prompt. Its blocks are named as far as somebody asks: a prompt that nobody holds costs one name.

    Args:
        tokens: its ids; the first `IDS_NAMED` are kept.
        count: how many it has in all.

    Attributes:
        count: how many it has in all.
        kept: of how many of them something can be said.
        head: how it begins: prompts that share less than this share nothing that is worth a look.

    Raises:
        OverflowError: a token id is no number of 32 bits.
    """

    __slots__ = ("_names", "_packed", "count", "head", "kept")

    def __init__(self, tokens: Sequence[int], count: int | None = None) -> None:
        packed = array("I", tokens[:IDS_NAMED])
        if byteorder == "big":
            packed.byteswap()
        self.kept = len(packed)
        self.count = len(tokens) if count is None else count
        self._packed = packed.tobytes()
        self.head = self._packed[: 4 * _HEAD]
        self._names: dict[int, list[int]] = {}  # by block size, the first block first

    def held(self, blocks: AbstractSet[int], block_size: int) -> int:
        """How many of its leading tokens are in these blocks."""
        names = self._names.setdefault(block_size, [])
        for count, name in enumerate(names):
            if name not in blocks:
                return count * block_size
        count, packed, step = len(names), self._packed, 4 * block_size
        digest = (names[-1] if names else ROOT).to_bytes(HASH_BYTES, "big")
        for start in range(count * step, len(packed) - step + 1, step):
            digest = blake2b(digest + packed[start : start + step], digest_size=HASH_BYTES).digest()  # as `block_hash` does it
            name = int.from_bytes(digest, "big")
            names.append(name)
            if name not in blocks:
                break
            count += 1
        return count * block_size

    def shared(self, other: Ids) -> int:
        """With how many tokens both begin."""
        mine, others = self._packed, other._packed
        low, high = 0, min(self.kept, other.kept)
        while low < high:
            middle = (low + high + 1) // 2
            if mine[4 * low : 4 * middle] == others[4 * low : 4 * middle]:
                low = middle
            else:
                high = middle - 1
        return low

    def __repr__(self) -> str:
        return f"<Ids {self.count}>"  # without the tokens: they are a prompt


# --- who holds what


class Standing(msgspec.Struct, frozen=True):
    """What is known of one engine's cache.

    Attributes:
        known: `blocks` is all that it holds.
        block_size: tokens in a block; 0 before it stored one.
        reason: why it is not known; empty when it is.
    """

    known: bool
    blocks: int
    block_size: int
    reason: str


class _Parts:
    """A snapshot that is still coming; each part is unpacked as it comes, so that the last one does not hold up the router."""

    __slots__ = ("blocks", "expected", "found", "life", "seq")

    def __init__(self, life: Life, seq: int, expected: int) -> None:
        self.life = life
        self.seq = seq
        self.expected = expected
        self.found: set[int] = set()
        self.blocks: set[int] = set()

    def add(self, part: int, packed: bytes) -> None:
        if part not in self.found:
            self.found.add(part)
            self.blocks.update(unpack(packed))

    @property
    def complete(self) -> bool:
        return len(self.found) == self.expected


class _Entry:
    """What an agent has said of one engine.

    Attributes:
        seq: the number of the last word that counted.
        synced: the next number continues what is here; False until a snapshot has come.
        cleared: how often it was told to be emptied.
    """

    __slots__ = ("asked_at", "block_size", "blocks", "cleared", "known", "life", "parts", "reason", "seq", "synced")

    def __init__(self) -> None:
        self.life: Life = (-1, -1)
        self.seq = -1
        self.synced = False
        self.known = False
        self.reason = "its host has not said yet what it holds"
        self.block_size = 0
        self.blocks: set[int] = set()
        self.parts: _Parts | None = None
        self.asked_at = float("-inf")
        self.cleared = 0

    def lose(self, reason: str) -> None:
        """What it holds is not known until the next snapshot."""
        self.synced = self.known = False
        self.reason = reason
        self.blocks = set()
        self.parts = None

    def refuse(self, reason: str) -> None:
        """It is too much to be kept, and asking again would not make it less."""
        self.lose(reason)
        self.synced = True


def _held(entry: _Entry, ids: Ids) -> int:
    return ids.held(entry.blocks, entry.block_size) if entry.blocks and entry.block_size else 0


def _life(message: KvSnapshot | KvDelta) -> Life:
    return message.incarnation, message.epoch


class PrefixIndex:
    """The router's table. Fed with what agents say; whether an agent may speak for an engine was decided before.

    Args:
        limit: blocks kept per engine.

    Attributes:
        counts: ``gaps``: words of an agent that were missed; ``resyncs``: snapshots that were asked for; ``refused``: caches too large.
    """

    def __init__(self, limit: int = BLOCKS_LIMIT) -> None:
        self._limit = limit
        self._entries: dict[EngineId, _Entry] = {}
        self.counts: Counter[str] = Counter(gaps=0, resyncs=0, refused=0)

    # --- what agents say

    def take_snapshot(self, message: KvSnapshot) -> None:
        """A part of a snapshot; it counts when all parts are there.

        Raises:
            ValueError: it makes no sense; nothing was changed.
        """
        if not message.part < message.parts <= PARTS_LIMIT or len(message.blocks) % HASH_BYTES:
            raise ValueError("a part of a snapshot makes no sense")
        entry = self._entries.setdefault(message.engine, _Entry())
        life, seq = _life(message), message.seq
        coming = entry.parts
        if (life, seq) <= (entry.life, entry.seq) or (coming is not None and (life, seq) < (coming.life, coming.seq)):
            return
        if coming is None or (coming.life, coming.seq, coming.expected) != (life, seq, message.parts):
            coming = entry.parts = _Parts(life, seq, message.parts)
        coming.add(message.part, message.blocks)
        if len(coming.blocks) > self._limit:
            self._refuse(entry, life, seq)
        elif coming.complete:
            self._replace(entry, coming, message)

    def _replace(self, entry: _Entry, parts: _Parts, last: KvSnapshot) -> None:
        entry.parts = None
        entry.blocks = parts.blocks if last.known else set()
        entry.life, entry.seq = parts.life, parts.seq
        entry.synced, entry.known = True, last.known
        entry.reason = "" if last.known else last.reason or "its host does not know what it holds"
        entry.block_size = last.block_size

    def take_delta(self, message: KvDelta, *, now: float) -> bool:
        """What changed.

        Returns:
            True when a snapshot must be asked for: something before this was missed.

        Raises:
            ValueError: it makes no sense; nothing was changed.
        """
        if len(message.stored) % HASH_BYTES or len(message.removed) % HASH_BYTES:
            raise ValueError("a delta makes no sense")
        entry = self._entries.setdefault(message.engine, _Entry())
        life, seq = _life(message), message.seq
        if (life, seq) <= (entry.life, entry.seq) and entry.synced:
            return False
        if entry.parts is not None and (life, seq) < (entry.parts.life, entry.parts.seq):
            return False
        if not entry.synced or life != entry.life or seq != entry.seq + 1:
            return self._missed(entry, now)
        entry.seq = seq
        entry.cleared += message.cleared
        if entry.known:
            self._change(entry, message)
        return False

    def _change(self, entry: _Entry, delta: KvDelta) -> None:
        if delta.cleared:
            entry.blocks.clear()
        entry.blocks.difference_update(unpack(delta.removed))
        entry.blocks.update(unpack(delta.stored))
        if len(entry.blocks) > self._limit:
            self._refuse(entry, entry.life, entry.seq)

    def _refuse(self, entry: _Entry, life: Life, seq: int) -> None:
        self.counts["refused"] += 1
        entry.refuse(f"it holds more than the {self._limit:,} blocks that this router keeps of one engine")
        entry.life, entry.seq = life, seq

    def _missed(self, entry: _Entry, now: float) -> bool:
        if entry.synced:
            self.counts["gaps"] += 1
            entry.lose("a word of its host was missed")
        entry.parts = None
        if now - entry.asked_at < RESYNC_S:
            return False
        entry.asked_at = now
        self.counts["resyncs"] += 1
        return True

    # --- what the router knows itself

    def lose(self, engine: EngineId, reason: str) -> None:
        """The engine's process is gone, or was replaced: whoever goes on speaking of it is asked for a snapshot."""
        entry = self._entries.get(engine)
        if entry is not None:
            entry.lose(reason)

    def forget(self, engine: EngineId) -> None:
        """The engine does not belong to the cluster any more."""
        self._entries.pop(engine, None)

    # --- what is asked

    def held(self, engine: EngineId, names: Iterable[int]) -> int:
        """How many leading blocks of a prompt the engine holds; 0 where that is not known."""
        entry = self._entries.get(engine)
        count = 0
        if entry is not None and entry.known:
            for name in names:
                if name not in entry.blocks:
                    break
                count += 1
        return count

    def leading(self, ids: Ids, only: EngineId | None = None) -> dict[EngineId, tuple[int, int]]:
        """How many leading tokens of a prompt each engine holds, and its block size; those of which that is not known are left out.

        Args:
            ids: of a prompt without salt and adapter.
            only: the engine that is asked for; None for all.
        """
        if only is None:
            return {e: (_held(entry, ids), entry.block_size) for e, entry in self._entries.items() if entry.known}
        entry = self._entries.get(only)
        return {only: (_held(entry, ids), entry.block_size)} if entry is not None and entry.known else {}

    def tokens(self, engine: EngineId) -> int | None:
        """How many tokens an engine holds; None where that is not known."""
        entry = self._entries.get(engine)
        return len(entry.blocks) * entry.block_size if entry is not None and entry.known else None

    def cleared(self, engine: EngineId) -> int:
        """How often the engine's cache was emptied while its host could be heard.

        Only what is certain counts. A missed word, a gap in the engine's events or a snapshot tell nothing of what the engine gave up: it
        went on as before, and only what is known of it is poor. Of another process its pid tells.
        """
        entry = self._entries.get(engine)
        return 0 if entry is None else entry.cleared

    def speaks(self, engine: EngineId) -> bool:
        """Something was said of this engine's cache."""
        return engine in self._entries

    @property
    def is_told(self) -> bool:
        """Of an engine at least it is known what it holds."""
        return any(entry.known for entry in self._entries.values())

    def standing(self, engine: EngineId) -> Standing | None:
        """What is known of an engine's cache; None for one that publishes nothing."""
        entry = self._entries.get(engine)
        return None if entry is None else Standing(entry.known, len(entry.blocks), entry.block_size, entry.reason)

    def engines(self) -> dict[EngineId, Standing]:
        """The engines that publish."""
        return {e: s for e in sorted(self._entries) if (s := self.standing(e)) is not None}

    def check(self) -> None:
        """Asserts what is always true."""
        for entry in self._entries.values():
            assert entry.synced or not entry.known
            assert entry.known or not entry.blocks
            assert entry.known == (not entry.reason)
            assert len(entry.blocks) <= self._limit
            assert entry.parts is None or (not entry.parts.complete and len(entry.parts.blocks) <= self._limit)

    def __repr__(self) -> str:
        known = sum(entry.known for entry in self._entries.values())
        return f"<PrefixIndex engines={len(self._entries)} known={known} {dict(self.counts)}>"
