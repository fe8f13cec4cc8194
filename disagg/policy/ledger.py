"""What each engine's KV memory is promised to, in tokens, and what a request will need of it. Pure.

Theory of operation. A request is sent to an engine only when the ledger has room for it, so that no engine ever has to make one wait with a
peer at its side. The router knows what it promised the moment it promises it; the engine says some hundred milliseconds later what is used.
So the promises are the account, and the reports only correct it: *drift* is what an engine uses beyond its promises (answers longer than
was reserved, prompts longer than estimated, requests of somebody else, orphans).

A report was true when it was taken, which may be one or two reports ago. What was promised then may have ended since, so a report is held
against the most that was promised since the report before the last: a drift is never invented by work that has ended meanwhile. Work that
began meanwhile makes the drift too small for a moment, which the smoothing evens out.
"""

from __future__ import annotations

from collections.abc import Sequence

from disagg.model import EngineLoad, EngineView, Role

RESERVED_TOKENS = 512
"""What is kept for an answer: SGLang's ``--num-reserved-decode-tokens``. A longer one is seen in the reports while it grows."""
BYTES_PER_TOKEN = 3.0
"""Before a model has answered anything: less than usual, so that the first requests are not sent in too large a number."""
TEMPLATE_TOKENS = 16
"""What a chat template adds."""

_DRIFT_WEIGHT = 0.5
_LEARN_WEIGHT = 0.05
_FEWEST_BYTES, _MOST_BYTES = 0.5, 16.0  # of a token; beyond it is no text: token ids with spaces around them, or a picture


class Ledger:
    """Promised tokens by an engine's slot, in flat lists, and how many bytes a token has, by model."""

    __slots__ = ("_bytes_per_token", "_drift", "_peak", "_peak_before", "_reserved")

    def __init__(self) -> None:
        self._reserved: list[int] = []
        self._peak: list[int] = []
        self._peak_before: list[int] = []
        self._drift: list[float] = []
        self._bytes_per_token: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Ledger {len(self._reserved)} engines, {sum(self._reserved)} tokens reserved, drift {round(sum(self._drift))}>"

    def check(self) -> None:
        """Asserts what always holds."""
        assert len(self._reserved) == len(self._peak) == len(self._peak_before) == len(self._drift)
        for reserved, peak in zip(self._reserved, self._peak, strict=True):
            assert 0 <= reserved <= peak
        assert all(_FEWEST_BYTES <= found <= _MOST_BYTES for found in self._bytes_per_token.values())

    # --- promises

    def grow(self, slots: int) -> None:
        """Makes room for engines up to this many slots."""
        missing = slots - len(self._reserved)
        if missing > 0:
            self._reserved += [0] * missing
            self._peak += [0] * missing
            self._peak_before += [0] * missing
            self._drift += [0.0] * missing

    def reserve(self, slot: int, tokens: int) -> None:
        """Promises tokens of the engine in this slot; there need not be room."""
        assert tokens >= 0, f"{tokens} tokens cannot be reserved"
        reserved = self._reserved[slot] + tokens
        self._reserved[slot] = reserved
        self._peak[slot] = max(self._peak[slot], reserved)

    def release(self, slot: int, tokens: int) -> None:
        """Takes back what was promised: the very number, once, also when the engine has died."""
        assert 0 <= tokens <= self._reserved[slot], (
            f"{tokens} tokens are released in slot {slot}, where {self._reserved[slot]} are reserved"
        )
        self._reserved[slot] -= tokens

    @property
    def promised(self) -> Sequence[int]:
        """The tokens that this router has promised of each engine, by slot."""
        return self._reserved

    def reserved(self, slot: int) -> int:
        """The tokens that this router has promised."""
        return self._reserved[slot]

    # --- reports

    def note_report(self, slot: int, load: EngineLoad) -> int:
        """Takes in what an engine says of itself. Call it once for each report, not for each view.

        Quarantined tokens are no drift: `room` takes them off the capacity. An engine that does not say its capacity has no drift.

        Returns:
            The drift, tokens, negative when less is used than was promised.
        """
        if load.kv_total_tokens <= 0:
            self._drift[slot] = 0.0
        else:
            most = max(self._peak[slot], self._peak_before[slot])
            found = load.kv_used_tokens - load.kv_quarantined_tokens - most
            self._drift[slot] += _DRIFT_WEIGHT * (found - self._drift[slot])
        self._peak_before[slot], self._peak[slot] = self._peak[slot], self._reserved[slot]
        return self.drift(slot)

    def drift(self, slot: int) -> int:
        """What the engine uses beyond what was promised, smoothed, tokens; negative when it uses less."""
        return round(self._drift[slot])

    def forget(self, slot: int) -> None:
        """The engine in this slot was started anew: what it said before means nothing. Promises stay until they are released."""
        self._drift[slot] = 0.0
        self._peak[slot] = self._peak_before[slot] = self._reserved[slot]

    # --- room

    def room(self, engine: EngineView, tokens: int, legs_now: int) -> bool:
        """Whether an engine can take a request now.

        Unknown limits are no limits. What no engine could ever hold is let through to one that does nothing else for us: its own answer
        says best what is wrong. For a prefill engine the tokens are those of the prompt, and the number of requests is no limit.

        Args:
            engine: with its facts and its load.
            tokens: what the request needs of this engine.
            legs_now: the requests of this router that it works on.
        """
        most = engine.facts.max_running
        if most and legs_now >= most and engine.address.role is not Role.PREFILL:
            return False
        total = engine.load.kv_total_tokens
        if total <= 0:
            return True
        capacity = total - engine.load.kv_quarantined_tokens
        reserved = self._reserved[engine.slot]
        if tokens > total and not reserved:
            return True
        return reserved + max(0.0, self._drift[engine.slot]) + tokens <= capacity

    # --- prices

    def bytes_per_token(self, model: str) -> float:
        """How many bytes of a body a token takes."""
        return self._bytes_per_token.get(model, BYTES_PER_TOKEN)

    def prompt_tokens(self, model: str, prompt_bytes: int, limit: int = 0) -> int:
        """How many tokens a prompt has, estimated from the bytes that hold it: what a prefill engine needs.

        Args:
            model: the served name.
            prompt_bytes: of the request's body, or of its messages.
            limit: the longest context that the engine takes, 0 if unknown: pictures have many bytes and few tokens.
        """
        tokens = int(prompt_bytes / self._bytes_per_token.get(model, BYTES_PER_TOKEN)) + TEMPLATE_TOKENS
        return min(tokens, limit) if limit > 0 else tokens

    def price(self, model: str, prompt_bytes: int, max_tokens: int | None, limit: int = 0, *, tokens: int = 0) -> tuple[int, int]:
        """What a prefill engine and a decode or unified engine need for a request, tokens.

        Args:
            model: the served name.
            prompt_bytes: as for `prompt_tokens`.
            max_tokens: how long the answer may become; None if the client leaves it open.
            limit: as for `prompt_tokens`; it is the limit of prompt and answer together.
            tokens: of the prompt, where they are known and need not be estimated; 0 where they are not.

        Returns:
            The prompt, and the prompt with `RESERVED_TOKENS` or less for the answer.
        """
        answer = RESERVED_TOKENS if max_tokens is None or max_tokens > RESERVED_TOKENS else max(0, max_tokens)
        prompt = tokens or self.prompt_tokens(model, prompt_bytes)
        if 0 < limit < prompt + answer:
            return min(prompt, limit), limit
        return prompt, prompt + answer

    def learn(self, model: str, prompt_bytes: int, prompt_tokens: int) -> None:
        """An answer's usage said how many tokens a prompt had. The model is one that is served, never a client's word."""
        if prompt_bytes <= 0 or prompt_tokens <= 0:
            return
        found = min(max(prompt_bytes / prompt_tokens, _FEWEST_BYTES), _MOST_BYTES)
        known = self._bytes_per_token.get(model)
        self._bytes_per_token[model] = found if known is None else known + _LEARN_WEIGHT * (found - known)
