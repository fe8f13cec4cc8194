"""The shared nouns: engines, views, decisions.

*host*: a machine. *engine*: one SGLang (or embedded) instance. *role*: what an engine does. *pair*: one prefill and one decode engine.
*handoff*: a request's passage over a pair. *room*: SGLang's id of one attempt. *view*: a frozen snapshot. *decision*: a choice and its
reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NewType

import msgspec

HostId = NewType("HostId", str)
EngineId = NewType("EngineId", str)


class Role(StrEnum):
    """What an engine does: read prompts, write answers, or both on one machine."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


MODES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNIFIED: "null"}
"""SGLang's words for them, its ``disaggregation_mode``."""


class EngineState(StrEnum):
    """Where an engine is in its life; only ``READY`` ones get new work. The words are those of ``/admin/cluster``."""

    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    SWITCHING = "switching"
    DEAD = "dead"
    HELD = "held"
    QUARANTINED = "quarantined"


_GONE = frozenset({EngineState.DEAD, EngineState.STARTING, EngineState.HELD})


class EngineLoad(msgspec.Struct, frozen=True):
    """What an engine last said about itself. Requests are counts, KV is in tokens, the transfer counter in bytes since start.

    The used tokens are those that nobody else can have now. SGLang (0.5.23: ``num_used_tokens`` of ``/v1/loads`` is the capacity without
    what is available and what is evictable) and the embedded engine (held and quarantined pages) count alike:

    * prefix pages that no running request uses are not counted: they are evicted when somebody wants their room;
    * pages that a decode engine took for an answer whose prompt is still on its way are counted from the moment they were taken;
    * the tokens that a decode engine keeps for answers to come are not counted by SGLang, which holds them back when it admits (512 for
      each request), and are counted by the embedded engine, which takes their pages at once;
    * requests that wait and hold no page yet are not counted.

    No other figure of ``/v1/loads`` says it better: ``num_total_tokens`` adds prompts that hold nothing yet, ``num_active_tokens`` leaves
    out pages whose content is on its way. With data parallelism all of them are sums over ranks.

    Attributes:
        kv_quarantined_tokens: of the used ones, those that no request uses: SGLang keeps pages into which a peer that died in a transfer
            may still be writing, for up to its release timeout. Known only while nothing runs.
        requests: all requests that it has, those that wait for a peer included; never more than the truth. 0 where nobody says.
    """

    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    kv_transfer_bytes: int = 0
    kv_quarantined_tokens: int = 0
    requests: int = 0

    @property
    def at_work(self) -> int:
        """Requests that it has; agents of earlier releases count those that wait for a peer out."""
        return max(self.requests, self.running + self.waiting)


class EngineAddress(msgspec.Struct, frozen=True):
    """Where an engine is reached.

    Attributes:
        bootstrap_port: where decode engines meet this engine; only for prefill engines.
        pid: the engine's process on this host, 0 if it is not ours.
        switches: how often that process has changed its role since its start.
    """

    id: EngineId
    role: Role
    host: str
    port: int
    bootstrap_port: int = 0
    api_key: str = ""
    pid: int = 0
    switches: int = 0

    def __repr__(self) -> str:
        return f"<EngineAddress {self.id} {self.role} {self.url}>"  # without the key

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end."""
        return f"http://{self.url_host}:{self.port}"

    @property
    def url_host(self) -> str:
        """The host as a URL holds it: IPv6 in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def bootstrap_host(self) -> str:
        """Where decode engines meet this one, spelled in another way after each change of its role.

        SGLang 0.5.23: a decode engine keeps by this word where to send what a prefill engine must know, and forgets it when that engine's
        bootstrap server is gone for a while. It is not gone while the engine is a decode engine for a time; when it reads prompts again it
        listens elsewhere, and every handoff to it would wait in vain. What stands before the ``@`` of a URL is not part of the place.
        """
        return f"{self.switches}@{self.url_host}" if self.switches else self.url_host


class EngineFacts(msgspec.Struct, frozen=True):
    """What does not change while an engine lives. Empty strings and zeros where the engine does not say.

    Attributes:
        part: which part of an engine over several hosts; only part 0 serves requests.
        stream_token_ids: its streams of the OpenAI endpoints carry ``token_ids`` where ``return_token_ids`` is asked for.
        max_running: requests that it works on at the same time, summed over its ranks; more wait inside of it.
    """

    model: str = ""
    model_hash: str = ""
    page_size: int = 0
    context_tokens: int = 0
    kv_bytes_per_token: int = 0
    version: str = ""
    dtype: str = ""
    tp_size: int = 0
    part: int = 0
    stream_token_ids: bool = False
    max_running: int = 0

    def why_not_paired_with(self, other: EngineFacts) -> str:
        """What keeps two engines of one model from exchanging KV pages; empty when nothing does.

        Pages of another size, precision or sharding cannot be taken over, and pages of other weights would be read as nonsense
        (SGLang notices in the middle of a transfer, or not at all). What one side does not say is not held against it.
        """
        for (what, mine), (_, its) in zip(self.profile, other.profile, strict=True):
            if mine and its and mine != its:
                return f"{what} {str(mine)[:12]} against {str(its)[:12]}"
        return ""

    @property
    def profile(self) -> tuple[tuple[str, str | int], ...]:
        """What two engines must have in common to exchange KV pages, with its name for people."""
        return (
            ("model hash", self.model_hash),
            ("page size", self.page_size),
            ("KV precision", self.dtype),
            ("tensor parallelism", self.tp_size),
            ("engine version", _series(self.version)),
        )


def _series(version: str) -> str:
    """Releases that differ in the last number only may hand KV pages to each other."""
    return ".".join(version.split(".")[:2])


class HostState(StrEnum):
    """Where a host is, as the router sees it. Only the engines of ``ONLINE`` ones get new work."""

    ONLINE = "online"
    SUSPECT = "suspect"
    SILENT = "silent"
    LEFT = "left"


class HostView(msgspec.Struct, frozen=True):
    """One host in a view.

    Attributes:
        address: where its control connection comes from, as it says itself.
        incarnation: counts the starts of its agent.
        reason: why it is in this state, one sentence.
    """

    id: HostId
    state: HostState
    address: str = ""
    incarnation: int = 0
    release: str = ""
    reason: str = ""


class EngineView(msgspec.Struct, frozen=True):
    """One engine in a view.

    Attributes:
        slot: index of this engine in the router's flat in-flight lists; never reused while the router lives.
        reason: why it is in this state, one sentence.
        host: the name of the host whose agent owns it; empty for an engine that was given by URL.
        still_s: for how long it made no progress although it had work.
        unpaired: why no ready engine of the other role can take part in a pair with it; empty when one can, or none is ready.
        owned: its agent started it and nobody else sends requests there; not known of one that was given by URL or attached.
        distrust: what of its reports is not believed, one sentence; the load is what is believed.
        weight: how many requests one request on it counts for when the least loaded is looked for: more than 1 for a slow one.
    """

    address: EngineAddress
    slot: int
    state: EngineState
    facts: EngineFacts = EngineFacts()
    load: EngineLoad = EngineLoad()
    reason: str = ""
    host: HostId = HostId("")
    still_s: float = 0.0
    unpaired: str = ""
    owned: bool = False
    weight: float = 1.0
    distrust: str = ""

    @property
    def id(self) -> EngineId:
        """The engine's id, as in ``x-disagg-prefill``."""
        return self.address.id

    def serves_as(self, then: EngineView) -> bool:
        """It is ready, and the same process in the same role as it was then."""
        address, before = self.address, then.address
        return self.state is EngineState.READY and address.role is before.role and address.pid == before.pid


class Pool(msgspec.Struct, frozen=True):
    """The ready engines that serve one model, by role.

    Attributes:
        islands: where not every prefill engine can hand its KV pages to every decode engine, the parts in which they can, without their
            unified engines; empty where all can, which is usual. One for each kind of prefill engine, and one without decode engines for a
            kind that has no partner; a decode engine that does not say what it is may be in several.
    """

    prefill: tuple[EngineView, ...] = ()
    decode: tuple[EngineView, ...] = ()
    unified: tuple[EngineView, ...] = ()
    islands: tuple[Pool, ...] = ()

    @property
    def can_pair(self) -> bool:
        """True when some prefill engine can hand over to some decode engine."""
        if self.islands:
            return any(island.can_pair for island in self.islands)
        return bool(self.prefill and self.decode)

    @property
    def can_serve(self) -> bool:
        """True when a request can be served: a pair, or a unified engine."""
        return bool(self.unified) or self.can_pair


class ClusterView(msgspec.Struct, frozen=True):
    """Everything the router knows about its engines at one moment. One writer replaces it whole; readers keep no copy.

    Attributes:
        engines: every engine, the dead ones too, in the order of their slots.
        pools: the ready ones, keyed by served model.
        hosts: those that have joined, in the order of their names.
        may_join: hosts can join this router, so that an empty view is not a mistake.
        quarantined: the pairs, and unified engines as (None, engine), whose answers are wrong, with the reason; no pool pairs them.
        proving: the pools as they would be without any quarantine.
        cut: the pairs that are not used for a while because their handoffs fail, with the reason; no pool pairs them.
    """

    engines: tuple[EngineView, ...] = ()
    pools: Mapping[str, Pool] = {}
    hosts: tuple[HostView, ...] = ()
    may_join: bool = False
    quarantined: Mapping[tuple[EngineId | None, EngineId], str] = {}
    proving: tuple[Pool, ...] = ()
    cut: Mapping[tuple[EngineId, EngineId], str] = {}

    @classmethod
    def of(
        cls,
        engines: Iterable[EngineView],
        hosts: Iterable[HostView] = (),
        *,
        may_join: bool = False,
        quarantined: Mapping[tuple[EngineId | None, EngineId], str] | None = None,
        ejected: Mapping[EngineId, str] | None = None,
        cut: Mapping[tuple[EngineId, EngineId], str] | None = None,
        weights: Mapping[EngineId, float] | None = None,
    ) -> ClusterView:
        """Builds a view and its pools from engines in the order of their slots.

        Args:
            engines: as their detectors see them.
            hosts: that have joined.
            may_join: hosts can join.
            quarantined: as the attribute.
            ejected: the engines that get no new work although they are ready, with the reason; they are shown as suspect.
            cut: as the attribute.
            weights: of the engines that are slower than others.
        """
        engines, wrong, cut = tuple(engines), quarantined or {}, cut or {}
        bad: _Bad = {**{pair: f"quarantined, {why}" for pair, why in wrong.items()}, **cut} if wrong or cut else {}
        if ejected or weights:
            engines = tuple(_treated(e, (ejected or {}).get(e.id, ""), (weights or {}).get(e.id, 1.0)) for e in engines)
        ready = [e for e in engines if e.state is EngineState.READY and not e.facts.part]
        models = sorted({e.facts.model for e in ready})
        pools = {m: _pool([e for e in ready if e.facts.model == m], bad) for m in models}
        proving = tuple(_pool([e for e in ready if e.facts.model == m], cut) for m in models) if wrong else tuple(pools.values())
        lone = {e.id: e for pool in pools.values() if pool.islands or not pool.can_pair for e in _lone(pool, engines, bad, cut)}
        lone |= {e.id: _unpaired(e, f"is quarantined: {wrong[None, e.id]}") for e in ready if (None, e.id) in wrong}
        if lone:
            engines = tuple(lone.get(e.id, e) for e in engines)
        return cls(engines, pools, tuple(hosts), may_join, wrong, proving, cut)

    def has_died(self, engine: EngineView) -> bool:
        """True when the process that this engine was is known to have ended. A host that is not heard says nothing about its engines."""
        now = next((e for e in self.engines if e.id == engine.id), None)
        if now is None:
            return False
        if now.address.pid != engine.address.pid:
            return True
        host = next((h for h in self.hosts if h.id == now.host), None)
        return now.state in _GONE and (host is None or host.state is HostState.ONLINE)

    def may_serve(self, model: str) -> bool:
        """True when engines for this model are there, whatever they do at the moment: it is worth waiting for them.

        Args:
            model: empty means the only one there is.
        """
        roles = {e.address.role for e in self._of(model)}
        return Role.UNIFIED in roles or {Role.PREFILL, Role.DECODE} <= roles

    def may_pair(self, model: str) -> bool:
        """True when a pair may come to serve this model."""
        return any(e.address.role is not Role.UNIFIED for e in self._of(model))

    def _of(self, model: str) -> Iterable[EngineView]:
        return (e for e in self.engines if e.state is not EngineState.HELD and (not model or e.facts.model in {"", model}))

    def why_not_ready(self) -> str:
        """One sentence that says what is missing before a request can be served; empty when nothing is."""
        if any(pool.can_serve for pool in self.pools.values()):
            return ""
        if not self.engines and self.hosts:
            return f"no engine is there: the hosts that have joined ({', '.join(h.id for h in self.hosts)}) report none"
        if not self.engines:
            joining = "no host has joined yet: start `disagg serve --role prefill --join …` and a decode one"
            return joining if self.may_join else "no engine is configured: start the router with --prefill and --decode, or --unified"
        lone = next((e for e in self.engines if e.unpaired), None)
        if lone is not None:
            return f"no pair can be made: {lone.id} {lone.unpaired}"
        ready = {e.address.role for e in self.engines if e.state is EngineState.READY}
        missing = [r.value for r in (Role.PREFILL, Role.DECODE) if r not in ready]
        states = ", ".join(f"{e.id} {'' if e.id.startswith(e.address.role) else f'as {e.address.role} '}{e.state}" for e in self.engines)
        return f"no ready {' and no ready '.join(missing)} engine ({states})"


_Bad = Mapping[Any, str]  # by pair, as (prefill, decode), and by unified engine, as (None, engine)


def _treated(engine: EngineView, ejected: str, weight: float) -> EngineView:
    """A ready engine that is ejected gets no new work; what runs goes on."""
    if ejected and engine.state is EngineState.READY:
        return msgspec.structs.replace(engine, state=EngineState.SUSPECT, reason=ejected, weight=weight)
    return engine if weight == engine.weight else msgspec.structs.replace(engine, weight=weight)


def _pool(engines: Sequence[EngineView], bad: _Bad) -> Pool:
    prefill, decode, unified = (tuple(e for e in engines if e.address.role is role) for role in (Role.PREFILL, Role.DECODE, Role.UNIFIED))
    return Pool(prefill, decode, tuple(e for e in unified if (None, e.id) not in bad), _islands(prefill, decode, bad))


def _islands(prefill: tuple[EngineView, ...], decode: tuple[EngineView, ...], bad: _Bad) -> tuple[Pool, ...]:
    """Pairs are made of engines that fit each other, and "fits" is not transitive where an engine does not say what it is."""
    kinds: dict[tuple[object, ...], list[EngineView]] = {}
    for engine in prefill:
        shunned = frozenset(d.id for d in decode if (engine.id, d.id) in bad) if bad else frozenset()
        kinds.setdefault((engine.facts.profile, shunned), []).append(engine)
    islands = tuple(Pool(tuple(kind), _fitting(kind[0], decode, bad)) for kind in kinds.values())
    return () if all(island.decode == decode for island in islands) else islands


def _fitting(engine: EngineView, others: tuple[EngineView, ...], bad: _Bad) -> tuple[EngineView, ...]:
    """Those of the other role that can be paired with it; it may be of either."""
    fit = tuple(o for o in others if o.facts == engine.facts or not engine.facts.why_not_paired_with(o.facts))
    return tuple(o for o in fit if _ordered(engine, o) not in bad) if bad else fit


def _ordered(engine: EngineView, other: EngineView) -> tuple[EngineId, EngineId]:
    return (engine.id, other.id) if engine.address.role is Role.PREFILL else (other.id, engine.id)


def _unpaired(engine: EngineView, why: str) -> EngineView:
    return msgspec.structs.replace(engine, unpaired=why)


def _lone(pool: Pool, everyone: Sequence[EngineView], bad: _Bad, cut: _Bad) -> Iterable[EngineView]:
    """The ready engines that no ready engine of the other role can be paired with, with the reason."""
    for engines, fellows, role in ((pool.prefill, pool.decode, Role.DECODE), (pool.decode, pool.prefill, Role.PREFILL)):
        others = fellows or _strangers(engines, role, everyone)
        for engine in engines:
            if others and not _fitting(engine, fellows, bad):
                pair = _ordered(engine, others[0])
                why = _difference(engine, others[0]) or bad.get(pair, "")
                yield _unpaired(engine, f"is {'not' if pair in cut else 'never'} paired with {others[0].id}: {why}")


def _strangers(engines: tuple[EngineView, ...], role: Role, everyone: Sequence[EngineView]) -> tuple[EngineView, ...]:
    """The ready engines of a role, if all of that role are known to serve another model: none can become a partner by getting well."""
    of_role = tuple(e for e in everyone if e.address.role is role)
    models = {e.facts.model for e in of_role}
    if not engines or "" in models or engines[0].facts.model in models:
        return ()
    return tuple(e for e in of_role if e.state is EngineState.READY)


def _difference(engine: EngineView, other: EngineView) -> str:
    if engine.facts.model != other.facts.model:
        return f"they serve different models, {engine.facts.model} and {other.facts.model}"
    return engine.facts.why_not_paired_with(other.facts)


class Choice(msgspec.Struct, frozen=True):
    """A decision where to send a request.

    Attributes:
        prefill: None when one unified engine does both phases.
        decode: the engine whose answer the client reads (the unified one when there is no prefill).
        reason: why these, one sentence.
    """

    prefill: EngineView | None
    decode: EngineView
    reason: str
