"""A cache is what its engine says it is, or says that it does not know; and the router's table is what the cache is."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec
import pytest

from disagg.cluster.courier import Courier
from disagg.model import EngineId
from disagg.policy.prefix import PrefixIndex, block_hash, hashes, pack, root_hash, unpack
from disagg.wire.codec import encode, to_router
from disagg.wire.kv_events import (
    END,
    HELD_BYTES_LIMIT,
    REPLAY_TRIES,
    AllBlocksCleared,
    AskReplay,
    Batch,
    BatchSeen,
    Began,
    BlockRemoved,
    BlockStored,
    Cache,
    Changes,
    Dropped,
    EventsError,
    KvEvent,
    QuietSeen,
    ReplayEnded,
    ReplayFailed,
    ReplaySeen,
    Spoiled,
    read_batch,
)
from disagg.wire.messages import KvDelta, KvSnapshot

E = EngineId("e")
SECRET = 31337  # a token id that no sentence may repeat


def stored(theirs: int, tokens: list[int], parent: int | None = None, **other: Any) -> BlockStored:
    return BlockStored([theirs], [*tokens], len(tokens), parent, **other)


def removed(*theirs: int, medium: str | None = None) -> BlockRemoved:
    return BlockRemoved(list(theirs), medium)


def batch(at: float, *events: KvEvent, size: int = 0) -> Batch:
    return Batch(at, events, size)


def started(*events: KvEvent) -> Cache:
    """A cache that follows an engine which has published one batch."""
    cache = Cache()
    assert cache.handle(Began()) == [AskReplay(0)]
    assert cache.handle(ReplaySeen(0, batch(0.0, *events))) == []
    assert cache.handle(ReplayEnded()) == []
    assert cache.known
    return cache


# --- names


def test_a_prompt_and_what_an_engine_stored_of_it_have_the_same_names() -> None:
    prompt: list[Any] = list(range(100, 110))
    names = hashes(prompt, 4)
    assert len(names) == 2, "the last two tokens fill no block"
    cache = started(BlockStored([11, 12], prompt[:8], 4))
    assert cache.snapshot() == set(names)
    one_by_one = started(stored(11, prompt[:4]), stored(12, prompt[4:8], 11))
    assert one_by_one.snapshot() == set(names)


def test_a_name_is_the_hash_that_it_says_it_is() -> None:
    """Agents and routers of different releases must agree on it for ever."""
    assert block_hash(0, [1, 2, 3]) == 0x120C39AA1E9B9E00
    assert block_hash(1, [1, 2, 3]) != 0x120C39AA1E9B9E00
    assert root_hash("a", "b") == 0x235870420603E322


def test_a_salt_or_an_adapter_makes_other_blocks() -> None:
    roots = {root_hash(), root_hash("a"), root_hash("", "a"), root_hash("a", "b"), root_hash("ab"), root_hash("", "ab")}
    assert len(roots) == 6
    assert root_hash() == 0
    tokens = [1, 2, 3, 4]
    assert started(stored(1, tokens, cache_salt="s")).snapshot() == set(hashes(tokens, 4, "s"))
    assert started(stored(1, tokens, lora_name="l")).snapshot() == set(hashes(tokens, 4, adapter="l"))
    assert started(stored(1, tokens, lora_id=7)).snapshot() == set(hashes(tokens, 4, adapter="7"))


def test_hashes_travel_big_endian() -> None:
    assert pack([1, 2**64 - 1]) == b"\0\0\0\0\0\0\0\1" + b"\xff" * 8
    assert list(unpack(pack([5, 6, 7]))) == [5, 6, 7]
    with pytest.raises(ValueError, match="bytes"):
        unpack(b"123")


# --- reading

AS_SEEN = [
    b"kv",
    (7).to_bytes(8, "big"),
    msgspec.msgpack.encode(
        [
            1700000000.5,
            [
                {
                    "type": "BlockStored",
                    "block_hashes": [4043277222275728090, -1558116201806873253],
                    "parent_block_hash": None,
                    "token_ids": list(range(264, 296)),
                    "block_size": 16,
                    "lora_id": None,
                    "medium": "GPU",
                },
                {"type": "BlockRemoved", "block_hashes": [4043277222275728090], "medium": "GPU"},
                {"type": "AllBlocksCleared"},
            ],
            0,
        ]
    ),
]


def test_a_batch_is_read_as_the_engine_writes_it() -> None:
    found = read_batch(AS_SEEN)
    assert found is not None
    seq, seen = found
    assert (seq, seen.at, seen.unknown, seen.size) == (7, 1700000000.5, 0, len(AS_SEEN[2]))
    assert [type(e) for e in seen.events] == [BlockStored, BlockRemoved, AllBlocksCleared]
    assert read_batch([b"", END, b""]) is None


def test_events_and_keys_of_later_releases_are_tolerated() -> None:
    events = [{"type": "Later", "x": [SECRET]}, {"type": "AllBlocksCleared", "later": {"a": 1}}]
    found = read_batch([b"", bytes(8), msgspec.msgpack.encode([1.0, events, 0, "later"])])
    assert found is not None
    assert found[1].events == (AllBlocksCleared(),)
    assert found[1].unknown == 1


def test_pairs_of_speculative_engines_are_named_by_their_first_tokens() -> None:
    pairs: list[Any] = [(1, 2), (2, 3)]
    assert started(BlockStored([1], pairs, 2)).snapshot() == set(hashes([1, 2], 2))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"kv", bytes(8)],
        [b"kv", b"123", b""],
        [b"kv", bytes(8), b"\xc1"],
        [b"kv", bytes(8), b"\x92\x00\xdd\xff\xff\xff\xff"],
        [b"kv", bytes(8), b"\x91" * 100_000],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [{"type": 3}]])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [SECRET]])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [{"type": "BlockStored", "block_hashes": [1], "token_ids": "x", "block_size": 1}]])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [stored(1, [SECRET, 2**32])]])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [stored(1, [-1])]])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [BlockStored([1, 2], [SECRET], 1)]])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [BlockStored([1], [SECRET, 1], 1)]])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [BlockStored([], [SECRET], 1)]])],
    ],
    ids=lambda f: str(f)[:50],
)
def test_what_is_no_batch_is_refused_in_one_sentence(frames: list[bytes]) -> None:
    with pytest.raises(EventsError) as caught:
        read_batch(frames)
    assert str(SECRET) not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_stored_block_does_not_show_its_tokens() -> None:
    assert str(SECRET) not in repr(batch(0.0, stored(1, [SECRET])))


# --- the machine, case by case


def test_a_gap_is_replayed_and_what_comes_meanwhile_follows_it() -> None:
    cache = started()
    assert cache.handle(BatchSeen(3, batch(3.0, removed(2)))) == [AskReplay(1)]
    cache.handle(BatchSeen(4, batch(4.0, stored(4, [4]))))
    cache.handle(ReplaySeen(1, batch(1.0, stored(1, [1]))))
    cache.handle(ReplaySeen(2, batch(2.0, stored(2, [2], 1))))
    assert cache.snapshot() == {*hashes([1, 2], 1)}
    cache.handle(ReplaySeen(3, batch(3.0, removed(2))))
    assert cache.handle(ReplayEnded()) == []
    assert cache.snapshot() == {*hashes([1], 1), *hashes([4], 1)}
    assert cache.known
    assert cache.counts["gaps"] == 1
    cache.check()


def test_a_replay_that_begins_too_late_loses_the_cache_until_it_is_emptied() -> None:
    cache = started(stored(1, [1]))
    cache.handle(BatchSeen(9, batch(9.0, stored(9, [9]))))
    cache.handle(ReplaySeen(5, batch(5.0, stored(5, [5]))))
    cache.handle(ReplayEnded())
    assert cache.reason == "batches 1 to 4 of its events are gone"
    assert cache.snapshot() == frozenset()
    cache.handle(BatchSeen(10, batch(10.0, stored(10, [10]), AllBlocksCleared(), stored(11, [11]))))
    assert cache.known
    assert cache.snapshot() == {*hashes([11], 1)}
    cache.check()


def test_an_answer_without_what_is_missing_loses_it_too() -> None:
    cache = started(stored(1, [1]))
    cache.handle(BatchSeen(3, batch(3.0)))
    assert cache.handle(ReplayEnded()) == []
    assert not cache.known


def test_what_came_after_the_question_is_asked_for_again_before_anything_is_given_up() -> None:
    """The answer may have been written before that was published."""
    cache = Cache()
    cache.handle(Began())
    cache.handle(BatchSeen(2, batch(2.0)))
    assert cache.handle(ReplayEnded()) == [AskReplay(0)]
    for seq in range(3):
        cache.handle(ReplaySeen(seq, batch(float(seq))))
    assert cache.handle(ReplayEnded()) == []
    assert cache.known


def test_a_hole_in_a_replay_is_asked_for_again() -> None:
    cache = started()
    cache.handle(BatchSeen(5, batch(5.0)))
    for seq in (1, 2):
        assert cache.handle(ReplaySeen(seq, batch(float(seq), stored(seq, [seq])))) == []
    assert cache.handle(ReplaySeen(4, batch(4.0))) == [AskReplay(3)]
    for seq in (3, 4, 5):
        cache.handle(ReplaySeen(seq, batch(float(seq), stored(seq, [seq]))))
    assert cache.handle(ReplayEnded()) == []
    assert cache.known
    assert cache.snapshot() == {h for seq in range(1, 6) for h in hashes([seq], 1)}


def test_an_engine_that_does_not_answer_is_asked_three_times() -> None:
    cache = started(stored(1, [1]))
    cache.handle(BatchSeen(2, batch(2.0)))
    for _ in range(REPLAY_TRIES - 1):
        assert cache.handle(ReplayFailed()) == [AskReplay(1)]
        assert cache.known
    assert cache.handle(ReplayFailed()) == []
    assert cache.reason == "its engine did not say again what followed batch 0"
    cache.check()


def test_answers_that_only_miss_their_end_make_progress_and_lose_nothing() -> None:
    cache = started()
    cache.handle(BatchSeen(9, batch(9.0)))
    for seq in range(1, 9):
        assert cache.handle(ReplaySeen(seq, batch(float(seq)))) == []
        assert cache.handle(ReplayFailed()) == [AskReplay(seq + 1)]
    cache.handle(ReplayFailed())
    assert cache.handle(ReplayEnded()) == []
    assert cache.known
    assert cache.counts["losses"] == 0


def test_an_engine_that_is_not_up_yet_is_waited_for() -> None:
    cache = Cache()
    cache.handle(Began())
    for _ in range(10):
        assert cache.handle(ReplayFailed()) == [AskReplay(0)]
    assert not cache.known
    cache.handle(ReplayEnded())
    assert cache.known


def test_quiet_finds_a_last_batch_that_was_lost_and_no_answer_to_it_is_no_loss() -> None:
    cache = started()
    assert cache.handle(QuietSeen()) == [AskReplay(1)]
    assert cache.handle(QuietSeen()) == [], "an answer is under way"
    cache.handle(ReplayFailed())
    assert cache.known
    cache.handle(QuietSeen())
    cache.handle(ReplaySeen(1, batch(1.0, stored(1, [1]))))
    cache.handle(ReplayEnded())
    assert cache.snapshot() == {*hashes([1], 1)}


def test_another_process_is_noticed_by_its_clock() -> None:
    cache = started(stored(1, [1]))
    cache.handle(BatchSeen(1, batch(5.0)))
    assert cache.handle(BatchSeen(0, batch(0.0, stored(1, [1])))) == []
    assert cache.counts["duplicates"] == 1
    assert cache.handle(BatchSeen(1, batch(6.0, stored(2, [2])))) == [AskReplay(0)]
    assert cache.reason == "its process began anew"
    cache.handle(ReplaySeen(0, batch(5.5)))
    cache.handle(ReplaySeen(1, batch(6.0, stored(2, [2]))))
    cache.handle(ReplayEnded())
    assert cache.known
    assert cache.snapshot() == {*hashes([2], 1)}
    cache.check()


def test_a_block_without_its_parent_loses_the_cache() -> None:
    cache = started()
    cache.handle(BatchSeen(1, batch(1.0, stored(2, [2], 1), stored(3, [3]))))
    assert cache.reason == "it stored a block whose parent is not known"
    assert cache.counts["orphans"] == 1
    cache.check()


def test_a_block_is_held_while_any_medium_holds_it() -> None:
    cache = started(stored(1, [1], medium="GPU"), stored(1, [1], medium="CPU_PINNED"))
    cache.take_changes(9)
    cache.handle(BatchSeen(1, batch(1.0, removed(1, medium="GPU"))))
    assert cache.snapshot() == {*hashes([1], 1)}
    assert not cache.take_changes(9)
    cache.handle(BatchSeen(2, batch(2.0, removed(1, medium="DISK"), removed(1, medium="CPU_PINNED"))))
    assert cache.snapshot() == frozenset()
    assert cache.take_changes(9) == Changes(removed=tuple(hashes([1], 1)))


def test_two_blocks_of_one_name_are_held_until_both_are_gone() -> None:
    """Engines keep apart what was asked for with keys that they do not publish."""
    cache = started(stored(1, [1]), stored(2, [1]))
    cache.handle(BatchSeen(1, batch(1.0, removed(1))))
    assert cache.snapshot() == {*hashes([1], 1)}
    cache.check()
    cache.handle(BatchSeen(2, batch(2.0, removed(2))))
    assert cache.snapshot() == frozenset()
    cache.check()


def test_too_many_blocks_lose_the_cache() -> None:
    cache = Cache(limit=2)
    cache.handle(Began())
    cache.handle(ReplaySeen(0, batch(0.0, stored(1, [1]), stored(2, [2]))))
    cache.handle(ReplayEnded())
    assert cache.known
    cache.handle(BatchSeen(1, batch(1.0, stored(3, [3]))))
    assert cache.reason == "it holds more than 2 blocks"
    cache.check()


def test_what_is_held_back_is_bounded_and_the_rest_is_asked_for_again() -> None:
    cache = started()
    half = HELD_BYTES_LIMIT // 2
    cache.handle(BatchSeen(2, batch(2.0, size=half)))
    for seq in range(3, 10):
        cache.handle(BatchSeen(seq, batch(float(seq), stored(seq, [seq]), size=half)))
        cache.check()
    cache.handle(ReplaySeen(1, batch(1.0)))
    cache.handle(ReplayEnded())
    assert cache.known
    assert cache.handle(BatchSeen(10, batch(10.0))) == [AskReplay(4)]


def test_what_cannot_be_read_loses_the_cache_and_a_dropped_one_is_empty() -> None:
    cache = started(stored(1, [1]))
    cache.take_changes(9)
    cache.handle(Dropped())
    assert cache.known
    assert cache.snapshot() == frozenset()
    assert cache.take_changes(9) == Changes(cleared=True)
    cache.handle(Spoiled("a batch of KV events is not valid msgpack"))
    assert cache.reason == "a batch of KV events is not valid msgpack"
    cache.handle(BatchSeen(2, batch(2.0, AllBlocksCleared())))
    assert cache.known


def test_changes_cancel_out_and_come_in_portions() -> None:
    cache = started(stored(1, [1]), stored(2, [2]), stored(3, [3]))
    first = cache.take_changes(2)
    assert len(first.stored) == 2
    assert len(cache.take_changes(2).stored) == 1
    cache.handle(BatchSeen(1, batch(1.0, removed(1), stored(1, [1]), stored(4, [4]), removed(4))))
    assert not cache.take_changes(9)


# --- a model engine


class Engine:
    """Publishes what it does with a tree of blocks, keeps the last batches, and knows the truth."""

    def __init__(self, chance: random.Random, buffer: int) -> None:
        self.chance = chance
        self.buffer: deque[tuple[int, Batch]] = deque(maxlen=buffer)
        self.seq = 0
        self.at = 0.0
        self.parents: dict[int, int | None] = {}
        self.tokens: dict[int, list[int]] = {}
        self.media: dict[int, set[str]] = {}
        self.names: dict[int, int] = {}
        self.truths: dict[float, set[int]] = {float("-inf"): set()}  # after the batch of each moment

    def restart(self) -> None:
        self.buffer.clear()
        self.seq = 0
        for kept in (self.parents, self.tokens, self.media, self.names):
            kept.clear()

    def truth(self) -> set[int]:
        return {self.names[block] for block, held in self.media.items() if held}

    def step(self) -> tuple[int, Batch]:
        """One batch."""
        self.at += 1.0
        made = batch(self.at, *(self._event() for _ in range(self.chance.randrange(4))))
        said = (self.seq, made)
        self.truths[self.at] = self.truth()
        self.buffer.append(said)
        self.seq += 1
        return said

    def _event(self) -> KvEvent:
        held = [block for block, media in self.media.items() if media]
        leaves = [b for b in held if not any(self.parents[o] == b for o in held)]
        dice = self.chance.random()
        if dice < 0.02:
            for block in self.media:
                self.media[block].clear()
            return AllBlocksCleared()
        if dice < 0.35 and leaves:
            block = self.chance.choice(leaves)
            medium = self.chance.choice(sorted(self.media[block]))
            self.media[block].discard(medium)
            return removed(block, medium=medium)
        medium = self.chance.choice(("GPU", "CPU_PINNED"))
        parent = self.chance.choice([None, *held])
        word = self.chance.randrange(6)
        block = hash((parent, word)) & (2**62 - 1)
        self.parents[block], self.tokens[block] = parent, [word, word + 1]
        self.names[block] = block_hash(0 if parent is None else self.names[parent], self.tokens[block])
        self.media.setdefault(block, set()).add(medium)
        return stored(block, self.tokens[block], parent, medium=medium)


class Follower:
    """A cache whose sockets lose, repeat and delay, by chance."""

    def __init__(self, engine: Engine, cache: Cache, loss: float) -> None:
        self.engine, self.cache, self.loss = engine, cache, loss
        self.live: deque[tuple[int, Batch]] = deque()
        self.answer: deque[tuple[int, Batch] | None] | None = None
        self.asked: AskReplay | None = None
        self.feed(Began())

    def feed(self, event: Any) -> None:
        for command in self.cache.handle(event):
            self.asked, self.answer = command, None
        self.cache.check()

    def publish(self) -> None:
        said = self.engine.step()
        if self.engine.chance.random() >= self.loss:
            self.live.append(said)
            if self.engine.chance.random() < 0.05:
                self.live.append(said)

    def hear(self) -> None:
        if self.live:
            self.feed(BatchSeen(*self.live.popleft()))

    def replay(self, *, lossy: bool = True) -> None:
        """One step of what an engine and its follower do about a request."""
        chance = self.engine.chance
        if self.asked is not None and self.answer is None:
            if lossy and chance.random() < 0.1:
                self.feed(ReplayFailed()) if self.asked else None
                return
            found = [said for said in self.engine.buffer if said[0] >= self.asked.start]
            kept = [said for i, said in enumerate(found) if i < 30 or not lossy or chance.random() > 0.05]
            self.answer = deque([*kept, None])
        elif self.answer:
            said, asked = self.answer.popleft(), self.asked
            if said is None:
                self.answer = self.asked = None
                self.feed(ReplayEnded())
            else:
                self.feed(ReplaySeen(*said))
            assert asked is not None

    def settle(self) -> None:
        """Nothing is lost any more, and time passes."""
        while self.live:
            self.hear()
        for _ in range(3):
            self.feed(QuietSeen())
            for _ in range(20_000):
                if self.asked is None:
                    break
                self.replay(lossy=False)
            assert self.asked is None


@pytest.mark.parametrize("seed", range(30))
def test_a_cache_is_what_the_engine_holds_or_says_that_it_does_not_know(seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine(chance, buffer=chance.choice((4, 40, 4000)))
    for _ in range(chance.randrange(60)):
        engine.step()
    follower = Follower(engine, Cache(), loss=chance.choice((0.0, 0.02, 0.2)))
    knew = 0
    for _ in range(1500):
        dice = chance.random()
        if dice < 0.2:
            follower.publish()
        elif dice < 0.5:
            follower.hear()
        elif dice < 0.51:
            follower.feed(QuietSeen())
        elif dice < 0.515 and follower.asked is None and engine.seq:
            engine.restart()  # unnoticed by whoever keeps it, which must not happen; the first word of the new one comes through
            follower.live.clear()
            follower.feed(BatchSeen(*engine.step()))
        else:
            follower.replay()
        if follower.cache.known:
            assert follower.cache.snapshot() == engine.truths[follower.cache._newest_at]
            knew += 1
    follower.settle()
    assert follower.cache._newest_at == engine.at
    assert not follower.cache.known or follower.cache.snapshot() == engine.truth()
    assert follower.cache.known or engine.buffer.maxlen != 4000
    assert knew > 100 or engine.buffer.maxlen == 4


@pytest.mark.parametrize("seed", range(10))
def test_with_a_long_buffer_nothing_is_ever_lost_for_good(seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine(chance, buffer=100_000)
    follower = Follower(engine, Cache(), loss=0.3)
    for _ in range(2000):
        chance.choice((follower.publish, follower.hear, follower.hear, lambda: follower.replay(lossy=False)))()
        assert follower.cache.counts["losses"] == 0
    follower.settle()
    assert follower.cache.known
    assert follower.cache.snapshot() == engine.truth()


# --- through messages into the router's table


class Router:
    """A table behind a link that loses and repeats."""

    def __init__(self, chance: random.Random, courier: Courier) -> None:
        self.chance, self.courier = chance, courier
        self.index = PrefixIndex()
        self.gaps = 0
        self.now = 0.0

    def take(self, message: KvSnapshot | KvDelta) -> None:
        again = to_router.decode(encode(message))
        assert again == message
        resync = False
        if isinstance(message, KvSnapshot):
            self.index.take_snapshot(message)
        else:
            resync = self.index.take_delta(message, now=self.now)
        self.index.check()
        if resync:
            self.courier.resync(message.engine)

    def flush(self, cache: Cache | None, loss: float) -> None:
        message = self.courier.next({} if cache is None else {E: cache}, now=self.now)
        if message is None or self.chance.random() < loss:
            return
        for _ in range(1 + (self.chance.random() < 0.1)):
            self.take(message)

    def settle(self, cache: Cache) -> None:
        for _ in range(400):
            self.now += 0.1
            self.flush(cache, 0.0)


@pytest.mark.parametrize("seed", range(30))
def test_once_it_is_quiet_the_table_is_what_the_engine_holds(seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine(chance, buffer=100_000)
    follower = Follower(engine, Cache(), loss=0.05)
    incarnation = 1
    router = Router(chance, Courier(incarnation, "n", hashes_per_message=4))
    for _ in range(2500):
        router.now += 0.02
        dice = chance.random()
        if dice < 0.2:
            follower.publish()
        elif dice < 0.5:
            follower.hear()
        elif dice < 0.7:
            follower.replay(lossy=False)
        elif dice < 0.99:
            router.flush(follower.cache, loss=0.1)
        elif dice < 0.995:
            router.courier.joined()  # a new link
        elif dice < 0.997:
            router.gaps += router.index.counts["gaps"]
            router.index = PrefixIndex()  # a new router
            router.courier.joined()
        elif dice < 0.998:
            incarnation += 1  # a new agent, which follows anew
            router.courier = Courier(incarnation, "n", hashes_per_message=4)
            follower = Follower(engine, Cache(), loss=0.05)
        elif dice < 0.999:
            router.index.lose(E, "it is dead")
        else:
            engine.restart()  # a new process of the engine
            follower = Follower(engine, Cache(), loss=0.05)
    follower.settle()
    router.settle(follower.cache)
    standing = router.index.standing(E)
    assert standing is not None
    assert standing.known
    assert router.index._entries[E].blocks == engine.truth() == follower.cache.snapshot()
    assert router.gaps + router.index.counts["gaps"] > 0


def table_of(*names: int, limit: int = 100) -> tuple[PrefixIndex, Courier, Cache]:
    """A table that was told of an engine which holds these blocks of one token each, and who told it."""
    index, courier = PrefixIndex(limit), Courier(1, "n")
    cache = started(*(stored(n, [n]) for n in names))
    tell(index, courier, cache)
    return index, courier, cache


def tell(index: PrefixIndex, courier: Courier, cache: Cache | None, now: float = 0.0) -> list[KvSnapshot | KvDelta]:
    said = []
    while (message := courier.next({} if cache is None else {E: cache}, now=now)) is not None:
        said.append(message)
        if isinstance(message, KvSnapshot):
            index.take_snapshot(message)
        else:
            index.take_delta(message, now=now)
        index.check()
    return said


def test_leading_blocks_count_and_only_those() -> None:
    index, _, _ = table_of()
    prompt = hashes([1, 2, 3, 4, 5, 6], 2)
    cache = started(BlockStored([1, 2], [1, 2, 3, 4], 2))
    tell(index, Courier(2, "n"), cache)
    assert index.held(E, prompt) == 2
    assert index.held(E, prompt[1:]) == 1
    assert index.held(E, prompt[2:]) == 0
    assert index.held(EngineId("other"), prompt) == 0


def test_a_process_that_ended_holds_nothing_and_the_next_one_is_another_epoch() -> None:
    index, courier, _ = table_of(1)
    said = tell(index, courier, None)
    assert [type(m) for m in said] == [KvSnapshot]
    assert tell(index, courier, None) == []
    standing = index.standing(E)
    assert standing is not None
    assert (standing.known, standing.reason) == (False, "its process has ended")
    again = tell(index, courier, started(stored(2, [2])))
    assert again[0].epoch == said[0].epoch + 1
    assert index._entries[E].blocks == {*hashes([2], 1)}


def test_a_word_that_says_nothing_shows_that_the_one_before_it_was_lost() -> None:
    index, courier, cache = table_of(1)
    cache.handle(BatchSeen(1, batch(1.0, stored(2, [2]))))
    assert courier.next({E: cache}, now=1.0) is not None, "and is lost"
    assert courier.next({E: cache}, now=5.9) is None
    empty = courier.next({E: cache}, now=6.0)
    assert isinstance(empty, KvDelta)
    assert index.take_delta(empty, now=6.0)
    assert index.counts == {"gaps": 1, "resyncs": 1, "refused": 0}
    courier.resync(E)
    tell(index, courier, cache, now=7.0)
    assert index._entries[E].blocks == cache.snapshot()


def test_what_is_older_than_what_is_known_changes_nothing() -> None:
    index, courier, cache = table_of(1)
    old = KvSnapshot(1, "n", E, 1, 1, blocks=pack([7]))
    cache.handle(BatchSeen(1, batch(1.0, stored(2, [2]))))
    (delta,) = tell(index, courier, cache)
    assert isinstance(delta, KvDelta)
    index.take_snapshot(old)
    assert not index.take_delta(delta, now=9.0)
    assert not index.take_delta(KvDelta(1, "n", E, 0, 99, cleared=True), now=9.0)
    assert not index.take_delta(KvDelta(0, "n", E, 9, 3, cleared=True), now=9.0)
    assert index._entries[E].blocks == cache.snapshot()
    assert index.counts["gaps"] == 0


def test_a_word_of_another_process_continues_nothing() -> None:
    for other in (KvDelta(1, "n", E, 2, 3), KvDelta(2, "n", E, 1, 3)):
        index, _, _ = table_of(1)
        assert index.take_delta(KvDelta(1, "n", E, 1, 2), now=0.0) is False
        assert index.take_delta(other, now=0.0)
        standing = index.standing(E)
        assert standing is not None
        assert standing.reason == "a word of its host was missed"


def test_asking_for_a_snapshot_is_not_repeated_for_each_word_that_comes_meanwhile() -> None:
    index = PrefixIndex()
    asked = [index.take_delta(KvDelta(1, "n", E, 1, 5 + i), now=i * 0.1) for i in range(21)]
    assert sum(asked) == 3


def test_a_table_keeps_no_more_than_its_limit_of_an_engine() -> None:
    index, courier, cache = table_of(1, 2, 3, limit=3)
    cache.handle(BatchSeen(1, batch(1.0, stored(4, [4]))))
    tell(index, courier, cache)
    standing = index.standing(E)
    assert standing is not None
    assert (standing.known, standing.blocks) == (False, 0)
    assert "more than the 3 blocks" in standing.reason
    assert index.counts["resyncs"] == 0, "asking again would not make it less"
    small, large = PrefixIndex(2), Courier(1, "n", hashes_per_message=1)
    assert len(tell(small, large, started(*(stored(n, [n]) for n in range(5))))) == 5
    assert small.counts["refused"] == 1


@pytest.mark.parametrize(
    "message",
    [
        KvSnapshot(1, "n", E, 1, 1, part=1, parts=1),
        KvSnapshot(1, "n", E, 1, 1, part=0, parts=0),
        KvSnapshot(1, "n", E, 1, 1, part=0, parts=10**9),
        KvSnapshot(1, "n", E, 1, 1, blocks=b"1234567"),
    ],
)
def test_snapshots_that_make_no_sense_change_nothing(message: KvSnapshot) -> None:
    index, _, _ = table_of(1)
    with pytest.raises(ValueError, match="no sense"):
        index.take_snapshot(message)
    assert index._entries[E].blocks == {*hashes([1], 1)}


def test_deltas_that_make_no_sense_change_nothing() -> None:
    index, _, _ = table_of(1)
    with pytest.raises(ValueError, match="no sense"):
        index.take_delta(KvDelta(1, "n", E, 1, 2, stored=b"123"), now=0.0)
    assert index._entries[E].blocks == {*hashes([1], 1)}


def test_a_snapshot_stays_below_the_limit_of_a_frame_and_engines_take_turns() -> None:
    cache, other = Cache(), started(stored(1, [1]))
    cache.handle(Began())
    cache.handle(ReplaySeen(0, batch(0.0, BlockStored(list(range(50_000)), list(range(50_000)), 1))))
    cache.handle(ReplayEnded())
    courier = Courier(1, "n")
    said = [courier.next({E: cache, EngineId("f"): other}, now=0.0) for _ in range(6)]
    assert [m.engine for m in said if m is not None] == ["e", "f", "e", "e", "e"]
    assert all(len(encode(m)) < 140_000 for m in said if m is not None)
