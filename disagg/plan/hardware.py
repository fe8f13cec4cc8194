"""What engines do in virtual time: passes over prompts, steps of a batch, transfers, a cache that gives up what is old. Pure.

How long things take are the lines of `disagg.policy.cost`, exactly and without noise:

* A **reader** (prefill engine) takes prompts in the order in which they came. A pass reads as many as have `Hardware.chunk` tokens to
  compute between them, and always one whole prompt. What a prompt finds in the cache is looked up when its pass begins, and what it leaves
  there can be found from the end of the pass on. Each chunk's KV leaves when the chunk is computed, over a link that sends one prompt after
  the other; a cached beginning travels, too. So the first token comes when the last of its KV is there: after the last chunk's, or when the
  link is through with what came before.
* A **writer** (decode engine) steps all its answers at once. Between two changes of the batch k steps are done in one go, in closed form:
  ``k (a + b B + c S) + c B k (k-1) / 2`` seconds for B answers whose KV is S tokens at first and B more with each step. An answer joins at
  the end of the step in which it arrives.
* A **unified** engine reads first: a prompt in steps of a chunk, each of which is also a step of its answers. Such a stretch is done in one
  go, so that an answer which ends within it is told at its end. It reads one prompt at a time.

What is left out: two speeds of a step below and above some batch, noise, failures, and engines that run out of KV because answers are
longer than what was kept for them (`Writer.kv` may be more than there is; the router hears of it as in life and sends less).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush

import msgspec

from disagg.policy.cost import Line, square

PAUSE_CLASSES = 100
"""Pauses are counted in classes, as many for each factor of e."""


class Hardware(msgspec.Struct, frozen=True):
    """What every engine is like. The defaults are a 70B model (Llama-3, Llama-2) on 8 A100 or A800 with tensor parallelism.

    Attributes:
        read: seconds of a pass: constant, for each new token, for each token² of attention. Fitted to DistServe's and Splitwise's tables.
        step: seconds of a decode step: constant, for each answer, for each token of KV (Splitwise's table for A100, TP8).
        kv_tokens: what an engine's KV holds.
        kv_bytes: of a token (2 x 80 layers x 8 heads x 128 x 2 bytes).
        bandwidth: bytes a second that leave a prefill engine (100 Gb/s).
        rtt_s: of a handoff.
        chunk: tokens of a prefill chunk.
        batch: answers that a decode engine writes at once at most, 0 for no limit (SGLang's ``--max-running-requests``).
        switch_s: of a change of roles, once nothing runs on the engine.
    """

    read: Line = (0.0248, 1.359e-4, 5.2e-9)
    step: Line = (0.04423, 2.28e-4, 2.93e-7)
    kv_tokens: int = 3_000_000
    kv_bytes: int = 327_680
    bandwidth: float = 12.5e9
    rtt_s: float = 0.002
    chunk: int = 8192
    batch: int = 0
    switch_s: float = 5.0


class Work:
    """A request and what became of it.

    Attributes:
        at: when it came.
        prompt, answer: tokens.
        names: of its full blocks.
        hit: tokens of the prompt that were found in the cache.
        read_at: when its pass began.
        first_at, end_at: when its first and its last token came; NaN before.
    """

    __slots__ = ("answer", "at", "end_at", "first_at", "hit", "names", "number", "prompt", "read_at")

    def __init__(self, number: int, at: float, prompt: int, answer: int, names: Sequence[int]) -> None:
        self.number = number
        self.at = at
        self.prompt = prompt
        self.answer = answer
        self.names = names
        self.hit = 0
        self.read_at = math.nan
        self.first_at = math.nan
        self.end_at = math.nan

    def __repr__(self) -> str:
        return f"<Work {self.number} {self.prompt}+{self.answer} tokens, came at {self.at:.3f}>"


class Cache:
    """The blocks that an engine's prefix cache holds, the least recently used first."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.held: OrderedDict[int, None] = OrderedDict()
        self.limit = limit

    def leading(self, names: Sequence[int]) -> int:
        """How many leading blocks of a prompt it holds."""
        held = self.held
        for count, name in enumerate(names):
            if name not in held:
                return count
        return len(names)

    def used(self, names: Sequence[int]) -> None:
        """A prompt was read: all its blocks are held; the end of it goes before its beginning, as leaves of a tree do."""
        held = self.held
        for name in reversed(names):
            held[name] = None
            held.move_to_end(name)
        while len(held) > self.limit:
            held.popitem(last=False)


class Reader:
    """A prefill engine.

    Attributes:
        cache: what it holds.
        coming: how many prompts that wait or are being read have this block.
        queue: prompts that wait.
        reading: those of the pass that is under way.
        busy_s: in passes, ever.
    """

    __slots__ = ("_block", "_hardware", "_link_free_at", "busy_s", "cache", "coming", "queue", "reading")

    def __init__(self, hardware: Hardware, block: int) -> None:
        self._hardware = hardware
        self._block = block
        self.cache = Cache(hardware.kv_tokens // block if block else 0)
        self.coming: dict[int, int] = {}
        self.queue: deque[Work] = deque()
        self.reading: list[Work] = []
        self.busy_s = 0.0
        self._link_free_at = -math.inf

    def add(self, work: Work) -> None:
        """A prompt came."""
        self.queue.append(work)
        for name in work.names:
            self.coming[name] = self.coming.get(name, 0) + 1

    def foreseen(self, work: Work) -> int:
        """Tokens that this prompt will find here, as somebody knows who sees the cache and what is about to be read into it."""
        held, coming, count = self.cache.held, self.coming, 0
        for name in work.names:
            if name not in held and name not in coming:
                break
            count += 1
        return min(count * self._block, work.prompt - 1)

    def take(self, now: float, most: int = 0) -> tuple[int, int]:
        """Begins a pass over what waits: new tokens, and tokens² of attention.

        Args:
            now: when.
            most: prompts, 0 for as many as fit.
        """
        new = squares = 0
        queue, chunk = self.queue, self._hardware.chunk
        while queue and (not most or len(self.reading) < most):
            work = queue[0]
            hit = min(self.cache.leading(work.names) * self._block, work.prompt - 1)
            if self.reading and new + work.prompt - hit > chunk:
                break
            queue.popleft()
            work.hit, work.read_at = hit, now
            new += work.prompt - hit
            squares += square(hit, work.prompt - hit)
            self.reading.append(work)
        return new, squares

    def start(self, now: float) -> float:
        """Begins a pass: how long it takes, seconds. To be asked when nothing is being read and something waits."""
        new, squares = self.take(now)
        a, b, c = self._hardware.read
        seconds = a + b * new + c * squares
        self.busy_s += seconds
        return seconds

    def done(self) -> list[Work]:
        """The pass is over: what was read."""
        read, self.reading = self.reading, []
        for work in read:
            self.cache.used(work.names)
            for name in work.names:
                left = self.coming[name] - 1
                if left:
                    self.coming[name] = left
                else:
                    del self.coming[name]
        return read

    def delivered_at(self, work: Work, now: float) -> float:
        """When the last of its KV is at the decode engine; to be asked at the end of its pass, once."""
        hardware = self._hardware
        last = min(work.prompt - work.hit, hardware.chunk) * hardware.kv_bytes / hardware.bandwidth
        through = max(self._link_free_at, work.read_at) + work.prompt * hardware.kv_bytes / hardware.bandwidth
        self._link_free_at = max(now + last, through)
        return self._link_free_at + hardware.rtt_s

    def empty(self) -> None:
        """Its cache is gone."""
        self.cache = Cache(self.cache.limit)


class Writer:
    """A decode engine, or that half of a unified one.

    Attributes:
        at: the end of the last step that was reckoned with; later than now while a step is under way.
        batch: answers that it writes.
        kv: tokens of them, with their prompts.
        pauses: what a step took, and how many tokens came out of such steps, in classes of 1 %.
        busy_s: in steps, ever.
    """

    __slots__ = ("_a", "_b", "_c", "_ends", "_step", "at", "batch", "busy_s", "joining", "kv", "pauses")

    def __init__(self, hardware: Hardware) -> None:
        self._a, self._b, self._c = hardware.step
        self._ends: list[tuple[int, int, Work]] = []  # by the step in which the last token comes
        self._step = 0
        self.at = 0.0
        self.batch = 0
        self.kv = 0
        self.joining: list[Work] = []
        self.pauses: dict[int, int] = {}
        self.busy_s = 0.0

    @property
    def step_s(self) -> float:
        """The next step, seconds."""
        return self._a + self._b * self.batch + self._c * self.kv

    def steps_s(self, steps: int) -> float:
        """So many of them, without a change of the batch."""
        return steps * self.step_s + self._c * self.batch * steps * (steps - 1) / 2

    def steps_until(self, now: float) -> int:
        """How many steps have begun by now, without a change of the batch: the last of them ends now or later."""
        left = now - self.at
        if left <= 0.0:
            return 0
        slope, first = self._c * self.batch / 2, self.step_s
        linear = first - slope
        steps = math.ceil(left / first if slope <= 0.0 else 2 * left / (linear + math.sqrt(linear * linear + 4 * slope * left)))
        while steps > 0 and self.steps_s(steps - 1) >= left:
            steps -= 1
        while self.steps_s(steps) < left:
            steps += 1
        return steps

    def to_first_end(self) -> int:
        """Steps until an answer is complete."""
        return self._ends[0][0] - self._step

    def kv_at(self, now: float) -> int:
        """Tokens of KV in the middle of things."""
        return self.kv + self.batch * max(0, min(int((now - self.at) / self.step_s), self.to_first_end())) if self.batch else 0

    def advance(self, steps: int, seconds: float | None = None) -> list[Work]:
        """Does so many steps: the answers that are complete.

        Args:
            steps: as many as end before another event, or with it.
            seconds: how long they take; None for as long as steps of a decode engine do.
        """
        if steps and self.batch:
            took = self.steps_s(steps) if seconds is None else seconds
            self.at += took
            self.busy_s += took
            self.kv += self.batch * steps
            self._step += steps
            key = round(math.log(took / steps) * PAUSE_CLASSES)
            self.pauses[key] = self.pauses.get(key, 0) + self.batch * steps
        ended = []
        ends = self._ends
        while ends and ends[0][0] <= self._step:
            late, _, work = heappop(ends)
            self.batch -= 1
            self.kv -= work.prompt + work.answer + self._step - late
            ended.append(work)
        return ended

    def admit(self, now: float) -> None:
        """What has arrived joins the batch: between two steps."""
        if not self.batch:
            self.at = now
        for work in self.joining:
            heappush(self._ends, (self._step + work.answer - 1, work.number, work))
            self.batch += 1
            self.kv += work.prompt + 1
        self.joining = []
