"""The ledger of requests that kill engines: two deaths at most, and nobody else is blamed."""

from __future__ import annotations

import random

import pytest

from disagg.model import EngineId
from disagg.policy.blame import MARGIN, MARGIN_TIMES, SOLO_LIMIT_S, SOLO_S, STRIKE_KEPT_S, WELL_S, WELL_TOKENS, Ledger

A, B, C, D = EngineId("a"), EngineId("b"), EngineId("c"), EngineId("d")
POISON, GOOD, OTHER = 1, 2, 3


def test_one_death_makes_suspects_and_two_block() -> None:
    ledger = Ledger()
    assert ledger.died(A, {POISON: 0, GOOD: 0}, 0.0) == []
    assert ledger.is_suspect(POISON, 1.0)
    assert ledger.is_suspect(GOOD, 1.0)
    assert ledger.died(B, {POISON: 0}, 1.0) == [POISON]
    assert ledger.blocked(POISON, 1.0) == STRIKE_KEPT_S
    assert ledger.blocked(GOOD, 1.0) == 0.0
    ledger.check()


def test_a_block_ends_and_so_does_a_strike() -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: 0, GOOD: 0}, 0.0)
    ledger.died(B, {POISON: 0}, 1.0)
    assert ledger.blocked(POISON, STRIKE_KEPT_S) == 1.0
    assert ledger.blocked(POISON, STRIKE_KEPT_S + 1.0) == 0.0
    assert not ledger.is_suspect(GOOD, STRIKE_KEPT_S)
    assert ledger.died(C, {GOOD: 0}, STRIKE_KEPT_S + 1.0) == [], "the death of long ago does not count"


def test_who_got_further_is_no_suspect() -> None:
    ledger = Ledger()
    ledger.sent(GOOD, [A])
    ledger.died(A, {GOOD: 50}, 0.0)
    ledger.ended(GOOD, [A])
    assert ledger.past(GOOD) == 50 + MARGIN
    ledger.sent(GOOD, [B])
    ledger.proved(GOOD, [B])
    assert not ledger.is_suspect(GOOD, 1.0)
    assert ledger.died(B, {GOOD: 70}, 2.0) == []
    ledger.check()


def may_go(ledger: Ledger, fingerprint: int, engines: list[EngineId], now: float, *, patient: bool = True) -> bool:
    shut = ledger.shut(fingerprint, now, patient=patient)
    return shut is not None and not set(engines) & set(shut)


def test_suspects_keep_away_from_each_other_however_impatient() -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: 0, GOOD: 0}, 0.0)
    ledger.sent(POISON, [B])
    assert not may_go(ledger, GOOD, [B], 1.0)
    assert not may_go(ledger, GOOD, [C, B], 1.0, patient=False)
    assert may_go(ledger, GOOD, [C], 1.0)
    assert ledger.shut(GOOD, 1.0) == (B,)
    ledger.proved(POISON, [B])
    assert may_go(ledger, GOOD, [B], 1.0)


def test_newcomers_and_suspects_keep_apart_while_they_can_wait() -> None:
    ledger = Ledger()
    ledger.sent(OTHER, [C])
    ledger.died(A, {POISON: 0}, 0.0)
    assert not may_go(ledger, POISON, [C], 1.0)
    assert may_go(ledger, POISON, [C], 1.0, patient=False)
    ledger.sent(POISON, [B])
    assert not may_go(ledger, 4, [B], 1.0)
    assert ledger.shut(4, 1.0) == (B,)
    assert may_go(ledger, 4, [B], 1.0, patient=False)
    assert may_go(ledger, 4, [C], 1.0)


def test_one_copy_of_a_suspect_runs_at_a_time() -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: 0}, 0.0)
    ledger.sent(POISON, [B])
    assert not may_go(ledger, POISON, [C], 1.0), "the other copy is not proved"
    ledger.ended(POISON, [B])
    assert may_go(ledger, POISON, [C], 1.0)


def test_without_any_death_nothing_is_shut() -> None:
    ledger = Ledger()
    for fingerprint in range(1000):
        ledger.sent(fingerprint, [A, B])
    assert ledger.shut(5, 0.0) == ()
    assert may_go(ledger, 5, [A], 0.0)


def test_copies_that_were_under_way_together_are_struck_once() -> None:
    """Two engines of one host die at once, or two samples of one request lose theirs: that proves nothing against what they share."""
    ledger = Ledger()
    ledger.died(A, {GOOD: 5}, 10.0, sent_at=9.0)
    assert ledger.died(B, {GOOD: 7}, 10.3, sent_at=9.5) == []
    assert ledger.blocked(GOOD, 11.0) == 0
    assert ledger.is_suspect(GOOD, 11.0)
    assert ledger.died(C, {GOOD: 0}, 20.0, sent_at=10.5) == [GOOD], "this one was sent when that was known"


def test_it_is_calm_again_when_all_strikes_are_forgotten() -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: 0, GOOD: 0}, 0.0)
    ledger.died(B, {POISON: 0}, 300.0)
    assert ledger.blocked(OTHER, 599.0) == 0
    assert not ledger.is_calm
    assert ledger.blocked(POISON, 601.0) == 299.0
    assert ledger.blocked(POISON, 901.0) == 0
    assert ledger.is_calm


def test_what_is_remembered_is_bounded() -> None:
    ledger = Ledger(kept=100)
    for fingerprint in range(1000):
        ledger.died(A, {fingerprint: 0}, 0.0)
        ledger.check()
    assert not ledger.is_suspect(0, 0.0)
    assert ledger.is_suspect(999, 0.0)
    assert "suspects=100" in repr(ledger)


def test_mild_suspects_share_an_engine_and_their_number_doubles() -> None:
    ledger, left = Ledger(), set(range(100))
    ledger.died(A, dict.fromkeys(left, WELL_TOKENS), 0.0)
    rounds = 0
    while left:
        rounds += 1
        together = []
        for fingerprint in sorted(left):
            if may_go(ledger, fingerprint, [B], 1.0):
                ledger.sent(fingerprint, [B])
                together.append(fingerprint)
                ledger.check()
        assert len(together) <= 2 ** (rounds - 1)
        for fingerprint in together:
            ledger.proved(fingerprint, [B])
        left -= set(together)
    assert rounds == 7
    assert ledger.is_calm
    ledger.died(B, {POISON: 50, GOOD: 50}, 2.0)
    ledger.sent(POISON, [C])
    assert not may_go(ledger, GOOD, [C], 3.0), "after another death it is one at first again"


@pytest.mark.parametrize(("tokens", "ran_s"), [(WELL_TOKENS - 1, 1.0), (0, WELL_S - 0.1)])
def test_who_died_soon_shares_with_nobody(tokens: int, ran_s: float) -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: tokens}, 10.0, sent_at=10.0 - ran_s)
    ledger.died(A, {GOOD: 50, OTHER: 50}, 10.0, sent_at=1.0)
    ledger.sent(OTHER, [C])
    ledger.proved(OTHER, [C])
    ledger.sent(GOOD, [B])
    assert not may_go(ledger, POISON, [B], 11.0)
    assert may_go(ledger, POISON, [C], 11.0)


def test_a_copy_that_was_under_way_keeps_nobody_waiting_but_others_away() -> None:
    ledger = Ledger()
    for engine in (A, B):
        ledger.sent(GOOD, [engine])
    ledger.died(A, {GOOD: 0, POISON: 0}, 1.0, sent_at=0.0)
    ledger.ended(GOOD, [A])
    assert may_go(ledger, GOOD, [C], 2.0)
    assert not may_go(ledger, POISON, [B], 2.0, patient=False)
    ledger.sent(GOOD, [C])
    assert not may_go(ledger, GOOD, [D], 2.0), "now one is tried"
    ledger.ended(GOOD, [C])
    assert may_go(ledger, GOOD, [D], 2.0)
    ledger.check()


def test_who_is_proved_is_on_trial_nowhere() -> None:
    """Another copy of it still runs: that keeps nobody away."""
    ledger = Ledger()
    ledger.sent(GOOD, [B])
    ledger.died(A, {GOOD: 0, POISON: 0}, 0.0)
    assert not may_go(ledger, POISON, [B], 1.0, patient=False)
    ledger.sent(GOOD, [C])
    ledger.proved(GOOD, [C])
    ledger.check()
    assert may_go(ledger, POISON, [B], 1.0, patient=False)
    ledger.ended(GOOD, [B])
    ledger.check()


def test_who_was_in_company_when_it_died_again_is_tried_alone() -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: 50, GOOD: 50, OTHER: 50}, 0.0)
    ledger.sent(OTHER, [B])
    ledger.proved(OTHER, [B])
    for fingerprint in (POISON, GOOD):
        assert may_go(ledger, fingerprint, [B], 1.0)
        ledger.sent(fingerprint, [B])
    for fingerprint in (POISON, GOOD):  # each owner tells of itself
        assert ledger.died(B, {fingerprint: 52}, 2.0, sent_at=1.0) == []
        ledger.ended(fingerprint, [B])
        ledger.check()
    ledger.died(A, {4: 50}, 2.0)
    ledger.sent(4, [C])
    ledger.proved(4, [C])
    ledger.sent(GOOD, [C])
    assert not may_go(ledger, POISON, [C], 3.0)
    ledger.proved(GOOD, [C])
    ledger.sent(POISON, [C])
    assert ledger.died(C, {POISON: 52}, 4.0, sent_at=3.0) == [POISON]
    ledger.check()


class Walk:
    """A cluster in which some requests kill the engine that reads them, driven as the router would.

    Args:
        ledger: the defence.
        patient: callers wait until suspects and newcomers do not meet.
        tokens: that each had given when its engine died.
        frees: nothing is seen of the answers: suspects are freed at some time.
    """

    def __init__(
        self,
        ledger: Ledger,
        chance: random.Random,
        *,
        engines: int,
        poison: set[int],
        patient: bool = True,
        tokens: int = 0,
        frees: bool = False,
    ) -> None:
        self.frees = frees
        self.ledger = ledger
        self.chance = chance
        self.poison = poison
        self.patient = patient
        self.tokens = tokens
        self.engines = [EngineId(f"e{i}") for i in range(engines)]
        self.running: dict[EngineId, list[int]] = {e: [] for e in self.engines}
        self.waiting: list[int] = []
        self.sent_at: dict[EngineId, dict[int, float]] = {e: {} for e in self.engines}
        self.died_at: dict[int, float] = {}
        self.deaths: dict[int, int] = dict.fromkeys(poison, 0)  # but for those of copies that were under way at the first one
        self.answered: set[int] = set()
        self.refused: set[int] = set()
        self.now = 0.0

    def step(self) -> None:
        self.now += 0.01
        if self.waiting and self.chance.random() < 0.6:
            self.send(self.waiting.pop(self.chance.randrange(len(self.waiting))))
        busy = [e for e in self.engines if self.running[e]]
        if busy and self.frees and self.chance.random() < 0.3:
            self.free(self.chance.choice(busy))
        if busy and self.chance.random() < 0.5:
            self.advance(self.chance.choice(busy))
        self.ledger.check()

    def send(self, request: int) -> None:
        if self.ledger.blocked(request, self.now):
            self.refused.add(request)
            return
        shut = self.ledger.shut(request, self.now, patient=self.patient)
        open_to = [e for e in self.engines if shut is not None and e not in shut]
        if not open_to:
            self.waiting.append(request)
            return
        engine = self.chance.choice(open_to)
        self.ledger.sent(request, [engine])
        self.sent_at[engine].setdefault(request, self.now)
        self.running[engine].append(request)

    def free(self, engine: EngineId) -> None:
        """One of the requests there has been alone for long enough, if it was and need not be until it is proved."""
        request = self.chance.choice(self.running[engine])
        free_s, proved_s = self.ledger.solitude(request)
        if free_s < proved_s and self.running[engine].count(request) == 1:
            self.ledger.freed(request, [engine])

    def advance(self, engine: EngineId) -> None:
        """One of the requests there gets to the point at which it kills the engine or is answered."""
        request = self.chance.choice(self.running[engine])
        if request not in self.poison:
            self.running[engine].remove(request)
            self.ledger.proved(request, [engine])
            self.answered.add(request)
            return
        self.deaths[request] += self.sent_at[engine][request] >= self.died_at.setdefault(request, 0.0)
        if not self.died_at[request]:
            self.died_at[request] = self.now
        lost, self.running[engine] = self.running[engine], []
        for each in lost:  # its owner tells of it
            self.ledger.died(engine, {each: self.tokens}, self.now, sent_at=self.sent_at[engine].pop(each, self.now))
        for each in lost:
            self.ledger.ended(each, [engine])
        self.waiting += lost

    def run(self, arrivals: list[int]) -> None:
        left = list(arrivals)
        for _ in range(100_000):
            if left and self.chance.random() < 0.3:
                self.waiting.append(left.pop())
            if not left and not self.waiting and not any(self.running.values()):
                return
            self.step()
        raise AssertionError("somebody waits for ever")


def innocents(count: int = 100) -> list[int]:
    return [1000 + i for i in range(count)]


@pytest.mark.parametrize("seed", range(60))
def test_poison_kills_two_engines_at_most_and_no_innocent_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    poison = set(range(chance.randrange(1, 6)))
    arrivals = [*innocents(), *poison, *poison]  # who is refused tries again
    chance.shuffle(arrivals)
    walk = Walk(Ledger(), chance, engines=chance.randrange(2, 5), poison=poison)
    walk.run(arrivals)
    assert all(0 < deaths <= 2 for deaths in walk.deaths.values()), walk.deaths
    assert walk.answered == set(innocents())
    assert walk.refused == poison


@pytest.mark.parametrize("seed", range(60))
def test_poison_that_acts_late_kills_three_engines_at_most_and_no_innocent_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    poison = set(range(chance.randrange(1, 6)))
    arrivals = [*innocents(), *poison, *poison]
    chance.shuffle(arrivals)
    walk = Walk(Ledger(), chance, engines=chance.randrange(2, 5), poison=poison, tokens=50)
    walk.run(arrivals)
    assert all(0 < deaths <= 3 for deaths in walk.deaths.values()), walk.deaths
    assert walk.answered == set(innocents())
    assert walk.refused == poison


@pytest.mark.parametrize("seed", range(60))
def test_poison_in_answers_of_which_nothing_is_seen_kills_three_engines_at_most_and_no_innocent_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    poison = set(range(chance.randrange(1, 6)))
    arrivals = [*innocents(), *poison, *poison]
    chance.shuffle(arrivals)
    walk = Walk(Ledger(), chance, engines=chance.randrange(2, 5), poison=poison, frees=True)
    walk.run(arrivals)
    assert all(0 < deaths <= 3 for deaths in walk.deaths.values()), walk.deaths
    assert walk.answered == set(innocents())
    assert walk.refused == poison


@pytest.mark.parametrize("seed", range(30))
def test_one_poison_is_found_among_innocents_even_when_nobody_waits_for_newcomers(seed: int) -> None:
    chance = random.Random(seed)
    arrivals = [*innocents(), POISON, POISON, POISON]
    chance.shuffle(arrivals)
    walk = Walk(Ledger(), chance, engines=3, poison={POISON}, patient=False)
    walk.run(arrivals)
    assert walk.deaths[POISON] <= 3, "copies that arrive before anybody can know better run side by side"
    assert walk.answered == set(innocents())


def test_without_the_ledger_poison_kills_engine_after_engine() -> None:
    chance = random.Random(1)
    walk = Walk(Ledger(strikes=10**9), chance, engines=3, poison={POISON})
    with pytest.raises(AssertionError, match="waits for ever"):
        walk.run([*innocents(), POISON])
    assert walk.deaths[POISON] > 100


def test_one_death_is_one_strike_however_many_copies_of_a_request_it_struck() -> None:
    ledger = Ledger()
    assert [ledger.died(A, {GOOD: 0}, at, sent_at=-1.0) for at in (0.0, 0.1, 4.9)] == [[], [], []]
    assert ledger.blocked(GOOD, 5.0) == 0.0
    assert ledger.died(A, {GOOD: 0}, 5.0, sent_at=4.0) == [GOOD], "the process that took its place died, too"


# --- answers of which nothing is seen


def test_who_was_freed_gets_no_strike_in_company_and_is_then_alone_until_it_is_proved() -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: 0}, 10.0, sent_at=9.0)
    past_s = MARGIN_TIMES * 1.0 + SOLO_S
    assert ledger.solitude(POISON) == (SOLO_S, past_s)
    ledger.sent(POISON, [B])
    ledger.freed(POISON, [B])
    ledger.check()
    assert may_go(ledger, OTHER, [B], 11.0), "others may come"
    assert ledger.is_suspect(POISON, 11.0), "but it has proved nothing yet"
    assert ledger.died(B, {POISON: 0, OTHER: 0}, 12.0, sent_at=11.0) == []
    ledger.ended(POISON, [B])
    assert ledger.solitude(POISON) == (past_s, past_s)
    ledger.sent(POISON, [C])
    assert not may_go(ledger, OTHER, [C], 12.5, patient=False), "the other one is a suspect now, and keeps away"
    assert ledger.died(C, {POISON: 0}, 13.0, sent_at=12.0) == [POISON]
    ledger.check()


def test_a_suspect_beside_one_that_was_freed_is_not_condemned_for_it() -> None:
    ledger = Ledger()
    ledger.died(A, {POISON: 0, GOOD: 0}, 10.0, sent_at=9.0)
    ledger.sent(POISON, [B])
    ledger.freed(POISON, [B])
    ledger.sent(GOOD, [B])
    assert ledger.died(B, {GOOD: 0}, 12.0, sent_at=11.0) == []
    assert ledger.died(B, {POISON: 0}, 12.0, sent_at=10.5) == []
    ledger.ended(POISON, [B])
    ledger.ended(GOOD, [B])
    ledger.check()
    ledger.sent(GOOD, [C])
    ledger.proved(GOOD, [C])
    assert not ledger.is_suspect(GOOD, 13.0)


def test_whoever_was_freed_counts_once_for_those_who_may_be_tried_together() -> None:
    ledger = Ledger()
    everybody = dict.fromkeys(range(10), WELL_TOKENS)
    ledger.died(A, everybody, 10.0, sent_at=0.0)
    ledger.sent(0, [B])
    assert not may_go(ledger, 1, [B], 11.0, patient=False)
    ledger.freed(0, [B])
    ledger.proved(0, [B])
    ledger.sent(1, [B])
    assert may_go(ledger, 2, [B], 12.0, patient=False)
    ledger.sent(2, [B])
    assert not may_go(ledger, 3, [B], 12.0, patient=False), "one was proved: two at a time, not three"
    ledger.check()


def test_no_one_is_alone_for_longer_than_others_can_wait() -> None:
    ledger = Ledger()
    ledger.died(A, {GOOD: 0}, 500.0, sent_at=0.0)
    ledger.sent(GOOD, [B])
    ledger.freed(GOOD, [B])
    ledger.died(B, {GOOD: 0}, 900.0, sent_at=500.0)
    assert ledger.solitude(GOOD) == (SOLO_LIMIT_S, SOLO_LIMIT_S)


def test_who_ended_is_free_nowhere() -> None:
    ledger = Ledger()
    ledger.died(A, {GOOD: 0}, 10.0, sent_at=9.0)
    ledger.sent(GOOD, [B])
    ledger.freed(GOOD, [B])
    ledger.ended(GOOD, [B])
    ledger.check()
    ledger.sent(GOOD, [B])
    assert ledger.died(B, {GOOD: 0}, 12.0, sent_at=11.0) == [GOOD], "it was alone this time"
