"""The waiting room: who is next, who is sent away, and that overload costs neither throughput nor the patience of those let in."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from math import inf

import pytest

from disagg.policy.queue import PASS_S, PROMISED_TIMES, Aside, Entry, Place, Queue, Reason, Shed


class Room:
    """A queue before a server with so many free tokens; the time is what the test says."""

    def __init__(self, free: int = 0, **limits: float) -> None:
        self.queue = Queue(**limits)  # type: ignore[arg-type]
        self.free = free
        self.now = 100.0
        self.count = 0

    def entry(self, user: str = "a", tokens: int = 1, *, priority: int = 0, size: int = 0, patience_s: float = inf) -> Entry:
        self.count += 1
        key = f"{user}{self.count}"
        deadline_at = self.now + patience_s
        return Entry(key, user=user, priority=priority, tokens=tokens, size=size, arrived_at=self.now, deadline_at=deadline_at)

    def offer(self, user: str = "a", tokens: int = 1, **rest: float) -> tuple[Entry, list[Shed]]:
        entry = self.entry(user, tokens, **rest)  # type: ignore[arg-type]
        shed = self.queue.offer(entry, now=self.now)
        self.queue.check()
        return entry, shed

    def wait(self, user: str = "a", tokens: int = 1, **rest: float) -> Entry:
        entry, shed = self.offer(user, tokens, **rest)
        assert shed == []
        assert entry.place is Place.WAITING
        return entry

    def fill(self, user: str, tokens: int, **rest: float) -> tuple[list[Entry], Shed]:
        """Offers until the offered one is sent away; returns those that were let in, and that one."""
        taken: list[Entry] = []
        for _ in range(1000):
            entry, shed = self.offer(user, tokens, **rest)
            if entry.place is Place.GONE:
                return taken, shed[-1]
            taken.append(entry)
        raise AssertionError("nobody is ever sent away")

    def one(self) -> Entry | None:
        """What is dispatched next, if something fits."""

        def fits(entry: Entry) -> bool | None:
            return True if entry.tokens <= self.free else None

        found = self.queue.next(fits, now=self.now)
        self.queue.check()
        if found is None:
            return None
        self.free -= found[0].tokens
        return found[0]

    def some(self, limit: int = 10**9) -> list[Entry]:
        found: list[Entry] = []
        while len(found) < limit and (entry := self.one()) is not None:
            found.append(entry)
        return found

    def users(self, limit: int = 10**9) -> str:
        return "".join(entry.user for entry in self.some(limit))

    def end(self, entry: Entry) -> None:
        self.free += entry.tokens
        self.queue.leave(entry, now=self.now)
        self.queue.check()

    def steady(self, *, tokens: int = 10, every_s: float = 0.1, for_s: float = 3.0) -> None:
        """One request after the other is served while others wait, so that the rate is known; then nobody waits."""
        self.free = tokens
        until = self.now + for_s
        running = [self.wait("steady", tokens), self.wait("steady", tokens)]
        self.some()
        while self.now < until:
            self.now += every_s
            self.end(running.pop(0))
            running.append(self.wait("steady", tokens))
            self.some()
        for entry in running:
            self.end(entry)
        self.free = 0
        assert self.queue.waiting == 0
        assert self.queue.rate == pytest.approx(tokens / every_s, rel=0.2)


# --- who is next


def test_a_request_is_dispatched_at_once_when_there_is_room() -> None:
    room = Room(free=5)
    entry = room.wait(tokens=5)
    assert room.one() is entry
    assert (entry.place, room.queue.waiting, room.queue.running) == (Place.RUNNING, 0, 1)
    room.end(entry)
    assert (entry.place, room.queue.running) == (Place.GONE, 0)


def test_what_fits_said_comes_back() -> None:
    room = Room()
    entry = room.wait()
    assert room.queue.next(lambda _entry: "pair", now=room.now) == (entry, "pair")
    assert room.queue.next(lambda _entry: "pair", now=room.now) is None


def test_a_user_is_served_in_the_order_of_arrival() -> None:
    room = Room()
    entries = [room.wait(tokens=n) for n in (3, 1, 2)]
    room.free = 6
    assert room.some() == entries


def test_more_important_ones_go_first() -> None:
    room = Room()
    for priority in (0, 5, -1, 5):
        room.wait(priority=priority)
    room.free = 4
    assert [entry.priority for entry in room.some()] == [5, 5, 0, -1]


def test_a_lone_request_passes_a_flood() -> None:
    room = Room(free=3)
    for _ in range(50):
        room.wait("a", 1)
    room.some()
    room.wait("b", 1)
    room.free = 3
    assert "b" in room.users(2)


def test_users_share_by_tokens_and_not_by_requests() -> None:
    room = Room()
    for _ in range(40):
        room.wait("a", 30)
    for _ in range(120):
        room.wait("b", 10)
    room.free = 1200
    tokens = Counter[str]()
    for entry in room.some():
        tokens[entry.user] += entry.tokens
    assert abs(tokens["a"] - tokens["b"]) <= 30


def test_who_was_away_has_saved_nothing_up() -> None:
    room = Room()
    for _ in range(20):
        room.wait("a")
    room.free = 10
    room.some()
    for _ in range(10):
        room.wait("b")
    room.free = 10
    assert Counter(room.users())["a"] in {4, 5, 6}


def test_what_left_costs_its_user_nothing() -> None:
    room = Room()
    gone = [room.wait("a", 100) for _ in range(5)]
    room.wait("b", 1)
    for entry in gone:
        room.end(entry)
    room.wait("a", 1)
    room.wait("b", 1)
    room.free = 3
    assert Counter(room.users(2)) == {"a": 1, "b": 1}


def test_a_big_head_is_passed_for_a_second_and_not_longer() -> None:
    room = Room(free=5)
    big = room.wait("a", 10)
    small = [room.wait("b", 2), room.wait("a", 2), room.wait("c", 2)]
    assert set(room.some()) <= set(small)
    assert room.free == 1
    room.free = 5
    room.now += PASS_S
    late = room.wait("b", 1)
    assert room.some() == []
    room.free = 10
    assert room.some() == [big]
    assert late.place is Place.WAITING


def test_nothing_that_is_as_big_as_the_head_is_tried() -> None:
    room = Room()
    for _ in range(6):
        room.wait(tokens=7)
    asked: list[Entry] = []
    assert room.queue.next(asked.append, now=room.now) is None
    assert len(asked) == 1


def test_who_may_not_go_where_there_is_room_is_passed_by_all_others_for_as_long_as_that_lasts() -> None:
    room = Room()
    aside = [room.wait("a", 5) for _ in range(20)]
    room.now += 2 * PASS_S
    other = room.wait("b", 5)

    def fits(entry: Entry) -> str | Aside:
        return Aside.ASIDE if entry in aside else "there"

    assert room.queue.next(fits, now=room.now) == (other, "there")
    assert room.queue.next(fits, now=room.now) is None
    room.now += 2 * PASS_S
    late = room.wait("b", 50)
    assert room.queue.next(fits, now=room.now) == (late, "there"), "however long they have waited, and however big the other one is"
    assert room.queue.next(lambda _: "anywhere", now=room.now) == (aside[0], "anywhere"), "they have kept their places"
    room.queue.check()


def test_behind_one_that_stands_aside_the_first_that_does_not_fit_is_the_head() -> None:
    room = Room()
    aside, big = room.wait("a", 5), room.wait("b", 10)
    small = room.wait("c", 2)

    def fits(entry: Entry) -> str | Aside | None:
        return Aside.ASIDE if entry is aside else None if entry is big else "there"

    assert room.queue.next(fits, now=room.now) == (small, "there")
    room.now += PASS_S
    room.wait("c", 2)
    assert room.queue.next(fits, now=room.now) is None
    assert aside.head_at is None


# --- bounded


def test_nobody_waits_longer_than_the_limit() -> None:
    room = Room(timeout_s=10.0)
    early = room.wait()
    room.now += 4
    late = room.wait()
    assert room.queue.next_deadline() == 110.0
    room.now = 110.0
    (shed,) = room.queue.expire(now=room.now)
    assert (shed.entry, shed.status, shed.reason, early.place) == (early, 503, Reason.TIMEOUT, Place.GONE)
    assert room.queue.next_deadline() == 114.0
    room.end(late)
    assert room.queue.next_deadline() is None
    assert room.queue.expire(now=200.0) == []


def test_a_clients_own_deadline_ends_its_wait() -> None:
    room = Room()
    room.wait(patience_s=3.0)
    assert room.queue.next_deadline() == 103.0
    (shed,) = room.queue.expire(now=103.0)
    assert (shed.status, shed.reason) == (504, Reason.DEADLINE)


def test_before_the_rate_is_known_nobody_is_sent_away_for_time() -> None:
    room = Room()
    for _ in range(1000):
        room.wait(tokens=100)
    assert room.queue.estimated_wait_s() is None


def test_the_rate_is_known_when_as_many_have_ended_as_run_at_once() -> None:
    """At a cold start the first ones end late, and few of them: by that alone the whole queue would be sent away."""
    room = Room(free=100)
    for _ in range(40):
        room.wait(tokens=10)
    running = room.some()
    for ended in range(1, 21):
        assert (room.queue.rate is None) == (ended <= 10)
        room.now += 1.0 if ended == 1 else 0.1
        room.end(running.pop(0))
        running += room.some()
    assert room.queue.rate == pytest.approx(70, rel=0.5)


def test_who_would_wait_too_long_is_sent_away_at_once() -> None:
    room = Room(timeout_s=5.0)
    room.steady()  # 100 tokens a second
    _, shed = room.fill("a", 10)
    assert (shed.status, shed.reason) == (503, Reason.WAIT)
    assert 400 <= room.queue.tokens <= 620
    assert room.offer("a", 10, patience_s=0.5)[1][0].reason is Reason.WAIT


def test_a_wait_longer_than_the_clients_patience_is_not_begun() -> None:
    room = Room()
    room.steady()
    for _ in range(20):
        room.wait("a", 10)
    assert room.offer("a", 10, patience_s=1.0)[1][0].reason is Reason.WAIT
    assert room.offer("a", 10, patience_s=5.0)[1] == []


def test_who_would_hardly_be_served_in_time_is_sent_away_at_once() -> None:
    """Estimates err, and nobody should wait in vain."""
    room = Room(timeout_s=5.0)
    room.steady()
    room.fill("a", 10)
    assert 3.5 < (room.queue.estimated_wait_s("a") or 0.0) < 4.5


def test_a_lone_user_is_let_into_a_full_queue_and_the_flood_makes_way() -> None:
    room = Room(timeout_s=5.0)
    room.steady()
    room.fill("flood", 10)
    waiting = room.queue.waiting
    entry, shed = room.offer("lone", 30)
    assert entry.place is Place.WAITING
    assert {each.entry.user for each in shed} <= {"flood"}
    assert all(each.reason is Reason.DISPLACED and each.status == 429 for each in shed)
    assert room.queue.waiting == waiting + 1 - len(shed)


def test_the_newest_of_the_lowest_priority_makes_way_for_a_more_important_one() -> None:
    room = Room(timeout_s=5.0)
    room.steady()
    low, _ = room.fill("a", 10)
    entry, shed = room.offer("a", 50, priority=1)
    assert entry.place is Place.WAITING
    assert [each.entry for each in shed] == low[::-1][: len(shed)]
    assert shed
    room.free = 50
    assert room.one() is entry


def test_a_less_important_one_never_displaces_anybody() -> None:
    room = Room(timeout_s=5.0)
    room.steady()
    room.fill("a", 10, priority=1)
    waiting = room.queue.waiting
    entry, (shed,) = room.offer("b", 10, priority=0)
    assert (shed.entry, shed.reason, room.queue.waiting) == (entry, Reason.WAIT, waiting)


def test_bodies_are_bounded_in_bytes() -> None:
    room = Room(bytes_limit=1000)
    first = room.wait("a", size=600)
    entry, (shed,) = room.offer("a", size=500)
    assert (shed.entry, shed.status, shed.reason, entry.place) == (entry, 503, Reason.BYTES, Place.GONE)
    assert room.queue.size == 600
    important, (shed,) = room.offer("b", size=500, priority=1)
    assert (shed.entry, shed.reason, important.place) == (first, Reason.DISPLACED, Place.WAITING)
    assert room.queue.size == 500
    assert room.offer("c", size=1001, priority=9)[1][0].reason is Reason.BYTES
    assert important.place is Place.WAITING, "somebody was sent away for one that is too big anyway"


def test_a_crowd_of_bodies_makes_way_for_a_lone_user() -> None:
    room = Room(bytes_limit=1000)
    flood = [room.wait("flood", size=100) for _ in range(10)]
    entry, shed = room.offer("lone", size=250)
    assert entry.place is Place.WAITING
    assert [each.entry for each in shed] == flood[:-4:-1]


def test_what_was_promised_is_never_sent_away_for_others() -> None:
    room = Room(timeout_s=5.0, bytes_limit=1000)
    room.steady()
    room.fill("a", 10)
    again = Entry("again", user="a", tokens=10, size=2000, arrived_at=room.now, promised=True)
    assert all(shed.entry is not again for shed in room.queue.offer(again, now=room.now))
    assert again.place is Place.WAITING
    assert all(shed.entry is not again for shed in room.offer("vip", 100, priority=7)[1])
    late = [shed.entry for shed in room.queue.expire(now=room.now + 5.0)]
    assert again not in late
    assert [shed.entry for shed in room.queue.expire(now=room.now + 5.0 * PROMISED_TIMES)] == [again]


# --- what is said to those who go


def test_who_holds_more_than_a_fair_share_is_told_so() -> None:
    room = Room(free=1, timeout_s=5.0)
    room.steady()
    alone = room.fill("flood", 10)[1]
    assert (alone.status, alone.reason) == (503, Reason.WAIT), "nobody else is there"
    room.offer("lone", 10)
    shed = room.fill("flood", 10)[1]
    assert (shed.status, shed.reason) == (429, Reason.WAIT)
    assert "fair share" in shed.sentence


def test_retry_after_is_the_time_in_which_the_queue_drains() -> None:
    room = Room(timeout_s=5.0)
    room.steady()  # 100 tokens a second
    room.wait("a", 5000)  # fifty seconds of work: nobody was before it
    (shed,) = room.offer("a", 10)[1]
    assert 40 <= shed.retry_after_s <= 56
    assert f"try again in {shed.retry_after_s} s" in shed.sentence
    late = room.queue.offer(room.entry("a"), now=room.now, jitter=0.99)[0]
    assert shed.retry_after_s * 1.4 <= late.retry_after_s <= shed.retry_after_s * 1.5 + 1


def test_a_short_wait_is_not_told_to_be_a_long_one() -> None:
    """Those who come together are spread, over as much time again at most."""
    room = Room(timeout_s=5.0)
    room.steady()
    room.wait("a", 500)
    for jitter in (0.0, 0.5, 0.99):
        (shed,) = room.queue.offer(room.entry("a"), now=room.now, jitter=jitter)
        assert shed.retry_after_s <= 2


@pytest.mark.parametrize(("tokens", "wanted"), [(601, 1), (10**6, 60)])
def test_retry_after_is_between_a_second_and_a_minute(tokens: int, wanted: int) -> None:
    room = Room(timeout_s=5.0)
    room.steady()
    room.wait("a", tokens)
    (shed,) = room.offer("a", 10)[1]
    assert wanted <= shed.retry_after_s <= wanted + 1


# --- no standing queue


def overloaded(room: Room, *, for_s: float, per_step: int = 3, user: str = "a") -> list[Shed]:
    """Thrice what the server can do, 100 tokens a second, in steps of a tenth."""
    shed: list[Shed] = []
    running: list[Entry] = []
    for _ in range(round(for_s * 10)):
        room.now += 0.1
        if running:
            room.end(running.pop())
        for _ in range(per_step):
            shed += room.offer(user, 10)[1]
        room.free = 10
        running += room.some()
        room.free = 0
    for entry in running:
        room.end(entry)
    return shed


def test_a_burst_is_absorbed_and_a_standing_queue_is_not() -> None:
    room = Room()
    room.steady()
    assert overloaded(room, for_s=2.0) == []
    assert "calm" in repr(room.queue)
    shed = overloaded(room, for_s=20.0)
    assert room.queue.standing
    assert {each.reason for each in shed} == {Reason.OVERLOAD}
    assert 0.3 <= room.queue.tokens / 100 <= 0.8, "the queue is about half a second long"


def test_it_is_over_when_nobody_had_to_go_for_a_while() -> None:
    room = Room()
    room.steady()
    overloaded(room, for_s=20.0)
    assert room.queue.standing
    assert overloaded(room, for_s=6.0, per_step=0) == []
    assert overloaded(room, for_s=1.0, per_step=1) == []
    assert "calm" in repr(room.queue)
    assert overloaded(room, for_s=1.5) == [], "the next burst is absorbed again"


def test_who_holds_little_does_not_pay_for_the_queue_of_a_flood() -> None:
    room = Room(free=1000)
    room.wait("flood", 1000)
    room.some()
    room.steady()
    for _ in range(6):
        room.wait("flood", 10)
    room.queue._levels[0].standing.on = True
    assert room.offer("lone", 60)[1] == []
    assert room.offer("third", 400)[1][0].reason is Reason.OVERLOAD
    assert room.offer("flood", 10)[1][0].reason is Reason.OVERLOAD


def test_a_stalled_pool_sheds_instead_of_hoping() -> None:
    room = Room()
    room.steady()
    room.wait("a", 10)
    room.one()
    for _ in range(300):
        room.now += 0.1
        room.queue.next(lambda _entry: None, now=room.now)
    wait_s = room.queue.estimated_wait_s("a")
    assert wait_s is not None
    assert wait_s > 10.0


def test_a_failed_engine_does_not_count_as_a_fast_one() -> None:
    room = Room()
    room.steady()
    rate = room.queue.rate
    room.free = 5000
    room.wait("a", 5000)
    entry = room.one()
    assert entry is not None
    room.wait("a", 5000)
    room.one()
    room.queue.leave(entry, now=room.now, served=False)
    assert room.queue.rate == rate


# --- misuse, books


def test_an_entry_is_offered_once_and_may_leave_often() -> None:
    room = Room()
    entry = room.wait()
    with pytest.raises(AssertionError, match="was offered before"):
        room.queue.offer(entry, now=room.now)
    for _ in range(3):
        room.end(entry)
    assert room.queue.waiting == 0
    never = room.entry()
    room.queue.leave(never, now=room.now)
    room.queue.check()


def test_nothing_is_kept_of_users_that_are_gone() -> None:
    room = Room(free=10**6)
    for n in range(2000):
        entry = room.wait(f"user{n}", priority=n % 3)
        if n % 2:
            room.some()
        room.end(entry)
    for n in range(2000):
        room.end(room.wait("same", 1 + n % 2))
    queue = room.queue
    assert (queue._levels, queue._held, queue._order, queue.tokens, queue.size) == ({}, {}, [], 0, 0)
    assert len(queue._deadlines) < 40


def test_records_do_not_pile_up_while_nobody_is_served() -> None:
    room = Room()
    room.wait("stays")
    for _ in range(1000):
        room.end(room.wait("comes and goes"))
    assert len(room.queue._levels[0].heap) < 40


def test_it_tells_its_story() -> None:
    room = Room(free=1)
    entry = room.wait()
    room.one()
    room.end(entry)
    assert [what for _, number, what in room.queue.history if number == entry.number] == ["offered", "dispatched", "left"]
    assert repr(room.queue) == "<Queue 0 waiting (0 tokens, 0 bytes), 0 running, rate unknown tokens/s, calm>"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_random_walk_keeps_its_books(seed: int) -> None:
    chance = random.Random(seed)
    queue = Queue(timeout_s=3.0, bytes_limit=1500, target_s=0.2, interval_s=0.5)
    free, now, live, ended = 60, 0.0, list[Entry](), Counter[str]()

    def fits(entry: Entry) -> bool | Aside | None:
        if chance.random() < 0.1:
            return Aside.ASIDE
        return True if entry.tokens <= free else None

    def note(shed: list[Shed]) -> None:
        for each in shed:
            assert each.entry.place is Place.GONE
            assert 1 <= each.retry_after_s <= 90
            assert each.status in {429, 503, 504}
            ended[each.reason] += 1

    for step in range(20_000):
        now += chance.expovariate(30)
        act = chance.random()
        if act < 0.5:
            entry = Entry(
                step,
                user=chance.choice("aaabcd"),
                priority=chance.choice((0, 0, 0, 1, -1)),
                tokens=chance.choice((1, 5, 5, 20, 60)),
                size=chance.randrange(400),
                arrived_at=now - chance.random() * 0.01,
                deadline_at=now + chance.choice((1.0, inf)),
                promised=chance.random() < 0.05,
            )
            live.append(entry)
            note(queue.offer(entry, now=now, jitter=chance.random()))
        elif act < 0.8 and live:
            entry = live.pop(chance.randrange(len(live)))
            if entry.place is Place.RUNNING:
                free += entry.tokens
            if entry.place is Place.RUNNING or chance.random() < 0.1:
                queue.leave(entry, now=now, served=chance.random() < 0.9)
                ended["left"] += 1
            elif entry.place is Place.WAITING:
                live.append(entry)
        at = queue.next_deadline()
        if at is not None and at <= now:
            note(queue.expire(now=now, jitter=chance.random()))
        while chance.random() < 0.8 and (found := queue.next(fits, now=now)) is not None:
            free -= found[0].tokens
        assert free >= 0
        assert queue.size - sum(e.size for e in live if e.promised and e.place is Place.WAITING) <= 1500
        queue.check()
    assert ended.keys() >= {"left", *Reason}, "the walk did not come everywhere"
    for entry in live:
        queue.leave(entry, now=now)
    queue.check()
    assert queue.waiting == queue.running == 0


# --- overload, in virtual time

SLOTS = 16
SERVICE_S = 1.0
TOKENS = 100
SECONDS = 120.0
SETTLED = 20.0
LATEST_S = 15.0


class Outcome:
    """What an open-loop load came to; goodput is in requests per second that ended in time, after the start."""

    def __init__(self, goodput: float, waits: list[float], offered: Counter[str], admitted: Counter[str], shed: Counter[str]) -> None:
        self.goodput = goodput
        self.waits = sorted(waits) or [0.0]
        self.offered = offered
        self.admitted = admitted
        self.shed = shed

    @property
    def median_s(self) -> float:
        return self.waits[len(self.waits) // 2]

    @property
    def p99_s(self) -> float:
        return self.waits[int(len(self.waits) * 0.99)]


def simulate(load: dict[str, float], make: Callable[[], Queue] = Queue, seed: int = 1) -> Outcome:
    """Exponential arrivals of each user, at so many times what the server can do; exponential service times."""
    chance, queue = random.Random(seed), make()
    peak = SLOTS / SERVICE_S
    arrivals = [(chance.expovariate(peak * share), user) for user, share in load.items()]
    heapq.heapify(arrivals)
    ends: list[tuple[float, int, Entry]] = []
    offered, admitted, shed, good, waits, now, count = Counter[str](), Counter[str](), Counter[str](), 0, list[float](), 0.0, 0
    while now < SECONDS:
        deadline = queue.next_deadline() or inf
        end = ends[0][0] if ends else inf
        now = min(arrivals[0][0], end, deadline)
        if deadline == now:
            shed.update(each.entry.user for each in queue.expire(now=now))
        elif end == now:
            _, _, entry = heapq.heappop(ends)
            queue.leave(entry, now=now)
            good += now > SETTLED and now - entry.arrived_at <= LATEST_S
        else:
            _, user = heapq.heappop(arrivals)
            heapq.heappush(arrivals, (now + chance.expovariate(peak * load[user]), user))
            count += 1
            offered[user] += 1
            entry = Entry(count, user=user, tokens=TOKENS, arrived_at=now)
            shed.update(each.entry.user for each in queue.offer(entry, now=now, jitter=chance.random()))
        while (found := queue.next(lambda _entry: True if len(ends) < SLOTS else None, now=now)) is not None:
            entry = found[0]
            admitted[entry.user] += 1
            if now > SETTLED:
                waits.append(now - entry.arrived_at)
            heapq.heappush(ends, (now + chance.expovariate(1 / SERVICE_S), count, entry))
    return Outcome(good / (SECONDS - SETTLED), waits, offered, admitted, shed)


def undefended() -> Queue:
    """First come, first served, without a bound."""
    queue = Queue(timeout_s=10**9, target_s=10**9, bytes_limit=1 << 60)
    offer = queue.offer

    def as_one_user(entry: Entry, *, now: float, jitter: float = 0.0) -> list[Shed]:
        entry.user = ""
        return offer(entry, now=now, jitter=jitter)

    queue.offer = as_one_user  # type: ignore[method-assign]
    return queue


def even(load: float) -> dict[str, float]:
    return {"a": load / 2, "b": load / 2}


@pytest.fixture(scope="module")
def peak() -> float:
    """The most that the server does in time: at the load that just fills it, all waits allowed."""
    return max(simulate(even(load), undefended).goodput for load in (0.9, 1.0))


def test_half_a_load_is_served_whole() -> None:
    found = simulate(even(0.5))
    assert not found.shed
    assert found.p99_s < 0.5


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("load", "least"), [(1.0, 0.9), (2.0, 0.95), (10.0, 0.9)])
def test_overload_costs_no_throughput_and_no_patience(peak: float, load: float, least: float, seed: int) -> None:
    found = simulate(even(load), seed=seed)
    assert found.goodput >= least * peak
    assert found.p99_s < 2.5
    assert found.median_s < 1.0
    assert max(found.admitted.values()) < 1.1 * min(found.admitted.values())


@pytest.mark.parametrize("load", [2.0, 10.0])
def test_without_the_queues_defence_overload_costs_everything(peak: float, load: float) -> None:
    found = simulate(even(load), undefended)
    assert found.goodput < 0.5 * peak
    assert found.p99_s > 20.0


def test_a_lone_user_is_served_whole_beside_a_flood() -> None:
    found = simulate({"flood": 10.0, "lone": 0.1})
    assert found.offered["lone"] > 100
    assert found.shed["lone"] == 0
    assert found.shed["flood"] > 10_000
    assert found.admitted["flood"] > 0.8 * SLOTS * SECONDS


def test_without_fair_shares_a_lone_user_waits_with_the_flood() -> None:
    found = simulate({"flood": 10.0, "lone": 0.1}, undefended)
    assert found.admitted["lone"] < 0.5 * found.offered["lone"]


def test_many_users_with_a_request_each_make_no_standing_queue() -> None:
    """Who has several waiting stands behind those who have one: the tail is longer than with few users."""
    found = simulate({f"u{n}": 0.1 for n in range(100)})
    assert found.median_s < 1.0
    assert found.p99_s < 6.0
    assert found.goodput > 0.9 * SLOTS / SERVICE_S
