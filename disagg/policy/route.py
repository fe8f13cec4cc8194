"""Which engines serve a request. Pure: a function of the view, of what is in flight and of the engines already tried."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from disagg.errors import NoCapacityError, UnknownModelError
from disagg.model import Choice, ClusterView, EngineId, EngineView, Pool
from disagg.policy.forecast import Outlook

ALIKE = 0.05
ALIKE_S = 0.002
"""Engines whose predictions differ by less than this are alike: a better one by chance must not get all requests."""


class InFlight:
    """The router's own count of legs per engine, in flat lists indexed by an engine's slot.

    Attributes:
        now: legs that run at the moment.
        turn: when an engine was used last, counted in legs; breaks ties so that equal engines take turns, and one that was away does not
            get everything until it has caught up.
    """

    __slots__ = ("_legs", "now", "turn")

    def __init__(self) -> None:
        self.now: list[int] = []
        self.turn: list[int] = []
        self._legs = 0

    def grow(self, slots: int) -> None:
        """Makes room for engines up to this many slots."""
        missing = slots - len(self.now)
        if missing > 0:
            self.now += [0] * missing
            self.turn += [0] * missing

    def start(self, slot: int) -> None:
        """A leg was sent to the engine in this slot."""
        self.now[slot] += 1
        self._legs += 1
        self.turn[slot] = self._legs

    def end(self, slot: int) -> None:
        """A leg of the engine in this slot ended."""
        self.now[slot] -= 1


def pool_of(view: ClusterView, model: str) -> Pool:
    """The pool that serves a model.

    Args:
        view: what the router knows of its engines.
        model: the name asked for; empty means the only one there is.

    Raises:
        UnknownModelError: engines are there, but none serves this model.
        NoCapacityError: no request can be served at the moment.
    """
    pool = view.pools.get(model)
    if pool is None and not model and len(view.pools) == 1:
        pool = next(iter(view.pools.values()))
    if pool is not None and pool.can_serve:
        return pool
    known = {e.facts.model for e in view.engines if e.facts.model}
    if (model or len(known) > 1) and known and model not in known:
        names = ", ".join(sorted(known))
        asked = f"no engine serves the model {model[:80]!r}" if model else "name the model: several are served"
        raise UnknownModelError(f"{asked}; there is {names}", param="model", code="model_not_found")
    raise NoCapacityError(view.why_not_ready() or f"no pair of engines is ready for the model {model[:80]!r}", retry_after_s=2)


def choose(
    pool: Pool,
    in_flight: InFlight,
    *,
    exclude: Collection[EngineId] = (),
    unified_only: bool = False,
    outlook: Outlook | None = None,
) -> Choice:
    """Picks the pair that serves a request best, or a unified engine where that is better.

    With an outlook the prefill engine is the one that will give the first token soonest (its queue, and what it must read of this prompt);
    the decode engine the one that costs the least time with it, for this answer and for those that it joins; a unified engine is taken
    where all of that together, and the pause that reading costs its other answers, is less. What is as good within `ALIKE` counts as equal.
    One that was slow when something was seen of it last is tried again now and then, see `disagg.policy.forecast`.

    Among equals, and without an outlook, the least loaded is picked: by the legs that this router has in flight there, with this one, times
    the engine's weight; then the one that was not used for longest; then the lower slot.

    Args:
        pool: the ready engines of the model.
        in_flight: the router's counts.
        exclude: engines that were tried already.
        unified_only: for a request that a pair must never see, as one with ``n > 1``.
        outlook: what the request would meet on each engine.

    Raises:
        NoCapacityError: every engine that could do it was tried already.
    """
    pick = _Pick(in_flight, exclude, outlook)
    unified = pick.unified(pool.unified)
    prefill, decode = (None, None) if unified_only else pick.pair(pool)
    if prefill is None or decode is None:
        if unified is None:
            raise NoCapacityError("every engine that could serve this failed to take it; try again", retry_after_s=1)
        unified = pick.tried_alone(pool, unified)
        return Choice(None, unified, f"no pair can take it; {unified.id} has {_say(in_flight.now[unified.slot])}{pick.tried(unified)}")
    counts = in_flight.now
    if unified is not None and outlook is None and pick.load(unified) < pick.load(decode):
        return Choice(None, unified, f"{unified.id} has {counts[unified.slot]} in flight, {decode.id} {counts[decode.slot]}")
    if outlook is None:
        return Choice(prefill, decode, f"fewest in flight: {prefill.id} {counts[prefill.slot]}, {decode.id} {counts[decode.slot]}")
    if unified is not None:
        alone_s, pair_s = pick.alone_s(unified), pick.pair_s(prefill, decode)
        if alone_s < pair_s:
            cost = f"{unified.id} costs {alone_s:.2f} s, {prefill.id} and {decode.id} {pair_s:.2f} s"
            unified = pick.tried_alone(pool, unified)
            return Choice(None, unified, cost + pick.tried(unified))
    prefill, decode = pick.tried_pair(pool, prefill, decode)
    return Choice(prefill, decode, pick.reason(prefill, decode))


class _Pick:
    """One choice."""

    __slots__ = ("_exclude", "_now", "_outlook", "_tries", "_turn")

    def __init__(self, in_flight: InFlight, exclude: Collection[EngineId], outlook: Outlook | None) -> None:
        self._now = in_flight.now
        self._turn = in_flight.turn
        self._exclude = exclude
        self._outlook = outlook
        self._tries: list[int] = []

    def load(self, engine: EngineView) -> float:
        """The requests there, with this one, as its weight counts them."""
        return (self._now[engine.slot] + 1) * engine.weight

    def pair(self, pool: Pool) -> tuple[EngineView | None, EngineView | None]:
        """The best of each role, out of the island where they are best together."""
        if not pool.islands:
            prefill = self._prefill(pool.prefill)
            return prefill, self._decode(pool.decode, prefill)
        pairs = [self.pair(island) for island in pool.islands]
        return min(((p, d) for p, d in pairs if p is not None and d is not None), key=self._pair_key, default=(None, None))

    def _pair_key(self, pair: tuple[EngineView, EngineView]) -> tuple[float, float, int]:
        p, d = pair
        seconds = 0.0 if self._outlook is None else self.pair_s(p, d)
        return seconds, self.load(p) + self.load(d), self._turn[p.slot] + self._turn[d.slot]

    def _prefill(self, engines: Sequence[EngineView]) -> EngineView | None:
        outlook = self._outlook
        if outlook is None or len(engines) < 2:
            return self._least(engines)
        return self._best(engines, lambda engine: outlook.first_token_s(engine.slot))

    def _decode(self, engines: Sequence[EngineView], prefill: EngineView | None) -> EngineView | None:
        outlook = self._outlook
        if outlook is None or prefill is None or len(engines) < 2:
            return self._least(engines)
        reader = prefill.slot
        return self._best(engines, lambda engine: outlook.answer_s(engine.slot) + outlook.link_s(reader, engine.slot))

    def unified(self, engines: Sequence[EngineView]) -> EngineView | None:
        """The best unified engine."""
        return self._least(engines) if self._outlook is None or len(engines) < 2 else self._best(engines, self.alone_s)

    def alone_s(self, engine: EngineView) -> float:
        """What a request costs on a unified engine, seconds of everybody."""
        assert self._outlook is not None
        slot = engine.slot
        return self._outlook.first_token_s(slot) + self._outlook.answer_s(slot) + self._outlook.pause_s(slot)

    def pair_s(self, prefill: EngineView, decode: EngineView) -> float:
        """The same of a pair."""
        outlook, p, d = self._outlook, prefill.slot, decode.slot
        assert outlook is not None
        return outlook.first_token_s(p) + outlook.link_s(p, d) + outlook.answer_s(d)

    def reason(self, prefill: EngineView, decode: EngineView) -> str:
        """One sentence."""
        outlook, p = self._outlook, prefill.slot
        assert outlook is not None
        wait_s, cached = outlook.wait_s(p), outlook.cached(p)
        holds = "holds" if outlook.is_told(p) else "should hold"
        held = f", it {holds} {cached} of {outlook.tokens} tokens" if cached else ""
        soon = f"{prefill.id} gives the first token in {outlook.first_token_s(p):.3f} s ({wait_s:.3f} s of them waiting{held})"
        return f"{soon}; {decode.id} has {_say(self._now[decode.slot])}{self.tried(prefill)}{self.tried(decode)}"

    def tried(self, engine: EngineView) -> str:
        """A clause, if this is a try of the engine; else nothing."""
        return f"; {engine.id} was slow and is tried again" if engine.slot in self._tries else ""

    def _best(self, engines: Sequence[EngineView], seconds: Callable[[EngineView], float]) -> EngineView | None:
        """The one that takes the fewest seconds; of those that are nearly as good the least loaded."""
        exclude = self._exclude
        found = [(seconds(engine), engine) for engine in engines if not (exclude and engine.id in exclude)]
        if not found:
            return None
        limit = min(s for s, _ in found) * (1.0 + ALIKE) + ALIKE_S
        return self._least([engine for s, engine in found if s <= limit])

    def tried_pair(self, pool: Pool, prefill: EngineView, decode: EngineView) -> tuple[EngineView, EngineView]:
        """This pair, or one with an engine that is due for a try. The choice was made without it, so that it stands in nobody's light."""
        outlook = self._outlook
        if outlook is None or not (outlook.may_try(writes=False) or outlook.may_try(writes=True)):
            return prefill, decode
        home = next((island for island in pool.islands if prefill in island.prefill and decode in island.decode), pool)
        prefill = self._tried_for(prefill, home.prefill, lambda e: outlook.first_token_s(e.slot), writes=False)
        reader = prefill.slot
        decode = self._tried_for(decode, home.decode, lambda e: outlook.answer_s(e.slot) + outlook.link_s(reader, e.slot), writes=True)
        return prefill, decode

    def tried_alone(self, pool: Pool, unified: EngineView) -> EngineView:
        """This unified engine, or one that is due for a try."""
        for writes in (False, True):
            if self._outlook is not None and not self._tries and self._outlook.may_try(writes=writes):
                unified = self._tried_for(unified, pool.unified, self.alone_s, writes=writes)
        return unified

    def _tried_for(
        self, best: EngineView, engines: Sequence[EngineView], seconds: Callable[[EngineView], float], *, writes: bool
    ) -> EngineView:
        outlook, exclude = self._outlook, self._exclude
        assert outlook is not None
        due = outlook.may_try(writes=writes)
        for engine in engines:
            slot = engine.slot
            if slot not in due or engine is best or self._now[slot] or (exclude and engine.id in exclude):
                continue  # it is tried by one request at a time
            if seconds(engine) - seconds(best) <= outlook.try_s(slot, best.slot, writes=writes):
                self._tries.append(slot)
                return engine
        return best

    def _least(self, engines: Sequence[EngineView]) -> EngineView | None:
        best: EngineView | None = None
        best_key = (0.0, 0)
        now, turn, exclude = self._now, self._turn, self._exclude
        for engine in engines:
            key = ((now[engine.slot] + 1) * engine.weight, turn[engine.slot])
            if (best is None or key < best_key) and not (exclude and engine.id in exclude):
                best, best_key = engine, key
        return best


def _say(count: int) -> str:
    return f"{count} request{'s' * (count != 1)} in flight"
