"""Whether what an engine says of its load can be true. Pure.

Theory of operation. A report may be wrong as a whole: an engine that counts below 0, an agent of another release, garbage. Room, ratios
and the cache that an engine is taken to have all follow from it, so what cannot be is cut to what can. How much KV an engine has does not
change while its process lives: another figure is believed when it has been said twice in a row, and until then the one before. A report
may also be right in itself and contradict what the router has there: that is only told, for either of both may be late.
"""

from __future__ import annotations

import msgspec

from disagg.model import EngineLoad

KV_LIMIT = 1 << 40
"""Tokens that no engine has."""
REQUESTS_LIMIT = 1 << 20
SILENT_S = 5.0
"""An engine that writes our answers for so long and says all the time that it does nothing is wrong about that."""


def possible(load: EngineLoad) -> tuple[EngineLoad, str]:
    """The load that comes next to what was said and can be, and what was impossible; empty for a good report."""
    total, used, kept = load.kv_total_tokens, load.kv_used_tokens, load.kv_quarantined_tokens
    if not 0 <= total < KV_LIMIT:
        return _cut(load, 0), f"a KV capacity of {total} tokens"
    if used < 0 or kept < 0 or min(load.running, load.waiting, load.requests) < 0:
        return _cut(load, total), "counts below 0"
    if max(load.running, load.waiting, load.requests) > REQUESTS_LIMIT:
        return _cut(load, total), f"more than {REQUESTS_LIMIT} requests"
    if total and used > total:
        return _cut(load, total), f"{used} used tokens of {total}"
    if kept > used:
        return _cut(load, total), f"{kept} quarantined tokens of {used} used ones"
    return load, ""


def _cut(load: EngineLoad, total: int) -> EngineLoad:
    """Of one figure that cannot be nothing is believed of the use: what was promised is known without it."""
    running, waiting, requests = (min(max(0, n), REQUESTS_LIMIT) for n in (load.running, load.waiting, load.requests))
    moved = max(0, load.kv_transfer_bytes)
    return EngineLoad(running, waiting, 0, total, moved, 0, requests)


class Reports:
    """Those of one process."""

    __slots__ = ("_believed", "_said", "doubt")

    def __init__(self) -> None:
        self._believed = 0  # unknown
        self._said: int | None = None
        self.doubt = ""

    def take(self, load: EngineLoad) -> EngineLoad:
        """The load to go by; `doubt` says in a sentence what is not believed of it, empty for a good report."""
        load, wrong = possible(load)
        total = load.kv_total_tokens
        if not self._believed or total == self._said:
            self._believed = total
        self._said = total
        self.doubt = f"its load reports are not believed: they tell of {wrong}" if wrong else ""
        if total == self._believed:
            return load
        self.doubt = self.doubt or f"its load reports are not believed: its KV capacity of {self._believed} tokens changes"
        used = min(load.kv_used_tokens, self._believed) if self._believed else load.kv_used_tokens
        kept = min(load.kv_quarantined_tokens, used)
        return msgspec.structs.replace(load, kv_total_tokens=self._believed, kv_used_tokens=used, kv_quarantined_tokens=kept)


class Contradictions:
    """What engines say that they do, against what the router sees them do, by slot."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def look(self, slot: int, load: EngineLoad, writing: int, *, now: float) -> None:
        """Called a few times a second. `writing`: answers of ours of which tokens come."""
        if writing and not load.at_work and not load.kv_used_tokens:
            self._since.setdefault(slot, now)
        else:
            self._since.pop(slot, None)

    def forget(self, slot: int) -> None:
        """The engine is gone."""
        self._since.pop(slot, None)

    def doubt(self, slot: int, *, now: float) -> str:
        """One sentence; empty where nothing contradicts."""
        since = self._since.get(slot)
        if since is None or now - since < SILENT_S:
            return ""
        return "its load reports contradict what was sent there: it writes answers and says that it has nothing to do"
