"""Drives attempts over the engines: chooses, connects, sends, waits, cleans up. Whether another one is made is the `owner`'s affair.

One timer serves every attempt: it asks each machine for its deadline, drops idle connections and notices how late it is itself.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from disagg.errors import ClientGoneError, EngineError, EngineTimeoutError, NoCapacityError
from disagg.handoff import DecodeFailed, Handoff, Limits, PrefillFailed, State
from disagg.ids import engine_rid
from disagg.model import Choice, ClusterView, EngineId, EngineView
from disagg.observe.metrics import RouterMetrics
from disagg.policy.holds import Hold
from disagg.policy.pace import Pace
from disagg.router.admission import Admission, Promise
from disagg.router.attempt import ANSWER_LIMIT, Attempt, DecodeLeg, refusal
from disagg.router.client import Client
from disagg.router.legs import TimedLeg, WholeLeg
from disagg.router.openai import MAX_SAMPLES, ClientRequest, Route, key_prefix, parse_request
from disagg.router.trial import Trial
from disagg.router.upstream import Upstream, UpstreamConnection, unframe

SWEEP_S = 0.1
RECORDS_LIMIT = 1000
CLIENT_STALL_S = 60.0
PROVE_LIMIT_S = 10.0
ABORT_LIMIT_S = 2.0
UNCONFIRMED_KEPT = 1024

LegFactory = Callable[[Attempt, int], DecodeLeg]
Spawn = Callable[[Any, str], Any]


class Told(NamedTuple):
    """What is told of an attempt that is over."""

    state: State
    history: Sequence[tuple[float, str]]


class Record:
    """What is kept of a request for ``/admin/requests/ID``: decisions, states, times.

    Never a prompt, never an answer, nor anything that holds one.
    """

    __slots__ = ("error", "model", "outcome", "request_id", "route", "started_at", "trail")

    def __init__(self, request_id: str, route: str, started_at: float) -> None:
        self.request_id = request_id
        self.route = route
        self.started_at = started_at
        self.model = ""
        self.outcome = "running"
        self.error = ""
        self.trail: list[tuple[Choice, Sequence[str], Handoff | Told]] = []

    def seal(self) -> None:
        """The request is over: what is kept of its attempts holds no error any more, and with that no frame that knows its body."""
        self.trail = [(choice, rids, Told(handoff.state, handoff.history)) for choice, rids, handoff in self.trail]


class Job:
    """One request to one pair: the client's request itself, or one sample of it.

    Args:
        rest: the body without its opening brace.
        sample: which of the request's samples this is.
        deadline_at: when the client's patience ends; None without a limit.
        record: where its attempts are noted.
        trial: looks that it kills no engine twice; None for the router's own requests.
        user: whose it is, opaque.
        priority: larger is more important.
        arm: True where it is to show what unified engines do, False for pairs; None where nothing is compared.

    Attributes:
        attempts: how many were made so far.
        model: the model asked for; empty for the only one there is.
        max_tokens: how long one answer may become.
        body_bytes: of `rest`.
        answers: how many answers `rest` asks for.
        names, ids, prompt_bytes, tokens: of its prompt, as in `ClientRequest`.
        streams: its first token is seen when it comes.
        unified_only: it still asks for several samples: it was not split, because only unified engines were there; a pair must not see it.
        arrived_at: when it came.
    """

    __slots__ = (
        "answers",
        "arm",
        "arrived_at",
        "attempts",
        "body_bytes",
        "deadline_at",
        "ids",
        "max_tokens",
        "model",
        "names",
        "priority",
        "prompt_bytes",
        "record",
        "request",
        "rest",
        "sample",
        "streams",
        "tokens",
        "trial",
        "unified_only",
        "user",
    )

    def __init__(
        self,
        request: ClientRequest,
        rest: bytes,
        sample: int,
        deadline_at: float | None,
        record: Record,
        *,
        user: str = "",
        priority: int = 0,
        arm: bool | None = None,
    ) -> None:
        self.user = user
        self.arm = arm
        self.priority = priority
        self.request = request
        self.sample = sample
        self.deadline_at = deadline_at
        self.record = record
        self.arrived_at = record.started_at
        self.attempts = 0
        self.trial: Trial | None = None
        self.model = request.model
        self.max_tokens = request.max_tokens
        self.names = request.names
        self.ids = request.ids
        self.prompt_bytes = request.prompt_bytes
        self.tokens = request.tokens
        self.streams = request.stream
        self.ask_for(rest)

    @property
    def was_let_in(self) -> bool:
        """It was on its way before, or the first sample of its request was: who asks for many must not be refused for the first of them."""
        return self.attempts > 0 or self.sample > 0

    def ask_for(self, rest: bytes) -> None:
        """The next attempt has this body."""
        request = self.request
        self.rest = rest
        self.body_bytes = len(rest)
        self.unified_only = request.samples > 1 and rest is request.rest
        self.answers = (request.prompts or 1) * (request.samples if self.unified_only else 1)

    def shut(self) -> tuple[EngineId, ...] | None:
        """Engines that are closed to it at the moment."""
        return () if self.trial is None else self.trial.shut()

    def promised(self, engines: Sequence[EngineId]) -> None:
        """It goes to these engines."""
        if self.trial is not None:
            self.trial.sent(engines)

    def rids(self) -> list[str]:
        """The engine-side ids of the next attempt, one for each prompt; no two attempts or samples of a request share one."""
        prompts = self.request.prompts or 1
        first = (self.attempts * MAX_SAMPLES + self.sample) * prompts
        return [engine_rid(self.record.request_id, first + i) for i in range(prompts)]


class Relay:
    """The router's engine room.

    Args:
        view: returns the current view of the cluster.
        limits: how long each phase of an attempt may take at most.
        admission: who counts what the engines are promised.
        pace: who says how long an attempt may take, by what was measured.
        on_handed_over: told the engines of each handoff that succeeded.
        random_room: mints a room, a 63-bit integer.
        spawn: runs a coroutine as a named task that somebody owns.
        on_refused: told the id of an engine that refused a connection, so that it is looked at soon.
        clock: monotonic seconds; not the loop's own, which uvloop keeps in whole milliseconds.

    Attributes:
        unconfirmed: the last attempts that failed, oldest first: when, their engines, their engine-side ids. An engine may still work for
            one whose connection was closed.
    """

    def __init__(
        self,
        *,
        view: Callable[[], ClusterView],
        limits: Limits,
        metrics: RouterMetrics,
        admission: Admission,
        pace: Pace,
        on_handed_over: Callable[[Choice], None],
        random_room: Callable[[], int],
        spawn: Spawn,
        on_refused: Callable[[EngineId], None],
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
    ) -> None:
        self.loop = loop
        self.clock = clock
        self.metrics = metrics
        self.admission = admission
        self.pace = pace
        self._on_handed_over = on_handed_over
        self.records: OrderedDict[str, Record] = OrderedDict()
        self._view = view
        self._limits = limits
        self._random_room = random_room
        self._spawn = spawn
        self._on_refused = on_refused
        self._upstreams: dict[EngineId, Upstream] = {}
        self._live: dict[Attempt, None] = {}  # in the order of their beginning: a set's would differ from run to run
        self.unconfirmed: deque[tuple[float, Sequence[EngineId], Sequence[str]]] = deque(maxlen=UNCONFIRMED_KEPT)
        self._aborts: dict[UpstreamConnection, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._expected_at = 0.0

    # --- life

    def start(self) -> None:
        """Starts the timer."""
        self._sweep_again()

    def close(self) -> None:
        """Stops the timer and closes every connection."""
        if self._timer is not None:
            self._timer.cancel()
        for upstream in self._upstreams.values():
            upstream.close()

    @property
    def live(self) -> int:
        """Attempts that an engine may still work for."""
        return len(self._live)

    def _sweep(self) -> None:
        try:
            self._sweep_once()
        finally:
            self._sweep_again()

    def _sweep_once(self) -> None:
        now = self.clock()
        self.metrics.loop_lag.observe(max(0.0, now - self._expected_at))
        for attempt in list(self._live):
            attempt.tick(now)
        for connection in [c for c, until in self._aborts.items() if now >= until or c.closed]:
            del self._aborts[connection]
            connection.abandon()
        for upstream in self._upstreams.values():
            upstream.prune()
        self._forget_gone()
        self.admission.tick(now)

    def _forget_gone(self) -> None:
        engines = self._view().engines
        if len(self._upstreams) > len(engines):
            for gone in self._upstreams.keys() - {e.id for e in engines}:
                self._upstreams.pop(gone).close()

    def _sweep_again(self) -> None:
        self._expected_at = self.clock() + SWEEP_S
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)

    # --- one request

    def remember(self, record: Record) -> None:
        """Keeps a record, and forgets the oldest one when there are too many."""
        self.records[record.request_id] = record
        if len(self.records) > RECORDS_LIMIT:
            self.records.popitem(last=False)

    def attempt(self, job: Job, promise: Promise) -> Attempt:
        """Begins an attempt on the engines that were promised; `send` comes next."""
        choice = promise.choice
        prefill_slot = choice.prefill.slot if choice.prefill is not None else None
        whole, max_tokens = not job.request.stream, job.request.max_tokens
        limits = self.pace.limits(prefill_slot, choice.decode.slot, job.body_bytes, whole=whole, max_tokens=max_tokens)
        handoff = Handoff(paired=choice.prefill is not None, limits=limits, deadline_at=job.deadline_at)
        prefill = self._upstream(choice.prefill) if choice.prefill is not None else None
        attempt = Attempt(self, promise, job.rids(), handoff, prefill, self._upstream(choice.decode))
        attempt.request_id = job.record.request_id
        attempt.whole = whole
        attempt.asked *= job.request.samples if job.unified_only else 1
        job.attempts += 1
        job.record.trail.append((choice, attempt.rids, handoff))
        self._live[attempt] = None
        return attempt

    def _upstream(self, engine: Any) -> Upstream:
        upstream = self._upstreams.get(engine.id)
        if upstream is None or upstream.address is not engine.address:
            if upstream is not None:
                upstream.close()
            upstream = self._upstreams[engine.id] = Upstream(engine.address, self.loop, self.clock)
        return upstream

    async def send(self, attempt: Attempt, job: Job, leg: LegFactory) -> None:
        """Connects both engines and sends both legs; an attempt that could not be connected knows it afterwards."""
        sent = False
        try:
            first, second = await self._connections(attempt)
            if second is not None:
                attempt.work = self.pace.sent(attempt.reader, job.body_bytes)
                attempt.prompt_bytes = job.body_bytes
                attempt.send(leg(attempt, job.attempts), (first, second), self._requests(attempt, job))
                sent = True
        finally:
            if not sent:  # no leg will end that never began
                attempt.promise.end_all()

    async def _connections(self, attempt: Attempt) -> tuple[UpstreamConnection | None, UpstreamConnection | None]:
        """Idle ones where there are, else new ones. No decode connection: it failed, and the attempt knows."""
        prefill, decode = attempt.upstreams
        first = prefill.take() if prefill is not None else None
        second = decode.take()
        if second is not None and (first is not None or prefill is None):
            return first, second
        return await self._connect(attempt, first, second)

    def _requests(self, attempt: Attempt, job: Job) -> tuple[bytes, bytes]:
        prefill, decode = attempt.upstreams
        body, path = (self._keys(attempt, job), job.rest), job.request.path
        return (prefill.request(path, *body) if prefill is not None else b""), decode.request(path, *body)

    def _keys(self, attempt: Attempt, job: Job) -> bytes:
        """The router's keys with the opening brace and the comma before the client's fields."""
        prefill, request = attempt.choice.prefill, job.request
        if request.prompts is not None:
            return key_prefix(self._key_lists(attempt, request.prompts), job.rest)
        wants_ids = request.stream and attempt.choice.decode.facts.stream_token_ids and request.route is not Route.GENERATE
        more: dict[str, Any] = {"return_token_ids": True} if wants_ids else {}
        if prefill is None:
            return key_prefix({"rid": attempt.rids[0], **more}, job.rest)
        address, room = prefill.address, self._random_room()
        keys = {
            "bootstrap_host": address.bootstrap_host,
            "bootstrap_port": address.bootstrap_port,
            "bootstrap_room": room,
            "rid": attempt.rids[0],
            **more,
        }
        return key_prefix(keys, job.rest)

    def _key_lists(self, attempt: Attempt, prompts: int) -> dict[str, Any]:
        keys: dict[str, Any] = {"rid": attempt.rids}
        if attempt.choice.prefill is not None:
            address = attempt.choice.prefill.address
            keys["bootstrap_host"] = [address.bootstrap_host] * prompts
            keys["bootstrap_port"] = [address.bootstrap_port] * prompts
            keys["bootstrap_room"] = [self._random_room() for _ in range(prompts)]
        return keys

    async def _connect(
        self, attempt: Attempt, first: UpstreamConnection | None, second: UpstreamConnection | None
    ) -> tuple[UpstreamConnection | None, UpstreamConnection | None]:
        """Connects what is missing. On failure tells the attempt and returns no decode connection."""
        prefill, decode = attempt.upstreams
        got: list[UpstreamConnection] = []

        async def get(upstream: Upstream, taken: UpstreamConnection | None) -> UpstreamConnection:
            connection = taken or upstream.take() or await upstream.connect(self._limits.connect_s)
            got.append(connection)
            return connection

        wanted = [get(decode, second)] + ([get(prefill, first)] if prefill is not None else [])
        attempt.connecting = asyncio.gather(*wanted, return_exceptions=True)
        try:
            results = await attempt.connecting
        except BaseException as error:
            for connection in (*got, *(c for c in (first, second) if c is not None)):
                connection.abandon()
            if attempt.lost and isinstance(error, asyncio.CancelledError) and not _is_cancelled():
                return None, None  # an engine was given up meanwhile: nobody cancelled us
            raise
        finally:
            attempt.connecting = None
        errors = [r for r in results if isinstance(r, BaseException)]
        if not errors and not attempt.finished:
            opened = [r for r in results if isinstance(r, UpstreamConnection)]
            return (opened[1] if prefill is not None else None), opened[0]
        for connection in got:
            connection.abandon()
        self._report_unconnected(attempt, results)
        return None, None

    def _report_unconnected(self, attempt: Attempt, results: Sequence[object]) -> None:
        engines = [attempt.choice.decode, attempt.choice.prefill]
        for engine, result in zip(engines, results, strict=False):
            if not isinstance(result, EngineError):
                if isinstance(result, BaseException):
                    raise result
                continue
            assert engine is not None
            attempt.blamed.append(engine.id)
            self._on_refused(engine.id)
            if not attempt.finished:
                attempt.unconnected(DecodeFailed(result) if engine is attempt.choice.decode else PrefillFailed(result))

    # --- what the controller asks

    def engine_lost(self, engine: EngineId, cause: str) -> None:
        """Nothing that runs on this engine will be answered: its attempts end now, and are made anew where the client has heard nothing."""
        for attempt in list(self._live):
            attempt.engine_lost(engine, cause)

    def move(self, engine: EngineId, cause: str) -> int:
        """Has what runs on this engine go on on others, where that is possible; the rest stays. Returns how many attempts moved."""
        here = [a for a in self._live if not a.finished and a.works_on(engine) and a.may_move is not None and a.may_move()]
        for attempt in here:
            attempt.engine_lost(engine, cause)
            attempt.moved = attempt.finished
        return sum(attempt.moved for attempt in here)

    def give_up(self, sentence: str) -> None:
        """Ends every attempt, because the router stops."""
        for attempt in list(self._live):
            attempt.give_up(NoCapacityError(sentence, retry_after_s=2))

    def last_bytes_at(self, engine: EngineId) -> float:
        """When bytes of a running answer last came from this engine; 0 for never. Seconds on the monotonic clock, as the loop's."""
        return max((a.last_read_at for a in self._live if a.choice.decode.id == engine and not a.finished), default=0.0)

    def holds(self, now: float) -> list[Hold]:
        """What is held on engines: by every attempt that an engine may still work for, those included whose client has its end already."""
        return [hold for attempt in self._live for hold in attempt.holds(now)]

    def legs_of(self, slot: int) -> int:
        """How many legs run on the engine in this slot."""
        counts = self.admission.books.in_flight.now
        return counts[slot] if slot < len(counts) else 0

    def long_s(self, slot: int) -> float:
        """For how long the engine in this slot may seem to stand still, because of a long prompt that it was given, seconds."""
        return self.admission.books.forecast.patience_s(slot)

    async def ask(self, choice: Choice, body: bytes) -> bytes:
        """Has this very pair, or unified engine, answer one ``/generate`` request of the router's own.

        Returns:
            The answer's body.

        Raises:
            DisaggError: there is none within `PROVE_LIMIT_S`.
        """
        leg = await self._ask(self.admission.promise(choice), body, lambda attempt, _number: WholeLeg(attempt))
        assert isinstance(leg, WholeLeg)
        return leg.body

    async def time(self, choice: Choice, body: bytes, tokens: int, answer: int) -> Sequence[float]:
        """Has this very pair, or unified engine, stream the answer to one ``/generate`` request of the router's own, to measure them.

        Args:
            choice: the engines.
            body: of the request.
            tokens: of its prompt, of which no engine holds anything.
            answer: tokens of its answer.

        Returns:
            When its events came, on the relay's clock.

        Raises:
            DisaggError: there is no whole answer within `PROVE_LIMIT_S`.
        """
        promise = self.admission.promise(choice, tokens + answer)
        reader = choice.prefill or choice.decode
        promise.reading = self.admission.books.forecast.sent(reader.slot, tokens, now=self.clock(), of_client=False)
        leg = await self._ask(promise, body, lambda attempt, _number: TimedLeg(attempt))
        assert isinstance(leg, TimedLeg)
        return leg.times

    async def _ask(self, promise: Promise, body: bytes, leg: LegFactory) -> DecodeLeg:
        began = self.clock()
        request = parse_request(Route.GENERATE, body)
        job = Job(
            request,
            request.rest,
            0,
            began + PROVE_LIMIT_S,
            Record(f"{self._random_room():016x}{self._random_room():016x}", request.path, began),
        )
        attempt = self.attempt(job, promise)
        try:
            await self.send(attempt, job, leg)
            while not attempt.finished:
                await attempt.wait()
        finally:
            attempt.client_left()
        if attempt.error is not None:
            raise attempt.error
        assert attempt.decode_leg is not None
        return attempt.decode_leg

    async def post(self, engine: EngineView, path: str, body: bytes, limit_s: float) -> bytes:
        """Posts JSON to one engine and returns the answer's body.

        Raises:
            EngineError: there is none within `limit_s` seconds, or it is an error.
        """
        upstream = self._upstream(engine)
        connection = await upstream.connect(min(limit_s, self._limits.connect_s))  # a new one: none that the engine may just be closing
        exchange = _Exchange(engine, self.loop.create_future())
        connection.send(exchange, upstream.request(path, body))
        try:
            async with asyncio.timeout(limit_s):
                return await exchange.answer
        except TimeoutError as error:
            raise EngineTimeoutError(f"the engine {engine.id} did not answer within {limit_s:g} s") from error
        finally:
            connection.abandon()

    async def outcome(self, attempt: Attempt, client: Client) -> None:
        """Waits for the end of an attempt, and for a client that reads slowly in between."""
        while not attempt.finished:
            if attempt.on_wake is not None:
                attempt.on_wake()
            if attempt.stalled:
                try:
                    await client.drain(CLIENT_STALL_S)
                except ConnectionResetError as error:
                    raise ClientGoneError(str(error)) from error
                attempt.resume()
            else:
                await attempt.wait()

    # --- the attempt's owner

    def handed_over(self, attempt: Attempt, now: float) -> None:
        """The prompt is read and decode has its KV cache."""
        work = attempt.work
        if work is None:
            return
        attempt.work = None
        choice = attempt.choice
        self.pace.left(attempt.reader, attempt.prompt_bytes)
        self.pace.handed_over(attempt.reader, now=now)
        if choice.prefill is not None or not attempt.whole:
            prefill_slot = choice.prefill.slot if choice.prefill is not None else None
            self.pace.first_token(prefill_slot, choice.decode.slot, work, now - attempt.sent_at)
        attempt.promise.read(now, whole=attempt.whole)
        self._on_handed_over(choice)
        if attempt.on_handed_over is not None:
            attempt.on_handed_over()

    def reads_until(self, attempt: Attempt) -> float:
        """As `Owner` of attempts."""
        return self.pace.reads_until(attempt.reader, attempt.choice.decode.slot, attempt.sent_at)

    def settled(self, attempt: Attempt) -> None:
        """No engine works for this attempt any more."""
        if attempt.work is not None:
            attempt.work = None
            self.pace.left(attempt.reader, attempt.prompt_bytes)
        self._live.pop(attempt, None)
        if attempt.handoff.state is not State.DONE:
            self.unconfirmed.append((self.clock(), tuple(e.id for e in (attempt.choice.prefill, attempt.choice.decode) if e), attempt.rids))
        self.metrics.handoffs[attempt.handoff.state] += 1

    def abort_rids(self, upstream: Upstream, rids: Sequence[str]) -> None:
        """Posts an abort for each rid, over idle connections where there are any."""
        for rid in rids:
            connection = upstream.take()
            if connection is None:
                self._spawn(self._abort_anew(upstream, rid), f"abort {rid}")
            else:
                self._post_abort(connection, upstream, rid)

    async def _abort_anew(self, upstream: Upstream, rid: str) -> None:
        try:
            connection = await upstream.connect(self._limits.connect_s)
        except (EngineError, NoCapacityError):
            return  # an engine that is gone holds nothing; where no file is free, closing the connection must do
        self._post_abort(connection, upstream, rid)

    def _post_abort(self, connection: UpstreamConnection, upstream: Upstream, rid: str) -> None:
        self._aborts[connection] = self.clock() + ABORT_LIMIT_S
        connection.send(_AbortLeg(self._aborts, connection), upstream.request("/abort_request", b'{"rid":"%s"}' % rid.encode()))

    # --- what people look at

    def waterfall(self, request_id: str) -> Mapping[str, Any] | None:
        """The story of one request, times in seconds since it arrived."""
        record = self.records.get(request_id)
        return None if record is None else _waterfall(record)

    def __repr__(self) -> str:
        return f"<Relay live={len(self._live)} aborts={len(self._aborts)} upstreams={len(self._upstreams)}>"


class _Exchange:
    """One small question and its whole answer."""

    __slots__ = ("_engine", "_parts", "_size", "_status", "answer")

    def __init__(self, engine: EngineView, answer: asyncio.Future[bytes]) -> None:
        self.answer = answer
        self._engine = engine
        self._status = 0
        self._size = 0
        self._parts: list[bytes] = []

    def head(self, status: int, *, is_stream: bool) -> None:
        """The response head arrived."""
        self._status = status

    def payload(self, data: bytes) -> None:
        """A part of the body."""
        self._size += len(data)
        if self._size <= ANSWER_LIMIT:
            self._parts.append(data)
        elif not self.answer.done():
            self.answer.set_exception(EngineError(f"the engine {self._engine.id} sent an answer over the limit"))

    def frames(self, raw: bytes, aligned: bool) -> None:
        """Whole HTTP chunks."""
        for data in unframe(raw):
            self.payload(data)

    def ended(self) -> None:
        """The answer is complete."""
        if self.answer.done():
            return
        body = b"".join(self._parts)
        error = refusal(self._engine, self._status, body)
        if error is None:
            self.answer.set_result(body)
        else:
            self.answer.set_exception(error)

    def broken(self, error: EngineError, *, stale: bool) -> None:
        """The connection is gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


class _AbortLeg:
    """The answer to an abort says nothing worth reading."""

    __slots__ = ("_aborts", "_connection")

    def __init__(self, aborts: dict[UpstreamConnection, float], connection: UpstreamConnection) -> None:
        self._aborts = aborts
        self._connection = connection

    def head(self, status: int, *, is_stream: bool) -> None:
        """Ignored."""

    def payload(self, data: bytes) -> None:
        """Ignored."""

    def frames(self, raw: bytes, aligned: bool) -> None:
        """Ignored."""

    def ended(self) -> None:
        """The connection is free again."""
        self._aborts.pop(self._connection, None)

    def broken(self, error: EngineError, *, stale: bool) -> None:
        """The machine repeats an abort as long as the leg lives."""
        self._aborts.pop(self._connection, None)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _waterfall(record: Record) -> dict[str, Any]:
    return {
        "id": record.request_id,
        "route": record.route,
        "model": record.model,
        "outcome": record.outcome,
        "error": record.error or None,
        "attempts": [_attempt_story(*attempt, record.started_at) for attempt in record.trail],
    }


def _attempt_story(choice: Choice, rids: Sequence[str], handoff: Handoff | Told, started_at: float) -> dict[str, Any]:
    return {
        "rids": list(rids),
        "prefill": choice.prefill.id if choice.prefill is not None else None,
        "decode": choice.decode.id,
        "reason": choice.reason,
        "state": handoff.state.value,
        "events": [{"at_s": round(at - started_at, 6), "event": name} for at, name in handoff.history],
    }
