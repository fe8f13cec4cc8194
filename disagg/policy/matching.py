"""From the router's books to `disagg.policy.balance`: how the pools of a model stand, and which engine moves if one does. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from disagg.model import ClusterView, EngineId, EngineState, EngineView, Role
from disagg.policy.balance import Situation
from disagg.policy.books import Books
from disagg.policy.cost import ENOUGH

_GONE = frozenset({EngineState.DEAD, EngineState.HELD, EngineState.STARTING})
_THERE = frozenset({EngineState.READY, EngineState.SUSPECT, EngineState.QUARANTINED})


def engines_of(view: ClusterView, model: str, role: Role, moving: Mapping[EngineId, Role]) -> list[EngineView]:
    """The engines of a model that have a role, those that are on their way to it included, those that leave it not."""

    def has_it(engine: EngineView) -> bool:
        if engine.facts.part or engine.facts.model != model:
            return False
        wanted = moving.get(engine.id)
        return wanted is role if wanted is not None else engine.address.role is role and engine.state in _THERE

    return [engine for engine in view.engines if has_it(engine)]


def situation_of(
    view: ClusterView,
    model: str,
    books: Books,
    *,
    moving: Mapping[EngineId, Role],
    waiting: int,
    flip_s: float,
    horizon_s: float,
    now: float,
    lost: Role | None = None,
) -> Situation:
    """How the pools of a model stand.

    Args:
        view: all engines.
        model: the served name.
        books: what is known of them.
        moving: the engines that are on their way to another role, and to which.
        waiting: requests that wait for room.
        flip_s: what a move takes.
        horizon_s: for which what would be lost with a prefix cache is summed up.
        now: monotonic seconds.
        lost: see `Situation`.
    """
    prefill, decode = (engines_of(view, model, role, moving) for role in (Role.PREFILL, Role.DECODE))
    demand, forecast = books.demand(model), books.forecast
    readers = [e for e in prefill if e.id not in moving]
    return Situation(
        prefill=len(prefill),
        decode=len(decode),
        offered=_offered(books, model, decode, flip_s, now),
        watched_s=demand.watched_s(now) if demand is not None else 0.0,
        prompt_s=forecast.busy_s(readers[0].slot, int(forecast.prompt_tokens)) if readers else 0.0,
        late_s=min((forecast.wait_s(e.slot, now=now) for e in readers), default=0.0),
        late_limit_s=books.slo.ttft_s,
        kv_share=_share(decode, books),
        waiting=waiting,
        flip_s=flip_s,
        lost=lost,
        unknown=by_hand(view, model) or _unknown(prefill, decode, books),
        lost_cache_s=min((books.worth_s(e, horizon_s) for e in readers), default=0.0),
    )


def _offered(books: Books, model: str, decode: Sequence[EngineView], flip_s: float, now: float) -> tuple[float, float]:
    """What will be asked of both pools when a move is done; of the decode pool not less than its answers need now."""
    demand = books.demand(model)
    prefill_s, decode_s = demand.expected(now, flip_s) if demand is not None else (0.0, 0.0)
    return prefill_s, max(decode_s, books.writers_busy(decode))


def by_hand(view: ClusterView, model: str) -> str:
    """Why engines of a model are moved by hand only; empty where they are not.

    An order to one host does not reach the other hosts of its engine, and nobody would be there to see that.
    """
    hashes = {e.facts.model_hash for e in view.engines if e.facts.model == model} | {""}
    parts = [e for e in view.engines if e.facts.part and e.state not in {EngineState.DEAD, EngineState.HELD}]
    several = any(e.facts.model == model or (not e.facts.model and e.facts.model_hash in hashes) for e in parts)  # parts name no model
    return "there are engines over several hosts, which are moved by hand only" if several else ""


def _unknown(prefill: Sequence[EngineView], decode: Sequence[EngineView], books: Books) -> str:
    """Engines are moved by what was measured, not by what another machine does."""
    if not any(books.forecast.samples(e.slot)[0] >= ENOUGH for e in prefill):
        return "how long prompts take was not measured yet"
    if not any(books.forecast.samples(e.slot)[1] >= ENOUGH for e in decode):
        return "how long the steps of answers take was not measured yet: streams tell it"
    return ""


def is_there(view: ClusterView, model: str, role: Role, moving: Mapping[EngineId, Role], ordered: Collection[EngineId]) -> bool:
    """A pool has an engine, whatever it does at the moment.

    Args:
        view: all engines.
        model: the served name.
        role: of the pool.
        moving: the engines that are on their way to another role, and to which.
        ordered: engines that somebody changes: they are not lost.
    """
    whole = (e for e in view.engines if not e.facts.part and e.facts.model in {model, ""})
    mine = (e for e in whole if moving.get(e.id, e.address.role) is role)
    return any(e.state not in _GONE or e.id in ordered for e in mine)


def _share(decode: Sequence[EngineView], books: Books) -> float:
    """Of the decode pool's room, in KV tokens or in requests, that is taken: whichever is less left of."""
    tokens = sum(e.load.kv_total_tokens for e in decode)
    used = sum(books.ledger.reserved(e.slot) + max(0, books.ledger.drift(e.slot)) for e in decode)
    places = sum(e.facts.max_running for e in decode)
    legs = sum(books.in_flight.now[e.slot] for e in decode)
    return max(used / tokens if tokens else 0.0, legs / places if places else 0.0)


def mover(view: ClusterView, model: str, role: Role, books: Books, *, busy: Collection[EngineId], now: float) -> EngineView | None:
    """The engine that gives up a role with the least loss: the one whose work ends first, with the smallest cache.

    Args:
        view: all engines.
        model: the served name.
        role: which it has.
        books: what is known of them.
        busy: engines that are being changed.
        now: monotonic seconds.

    Returns:
        None where no engine of this role can be moved, or where it would be the last that takes work.
    """

    def loss(engine: EngineView) -> tuple[float, int, int, int]:
        slot = engine.slot
        wait_s = books.forecast.wait_s(slot, now=now) if role is Role.PREFILL else 0.0
        return round(wait_s, 2), books.ledger.reserved(slot), books.history.blocks(slot), slot

    pool = view.pools.get(model)
    ready = () if pool is None else pool.prefill if role is Role.PREFILL else pool.decode
    if pool is None or pool.islands or len(ready) < 2 or by_hand(view, model):
        return None
    return min((e for e in ready if e.host and e.owned and e.id not in busy), key=loss, default=None)
