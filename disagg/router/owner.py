"""One owner per request: from its place in the queue to its last byte, over as many attempts as it takes.

    wait for engines ──► attempt ──► the whole answer
          ▲                 │ a fault that is not the client's
          │                 ├── the client has heard nothing: asked anew, with a new room, on other engines
          └─────────────────┴── the client has heard something: the rest is asked for (see `seam`), or the stream ends with an error

The first failure of either leg ends the attempt (the handoff aborts the other one), and nobody but the owner makes another. A request
is made again at most twice, and the prompts of no more than a fifth of what is in flight are being read again at a time, so that faults do
not multiply the load: others wait their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from math import inf
from typing import Any, Protocol

import msgspec
import structlog

from disagg.errors import CrashedError, DeadlineError, DisaggError, EngineError, EngineRefusedError, EngineTimeoutError, NoCapacityError
from disagg.model import Choice, ClusterView, EngineId, EngineView
from disagg.observe.metrics import RouterMetrics
from disagg.policy.blame import Ledger
from disagg.policy.replay import PER_REQUEST, Avoided, Blame, ReplayBudget, judge
from disagg.policy.route import pool_of
from disagg.router.admission import Admission, Promise, ShutOutError
from disagg.router.attempt import Attempt
from disagg.router.client import Client
from disagg.router.openai import ClientRequest
from disagg.router.relay import Job, LegFactory, Relay, Spawn
from disagg.router.stream import Stream
from disagg.router.trial import Trial

ASK_LIMIT_S = 5.0
FATE_S = 0.5
"""How long it takes at most until it is known that an engine's process has ended."""
STALE_FATE_S = 0.15
"""The same, where it looks more like an idle connection that the engine had just closed."""
SUSPECT_WAIT_S = 60.0
"""How long a request that was there when an engine died waits until it may be tried where no other such one is."""
PROVE_POLL_S = 0.02
UNSENT_LIMIT = 8
"""Connections that could not be made cost nothing, but this many of them are no accident."""


class Watch(Protocol):
    """Who looks after the engines' health."""

    def fault(self, choice: Choice, blame: Blame, what: str, *, engine: EngineId | None = None) -> None:
        """An attempt failed."""

    def served(self, choice: Choice) -> None:
        """An answer came to its end as it should."""

    def refused(self, engine: EngineId) -> None:
        """An engine should be looked at now."""


class Owner:
    """Owns requests.

    Args:
        watch: told how attempts ended.
        queue_s: how long a request waits for engines.
        spawn: runs a coroutine as a named task that somebody owns.
    """

    def __init__(
        self,
        *,
        relay: Relay,
        admission: Admission,
        watch: Watch,
        view: Callable[[], ClusterView],
        metrics: RouterMetrics,
        queue_s: float,
        spawn: Spawn,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._relay = relay
        self._admission = admission
        self._watch = watch
        self._view = view
        self._metrics = metrics
        self._queue_s = queue_s
        self._budget = ReplayBudget()
        self._crashes = Ledger()
        self._spawn = spawn
        self._log = log
        self._waiting: dict[asyncio.Future[None], None] = {}  # in the order of their coming: a set's would differ from run to run

    def check(self, request: ClientRequest) -> None:
        """Looks whether a request could be served at all, before any work is done for it.

        Raises:
            UnknownModelError, NoCapacityError: it could not.
        """
        try:
            pool_of(self._view(), request.model)
        except NoCapacityError:
            if not self._view().may_serve(request.model):
                raise

    def may_pair(self, request: ClientRequest) -> bool:
        """True when a pair may serve this request; a pair must never see ``n > 1``."""
        return self._view().may_pair(request.model)

    def learn(self, choice: Choice, body_bytes: int, answer: bytes) -> None:
        """A whole answer tells how many tokens its prompt had."""
        self._admission.learn(choice, body_bytes, answer)

    def draw_arm(self) -> bool | None:
        """Whether a new request is to show what unified engines do, or pairs; None where nothing is compared."""
        return self._admission.draw_arm()

    def answered(self, job: Job, choice: Choice, tokens: int, ttft_s: float, first_token_at: float) -> None:
        """A stream came to its end.

        Args:
            job: the request.
            choice: the engines that ended it.
            tokens: about so many.
            ttft_s: until the first one.
            first_token_at: when that was.
        """
        itl_s = (self._relay.clock() - first_token_at) / (tokens - 1) if tokens > 1 else 0.0
        books = self._admission.books
        facts, alone = choice.decode.facts, choice.prefill is None
        books.answered(tokens, job.tokens or books.ledger.prompt_tokens(facts.model, len(job.request.rest), facts.context_tokens))
        if job.arm is alone:  # who went where they were not drawn for says nothing of either arm
            books.comparison.ended(unified=alone, ttft_s=ttft_s, itl_s=itl_s)

    def changed(self) -> None:
        """Engines came, went or reported: those who wait look anew."""
        self._admission.changed()
        self._wake()

    @property
    def names_wanted(self) -> bool:
        """There is a choice that the names of a prompt's blocks decide."""
        return self._admission.names_wanted

    @property
    def ids_wanted(self) -> bool:
        """There is such a choice, and an engine says which blocks it holds."""
        return self._admission.ids_wanted

    @property
    def waiting(self) -> int:
        """How many wait: for room, for engines that are open to them, or for their turn to be made again."""
        return self._admission.waiting + len(self._waiting)

    def _wake(self) -> None:
        for waiter in list(self._waiting):
            if not waiter.done():
                waiter.set_result(None)

    # --- one request

    async def run(self, job: Job, leg: LegFactory, client: Client, stream: Stream | None = None) -> Attempt:
        """Makes attempts until one succeeds.

        Returns:
            The last attempt.

        Raises:
            DisaggError: what the client is to be told.
        """
        run = _Run(job, stream)
        trial = job.trial = Trial(self._crashes, hash(job.rest), self._relay.clock, self._room)
        try:
            while True:
                trial.check()
                trial.begin()
                attempt = await self._attempt(run, leg, client)
                if attempt.error is None:
                    self._watch.served(attempt.choice)
                    trial.prove()
                    return attempt
                if await self._is_over(run, attempt, client):
                    return attempt
        finally:
            trial.end()
            self._give_back(run)

    async def _attempt(self, run: _Run, leg: LegFactory, client: Client) -> Attempt:
        job = run.job
        attempt = self._relay.attempt(job, await self._engines(run))
        attempt.may_move = run.may_move
        if run.has_budget:
            attempt.on_handed_over = lambda: self._give_back(run)
        trial = job.trial
        assert trial is not None
        proof = self._spawn(self._on_trial(trial, run.stream), "trial of a suspect") if trial.is_suspect else None
        try:
            await self._relay.send(attempt, job, leg)
            await self._relay.outcome(attempt, client)
        finally:
            self._give_back(run)
            if proof is not None:
                proof.cancel()
            attempt.client_left()  # does nothing once the attempt is final; a cancelled handler ends up here
        return attempt

    async def _is_over(self, run: _Run, attempt: Attempt, client: Client) -> bool:
        """Looks whether another attempt may be made, and prepares it. True: nothing is missing, the client has its answer.

        Raises:
            DisaggError: it may not.
        """
        error, stream = attempt.error, run.stream
        assert error is not None
        run.failed(attempt, self._relay.clock())
        if not self._judge(attempt, error):
            raise error
        await self._mourn(run, attempt)
        if attempt.moved:
            pass  # its engine is about to leave in good health: no fault that could multiply
        elif attempt.sent:
            if run.replays >= PER_REQUEST:
                raise error
            run.wants_budget = True
        else:
            run.unsent += 1
            if run.unsent >= UNSENT_LIMIT:
                raise error
        if attempt.on_wake is not None:
            attempt.on_wake()  # takes what is left of its events
        if stream is not None and stream.has_begun:
            return await self._go_on(run, attempt, stream, client)
        if client.started and stream is None:
            raise error
        self._metrics.replays[_reason(attempt)] += 1
        return False

    def _judge(self, attempt: Attempt, error: DisaggError) -> bool:
        """Tells whose fault it was, and returns whether another attempt may do better."""
        choice = attempt.choice
        verdict = judge(error, paired=choice.prefill is not None, first_token_seen=attempt.first_token_at > 0)
        if attempt.moved:
            return True  # its engine leaves in good health
        if attempt.is_stale:
            return True  # the engine had closed an idle connection: nothing was sent, and nobody is to blame
        if attempt.lost:
            return True  # it was judged already
        blamed = attempt.blamed_engines()
        self._watch.fault(choice, verdict.blame, verdict.why, engine=blamed[0].id if blamed else None)
        if isinstance(error, EngineTimeoutError):
            for slot in attempt.slots:
                self._relay.pace.timed_out(slot)
        return verdict.replay

    async def _take_from_budget(self, run: _Run) -> None:
        """Waits until a replay fits into the budget: when an engine dies, what ran on it is not sent to the others all at once."""
        deadline = run.job.deadline_at
        until = min(self._relay.clock() + SUSPECT_WAIT_S, deadline or inf)
        while why := self._budget.take(replayed=run.replays, in_flight=self._metrics.inflight):
            left_s = until - self._relay.clock()
            if left_s <= 0:
                assert run.last_error is not None
                if deadline == until:
                    raise DeadlineError("the request's own deadline passed while it waited to be made again")
                self._log.warning("a request is not made again", request=run.job.record.request_id, why=why)
                raise run.last_error
            await self._change(left_s)
        run.replays += 1
        run.wants_budget, run.has_budget = False, True

    def _give_back(self, run: _Run) -> None:
        """Its prompt is read anew, or it ended: others may be made again."""
        if run.has_budget:
            run.has_budget = False
            self._budget.give_back()
            self._wake()

    # --- engines that died

    async def _mourn(self, run: _Run, attempt: Attempt) -> None:
        """Finds out whether an engine died under this attempt: then the request is a suspect before it goes to another."""
        trial, stream = run.job.trial, run.stream
        assert trial is not None
        if stream is not None:
            stream.journal.fold()
        broken = attempt.broken if not attempt.moved else ()
        for engine in broken:
            self._watch.refused(engine.id)
        began = self._relay.clock()
        for engine in broken:
            limit_s = 0.0 if engine.id in attempt.lost else STALE_FATE_S if attempt.is_stale else FATE_S  # who is lost was judged already
            if await self._is_dead(engine, began + limit_s):
                trial.engine_died(engine, stream.journal.events if stream is not None else 0)
        trial.end()
        trial.check()

    async def _is_dead(self, engine: EngineView, until: float) -> bool:
        """Whether its process has ended. Known within some 100 ms: its agent reports it, or it refuses to be connected."""
        while not self._view().has_died(engine):
            left_s = until - self._relay.clock()
            if left_s <= 0:
                return False
            await self._change(left_s)
        return True

    def _room(self) -> None:
        """Engines are open again that were closed to some."""
        self._wake()
        self._admission.look_soon()

    async def _on_trial(self, trial: Trial, stream: Stream | None) -> None:
        """Proves a suspect that its engine has survived: a stream by its tokens, an answer of which nothing is seen by time."""
        if stream is None:
            free_s, proved_s = trial.solitude
            await asyncio.sleep(free_s)
            trial.free()
            await asyncio.sleep(proved_s - free_s)
        else:
            while stream.journal.events <= trial.past:  # the hot path sets no event
                await asyncio.sleep(PROVE_POLL_S)
                stream.journal.fold()
        trial.prove()

    # --- streams that go on

    async def _go_on(self, run: _Run, attempt: Attempt, stream: Stream, client: Client) -> bool:
        resumes, error = self._metrics.resumes, attempt.error
        try:
            rest, missing = await stream.go_on(lambda path, body: self._ask(run, path, body))
        except CrashedError:
            raise
        except EngineError as reason:
            resumes["impossible"] += 1
            why = self._view().why_not_ready() or "no other engine is there" if reason is error else reason
            raise EngineError(f"{error}; its stream cannot go on elsewhere: {why}") from error
        if rest:
            self._metrics.replays[_reason(attempt)] += 1
            resumes["resumed"] += 1
            self._log.info(
                "a stream goes on elsewhere",
                request=run.job.record.request_id,
                engine=attempt.choice.decode.id,
                events=stream.journal.events,
                why=_reason(attempt),
            )
            run.job.ask_for(rest)
            return False
        resumes["completed"] += 1
        stream.finish(client, missing)
        return True

    async def _ask(self, run: _Run, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Asks some engine of the model something that any of them knows. Raises EngineError."""
        content = msgspec.json.encode(body)
        for last in (False, True):
            assert run.job.trial is not None
            await self._until_possible(run, self._patience_ends_at(run.job.trial))
            engine = self._admission.somebody(run.job, self._exclude(run))
            left_s = (run.job.deadline_at or inf) - self._relay.clock()
            if left_s <= 0:
                raise DeadlineError("the request's own deadline passed while its stream was prepared to go on")
            try:
                answer = await self._relay.post(engine, path, content, min(ASK_LIMIT_S, left_s))
                return msgspec.json.decode(answer, type=dict[str, Any])
            except (EngineError, msgspec.DecodeError) as error:
                if last or isinstance(error, EngineRefusedError):
                    raise EngineError(f"the engine {engine.id} did not answer {path}: {error}") from error
                run.avoided.add([engine], self._relay.clock())
        raise AssertionError("unreachable")

    # --- waiting for engines

    async def _engines(self, run: _Run) -> Promise:
        """Engines for the next attempt; waits for them where there are none at the moment, or none with room.

        Raises:
            UnknownModelError, NoCapacityError, ShareError, DeadlineError: there are none in time.
        """
        trial = run.job.trial
        assert trial is not None
        until = self._patience_ends_at(trial)
        while True:
            if run.avoided or trial.shut() != ():
                await self._until_possible(run, until)
            if run.wants_budget:
                await self._take_from_budget(run)
                await self._until_possible(run, until)  # which it was, a moment ago
            exclude = (lambda: self._exclude(run)) if run.avoided else None
            try:
                return await self._admission.enter(run.job, exclude, again=run.last_error is not None)
            except ShutOutError:
                if self._relay.clock() >= until:
                    raise

    def _patience_ends_at(self, trial: Trial) -> float:
        return self._relay.clock() + (SUSPECT_WAIT_S if trial.is_suspect else self._queue_s)

    def _options(self, run: _Run) -> list[Collection[EngineId]]:
        return run.avoided.options(self._view(), self._relay.clock(), others_only=run.others_only)

    def _exclude(self, run: _Run) -> Collection[EngineId]:
        """The engines that are not to be asked, as things are now: all of them where nobody is left.

        An engine that failed it some time ago and has room is better than one that is full: who knows for how long.
        """
        possible, admission = self._possible(run), self._admission
        if possible is None:
            return self._options(run)[0]
        if run.others_only or admission.has_room(run.job, possible):
            return possible
        last = self._open_options(run)[-1]
        return last if admission.has_room(run.job, last) else possible

    def _possible(self, run: _Run) -> Collection[EngineId] | None:
        """The same, whether there is room or not; None where nobody is left."""
        return next((each for each in self._open_options(run) if self._admission.could_serve(run.job, each)), None)

    def _open_options(self, run: _Run) -> list[Collection[EngineId]]:
        """The options, each with the engines that are closed to it at the moment; none where all are."""
        trial = run.job.trial
        assert trial is not None
        shut = trial.shut()
        return [] if shut is None else [[*exclude, *shut] for exclude in self._options(run)]

    async def _until_possible(self, run: _Run, until: float) -> None:
        """Waits until there is an engine that did not fail this request, or not just now, and that is open to it."""
        clock, job, error = self._relay.clock, run.job, run.last_error
        trial = job.trial
        assert trial is not None
        while self._possible(run) is None:
            now = clock()
            if error is not None and (
                now >= until or (run.others_only and trial.shut() == ()) or not self._view().may_serve(job.request.model)
            ):
                raise error
            if now >= until:
                return  # the queue says what is the matter
            if job.deadline_at is not None and now >= job.deadline_at:
                raise DeadlineError("the request's own deadline passed while it waited for engines")
            changes = (run.avoided.next_change(now), trial.next_change(now), job.deadline_at)
            await self._change(min([until, *(at for at in changes if at is not None)]) - now)

    async def _change(self, limit_s: float) -> None:
        waiter: asyncio.Future[None] = self._relay.loop.create_future()
        self._waiting[waiter] = None
        try:
            await asyncio.wait([waiter], timeout=max(0.0, limit_s))
        finally:
            self._waiting.pop(waiter, None)


class _Run:
    """What is known of a request between its attempts. What most requests never change has its first value here.

    Attributes:
        avoided: the engines that failed it.
        others_only: the last error was an engine's own word, or silence: the same engines would do the same again. A stream that the client
            has heard a part of is given to them all the same, rather than lost.
    """

    replays = 0
    unsent = 0
    others_only = False
    wants_budget = False
    has_budget = False
    last_error: DisaggError | None = None

    def __init__(self, job: Job, stream: Stream | None) -> None:
        self.job = job
        self.stream = stream
        self.avoided = Avoided()

    def may_move(self) -> bool:
        """True when the rest of the answer can be made on other engines."""
        return self.stream is None or self.stream.may_go_on()

    def failed(self, attempt: Attempt, now: float) -> None:
        """An attempt failed: its engines are left alone for a while."""
        self.last_error = attempt.error
        has_begun = self.stream is not None and self.stream.has_begun
        self.others_only = isinstance(attempt.error, EngineRefusedError | EngineTimeoutError) and not has_begun
        blamed, prefill = attempt.blamed_engines(), attempt.choice.prefill
        if prefill is not None and (not attempt.first_token_at or prefill in blamed):
            self.avoided.add(blamed, now, pair=(prefill, attempt.choice.decode))
        else:
            self.avoided.add(blamed, now)


def _reason(attempt: Attempt) -> str:
    if attempt.moved:
        return "moved"
    if attempt.lost:
        return "engine_lost"
    if not attempt.sent:
        return "never_reached_engine"
    if isinstance(attempt.error, EngineTimeoutError):
        return "deadline"
    return "engine_refused" if isinstance(attempt.error, EngineRefusedError) else "connection_broken"
