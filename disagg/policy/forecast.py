"""How long an engine will take: for what it has still to read, for one more prompt, for a step of its batch. Learnt while it works. Pure.

Theory of operation. Each engine has two lines (`disagg.policy.cost`): of passes over prompts and of decode steps. Their samples come from
what the router sees anyway.

* **Passes.** An engine reads prompts one after the other, in the order in which they came. So while it always has one to read, the time
  between two first tokens is what the second prompt cost it, however long that had waited; a prompt that found it idle cost the time since
  it was sent. First tokens that come close together, or sooner than their prompts can have been read, came out of one pass, and
  count as one sample of all their prompts. What nobody can
  know is no sample: the time in which the first of the queue was aborted (the engine may have gone on with it), a first token that
  overtook that of an earlier prompt (whose KV is on its way, or which was put off), and the late one itself.
* **Pairs.** What travels (the prompt, the KV of its last chunk, the first token) is in the time of a prompt that found its engine idle. In
  a queue it is hidden behind the next pass. So links are judged by the former alone: by what they took longer than the line says, by
  token, against the fastest link of the same engine. That much is then taken off before a sample counts for the line, so that a slow link
  is not blamed on the engine, whose other links are fast.
* **Occupancy.** So what a prompt takes until its first token is more than what it keeps the engine busy for. What took the next place in
  a queue before the last one began tells that apart, once there was enough of it: waits are summed up, and demand is measured, in what it
  says.
* **Steps.** The pause between two tokens of a stream is a step of the batch that it is in.

What an engine has still to do is the sum of what its prompts were expected to take, without what has passed of the first one. When that is
late, it is taken to remain late for as long as it is late already: an engine that has become slow, or hangs, loses its attraction before it
has finished anything.

Before anything was measured an engine has the line of that of its peers which is known best, or one that was measured on other hardware
(`READS`, `STEPS`): enough to tell a long queue from a short one, nothing to refuse anybody for. `trust` says which it is. One that was
started anew has the line that it had before. An engine that is idle when it comes is measured (`disagg.policy.benchmark`).

**What cannot be believed.** When the router itself stood still (nobody called `tick` for `stall_s`), times that lie across that are not
the engines'. And an engine that was slow once is avoided, so that nobody would learn that it is well again: such a one is *due* for a try
when nothing was seen of it, and none was made, for `TRY_S` and `TRY_EACH` prompts were sent meanwhile. A try may cost its request at most
`TRY_SHARE` of that time more than the best engine would: short prompts try soon, long ones on a very slow engine hardly ever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from statistics import median

import msgspec

from disagg.policy.cost import ENOUGH, SHIFT, Fit, Line, Prior, Trust, at, middle, square

READS: Line = (0.015, 8.0e-5, 1.0e-9)
STEPS: Line = (0.012, 1.0e-4, 2.0e-8)
"""Seconds: a model of some 8 billion parameters on a GPU of the year 2020; see `disagg.policy.cost` for what they are multiplied with."""
_READ_POINTS = ((256.0, float(square(0, 256))), (2048.0, float(square(0, 2048))), (16384.0, float(square(0, 16384))))
READ_PROBE = (1000.0, 1e6)
STEP_PROBE = (8.0, 8000.0)
"""Work by which engines are compared."""
_STEP_POINTS = ((1.0, 1000.0), (16.0, 16_000.0), (64.0, 128_000.0))
OWN = "what it did before it was started anew"
STEP_EVERY_S = 0.1
"""Steps are all alike: more samples than this would say nothing more."""
TOGETHER_S = 0.004
TOGETHER_SHARE = 0.05
TOGETHER_MOST = 0.25
TOGETHER_MOST_S = 0.02
"""First tokens that come within this time of each other, or this share of the pass, come out of one pass. But not where that is more than a
quarter of it, or so many seconds: those are short passes that follow each other, or a long one."""
TOO_SOON = 0.5
TOGETHER_LIMIT = 8
"""So do first tokens that come in less than this share of what their own prompts should have kept the engine busy for: their KV left it
together and arrived one after the other. But not more than so many: the engine may have become faster."""
LINK_SAMPLES = 9
"""The newest ones of a link; the middle one counts."""
LINK_WIDE = 4.0
"""Where the longest prompt seen on a link is so many times the shortest one, what each takes is told apart from what each token takes."""
LINK_S = 600.0
"""A link of which nothing was seen for so long may have been mended since, and nobody would know: it was not used for being slow."""
_LATE_SHARE = 0.1
_EARLY_SHARE = 0.02
_ANSWER_SHARE = 0.02
ANSWER_TOKENS = 200.0
"""How long answers are taken to be before one has ended."""
BATCH_LIMIT = 4096
LONG_TIMES = 2.0
"""A prompt may take so many times as long as foretold before its engine counts as hanging."""
LONG_LIMIT_S = 60.0
ALONE_TIMES = 1.5
TRY_S = 10.0
TRY_AGAIN_S = 2.0
"""The same where the last sample said that it is faster than its line: the next one tells."""
TRY_EACH = 20
"""Requests, of which one at most is a try of the same engine."""
TRY_SHARE = 0.05
TRY_FROM = SHIFT
"""Engines that seem to be so many times as slow as the fastest one get nothing where there is little to do."""
JUDGED_AT_ONCE = 4
"""Engines whose links are judged in one tick: a fraction of a millisecond each."""


class Reading:
    """A prompt on its way through an engine. Made by `Forecast.sent`; said to be `read` or `left` exactly once.

    Attributes:
        slot: of the engine that reads it.
        new, cached: its tokens, as far as that is known.
        seconds: what it was expected to take until its first token.
        busy_s: for how much of that the engine was expected to be busy with it.
        sent_at: when it was sent.
        wait_s: what it was expected to wait before.
        alone: it found the engine idle, as far as that is known.
        overtaken: the first token of a later prompt came before its own, out of another pass.
        blind: the router stood still meanwhile: when its first token came is not known.
        of_client: it is no prompt of the router's own, which others learn from (`Forecast.measured`).
    """

    __slots__ = ("alone", "blind", "busy_s", "cached", "new", "of_client", "overtaken", "seconds", "sent_at", "slot", "wait_s")

    def __init__(self, slot: int, new: int, cached: int, seconds: float, busy_s: float, sent_at: float, *, alone: bool) -> None:
        self.alone = alone
        self.blind = False
        self.of_client = True
        self.busy_s = busy_s
        self.overtaken = False
        self.wait_s = 0.0
        self.slot = slot
        self.new = new
        self.cached = cached
        self.seconds = seconds
        self.sent_at = sent_at


class _Pass:
    """First tokens that came close together.

    Attributes:
        seconds: from its beginning to the first of them, without what their link adds.
        at: when the last of them came.
        clear: nothing else can have taken part of that time.
        before: prompts that were sent before the first of them and have not been read; if they are not read with it, they were overtaken.
        link: what is to be noted of the way that the only one of them went; None if there are several, or if it had waited.
        waited: the first of them was there before the pass before this one began: nothing but the engine took the time.
    """

    __slots__ = ("at", "before", "clear", "count", "link", "new", "seconds", "square", "waited")

    def __init__(self, seconds: float, at: float, before: list[Reading], *, clear: bool) -> None:
        self.seconds = seconds
        self.at = at
        self.before = before
        self.clear = clear
        self.link: tuple[int, _Travel] | None = None
        self.waited = False
        self.count = 0
        self.new = 0
        self.square = 0

    def holds(self, now: float) -> bool:
        """A first token that comes now is one more of it."""
        limit = min(max(TOGETHER_S, TOGETHER_SHARE * self.seconds), TOGETHER_MOST * self.seconds, TOGETHER_MOST_S)
        return abs(now - self.at) <= limit

    def add(self, reading: Reading) -> None:
        self.count += 1
        self.new += reading.new
        self.square += square(reading.cached, reading.new)


class _Travel(msgspec.Struct, frozen=True):
    """A prompt whose engine had nothing else to do: what its first token took, with the way, and what the line said of it then."""

    seconds: float
    said: float
    new: int
    cached: int


class _Link:
    """The way from one engine to another.

    Attributes:
        travels: the newest ones.
        at: when the last one was seen.
        late: seconds for each prompt, and for each of its tokens, more than over the fastest link of the same engine; either may be less
            than 0 if the other is not. The fastest one is that of a prompt of the usual length.
    """

    __slots__ = ("at", "late", "travels")

    def __init__(self) -> None:
        self.travels: deque[_Travel] = deque(maxlen=LINK_SAMPLES)
        self.at = -math.inf
        self.late = (0.0, 0.0)

    def late_s(self, tokens: float) -> float:
        return self.late[0] + self.late[1] * tokens


class Outlook:
    """What one request would meet on each engine, by slot.

    Args:
        forecast: of all engines.
        tokens: of its prompt.
        cached: how many of them each engine holds, by slot; none where it is not named.
        told: the slots of the engines that say so themselves; of the others it is a guess.
        batches: how many requests each engine has in flight, by slot.
        kv: how many tokens each engine's KV is promised to, by slot.
        now: monotonic seconds.
    """

    __slots__ = ("_batches", "_cached", "_forecast", "_kv", "_now", "_told", "answer", "tokens")

    def __init__(
        self,
        forecast: Forecast,
        *,
        tokens: int,
        cached: Mapping[int, int],
        told: Collection[int] = (),
        batches: Sequence[int],
        kv: Sequence[int],
        now: float,
    ) -> None:
        self._forecast = forecast
        self._cached = cached
        self._told = told
        self._batches = batches
        self._kv = kv
        self._now = now
        self.tokens = tokens
        self.answer = forecast.answer_tokens

    def cached(self, slot: int) -> int:
        """Tokens that this engine need not compute; the last one it always must."""
        return min(self._cached.get(slot, 0), max(0, self.tokens - 1))

    def is_told(self, slot: int) -> bool:
        """The engine says itself what it holds of this prompt."""
        return slot in self._told

    def first_token_s(self, slot: int) -> float:
        """Seconds until the first token, if this engine reads the prompt."""
        cached = self.cached(slot) if self._cached else 0
        return self._forecast.first_token_s(slot, self.tokens - cached, cached, now=self._now)

    def wait_s(self, slot: int) -> float:
        """Seconds of them that it would wait there."""
        return self._forecast.wait_s(slot, now=self._now)

    def may_try(self, *, writes: bool) -> Collection[int]:
        """The slots of engines that were slow when something was seen of them last, and should be tried again. Mostly none."""
        return self._forecast.due_steps if writes else self._forecast.due_reads

    def try_s(self, slot: int, best: int, *, writes: bool) -> float:
        """By how many seconds a try of this engine may be worse than the best one."""
        return self._forecast.try_s(slot, best, writes=writes, now=self._now)

    def link_s(self, prefill: int, decode: int) -> float:
        """Seconds that the way from one engine to the other adds to the first token, more than the fastest way from there."""
        return self._forecast.link_s(prefill, decode, self.tokens)

    def answer_s(self, slot: int) -> float:
        """Seconds that an answer costs everybody, if this engine writes it: it, and those that it makes slower.

        A request that joins B others lengthens each of their steps, too. Without this the fastest engine would be filled until it is as
        slow as the slowest one.
        """
        batch = self._batches[slot]
        a, b, c = self._forecast.step_line(slot)
        more = b + c * self.tokens
        return self.answer * (a + b * batch + c * self._kv[slot] + more + batch * more)

    def pause_s(self, slot: int) -> float:
        """Seconds that the answers which this engine writes stand still while it reads the prompt, all together."""
        cached = self.cached(slot)
        return self._forecast.writing(slot) * self._forecast.pass_s(slot, self.tokens - cached, cached)


class Known(msgspec.Struct, frozen=True):
    """What is known of an engine, for people.

    Attributes:
        reads, steps: its lines, see `disagg.policy.cost`.
        reads_trust, steps_trust: how far they can be believed.
        backlog_s: what it has still to read, in seconds.
    """

    reads: Line
    reads_trust: Trust
    steps: Line
    steps_trust: Trust
    backlog_s: float


class Forecast:
    """All engines, by slot.

    Args:
        stall_s: `tick` is called more often than this, unless the whole process stands still.

    Attributes:
        due_reads, due_steps: slots of engines that should be tried again, see the module.
    """

    __slots__ = (
        "_answer",
        "_answers",
        "_any_reads",
        "_any_steps",
        "_backlog",
        "_began",
        "_busy",
        "_carried",
        "_kv",
        "_late",
        "_links",
        "_murky",
        "_noted",
        "_pass",
        "_prompt",
        "_queue",
        "_read_lines",
        "_reads",
        "_sent",
        "_sent_then",
        "_since",
        "_stall_s",
        "_stalled_at",
        "_step_lines",
        "_stepped_at",
        "_steps",
        "_ticked_at",
        "_tried_at",
        "_turn",
        "_writing",
        "due_reads",
        "due_steps",
    )

    def __init__(self, *, stall_s: float = math.inf) -> None:
        self._stall_s = stall_s
        self._stalled_at = -math.inf  # when the last stall was over
        self._ticked_at = math.inf  # -inf would be a stall
        self._sent = 0  # prompts, ever
        self._sent_then: list[tuple[int, int]] = []  # how many of them when this engine's pass and step were measured or tried last
        self._tried_at: list[float] = []
        self.due_reads: set[int] = set()
        self.due_steps: set[int] = set()
        self._reads: list[Fit] = []
        self._steps: list[Fit] = []
        self._queue: list[dict[Reading, None]] = []
        self._began: list[float] = []  # when the last pass did, as far as that can be known
        self._busy: list[Fit] = []  # lines of what keeps the engine busy
        self._late: list[float] = []
        self._backlog: list[float] = []  # seconds, of all in the queue
        self._since: list[float] = []  # when the engine began with the first of its queue, as far as that can be known
        self._murky: list[bool] = []  # since then it may have done what nobody knows of
        self._pass: list[_Pass | None] = []
        self._stepped_at: list[float] = []
        self._writing: list[int] = []
        self._kv: list[int] = []
        self._links: list[dict[int, _Link]] = []  # by the slot that reads and the one that writes
        self._noted: set[int] = set()  # slots that read, whose links are to be judged anew
        self._read_lines: list[Line] = []  # what decisions go by, see `_line`
        self._step_lines: list[Line] = []
        self._any_reads = READS  # of the engine that is known best, for those that are not known well
        self._any_steps = STEPS
        self._answer = ANSWER_TOKENS
        self._answers = 0
        self._prompt = 0.0
        self._carried = 0.0  # tokens of an answer times those of its KV while it is written, a moving average
        self._turn = 0

    # --- engines

    def grow(self, slots: int) -> None:
        """Makes room for engines up to this many slots."""
        for _ in range(slots - len(self._reads)):
            self._reads.append(self._new(self._reads, READS, _READ_POINTS))
            self._steps.append(self._new(self._steps, STEPS, _STEP_POINTS))
            self._queue.append({})
            self._pass.append(None)
            self._backlog.append(0.0)
            self._began.append(-math.inf)
            self._busy.append(Fit(2))
            self._late.append(0.0)
            self._since.append(-math.inf)
            self._murky.append(False)
            self._links.append({})
            self._stepped_at.append(-math.inf)
            self._writing.append(0)
            self._kv.append(0)
            self._sent_then.append((0, 0))
            self._tried_at.append(-math.inf)
        self._choose_lines()

    @staticmethod
    def _new(fits: list[Fit], line: Line, points: tuple[tuple[float, float], ...]) -> Fit:
        """With the line of the peer that is known best for a prior."""
        best = max(fits, key=lambda fit: fit.samples, default=None)
        if best is not None and best.latest is not None and best.samples >= ENOUGH:
            return Fit(2, Prior(best.latest, points, "what another engine does"))
        return Fit(2, Prior(line, points, "another machine"))

    def forget(self, slot: int, *, gone: bool = False) -> None:
        """The engine is another process or has another role. What is in flight there goes on until it is said to be over.

        Args:
            slot: of the engine.
            gone: there will be no other one.
        """
        if slot < len(self._reads):
            for fits, line, points in ((self._reads, READS, _READ_POINTS), (self._steps, STEPS, _STEP_POINTS)):
                known, others = fits[slot], fits[:slot] + fits[slot + 1 :]
                own = known.latest if known.is_own and not gone else None
                fits[slot] = self._new(others, line, points) if own is None else Fit(2, Prior(own, points, OWN, own=True))
                fits[slot].seen_at = known.seen_at
            self._sent_then[slot] = self._sent, self._sent
            self._busy[slot] = Fit(2)
            self.due_reads.discard(slot)
            self.due_steps.discard(slot)
            self._late[slot] = 0.0
            self._pass[slot] = None
            self._links[slot] = {}
            for prefill, links in enumerate(self._links):
                if links.pop(slot, None) is not None:
                    self._noted.add(prefill)
            self._choose_lines()

    # --- prompts

    def sent(self, slot: int, new: int, cached: int = 0, *, now: float, of_client: bool = True) -> Reading:
        """A prompt was sent.

        Args:
            slot: of the engine that reads it.
            new: tokens that it has to compute.
            cached: those before them, whose KV it holds.
            now: monotonic seconds, as everywhere here.
            of_client: it says what prompts are like; not so one of the router's own.
        """
        self._sent += 1
        self.tried(slot, now=now)
        queue = self._queue[slot]
        alone = not queue and not self._murky[slot]
        reading = Reading(slot, new, cached, self.pass_s(slot, new, cached), self.busy_s(slot, new, cached), now, alone=alone)
        reading.wait_s = self.wait_s(slot, now=now)
        reading.of_client = of_client
        if not queue:
            self._since[slot] = now
            self._backlog[slot] = 0.0  # what summing up has left of rounding
        queue[reading] = None
        self._backlog[slot] += reading.busy_s
        if of_client:
            self._prompt += _ANSWER_SHARE * (new + cached - self._prompt) if self._prompt else new + cached
        return reading

    def tried(self, slot: int, *, now: float) -> None:
        """A request goes to this engine: if it was due for a try, this is it, whatever becomes of it."""
        if slot in self.due_reads or slot in self.due_steps:
            self.due_reads.discard(slot)
            self.due_steps.discard(slot)
            self._sent_then[slot] = self._sent, self._sent
            self._tried_at[slot] = now

    def read(self, reading: Reading, decode: int | None = None, *, now: float) -> None:
        """Its first token came.

        Args:
            reading: as `sent` returned it.
            decode: the slot of the engine that its KV went to; None where that is the same one.
            now: when.
        """
        slot = reading.slot
        if reading.blind or not reading.of_client or self._is_stalled(now):
            self._read_blindly(reading, now)
            return
        if not reading.alone:
            late_s = now - reading.sent_at - reading.wait_s - reading.seconds
            known = self._late[slot]
            self._late[slot] += (_LATE_SHARE if late_s > known else _EARLY_SHARE) * (late_s - known)
        travel = None
        if decode is not None and reading.alone and reading.new > 0:
            travel = decode, _Travel(now - reading.sent_at, reading.seconds, reading.new, reading.cached)
        if reading.overtaken:
            # It came to an idle engine, so all the time is its own, though others were faster.
            if travel is not None:
                self._note(slot, *travel, now)
            self._murky[slot] = True
            return
        self._leave(reading)
        last = self._pass[slot]
        if last is not None and (last.holds(now) or self._is_too_soon(last, reading, now)):
            if not last.holds(now):
                last.seconds += now - max(self._since[slot], reading.sent_at)
            last.add(reading)
            last.at = self._since[slot] = now
            last.link = None
            last.before = [earlier for earlier in last.before if earlier is not reading]
            return
        if last is not None:
            self._take(slot, last)
        done_at = now if decode is None else now - self.link_s(slot, decode, reading.new + reading.cached)
        one = _Pass(done_at - max(self._since[slot], reading.sent_at), now, self._before(reading), clear=not self._murky[slot])
        one.add(reading)
        one.link = travel
        one.waited = reading.sent_at <= self._began[slot]
        self._began[slot] = max(self._since[slot], reading.sent_at)
        self._pass[slot] = one
        self._since[slot] = max(done_at, reading.sent_at)
        self._murky[slot] = False

    def _is_stalled(self, now: float) -> bool:
        """The router stands still, or has just gone on and does not know it yet."""
        return now - self._ticked_at > self._stall_s

    def _read_blindly(self, reading: Reading, now: float) -> None:
        """It is read, and nobody knows since when."""
        slot = reading.slot
        self._pass[slot] = None
        self._since[slot] = now
        if not reading.overtaken:
            self._leave(reading)
        self._murky[slot] = bool(self._queue[slot])

    def _stalled(self, now: float) -> None:
        """What is under way was so while the router stood still."""
        for slot, queue in enumerate(self._queue):
            for reading in queue:
                reading.blind = True
            last = self._pass[slot]
            if last is not None and last.at > self._ticked_at:
                self._pass[slot] = None
            self._since[slot] = max(self._since[slot], now) if queue else self._since[slot]
        self._stalled_at = now

    def _is_too_soon(self, last: _Pass, reading: Reading, now: float) -> bool:
        """Whether it cannot have been read since the first token before it, and came out of that one's pass."""
        took = now - max(self._since[reading.slot], reading.sent_at)
        return reading.sent_at < last.at and took < TOO_SOON * reading.busy_s and last.count < TOGETHER_LIMIT

    def left(self, reading: Reading, *, now: float) -> None:
        """Nobody waits for its first token any more."""
        if reading.overtaken:
            return
        slot = reading.slot
        first = next(iter(self._queue[slot])) is reading
        self._leave(reading)
        if first:  # else the engine had not begun with it
            self._since[slot] = now
            self._murky[slot] = True

    def _before(self, reading: Reading) -> list[Reading]:
        """Those that were sent earlier and are still there; the queue is in this order."""
        return list(takewhile(lambda other: other.sent_at < reading.sent_at, self._queue[reading.slot]))

    def _leave(self, reading: Reading) -> None:
        slot = reading.slot
        queue = self._queue[slot]
        del queue[reading]
        self._backlog[slot] = self._backlog[slot] - reading.busy_s if queue else 0.0

    def _take(self, slot: int, done: _Pass) -> None:
        """No more first tokens of this pass will come."""
        for earlier in done.before:
            if earlier in self._queue[slot]:
                self._leave(earlier)
                earlier.overtaken = True
        if done.before or not done.clear:
            return
        if done.link is not None:
            self._note(slot, *done.link, done.at)
        work = (float(done.new), float(done.square))
        reads, busy = self._reads[slot], self._busy[slot]
        self._sent_then[slot] = self._sent, self._sent_then[slot][1]
        scale = reads.seen(work, done.seconds, now=done.at)
        self._read_lines[slot] = self._line(reads, self._any_reads)
        own = busy.seen(work, done.seconds, now=done.at) if done.waited else 1.0
        if scale != 1.0:
            self._changed(slot, scale, busy_too=own == 1.0, now=done.at)

    def _changed(self, slot: int, scale: float, *, busy_too: bool, now: float) -> None:
        """An engine has become so many times as slow: so is what it has still to do, and by how much it was late says nothing any more."""
        if busy_too:
            self._busy[slot].shift(scale, since=now, now=now)
        self._late[slot] = 0.0
        for reading in self._queue[slot]:
            reading.seconds *= scale
            reading.busy_s *= scale
        self._backlog[slot] = sum(reading.busy_s for reading in self._queue[slot])

    def _note(self, slot: int, decode: int, travel: _Travel, now: float) -> None:
        link = self._links[slot].setdefault(decode, _Link())
        link.travels.append(travel)
        link.at = now
        self._noted.add(slot)

    def _judge(self, slot: int) -> None:
        """Compares the links of an engine, by its line as it is now.

        What was seen when the line was quite another one says nothing: a link that was not used since the engine became slower would seem
        to be the fast one.
        """
        found = []
        for link in self._links[slot].values():
            link.late = (0.0, 0.0)
            tokens, late = [], []
            for travel in link.travels:
                says, n = self.pass_s(slot, travel.new, travel.cached), travel.new + travel.cached
                if travel.said < SHIFT * says and says < SHIFT * travel.said:
                    tokens.append(float(n))
                    late.append(travel.seconds - says)
            if late:
                link.late = _late_line(tokens, late)
                found.append(link)
        rtt_s, token_s = min(found, key=lambda link: link.late_s(self._prompt)).late if found else (0.0, 0.0)
        for link in found:
            link.late = link.late[0] - rtt_s, link.late[1] - token_s

    @staticmethod
    def _line(fit: Fit, of_others: Line) -> Line:
        """The line to go by: its own once it was measured often enough.

        Until then all have the same one. Else of two engines that are alike the one that was measured first would seem to be the slower
        one, where the prior is too fast, and get nothing.
        """
        return fit.latest if fit.latest is not None and fit.is_own else of_others

    def pass_s(self, slot: int, new: int, cached: int = 0) -> float:
        """Seconds that this engine needs for one prompt once it begins."""
        a, b, c = self._read_lines[slot]
        return a + b * new + c * ((cached + new) ** 2 - cached**2)

    def busy_s(self, slot: int, new: int, cached: int = 0) -> float:
        """Seconds for which one prompt keeps this engine from others; never more than `pass_s`."""
        seconds, fit = self.pass_s(slot, new, cached), self._busy[slot]
        if fit.latest is None or fit.samples < ENOUGH:
            return seconds
        a, b, c = fit.latest
        return min(seconds, a + b * new + c * ((cached + new) ** 2 - cached**2))

    def wait_s(self, slot: int, *, now: float) -> float:
        """Seconds until this engine could begin with one more prompt."""
        queue = self._queue[slot]
        if not queue:
            return 0.0
        first = next(iter(queue))
        passed = max(0.0, now - self._since[slot])
        busy_s = first.busy_s
        # Late for as long again as it is late already.
        left = busy_s - passed if passed < busy_s else passed - first.seconds if passed > first.seconds else 0.0
        return max(0.0, self._backlog[slot] - busy_s) + left

    def patience_s(self, slot: int) -> float:
        """For how long this engine may seem to stand still, because of a long prompt that it has still to read, seconds; 0 without any.

        Its counters move with each pass, which is a part of a prompt or some prompts, and nobody but the engine knows which.
        """
        longest_s = max((reading.seconds for reading in self._queue[slot]), default=0.0) if slot < len(self._queue) else 0.0
        return min(LONG_LIMIT_S, LONG_TIMES * longest_s)

    def link_s(self, prefill: int, decode: int, tokens: int) -> float:
        """Seconds that a prompt of so many tokens, cached ones with them, takes longer than over the fastest link of its reader."""
        link = self._links[prefill].get(decode)
        return 0.0 if link is None else max(0.0, link.late_s(tokens))

    def links(self, prefill: int) -> dict[int, tuple[float, float]]:
        """The links of an engine that reads, by the slot of who writes.

        Returns:
            Seconds for each prompt and for each of its tokens, more than over the fastest of these links (0 and 0).
        """
        return {decode: link.late for decode, link in self._links[prefill].items()}

    def late_s(self, slot: int) -> float:
        """Seconds by which nearly all prompts that had to wait for this engine came no later than foretold; never below 0.

        A moving average in which what came later counts five times (an expectile; Newey and Powell, 1987). Where nobody is let in who
        would come too late, those who just may are the most: what is foretold too short by little is too late for all of them.
        """
        return max(0.0, self._late[slot])

    def first_token_s(self, slot: int, new: int, cached: int = 0, *, now: float) -> float:
        """Seconds until the first token of a prompt that would be sent now."""
        return self.wait_s(slot, now=now) + self.pass_s(slot, new, cached)

    # --- answers

    def began(self, slot: int, kv_tokens: int) -> None:
        """The engine writes one more answer, whose KV is so many tokens."""
        self._writing[slot] += 1
        self._kv[slot] += kv_tokens

    def ended(self, slot: int, kv_tokens: int) -> None:
        """It does not any more; the tokens are those of `began`."""
        self._writing[slot] -= 1
        self._kv[slot] -= kv_tokens

    def answered(self, tokens: int, prompt: int = 0) -> None:
        """An answer of so many tokens has come to its end.

        Args:
            tokens: of the answer.
            prompt: of its prompt; 0 if unknown.
        """
        self._answers += 1
        before, share = self._answer, max(_ANSWER_SHARE, 1 / self._answers)
        self._answer = max(1.0, before + share * (tokens - before))
        if prompt:
            carried = self._carried or before * (self._prompt + before / 2)
            self._carried = carried + share * (tokens * (prompt + tokens / 2) - carried)

    @property
    def context_tokens(self) -> float:
        """The KV of an answer while it is written, tokens.

        A mean over steps, and long answers have more of them: where some requests have long prompts and others long answers, the mean
        prompt and half the mean answer is far from it.
        """
        return self._carried / self._answer if self._carried and self._answer else self._prompt + self._answer / 2

    def stepped(self, slot: int, seconds: float, *, now: float) -> None:
        """A stream of this engine made a step."""
        if self._is_stalled(now) or now - seconds < self._stalled_at:
            return  # the router stood still in that time
        if abs(now - self._stepped_at[slot]) >= STEP_EVERY_S:
            self._stepped_at[slot] = now
            self._sent_then[slot] = self._sent_then[slot][0], self._sent
            fit = self._steps[slot]
            fit.seen((float(max(1, self._writing[slot])), float(max(0, self._kv[slot]))), seconds, now=now)
            self._step_lines[slot] = self._line(fit, self._any_steps)

    def measured(self, slot: int, *, reads: Prior | None = None, steps: Prior | None = None, now: float) -> None:
        """An engine was measured on purpose: this is what it is taken to do until more is seen. What clients have taught counts for more.

        Args:
            slot: of the engine.
            reads: what passes take; None where that was not measured.
            steps: what steps take, the same.
            now: when.
        """
        for fits, prior in ((self._reads, reads), (self._steps, steps)):
            if prior is not None and not fits[slot].is_known:
                fits[slot].believe(prior, now=now)
        self._lend()

    def is_known(self, slot: int) -> tuple[bool, bool]:
        """Whether this engine's passes, and its steps, were measured often enough, now or before it was started anew."""
        return self._reads[slot].is_known, self._steps[slot].is_known

    def step_s(self, slot: int, batch: int, kv_tokens: int) -> float:
        """Seconds of a step of this engine with so many answers, whose KV is so many tokens."""
        a, b, c = self._step_lines[slot]
        return a + b * batch + c * kv_tokens

    def step_line(self, slot: int) -> Line:
        """What a step takes: at all, for each answer of the batch and for each token of their KV, seconds."""
        return self._step_lines[slot]

    def writing(self, slot: int) -> int:
        """How many answers it writes."""
        return self._writing[slot] if slot < len(self._writing) else 0

    @property
    def answer_tokens(self) -> float:
        """The length of an answer, a moving average."""
        return self._answer

    @property
    def prompt_tokens(self) -> float:
        """The length of a prompt, a moving average; 0 before the first one."""
        return self._prompt

    def best_batch(self, slot: int, *, limit_s: float, kv_tokens: int = 0, most: int = 0) -> int:
        """How many answers of the usual length an engine can write at once; at least 1.

        Args:
            slot: of the engine.
            limit_s: how long a step may take. An engine whose step takes nearly that long with a single answer does not become faster by
                having one only: then `ALONE_TIMES` of that counts.
            kv_tokens: the KV that it has room for, 0 if unknown.
            most: requests that it takes, 0 if unknown.
        """
        context = self.context_tokens
        a, b, c = self._step_lines[slot]
        each = b + c * context
        limit_s = max(limit_s, ALONE_TIMES * (a + each))
        batch = (limit_s - a) / each if each > 0.0 else float(BATCH_LIMIT)
        if kv_tokens > 0:
            batch = min(batch, kv_tokens / (context + self._answer / 2))
        return max(1, min(int(batch), most or BATCH_LIMIT, BATCH_LIMIT))

    def write_s(self, slot: int, *, limit_s: float, kv_tokens: int = 0, most: int = 0) -> float:
        """What an answer costs an engine that is as busy as it may be: its share of the steps, seconds. Arguments as for `best_batch`."""
        batch = self.best_batch(slot, limit_s=limit_s, kv_tokens=kv_tokens, most=most)
        context = self.context_tokens
        return self._answer * self.step_s(slot, batch, int(batch * context)) / batch

    # --- upkeep

    def tick(self, now: float) -> None:
        """Judges links, and fits one line anew, of the engines in turn: a millisecond or two, which no decision should have to wait for."""
        if self._is_stalled(now):
            self._stalled(now)
        self._ticked_at = now
        for slot, last in enumerate(self._pass):
            if last is not None and not last.holds(now):
                self._take(slot, last)
                self._pass[slot] = None
            if any(now - link.at > LINK_S for link in self._links[slot].values()):
                self._links[slot] = {decode: link for decode, link in self._links[slot].items() if now - link.at <= LINK_S}
                self._noted.add(slot)
        for _ in range(min(JUDGED_AT_ONCE, len(self._noted))):
            self._judge(self._noted.pop())
        self.due_reads = self._due(self._reads, READ_PROBE, 0, now)
        self.due_steps = self._due(self._steps, STEP_PROBE, 1, now)
        fits = [*self._reads, *self._steps, *self._busy]
        for _ in fits:
            self._turn = (self._turn + 1) % len(fits)
            if fits[self._turn].refit(now=now):
                self._lend()
                return

    def _due(self, fits: list[Fit], work: tuple[float, float], which: int, now: float) -> set[int]:
        """Those that were slow when something was seen of them last, which is a while ago, and that have nothing to do now."""
        known = {slot: at(fit.latest, work) for slot, fit in enumerate(fits) if fit.latest is not None and fit.is_own}
        limit_s = TRY_FROM * min(known.values(), default=0.0)
        slow = [slot for slot, seconds in known.items() if seconds > limit_s and not self._queue[slot] and not self._writing[slot]]
        return {slot for slot in slow if self._is_due(fits[slot], slot, self._sent - self._sent_then[slot][which], now)}

    def _is_due(self, fit: Fit, slot: int, others: int, now: float) -> bool:
        """Nothing was seen of it for long, while so many prompts were sent."""
        passed_s = now - max(fit.seen_at, self._tried_at[slot])
        return passed_s >= TRY_AGAIN_S if fit.seems_faster else passed_s >= TRY_S and others >= TRY_EACH

    def try_s(self, slot: int, best: int, *, writes: bool, now: float) -> float:
        """By how many seconds a try of an engine that is due may be worse than the best one; 0 if it is not slow beside that one."""
        fits, work = (self._steps, STEP_PROBE) if writes else (self._reads, READ_PROBE)
        here, there = fits[slot].latest, fits[best].latest
        if here is None or there is None or at(here, work) <= TRY_FROM * at(there, work):
            return 0.0
        return TRY_SHARE * max(0.0, now - max(fits[slot].seen_at, self._tried_at[slot]))

    @property
    def engines(self) -> int:
        """How many slots there are."""
        return len(self._reads)

    def _lend(self) -> None:
        """Of an engine that was never measured is believed what its peers do, also where they were measured after it had come.

        Else one whose peers are fifty times faster than its prior would get nothing for as long as they have anything less to do.
        """
        for fits, line, points in ((self._reads, READS, _READ_POINTS), (self._steps, STEPS, _STEP_POINTS)):
            for slot, fit in enumerate(fits):
                if not fit.samples and not fit.is_own:
                    fits[slot] = self._new(fits, line, points)
        self._any_reads = self._best(self._reads, READS)
        self._any_steps = self._best(self._steps, STEPS)
        self._choose_lines()

    def _choose_lines(self) -> None:
        """A decision looks at the lines of all engines, and they change seldom."""
        self._read_lines = [self._line(fit, self._any_reads) for fit in self._reads]
        self._step_lines = [self._line(fit, self._any_steps) for fit in self._steps]

    @staticmethod
    def _best(fits: list[Fit], line: Line) -> Line:
        """The line of the engine that was measured most often, if that was often enough."""
        best = max(fits, key=lambda fit: fit.samples)
        is_known = best.samples >= ENOUGH or (best.samples and best.is_own)
        return best.latest if is_known and best.latest is not None else line

    def known(self, slot: int, *, now: float) -> Known:
        """What is known of an engine."""
        reads, steps = self._reads[slot], self._steps[slot]
        return Known(reads.latest or READS, reads.trust, steps.latest or STEPS, steps.trust, self.wait_s(slot, now=now))

    def samples(self, slot: int) -> tuple[int, int]:
        """How many passes and steps of this engine were measured."""
        return self._reads[slot].samples, self._steps[slot].samples

    def doubt(self, slot: int) -> str:
        """Why this engine's passes cannot be foretold; empty when they can."""
        return self._reads[slot].trust.doubt

    @property
    def is_idle(self) -> bool:
        """No engine reads or writes for us."""
        return not any(self._queue) and not any(self._writing)

    def check(self) -> None:
        """Asserts what is always true."""
        for slot, queue in enumerate(self._queue):
            assert all(reading.slot == slot for reading in queue)
            assert math.isclose(self._backlog[slot], sum(r.busy_s for r in queue), rel_tol=1e-6, abs_tol=1e-6)
            assert self._writing[slot] >= 0
            assert self._writing[slot] or not self._kv[slot]
            self._reads[slot].check()
            self._busy[slot].check()
            self._steps[slot].check()

    def __repr__(self) -> str:
        return f"<Forecast engines={len(self._reads)} reading={sum(map(len, self._queue))} writing={sum(self._writing)}>"


def _late_line(tokens: Sequence[float], late: Sequence[float]) -> tuple[float, float]:
    """Seconds for each prompt and for each of its tokens.

    The middle one of the slopes between any two prompts of which one is at least twice as long as the other (Theil, 1950; Sen, 1968), and
    the middle one of what that leaves. Where all are about as long these cannot be told apart, and all of it is taken to be the tokens'.

    Args:
        tokens: of each prompt, shape (n,) with n > 0.
        late: what each took longer than its engine's line says, seconds, shape (n,).
    """
    if max(tokens) < LINK_WIDE * min(tokens):
        return 0.0, middle([each / n for n, each in zip(tokens, late, strict=True)], tokens)
    points = sorted(zip(tokens, late, strict=True))
    slopes = [(b - a) / (m - n) for i, (n, a) in enumerate(points) for m, b in points[i + 1 :] if m >= 2.0 * n]
    token_s = median(slopes)
    return median(each - token_s * n for n, each in points), token_s
