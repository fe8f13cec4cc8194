"""The engine: the parts put together, and the one loop that turns steps.

Everything but the arithmetic happens in the event loop's thread: HTTP, transfers, scheduling, text. The arithmetic of a step
runs in one other thread, which during the step alone touches the samplers and the pages of the step's rows. After a step the
next one is submitted before the handlers get to write what came, so that writing and computing overlap.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from disagg.engines.embedded.faults import Faults
from disagg.engines.embedded.frames import HandedOver, Hello, Profile
from disagg.engines.embedded.generation import Ask, Generation, Inbox, InputLogprob, Text
from disagg.engines.embedded.links import ReceiveLink, SendLink, die, leads_to
from disagg.engines.embedded.pace import stand_in_token
from disagg.engines.embedded.pages import PagePool, PrefixCache, pages_for
from disagg.engines.embedded.sampler import Sampled, Sampler, best_tokens, greedy_batch, input_logprobs, log_softmax
from disagg.engines.embedded.scheduler import Computed, Finish, Finished, Job, Leg, Made, Phase, Row, Scheduler
from disagg.engines.embedded.switch import Situation, SwitchBody, Switched, flips, judge
from disagg.engines.embedded.transfer import Limits, Receiver, Rooms, RoomUsedError, Sender
from disagg.engines.embedded.transformer import Segment, Transformer
from disagg.errors import EngineError, NoCapacityError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from disagg.engines.embedded.checkpoint import ModelConfig
    from disagg.engines.embedded.generation import Room
    from disagg.engines.embedded.pace import Pace
    from disagg.engines.embedded.tokens import Tokenizer

PROBE_HOST = "2.2.2.2"
"""SGLang's bootstrap host of a health probe: such a request is served by this engine alone."""
TICK_S = 0.1
FLUSH_S = 0.02
"""How long dying at a token waits, so that the tokens before it are on the wire."""


class Settings(NamedTuple):
    """What an engine is started with; the defaults are the flags' defaults.

    Attributes:
        role: at the start; ``null`` (unified), ``prefill`` or ``decode``, as SGLang says.
        context_length: prompt and answer together, tokens.
        max_total_tokens: size of the KV pool, tokens.
        pace: how long steps last; None: as long as they take.
        compute: False leaves the arithmetic out (paced engines only).
        faults: what goes wrong; None: nothing, and it cannot be set at run time either.
        role_switch: the role can be changed at run time.
        decode_cache: decode engines have a prefix cache too.
    """

    role: str = "null"
    page_size: int = 16
    max_total_tokens: int = 16384
    max_running_requests: int = 64
    chunked_prefill_size: int = 512
    context_length: int = 8192
    bootstrap_port: int = 8998
    limits: Limits = Limits()
    pace: Pace | None = None
    compute: bool = True
    faults: Faults | None = None
    role_switch: bool = False
    decode_cache: bool = False


class Work(NamedTuple):
    """A row of a step with what its token is chosen by: the job may be forgotten while the step is computed."""

    row: Row
    sampler: Sampler
    top_logprobs: int


class Outcome(NamedTuple):
    """What a step computed for one row."""

    sampled: Sampled | None
    inputs: list[InputLogprob]
    error: str = ""


class Totals:
    """Counters since the start. Times in seconds."""

    def __init__(self) -> None:
        self.requests = 0
        self.aborted = 0
        self.steps = 0
        self.prompt_tokens = 0
        self.prefill_tokens = 0
        self.prefill_s = 0.0
        self.decode_steps = 0
        self.decode_rows = 0
        self.decode_s = 0.0
        self.generated_tokens = 0
        self.kv_bytes = 0
        self.kv_count = 0
        self.kv_failed = 0
        self.late_writes = 0
        self.kv_last_s = 0.0
        self.kv_last_bytes = 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=256)  # (when, tokens of the answers) of the last steps

    def throughput(self, now: float) -> float:
        """Answer tokens per second over the last second."""
        return float(sum(count for when, count in self.recent if now - when <= 1.0))


class Engine:
    """Serves one model, in one role at a time.

    Args:
        model: the arithmetic.
        tokenizer: of the same folder.
        model_hash: hex, equal on both sides of a handoff.
        settings: see there.
        pool_type: how pages are kept; a test may compose the engine without the quarantine.

    Attributes:
        role: the live one; ``settings.role`` is the first.
        bootstrap_port: where decode engines meet this one; 0 if nobody listens.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        model_hash: str,
        settings: Settings,
        *,
        pool_type: type[PagePool] = PagePool,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.role = settings.role
        self.config: ModelConfig = model.config
        self.faults = settings.faults or Faults()
        self.totals = Totals()
        self.hung = False
        self.bootstrap_port = 0
        self._bound_host = ""
        self._decoded_before = settings.role == "decode"
        shape = model.config.kv_page_shape(settings.page_size)
        self.profile = Profile(model_hash, "float32", shape)
        self.pool = pool_type(settings.max_total_tokens // settings.page_size, shape)
        self.scheduler: Scheduler[Sampled] = Scheduler(
            self.pool,
            self._new_cache(),
            page_size=settings.page_size,
            max_running=settings.max_running_requests,
            chunk_tokens=settings.chunked_prefill_size,
            leaks=lambda: self.faults.leak,
        )
        self._model = model
        self._generations: dict[str, Generation] = {}  # by job key
        self._keys: dict[str, list[str]] = {}  # job keys by rid
        self._samplers: dict[str, Sampler] = {}
        self._receivers: dict[str, ReceiveLink] = {}
        self._senders: dict[str, SendLink] = {}
        self._links: set[SendLink] = set()
        self._rooms: Rooms[SendLink] = Rooms(settings.limits)
        self._serial = 0
        self._generator = np.random.default_rng()
        self._vocabulary = _plain_tokens(tokenizer, model.config)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    # --- requests come and go ---

    def submit(self, asks: Sequence[Ask], inbox: Inbox) -> list[Generation]:
        """Take in the samples of one HTTP request, all or none.

        Raises:
            RequestError: a sample cannot be served here, a room or id is in use.
            NoCapacityError: the engine stops.
        """
        if self._tasks is None:
            raise NoCapacityError("the engine is stopping")
        if self.faults.strikes("die", "accept"):
            die()
        if self.faults.strikes("hang", "accept"):
            self.hung = True
        for ask in asks:
            self._refuse(ask)
        made: list[Generation] = []
        try:
            for index, ask in enumerate(asks):
                made.append(self._start(ask, inbox, index))
        except RequestError:
            self.cancel(made, "another part of the request was refused")
            raise
        self._admit()
        self._wake.set()
        return made

    def leg_of(self, ask: Ask) -> Leg:
        """Which part this engine plays for a request."""
        if self.role == "null" or (ask.room is not None and ask.room.host == PROBE_HOST):
            return Leg.LOCAL
        return Leg.PREFILL if self.role == "prefill" else Leg.DECODE

    def _refuse(self, ask: Ask) -> None:
        leg = self.leg_of(ask)
        if leg is not Leg.LOCAL and ask.room is None:
            raise RequestError(
                f"this is a {self.role} engine: bootstrap_host, bootstrap_port and bootstrap_room are needed",
                param="bootstrap_room",
            )
        if leg is Leg.DECODE and ask.room is not None and self._is_mine(ask.room):
            raise RequestError(
                f"the bootstrap address of room {ask.room.number} is this engine's own, but it is a decode engine now: the request was"
                " sent as to a prefill engine, send it again to a pair of the present roles",
                param="bootstrap_port",
            )
        if ask.rid in self._keys:
            raise RequestError(f"a request with the id {ask.rid!r} is running", param="rid")
        if not self.scheduler.fits(len(ask.prompt), 1 if leg is Leg.PREFILL else ask.params.max_new_tokens):
            raise RequestError(
                f"{len(ask.prompt)} prompt tokens and {ask.params.max_new_tokens} new ones are more than the"
                f" {self.settings.max_total_tokens} tokens of this engine's KV pool"
            )

    def _is_mine(self, room: Room) -> bool:
        """Whether a room is to be met here: on a decode engine, its leg was meant for the prefill engine that this one was."""
        return bool(self.bootstrap_port) and room.port == self.bootstrap_port and leads_to(room.host, self._bound_host)

    def _start(self, ask: Ask, inbox: Inbox, index: int) -> Generation:
        now = time.monotonic()
        leg = self.leg_of(ask)
        params = ask.params
        text = Text(self.tokenizer, params, ask.prompt)
        generation = Generation(ask, text, inbox, index, now=now)
        eos = () if params.ignore_eos else self.config.eos_ids
        self._serial += 1
        job = Job(
            f"{ask.rid}/{self._serial}",
            ask.prompt,
            1 if leg is Leg.PREFILL else params.max_new_tokens,
            leg=leg,
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            accept=text.accept,
            logprobs_from=ask.logprobs_from if leg is not Leg.DECODE else None,
        )
        generation.job = job
        link = self._enter_room(ask, job, now)
        self.totals.requests += 1
        self.totals.prompt_tokens += len(ask.prompt)
        self._generations[job.rid] = generation
        self._keys.setdefault(ask.rid, []).append(job.rid)
        self._samplers[job.rid] = Sampler(
            params,
            vocab_size=self.config.vocab_size,
            generator=self._generator,
            eos_ids=self.config.eos_ids,
            start=len(ask.prompt),
            top_logprobs=ask.top_logprobs,
        )
        self.scheduler.add(job, now=now)
        if link is not None:
            self._match(job.rid, link, now)
        return generation

    def _enter_room(self, ask: Ask, job: Job, now: float) -> SendLink | None:
        """Reserve the room's number; on prefill, find the connection that waits in it already."""
        if job.leg is Leg.LOCAL or ask.room is None:
            return None
        try:
            return self._rooms.request_came(ask.room.number, job.rid, now=now, alone=job.leg is Leg.DECODE)
        except RoomUsedError as error:
            raise RequestError(str(error), param="bootstrap_room") from error

    def abort(self, rid: str) -> None:
        """End every sample of a request by its exact id; an unknown id does nothing."""
        for key in list(self._keys.get(rid, ())):
            self._abort(key, Finish("abort", sentence="Abort in the middle of generation"))

    def cancel(self, generations: Iterable[Generation], sentence: str) -> None:
        """End these samples, those that live."""
        for generation in generations:
            if generation.job is not None and generation.finish is None:
                self._abort(generation.job.rid, Finish("abort", sentence=sentence))

    def _abort(self, key: str, finish: Finish) -> None:
        if self.hung:
            return  # as with a real engine: a scheduler that hangs hears no abort
        self._digest(self.scheduler.abort(key, finish, now=time.monotonic()))
        self._admit()
        self._wake.set()

    def abort_all(self) -> None:
        """End everything."""
        self.cancel(list(self._generations.values()), "everything was aborted")

    def flush_cache(self) -> bool:
        """Forget the prefix cache. False, and nothing done, while requests run."""
        if self.scheduler.jobs:
            return False
        if self.scheduler.cache is not None:
            self.scheduler.cache.clear()
        return True

    # --- the role ---

    def switch_role(self, body: SwitchBody) -> Switched:
        """Change the role, or say why not. There is no moment between looking and changing in which a request could come."""
        situation = Situation(
            self.settings.role_switch,
            self.role,
            self._busy(),
            decoded_before=self._decoded_before,
            broken=self.faults.refuse_switch,
        )
        answer = judge(body, situation)
        if flips(body, answer):
            self._become(answer.new_role)
        return answer

    def _busy(self) -> str:
        """What is not over yet, in words; empty when nothing is."""
        held = {
            "samples": self.live,
            "transfers out": sum(link.sending for link in self._links),
            "transfers in": len(self._receivers),
            "pages held": self.pool.held,
            "pages in quarantine": self.pool.quarantined,
        }
        words = [f"{count} {name}" for name, count in held.items() if count]
        return ", ".join(words) if words or self.scheduler.idle else "a step is being computed"

    def _become(self, role: str) -> None:
        """The engine is idle: the pool and the weights stay, whatever belongs to the old role goes."""
        for link in list(self._links):
            self._turn_away(link, f"this engine stops being a {self.role} engine and becomes a {role} engine")
        if self.scheduler.cache is not None:
            self.scheduler.cache.clear()
        self.role = role
        self._decoded_before |= role == "decode"
        self.scheduler.cache = self._new_cache()

    def _new_cache(self) -> PrefixCache | None:
        """As with SGLang, whose decode engines start without a prefix cache and do not get one by a switch either."""
        without = "decode" in {self.role, self.settings.role} and not self.settings.decode_cache
        return None if without else PrefixCache(self.pool, self.settings.page_size)

    def _turn_away(self, link: SendLink, sentence: str) -> None:
        """A connection whose request is not here and will not come."""
        link.refuse(sentence)
        if link.hello is not None:
            self._rooms.link_gone(link.hello.room, link, sentence, now=time.monotonic())

    @property
    def live(self) -> int:
        """Samples that are not finished."""
        return len(self._generations)

    @property
    def computing(self) -> bool:
        """Whether there is something for a step to do."""
        return self.scheduler.count(Phase.PREFILLING, Phase.DECODING) > 0

    # --- life ---

    async def run(self, *, bootstrap_host: str, started: asyncio.Event) -> None:
        """Turn steps until cancelled. Sets ``started`` when requests may come.

        Raises:
            OSError: the bootstrap port cannot be listened on.
        """
        server = await self._listen(bootstrap_host)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._turn(), name="embedded steps")
                tasks.create_task(self._tick(), name="embedded clock")
                started.set()
        finally:
            self._tasks = None
            if server is not None:
                server.close()
            for link in list(self._links):
                link.refuse("the prefill engine stops")
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def _listen(self, host: str) -> asyncio.Server | None:
        if self.role == "null" or (self.role == "decode" and not self.settings.role_switch):
            return None
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._new_link, host, self.settings.bootstrap_port)
        self._bound_host, self.bootstrap_port = server.sockets[0].getsockname()[:2]
        return server

    def _new_link(self) -> SendLink:
        link = SendLink(self)
        self._links.add(link)
        return link

    async def _tick(self) -> None:
        """Limits, and signs of life to those decode engines whose prompt waits here."""
        steps = -1
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self._expire(now)
            for receiver in list(self._receivers.values()):
                receiver.tick(now)
            moved, steps = self.totals.steps != steps, self.totals.steps
            for sender in list(self._links):
                sender.tick(now)
                if moved:
                    sender.progress()
                if sender.hello is None and now > sender.opened_at + self.settings.limits.stall_s:
                    sender.refuse("no HELLO came")

    def _expire(self, now: float) -> None:
        waited = f"within {self.settings.limits.bootstrap_s:g} s"
        requests, links = self._rooms.expire(now=now)
        for room, key in requests:
            self._abort(key, Finish("abort", sentence=f"decode did not connect for room {room} {waited}", status=500))
        for room, link in links:
            link.refuse(f"no request for room {room} came to prefill {waited}")

    async def _turn(self) -> None:
        while True:
            if self.hung:
                await asyncio.get_running_loop().create_future()
            self._admit()
            rows = self.scheduler.plan(now=time.monotonic())
            if not rows:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._strike_before(rows)
            outcomes, elapsed = await self._step(rows)
            self._strike_after(rows)
            self._finish_step(rows, outcomes, elapsed)

    async def _step(self, rows: Sequence[Row]) -> tuple[list[Outcome], float]:
        began = time.monotonic()
        if self.settings.compute:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, self._works(rows))
        else:
            outcomes = [self._stand_in(row) for row in rows]
        if self.settings.pace is not None:
            prompt_tokens = sum(row.end - row.start for row in rows if row.job.phase is Phase.PREFILLING)
            decoding = sum(row.job.phase is Phase.DECODING for row in rows)
            lasts = self.settings.pace.step_s(prompt_tokens, decoding)
            await asyncio.sleep(max(0.0, lasts - (time.monotonic() - began)))
        if self.faults.slow > 1:
            await asyncio.sleep((time.monotonic() - began) * (self.faults.slow - 1))
        return outcomes, time.monotonic() - began

    def _works(self, rows: Sequence[Row]) -> list[Work]:
        return [Work(row, self._samplers[row.job.rid], self._generations[row.job.rid].ask.top_logprobs or 0) for row in rows]

    # --- in the compute thread ---

    def _compute(self, works: Sequence[Work]) -> list[Outcome]:
        segments = [Segment(row.job.tokens[row.start : row.end], row.start, row.job.pages, row.all_logits) for row, _, _ in works]
        logits = self._model.forward(segments, self.pool.kv)
        plain = [at for at, work in enumerate(works) if work.row.sample and work.sampler.plain]
        chosen = _choose_plain([works[at].sampler for at in plain], [logits[at] for at in plain])
        quick = dict(zip(plain, chosen, strict=True))
        return [quick.get(at) or _outcome(work, logits[at]) for at, work in enumerate(works)]

    def _stand_in(self, row: Row) -> Outcome:
        if not row.sample:
            return Outcome(None, [])
        token = stand_in_token(row.job.tokens[: row.end], self._vocabulary)
        return Outcome(Sampled(token, math.nan, []), [])

    # --- after a step ---

    def _finish_step(self, rows: Sequence[Row], outcomes: Sequence[Outcome], elapsed: float) -> None:
        now = time.monotonic()
        self._count(rows, elapsed, now)
        for row, outcome in zip(rows, outcomes, strict=True):
            generation = self._generations.get(row.job.rid)
            if generation is None:
                continue
            generation.take_input_logprobs(outcome.inputs)
            if outcome.error:
                finish = Finish("abort", sentence=outcome.error, status=500)
                self._digest(self.scheduler.abort(row.job.rid, finish, now=now))
        self._digest(self.scheduler.apply([outcome.sampled for outcome in outcomes], now=now))

    def _count(self, rows: Sequence[Row], elapsed: float, now: float) -> None:
        totals = self.totals
        prompt_tokens = sum(row.end - row.start for row in rows if row.job.phase is Phase.PREFILLING)
        decoding = sum(row.job.phase is Phase.DECODING for row in rows)
        totals.steps += 1
        if prompt_tokens:
            totals.prefill_tokens += prompt_tokens
            totals.prefill_s += elapsed
        elif decoding:
            totals.decode_steps += 1
            totals.decode_rows += decoding
            totals.decode_s += elapsed
        totals.recent.append((now, sum(row.sample for row in rows)))

    def _admit(self) -> None:
        now = time.monotonic()
        for job in self.scheduler.admit(now=now):
            if job.phase is Phase.RECEIVING:
                self._receive(job, now)

    def _digest(self, events: Iterable[Made[Sampled] | Computed | Finished]) -> None:
        now = time.monotonic()
        for event in events:
            match event:
                case Made(job, sampled):
                    self.totals.generated_tokens += 1
                    self._generations[job.rid].take(sampled, now=now)
                    if job.leg is Leg.PREFILL:
                        self._send_end(job, sampled)
                case Computed(job):
                    self._send_pages(job)
                case Finished(job):
                    self._end(job, now)

    def _end(self, job: Job, now: float) -> None:
        assert job.finish is not None
        generation = self._generations.pop(job.rid)
        del self._samplers[job.rid]
        keys = self._keys[generation.ask.rid]
        keys.remove(job.rid)
        if not keys:
            del self._keys[generation.ask.rid]
        sentence = job.finish.sentence or "it is done"
        if job.leg is not Leg.LOCAL and generation.ask.room is not None:
            self._rooms.end(generation.ask.room.number, sentence, now=now)
        if job.finish.kind == "abort":
            self.totals.aborted += 1
        sender = self._senders.pop(job.rid, None)
        if sender is not None and sender.sending:
            sender.refuse(sentence)
        receiver = self._receivers.get(job.rid)
        if receiver is not None:
            receiver.cancel(sentence)
        generation.end(job.finish, now=now)

    # --- prefill's end of a handoff ---

    def kv_greeted(self, link: SendLink, hello: Hello) -> None:
        """Decode named its pages: see whether they fit, and whether the request is here."""
        now = time.monotonic()
        if self.role != "prefill":
            self._greeted_in_vain(link, hello)
            return
        difference = self.profile.difference(hello.profile)
        try:
            key = self._rooms.link_came(hello.room, link, now=now)
        except RoomUsedError as error:
            link.refuse(str(error))
            return
        if difference is not None:
            self._rooms.end(hello.room, difference, now=now)
            link.refuse(difference)
            if key is not None:
                self._abort(key, Finish("abort", sentence=difference, status=500))
        elif key is not None:
            self._match(key, link, now)

    def _greeted_in_vain(self, link: SendLink, hello: Hello) -> None:
        """An engine that is decode now is taken for prefill: by another engine, or by itself, in a leg that was meant for prefill."""
        sentence = f"the engine at this bootstrap port is a decode engine now, room {hello.room} cannot be met here"
        link.refuse(sentence)
        for key, receiver in list(self._receivers.items()):
            if receiver.machine.hello == hello:
                self._abort(key, Finish("abort", sentence=sentence, status=400))

    def _match(self, key: str, link: SendLink, now: float) -> None:
        assert link.hello is not None
        job = self.scheduler.jobs[key]
        needed = pages_for(len(job.prompt), self.settings.page_size)
        if len(link.hello.pages) != needed:
            sentence = f"decode reserved {len(link.hello.pages)} pages, the prompt needs {needed}: the prompts differ"
            link.refuse(sentence)
            self._abort(key, Finish("abort", sentence=sentence, status=500))
            return
        self._senders[key] = link
        link.start(key, Sender(link.hello, page_bytes=self.pool.page_bytes, limits=self.settings.limits, now=now))
        self.scheduler.bootstrapped(key, now=now)
        self._wake.set()

    def _send_pages(self, job: Job) -> None:
        link = self._senders.get(job.rid)
        if link is None or link.machine is None:
            return
        size = self.settings.page_size
        complete = job.computed // size if job.computed < len(job.prompt) else pages_for(len(job.prompt), size)
        link.machine.push(job.pages[len(link.machine.pushed) : complete])
        link.pump()

    def _send_end(self, job: Job, sampled: Sampled) -> None:
        link = self._senders.get(job.rid)
        if link is not None and link.machine is not None:
            logprob = None if math.isnan(sampled.logprob) else sampled.logprob  # JSON has no NaN
            link.machine.finish(HandedOver(sampled.token, logprob, sampled.top, job.cached))
            link.pump()

    def kv_handed_over(self, key: str, sent_bytes: int, seconds: float) -> None:
        """Decode has acknowledged everything."""
        self._count_transfer(sent_bytes, seconds)
        if key in self.scheduler.jobs:
            self._digest(self.scheduler.handed_over(key, now=time.monotonic()))
        self._admit()
        self._wake.set()

    def kv_send_failed(self, key: str, sentence: str) -> None:
        """The handoff ended without success."""
        self.totals.kv_failed += key in self.scheduler.jobs
        self._senders.pop(key, None)
        self._abort(key, Finish("abort", sentence=f"KV transfer failed: {sentence}", status=500))

    def kv_link_gone(self, link: SendLink) -> None:
        """The connection is closed."""
        self._links.discard(link)
        if link.hello is not None and link.machine is None:
            self._rooms.link_gone(link.hello.room, link, "decode closed its connection", now=time.monotonic())

    # --- decode's end of a handoff ---

    def _receive(self, job: Job, now: float) -> None:
        """The pages are reserved: connect to prefill and name them."""
        room = self._generations[job.rid].ask.room
        assert room is not None
        assert self._tasks is not None
        needed = pages_for(len(job.prompt), self.settings.page_size)
        hello = Hello(room.number, self.profile, tuple(job.pages[:needed]))
        machine = Receiver(hello, page_bytes=self.pool.page_bytes, limits=self.settings.limits, now=now)
        link = self._receivers[job.rid] = ReceiveLink(job.rid, machine, self)
        self._tasks.create_task(self._connect(link, room.host, room.port), name=f"connect to room {room.number}")

    async def _connect(self, link: ReceiveLink, host: str, port: int) -> None:
        try:
            async with asyncio.timeout(self.settings.limits.bootstrap_s):
                await asyncio.get_running_loop().create_connection(lambda: link, host.strip("[]"), port)
        except (OSError, TimeoutError, UnicodeError) as error:
            link.lost(f"prefill's bootstrap port {port} cannot be reached: {error}")

    def kv_arrived(self, key: str, handed: HandedOver) -> None:
        """The pages are complete."""
        if self.hung:
            return  # as with a real engine: a scheduler that hangs takes nothing over, and its counters stand still
        link, job = self._receivers[key], self.scheduler.jobs[key]
        self._count_transfer(link.machine.bytes_received, link.machine.seconds)
        job.cached = handed.cached_tokens
        self._samplers[key].accept(handed.token)
        sampled = Sampled(handed.token, math.nan if handed.logprob is None else handed.logprob, handed.top)
        self._digest(self.scheduler.arrived(key, sampled, now=time.monotonic()))
        self._wake.set()

    def kv_failed(self, key: str, sentence: str) -> None:
        """The pages will never be complete."""
        self.totals.kv_failed += key in self.scheduler.jobs
        self._abort(key, Finish("abort", sentence=f"KV transfer failed: {sentence}", status=500))

    def kv_writer_done(self, key: str, late_writes: int) -> None:
        """Nobody writes into the pages any more."""
        self.totals.late_writes += late_writes
        self._receivers.pop(key, None)
        self.scheduler.writer_done(key)
        self._admit()
        self._wake.set()

    def _count_transfer(self, moved: int, seconds: float) -> None:
        totals = self.totals
        totals.kv_count += 1
        totals.kv_bytes += moved
        totals.kv_last_bytes, totals.kv_last_s = moved, seconds

    # --- faults ---

    async def _strike_before(self, rows: Sequence[Row]) -> None:
        """Faults at a token: the step that would make one more is not computed."""
        for row in rows:
            if row.job.phase is not Phase.DECODING:
                continue
            if self.faults.strikes("hang", "token", row.job.made):
                self.hung = True
                await asyncio.get_running_loop().create_future()
            if self.faults.strikes("die", "token", row.job.made):
                await asyncio.sleep(FLUSH_S)
                die()

    def _strike_after(self, rows: Sequence[Row]) -> None:
        for row in rows:
            percent = 100 * row.end / len(row.job.prompt)
            if row.job.made == 0 and self.faults.strikes("die", "prefill", percent):
                die()
            if row.job.made == 0 and self.faults.strikes("hang", "prefill", percent):
                self.hung = True

    def __repr__(self) -> str:
        return f"<Engine {self.role}, {len(self._links)} links in, {len(self._receivers)} out, {self.scheduler!r}>"


def _choose_plain(samplers: Sequence[Sampler], logits: Sequence[np.ndarray]) -> list[Outcome | None]:
    """The best token of each, in one go."""
    if not samplers:
        return []
    try:
        tokens = greedy_batch(np.concatenate([table[-1:] for table in logits]))
    except EngineError:
        return [None] * len(samplers)  # one by one, to see which one is broken
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.accept(int(token))
    return [Outcome(Sampled(int(token), math.nan, []), []) for token in tokens]


def _outcome(work: Work, logits: np.ndarray) -> Outcome:
    try:
        inputs = _prompt_logprobs(work, logits) if work.row.all_logits else []
        sampled = work.sampler.sample(logits[-1]) if work.row.sample else None
    except EngineError as error:
        return Outcome(None, [], str(error))
    return Outcome(sampled, inputs)


def _prompt_logprobs(work: Work, logits: np.ndarray) -> list[InputLogprob]:
    """Logprobs of the prompt tokens that follow this row's positions."""
    row, job = work.row, work.row.job
    first = max(row.start, (job.logprobs_from or 0) - 1)
    last = min(row.end, len(job.prompt) - 1)
    if first >= last:
        return []
    targets = job.prompt[first + 1 : last + 1]
    table = logits[first - row.start : last - row.start]
    wanted = work.top_logprobs
    tops = [best_tokens(line, wanted) for line in log_softmax(table)] if wanted else [[]] * len(targets)
    return [
        InputLogprob(int(token), float(logprob), top)
        for token, logprob, top in zip(targets, input_logprobs(table, targets), tops, strict=True)
    ]


def _plain_tokens(tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Tokens that decode to printable ASCII: what a stand-in may say. Never one that ends an answer."""
    plain = [
        token
        for token in range(min(config.vocab_size, 4096))
        if token not in config.eos_ids and not tokenizer.is_special(token) and _printable(tokenizer.token_bytes(token))
    ]
    return plain or [0]


def _printable(content: bytes) -> bool:
    return content.isascii() and content.decode("ascii").isprintable() and content.strip() != b""
