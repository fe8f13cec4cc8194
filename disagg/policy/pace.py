"""How fast the engines are, as the router sees it, and how long an attempt may take by that. Pure.

Theory of operation. Three things are measured of each engine, in flat lists by its slot: the time between two tokens of a decode (or
unified) engine, the time that a prefill (or unified) engine takes for a byte of prompts, and the bytes of prompts that it has not read
yet. The clock of a first token runs from the moment at which the legs were sent to decode's first byte, so it holds the handover too:
there is no number for the transfer alone. An engine reads the prompts it has one after the other or all at once; either way a prompt is
through when those before it are. So a first token is measured over its *work*: the bytes that were waiting when the prompt came, and its
own.

A limit is three times what is to be expected, ten times for the pause between two tokens; at least `FLOOR_S`, at most what is configured.
It is what is configured where fewer than `ENOUGH` samples are known, and for a prompt that is larger than those seen lately by far. It is
never less than the longest wait of the last some hundred samples: an engine that has answered most prompts out of its cache must not be
given up over one that it has to read. When limits were too short all the same, nothing that ends in time is left to learn that from:
`timed_out` doubles the limits of that engine until it is in time again. And who waits behind an engine that is seen to be at work waits for
longer, see `Pace.reads_until`.
"""

from __future__ import annotations

from itertools import accumulate
from math import inf

from disagg.handoff import Limits

FLOOR_S = 5.0
TIMES_FIRST_TOKEN = 3.0
TIMES_TOKEN = 10.0
ENOUGH = 5
PATIENCE_MAX = 16.0
TOGETHER_S = 0.5
"""Prompts that are handed over within this time came out of one pass, or of passes too short to be waited for."""
GAPS_WINDOW = 2048
"""Tokens: the longest pause of the last one to two windows is known."""
READS_WINDOW = 256
"""First tokens, in the same way."""
_TOKEN_SHARE = 1 / 64
_READ_SHARE = 1 / 16
_CLASSES = 16


class Pace:
    """What was measured. A slot that was never grown is unknown, and nothing may be told of it.

    Args:
        caps: what is configured; no limit is longer.
        whole_answer_s: what is configured for answers that are no streams.
    """

    __slots__ = (
        "_bytes",
        "_caps",
        "_gaps",
        "_gaps_seen",
        "_handed_at",
        "_handed_before",
        "_handed_queue",
        "_largest",
        "_longest",
        "_old_gaps",
        "_old_peaks",
        "_patience",
        "_peaks",
        "_queued",
        "_reads",
        "_seconds",
        "_step",
        "_steps",
        "_whole_s",
    )

    def __init__(self, caps: Limits, whole_answer_s: float) -> None:
        self._caps = caps
        self._whole_s = whole_answer_s
        self._step: list[float] = []  # seconds per token, a moving average
        self._steps: list[int] = []
        self._gaps: list[float] = []  # the longest pause of this window and of the one before
        self._old_gaps: list[float] = []
        self._gaps_seen: list[int] = []
        self._seconds: list[float] = []  # of a first token, and the bytes that were read in that time: moving averages
        self._bytes: list[float] = []
        self._reads: list[int] = []
        self._peaks: list[list[float]] = []  # the longest first tokens by size of the work, of this window and of the one before
        self._old_peaks: list[list[float]] = []
        self._longest: list[list[float]] = []  # of both windows: the longest one of this size or smaller
        self._largest: list[int] = []  # the largest size in both windows; -1 for none
        self._queued: list[int] = []
        self._handed_at: list[float] = []  # when a pass of it began to end, the last one and the one before
        self._handed_before: list[float] = []
        self._handed_queue: list[int] = []  # bytes that it had still to read after the last one
        self._patience: list[float] = []

    def grow(self, slots: int) -> None:
        """Makes room for engines up to this many slots."""
        for _ in range(slots - len(self._step)):
            for floats in (self._step, self._gaps, self._old_gaps, self._seconds, self._bytes):
                floats.append(0.0)
            for counts in (self._steps, self._gaps_seen, self._reads, self._queued, self._handed_queue):
                counts.append(0)
            self._handed_at.append(-inf)
            self._handed_before.append(-inf)
            self._peaks.append([0.0] * _CLASSES)
            self._old_peaks.append([0.0] * _CLASSES)
            self._longest.append([0.0] * _CLASSES)
            self._largest.append(-1)
            self._patience.append(1.0)

    def forget(self, slot: int) -> None:
        """The engine is another process or has another role. What is in flight there is counted on, until it ends."""
        if slot >= len(self._step):
            return
        for floats in (self._step, self._gaps, self._old_gaps, self._seconds, self._bytes):
            floats[slot] = 0.0
        for counts in (self._steps, self._gaps_seen, self._reads):
            counts[slot] = 0
        self._peaks[slot] = [0.0] * _CLASSES
        self._old_peaks[slot] = [0.0] * _CLASSES
        self._sum_up(slot)
        self._patience[slot] = 1.0
        self._handed_at[slot] = self._handed_before[slot] = -inf

    # --- what happens

    def sent(self, reader: int, prompt_bytes: int) -> int:
        """The legs were sent.

        Args:
            reader: the slot of who reads the prompt: the prefill engine, or the unified one.
            prompt_bytes: of the request's body.

        Returns:
            The work: the bytes that it has to read until this prompt is through. `first_token` wants it.
        """
        self._queued[reader] += prompt_bytes
        return self._queued[reader]

    def left(self, reader: int, prompt_bytes: int) -> None:
        """The prompt is read, or nobody waits for that any more. Called exactly once for each `sent`."""
        self._queued[reader] -= prompt_bytes

    def handed_over(self, reader: int, *, now: float) -> None:
        """The engine is through with a prompt: it is at work, and begins with others. To be said after `left`."""
        if now - self._handed_at[reader] > TOGETHER_S:  # else it is one more of the same pass
            self._handed_before[reader], self._handed_at[reader] = self._handed_at[reader], now
        self._handed_queue[reader] = self._queued[reader]

    def first_token(self, prefill: int | None, decode: int, work_bytes: int, seconds: float) -> None:
        """The first token came, so long after the legs were sent.

        Args:
            prefill: its slot; None where a unified engine did both.
            decode: its slot.
            work_bytes: as `sent` returned it.
            seconds: since the legs were sent.
        """
        self._patience[decode] = 1.0
        slot = decode if prefill is None else prefill
        self._patience[slot] = 1.0
        known = self._reads[slot]
        share = max(_READ_SHARE, 1 / (known + 1))
        self._seconds[slot] += (seconds - self._seconds[slot]) * share
        self._bytes[slot] += (work_bytes - self._bytes[slot]) * share
        if known % READS_WINDOW == 0 and known:
            self._old_peaks[slot] = self._peaks[slot]
            self._peaks[slot] = [0.0] * _CLASSES
            self._sum_up(slot)
        self._reads[slot] = known + 1
        peaks, size = self._peaks[slot], _size(work_bytes)
        if seconds > peaks[size]:
            peaks[size] = seconds
            self._sum_up(slot)

    def _sum_up(self, slot: int) -> None:
        """Limits are asked for with each request, and peaks seldom change."""
        peaks = [max(pair) for pair in zip(self._peaks[slot], self._old_peaks[slot], strict=True)]
        self._longest[slot] = list(accumulate(peaks, max))
        self._largest[slot] = max((size for size, peak in enumerate(peaks) if peak), default=-1)

    def token_gap(self, decode: int, seconds: float, count: int, longest_s: float = 0.0) -> None:
        """Tokens came, each so long after the one before.

        Not to be told of a stream whose client reads too slowly: that is not the engine's pace.

        Args:
            decode: the slot of the engine.
            seconds: per token.
            count: of tokens.
            longest_s: the longest of these pauses; where it is not given, all of them came at once after the whole time.
        """
        if seconds <= 0.0:
            return  # they came together with one that was waited for
        known = self._steps[decode]
        share = min(1.0, count * _TOKEN_SHARE) if known else 1.0
        self._step[decode] += (seconds - self._step[decode]) * share
        self._steps[decode] = known + count
        pause = longest_s or seconds * count
        seen = self._gaps_seen[decode] + count
        if seen > GAPS_WINDOW:
            self._old_gaps[decode] = self._gaps[decode]
            self._gaps[decode] = 0.0
            seen = count
        self._gaps_seen[decode] = seen
        self._gaps[decode] = max(self._gaps[decode], pause)

    def timed_out(self, slot: int) -> None:
        """A deadline of ours passed while this engine was at work: perhaps the deadline is what is wrong."""
        self._patience[slot] = min(PATIENCE_MAX, self._patience[slot] * 2.0)

    # --- what follows

    def step_s(self, slot: int) -> float | None:
        """Seconds per token; None while too little is known."""
        return self._step[slot] if slot < len(self._step) and self._steps[slot] >= ENOUGH else None

    def byte_s(self, slot: int) -> float | None:
        """Seconds per byte of prompt; None while too little is known."""
        if slot >= len(self._reads) or self._reads[slot] < ENOUGH or self._bytes[slot] <= 0.0:
            return None
        return self._seconds[slot] / self._bytes[slot]

    def first_token_mean_s(self, slot: int) -> float:
        """Seconds from sending to the first token, of those who had this engine read their prompt."""
        return self._seconds[slot] if slot < len(self._reads) else 0.0

    def samples(self, slot: int) -> tuple[int, int]:
        """How many first tokens and how many tokens were measured."""
        return (self._reads[slot], self._steps[slot]) if slot < len(self._reads) else (0, 0)

    def queued(self, slot: int) -> int:
        """Bytes of prompts that the engine has not read yet."""
        return self._queued[slot] if slot < len(self._queued) else 0

    def limits(self, prefill: int | None, decode: int, prompt_bytes: int, *, whole: bool = False, max_tokens: int | None = None) -> Limits:
        """How long an attempt may take that would be sent now, before it is told with `sent`.

        Args:
            prefill: its slot, as in `first_token`.
            decode: its slot.
            prompt_bytes: of the request's body.
            whole: the answer is no stream: its first byte comes with its last.
            max_tokens: the longest answer that was asked for; None where nothing was said.
        """
        reader = decode if prefill is None else prefill
        first = self._first_token_s(reader, decode, self._queued[reader] + prompt_bytes)
        between = self._between_s(decode)
        whole_s = self._whole_answer_s(first, decode, max_tokens) if whole else first
        return Limits(self._caps.connect_s, first, whole_s, between, self._caps.linger_s)

    def reads_until(self, reader: int, decode: int, sent_at: float) -> float:
        """Until when a prompt may take that was sent then, by what its reader did since; -inf if that says nothing.

        The pass that comes after the one which ran then may hold all prompts that were there, and all of these end with it, also those that
        came before the others. An engine that hangs is through with nothing; and a prompt that later passes have left behind is lost.

        Args:
            reader: the slot of who reads it.
            decode: the slot of who writes.
            sent_at: when it was sent, on the clock of `handed_over`.
        """
        at = self._handed_at[reader]
        if at <= sent_at or self._handed_before[reader] > sent_at:
            return -inf
        return min(sent_at + self._caps.first_token_s, at + self._first_token_s(reader, decode, self._handed_queue[reader]))

    def _first_token_s(self, reader: int, decode: int, work: int) -> float:
        cap, rate = self._caps.first_token_s, self.byte_s(reader)
        if rate is None:
            return cap
        size = _size(work)
        if self._largest[reader] < max(0, size - 1):
            return cap
        patience = max(self._patience[reader], self._patience[decode])
        return min(cap, max(FLOOR_S, TIMES_FIRST_TOKEN * rate * work, self._longest[reader][size]) * patience)

    def _between_s(self, decode: int) -> float:
        cap, step = self._caps.between_tokens_s, self.step_s(decode)
        if step is None:
            return cap
        return min(cap, max(FLOOR_S, TIMES_TOKEN * step, self._gaps[decode], self._old_gaps[decode]) * self._patience[decode])

    def _whole_answer_s(self, first_s: float, decode: int, max_tokens: int | None) -> float:
        step = self.step_s(decode)
        if step is None or max_tokens is None or first_s >= self._caps.first_token_s:
            return self._whole_s
        return min(self._whole_s, first_s + max_tokens * step * TIMES_FIRST_TOKEN * self._patience[decode])

    def __repr__(self) -> str:
        return (
            f"<Pace engines={len(self._step)} tokens={sum(self._steps)} first tokens={sum(self._reads)} queued={sum(self._queued)} bytes>"
        )


def _size(work_bytes: int) -> int:
    """Classes of work, each four times the one before."""
    return min(_CLASSES - 1, (max(work_bytes, 0).bit_length() + 1) // 2)
