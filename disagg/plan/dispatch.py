"""The router in virtual time: the live policies, given what the live router sees and nothing else. Pure.

Which engines get a request is `disagg.policy.route.choose`; what it is told is in the router's own `disagg.policy.books.Books`, which are
fed with the first tokens, pauses and ends of the simulated engines. The blocks of prompts are those of the trace, and prompts have the
length that they have: the live router estimates it. Who finds no room waits, first come first served.

For comparison there are placements that know less, and one that knows more (`Placement`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise

import msgspec

from disagg.errors import NoCapacityError
from disagg.model import Choice, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, HostId, Pool, Role
from disagg.plan.hardware import Hardware, Work
from disagg.policy.balance import Pace
from disagg.policy.books import Books, Prompt, Slo
from disagg.policy.forecast import Outlook, Reading
from disagg.policy.history import BLOCK
from disagg.policy.ledger import RESERVED_TOKENS
from disagg.policy.route import choose

MODEL = "model"


class Placement(StrEnum):
    """How engines are chosen."""

    CACHE = "cache"
    """As the live router does: by what engines have to do, and by what it believes their caches hold."""
    PERFECT = "perfect"
    """The same, knowing what the caches hold, and what they will when the prompts before are read."""
    LOAD = "load"
    """By what engines have to do; every prompt counts whole."""
    COUNT = "count"
    """The fewest requests in flight."""
    RANDOM = "random"


class Place:
    """The engines that a request was sent to.

    Attributes:
        prefill: the slot of the engine that reads it; that of `decode` for a unified one.
        decode: the slot of the engine that writes the answer.
        held: tokens that the router took to be cached.
    """

    __slots__ = ("decode", "held", "prefill", "prompt_tokens", "reading", "tokens", "work")

    def __init__(self, work: Work, prefill: int, decode: int, held: int, reading: Reading, prompt_tokens: int, tokens: int) -> None:
        self.work = work
        self.prefill = prefill
        self.decode = decode
        self.held = held
        self.reading = reading
        self.prompt_tokens = prompt_tokens  # promised by the one
        self.tokens = tokens  # and by the other

    @property
    def is_pair(self) -> bool:
        """Two engines."""
        return self.prefill != self.decode


class Dispatch:
    """The router.

    Args:
        roles: of the engines, by slot.
        hardware: how much KV they have, and how many answers they take: they say so themselves.
        block: tokens of a block of the trace, 0 where it names none.
        slo: what requests are to get.
        placement: how engines are chosen.
        refuse: who would come too late because of those before it is refused at once, as the live router does.
        chance: numbers in [0, 1), for `Placement.RANDOM` alone.
        foreseen: what each prefill engine would find in its cache, tokens by slot; for `Placement.PERFECT` alone.
        pace: of the balance.

    Attributes:
        views: of the engines, by slot.
        pool: those that get work.
        waiting: requests for which there is no room.
        books: what the router knows.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        hardware: Hardware,
        block: int,
        slo: Slo,
        placement: Placement,
        *,
        refuse: bool,
        chance: Callable[[], float],
        foreseen: Callable[[Work], Mapping[int, int]],
        pace: Pace,
    ) -> None:
        load = EngineLoad(kv_total_tokens=hardware.kv_tokens)
        facts = EngineFacts(model=MODEL, max_running=hardware.batch)
        self.views = [
            EngineView(
                EngineAddress(EngineId(f"engine-{slot}"), role, "", 0),
                slot,
                EngineState.READY,
                facts,
                load,
                host=HostId("host"),
                owned=True,
            )
            for slot, role in enumerate(roles)
        ]
        self.waiting: deque[Work] = deque()
        self.books = Books(slo, window_s=pace.window_s)
        self.books.grow(len(roles))
        for slot in range(len(roles)):
            self.books.history.resize(slot, hardware.kv_tokens // block if block else 0)
        self._hardware = hardware
        self._block = block
        self._placement = placement
        self._refuse = refuse
        self._chance = chance
        self._foreseen = foreseen
        self.pool = Pool()
        self.look()

    # --- engines

    def look(self) -> None:
        """Roles or states have changed."""
        ready = [view for view in self.views if view.state is EngineState.READY]
        prefill, decode, unified = (tuple(v for v in ready if v.address.role is role) for role in (Role.PREFILL, Role.DECODE, Role.UNIFIED))
        self.pool = Pool(prefill, decode, unified)

    def set(self, slot: int, role: Role, state: EngineState) -> None:
        """The engine in this slot is something else now."""
        view = self.views[slot]
        self.views[slot] = msgspec.structs.replace(view, address=msgspec.structs.replace(view.address, role=role), state=state)
        self.look()

    def forget(self, slot: int) -> None:
        """It has another role, and nothing in its cache."""
        self.books.restarted(slot)

    # --- requests

    def arrived(self, work: Work, now: float) -> Place | None:
        """A request came: where it goes, or None when it has to wait. Raises NoCapacityError when it is refused."""
        forecast = self.books.forecast
        place, late = None, None
        try:
            place = None if self.waiting else self._try(work, now)
        except NoCapacityError as error:
            late = error
        if place is not None:
            slot, held = place.prefill, place.held
        else:
            slot = (self.pool.prefill or self.pool.unified or self.views)[0].slot
            held = max(self._cached(work).values(), default=0)
        read_s = forecast.busy_s(slot, work.prompt - held, held)
        writer = self.views[place.decode] if place is not None else (self.pool.decode or self.pool.unified or self.views)[0]
        self.books.asked(MODEL, read_s, writer, now=now)
        if late is not None:
            raise late
        if place is None:
            self.waiting.append(work)
        return place

    def next(self, now: float) -> Place | None:
        """Lets in the one that waits longest, if there is room; to be asked until there is None, when something was released."""
        if not self.waiting:
            return None
        place = self._try(self.waiting[0], now)
        if place is not None:
            self.waiting.popleft()
        return place

    def _prompt(self, work: Work) -> Prompt:
        """As the books want it: one named block is `BLOCK` bytes there."""
        if self._placement is not Placement.CACHE or not work.names:
            return Prompt(work.prompt)
        return Prompt(work.prompt, -(-work.prompt * BLOCK // self._block), work.names)

    def _cached(self, work: Work) -> Mapping[int, int]:
        """What engines are taken to hold of a prompt, tokens by slot."""
        if self._placement is Placement.PERFECT:
            return self._foreseen(work)
        return {slot: min(tokens, work.prompt - 1) for slot, tokens in self.books.cached(self._prompt(work)).items()}

    def _outlook(self, work: Work, now: float) -> Outlook:
        if self._placement is not Placement.PERFECT:
            return self.books.outlook(self._prompt(work), now=now)
        books = self.books
        kv, batches = books.ledger.promised, books.in_flight.now
        return Outlook(books.forecast, tokens=work.prompt, cached=self._cached(work), batches=batches, kv=kv, now=now)

    def _try(self, work: Work, now: float) -> Place | None:
        if not self.pool.can_serve:
            return None
        books = self.books
        outlook = self._outlook(work, now)
        prompt_tokens, tokens = work.prompt, work.prompt + RESERVED_TOKENS
        try:
            choice = self._choose(outlook, ())
            if self._full(choice.prefill, prompt_tokens) or self._full(choice.decode, tokens):
                shut = [
                    view.id
                    for view in (*self.pool.prefill, *self.pool.decode, *self.pool.unified)
                    if self._full(view, prompt_tokens if view.address.role is Role.PREFILL else tokens)
                ]
                choice = self._choose(outlook, shut)
        except NoCapacityError:
            return None
        decode = choice.decode
        slot = decode.slot if choice.prefill is None else choice.prefill.slot
        held = outlook.cached(slot)
        if self._refuse and (late_s := books.late_s(slot, outlook, books.slo.ttft_s)) > 0.0:
            raise NoCapacityError(f"its first token would come {late_s:.1f} s too late", reason="late")
        if self._placement is Placement.PERFECT:
            reading = books.forecast.sent(slot, work.prompt - held, held, now=now)
        else:
            reading = books.sent(choice, self._prompt(work), now=now)
        place = Place(work, slot, decode.slot, held, reading, prompt_tokens, tokens)
        books.ledger.reserve(decode.slot, tokens)
        books.in_flight.start(decode.slot)
        if place.is_pair:
            books.ledger.reserve(slot, prompt_tokens)
            books.in_flight.start(slot)
        return place

    def _full(self, view: EngineView | None, tokens: int) -> bool:
        return view is not None and not self.books.ledger.room(view, tokens, self.books.in_flight.now[view.slot])

    def _choose(self, outlook: Outlook, shut: Sequence[EngineId]) -> Choice:
        if self._placement is Placement.RANDOM:
            return Choice(*self._draw(shut), "by chance")
        known = None if self._placement is Placement.COUNT else outlook
        return choose(self.pool, self.books.in_flight, exclude=shut, outlook=known)

    def _draw(self, shut: Sequence[EngineId]) -> tuple[EngineView | None, EngineView]:
        """A pair, or a unified engine, as likely as there are engines of its kind."""
        prefill, decode, unified = (
            [v for v in views if v.id not in shut] for views in (self.pool.prefill, self.pool.decode, self.pool.unified)
        )
        pairs = len(prefill) + len(decode) if prefill and decode else 0
        if not pairs and not unified:
            raise NoCapacityError("no engine has room")
        number = int(self._chance() * (pairs + len(unified)))
        if number >= pairs:
            return None, unified[number - pairs]
        return prefill[int(self._chance() * len(prefill))], decode[int(self._chance() * len(decode))]

    # --- what is seen of them

    def first_token(self, place: Place, now: float) -> None:
        """Its first token came."""
        books = self.books
        books.forecast.read(place.reading, place.decode if place.is_pair else None, now=now)
        if place.is_pair:
            books.ledger.release(place.prefill, place.prompt_tokens)
            books.in_flight.end(place.prefill)
        books.forecast.began(place.decode, place.tokens)

    def stepped(self, slot: int, seconds: float, now: float) -> None:
        """A stream of this engine made a step."""
        self.books.forecast.stepped(slot, seconds, now=now)

    def ended(self, place: Place) -> None:
        """Its answer is complete."""
        books = self.books
        books.forecast.ended(place.decode, place.tokens)
        books.forecast.answered(place.work.answer, place.work.prompt)
        books.ledger.release(place.decode, place.tokens)
        books.in_flight.end(place.decode)

    def reported(self, slot: int, kv_tokens: int) -> None:
        """An engine said what its KV is used for."""
        self.books.ledger.note_report(slot, EngineLoad(kv_used_tokens=kv_tokens, kv_total_tokens=self._hardware.kv_tokens))

    def check(self) -> None:
        """Asserts what is always true."""
        self.books.check()
        assert min(self.books.in_flight.now) >= 0
        assert all(a.at <= b.at for a, b in pairwise(self.waiting))
