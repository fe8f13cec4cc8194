"""The waiting room of one model's pool: who waits, who is next, who is sent away and when to come again. Pure.

Theory of operation.

* **Who is next.** The highest priority first. Within a priority, start-time fair queueing by tokens: every user has a virtual clock that
  runs on by the tokens of what was dispatched for it, and whose clock shows the earliest time is next. Who had nothing waiting starts at
  the clock of the level, so that a lone request passes the flood of another user. Within a user it is first come, first served.
* **What does not fit** keeps its place. For a second smaller ones may pass it, of its own user too; then it waits for room with everything
  behind it, so that big ones are not starved. One for which there is room, but not where it may go, stands aside instead: others pass it
  as if it were not there, and it is still asked first when something changes.
* **Bounded in time and bytes.** How long an arrival would wait is the tokens that go before it, divided by the measured rate at which
  tokens are released. Over the limit, or close to it, it is sent away at once; if others of lower priority wait, or a user crowds the
  level, their newest goes.
* **No standing queue.** A queue that absorbs a burst is good; one that is never short is only delay. When the shortest wait of what was
  dispatched stayed above a target for an interval (the idea of CoDel), arrivals are let in only while they would wait less than the target,
  until for an interval nobody had to be sent away and the waits are below it. This is kept for each priority, and for each user in it: the
  short waits of a lone user say nothing about the queue of a flood, and who holds little beside the others does not pay for theirs.
* **The rate** is what was released per second of the time in which somebody waited: only then are the engines known to be full. It is
  unknown, and nobody is sent away for time, until as many requests have ended as run at once. What is released while nobody waits says only
  that the rate is not lower.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from enum import Enum, StrEnum
from heapq import heapify, heappop, heappush
from itertools import islice
from math import ceil, exp, inf
from typing import NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

TIMEOUT_S = 10.0
TARGET_S = 0.5
INTERVAL_S = 2.0
BYTES_LIMIT = 64 << 20
SURE = 0.8
"""Who would wait longer than this share of the longest wait is sent away at once: estimates err, and nobody should wait in vain."""
PROMISED_TIMES = 6.0
"""Who was let in before may wait so many times as long: a part of an answer that nobody ends is worth nothing."""
PASS_S = 1.0
"""For how long smaller ones may pass a head that does not fit."""
RETRY_LIMIT_S = 60
SPREAD_S = 3.0

_LOOK = 8  # so many behind a blocked head are tried
_LOOK_ASIDE = 32  # of each level so many are asked, if those before them stand aside
_FEWEST_RELEASES = 4
_RATE_STEP_S = 0.01
_HISTORY = 256


class Place(StrEnum):
    """Where an entry is."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    GONE = "gone"


class Aside(Enum):
    """There is room, but not for this entry: it must not go where it is."""

    ASIDE = "aside"


class Reason(StrEnum):
    """Why an entry was sent away, one word for counters."""

    WAIT = "wait"
    OVERLOAD = "overload"
    BYTES = "bytes"
    DISPLACED = "displaced"
    TIMEOUT = "timeout"
    DEADLINE = "deadline"


class Entry(msgspec.Struct, eq=False):
    """A request that wants to be dispatched. Made by the caller, who changes nothing of it afterwards.

    Attributes:
        key: whatever the caller finds it by.
        tokens: what it needs of its decode engine, as in `disagg.policy.ledger`; at least one.
        arrived_at: monotonic seconds, from which its wait is counted.
        user: opaque; requests of one user share one turn.
        priority: larger is more important; there should be a few of them, not one for each request.
        size: bytes of its body.
        deadline_at: when its client's patience ends, monotonic seconds.
        promised: it was dispatched before and lost its engine: it is sent away only when its time is up.
        place: where it is now; this and what follows are the queue's own.
        head_at: when it was first found to be next and not to fit.
        number: its place among all that were offered, 0 if it never waited; the history tells of numbers, for a key may hold a whole
            request.
        taken_at: when it was dispatched.
        account: the books that it stands in.
    """

    key: object
    tokens: int
    arrived_at: float
    user: str = ""
    priority: int = 0
    size: int = 0
    deadline_at: float = inf
    promised: bool = False
    place: Place = Place.NEW
    head_at: float | None = None
    number: int = 0
    taken_at: float = 0.0
    account: _Account | None = None

    def __repr__(self) -> str:
        return f"<Entry {self.key} {self.place} priority {self.priority}, {self.tokens} tokens, {self.size} bytes>"


class Shed(NamedTuple):
    """An entry that was sent away, and what its client is told.

    Attributes:
        status: 429 if its user holds more than its share, 504 if its own deadline passed, else 503.
        retry_after_s: when to come again, whole seconds.
        sentence: for people.
    """

    entry: Entry
    status: int
    retry_after_s: int
    sentence: str
    reason: Reason


class _Standing:
    """Whether a queue stands: its shortest wait stayed above the target."""

    __slots__ = ("above_since", "on", "refused_at")

    def __init__(self) -> None:
        self.above_since: float | None = None
        self.refused_at = -inf
        self.on = False

    def saw(self, wait_s: float, now: float, target_s: float, interval_s: float) -> None:
        """Something was dispatched after this wait."""
        if wait_s < target_s:
            self.above_since = None
            self.on = self.on and now - self.refused_at < interval_s
        elif self.above_since is None:
            self.above_since = now
        elif now - self.above_since >= interval_s:
            self.on = True


class _Account:
    """One user at one priority. Its clock shows when it is next, in tokens."""

    __slots__ = ("clock", "entries", "level", "record", "running", "size", "standing", "tokens", "user")

    def __init__(self, user: str, level: _Level) -> None:
        self.user = user
        self.level = level
        self.entries: OrderedDict[Entry, None] = OrderedDict()
        self.tokens = 0
        self.size = 0
        self.running = 0
        self.clock = 0
        self.record = 0
        self.standing = _Standing()


class _Level:
    """One priority: its accounts by their clocks, and by how many entries they have waiting."""

    __slots__ = ("accounts", "clock", "crowds", "heap", "most", "priority", "records", "size", "standing", "tokens", "users", "waiting")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.accounts: dict[str, _Account] = {}
        self.heap: list[tuple[int, int, _Account]] = []  # a record counts only if it is its account's last one
        self.crowds: dict[int, OrderedDict[_Account, None]] = {}
        self.most = 0
        self.records = 0
        self.clock = 0
        self.tokens = 0
        self.size = 0
        self.waiting = 0
        self.users = 0
        self.standing = _Standing()

    def add(self, account: _Account, entry: Entry) -> None:
        if not account.entries:
            account.clock = max(account.clock, self.clock)
            self.users += 1
            self._list(account)
        account.entries[entry] = None
        self._count(account, entry, 1)

    def remove(self, account: _Account, entry: Entry) -> None:
        del account.entries[entry]
        self._count(account, entry, -1)
        if not account.entries:
            account.record = 0
            self.users -= 1

    def charge(self, account: _Account, entry: Entry, *, in_turn: bool) -> None:
        """Its user pays for what is dispatched. The level's clock follows those whose turn it was."""
        if in_turn:
            self.clock = max(self.clock, account.clock)
        account.clock += entry.tokens
        if account.entries:
            self._list(account)

    def head(self) -> Entry | None:
        """Who is next."""
        heap = self.heap
        while heap and heap[0][1] != heap[0][2].record:
            heappop(heap)
        return next(iter(heap[0][2].entries)) if heap else None

    def followers(self, head: Entry, limit: int) -> Iterator[Entry]:
        """Some behind the head: the next users' first ones, then its own user's."""
        near = sorted(self.heap[: 2 * limit])
        heads = [next(iter(a.entries)) for _, record, a in near if record == a.record and a is not head.account]
        yield from heads[:limit]
        if head.account is not None:
            yield from islice(head.account.entries, 1, 1 + max(0, limit - len(heads)))

    def crowd(self) -> _Account | None:
        """The account with the most entries waiting; of equal ones the one that has had so many for longest."""
        return next(iter(self.crowds[self.most])) if self.most else None

    def _list(self, account: _Account) -> None:
        self.records += 1
        account.record = self.records
        heappush(self.heap, (account.clock, account.record, account))
        if len(self.heap) > 2 * self.users + 16:
            self.heap = [r for r in self.heap if r[1] == r[2].record]
            heapify(self.heap)

    def _count(self, account: _Account, entry: Entry, sign: int) -> None:
        account.tokens += sign * entry.tokens
        account.size += sign * entry.size
        self.tokens += sign * entry.tokens
        self.size += sign * entry.size
        self.waiting += sign
        new = len(account.entries)
        old = new - sign
        if old:
            crowd = self.crowds[old]
            del crowd[account]
            if not crowd:
                del self.crowds[old]
        if new:
            self.crowds.setdefault(new, OrderedDict())[account] = None
        if new > self.most or (old == self.most and old not in self.crowds):
            self.most = new


class _Rate:
    """Tokens released per second, over the time in which somebody waited, weighted by how long ago that was."""

    __slots__ = ("_at", "_full", "_full_s", "_recent", "_releases", "_service_s", "due_at", "known", "was_full")

    def __init__(self) -> None:
        self._at = -inf
        self._recent = 0.0
        self._full = 0.0
        self._full_s = 0.0
        self._releases = 0
        self._service_s = 1.0
        self.was_full = False
        self.due_at = -inf
        self.known = False

    @property
    def _memory_s(self) -> float:
        return min(max(2.0, 2 * self._service_s), 30.0)

    def advance(self, now: float, *, full: bool) -> None:
        """Time passes, in which the engines were full or not."""
        passed = now - self._at
        self.was_full = full
        self._at = max(now, self._at)
        self.due_at = self._at + _RATE_STEP_S
        if not 0.0 < passed < inf:
            return
        kept = exp(-passed / self._memory_s)
        self._recent *= kept
        if full:
            self._full *= kept
            self._full_s = self._full_s * kept + self._memory_s * (1 - kept)

    def released(self, tokens: int, service_s: float, running: int, *, full: bool) -> None:
        """A request ended that had run for so long, beside so many others."""
        self._service_s += 0.1 * (service_s - self._service_s)
        self._recent += tokens
        if full:
            self._full += tokens
            self._releases += 1
            self.known = self.known or (self._releases >= max(_FEWEST_RELEASES, running) and self._full_s > 0)

    def per_s(self) -> float | None:
        """None while it is unknown; never zero."""
        if not self.known:
            return None
        return max(self._full / self._full_s, self._recent / self._memory_s, 1e-9)


class Queue:
    """Entries that wait for room, of one model.

    Every method takes the time as monotonic seconds that never go back. `next` is called until it returns None whenever something may have
    changed: after `offer`, after `leave`, after a report or a new view. An entry that `next` returned runs until `leave`.

    Args:
        timeout_s: nobody waits longer.
        target_s: what a wait may be for long.
        interval_s: for how long it may be more.
        bytes_limit: of all bodies that wait.

    Attributes:
        waiting: how many wait.
    """

    def __init__(
        self,
        *,
        timeout_s: float = TIMEOUT_S,
        target_s: float = TARGET_S,
        interval_s: float = INTERVAL_S,
        bytes_limit: int = BYTES_LIMIT,
    ) -> None:
        self.timeout_s = timeout_s
        self.target_s = target_s
        self.interval_s = interval_s
        self.bytes_limit = bytes_limit
        self.history: deque[tuple[float, object, str]] = deque(maxlen=_HISTORY)
        self._levels: dict[int, _Level] = {}
        self._order: list[int] = []  # priorities, the lowest first
        self._held: dict[str, int] = {}  # tokens that wait and run, by user
        self._total = 0
        self._tokens = 0
        self._size = 0
        self.waiting = 0
        self._running = 0
        self._deadlines: list[tuple[float, int, Entry]] = []
        self._offers = 0
        self._blocked = False
        self._rate = _Rate()

    def __repr__(self) -> str:
        rate = self.rate
        speed = "unknown" if rate is None else f"{rate:.0f}"
        return (
            f"<Queue {self.waiting} waiting ({self._tokens} tokens, {self._size} bytes), {self._running} running, "
            f"rate {speed} tokens/s, {'standing' if self.standing else 'calm'}>"
        )

    @property
    def running(self) -> int:
        """How many were dispatched and have not ended."""
        return self._running

    @property
    def tokens(self) -> int:
        """Of those that wait."""
        return self._tokens

    @property
    def size(self) -> int:
        """Bytes of the bodies of those that wait."""
        return self._size

    @property
    def rate(self) -> float | None:
        """Tokens per second that are released when the engines are full; None while it is unknown."""
        return self._rate.per_s()

    @property
    def standing(self) -> bool:
        """True while arrivals of some priority are let in only if they would wait less than the target."""
        return any(level.standing.on for level in self._levels.values())

    def estimated_wait_s(self, user: str = "", priority: int = 0, tokens: int = 1) -> float | None:
        """How long an arrival would wait; None while the rate is unknown."""
        return self._estimate(user, priority, tokens)

    # --- arrivals

    def offer(self, entry: Entry, *, now: float, jitter: float = 0.0) -> list[Shed]:
        """Takes in an entry, or sends it away.

        Args:
            entry: a new one.
            now: monotonic seconds.
            jitter: a number in [0, 1) that spreads the ``Retry-After`` of those who come at the same time.

        Returns:
            Who is sent away: the entry itself, or others for it; usually nobody.
        """
        assert entry.place is Place.NEW, f"{entry!r} was offered before"
        self._advance(now)
        self._offers += 1
        entry.number = self._offers
        refused = None if entry.promised else self._refusal(entry, now, jitter)
        if refused is not None:
            entry.place = Place.GONE
            return [refused]
        account = self._account(entry)
        shed = self._make_room(entry, account, now, jitter)
        if self._size + entry.size > self.bytes_limit and not entry.promised:
            entry.place = Place.GONE
            self._tidy(account)
            return [*shed, self._send_away(entry, Reason.BYTES, 0.0, now, jitter)]
        self._add(account, entry, now)
        return shed + self._displace(entry, account, now, jitter)

    def admit(self, entry: Entry, *, now: float) -> None:
        """An entry goes at once: nobody waits, and there is room for it."""
        assert entry.place is Place.NEW, f"{entry!r} was offered before"
        self._advance(now)
        account = self._account(entry)
        entry.account, entry.place, entry.taken_at = account, Place.RUNNING, now
        account.running += 1
        self._running += 1
        self._total += entry.tokens
        self._held[entry.user] = self._held.get(entry.user, 0) + entry.tokens

    def _refusal(self, entry: Entry, now: float, jitter: float) -> Shed | None:
        wait_s = self._estimate(entry.user, entry.priority, entry.tokens)
        if wait_s is None:
            return None
        limit_s = min(self.timeout_s * SURE, entry.deadline_at - now)
        if wait_s > limit_s:
            return self._send_away(entry, Reason.WAIT, wait_s - max(0.0, limit_s), now, jitter)
        if wait_s < self.target_s:
            return None
        standing = [each for each in self._standings(entry) if each.on]
        for each in standing:
            each.refused_at = now
        return self._send_away(entry, Reason.OVERLOAD, wait_s - self.target_s, now, jitter) if standing else None

    def _standings(self, entry: Entry) -> Iterator[_Standing]:
        """The queues that it would make longer."""
        level = self._levels.get(entry.priority)
        if level is not None:
            if not self._modest(entry):
                yield level.standing
            if entry.user in level.accounts:
                yield level.accounts[entry.user].standing

    def _modest(self, entry: Entry) -> bool:
        """Its user would hold at most half of a fair share: nobody does where all hold the same."""
        held = self._held.get(entry.user, 0)
        users = len(self._held) + (0 if held else 1)
        return 2 * users * (held + entry.tokens) <= self._total + entry.tokens

    def _estimate(self, user: str, priority: int, tokens: int) -> float | None:
        """Of the others' tokens at its priority no more go before it than its own user's, itself included, for each of them."""
        rate = self._rate.per_s()
        if rate is None:
            return None
        ahead = 0
        for at in reversed(self._order):
            level = self._levels[at]
            if at > priority:
                ahead += level.tokens
            elif at == priority:
                account = level.accounts.get(user)
                own = account.tokens if account is not None else 0
                others = level.users - (1 if own else 0)
                ahead += own + min(level.tokens - own, others * (own + tokens))
        return ahead / rate

    def _make_room(self, entry: Entry, account: _Account, now: float, jitter: float) -> list[Shed]:
        """Sends others away until its bytes fit, and nobody if that would not be enough."""
        needed = self._size + entry.size - self.bytes_limit
        shed: list[Shed] = []
        if needed <= 0 or self._below(entry, account) < needed:
            return shed
        while self._size + entry.size > self.bytes_limit:
            victim = self._victim(entry, account)
            if victim is None:
                break
            shed.append(self._drop(victim, Reason.DISPLACED, 0.0, now, jitter))
        return shed

    def _below(self, entry: Entry, account: _Account) -> int:
        """Bytes that may be sent away for it."""
        size = sum(self._levels[p].size for p in self._order if p < entry.priority)
        crowd = account.level.crowd()
        crowded = crowd is not None and crowd is not account and len(crowd.entries) > len(account.entries) + 1
        return size + crowd.size if crowd is not None and crowded else size

    def _displace(self, entry: Entry, account: _Account, now: float, jitter: float) -> list[Shed]:
        """More waits than can be served in time, since one came that goes before others: the last of those go."""
        rate, shed = self._rate.per_s(), list[Shed]()
        while rate is not None and self._tokens > rate * self.timeout_s * SURE:
            victim = self._victim(entry, account)
            if victim is None:
                break
            shed.append(self._drop(victim, Reason.DISPLACED, self._tokens / rate - self.timeout_s * SURE, now, jitter))
        return shed

    def _victim(self, entry: Entry, account: _Account) -> Entry | None:
        """The newest of the lowest priority, of the user who has most waiting there; None if nobody must yield to this entry."""
        level = next((level for p in self._order if (level := self._levels[p]).waiting), None)
        crowd = level.crowd() if level is not None and level.priority <= entry.priority else None
        if level is None or crowd is None:
            return None
        if level.priority == entry.priority and (crowd is account or len(crowd.entries) <= len(account.entries) + 1):
            return None
        newest = next(reversed(crowd.entries))
        return None if newest.promised else newest

    # --- departures

    def next(self, fits: Callable[[Entry], T | Aside | None], *, now: float) -> tuple[Entry, T] | None:
        """Dispatches one entry.

        Args:
            fits: says where an entry can go now, and None if nowhere; asked for the first one and a few behind it. `Aside` if others could
                go there.
            now: monotonic seconds.

        Returns:
            The entry and what `fits` said; None if nobody waits or nobody can go.
        """
        self._advance(now)
        head: Entry | None = None
        tried = smallest = 0
        for number, entry in enumerate(self._line()):
            if tried > _LOOK:
                break
            if head is not None and entry.tokens >= smallest:
                continue
            found = fits(entry)
            if isinstance(found, Aside):
                continue
            if found is not None:
                return self._take(entry, now, in_turn=not number), found
            if head is None:
                head = entry
                self._blocked = True
                if head.head_at is None:
                    head.head_at = now
                if now - head.head_at >= PASS_S:
                    return None
            smallest = entry.tokens
            tried += 1
        return None

    def _line(self) -> Iterator[Entry]:
        """The first ones of each level, by priority."""
        for priority in reversed(self._order):
            level = self._levels[priority]
            head = level.head()
            if head is not None:
                yield head
                yield from level.followers(head, _LOOK_ASIDE)

    def _take(self, entry: Entry, now: float, *, in_turn: bool) -> Entry:
        account = entry.account
        assert account is not None
        level, wait_s = account.level, now - entry.arrived_at
        self._remove(account, entry)
        level.charge(account, entry, in_turn=in_turn)
        for standing in (level.standing, account.standing):
            standing.saw(wait_s, now, self.target_s, self.interval_s)
        entry.place, entry.taken_at = Place.RUNNING, now
        account.running += 1
        self._running += 1
        self.history.append((now, entry.number, "dispatched"))
        return entry

    def leave(self, entry: Entry, *, now: float, served: bool = True) -> None:
        """It has ended, or its client left, wherever it was. To be called once for each entry; more often does nothing.

        Args:
            entry: one that waits or runs, or was sent away.
            now: monotonic seconds.
            served: False if its engine failed, which says nothing about how fast the engines are.
        """
        account = entry.account
        if account is None:
            return
        self._advance(now)
        if entry.place is Place.WAITING:
            self._remove(account, entry)
        else:
            if served:
                self._rate.released(entry.tokens, now - entry.taken_at, self._running, full=self._blocked)
            account.running -= 1
            self._running -= 1
        self._forget(account, entry)
        if entry.number:
            self.history.append((now, entry.number, "left"))

    def expire(self, *, now: float, jitter: float = 0.0) -> list[Shed]:
        """Sends away those whose time is up. To be called at `next_deadline`."""
        self._advance(now)
        shed: list[Shed] = []
        while (at := self.next_deadline()) is not None and at <= now:
            entry = self._deadlines[0][2]
            reason = Reason.DEADLINE if entry.deadline_at <= entry.arrived_at + self._longest_wait_s(entry) else Reason.TIMEOUT
            over_s = (self._estimate(entry.user, entry.priority, entry.tokens) or 0.0) - self.timeout_s
            shed.append(self._drop(entry, reason, over_s, now, jitter))
        return shed

    def _longest_wait_s(self, entry: Entry) -> float:
        return self.timeout_s * (PROMISED_TIMES if entry.promised else 1.0)

    def next_deadline(self) -> float | None:
        """When somebody's time is up, monotonic seconds; None if nobody waits."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][2].place is not Place.WAITING:
            heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    # --- sending away

    def _drop(self, entry: Entry, reason: Reason, over_s: float, now: float, jitter: float) -> Shed:
        away = self._send_away(entry, reason, over_s, now, jitter)
        account = entry.account
        assert account is not None
        self._remove(account, entry)
        self._forget(account, entry)
        return away

    def _send_away(self, entry: Entry, reason: Reason, over_s: float, now: float, jitter: float) -> Shed:
        """What its client is told.

        Args:
            entry: who goes.
            reason: why.
            over_s: how long it takes until the queue has drained to what is allowed.
            now: monotonic seconds.
            jitter: as for `offer`.
        """
        share = self._total / max(1, len(self._held))
        greedy = len(self._held) > 1 and self._held.get(entry.user, 0) > share
        status = 504 if reason is Reason.DEADLINE else 429 if greedy else 503
        base = min(max(1.0, over_s), RETRY_LIMIT_S)
        # Who is told the same second would come in the same second. But no more than twice what it takes: that would not be honest.
        retry_after_s = ceil(base + jitter * min(base, max(SPREAD_S, base / 2)))
        self.history.append((now, entry.number, reason.value))
        return Shed(entry, status, retry_after_s, _sentence(reason, status, retry_after_s), reason)

    # --- books

    def _advance(self, now: float) -> None:
        rate = self._rate
        if now >= rate.due_at or self._blocked is not rate.was_full:  # requests come and go by thousands in a second
            rate.advance(now, full=self._blocked)

    def _account(self, entry: Entry) -> _Account:
        level = self._levels.get(entry.priority)
        if level is None:
            level = self._levels[entry.priority] = _Level(entry.priority)
            insort(self._order, entry.priority)
        account = level.accounts.get(entry.user)
        if account is None:
            account = level.accounts[entry.user] = _Account(entry.user, level)
        return account

    def _tidy(self, account: _Account) -> None:
        """Users that have nothing here are forgotten, with what is known of them."""
        level = account.level
        if account.entries or account.running:
            return
        del level.accounts[account.user]
        if not level.accounts:
            del self._levels[level.priority]
            self._order.remove(level.priority)

    def _add(self, account: _Account, entry: Entry, now: float) -> None:
        account.level.add(account, entry)
        entry.account, entry.place = account, Place.WAITING
        self._tokens += entry.tokens
        self._size += entry.size
        self.waiting += 1
        self._total += entry.tokens
        self._held[entry.user] = self._held.get(entry.user, 0) + entry.tokens
        heappush(self._deadlines, (min(entry.arrived_at + self._longest_wait_s(entry), entry.deadline_at), entry.number, entry))
        if len(self._deadlines) > 2 * self.waiting + 16:
            self._deadlines = [d for d in self._deadlines if d[2].place is Place.WAITING]
            heapify(self._deadlines)
        self.history.append((now, entry.number, "offered"))

    def _remove(self, account: _Account, entry: Entry) -> None:
        """It waits no more."""
        account.level.remove(account, entry)
        self._tokens -= entry.tokens
        self._size -= entry.size
        self.waiting -= 1
        self._blocked = self._blocked and self.waiting > 0

    def _forget(self, account: _Account, entry: Entry) -> None:
        """It neither waits nor runs."""
        entry.place, entry.account = Place.GONE, None
        self._total -= entry.tokens
        left = self._held[entry.user] - entry.tokens
        if left:
            self._held[entry.user] = left
        else:
            del self._held[entry.user]
        self._tidy(account)

    def check(self) -> None:
        """Asserts what always holds."""
        levels = [self._levels[p] for p in self._order]
        assert self._order == sorted(self._levels)
        accounts = [a for level in levels for a in level.accounts.values()]
        waiting = [e for a in accounts for e in a.entries]
        assert len(waiting) == self.waiting == sum(level.waiting for level in levels)
        assert sum(e.tokens for e in waiting) == self._tokens == sum(level.tokens for level in levels)
        assert sum(e.size for e in waiting) == self._size == sum(level.size for level in levels)
        assert sum(a.running for a in accounts) == self._running
        assert sum(self._held.values()) == self._total
        assert set(self._held) == {a.user for a in accounts}
        assert {id(d[2]) for d in self._deadlines if d[2].place is Place.WAITING} == {id(e) for e in waiting}
        for account in accounts:
            assert account.entries or account.running
            assert all(e.place is Place.WAITING and e.account is account for e in account.entries)
            assert account.tokens == sum(e.tokens for e in account.entries)
        for level in levels:
            _check_level(level)


def _check_level(level: _Level) -> None:
    busy = [a for a in level.accounts.values() if a.entries]
    assert level.users == len(busy)
    assert {id(r[2]): r[0] for r in level.heap if r[1] == r[2].record} == {id(a): a.clock for a in busy}
    assert level.most == max((len(a.entries) for a in busy), default=0)
    assert {id(a): n for n, crowd in level.crowds.items() for a in crowd} == {id(a): len(a.entries) for a in busy}
    head = level.head()
    assert (head is None) == (not busy)
    assert head is None or head.account is None or head.account.clock == min(a.clock for a in busy)


_WHY = {
    Reason.WAIT: "the engines are busy, and so many wait that this request would not be served in time",
    Reason.OVERLOAD: "more is asked for than the engines can do",
    Reason.BYTES: "the requests that wait fill the memory for them",
    Reason.DISPLACED: "the engines are busy, and this request made way for another",
    Reason.TIMEOUT: "the engines are busy, and this request waited as long as one may",
    Reason.DEADLINE: "the time that the client gave was over before an engine was free",
}


def _sentence(reason: Reason, status: int, retry_after_s: int) -> str:
    whose = ", and this user holds more than a fair share of them" if status == 429 else ""
    return f"{_WHY[reason]}{whose}; try again in {retry_after_s} s"
