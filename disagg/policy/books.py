"""What the router knows of its engines when it chooses: what they are promised, hold, take and are asked for. Pure.

Five accounts by slot that are always kept together: `InFlight` (legs), `Ledger` (promised tokens), `Forecast` (seconds), `PrefixHistory`
(prompts) and, by model, `Demand` (engine-seconds per second that are asked of each pool). Who admits requests writes into them, whoever
chooses, flips or explains reads them. A trace that is replayed in virtual time has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from disagg.model import Choice, EngineView, Pool
from disagg.policy.ab import Comparison
from disagg.policy.balance import Demand
from disagg.policy.forecast import Forecast, Outlook, Reading
from disagg.policy.history import BLOCK, PrefixHistory
from disagg.policy.ledger import RESERVED_TOKENS, Ledger
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
    """

    tokens: int
    size: int = 0
    names: Sequence[int] = ()


class Books:
    """The accounts.

    Args:
        slo: what was promised to clients.
        window_s: over which demand is averaged.
        stall_s: see `disagg.policy.forecast.Forecast`.

    Attributes:
        hit_tokens: of all prompts with names so far, what the engines that were chosen held already, as far as that is known.
        prompt_tokens: of all of these prompts.
    """

    def __init__(self, slo: Slo | None = None, *, window_s: float = 120.0, stall_s: float = math.inf) -> None:
        self.slo = slo or Slo()
        self.in_flight = InFlight()
        self.ledger = Ledger()
        self.forecast = Forecast(stall_s=stall_s)
        self.history = PrefixHistory()
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

    def restarted(self, slot: int) -> None:
        """The engine is another process or has another role: what it said, held and took before means nothing."""
        self.ledger.forget(slot)
        self.forecast.forget(slot)
        self.history.forget(slot)

    def emptied(self, slot: int) -> None:
        """The engine's prefix cache holds nothing any more."""
        self.history.forget(slot)

    def holds(self, engine: EngineView, tokens: int | None = None) -> None:
        """How much of prompts this engine holds at most.

        Args:
            engine: with its load.
            tokens: what its prefix cache holds, if it says so; what was promised since comes on top.
        """
        room = engine.load.kv_total_tokens or CACHE_TOKENS
        if tokens is not None:
            room = min(room, tokens + self.ledger.reserved(engine.slot))
        self.history.resize(engine.slot, int(room * self.ledger.bytes_per_token(engine.facts.model) / BLOCK))

    # --- a choice

    def outlook(self, prompt: Prompt, *, now: float) -> Outlook:
        """What a request would meet on each engine."""
        return Outlook(
            self.forecast,
            tokens=prompt.tokens,
            cached=self.cached(prompt),
            batches=self.in_flight.now,
            kv=self.ledger.promised,
            now=now,
        )

    def cached(self, prompt: Prompt) -> Mapping[int, int]:
        """How many tokens of a prompt each engine holds, by slot; engines that hold none are left out."""
        if not prompt.names:
            return {}
        each = prompt.tokens * BLOCK / max(prompt.size, len(prompt.names) * BLOCK)
        return {slot: int(blocks * each) for slot, blocks in self.history.leading(prompt.names).items()}

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
        reader = (choice.prefill or choice.decode).slot
        cached = min(self.cached(prompt).get(reader, 0), max(0, prompt.tokens - 1))
        if prompt.names:
            self.history.sent(reader, prompt.names)
            self.hit_tokens += cached
            self.prompt_tokens += prompt.tokens
            self._hit_share += _HIT_SHARE * (cached / max(1, prompt.tokens) - self._hit_share)
        return self.forecast.sent(reader, prompt.tokens - cached, cached, now=now)

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

    def price(self, model: str, body_bytes: int, max_tokens: int | None, answers: int, limit: int = 0) -> tuple[int, int]:
        """Tokens of a prefill and of a decode engine; `limit` is the longest context of one answer. See `Ledger.price`."""
        prompt, first = self.ledger.price(model, body_bytes, max_tokens, limit)
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

    def __repr__(self) -> str:
        return f"<Books {self.ledger!r} {self.forecast!r} {self.history!r}>"
