"""SGLang's stream of KV events: its batches, and the machine that keeps what one engine's prefix cache holds.

Theory of operation. An engine publishes numbered batches of events, from 0, for as long as its process lives. A subscriber may miss some:
it came late, or a queue was full. The engine keeps its last batches (10,000) and says them again from a number on. `Cache` applies the
batches in order, each once:

               AskReplay(0)                 the next one
    (begins) ──────────────► CATCHING_UP ──────────────► FOLLOWING ──┐ the next one: applied
                                  ▲  what comes live is held         │ an older one: ignored
                                  └──────────────────────────────────┘ a later one: a gap; nothing came for a while: was there a last one?

A replay may have holes of its own: the engine's socket drops what does not fit into its queue, but never the first thousand, so each replay
makes progress and the machine asks again from the hole. When a replay begins later than asked, or makes no progress, what is missing is
gone: the cache is *lost*. It holds nothing then and says why, and the events are only read for the next AllBlocksCleared, after which all
is known again. It is also lost when a block comes whose parent is not known, when a batch cannot be read, and when there are too many
blocks. Each process has a `Cache` of its own. Should its keeper be late: a batch with an older number and a later time is the first word
of another process, and everything begins anew.

A block is held while any medium (GPU, CPU_PINNED, ...) holds it. Engines name blocks in their own way; here each is named by
`disagg.policy.prefix.block_hash` of its tokens, and the tokens are forgotten at once: they are prompts. Two blocks of an engine may have
one name here, where it keeps apart what looks the same to us; the name is held as long as one of them is.

There is no clock in it: `QuietSeen`, `ReplayEnded` and `ReplayFailed` are how time comes in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum
from typing import Annotated

import msgspec

from disagg.policy.prefix import BLOCKS_LIMIT, block_hash, root_hash
from disagg.wire.codec import FrameError

PAYLOAD_LIMIT = 64 * 1024 * 1024
"""Bytes of a batch. A prompt of 128,000 tokens is one of 26 MB where pages are single tokens."""
HELD_BYTES_LIMIT = 8 * 1024 * 1024
"""Of batches that came while a replay was under way; decoded they take ten times as much. The rest is asked for again."""
MEDIA_LIMIT = 8
REPLAY_TRIES = 3
HISTORY_LIMIT = 64
END = (2**64 - 1).to_bytes(8, "big")
"""The number that ends a replay, -1."""

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Token = int | tuple[int, int]
"""Speculative engines publish each token with its follower; the token itself is what names the block, which is good enough for a hint."""


class EventsError(FrameError):
    """A batch that cannot be read. The sentence never quotes it: it holds prompts."""


class BlockStored(msgspec.Struct, frozen=True, tag_field="type", tag="BlockStored"):
    """Blocks, each the parent of the next, are held in a medium now. `token_ids` are those of all of them, `block_size` in each."""

    block_hashes: list[int]
    token_ids: list[Token]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    parent_block_hash: int | None = None
    lora_id: int | Text | None = None
    lora_name: Text | None = None
    cache_salt: Text | None = None
    medium: Text | None = None

    def __repr__(self) -> str:
        return f"<BlockStored {len(self.block_hashes)} blocks>"  # without the tokens


class BlockRemoved(msgspec.Struct, frozen=True, tag_field="type", tag="BlockRemoved"):
    """Blocks are no longer held in a medium."""

    block_hashes: list[int]
    medium: Text | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag_field="type", tag="AllBlocksCleared"):
    """Nothing is held anywhere."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True):
    """What an engine published at once.

    Attributes:
        at: when, by the engine's wall clock, seconds.
        events: those that this release knows, in order.
        size: bytes it came in.
        unknown: how many events are of another kind.
    """

    at: float
    events: tuple[KvEvent, ...]
    size: int = 0
    unknown: int = 0


class _Payload(msgspec.Struct, frozen=True, array_like=True):
    at: float
    events: tuple[KvEvent, ...]


class _RawPayload(msgspec.Struct, frozen=True, array_like=True):
    at: float
    events: tuple[msgspec.Raw, ...]


class _Kind(msgspec.Struct, frozen=True):
    type: str


_KINDS = {kind.__name__ for kind in (BlockStored, BlockRemoved, AllBlocksCleared)}
_payload = msgspec.msgpack.Decoder(_Payload)
_raw_payload = msgspec.msgpack.Decoder(_RawPayload)
_kind = msgspec.msgpack.Decoder(_Kind)
_event: msgspec.msgpack.Decoder[KvEvent] = msgspec.msgpack.Decoder(KvEvent)


def read_batch(frames: Sequence[bytes]) -> tuple[int, Batch] | None:
    """A message of an engine, live or replayed: topic, number, payload; its number and what it holds. None for the end of a replay.

    Raises:
        EventsError: it is none.
    """
    if len(frames) != 3 or len(frames[1]) != 8:
        raise EventsError("a message about KV events is not one of topic, number and payload")
    if frames[1] == END:
        return None
    payload = frames[2]
    if len(payload) > PAYLOAD_LIMIT:
        raise EventsError(f"a batch of KV events of {len(payload)} bytes is over the limit of {PAYLOAD_LIMIT}")
    batch = _read_payload(payload)
    if any(_is_odd(event) for event in batch.events):
        raise EventsError("a batch of KV events holds blocks without tokens, or tokens that are none")
    return int.from_bytes(frames[1], "big"), batch


def _read_payload(payload: bytes) -> Batch:
    try:
        found = _payload.decode(payload)
    except msgspec.ValidationError:  # it may hold a kind of event that this release does not know
        return _read_one_by_one(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EventsError("a batch of KV events is not valid msgpack") from None
    return Batch(found.at, found.events, len(payload))


def _read_one_by_one(payload: bytes) -> Batch:
    try:
        found = _raw_payload.decode(payload)
        known = [raw for raw in found.events if _kind.decode(raw).type in _KINDS]
        events = tuple(_event.decode(raw) for raw in known)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EventsError("a batch of KV events holds something that is no event") from None
    return Batch(found.at, events, len(payload), len(found.events) - len(known))


def _is_odd(event: KvEvent) -> bool:
    if not isinstance(event, BlockStored):
        return False
    full, size = len(event.block_hashes) - 1, event.block_size
    return not full * size < len(event.token_ids) <= (full + 1) * size or not all(0 <= _plain(t) < 2**32 for t in event.token_ids)


def _plain(token: Token) -> int:
    return token if isinstance(token, int) else token[0]


# --- events and commands of the machine


class Began(msgspec.Struct, frozen=True):
    """Somebody follows the engine from now on."""


class BatchSeen(msgspec.Struct, frozen=True):
    """A batch came live."""

    seq: int
    batch: Batch


class ReplaySeen(msgspec.Struct, frozen=True):
    """A batch came in answer to `AskReplay`."""

    seq: int
    batch: Batch


class ReplayEnded(msgspec.Struct, frozen=True):
    """The answer is complete."""


class ReplayFailed(msgspec.Struct, frozen=True):
    """The answer did not come, or did not end, in time."""


class QuietSeen(msgspec.Struct, frozen=True):
    """Nothing came for a while: the last batch may have been lost."""


class Spoiled(msgspec.Struct, frozen=True):
    """Something came that cannot be read."""

    why: str


class Dropped(msgspec.Struct, frozen=True):
    """The engine is known to have emptied its cache, as it does when it switches roles, whether it says so or not."""


class AskReplay(msgspec.Struct, frozen=True):
    """Ask for the batches from this number on; an earlier request that is still under way is void."""

    start: int


Event = Began | BatchSeen | ReplaySeen | ReplayEnded | ReplayFailed | QuietSeen | Spoiled | Dropped


class Changes(msgspec.Struct, frozen=True):
    """What changed since it was last asked: everything went if `cleared`, then `removed` went, then `stored` came. Our hashes."""

    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    cleared: bool = False

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed or self.cleared)


class State(StrEnum):
    """Where a cache is in its stream."""

    CATCHING_UP = "catching_up"
    FOLLOWING = "following"


class Cache:
    """What one engine's prefix cache holds, by what its process says.

    Args:
        limit: blocks; with more the cache is lost.

    Attributes:
        reason: why it is not known what the cache holds; empty when it is.
        block_size: tokens in a block; 0 before one was stored.
        counts: ``gaps``, ``duplicates``, ``orphans`` (blocks without a known parent), ``losses``,
            ``unknown`` events, ``unanswered`` requests for replays.
    """

    def __init__(self, limit: int = BLOCKS_LIMIT) -> None:
        self._limit = limit
        self._state = State.CATCHING_UP
        self._next = 0
        self._newest_at = float("-inf")
        self._begun = False  # everything from the first batch on is here
        self._lost = False
        self._held: dict[int, Batch] = {}
        self._held_bytes = 0
        self._tries = 0
        self._applied_in_answer = 0
        self._missed_before = False  # something that is missing was published before the answer that is under way was asked for
        self._ours: dict[int, int] = {}  # the engine's name of a block -> ours
        self._media: dict[str, set[int]] = {}  # medium -> the engine's names of what it holds
        self._names: set[int] = set()  # ours, of everything that is held
        self._twins: Counter[int] = Counter()  # ours -> how many more of the engine's blocks have it
        self._stored: set[int] = set()
        self._removed: set[int] = set()
        self._cleared = False
        self.reason = "its engine has not been heard yet"
        self.block_size = 0
        self.counts: Counter[str] = Counter()
        self.history: deque[str] = deque(maxlen=HISTORY_LIMIT)

    @property
    def known(self) -> bool:
        """Whether `snapshot` is all that the engine holds, as of the last batch."""
        return not self.reason

    def snapshot(self) -> AbstractSet[int]:
        """Our hashes of what is held; empty when that is not known. It is not a copy: who wants to keep it makes one."""
        return self._names if self.known else frozenset()

    def take_changes(self, limit: int) -> Changes:
        """What changed since the last call or `skip_changes`, without what cancelled out; at most so many hashes, the rest later."""
        removed = _take(self._removed, limit)
        stored = _take(self._stored, limit - len(removed))
        cleared, self._cleared = self._cleared, False
        return Changes(stored, removed, cleared)

    def skip_changes(self) -> None:
        """A snapshot tells it all."""
        self._stored.clear()
        self._removed.clear()
        self._cleared = False

    # --- the machine

    def handle(self, event: Event) -> list[AskReplay]:
        """Takes an event and returns what to do about it."""
        commands: list[AskReplay] = []
        match event:
            case BatchSeen(seq=seq, batch=batch):
                commands = self._live(seq, batch)
            case ReplaySeen(seq=seq, batch=batch) if self._state is State.CATCHING_UP:
                commands = self._replayed(seq, batch)
            case ReplayEnded() if self._state is State.CATCHING_UP:
                commands = self._ended()
            case ReplayFailed() if self._state is State.CATCHING_UP:
                commands = self._failed()
            case QuietSeen() if self._state is State.FOLLOWING:
                commands = self._ask(self._next)
            case Began():
                commands = self._ask(0)
            case Spoiled(why=why):
                self._lose(why)
            case Dropped():
                self._clear()
        return commands

    def _ask(self, start: int) -> list[AskReplay]:
        self._state = State.CATCHING_UP
        self._applied_in_answer = 0
        self._missed_before = bool(self._held)
        return [AskReplay(start)]

    def _live(self, seq: int, batch: Batch) -> list[AskReplay]:
        if seq < self._next:
            return self._older(seq, batch)
        if self._state is State.CATCHING_UP:
            self._hold(seq, batch)
            return []
        if seq == self._next or self._lost:
            self._apply(seq, batch)
            return []
        self.counts["gaps"] += 1
        self._note(f"a gap: {seq} came, {self._next} was expected")
        self._hold(seq, batch)
        self._tries = 0
        return self._ask(self._next)

    def _older(self, seq: int, batch: Batch) -> list[AskReplay]:
        if batch.at <= self._newest_at:
            self.counts["duplicates"] += 1
            return []
        self._note(f"another process began: {seq} is newer than {self._next - 1}")
        self._empty()
        self._next, self._newest_at, self._lost, self._begun = 0, float("-inf"), False, False
        self.reason = "its process began anew"
        self._let_go_of_held()
        self._hold(seq, batch)
        self._tries = 0
        return self._ask(0)

    def _hold(self, seq: int, batch: Batch) -> None:
        """What does not fit is asked for again: a gap will show."""
        if seq not in self._held and self._held_bytes + batch.size <= HELD_BYTES_LIMIT:
            self._held[seq] = batch
            self._held_bytes += batch.size

    def _let_go_of_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    def _replayed(self, seq: int, batch: Batch) -> list[AskReplay]:
        if seq < self._next:
            self.counts["duplicates"] += 1
            return []
        if seq > self._next and not self._lost:
            if self._applied_in_answer:
                return self._ask(self._next)  # a hole: what follows it comes again
            self._lose(f"batches {self._next} to {seq - 1} of its events are gone")
        self._applied_in_answer += 1
        self._apply(seq, batch)
        return []

    def _ended(self) -> list[AskReplay]:
        self._tries = 0
        self._apply_held()
        if self._held and (self._applied_in_answer or not self._missed_before):
            return self._ask(self._next)
        if self._held:
            self._lose(f"batches {self._next} to {min(self._held) - 1} of its events are gone")
            self._apply_held()
        return self._follow()

    def _follow(self) -> list[AskReplay]:
        self._state = State.FOLLOWING
        self._begun = True
        if not self._lost:
            self.reason = ""
        return []

    def _failed(self) -> list[AskReplay]:
        self._tries += 1
        self.counts["unanswered"] += 1
        if not self._begun:
            self.reason = "its engine does not say its KV events again" if self._held else self.reason
            return self._ask(self._next)
        if self._applied_in_answer:
            self._tries = 0
            return self._ask(self._next)  # only its end did not come
        if not self._held:
            return self._follow()  # nothing is known to be missing: it only did not answer
        if self._tries < REPLAY_TRIES and not self._lost:
            return self._ask(self._next)
        self._lose(f"its engine did not say again what followed batch {self._next - 1}")
        self._apply_held()
        return self._follow()

    def _apply_held(self) -> None:
        """What was held, as far as it continues what is here; all of it where order does not count any more."""
        for seq in sorted(self._held):
            if seq > self._next and not self._lost:
                break
            batch = self._held.pop(seq)
            self._held_bytes -= batch.size
            if seq >= self._next:
                self._apply(seq, batch)

    # --- what is held

    def _apply(self, seq: int, batch: Batch) -> None:
        self._next = seq + 1
        self._newest_at = max(self._newest_at, batch.at)
        self.counts["unknown"] += batch.unknown
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._clear()
            elif self._lost:
                continue
            elif isinstance(event, BlockStored):
                self._store(event)
            else:
                self._remove(event)

    def _clear(self) -> None:
        if self._lost:
            self._note("all is known again: its cache was emptied")
            self._lost = False
            self.reason = "" if self._begun else "its events are being read"
        self._empty()

    def _empty(self) -> None:
        for kept in (self._ours, self._media, self._names, self._twins, self._stored, self._removed):
            kept.clear()
        self._cleared = True

    def _lose(self, why: str) -> None:
        """What the cache holds cannot be known any more, until it is emptied."""
        self.counts["losses"] += 1
        if not self._lost:
            self._note(f"lost: {why}")
            self._lost, self.reason = True, why
            self._empty()

    def _store(self, event: BlockStored) -> None:
        parent = self._parent(event)
        if parent is None:
            self.counts["orphans"] += 1
            self._lose("it stored a block whose parent is not known")
            return
        held = self._medium(event.medium)
        size = event.block_size
        self.block_size = max(self.block_size, size)
        for at, theirs in enumerate(event.block_hashes):
            parent = block_hash(parent, [_plain(t) for t in event.token_ids[at * size : (at + 1) * size]])
            held.add(theirs)
            if theirs not in self._ours:
                self._ours[theirs] = parent
                self._add(parent)
        if len(self._ours) > self._limit:
            self._lose(f"it holds more than {self._limit:,} blocks")

    def _parent(self, event: BlockStored) -> int | None:
        if event.parent_block_hash is not None:
            return self._ours.get(event.parent_block_hash)
        adapter = event.lora_name or ("" if event.lora_id is None else str(event.lora_id))
        return root_hash(event.cache_salt or "", adapter)

    def _medium(self, name: str | None) -> set[int]:
        name = name or ""
        return self._media.setdefault(name if name in self._media or len(self._media) < MEDIA_LIMIT else "", set())

    def _remove(self, event: BlockRemoved) -> None:
        held = self._medium(event.medium)
        for theirs in event.block_hashes:
            held.discard(theirs)
            if theirs in self._ours and not any(theirs in others for others in self._media.values()):
                self._drop(self._ours.pop(theirs))

    def _add(self, name: int) -> None:
        if name in self._names:
            self._twins[name] += 1
            return
        self._names.add(name)
        if name in self._removed:
            self._removed.discard(name)
        else:
            self._stored.add(name)

    def _drop(self, name: int) -> None:
        if self._twins.get(name):
            self._twins[name] -= 1
            if not self._twins[name]:
                del self._twins[name]
            return
        self._names.discard(name)
        if name in self._stored:
            self._stored.discard(name)
        else:
            self._removed.add(name)

    def _note(self, what: str) -> None:
        self.history.append(what)

    def check(self) -> None:
        """Asserts what is always true."""
        assert self._names == set(self._ours.values())
        assert len(self._ours) == len(self._names) + self._twins.total()
        assert {theirs for held in self._media.values() for theirs in held} == set(self._ours)
        assert not self._stored - self._names
        assert not self._removed & self._names
        assert not self._lost or (self.reason and not self._ours)
        assert self._held_bytes == sum(batch.size for batch in self._held.values()) <= HELD_BYTES_LIMIT
        assert self._state is State.CATCHING_UP or (not self._held and self._begun)
        assert len(self._media) <= MEDIA_LIMIT + 1

    def __repr__(self) -> str:
        standing = f"{len(self._names)} blocks" if self.known else f"unknown: {self.reason}"
        return f"<Cache {self._state} next={self._next} {standing} held={len(self._held)} {dict(self.counts)}>"


def _take(names: set[int], limit: int) -> tuple[int, ...]:
    """So many of them, which are then gone; which ones does not matter."""
    if len(names) <= limit:
        taken: Iterable[int] = tuple(names)
        names.clear()
        return tuple(taken)
    return tuple(names.pop() for _ in range(limit))
