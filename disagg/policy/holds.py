"""Who holds KV pages on which engine, and what of an engine's use that explains. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from disagg.model import ClusterView, EngineId, EngineState, EngineView, Role


class Hold(msgspec.Struct, frozen=True):
    """What one leg of an attempt holds on an engine.

    Attributes:
        request: whose it is, the id that the client was told.
        rids: the engine-side ids, one for each prompt.
        leg: the part that the engine has in it.
        phase: the attempt's state; a final one means that the engine was told to abort and has not ended it yet.
        age_s: since its pair was chosen.
        tokens: how many of the KV pool's; 0 where that is not known.
        requests: how many the engine makes of it: a prompt, a sample each.
    """

    request: str
    rids: tuple[str, ...]
    engine: EngineId
    leg: Role
    phase: str
    age_s: float
    tokens: int = 0
    requests: int = 1


class Unexplained(msgspec.Struct, frozen=True):
    """Work on an engine that no entry explains, as `Orphans` sees it; nothing for a healthy one.

    Attributes:
        requests: how many.
        tokens: their share of the KV pool.
        for_s: how long already.
        note: what is done about it, one sentence.
    """

    requests: int = 0
    tokens: int = 0
    for_s: float = 0.0
    note: str = ""


class Account(msgspec.Struct, frozen=True):
    """The KV pool of one engine, in tokens.

    Attributes:
        used_tokens: by requests: neither what the prefix cache could give up nor what is quarantined.
        explained_tokens: by holds whose size is known.
        drift_tokens: used, less explained.
        orphan_tokens: by work that no entry explains.
        orphan_for_s: for how long that has been so.
        quarantined_tokens: kept from use by the engine, because a peer that is gone might still write there.
    """

    id: EngineId
    capacity_tokens: int
    used_tokens: int
    explained_tokens: int
    drift_tokens: int
    orphan_tokens: int
    orphan_for_s: float
    quarantined_tokens: int
    note: str = ""


def accounts(view: ClusterView, holds: Iterable[Hold], orphans: Mapping[EngineId, Unexplained]) -> list[Account]:
    """The KV pool of every engine, in the order of the view."""
    explained: dict[EngineId, int] = {}
    for hold in holds:
        explained[hold.engine] = explained.get(hold.engine, 0) + hold.tokens
    return [_account(e, explained.get(e.id, 0), orphans.get(e.id, Unexplained())) for e in view.engines]


def _account(engine: EngineView, explained: int, orphan: Unexplained) -> Account:
    load = engine.load
    used = used_tokens(engine)
    return Account(
        id=engine.id,
        capacity_tokens=load.kv_total_tokens,
        used_tokens=used,
        explained_tokens=explained,
        drift_tokens=used - explained,
        orphan_tokens=orphan.tokens,
        orphan_for_s=round(orphan.for_s, 3),
        quarantined_tokens=load.kv_quarantined_tokens,
        note=orphan.note,
    )


def used_tokens(engine: EngineView) -> int:
    """What its requests use. Both engines leave pages that only the prefix cache knows out of their count."""
    return max(0, engine.load.kv_used_tokens - engine.load.kv_quarantined_tokens)


def why_kept(engine: EngineView, engines: Sequence[EngineView], changing: Iterable[EngineId]) -> str:
    """Why an engine that should be started anew must go on for now; empty when it may end.

    Args:
        engine: which.
        engines: all of them.
        changing: those that a change is under way for.
    """
    peers = [e for e in engines if e.id != engine.id and _of_a_pool(e, engine)]
    busy = set(changing)
    if engine.id in busy:
        return "it is being changed already"
    changed = next((e.id for e in peers if e.id in busy), None)
    if changed is not None:
        return f"{changed} of the same pool is being changed"
    if not any(_serves(e) for e in peers):
        return f"it is the last {engine.address.role} engine of its pool that serves"
    return ""


def _of_a_pool(one: EngineView, other: EngineView) -> bool:
    return one.address.role is other.address.role and one.facts.model == other.facts.model


def _serves(engine: EngineView) -> bool:
    return engine.state is EngineState.READY and not engine.unpaired and not engine.facts.part
