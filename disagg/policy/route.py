"""Which engines serve a request. Pure: a function of the view, of what is in flight and of the engines already tried."""

from __future__ import annotations

from collections.abc import Collection

from disagg.errors import NoCapacityError, UnknownModelError
from disagg.model import Choice, ClusterView, EngineId, EngineView, Pool


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


def choose(pool: Pool, in_flight: InFlight, *, exclude: Collection[EngineId] = (), unified_only: bool = False) -> Choice:
    """Picks the least loaded pair, or a unified engine where that is less loaded than the pair's decode engine.

    Load is the number of legs that this router has in flight there, with this one, times the engine's weight. Ties go to the engine that
    was not used for longest, then to the lower slot.

    Args:
        pool: the ready engines of the model.
        in_flight: the router's counts.
        exclude: engines that were tried already.
        unified_only: for a request that a pair must never see, as one with ``n > 1``.

    Raises:
        NoCapacityError: every engine that could do it was tried already.
    """
    unified = _least(pool.unified, in_flight, exclude)
    prefill, decode = (None, None) if unified_only else _least_pair(pool, in_flight, exclude)
    if prefill is None or decode is None:
        if unified is None:
            raise NoCapacityError("every engine that could serve this failed to take it; try again", retry_after_s=1)
        return Choice(None, unified, f"no pair can take it; {unified.id} has the fewest requests of the unified engines")
    counts = in_flight.now
    if unified is not None and (counts[unified.slot] + 1) * unified.weight < (counts[decode.slot] + 1) * decode.weight:
        return Choice(None, unified, f"{unified.id} has {counts[unified.slot]} in flight, {decode.id} {counts[decode.slot]}")
    reason = f"fewest in flight: {prefill.id} {counts[prefill.slot]}, {decode.id} {counts[decode.slot]}"
    return Choice(prefill, decode, reason)


def _least_pair(pool: Pool, in_flight: InFlight, exclude: Collection[EngineId]) -> tuple[EngineView | None, EngineView | None]:
    """The least loaded of each role, out of the island where their loads together are least."""
    if not pool.islands:
        return _least(pool.prefill, in_flight, exclude), _least(pool.decode, in_flight, exclude)
    pairs = [_least_pair(island, in_flight, exclude) for island in pool.islands]
    whole = [(p, d) for p, d in pairs if p is not None and d is not None]
    now, turn = in_flight.now, in_flight.turn

    def key(pair: tuple[EngineView, EngineView]) -> tuple[float, int]:
        p, d = pair
        return (now[p.slot] + 1) * p.weight + (now[d.slot] + 1) * d.weight, turn[p.slot] + turn[d.slot]

    return min(whole, key=key, default=(None, None))


def _least(engines: tuple[EngineView, ...], in_flight: InFlight, exclude: Collection[EngineId]) -> EngineView | None:
    if not engines:
        return None
    best: EngineView | None = None
    best_key = (0.0, 0)
    now, turn = in_flight.now, in_flight.turn
    for engine in engines:
        key = ((now[engine.slot] + 1) * engine.weight, turn[engine.slot])
        if (best is None or key < best_key) and not (exclude and engine.id in exclude):
            best, best_key = engine, key
    return best
