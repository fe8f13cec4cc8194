"""Who may go to the engines now, and who waits: the hands of `Queue` and `Ledger`.

    a request ──► is there room? ──► a promise: engines, their tokens and places in the ledger ──► an attempt
                        │ no                              ▲
                        └──► the queue of its model ──────┘  a leg ended, an engine reported, the view changed

A promise is given in the same moment in which its engines are chosen, so that whoever is next sees them taken. It is taken back leg by leg
when the engines are through with them, also when the client left long before.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Sequence
from math import ceil, inf
from typing import NamedTuple, Protocol

import msgspec

from disagg.errors import DeadlineError, DisaggError, NoCapacityError, ShareError
from disagg.model import Choice, ClusterView, EngineId, EngineLoad, EngineState, EngineView, Pool, Role
from disagg.policy.books import Books, Prompt
from disagg.policy.forecast import Outlook, Reading
from disagg.policy.pace import Pace
from disagg.policy.prefix import Ids
from disagg.policy.queue import RETRY_LIMIT_S, Aside, Entry, Place, Queue, Reason, Shed
from disagg.policy.route import choose, pool_of

Exclude = Callable[[], Collection[EngineId]]

LET_IN_FIRST = 1000
"""Who was let in before and lost its engine goes before all others: its client has waited, and perhaps heard a part of the answer."""
STANDING_SHARE = 0.5
"""Of the longest wait: a queue in which everybody waits longer than this is too much. Some more clients than places are not: they wait."""
LEARN_ALL = 64
LEARN_EACH = 8
"""After the first ones, from how many answers one is looked at."""
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s?([0-9]{1,9})')
_ANEW = frozenset({EngineState.DEAD, EngineState.STARTING})
_ANSWER_TOKENS = re.compile(rb'"completion_tokens":\s?([0-9]{1,9})')
_USAGE_WITHIN = 1024  # it stands at the end of an answer


class ShutOutError(NoCapacityError):
    """Engines are there, and all of them are closed to the request: it must not stand in the way of those whom they are open to."""


class Wanting(Protocol):
    """A request, as far as its admission is concerned."""

    @property
    def model(self) -> str:
        """The model asked for; empty for the only one there is."""

    @property
    def body_bytes(self) -> int:
        """Of its body."""

    @property
    def names(self) -> Sequence[int]:
        """Of the blocks of its prompt; empty where they were not asked for."""

    @property
    def prompt_bytes(self) -> int:
        """Of its prompt, of which the names are."""

    @property
    def tokens(self) -> int:
        """Of its prompt, where the client sent these; 0 where they are not known."""

    @property
    def ids(self) -> Ids | None:
        """Of its prompt, where the client sent these and an engine says what it holds."""

    @property
    def max_tokens(self) -> int | None:
        """How long one answer may become."""

    @property
    def answers(self) -> int:
        """How many answers the body asks for."""

    @property
    def streams(self) -> bool:
        """Its first token is seen when it comes."""

    @property
    def arm(self) -> bool | None:
        """True where it is to show what unified engines do, False for pairs; None where nothing is compared."""

    @property
    def was_let_in(self) -> bool:
        """It, or the request that it is a part of, was on its way before."""

    @property
    def unified_only(self) -> bool:
        """A pair must not see it."""

    @property
    def user(self) -> str:
        """Whose it is."""

    @property
    def priority(self) -> int:
        """Larger is more important."""

    @property
    def arrived_at(self) -> float:
        """When it came, monotonic seconds."""

    @property
    def deadline_at(self) -> float | None:
        """When its client's patience ends."""

    def shut(self) -> tuple[EngineId, ...] | None:
        """Engines that are closed to it at the moment, for fear of what it may do to them; None: all are."""

    def promised(self, engines: Sequence[EngineId]) -> None:
        """It goes to these engines."""


class Promise:
    """Places on engines that a request may use now.

    Attributes:
        choice: the engines.
        served: it came to a good end: that tells how fast the engines are.
        entry, queue: where it is counted; None for the router's own requests.
        reading: its prompt, until its first token came; None where that is not seen.
        ours: it is a request of the router's own: nobody asked for its answer, and no more engines are needed for it.
    """

    __slots__ = ("_admission", "_decode_tokens", "_prefill_tokens", "_writes", "choice", "entry", "ours", "queue", "reading", "served")

    def __init__(self, admission: Admission, choice: Choice, prefill_tokens: int, decode_tokens: int) -> None:
        self.choice = choice
        self.served = True
        self.entry: Entry | None = None
        self.queue: Queue | None = None
        self.ours = False
        self._admission = admission
        self._prefill_tokens = None if choice.prefill is None else prefill_tokens  # None: there is nothing to take back
        self._decode_tokens: int | None = decode_tokens
        self.reading: Reading | None = None
        self._writes = False

    def prompt_read(self, now: float) -> None:
        """Its prefill engine has ended well: the prompt is read, whether its first token was seen or not."""
        self._admission.read(self, now)

    def read(self, now: float, *, whole: bool) -> None:
        """Its first token came, or a whole answer: the answer is being written, unless that has ended already."""
        if not whole:
            self._admission.read(self, now)
        elif self.reading is not None:
            self._admission.not_read(self)  # when the prompt was read was not seen: what came had been written, too
        if self._decode_tokens is not None and not self._writes and not self.ours:
            self._writes = True
            self._admission.began(self)

    def end(self, slot: int) -> None:
        """The engine in this slot is through with it; said twice it counts once."""
        if slot == self.choice.decode.slot:
            tokens, self._decode_tokens = self._decode_tokens, None
            if tokens is not None and self._writes:
                self._admission.written(slot, tokens)
        else:
            tokens, self._prefill_tokens = self._prefill_tokens, None
        if tokens is not None:
            if self.reading is not None and slot == self.reading.slot:
                self._admission.not_read(self)
            self._admission.taken_back(slot, tokens)
            if self._decode_tokens is None and self._prefill_tokens is None:
                self._admission.over(self)

    def end_all(self) -> None:
        """Nothing was sent."""
        self.served = False
        for engine in (self.choice.prefill, self.choice.decode):
            if engine is not None:
                self.end(engine.slot)

    def tokens(self, slot: int) -> int:
        """What is promised of the engine in this slot."""
        return (self._decode_tokens if slot == self.choice.decode.slot else self._prefill_tokens) or 0


class _Found(NamedTuple):
    """Engines with room for a request.

    Attributes:
        choice: the engines.
        prompt: what it is chosen by.
        prompt_tokens, tokens: what it takes of a prefill and of a decode engine.
        outlook: what it would meet.
    """

    choice: Choice
    prompt: Prompt
    prompt_tokens: int
    tokens: int
    outlook: Outlook


class _Waiter:
    """Somebody in a queue."""

    __slots__ = ("exclude", "place", "wanting")

    def __init__(self, wanting: Wanting, exclude: Exclude | None, place: asyncio.Future[Promise]) -> None:
        self.wanting = wanting
        self.exclude = exclude
        self.place = place


class Admission:
    """Lets requests go to the engines.

    Args:
        books: what is known of the engines; None to begin with nothing.
        pace: grows with them.
        on_waited: told how long each request waited that is let in, seconds.
        view: returns the current view of the cluster.
        timeout_s: nobody waits longer.
        chance: a number in [0, 1), to spread those who are sent away together, and to draw those that are compared.
        unified_share: of requests that go to unified engines where pairs are, too.
        clock: monotonic seconds.

    Attributes:
        books: what is known of the engines.
        waiting: how many requests wait.
        names_wanted: there is a choice that the names of a prompt's blocks decide.
    """

    def __init__(
        self,
        *,
        books: Books | None = None,
        pace: Pace,
        on_waited: Callable[[float], None],
        view: Callable[[], ClusterView],
        timeout_s: float,
        chance: Callable[[], float],
        unified_share: float = 0.0,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
    ) -> None:
        self.books = books or Books()
        self._pace = pace
        self._on_waited = on_waited
        self._view = view
        self._timeout_s = timeout_s
        self._chance = chance
        self._unified_share = unified_share
        self._loop = loop
        self._clock = clock
        self._queues: dict[tuple[str, bool], Queue] = {}
        self._models: set[str] = set()  # that were ever served
        self._only_model = ""
        self._loads: dict[int, EngineLoad] = {}
        self._pids: dict[int, int] = {}
        self._roles: dict[int, Role] = {}
        self._down: set[int] = set()
        self.waiting = 0
        self._measured: Collection[int] = ()
        self._on_needed: Callable[[], None] | None = None
        self.names_wanted = False
        self._told = 0
        self._is_due = False

    # --- in

    async def enter(self, wanting: Wanting, exclude: Exclude | None = None, *, again: bool = False) -> Promise:
        """Returns as soon as engines have room for this request.

        Args:
            wanting: the request.
            exclude: tells the engines that it must not go to, each time that it is looked for places; None where it is none ever.
            again: it was let in before and lost its engine.

        Raises:
            UnknownModelError, NoCapacityError, ShareError, DeadlineError: it cannot be served, or not in time.
            ShutOutError: it is to come again when engines are open to it.
        """
        queue = self._queue(wanting)
        if not queue.waiting:
            promise = self._try(wanting, exclude)
            if isinstance(promise, Promise):
                now = self._clock()
                promise.entry = Entry(None, promise.tokens(promise.choice.decode.slot), now, wanting.user, wanting.priority)
                promise.queue = queue
                queue.admit(promise.entry, now=now)
                self._on_waited(0.0)
                return promise
        return await self._wait(queue, wanting, exclude, again=again)

    def promise(self, choice: Choice, tokens: int = 0) -> Promise:
        """A promise for what does not wait, as the router's own canaries."""
        promise = self._promise(choice, tokens, tokens)
        promise.ours = True
        return promise

    @property
    def ids_wanted(self) -> bool:
        """There is such a choice, and an engine says which blocks it holds."""
        return self.names_wanted and self.books.prefixes.is_told

    @property
    def compares(self) -> bool:
        """A share of the requests is drawn for unified engines."""
        return bool(self._unified_share)

    def draw_arm(self) -> bool | None:
        """What a new request is to show, as in `Wanting.arm`."""
        return self._chance() < self._unified_share if self._unified_share else None

    def waiting_for(self, model: str) -> int:
        """How many wait for room of a model."""
        names = {model, ""} if model == self._only_model else {model}
        return sum(queue.waiting for (name, _), queue in self._queues.items() if name in names)

    def could_serve(self, wanting: Wanting, exclude: Collection[EngineId]) -> bool:
        """True when engines are there, with room or without. Raises UnknownModelError."""
        try:
            self._choose(wanting, pool_of(self._view(), wanting.model), exclude)
        except NoCapacityError:
            return False
        return True

    def has_room(self, wanting: Wanting, exclude: Collection[EngineId]) -> bool:
        """True when engines have room for it now. Raises UnknownModelError."""
        return self._find(wanting, exclude) is not None

    def somebody(self, wanting: Wanting, exclude: Collection[EngineId]) -> EngineView:
        """An engine that knows the model, with room or without. Raises UnknownModelError, NoCapacityError."""
        choice = self._choose(wanting, pool_of(self._view(), wanting.model), exclude)
        return choice.prefill or choice.decode

    async def _wait(self, queue: Queue, wanting: Wanting, exclude: Exclude | None, *, again: bool) -> Promise:
        waiter = _Waiter(wanting, exclude, self._loop.create_future())
        entry = self._entry(wanting, waiter, self._price(wanting, wanting.model, self._longest_context(wanting))[1], again=again)
        self._send_away(queue.offer(entry, now=self._clock(), jitter=self._chance()))
        self.waiting += 1
        try:
            self._pump(queue)
            return await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled() and waiter.place.exception() is None:
                waiter.place.result().end_all()  # it was let in, and left in the same moment
            raise
        finally:
            self.waiting -= 1
            if entry.place is Place.WAITING:
                queue.leave(entry, now=self._clock(), served=False)

    def _entry(self, wanting: Wanting, waiter: _Waiter | None, tokens: int, *, again: bool) -> Entry:
        deadline = wanting.deadline_at
        return Entry(
            waiter,
            user=wanting.user,
            priority=wanting.priority + (LET_IN_FIRST if again else 0),
            tokens=tokens,
            size=wanting.body_bytes,
            arrived_at=self._clock() if again else wanting.arrived_at,
            deadline_at=inf if deadline is None else deadline,
            promised=again,
        )

    def _pump(self, queue: Queue) -> None:
        """Lets in whoever fits."""

        def fits(entry: Entry) -> Promise | DisaggError | Aside | None:
            waiter = entry.key
            assert isinstance(waiter, _Waiter)
            try:
                return self._try(waiter.wanting, waiter.exclude)
            except DisaggError as error:
                return error

        while True:
            taken: tuple[Entry, Promise | DisaggError] | None = queue.next(fits, now=self._clock())
            if taken is None:
                return
            entry, found = taken
            waiter = entry.key
            assert isinstance(waiter, _Waiter)
            if isinstance(found, DisaggError):
                queue.leave(entry, now=self._clock(), served=False)
                if not waiter.place.done():
                    waiter.place.set_exception(found)
                continue
            found.entry, found.queue = entry, queue
            self._on_waited(entry.taken_at - entry.arrived_at)
            if waiter.place.done():
                found.end_all()
            else:
                waiter.place.set_result(found)

    def _send_away(self, shed: list[Shed]) -> None:
        for one in shed:
            waiter = one.entry.key
            assert isinstance(waiter, _Waiter)
            if not waiter.place.done():
                waiter.place.set_exception(_refusal(one, self._view().why_not_ready()))
                self._count_refused(waiter.wanting, writes=True)

    # --- engines

    def _try(self, wanting: Wanting, closed: Exclude | None) -> Promise | Aside | None:
        """A promise, if engines have room; `Aside` if only those have that it may not go to. Raises UnknownModelError, ShutOutError."""
        exclude: Collection[EngineId] = () if closed is None else closed()
        shut = wanting.shut()
        closed_to_it = shut is None
        if shut:
            left, exclude = exclude, [*exclude, *shut]
            closed_to_it = not self.could_serve(wanting, exclude) and self.could_serve(wanting, left)
        if closed_to_it:
            raise ShutOutError("an engine died, and the others are kept for the requests that it worked on; try again", retry_after_s=2)
        found = self._find(wanting, exclude)
        if found is None:
            return Aside.ASIDE if exclude and self._find(wanting, ()) is not None else None
        if self._measured:
            self._stop_measuring(found.choice)
        found = self._in_time(wanting, exclude, found)
        choice = found.choice
        prefill, decode = choice.prefill, choice.decode
        wanting.promised((decode.id,) if prefill is None else (prefill.id, decode.id))
        promise = self._promise(choice, found.prompt_tokens, found.tokens)
        if prefill is not None or wanting.streams:
            promise.reading = self.books.sent(choice, found.prompt, now=self._clock())
            if prefill is not None and not wanting.was_let_in:
                self.books.asked(decode.facts.model, promise.reading.busy_s, decode, now=self._clock())
        else:
            self.books.forecast.tried(decode.slot, now=self._clock())
            promise.read(self._clock(), whole=True)  # its first token will not be seen
        return promise

    def measuring(self, slots: Collection[int], on_needed: Callable[[], None]) -> None:
        """The engines in these slots are being measured from now on; none: nobody is any more.

        Args:
            slots: of the engines.
            on_needed: called when a request is to go to one of them.
        """
        self._measured, self._on_needed = slots, on_needed

    def _stop_measuring(self, choice: Choice) -> None:
        """Clients go before what the router wants to know."""
        is_needed = choice.decode.slot in self._measured or (choice.prefill is not None and choice.prefill.slot in self._measured)
        if is_needed and self._on_needed is not None:
            self._on_needed()

    def _in_time(self, wanting: Wanting, exclude: Collection[EngineId], found: _Found) -> _Found:
        """The engines that were found, or those of the other arm where these are too late. Raises NoCapacityError."""
        try:
            self._refuse_late(wanting, found)
        except NoCapacityError:
            other = None if wanting.arm is None else self._find(wanting, exclude, compared=False)
            if other is None:
                raise
            self._refuse_late(wanting, other)
            return other
        return found

    def _refuse_late(self, wanting: Wanting, found: _Found) -> None:
        """Nobody is let in whose first token would come too late, but who was before. Raises NoCapacityError."""
        reader = (found.choice.prefill or found.choice.decode).slot
        if wanting.was_let_in or reader in self._measured:  # what it reads now will be aborted
            return
        limit_s = self.books.slo.ttft_s * _patience(wanting.priority)
        late_s = self.books.late_s(reader, found.outlook, limit_s)
        if late_s <= 0.0:
            return
        self._count_refused(wanting, writes=False)  # it is the prefill engines that there are too few of
        raise NoCapacityError(
            f"the first token would come {late_s:.1f} s after the limit of {limit_s:g} s; come again later",
            retry_after_s=min(RETRY_LIMIT_S, max(1, ceil(late_s))),
            reason="late",
        )

    def _count_refused(self, wanting: Wanting, *, writes: bool) -> None:
        """It would have been served by a pair, if there were more of them: that is asked of the pools, too.

        Args:
            wanting: the request.
            writes: also of those who write. Clients come again, and are counted again: of a pool that was not short of anything no more
                should be asked than reaches it.
        """
        try:
            pool = pool_of(self._view(), wanting.model)
        except DisaggError:
            return
        if pool.can_pair and not wanting.was_let_in:
            prefill, decode = pool.prefill[0], pool.decode[0]
            tokens = self._price(wanting, decode.facts.model, decode.facts.context_tokens)[0]
            self.books.asked(decode.facts.model, self.books.forecast.busy_s(prefill.slot, tokens), decode, writes=writes, now=self._clock())

    def _find(self, wanting: Wanting, exclude: Collection[EngineId], *, compared: bool = True) -> _Found | None:
        """Engines with room; not `compared`: of any arm. Raises UnknownModelError."""
        try:
            pool = pool_of(self._view(), wanting.model)
        except NoCapacityError:
            return None
        some = (pool.decode or pool.unified)[0].facts
        prompt_tokens, tokens = self._price(wanting, some.model, some.context_tokens)
        were_full = bool(self.waiting)  # then they probably are again, and a choice among them would be in vain
        if were_full:
            exclude = [*exclude, *self._all_full(pool, prompt_tokens, tokens)]
            if not _any_left(pool, exclude):
                return None
        prompt = _prompt(wanting, prompt_tokens, some.context_tokens)
        outlook = self.books.outlook(prompt, now=self._clock())
        try:
            choice = self._choose(wanting, pool, exclude, outlook, compared=compared)
            prefill, decode = choice.prefill, choice.decode
            if decode.facts is not some:
                prompt_tokens, tokens = self._price(wanting, decode.facts.model, decode.facts.context_tokens)
            if self._is_full(decode, tokens) or (prefill is not None and self._is_full(prefill, prompt_tokens)):
                full = self._all_full(pool, prompt_tokens, tokens)
                choice = self._choose(wanting, pool, [*exclude, *full], outlook, compared=compared)
        except NoCapacityError:
            return None
        return _Found(choice, prompt, prompt_tokens, tokens, outlook)

    def _choose(
        self, wanting: Wanting, pool: Pool, exclude: Collection[EngineId], outlook: Outlook | None = None, *, compared: bool = True
    ) -> Choice:
        if outlook is not None and not _is_choice(pool):
            outlook = None  # an only pair is the best there is
        arm = _arm(pool, wanting.arm if compared else None)
        in_flight, unified_only = self.books.in_flight, wanting.unified_only
        if arm is not pool:
            try:
                return choose(arm, in_flight, exclude=exclude, unified_only=unified_only, outlook=outlook)
            except NoCapacityError:
                pass  # better in the other arm than not at all
        return choose(pool, in_flight, exclude=exclude, unified_only=unified_only, outlook=outlook)

    def _is_full(self, engine: EngineView, tokens: int) -> bool:
        return not self.books.ledger.room(engine, tokens, self.books.in_flight.now[engine.slot])

    def _all_full(self, pool: Pool, prompt_tokens: int, tokens: int) -> list[EngineId]:
        needs = ((pool.prefill, prompt_tokens), (pool.decode, tokens), (pool.unified, tokens))
        return [e.id for engines, tokens in needs for e in engines if self._is_full(e, tokens)]

    def _promise(self, choice: Choice, prefill_tokens: int, decode_tokens: int) -> Promise:
        in_flight, ledger = self.books.in_flight, self.books.ledger
        if choice.prefill is not None:
            in_flight.start(choice.prefill.slot)
            ledger.reserve(choice.prefill.slot, prefill_tokens)
        in_flight.start(choice.decode.slot)
        ledger.reserve(choice.decode.slot, decode_tokens)
        return Promise(self, choice, prefill_tokens, decode_tokens)

    def _price(self, wanting: Wanting, model: str, limit: int = 0) -> tuple[int, int]:
        """Tokens of a prefill and of a decode engine; `limit` is the longest context of one answer."""
        return self.books.price(model, wanting.body_bytes, wanting.max_tokens, wanting.answers, limit, tokens=wanting.tokens)

    def _longest_context(self, wanting: Wanting) -> int:
        """Of the engines that may answer it; 0 if unknown. A body that is longer than any of them takes costs no more than they have."""
        try:
            pool = pool_of(self._view(), wanting.model)
        except DisaggError:
            return 0
        return max((e.facts.context_tokens for e in (*pool.decode, *pool.unified)), default=0)

    def _queue(self, wanting: Wanting) -> Queue:
        """One for each model, and for what only a unified engine may take another: pairs that are free must not wait behind it.

        Who names no model stands in one queue with those who name the only one.
        """
        name, unified_only = wanting.model or self._only_model, wanting.unified_only
        queue = self._queues.get((name, unified_only))
        if queue is None:
            name = name if name in self._models else ""  # what clients ask for makes no queues
            queue = self._queues.get((name, unified_only))
            if queue is None:
                queue = Queue(timeout_s=self._timeout_s, target_s=self._timeout_s * STANDING_SHARE)
                self._queues[name, unified_only] = queue
        return queue

    def _grow(self, slots: int) -> None:
        self.books.grow(slots)
        self._pace.grow(slots)

    def learn(self, choice: Choice, body_bytes: int, answer: bytes) -> None:
        """A whole answer tells how many tokens its prompt had. A sample of them is enough: it is a mean that is sought."""
        self._told += 1
        if self._told > LEARN_ALL and self._told % LEARN_EACH:
            return
        usage = _PROMPT_TOKENS.search(answer, max(0, len(answer) - _USAGE_WITHIN))
        if usage is not None:
            self.books.ledger.learn(choice.decode.facts.model, body_bytes, int(usage[1]))
            written = _ANSWER_TOKENS.search(answer, max(0, len(answer) - _USAGE_WITHIN))
            if written is not None:
                self.books.forecast.answered(int(written[1]), int(usage[1]))

    # --- what becomes of it

    def token_gap(self, decode: int, seconds: float, count: int, longest_s: float) -> None:
        """Tokens came, as `Pace.token_gap` is told of them."""
        self._pace.token_gap(decode, seconds, count, longest_s)
        if seconds > 0.0:
            self.books.forecast.stepped(decode, seconds, now=self._clock())

    def read(self, promise: Promise, now: float) -> None:
        """Its prompt is read."""
        reading, promise.reading = promise.reading, None
        if reading is not None:
            choice = promise.choice
            self.books.forecast.read(reading, None if choice.prefill is None else choice.decode.slot, now=now)

    def began(self, promise: Promise) -> None:
        """Its answer is being written."""
        slot = promise.choice.decode.slot
        self.books.forecast.began(slot, promise.tokens(slot))

    def not_read(self, promise: Promise) -> None:
        """It ended before its first token."""
        reading, promise.reading = promise.reading, None
        assert reading is not None
        self.books.forecast.left(reading, now=self._clock())

    def written(self, slot: int, tokens: int) -> None:
        """Its answer ended, or nobody wants it any more."""
        self.books.forecast.ended(slot, tokens)

    # --- out

    def taken_back(self, slot: int, tokens: int) -> None:
        """A leg ended."""
        self.books.in_flight.end(slot)
        self.books.ledger.release(slot, tokens)
        if self.waiting:
            self.look_soon()

    def over(self, promise: Promise) -> None:
        """All of its legs ended."""
        if promise.entry is not None and promise.queue is not None:
            promise.queue.leave(promise.entry, now=self._clock(), served=promise.served)

    # --- what changes

    def changed(self) -> None:
        """The view is another one."""
        view = self._view()
        engines, models = view.engines, view.pools.keys()
        self._models |= models
        if models:
            self._only_model = next(iter(models)) if len(models) == 1 else ""
        if engines:
            self._grow(engines[-1].slot + 1)
        for engine in engines:
            self._note(engine)
        if len(self._pids) > len(engines):
            self._forget_gone({engine.slot for engine in engines})
        self.names_wanted = any(len(pool.prefill) + len(pool.unified) > 1 for pool in view.pools.values())
        self.look_soon()

    def _note(self, engine: EngineView) -> None:
        """What changed of one engine."""
        slot, address, books = engine.slot, engine.address, self.books
        was_down, is_down = slot in self._down, engine.state in _ANEW
        if is_down:
            self._down.add(slot)
        else:
            self._down.discard(slot)
        changed = (self._pids.get(slot, address.pid), self._roles.get(slot, address.role)) != (address.pid, address.role)
        if changed or (is_down and not was_down):  # of one that was given by URL no pid is known
            books.restarted(slot)
        self._pids[slot], self._roles[slot] = address.pid, address.role
        if engine.load is not self._loads.get(slot):
            self._loads[slot] = engine.load
            books.ledger.note_report(slot, engine.load)
            books.holds(engine, now=self._clock())

    def _forget_gone(self, there: Collection[int]) -> None:
        """Slots are never used again."""
        for slot in [slot for slot in self._pids if slot not in there]:
            self.books.gone(slot)
            for table in (self._pids, self._roles, self._loads):
                table.pop(slot, None)
            self._down.discard(slot)

    def look_soon(self) -> None:
        """Those who wait are looked at in the loop's next round."""
        if self.waiting and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._look)

    def tick(self, now: float) -> None:
        """Sends away those whose time is up."""
        for queue in self._queues.values():
            due = queue.next_deadline()
            if due is not None and due <= now:
                self._send_away(queue.expire(now=now, jitter=self._chance()))
        self.books.forecast.tick(now)
        for engine in self._view().engines:
            if self.books.prefixes.speaks(engine.id):  # what it holds changes also when its load does not
                self.books.holds(engine, now=now)
            if engine.slot < self.books.forecast.engines:
                self.books.contradictions.look(engine.slot, engine.load, self.books.forecast.writing(engine.slot), now=now)
        self._tick_arms(now)
        self.look_soon()

    def _tick_arms(self, now: float) -> None:
        pools = self._view().pools.values()
        paired = sum(len(pool.prefill) + len(pool.decode) for pool in pools)
        self.books.comparison.tick(paired, sum(len(pool.unified) for pool in pools), now=now)

    def _look(self) -> None:
        self._is_due = False
        for queue in self._queues.values():
            self._pump(queue)


def _prompt(wanting: Wanting, tokens: int, limit: int) -> Prompt:
    """What is longer than an engine's context is refused by it, and takes no time; `limit` is 0 where that is not known."""
    ids = wanting.ids
    count = tokens if ids is None else min(ids.count, limit or ids.count)
    return Prompt(count, wanting.prompt_bytes, wanting.names, ids)


def _arm(pool: Pool, unified: bool | None) -> Pool:
    """The engines that a compared request may go to; the pool itself where there is nothing to compare."""
    if unified is None or not pool.unified or not pool.can_pair:
        return pool
    return Pool(unified=pool.unified) if unified else msgspec.structs.replace(pool, unified=())


def _any_left(pool: Pool, closed: Collection[EngineId]) -> bool:
    """Some of the engines can serve without those that are closed."""

    def some(engines: Sequence[EngineView]) -> bool:
        return any(engine.id not in closed for engine in engines)

    return some(pool.unified) or (some(pool.prefill) and some(pool.decode))


def _is_choice(pool: Pool) -> bool:
    """There is something to choose."""
    return len(pool.prefill) > 1 or len(pool.decode) > 1 or len(pool.unified) > 1 or bool(pool.unified and pool.decode)


def _patience(priority: int) -> float:
    """How much longer than others a request may wait for its first token."""
    return 1.0 if priority == 0 else 2.0 if priority > 0 else 0.5


def _refusal(shed: Shed, why_not_ready: str) -> DisaggError:
    if shed.reason is Reason.DEADLINE:
        return DeadlineError("the request's own deadline passed while it waited for engines")
    kind = ShareError if shed.status == ShareError.status else NoCapacityError
    reason = "no_engine" if why_not_ready else shed.reason.value
    return kind(why_not_ready or shed.sentence, retry_after_s=shed.retry_after_s, reason=reason)
