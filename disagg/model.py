"""The shared nouns: engines, views, decisions.

*host*: a machine. *engine*: one SGLang (or embedded) instance. *role*: what an engine does. *pair*: one prefill and one decode engine.
*handoff*: a request's passage over a pair. *room*: SGLang's id of one attempt. *view*: a frozen snapshot. *decision*: a choice and its
reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NewType

import msgspec

HostId = NewType("HostId", str)
EngineId = NewType("EngineId", str)


class Role(StrEnum):
    """What an engine does: read prompts, write answers, or both on one machine."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


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


class EngineLoad(msgspec.Struct, frozen=True):
    """What an engine last said about itself. Requests are counts, KV is in tokens, the transfer counter in bytes since start."""

    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    kv_transfer_bytes: int = 0


class EngineAddress(msgspec.Struct, frozen=True):
    """Where an engine is reached.

    Attributes:
        bootstrap_port: where decode engines meet this engine; only for prefill engines.
        pid: the engine's process on this host, 0 if it is not ours.
    """

    id: EngineId
    role: Role
    host: str
    port: int
    bootstrap_port: int = 0
    api_key: str = ""
    pid: int = 0

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end."""
        return f"http://{self.url_host}:{self.port}"

    @property
    def url_host(self) -> str:
        """The host as a URL holds it, and as ``bootstrap_host`` wants it: IPv6 in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host


class EngineFacts(msgspec.Struct, frozen=True):
    """What does not change while an engine lives. Empty strings and zeros where the engine does not say."""

    model: str = ""
    model_hash: str = ""
    page_size: int = 0
    context_tokens: int = 0
    kv_bytes_per_token: int = 0
    version: str = ""


class EngineView(msgspec.Struct, frozen=True):
    """One engine in a view.

    Attributes:
        slot: index of this engine in the router's flat in-flight lists; never reused while the router lives.
        reason: why it is in this state, one sentence.
    """

    address: EngineAddress
    slot: int
    state: EngineState
    facts: EngineFacts = EngineFacts()
    load: EngineLoad = EngineLoad()
    reason: str = ""

    @property
    def id(self) -> EngineId:
        """The engine's id, as in ``x-disagg-prefill``."""
        return self.address.id


class Pool(msgspec.Struct, frozen=True):
    """The ready engines that serve one model, by role."""

    prefill: tuple[EngineView, ...] = ()
    decode: tuple[EngineView, ...] = ()
    unified: tuple[EngineView, ...] = ()

    @property
    def can_serve(self) -> bool:
        """True when a request can be served: a pair, or a unified engine."""
        return bool(self.unified or (self.prefill and self.decode))


class ClusterView(msgspec.Struct, frozen=True):
    """Everything the router knows about its engines at one moment. One writer replaces it whole; readers keep no copy.

    Attributes:
        engines: every engine, the dead ones too, in the order of their slots.
        pools: the ready ones, keyed by served model.
    """

    engines: tuple[EngineView, ...] = ()
    pools: Mapping[str, Pool] = {}

    @classmethod
    def of(cls, engines: Iterable[EngineView]) -> ClusterView:
        """Builds a view and its pools from engines in the order of their slots."""
        engines = tuple(engines)
        ready = [e for e in engines if e.state is EngineState.READY]
        models = sorted({e.facts.model for e in ready})
        return cls(engines, {m: _pool([e for e in ready if e.facts.model == m]) for m in models})

    def why_not_ready(self) -> str:
        """One sentence that says what is missing before a request can be served; empty when nothing is."""
        if any(pool.can_serve for pool in self.pools.values()):
            return ""
        if not self.engines:
            return "no engine is configured: start the router with --prefill and --decode, or --unified"
        ready = {e.address.role for e in self.engines if e.state is EngineState.READY}
        if Role.PREFILL in ready and Role.DECODE in ready:
            return "the ready prefill and decode engines serve different models, so no pair can be made"
        missing = [r.value for r in (Role.PREFILL, Role.DECODE) if r not in ready]
        states = ", ".join(f"{e.id} {e.state}" for e in self.engines)
        return f"no ready {' and no ready '.join(missing)} engine ({states})"


def _pool(engines: Sequence[EngineView]) -> Pool:
    def by(role: Role) -> tuple[EngineView, ...]:
        return tuple(e for e in engines if e.address.role is role)

    return Pool(by(Role.PREFILL), by(Role.DECODE), by(Role.UNIFIED))


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
