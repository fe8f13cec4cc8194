"""What engines publish of their prefix caches counts in routing: exactly for token ids, as a bound for text, and only where it is known."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

import pytest

from disagg.cluster.courier import Courier
from disagg.model import Choice, ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Role
from disagg.policy.books import SETTLE_S, TOLD_S, Books, Prompt
from disagg.policy.history import BLOCK, names_of
from disagg.policy.prefix import IDS_NAMED, Ids, PrefixIndex, hashes, pack
from disagg.policy.route import InFlight, choose
from disagg.wire.kv_events import AllBlocksCleared, Batch, BatchSeen, BlockRemoved, BlockStored, Cache, Spoiled
from disagg.wire.messages import KvDelta, KvSnapshot
from tests.wire.test_kv_events import started

PAGE = 16
ROOM = 100_000
PROMPT = list(range(1000, 1000 + 128 * PAGE))
BYTES = 3
"""Of a body per token, before anything is learnt of that."""


def stored(tokens: list[int], first: int = 0) -> BlockStored:
    """As an engine says it of a whole prompt."""
    return BlockStored([first + number for number in range(len(tokens) // PAGE)], [*tokens], PAGE)


class House:
    """Books over prefill engines; the first ones publish, each through a cache and a courier of its own."""

    def __init__(self, *caches: Cache, engines: int = 2) -> None:
        self.now = 100.0
        self.index = PrefixIndex()
        self.books = Books(prefixes=self.index)
        self.books.grow(engines)
        self.views = [self.view(slot) for slot in range(engines)]
        self.caches = {self.views[slot].id: cache for slot, cache in enumerate(caches)}
        self.couriers = {engine: Courier(1, "n") for engine in self.caches}
        self.seq = dict.fromkeys(self.caches, 0)
        self.tell()

    def view(self, slot: int) -> EngineView:
        address = EngineAddress(EngineId(f"p{slot}"), Role.PREFILL, "h", 1 + slot, pid=1)
        return EngineView(address, slot, EngineState.READY, EngineFacts(model="m"), EngineLoad(kv_total_tokens=ROOM))

    def publish(self, slot: int, *events: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        engine = self.views[slot].id
        self.seq[engine] += 1
        self.caches[engine].handle(BatchSeen(self.seq[engine], Batch(self.now, events)))

    def tell(self, *, lose: bool = False) -> None:
        """Agents say what there is to say, and engines report. `lose`: the router does not get it."""
        for engine, courier in self.couriers.items():
            while (message := courier.next({engine: self.caches[engine]}, now=self.now)) is not None:
                if lose:
                    continue
                if isinstance(message, KvSnapshot):
                    self.index.take_snapshot(message)
                elif self.index.take_delta(message, now=self.now):
                    courier.resync(engine)
        for view in self.views:
            self.books.holds(view, now=self.now)
        self.index.check()
        self.books.check()

    def prompt(self, tokens: list[int] = PROMPT, *, text: bytes | None = None) -> Prompt:
        body = text if text is not None else b"".join(token.to_bytes(BYTES, "big") for token in tokens)
        return Prompt(len(tokens), len(body), names_of(body), None if text is not None else Ids(tokens))

    def send(self, slot: int, prompt: Prompt, *, reads: bool = False) -> None:
        """It is read at once, or not yet where `reads`."""
        promised = self.books.ledger.prompt_tokens("m", prompt.size)
        self.books.ledger.reserve(slot, promised)
        engine = self.views[slot]
        reading = self.books.sent(Choice(engine, engine, ""), prompt, now=self.now)
        if not reads:
            self.books.forecast.left(reading, now=self.now)
            self.books.ledger.release(slot, promised)

    def held(self, prompt: Prompt) -> tuple[dict[int, int], set[int]]:
        found, told = self.books.held(prompt, now=self.now)
        return {slot: tokens for slot, tokens in found.items() if tokens}, set(told)

    def settle(self) -> None:
        for _ in range(3):
            self.now += SETTLE_S
            self.tell()


# --- token ids


@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_of_ids_is_found_as_far_as_an_engine_stored_it(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice((1, 3, 16))
    tokens = [chance.randrange(2**32) for _ in range(chance.randrange(200))]
    names = hashes(tokens, size)
    blocks = {name for name in names if chance.random() < 0.9}
    wanted = next((at for at, name in enumerate(names) if name not in blocks), len(names)) * size
    ids = Ids(tokens)
    assert ids.held(blocks, size) == ids.held(blocks, size) == wanted
    assert ids.held(set(names), size) == len(names) * size, "what was named for one engine does not bind another"
    assert ids.held(set(), size) == 0
    alike = [*tokens[: len(tokens) // 2], *[7] * chance.randrange(50)]
    differ = (at for at, (mine, others) in enumerate(zip(tokens, alike, strict=False)) if mine != others)
    assert ids.shared(Ids(alike)) == next(differ, min(len(tokens), len(alike)))


def test_a_prompt_that_nobody_holds_costs_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    index = PrefixIndex()
    made: list[bytes] = []

    def count(content: bytes, digest_size: int) -> Any:
        made.append(content)
        return blake2b(content, digest_size=digest_size)

    for number in range(16):
        index.take_snapshot(KvSnapshot(1, "n", EngineId(f"e{number}"), 1, 1, 0, 1, PAGE, pack(range(number, 1000)), known=True))
    monkeypatch.setattr("disagg.policy.prefix.blake2b", count)
    assert set(index.leading(Ids(PROMPT)).values()) == {(0, PAGE)}
    assert len(made) == 1


def test_ids_are_never_shown() -> None:
    assert "31337" not in repr(Ids([31337] * 50))
    with pytest.raises(OverflowError):
        Ids([2**32])
    with pytest.raises(OverflowError):
        Ids([-1])


def test_where_an_engine_publishes_its_number_takes_the_place_of_the_guess() -> None:
    house = House(started(), engines=3)
    prompt = house.prompt()
    house.send(0, prompt)
    house.send(1, prompt)
    house.publish(0, stored(PROMPT[: 10 * PAGE]))
    house.now += 60.0
    house.tell()
    assert house.held(prompt) == ({0: 10 * PAGE, 1: len(PROMPT)}, {0})
    assert house.held(house.prompt(text=b"x" * 5000)) == ({}, set())


def test_what_an_engine_holds_is_known_though_this_router_never_sent_it() -> None:
    house = House(started(stored(PROMPT)))
    assert house.held(house.prompt()) == ({0: len(PROMPT)}, {0})
    house.publish(0, BlockRemoved([20]))
    house.tell()
    assert house.held(house.prompt()) == ({0: 20 * PAGE}, {0})


def test_short_prompts_of_ids_count_where_text_is_too_short_for_a_name() -> None:
    house = House(started(stored(PROMPT)))
    assert house.held(house.prompt(PROMPT[:40])) == ({0: 32}, {0})


def test_what_was_just_sent_counts_until_the_engine_has_told_of_it() -> None:
    house = House(started(), engines=2)
    house.send(0, house.prompt())
    assert house.held(house.prompt()) == ({0: len(PROMPT)}, set()), "it will hold it, and has not said so"
    house.publish(0, stored(PROMPT[: 30 * PAGE]))
    house.tell()
    assert house.held(house.prompt()) == ({0: 30 * PAGE}, {0}), "it told: that counts"


def test_what_an_engine_does_not_tell_of_is_not_believed_for_long() -> None:
    house = House(started(), engines=2)
    house.send(0, house.prompt())
    house.now += TOLD_S
    assert house.held(house.prompt())[0], "it takes a while to read"
    house.now += 60.0
    assert house.held(house.prompt()) == ({}, {0})


def test_behind_the_ids_that_are_kept_the_guess_goes_on() -> None:
    tokens = list(range(2 * IDS_NAMED))
    house = House(started(stored(tokens)))
    prompt = house.prompt(tokens)
    assert house.held(prompt) == ({0: IDS_NAMED}, {0})
    house.send(0, prompt)
    house.publish(0, stored([5] * PAGE, first=100_000))
    house.now += 60.0
    house.tell()
    assert house.held(prompt)[0] == {0: 2 * IDS_NAMED}


def test_the_reason_says_who_knows() -> None:
    house = House(started(stored(PROMPT)))
    pool_of = [*house.views, EngineView(EngineAddress(EngineId("d"), Role.DECODE, "h", 9), 2, EngineState.READY, EngineFacts(model="m"))]
    house.books.grow(3)
    pool = ClusterView.of(pool_of).pools["m"]
    in_flight = InFlight()
    in_flight.grow(3)
    reason = choose(pool, in_flight, outlook=house.books.outlook(house.prompt(), now=house.now)).reason
    assert "p0 gives the first token in" in reason
    assert f"it holds {len(PROMPT) - 1} of {len(PROMPT)} tokens" in reason
    text = house.prompt(text=b"y" * 6144)
    house.send(1, text)
    house.now += 60.0
    reason = choose(pool, in_flight, outlook=house.books.outlook(text, now=house.now)).reason
    assert "p1 gives" in reason
    assert "it should hold" in reason


# --- gaps, and engines that began anew


def test_after_a_gap_the_guess_is_what_is_left_and_then_the_engine_is_asked_again() -> None:
    house = House(started(stored(list(range(50_000, 60_000)), first=1000)), engines=2)
    house.send(0, house.prompt())
    house.publish(0, stored(PROMPT[: 5 * PAGE]))
    house.now += 60.0
    house.tell()
    assert house.held(house.prompt()) == ({0: 5 * PAGE}, {0})
    house.publish(0, stored([1] * PAGE, first=900))
    house.tell(lose=True)
    house.publish(0, stored([2] * PAGE, first=901))
    engine = house.views[0].id
    message = house.couriers[engine].next({engine: house.caches[engine]}, now=house.now)
    assert isinstance(message, KvDelta)
    assert house.index.take_delta(message, now=house.now), "a word is missing"
    assert house.held(house.prompt()) == ({0: len(PROMPT)}, set())
    house.books.holds(house.views[0], now=house.now)
    assert house.held(house.prompt()) == ({0: len(PROMPT)}, set()), "it holds what it held: nothing is forgotten"
    house.couriers[engine].resync(engine)
    house.tell()
    assert house.held(house.prompt()) == ({0: 5 * PAGE}, {0})


def test_an_engine_whose_events_are_lost_is_guessed_at_and_not_forgotten() -> None:
    house = House(started(), engines=2)
    text = house.prompt(text=b"z" * 8 * BLOCK)
    house.send(0, text)
    house.publish(0, stored(PROMPT))
    house.tell()
    house.caches[house.views[0].id].handle(Spoiled("it made no sense"))
    house.settle()
    assert house.held(house.prompt()) == ({}, set()), "it says nothing of these ids any more"
    assert house.held(text)[0] == {0: text.tokens}


def test_an_engine_that_was_emptied_is_forgotten() -> None:
    house = House(started(stored(list(range(50_000)))), engines=2)
    text = house.prompt(PROMPT, text=b"z" * 8 * BLOCK)
    for slot in (0, 1):
        house.send(slot, text)
    house.tell()
    assert set(house.held(text)[0]) == {0, 1}
    house.publish(0, AllBlocksCleared(), stored(list(range(50_000))))
    house.tell()
    assert set(house.held(text)[0]) == {1}, "though as much is there as before"


def test_what_is_read_when_an_engine_is_emptied_is_held_afterwards() -> None:
    house = House(started(stored(list(range(50_000)))), engines=2)
    old, new = (house.prompt(PROMPT, text=letter * 8 * BLOCK) for letter in (b"o", b"n"))
    house.send(0, old)
    house.send(0, new, reads=True)
    house.publish(0, AllBlocksCleared())
    house.tell()
    assert house.held(new)[0]
    assert not house.held(old)[0]


def test_an_engine_that_began_anew_is_not_taken_for_the_old_one() -> None:
    house = House(started(stored(PROMPT)), engines=2)
    engine = house.views[0].id
    house.send(0, house.prompt())
    house.caches[engine] = started()
    house.books.restarted(0)
    house.tell()
    assert house.held(house.prompt()) == ({}, {0})
    house.index.lose(engine, "it is dead")
    assert house.held(house.prompt()) == ({}, set())


# --- how much is held


def text_of(number: int) -> Prompt:
    body = random.Random(number).randbytes(8 * BLOCK)
    return Prompt(len(body) // BYTES, len(body), names_of(body))


def test_the_history_holds_no_more_than_the_engine_says() -> None:
    house = House(started(stored(list(range(5000)))), engines=2)
    for number in range(20):
        for slot in (0, 1):
            house.send(slot, text_of(number))
    house.settle()
    bytes_per_token = house.books.ledger.bytes_per_token("m")
    assert house.books.history.blocks(0) == int(5000 // PAGE * PAGE * bytes_per_token / BLOCK) < 160
    assert house.books.history.blocks(1) == 160, "who says nothing holds what there is room for"
    assert house.held(text_of(19))[0].keys() == {0, 1}, "the newest are held"
    assert house.held(text_of(0))[0].keys() == {1}
    house.publish(0, BlockRemoved(list(range(5000 // PAGE))))
    house.settle()
    assert house.books.history.blocks(0) == 0


def test_a_full_cache_bounds_nothing() -> None:
    house = House(started(stored(list(range(ROOM)))), engines=2)
    house.send(0, text_of(1), reads=True)
    house.settle()
    room = int(ROOM * house.books.ledger.bytes_per_token("m") / BLOCK)
    for number in range(2, 3 + room // 8):
        for slot in (0, 1):
            house.send(slot, text_of(number))
    house.settle()
    assert [house.books.history.blocks(slot) for slot in (0, 1)] == [room, room]


def test_what_was_just_read_is_not_given_up_before_the_engine_could_tell_of_it() -> None:
    house = House(started(), engines=1)
    house.send(0, text_of(1))
    for _ in range(4):
        house.now += SETTLE_S / 5
        house.tell()
        assert house.books.history.blocks(0) == 8
    house.publish(0, stored(list(range(2 * 8 * BLOCK // BYTES))))
    house.settle()
    assert house.books.history.blocks(0) == 8
