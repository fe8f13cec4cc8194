"""Finds work on engines that no entry of the router's explains, and ends it: the hands of `Orphans`.

the engines' loads, the relay's entries ──► one `Orphans` per engine (decides) ──► aborts, restarts, lines in the log
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import aiohttp

from disagg.cluster.orphans import (
    AbortAll,
    AbortRids,
    Command,
    Ended,
    Event,
    Found,
    Gone,
    Looked,
    Met,
    Orphans,
    ReapAsked,
    Restart,
    Stalled,
    Unseen,
)
from disagg.cluster.prober import Prober
from disagg.errors import DisaggError
from disagg.model import ClusterView, EngineId, EngineState, EngineView, HostId
from disagg.policy.holds import Account, Hold, Unexplained, accounts, used_tokens, why_kept
from disagg.wire.messages import EngineReport

LOOK_S = 0.25
POST_LIMIT_S = 2.0
RIDS_AT_ONCE = 64


class Entries(Protocol):
    """What the reaper needs of the relay."""

    @property
    def unconfirmed(self) -> Sequence[tuple[float, Sequence[EngineId], Sequence[str]]]:
        """The last attempts that failed, oldest first: when, their engines, their engine-side ids."""

    def holds(self, now: float) -> list[Hold]:
        """What is held on engines."""

    def legs_of(self, slot: int) -> int:
        """How many legs run on the engine in this slot."""


class Table(Protocol):
    """What the reaper needs of the controller."""

    view: ClusterView

    def changing(self) -> Sequence[EngineId]:
        """The engines that a change is under way for."""

    def restart(self, engine: str, cause: str) -> int:
        """Begins to restart an engine. Raises OrderError."""

    def keep_out(self, engine: EngineId, reason: str) -> None:
        """No new work for it, until `let_in`."""

    def let_in(self, engine: EngineId) -> None:
        """Work again."""

    def tell(self, about: HostId, event: str, *, warn: bool = False, **facts: Any) -> None:
        """Logs what happens to an engine, so many lines for each host."""


class Reaper:
    """Looks at every engine several times a second.

    Args:
        table: the engines.
        entries: what the router knows of.
        prober: posts the aborts.
        spawn: runs a coroutine as a task that somebody owns.

    Attributes:
        actions: orphans found, what was done about them, and how often one was gone.
        reaped: requests that no entry explained and that are gone.
    """

    def __init__(
        self,
        *,
        table: Table,
        entries: Entries,
        prober: Prober,
        spawn: Callable[[Coroutine[Any, Any, None], str], Any],
    ) -> None:
        self.actions: Counter[str] = Counter()
        self.reaped = 0
        self._table = table
        self._entries = entries
        self._prober = prober
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._machines: dict[EngineId, Orphans] = {}
        self._kept: dict[EngineId, str] = {}
        self._posting: set[EngineId] = set()
        self._look_at = 0.0
        self._told_at = 0.0

    # --- what is seen

    def met(self, report: EngineReport) -> None:
        """An agent names an engine that the router did not know. Called before anybody can send it work."""
        if report.state not in _IN_SERVICE:
            return
        load = report.load
        look = Looked(report.pid, load.at_work, max(0, load.kv_used_tokens - load.kv_quarantined_tokens), 0, report.owned)
        self._feed(report.id, Met(look), self._loop.time())

    def look(self, now: float) -> None:
        """Called at each beat."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        self._tell_ends(now)
        engines = self._table.view.engines
        entries = self._count(engines, now)
        for engine in engines:
            self._feed(engine.id, self._seen(engine, entries.get(engine.id, 0)), now)
        for name in self._machines.keys() - {e.id for e in engines}:
            if name not in self._posting:
                self._forget(name)

    def stalled(self, lag_s: float) -> None:
        """The router itself stood still."""
        for name in list(self._machines):
            self._feed(name, Stalled(lag_s), self._loop.time())

    def _seen(self, engine: EngineView, entries: int) -> Event:
        if engine.state not in _IN_SERVICE or engine.facts.part:
            return Unseen()
        return Looked(engine.address.pid, engine.load.at_work, used_tokens(engine), entries, engine.owned)

    def _count(self, engines: Sequence[EngineView], now: float) -> dict[EngineId, int]:
        """How many requests of ours each engine has. Legs are counted already; only where they do not explain all, each is looked at."""
        legs = {e.id: self._entries.legs_of(e.slot) for e in engines}
        if any(e.load.at_work > legs[e.id] > 0 for e in engines):
            exact: Counter[EngineId] = Counter()
            for hold in self._entries.holds(now):
                exact[hold.engine] += hold.requests
            return {name: max(count, exact[name]) for name, count in legs.items()}
        return legs

    def _tell_ends(self, now: float) -> None:
        told, self._told_at = self._told_at, now
        for at, engines, rids in reversed(self._entries.unconfirmed):
            if at < told:
                break
            for name in engines:
                self._feed(name, Ended(tuple(rids)), now)

    def _tell(self, event: str, engine: EngineId, *, warn: bool = False, **facts: Any) -> None:
        host = next((e.host for e in self._table.view.engines if e.id == engine), HostId(""))
        self._table.tell(host, event, warn=warn, engine=engine, **facts)

    def _forget(self, name: EngineId) -> None:
        del self._machines[name]
        self._kept.pop(name, None)

    # --- what is done

    def _feed(self, name: EngineId, event: Event, now: float) -> list[str]:
        machine = self._machines.get(name)
        if machine is None:
            machine = self._machines[name] = Orphans(name)
        said = [self._do(command) for command in machine.handle(event, now=now)]
        return [sentence for sentence in said if sentence]

    def _do(self, command: Command) -> str:
        match command:
            case Found(engine=engine, requests=requests, tokens=tokens, for_s=for_s):
                self.actions["found"] += 1
                self._tell("orphans", engine, warn=True, requests=requests, tokens=tokens, age_s=round(for_s, 2))
                return ""
            case AbortRids(engine=engine, rids=rids):
                self.actions["abort_rids"] += 1
                self._spawn(self._abort_rids(engine, rids), f"abort rids on {engine}")
                return f"{len(rids)} requests that failed are aborted on {engine} by their ids"
            case AbortAll(engine=engine):
                return self._begin_abort_all(engine)
            case Restart(engine=engine, reason=reason):
                return self._restart(engine, reason)
            case Gone(engine=engine, requests=requests, for_s=for_s):
                self.actions["gone"] += 1
                self.reaped += requests
                self._kept.pop(engine, None)
                self._tell("orphans gone", engine, requests=requests, after_s=round(for_s, 2))
                return ""

    def _begin_abort_all(self, engine: EngineId) -> str:
        """The engine gets no work while it aborts all it has: a request that overtook the abort would end with the rest."""
        if engine in self._posting:
            return f"{engine} is being told to abort all it has"
        self._table.keep_out(engine, "it aborts work that nobody sent")
        self._posting.add(engine)
        self.actions["abort_all"] += 1
        self._spawn(self._abort_all(engine), f"abort all on {engine}")
        return f"everything on {engine} is aborted, for nothing there was sent by this router"

    async def _abort_all(self, engine: EngineId) -> None:
        try:
            await self._post(engine, {"rid": "", "abort_all": True}, if_idle=True)
        finally:
            self._posting.discard(engine)
            self._table.let_in(engine)

    async def _abort_rids(self, engine: EngineId, rids: Sequence[str]) -> None:
        for start in range(0, len(rids), RIDS_AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for rid in rids[start : start + RIDS_AT_ONCE]:
                    group.create_task(self._post(engine, {"rid": rid}), name=f"abort {rid}")

    async def _post(self, name: EngineId, body: dict[str, Any], *, if_idle: bool = False) -> None:
        engine = next((e for e in self._table.view.engines if e.id == name), None)
        if engine is None or (if_idle and self._entries.legs_of(engine.slot)):
            return  # it is gone, or somebody was quicker: the machine asks again
        try:
            async with asyncio.timeout(POST_LIMIT_S):
                await self._prober.post(engine.address, "/abort_request", body)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._tell("an abort was not answered", name, warn=True, why=type(error).__name__)

    def _restart(self, name: EngineId, reason: str) -> str:
        why = self._why_kept(name)
        if not why:
            try:
                self._table.restart(name, reason)
            except DisaggError as error:
                why = str(error)
        if why:
            self.actions["restart_refused"] += 1
            self._kept[name] = why
            self._tell("an engine that no abort helps is not started anew", name, warn=True, reason=reason, why=why)
            return f"{name} should be started anew, but {why}"
        self.actions["restart"] += 1
        self._kept.pop(name, None)
        return f"{name} drains and is started anew: {reason}"

    def _why_kept(self, name: EngineId) -> str:
        engines = self._table.view.engines
        engine = next((e for e in engines if e.id == name), None)
        return "it is gone" if engine is None else why_kept(engine, engines, self._table.changing())

    # --- what people look at

    def reap(self, engine: EngineId | None, now: float) -> list[str]:
        """Aborts what no entry explains now, without waiting; says what it did, one sentence each."""
        names = list(self._machines) if engine is None else [engine]
        return [sentence for name in names for sentence in self._feed(name, ReapAsked(), now)]

    def accounts(self, holds: Sequence[Hold]) -> list[Account]:
        """The KV pool of each engine."""
        now = self._loop.time()
        found = {name: orphan for name, m in self._machines.items() if (orphan := m.unexplained(now)) is not None}
        return accounts(self._table.view, holds, {name: self._noted(name, orphan) for name, orphan in found.items()})

    def _noted(self, name: EngineId, orphan: Unexplained) -> Unexplained:
        why = self._kept.get(name)
        note = f"{orphan.note}, but {why}" if why else orphan.note
        return Unexplained(orphan.requests, orphan.tokens, orphan.for_s, note)

    def __repr__(self) -> str:
        return f"<Reaper engines={len(self._machines)} reaped={self.reaped}>"


_IN_SERVICE = frozenset({EngineState.READY, EngineState.DRAINING, EngineState.QUARANTINED})
