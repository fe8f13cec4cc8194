"""What the engine computes next, and which pages each request may use.

Theory of operation. A job is one prompt and its one answer. Every step computes, for each job in it, the tokens whose
keys and values are missing: one token for a job that is decoding, a chunk of up to ``chunk_tokens`` for jobs that are
prefilling. A step holds every decoding job and the next chunk, so neither starves the other. When nothing is missing,
the last logits give the next token. The same rule recomputes a job whose pages were taken away, without a case of its
own.

    leg LOCAL    WAITING ─────────────▶ PREFILLING ──▶ DECODING ──▶ DONE
    leg PREFILL  BOOTSTRAP ▶ WAITING ─▶ PREFILLING ──▶ HANDING_OVER ──▶ DONE
                 (waits for decode)                    (until decode acknowledged the pages)
    leg DECODE   WAITING ─────────────▶ RECEIVING ───▶ DECODING ──▶ DONE
                 (for free pages)       (prefill writes into the reserved pages)

Pages. Jobs are admitted in order of arrival and nobody overtakes the head of the queue. Admission takes pages for the
tokens at hand and for ``reserve_tokens`` of the answer; a longer answer grows page by page. When no page is left the
youngest admitted job is *retracted*: it loses its pages, goes back to the head of the queue and is computed again
later. There is no deadlock: jobs are served oldest first, so the oldest one can take every page of the younger ones,
and no job is accepted that is larger than the pool. Pages that cannot be retracted (being received, being handed over,
in quarantine) come back within the transfer's limits, whatever happens here.

A step in flight uses its jobs' pages from another thread: a job that ends meanwhile gives its pages back when the step
is applied. Pure: times are arguments and stand only in ``history``.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from disagg.engines.embedded.pages import OutOfPagesError, PagePool, PrefixCache, pages_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

HISTORY = 4096


class Leg(enum.Enum):
    """Which part of a request this engine plays."""

    LOCAL = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()


class Phase(enum.Enum):
    """Where a job is."""

    BOOTSTRAP = enum.auto()
    WAITING = enum.auto()
    PREFILLING = enum.auto()
    RECEIVING = enum.auto()
    DECODING = enum.auto()
    HANDING_OVER = enum.auto()
    DONE = enum.auto()


class Finish(NamedTuple):
    """Why a job ended.

    Attributes:
        kind: ``stop``, ``length`` or ``abort``, as SGLang says them.
        matched: the token or string that stopped it.
        sentence: of an abort: why.
        status: of an abort: the HTTP status that it deserves; 0 if it was asked for.
    """

    kind: str
    matched: int | str | None = None
    sentence: str = ""
    status: int = 0


def keep_going(_token: int) -> str | None:
    """The stop check of a job without stop strings."""
    return None


@dataclass(slots=True, eq=False)
class Job:
    """One prompt and its answer.

    Attributes:
        rid: its name, unique among living jobs.
        prompt: int32 token ids, at least one.
        max_new_tokens: at least one.
        stop_ids: tokens that end the answer.
        accept: is shown every token of the answer in order; returns the stop string that it completes, if any.
        logprobs_from: the first prompt position whose logprob is wanted, or None.
        tokens: prompt and answer; ``length`` of them are valid.
        computed: keys and values of so many tokens are in ``pages``.
        cached: so many of them came from the prefix cache at the first admission.
    """

    rid: str
    prompt: NDArray[np.int32]
    max_new_tokens: int
    leg: Leg = Leg.LOCAL
    stop_ids: frozenset[int] = frozenset()
    accept: Callable[[int], str | None] = keep_going
    logprobs_from: int | None = None
    phase: Phase = Phase.WAITING
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    retractions: int = 0
    finish: Finish | None = None
    length: int = 0
    tokens: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.prompt)
        self.tokens = np.empty(self.length + self.max_new_tokens, np.int32)
        self.tokens[: self.length] = self.prompt

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return self.length - len(self.prompt)

    @property
    def missing(self) -> int:
        """Tokens that must be computed before the next one can be chosen."""
        return self.length - self.computed

    def __repr__(self) -> str:
        return f"<Job {self.rid} {self.phase.name} {self.computed}/{self.length}, {len(self.pages)} pages>"


class Row(NamedTuple):
    """One job's part of a step: compute its tokens ``start`` to ``end``.

    Attributes:
        sample: nothing is missing afterwards, a token is to be chosen.
        all_logits: the logits of every position are wanted, for the prompt's logprobs.
    """

    job: Job
    start: int
    end: int
    sample: bool
    all_logits: bool


class HasToken(Protocol):
    """What a sampler made."""

    @property
    def token(self) -> int:
        """The chosen token."""


Sampled = TypeVar("Sampled", bound=HasToken)


class Made(NamedTuple, Generic[Sampled]):
    """A token of the answer."""

    job: Job
    sampled: Sampled


class Computed(NamedTuple):
    """A PREFILL job's keys and values are complete up to ``job.computed``."""

    job: Job


class Finished(NamedTuple):
    """The job is over; ``job.finish`` says why."""

    job: Job


class Scheduler(Generic[Sampled]):
    """Decides what is computed. One step may be in flight at a time.

    Args:
        pool: the pages.
        cache: the prefix cache, or None where none is wanted (decode engines).
        page_size: tokens of a page.
        max_running: jobs that hold pages at a time.
        chunk_tokens: prompt tokens of one step.
        reserve_tokens: tokens of the answer that admission takes pages for.
        leaks: the fault of that name: whether a job that ends now keeps its pages for ever.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache | None,
        *,
        page_size: int,
        max_running: int = 64,
        chunk_tokens: int = 512,
        reserve_tokens: int = 512,
        leaks: Callable[[], bool] = lambda: False,
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.jobs: dict[str, Job] = {}
        self.history: deque[tuple[float, str, str]] = deque(maxlen=HISTORY)
        self.retractions = 0
        self._page_size = page_size
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._reserve_tokens = reserve_tokens
        self._leaks = leaks
        self._leaked: set[int] = set()
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []  # admitted, oldest first: PREFILLING, RECEIVING, DECODING
        self._handing_over: list[Job] = []
        self._in_flight: tuple[Row, ...] = ()

    # --- jobs come and go ---

    def fits(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether a job of this size can ever run here."""
        return pages_for(prompt_tokens + max_new_tokens, self._page_size) <= self.pool.size

    def add(self, job: Job, *, now: float) -> None:
        """Take a job in. A PREFILL job waits for ``bootstrapped``."""
        assert job.rid not in self.jobs, f"{job.rid} lives already"
        assert len(job.prompt) >= 1
        assert job.max_new_tokens >= 1
        assert self.fits(len(job.prompt), 0 if job.leg is Leg.PREFILL else job.max_new_tokens)
        self.jobs[job.rid] = job
        if job.leg is Leg.PREFILL:
            self._move(job, Phase.BOOTSTRAP, now)
        else:
            self._move(job, Phase.WAITING, now)
            self._queue.append(job)

    def bootstrapped(self, rid: str, *, now: float) -> None:
        """Decode has named its pages: the prompt may be computed."""
        job = self.jobs[rid]
        assert job.phase is Phase.BOOTSTRAP
        self._move(job, Phase.WAITING, now)
        self._queue.append(job)

    def arrived(self, rid: str, sampled: Sampled, *, now: float) -> list[Made[Sampled] | Computed | Finished]:
        """The pages of a DECODE job are complete; ``sampled`` is the token that prefill made."""
        job = self.jobs[rid]
        assert job.phase is Phase.RECEIVING
        job.computed = len(job.prompt)
        self._move(job, Phase.DECODING, now)
        return self._take(job, sampled, now)

    def handed_over(self, rid: str, *, now: float) -> list[Made[Sampled] | Computed | Finished]:
        """Decode has acknowledged the pages of a PREFILL job."""
        job = self.jobs[rid]
        assert job.phase is Phase.HANDING_OVER
        assert job.finish is not None
        return [self._end(job, job.finish, now)]

    def abort(self, rid: str, finish: Finish, *, now: float) -> list[Made[Sampled] | Computed | Finished]:
        """End a job in whatever phase. An unknown id does nothing."""
        job = self.jobs.get(rid)
        return [] if job is None else [self._end(job, finish, now)]

    def writer_done(self, rid: str) -> None:
        """Nobody writes into the pages of this DECODE job from outside any more."""
        if not self._leaks():
            self.pool.acquit(rid)

    # --- steps ---

    def admit(self, *, now: float) -> list[Job]:
        """Give pages to those at the head of the queue. Returns the jobs that came out of it.

        May be called while a step is in flight.
        """
        admitted: list[Job] = []
        while self._queue and len(self._running) < self._max_running:
            job = self._queue[0]
            if not self._reserve(job):
                break
            self._queue.popleft()
            receives = job.leg is Leg.DECODE and job.made == 0
            self._move(job, Phase.RECEIVING if receives else Phase.PREFILLING, now)
            self._running.append(job)
            admitted.append(job)
        return admitted

    def plan(self, *, now: float) -> tuple[Row, ...]:
        """The next step, or nothing to do. Call ``admit`` before and ``apply`` after."""
        assert not self._in_flight, "a step is in flight"
        rows = [self._row(job, 1) for job in self._growable(now)]
        budget = self._chunk_tokens
        for job in self._running:
            if job.phase is Phase.PREFILLING and budget:
                rows.append(self._row(job, min(budget, job.missing)))
                budget -= rows[-1].end - rows[-1].start
        self._in_flight = tuple(rows)
        return self._in_flight

    def apply(self, sampled: Sequence[Sampled | None], *, now: float) -> list[Made[Sampled] | Computed | Finished]:
        """The step in flight is computed; ``sampled`` has one entry per row, None where none was to be chosen."""
        rows, self._in_flight = self._in_flight, ()
        events: list[Made[Sampled] | Computed | Finished] = []
        for row, chosen in zip(rows, sampled, strict=True):
            job = row.job
            if job.phase is Phase.DONE:
                self._give_back(job)
                continue
            job.computed = row.end
            if job.leg is Leg.PREFILL:
                events.append(Computed(job))
            if row.sample:
                assert chosen is not None
                events += self._sampled(job, chosen, now)
        return events

    def _sampled(self, job: Job, chosen: Sampled, now: float) -> Iterable[Made[Sampled] | Computed | Finished]:
        if job.phase is Phase.PREFILLING:
            if self.cache is not None:
                self.cache.insert(job.prompt, job.pages)
            if job.leg is Leg.PREFILL:
                return self._hand_over(job, chosen, now)
            self._move(job, Phase.DECODING, now)
        return self._take(job, chosen, now)

    def _hand_over(self, job: Job, chosen: Sampled, now: float) -> list[Made[Sampled] | Computed | Finished]:
        """The prompt is computed: its one token is the answer, once decode has the pages."""
        self._append(job, chosen.token)
        job.finish = self._ending(job, chosen.token) or Finish("length")
        self._running.remove(job)
        self._handing_over.append(job)
        self._move(job, Phase.HANDING_OVER, now)
        return [Made(job, chosen)]

    def _take(self, job: Job, chosen: Sampled, now: float) -> list[Made[Sampled] | Computed | Finished]:
        self._append(job, chosen.token)
        ending = self._ending(job, chosen.token)
        made: Made[Sampled] = Made(job, chosen)
        return [made] if ending is None else [made, self._end(job, ending, now)]

    @staticmethod
    def _append(job: Job, token: int) -> None:
        job.tokens[job.length] = token
        job.length += 1

    @staticmethod
    def _ending(job: Job, token: int) -> Finish | None:
        # The stop check sees every token, also the last one: it holds back text that may be the start of a stop string.
        matched = None if token in job.stop_ids else job.accept(token)
        if token in job.stop_ids:
            return Finish("stop", matched=token)
        if matched is not None:
            return Finish("stop", matched=matched)
        return Finish("length") if job.made >= job.max_new_tokens else None

    def _growable(self, now: float) -> list[Job]:
        """The decoding jobs, oldest first, each with a page for its next token; younger ones make room."""
        ready: list[Job] = []
        for job in [job for job in self._running if job.phase is Phase.DECODING]:
            while job.phase is Phase.DECODING and not self._grow(job):
                self._retract(self._youngest(), now)
            if job.phase is Phase.DECODING:
                ready.append(job)
        return ready

    def _grow(self, job: Job) -> bool:
        if job.computed < len(job.pages) * self._page_size:
            return True
        try:
            job.pages += self.pool.allocate(1)
        except OutOfPagesError:
            return False
        return True

    def _youngest(self) -> Job:
        return next(job for job in reversed(self._running) if job.phase in {Phase.DECODING, Phase.PREFILLING})

    def _retract(self, job: Job, now: float) -> None:
        self.retractions += 1
        job.retractions += 1
        self._running.remove(job)
        self._release(job)
        job.computed = 0
        self._move(job, Phase.WAITING, now)
        self._queue.appendleft(job)

    def _row(self, job: Job, count: int) -> Row:
        start, end = job.computed, job.computed + count
        wanted = job.logprobs_from
        wants_logits = wanted is not None and end >= wanted and start < len(job.prompt) - 1 and job.made == 0
        return Row(job, start, end, end == job.length, wants_logits)

    def _reserve(self, job: Job) -> bool:
        answer = 0 if job.leg is Leg.PREFILL else min(self._reserve_tokens, job.max_new_tokens - job.made)
        found = self._cached_pages(job)
        needed = pages_for(job.length + answer, self._page_size) - len(found)
        try:
            fresh = self.pool.allocate(needed)
        except OutOfPagesError:
            self.pool.release(found)
            return False
        job.pages = found + fresh
        job.computed = len(found) * self._page_size
        if job.retractions == 0:
            job.cached = job.computed
            if self.cache is not None:
                self.cache.count(job.length, job.cached)
        return True

    def _cached_pages(self, job: Job) -> list[int]:
        if self.cache is None or (job.leg is Leg.DECODE and job.made == 0):
            return []  # prefill writes every page of a DECODE job, and must not write into shared ones
        limit = job.length - 1
        if job.logprobs_from is not None and job.made == 0:
            limit = min(limit, max(0, job.logprobs_from - 1))  # cached positions have no logits
        return self.cache.match(job.tokens[: job.length], limit=limit)

    def _end(self, job: Job, finish: Finish, now: float) -> Finished:
        before = job.phase
        if before in {Phase.BOOTSTRAP, Phase.WAITING}:
            if job in self._queue:
                self._queue.remove(job)
        elif before is Phase.HANDING_OVER:
            self._handing_over.remove(job)
        else:
            self._running.remove(job)
        job.finish = finish
        del self.jobs[job.rid]
        self._move(job, Phase.DONE, now)
        if before is Phase.RECEIVING:
            self.pool.quarantine(job.pages, job.rid)
            job.pages = []
        elif not any(row.job is job for row in self._in_flight):
            self._give_back(job)
        return Finished(job)

    def _give_back(self, job: Job) -> None:
        """The job is over and no step uses its pages."""
        if self._leaks():
            self._leaked.update(job.pages)
        else:
            self._release(job)

    def _release(self, job: Job) -> None:
        if self.cache is not None:
            self.cache.insert(job.tokens[: job.computed], job.pages)
        self.pool.release(job.pages)
        job.pages = []

    def _move(self, job: Job, phase: Phase, now: float) -> None:
        self.history.append((now, job.rid, f"{job.phase.name} → {phase.name}"))
        job.phase = phase

    # --- what others may see ---

    def count(self, *phases: Phase) -> int:
        """Living jobs in these phases."""
        return sum(job.phase in phases for job in self.jobs.values())

    @property
    def idle(self) -> bool:
        """Whether no job lives and no step computes, not even for a job that has ended meanwhile."""
        return not self.jobs and not self._in_flight

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are not computed yet, of jobs that wait or prefill."""
        phases = {Phase.BOOTSTRAP, Phase.WAITING, Phase.PREFILLING}
        return sum(job.missing for job in self.jobs.values() if job.phase in phases)

    @property
    def retracted(self) -> int:
        """Jobs in the queue that have lost their pages before."""
        return sum(job.retractions > 0 for job in self._queue)

    def story(self, rid: str) -> list[tuple[float, str]]:
        """What happened to a job, as far back as ``history`` goes."""
        return [(when, what) for when, name, what in self.history if name == rid]

    def check(self) -> None:
        """Assert every invariant, those of pool and cache included."""
        self.pool.check()
        if self.cache is not None:
            self.cache.check()
        places = [*self._queue, *self._running, *self._handing_over]
        bootstrapping = [job for job in self.jobs.values() if job.phase is Phase.BOOTSTRAP]
        assert len(places) + len(bootstrapping) == len(self.jobs), f"a job is lost or twice: {self!r}"
        assert all(self.jobs[job.rid] is job for job in places)
        assert all(job.phase is Phase.WAITING and not job.pages for job in self._queue)
        assert len(self._running) <= self._max_running
        ending = {id(row.job): row.job for row in self._in_flight if row.job.phase is Phase.DONE}
        holders = [*self._running, *self._handing_over, *ending.values()]
        assert len({page for job in holders for page in job.pages} | self._leaked) == self.pool.held
        for job in holders:
            assert job.computed <= min(job.length, len(job.pages) * self._page_size)

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(phase)} {phase.name}" for phase in Phase if phase is not Phase.DONE)
        return f"<Scheduler {counts}; {len(self._in_flight)} rows in flight; {self.pool!r}>"
