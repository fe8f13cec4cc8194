"""What the router knows of its engines when it chooses: what they are promised, hold, take and are asked for. Pure.

Five accounts by slot that are always kept together: `InFlight` (legs), `Ledger` (promised tokens), `Forecast` (seconds), `PrefixHistory`
(prompts) and, by model, `Demand` (engine-seconds per second that are asked of each pool). Who admits requests writes into them, whoever
chooses, flips or explains reads them. A trace that is replayed in virtual time has the same ones.

What an engine holds is the history's guess. Where an engine publishes its cache (`PrefixIndex`), that counts for more, in three ways:

1. A prompt of token ids: the engine's own number takes the place of the guess. What it was sent a moment ago it has not told yet; that
   counts until it could have.
2. Any prompt: the engine holds no more than it says, so the history gives up for it what was used least recently. This is only so much
   evidence, as it says how much is held and not what.
3. A cache that was emptied is forgotten. One of which something was missed is not: it holds what it held, and only the guess is left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence

import msgspec

from disagg.model import Choice, EngineId, EngineView, Pool
from disagg.policy.ab import Comparison
from disagg.policy.balance import Demand
from disagg.policy.forecast import Forecast, Outlook, Reading
from disagg.policy.history import BLOCK, PrefixHistory
from disagg.policy.ledger import RESERVED_TOKENS, Ledger
from disagg.policy.prefix import Ids, PrefixIndex
from disagg.policy.reports import Contradictions
from disagg.policy.route import InFlight, choose

CACHE_TOKENS = 1 << 20
"""What an engine is taken to hold that does not say how much it has room for."""
LONGEST_TOKENS = 1 << 17
_HIT_SHARE = 0.02
ITL_SHARE = 0.85
"""Of the pause that was promised, what steps may take on average: they wander, and one that is too long is so for all in its batch."""
MODELS_LIMIT = 64
"""Of so many models the demand is kept; names that clients make up are none of them."""
SETTLE_S = 5.0
"""An engine holds less when it has said so for this long: what it has just read, it tells a moment after its promise has ended."""
TOLD_S = 2.0
"""Within this an engine that has read a prompt has told of it: its batch of events, the agent's word."""
UNTOLD_LIMIT = 256
"""Prompts of which engines have not told yet, the newest ones."""
ALIKE_LIMIT = 32
"""Of those with the same beginning, as a system prompt is, so many of the newest are compared; each takes some microseconds."""


class Slo(msgspec.Struct, frozen=True):
    """What was promised to clients.

    Attributes:
        ttft_s: until the first token, seconds.
        itl_s: between two tokens, seconds.
    """

    ttft_s: float = 10.0
    itl_s: float = 0.1


class Prompt(msgspec.Struct, frozen=True):
    """What a choice needs to know of a prompt.

    Attributes:
        tokens: an estimate.
        size: its bytes, of which the names are; 0 if unknown.
        names: of its blocks, see `disagg.policy.history`.
        ids: its tokens, where the client sent these.
    """

    tokens: int
    size: int = 0
    names: Sequence[int] = ()
    ids: Ids | None = None


class _Peak:
    """The most that was said within the last `SETTLE_S` to twice that."""

    __slots__ = ("_before", "_most", "_since")

    def __init__(self) -> None:
        self._before = self._most = 0
        self._since = float("-inf")

    def note(self, value: int, now: float) -> int:
        if now - self._since >= SETTLE_S:
            self._before = self._most if now - self._since < 2 * SETTLE_S else 0
            self._most, self._since = 0, now
        self._most = max(self._most, value)
        return max(self._before, self._most)


class _Untold(msgspec.Struct, frozen=True, eq=False):
    """A prompt that an engine reads, or of which it could not tell yet.

    Attributes:
        slot: of the engine.
        ids: the prompt.
        held: tokens of it that the engine said it held when the prompt was sent.
        until: when it must have told.
    """

    slot: int
    ids: Ids
    held: int
    until: float


class Books:
    """The accounts.

    Args:
        slo: what was promised to clients.
        window_s: over which demand is averaged.
        prefixes: what engines say of their prefix caches; None where nobody does.
        stall_s: see `disagg.policy.forecast.Forecast`.

    Attributes:
        hit_tokens: of all prompts with names so far, what the engines that were chosen held already, as far as that is known.
        prompt_tokens: of all of these prompts.
    """

    def __init__(
        self,
        slo: Slo | None = None,
        *,
        window_s: float = 120.0,
        prefixes: PrefixIndex | None = None,
        stall_s: float = math.inf,
    ) -> None:
        self.slo = slo or Slo()
        self.in_flight = InFlight()
        self.ledger = Ledger()
        self.forecast = Forecast(stall_s=stall_s)
        self.history = PrefixHistory()
        self.prefixes = PrefixIndex() if prefixes is None else prefixes
        self._slots: dict[EngineId, int] = {}  # of those that were heard of
        self._cleared: dict[int, int] = {}
        self._peaks: dict[int, _Peak] = {}
        self._untold: dict[bytes, list[_Untold]] = {}  # by how the prompts begin
        self._untold_order: deque[_Untold] = deque()
        self.contradictions = Contradictions()
        self._window_s = window_s
        self.comparison = Comparison(self.slo.ttft_s, self.slo.itl_s)
        self._demands: dict[str, Demand] = {}
        self._hit_share = 0.0
        self.hit_tokens = 0
        self.prompt_tokens = 0

    def grow(self, slots: int) -> None:
        """Makes room for engines up to this many slots."""
        self.in_flight.grow(slots)
        self.ledger.grow(slots)
        self.forecast.grow(slots)
        self.history.grow(slots)

    def restarted(self, slot: int, *, gone: bool = False) -> None:
        """The engine is another process or has another role: what it said and held before means nothing. `gone`: there will be no other."""
        self.ledger.forget(slot)
        self.forecast.forget(slot, gone=gone)
        self.history.forget(slot)
        self._forget_said(slot)

    def gone(self, slot: int) -> None:
        """The engine was removed. Slots are never used again."""
        self.restarted(slot, gone=True)
        self.contradictions.forget(slot)
        self._cleared.pop(slot, None)
        self._slots = {engine: at for engine, at in self._slots.items() if at != slot}

    def _forget_said(self, slot: int) -> None:
        self._peaks.pop(slot, None)
        gone = [one for one in self._untold_order if one.slot == slot]
        for one in gone:
            self._untold_order.remove(one)
            self._forget_untold(one)

    def emptied(self, engine: EngineView) -> None:
        """The engine's prefix cache holds nothing any more, but for what is being read: the newest of what it was sent."""
        self._forget_said(engine.slot)
        self._resize(engine, self.ledger.reserved(engine.slot))

    def holds(self, engine: EngineView, *, now: float) -> None:
        """How much of prompts this engine holds at most, by its load and by what it says of its prefix cache.

        SGLang's cache is full when it has worked for a while, with prompts and with answers; then this is what the engine has room for.
        """
        slot = engine.slot
        self._slots[engine.id] = slot
        cleared, room = self.prefixes.cleared(engine.id), engine.load.kv_total_tokens or CACHE_TOKENS
        if cleared > self._cleared.get(slot, 0):
            self.emptied(engine)
        self._cleared[slot] = cleared
        said = self.prefixes.tokens(engine.id)
        if said is None:
            self._peaks.pop(slot, None)
        else:
            room = min(room, self._peaks.setdefault(slot, _Peak()).note(said + self.ledger.reserved(slot), now))
        self._resize(engine, room)

    def _resize(self, engine: EngineView, tokens: int) -> None:
        self.history.resize(engine.slot, int(tokens * self.ledger.bytes_per_token(engine.facts.model) / BLOCK))

    # --- a choice

    def outlook(self, prompt: Prompt, *, now: float) -> Outlook:
        """What a request would meet on each engine."""
        cached, told = self.held(prompt, now=now)
        return Outlook(
            self.forecast,
            tokens=prompt.tokens,
            cached=cached,
            told=told,
            batches=self.in_flight.now,
            kv=self.ledger.promised,
            now=now,
        )

    def late_s(self, reader: int, outlook: Outlook, limit_s: float) -> float:
        """By how much a first token would come too late because of those before it, seconds; 0 if in time.

        What the prompt itself takes is its own affair: one that is alone is never too late. Nor is anything too late by a prediction that
        is not to be trusted.

        Args:
            reader: the slot of the engine that would read the prompt.
            outlook: of the request.
            limit_s: how long a first token may take.
        """
        if outlook.wait_s(reader) <= limit_s / 2 or self.forecast.doubt(reader):
            return 0.0
        return max(0.0, outlook.first_token_s(reader) + self.forecast.late_s(reader) - limit_s)

    def cached(self, prompt: Prompt) -> Mapping[int, int]:
        """How many tokens of a prompt each engine should hold by the history, by slot; engines that hold none are left out."""
        if not prompt.names:
            return {}
        each = prompt.tokens * BLOCK / max(prompt.size, len(prompt.names) * BLOCK)
        return {slot: int(blocks * each) for slot, blocks in self.history.leading(prompt.names).items()}

    def held(self, prompt: Prompt, *, now: float) -> tuple[Mapping[int, int], Collection[int]]:
        """How many tokens of a prompt each engine holds, as far as is known; and the slots of those that say so themselves."""
        found = self.cached(prompt)
        if prompt.ids is None:
            return found, ()
        return self._told(prompt.ids, found, self.prefixes.leading(prompt.ids), now)

    def _told(
        self, ids: Ids, guess: Mapping[int, int], leading: Mapping[EngineId, tuple[int, int]], now: float
    ) -> tuple[Mapping[int, int], Collection[int]]:
        found, told, coming = dict(guess), [], self._coming(ids, now)
        for engine, (said, block_size) in leading.items():
            slot = self._slots.get(engine)
            if slot is None:
                continue
            held = said
            if ids.kept < ids.count and said + block_size > ids.kept:
                held = max(said, guess.get(slot, 0))  # what is behind the ids that are kept is nobody's exact word
            before, shared = coming.get(slot, (0, 0))
            if said <= before and shared >= held + max(1, block_size):  # else it has told of it
                found[slot] = shared
            else:
                found[slot] = held
                told.append(slot)
        return found, told

    def _coming(self, ids: Ids, now: float) -> dict[int, tuple[int, int]]:
        """By slot: what the engine said it held, and what it will hold of a prompt by what it was sent and could not tell of yet."""
        most: dict[int, tuple[int, int]] = {}
        for one in self._untold.get(ids.head, [])[-ALIKE_LIMIT:]:
            if one.until > now:
                shared = one.ids.shared(ids)
                if shared > most.get(one.slot, (0, 0))[1]:
                    most[one.slot] = (one.held, shared)
        return most

    def _will_tell(self, one: _Untold, now: float) -> None:
        known, order = self._untold, self._untold_order
        known.setdefault(one.ids.head, []).append(one)
        order.append(one)
        while order[0].until <= now or len(order) > UNTOLD_LIMIT:
            self._forget_untold(order.popleft())

    def _forget_untold(self, one: _Untold) -> None:
        alike = self._untold[one.ids.head]
        alike.remove(one)
        if not alike:
            del self._untold[one.ids.head]

    def unified_up_to(self, pool: Pool, *, now: float) -> int | None:
        """The longest prompt, in tokens, that a unified engine serves better than a pair as things stand.

        None where one of both is missing. It follows from what both take, the link between the pair and what is under way, see
        `disagg.policy.route.choose`.
        """
        if not pool.unified or not pool.can_pair:
            return None

        def goes_alone(tokens: int) -> bool:
            return choose(pool, self.in_flight, outlook=self.outlook(Prompt(tokens), now=now)).prefill is None

        low, high = 0, LONGEST_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if goes_alone(middle) else (low, middle - 1)
        return low

    def sent(self, choice: Choice, prompt: Prompt, *, now: float) -> Reading:
        """A prompt goes to these engines; the one that reads it holds it from then on."""
        engine = choice.prefill or choice.decode
        reader = engine.slot
        held, said = self.cached(prompt), None
        if prompt.ids is not None:
            said = self.prefixes.leading(prompt.ids, engine.id)
            held = self._told(prompt.ids, held, said, now)[0]
        cached = min(held.get(reader, 0), max(0, prompt.tokens - 1))
        if prompt.names or prompt.ids is not None:
            if reader in self._peaks:
                self.holds(engine, now=now)  # it holds little and is to hold this: what it was promised changed since its last report
            self.history.sent(reader, prompt.names)
            self.hit_tokens += cached
            self.prompt_tokens += prompt.tokens
            self._hit_share += _HIT_SHARE * (cached / max(1, prompt.tokens) - self._hit_share)
        self.forecast.tried(choice.decode.slot, now=now)
        reading = self.forecast.sent(reader, prompt.tokens - cached, cached, now=now)
        if prompt.ids is not None and said:
            until = now + 2.0 * (reading.wait_s + reading.busy_s) + TOLD_S
            self._will_tell(_Untold(reader, prompt.ids, said[engine.id][0], until), now)
        return reading

    def worth_s(self, engine: EngineView, horizon_s: float) -> float:
        """Prefill seconds that an engine's cache saves within a horizon, at most what it took to fill it: what is lost when it goes."""
        forecast, slot = self.forecast, engine.slot
        held = self.history.blocks(slot) * BLOCK / self.ledger.bytes_per_token(engine.facts.model)
        token_s = forecast.pass_s(slot, 1000) / 1000
        return min(held * token_s * self._hit_share, horizon_s * self._hit_share)

    # --- demand

    def asked(self, model: str, prefill_s: float, decode: EngineView, *, now: float, writes: bool = True) -> None:
        """A request came that a pair serves.

        Args:
            model: that it is for; the name is one that is served, never a client's word.
            prefill_s: for how long it keeps a prefill engine busy.
            decode: an engine as it may write its answer.
            now: monotonic seconds.
            writes: its answer is asked for, too.
        """
        demand = self._demands.get(model)
        if demand is None:
            if len(self._demands) >= MODELS_LIMIT:
                return
            demand = self._demands[model] = Demand(self._window_s)
        demand.arrived(prefill_s, self.write_s(decode) if writes else 0.0, now=now)

    def write_s(self, decode: EngineView) -> float:
        """What an answer costs this engine when it is as busy as it may be, seconds."""
        total, most = decode.load.kv_total_tokens, decode.facts.max_running
        return self.forecast.write_s(decode.slot, limit_s=ITL_SHARE * self.slo.itl_s, kv_tokens=total, most=most)

    def writers_busy(self, decode: Sequence[EngineView]) -> float:
        """How many decode engines the answers need that are being written now.

        What came says how many are needed by the mean of the answers that have ended. When answers become longer, and the more so when
        engines are too slow for them already, the long ones end late: those that have not ended yet are seen here.
        """
        limit_s, needed = ITL_SHARE * self.slo.itl_s, 0.0
        for view in decode:
            total, most = view.load.kv_total_tokens, view.facts.max_running
            writing = self.forecast.writing(view.slot)
            needed += writing / self.forecast.best_batch(view.slot, limit_s=limit_s, kv_tokens=total, most=most)
        return needed

    def demand(self, model: str) -> Demand | None:
        """What is asked of the pools of a model; None where nobody asked."""
        return self._demands.get(model)

    def answered(self, tokens: int, prompt: int) -> None:
        """A stream ended well, with about so many tokens after a prompt of so many."""
        self.forecast.answered(tokens, prompt)

    # --- prices

    def price(
        self, model: str, body_bytes: int, max_tokens: int | None, answers: int, limit: int = 0, *, tokens: int = 0
    ) -> tuple[int, int]:
        """Tokens of a prefill and of a decode engine; `limit` is the longest context of one answer. See `Ledger.price`."""
        prompt, first = self.ledger.price(model, body_bytes, max_tokens, limit, tokens=tokens)
        more = answers - 1
        return prompt, first + more * min(RESERVED_TOKENS, max_tokens or RESERVED_TOKENS) if more else first

    @property
    def is_empty(self) -> bool:
        """Nobody is on the way."""
        return not any(self.in_flight.now) and not any(self.ledger.promised) and self.forecast.is_idle

    def check(self) -> None:
        """Asserts what is always true."""
        self.ledger.check()
        self.forecast.check()
        self.history.check()
        assert sum(map(len, self._untold.values())) == len(self._untold_order) <= UNTOLD_LIMIT
        assert all(self._untold.values())

    def __repr__(self) -> str:
        return f"<Books {self.ledger!r} {self.forecast!r} {self.history!r}>"
