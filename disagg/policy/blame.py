"""Who kills engines: the ledger of requests that were in flight when a process died. Pure.

Theory of operation. A request that makes an engine crash would, replayed, make the next one crash. From outside all requests that were in
flight look the same, so each gets a *strike*, and a request with a strike is a *suspect*: it is replayed where no other suspect is
unproven, so that a second death tells which one it was. Two strikes: the request is blocked, wherever it comes from. Strikes are in
sequence: of copies of a request that were under way together none is struck for what killed another, so that two engines that die at once
condemn nobody. A suspect that got further than where it was when its engine died, or ended, is *proved*: it was innocent, and has no
strike any more. So it is after `STRIKE_KEPT_S`, blocked or not.

Most deaths are nobody's fault, and where hundreds of streams lost their engine, one after the other would take minutes. So who had run
well for a while when its engine died is a *mild* suspect: mild ones share an engine, one at first and one more for each suspect that was
proved since the last death, so that their number doubles from round to round. A mild one that was in company when its engine died gets no
second strike for it, but is tried alone from then on. So poison that acts soon costs two engines, and poison that acts late three at most;
what acts only after it was proved is never found out.

Of an answer that is no stream nothing is seen until it ends. It has its engine to itself for a moment only (`SOLO_S`), and is proved when
it has run for longer than it had when its engine died (`solitude`). In between it is *free*: others may come, and if the engine dies then,
it had company, gets no strike, and is tried alone for all of that time.

A request that is new may be poison as well. So that a suspect is not condemned for what a newcomer did, the two keep away from each other
while a patient caller waits for that (`patient`); an impatient one keeps suspects from one another only, which is never given up.

Requests are known by a 64-bit fingerprint of their body, keyed by the router, so that nobody can make two of them meet. Only the death of
a process counts: its exit was reported, or it refused connections after it had served. Not an engine that is not heard, hangs, or
switches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from math import inf
from typing import TypeVar

from disagg.model import EngineId

_K = TypeVar("_K")
_V = TypeVar("_V")

STRIKES = 2
STRIKE_KEPT_S = 600.0
"""The same for all strikes, so that the oldest entries are the first to go."""
KEPT = 10_000
WELL_TOKENS = 16
WELL_S = 5.0
"""Who had given so many tokens, or had run for so long, had run well."""
MARGIN = 3
"""Tokens that an engine may have made without the router having seen them when it died."""
SOLO_S = 0.5
"""For how long a suspect of which no tokens are seen keeps other suspects away, and newcomers as long as these are patient."""
SOLO_LIMIT_S = 30.0
"""The same for one that was not alone when a second engine died: what kills later than this is never found out."""
MARGIN_TIMES = 1.25
"""An engine may be slower the second time."""
HISTORY_LIMIT = 64


class _Entry:
    """What a fingerprint did."""

    __slots__ = ("alone", "is_mild", "past", "past_s", "strikes", "struck_at")

    def __init__(self) -> None:
        self.strikes = 0
        self.struck_at = 0.0
        self.past = 0
        self.past_s = 0.0
        self.is_mild = False
        self.alone = False  # it may not be freed before it is proved

    def is_over(self, now: float) -> bool:
        return now - self.struck_at >= STRIKE_KEPT_S


class Ledger:
    """The ledger. Times are seconds on the caller's monotonic clock.

    Args:
        strikes: so many deaths of engines block a request.
        kept: so many fingerprints with strikes are remembered, the latest ones.

    Attributes:
        history: what happened, oldest first: time and sentence.
    """

    def __init__(self, *, strikes: int = STRIKES, kept: int = KEPT) -> None:
        self._limit = strikes
        self._kept = kept
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._unproved: dict[EngineId, dict[int, int]] = {}
        self._tried: dict[EngineId, set[int]] = {}  # of these, the suspects: newcomers look at this only, and it is usually empty
        self._trials: dict[int, set[EngineId]] = {}  # where suspects were sent to, by fingerprint: not where a copy was under way already
        self._company: set[tuple[EngineId, int]] = set()  # where suspects were tried beside others
        self._free: set[tuple[EngineId, int]] = set()  # where suspects run that have had their time alone
        self._proved = 0  # suspects, since the last death
        self.history: list[tuple[float, str]] = []

    @property
    def is_calm(self) -> bool:
        """True while nobody is suspect: then everything is open to everybody."""
        return not self._entries

    # --- what happens

    def sent(self, fingerprint: int, engines: Iterable[EngineId]) -> None:
        """A request was sent to these engines. To be followed by exactly one `proved` or `ended` with the same engines, a death or not."""
        for engine in engines:
            running = self._unproved.get(engine)
            if running is None:
                running = self._unproved[engine] = {}
            running[fingerprint] = running.get(fingerprint, 0) + 1
            if fingerprint in self._entries:
                tried = self._tried.setdefault(engine, set())
                tried.add(fingerprint)
                self._trials.setdefault(fingerprint, set()).add(engine)
                if len(tried) > 1:
                    self._company |= {(engine, each) for each in tried}

    def ended(self, fingerprint: int, engines: Iterable[EngineId]) -> None:
        """It runs there no longer, and that proves nothing: it was aborted, or failed."""
        for engine in engines:
            running = self._unproved[engine]
            left = running[fingerprint] - 1
            if left:
                running[fingerprint] = left
                continue
            del running[fingerprint]
            self._leave(engine, fingerprint)

    def _leave(self, engine: EngineId, fingerprint: int) -> None:
        """It is on trial there no longer."""
        self._company.discard((engine, fingerprint))
        self._free.discard((engine, fingerprint))
        _discard(self._tried, engine, fingerprint)
        _discard(self._trials, fingerprint, engine)

    def freed(self, fingerprint: int, engines: Iterable[EngineId]) -> None:
        """It has had its engines to itself for long enough: others may come. `proved` or `ended` is still to follow."""
        if fingerprint not in self._entries:
            return
        for engine in engines:
            self._leave(engine, fingerprint)
            self._free.add((engine, fingerprint))
        self._proved += 1

    def proved(self, fingerprint: int, engines: Iterable[EngineId]) -> None:
        """It got further than `past` says, or came to its end; `ended` is not needed then."""
        was_free = any((engine, fingerprint) in self._free for engine in engines)
        self.ended(fingerprint, engines)
        entry = self._entries.get(fingerprint)
        if entry is not None and entry.strikes < self._limit:
            del self._entries[fingerprint]
            self._proved += not was_free
            for engine in [engine for engine, tried in self._tried.items() if fingerprint in tried]:
                self._leave(engine, fingerprint)  # copies of it that run are on trial no longer

    def died(self, engine: EngineId, in_flight: Mapping[int, int], now: float, *, sent_at: float = inf) -> list[int]:
        """A process died.

        Args:
            engine: whose.
            in_flight: the requests that ran there, by fingerprint, with the tokens that each had been seen to give, 0 before the first.
                Those that were proved since count like those that were not: they may have crashed it further on.
            now: when.
            sent_at: when they were sent there. Who was sent before its last strike was known is not struck again: that an engine died
                under several copies of a request, or both engines of one attempt did, says no more than that one died under one.

        Returns:
            The fingerprints that are blocked by that.
        """
        suspects = sum(self.is_suspect(fingerprint, now) for fingerprint in in_flight)
        blocked = [fingerprint for fingerprint, tokens in in_flight.items() if self._strike(engine, fingerprint, tokens, now, sent_at)]
        for place, running in self._unproved.items():
            if copies := in_flight.keys() & running.keys():
                self._tried.setdefault(place, set()).update(copies)
        sentence = f"{engine} died with {len(in_flight)} requests in flight, {suspects} of them suspects; {len(blocked)} blocked"
        self.history.append((now, sentence))
        del self.history[:-HISTORY_LIMIT]
        return blocked

    def _strike(self, engine: EngineId, fingerprint: int, tokens: int, now: float, sent_at: float) -> bool:
        entry = self._entries.get(fingerprint)
        if entry is None or entry.is_over(now):
            entry = self._entries[fingerprint] = _Entry()
        if not entry.strikes or sent_at >= entry.struck_at:
            is_first, had_company = not entry.strikes, self._had_company(engine, fingerprint)
            if is_first or not had_company:
                entry.strikes = min(entry.strikes + 1, self._limit)
            entry.is_mild = is_first and (tokens >= WELL_TOKENS or now - sent_at >= WELL_S)
            entry.struck_at = now
            self._proved = 0
            entry.alone = not is_first and had_company
            entry.past = tokens + MARGIN if tokens else 0
            entry.past_s = max(0.0, now - sent_at) * MARGIN_TIMES + SOLO_S
            self._entries.move_to_end(fingerprint)
            if len(self._entries) > self._kept:
                self._entries.popitem(last=False)
        return entry.strikes >= self._limit

    def _had_company(self, engine: EngineId, fingerprint: int) -> bool:
        """Other suspects ran there, or anybody may have come since it was freed."""
        return (engine, fingerprint) in self._company or any(place == engine for place, _ in self._free)

    # --- what follows

    def blocked(self, fingerprint: int, now: float) -> float:
        """For how many seconds more this request is refused; 0 when it is not."""
        self._prune(now)
        entry = self._entries.get(fingerprint)
        if entry is None or entry.strikes < self._limit:
            return 0.0
        return max(0.0, entry.struck_at + STRIKE_KEPT_S - now)

    def _prune(self, now: float) -> None:
        while self._entries and next(iter(self._entries.values())).is_over(now):
            self._entries.popitem(last=False)

    def is_suspect(self, fingerprint: int, now: float) -> bool:
        """It was in flight when an engine died, and has proved nothing since."""
        return self._strikes(fingerprint, now) > 0

    def past(self, fingerprint: int) -> int:
        """How many tokens it must give to be proved: more than these. 0 for its first."""
        entry = self._entries.get(fingerprint)
        return 0 if entry is None else entry.past

    def solitude(self, fingerprint: int) -> tuple[float, float]:
        """Of a suspect of which no tokens are seen: seconds until it is to be freed, and until it is to be proved, not before."""
        entry = self._entries.get(fingerprint)
        if entry is None:
            return 0.0, 0.0
        alone_s = min(entry.past_s, SOLO_LIMIT_S)
        return (alone_s, alone_s) if entry.alone else (SOLO_S, entry.past_s)

    def shut(self, fingerprint: int, now: float, *, patient: bool = True) -> tuple[EngineId, ...] | None:
        """The engines that are closed to it: what is not to be chosen. Usually none, and then this costs nothing.

        None: every one, for another copy of this very request is being tried, and what becomes of that says what this one is. One that was
        under way already says nothing: its death would be no strike.
        """
        if not self._entries:
            return ()
        is_suspect = self.is_suspect(fingerprint, now)
        if is_suspect and fingerprint in self._trials:
            return None
        places = self._unproved if is_suspect else self._tried
        return tuple(engine for engine in places if self._shuts(fingerprint, engine, now, patient=patient))

    def _shuts(self, fingerprint: int, engine: EngineId, now: float, *, patient: bool) -> bool:
        tried = self._tried.get(engine, set()) - {fingerprint}
        if not self.is_suspect(fingerprint, now):
            return patient and bool(tried)
        if tried:
            return len(tried) > self._proved or not all(self._is_mild(each) for each in (fingerprint, *tried))
        return patient and any(other != fingerprint for other in self._unproved.get(engine, ()))

    def _is_mild(self, fingerprint: int) -> bool:
        entry = self._entries.get(fingerprint)
        return entry is None or entry.is_mild  # None: another copy of it was proved

    def _strikes(self, fingerprint: int, now: float) -> int:
        entry = self._entries.get(fingerprint)
        return 0 if entry is None or entry.is_over(now) else entry.strikes

    def check(self) -> None:
        """Asserts what is always true."""
        assert len(self._entries) <= self._kept
        assert all(0 < entry.strikes <= self._limit for entry in self._entries.values())
        assert all(all(count > 0 for count in running.values()) for running in self._unproved.values())
        assert all(tried and tried <= self._unproved[engine].keys() for engine, tried in self._tried.items())
        assert all(fingerprint in self._tried.get(engine, ()) for engine, fingerprint in self._company)
        assert all(fingerprint in self._unproved.get(engine, ()) for engine, fingerprint in self._free)
        assert all(fp in self._tried.get(engine, ()) for fp, engines in self._trials.items() for engine in engines)
        assert all(self._trials.values())

    def __repr__(self) -> str:
        blocked = sum(entry.strikes >= self._limit for entry in self._entries.values())
        return f"<Ledger suspects={len(self._entries) - blocked} blocked={blocked} unproved={sum(map(len, self._unproved.values()))}>"


def _discard(sets: dict[_K, set[_V]], key: _K, value: _V) -> None:
    """An empty set goes, too."""
    members = sets.get(key)
    if members is not None:
        members.discard(value)
        if not members:
            del sets[key]
