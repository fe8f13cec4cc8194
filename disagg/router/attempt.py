"""One attempt: the hands of one `Handoff`. Two legs on two engines, one answer.

Ownership:  relay ──► attempt ──► handoff (decides)
                         ├──► prefill leg ──► connection to the prefill engine     its answer is drained
                         └──► decode leg  ──► connection to the decode engine      its answer goes to the client

The legs report what they see as events; the attempt carries out the commands. Everything here is synchronous: it runs inside
`data_received`, and only the relay's handler task waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from disagg.errors import DisaggError, EngineError, EngineRefusedError, EngineTimeoutError
from disagg.handoff import (
    FINAL,
    AbortDecode,
    AbortPrefill,
    ClientLeft,
    CloseDecode,
    ClosePrefill,
    Command,
    DecodeFailed,
    DecodeFinished,
    Dispatched,
    Event,
    FailClient,
    FinishClient,
    FirstTokenSeen,
    Handoff,
    LegsSent,
    PrefillFailed,
    PrefillFinished,
    State,
    Tick,
)
from disagg.model import EngineId, EngineView
from disagg.policy.holds import Hold
from disagg.router.admission import Promise
from disagg.router.openai import split_failure
from disagg.router.upstream import Upstream, UpstreamConnection, unframe

ANSWER_LIMIT = 64 * 1024 * 1024


class Owner(Protocol):
    """What an attempt needs of the relay."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]

    def abort_rids(self, upstream: Upstream, rids: Sequence[str]) -> None:
        """Posts an abort for each rid."""

    def handed_over(self, attempt: Attempt, now: float) -> None:
        """The prompt is read and decode has its KV cache."""

    def reads_until(self, attempt: Attempt) -> float:
        """Until when its prompt may take, as its reader is at work; -inf if nothing was seen of it."""

    def settled(self, attempt: Attempt) -> None:
        """No engine works for this attempt any more."""


class Attempt:
    """One attempt in flight.

    Args:
        owner: the relay.
        promise: the pair, or the unified engine, and its places there.
        rids: the engine-side request ids, one for each prompt.
        prefill, decode: the engines' connections; prefill is None for a unified engine.

    Attributes:
        finished: the client's side is over; `error` says why, None when it has the whole answer.
        stalled: the client reads too slowly; the waiting task drains it and calls `resume`.
        last_read_at: when decode's bytes were last seen.
        connecting: both connections being made, None when that is over.
        is_stale: a connection was reused that its engine had just closed.
        sent: both legs were sent: an engine may have worked on it.
        sent_at: when.
        was_paused: it was stalled since somebody last looked.
        whole: the answer is no stream: its first byte comes with its last.
        prompt_bytes: of its body.
        work: bytes that the reader of its prompt had to read until it was through; None before it was sent, and once it is through.
        broken: the engines that closed a connection in the middle.
        blamed: the engines whose fault its failure is, where that is known.
        lost: the engines that were lost under it.
        may_move: set by an owner who can have the rest of it made on other engines; says whether that is so now.
        moved: it was ended for that reason, which is nobody's fault.
        on_handed_over: called when its prompt is read and handed over.
        on_prefill_answer: called with prefill's whole body when it ended with success.
        on_wake: called by the waiting task each time it wakes; takes what an `EventLeg` has collected.
        request_id: whose attempt it is.
        asked: how many requests each engine makes of it: its prompts times its samples.
    """

    __slots__ = (
        "_waiter",
        "asked",
        "blamed",
        "broken",
        "choice",
        "connecting",
        "decode_connection",
        "decode_leg",
        "error",
        "finished",
        "first_token_at",
        "handoff",
        "is_stale",
        "last_read_at",
        "lost",
        "may_move",
        "moved",
        "on_handed_over",
        "on_prefill_answer",
        "on_wake",
        "owner",
        "prefill_connection",
        "promise",
        "prompt_bytes",
        "request_id",
        "rids",
        "sent",
        "sent_at",
        "stalled",
        "upstreams",
        "was_paused",
        "whole",
        "work",
    )

    def __init__(
        self,
        owner: Owner,
        promise: Promise,
        rids: Sequence[str],
        handoff: Handoff,
        prefill: Upstream | None,
        decode: Upstream,
    ) -> None:
        self.owner = owner
        self.promise = promise
        self.choice = promise.choice
        self.rids = rids
        self.handoff = handoff
        self.upstreams: tuple[Upstream | None, Upstream] = (prefill, decode)
        self.finished = False
        self.stalled = False
        self.error: DisaggError | None = None
        self.on_handed_over: Callable[[], None] | None = None
        self.on_prefill_answer: Callable[[bytes], None] | None = None
        self.on_wake: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.prefill_connection: UpstreamConnection | None = None
        self.decode_connection: UpstreamConnection | None = None
        self.decode_leg: DecodeLeg | None = None
        self.first_token_at = 0.0
        self.last_read_at = 0.0
        self.sent = False
        self.is_stale = False
        self.sent_at = 0.0
        self.whole = False
        self.was_paused = False
        self.work: int | None = None
        self.prompt_bytes = 0
        self.broken: list[EngineView] = []
        self.blamed: list[EngineId] = []
        self.lost: list[EngineId] = []
        self.request_id = ""
        self.asked = len(rids)
        self.may_move: Callable[[], bool] | None = None
        self.moved = False
        self.connecting: asyncio.Future[list[UpstreamConnection | BaseException]] | None = None
        handoff.handle(Dispatched(), now=owner.clock())  # its command is to send, which the relay does once both engines are connected

    def send(
        self,
        decode_leg: DecodeLeg,
        connections: tuple[UpstreamConnection | None, UpstreamConnection],
        requests: tuple[bytes, bytes],
    ) -> None:
        """Sends both legs at once, as SGLang's protocol wants it.

        Args:
            decode_leg: what becomes of the answer.
            connections: to prefill (None for a unified engine) and decode.
            requests: the bytes for each, in the same order.
        """
        prefill, decode = connections
        self.sent = True
        self.sent_at = self.owner.clock()
        self.decode_leg = decode_leg
        self.decode_connection = decode
        if prefill is not None:
            self.prefill_connection = prefill
            prefill.send(PrefillLeg(self), requests[0])
        decode.send(decode_leg, requests[1])
        self.handle(LegsSent())

    @property
    def reader(self) -> int:
        """The slot of the engine that reads the prompt."""
        prefill = self.choice.prefill
        return self.choice.decode.slot if prefill is None else prefill.slot

    @property
    def slots(self) -> tuple[int, ...]:
        """Of its engines."""
        prefill, decode = self.choice.prefill, self.choice.decode
        return (decode.slot,) if prefill is None else (prefill.slot, decode.slot)

    def holds(self, now: float) -> Iterator[Hold]:
        """What it holds on its engines, for each leg that may still live there."""
        handoff, prefill, decode = self.handoff, self.choice.prefill, self.choice.decode
        is_connecting = handoff.state is State.BOOTSTRAPPING
        age_s = now - handoff.history[0][0]
        for engine, lives in ((prefill, handoff.prefill_live), (decode, handoff.decode_live)):
            if engine is not None and (lives or is_connecting):
                yield Hold(
                    self.request_id,
                    tuple(self.rids),
                    engine.id,
                    engine.address.role,
                    State.DECODING if self.whole and handoff.state is State.TRANSFERRING else handoff.state,
                    age_s,
                    tokens=self.promise.tokens(engine.slot),
                    requests=self.asked,
                )

    def handle(self, event: Event) -> None:
        """Feeds the machine and does what it says."""
        for command in self.handoff.handle(event, now=self.owner.clock()):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case FinishClient():
                self._resolve(None)
            case FailClient(error=error):
                self._resolve(error)
            case AbortPrefill():
                self._abort(self.upstreams[0])
            case AbortDecode():
                self._abort(self.upstreams[1])
            case ClosePrefill():
                self._close(self.prefill_connection)
                self.prefill_ended(PrefillFailed(EngineError("its leg was closed")))
            case CloseDecode():
                self._close(self.decode_connection)
                self.decode_ended(DecodeFailed(EngineError("its leg was closed")))
            case _:
                raise AssertionError(f"unknown command {command!r}")

    def _abort(self, upstream: Upstream | None) -> None:
        if upstream is not None:
            self.owner.abort_rids(upstream, self.rids)

    def _close(self, connection: UpstreamConnection | None) -> None:
        if connection is not None:
            connection.abandon()

    def _resolve(self, error: DisaggError | None) -> None:
        self.finished = True
        self.error = error
        self.promise.served = error is None
        self.wake()

    def wake(self) -> None:
        """Wakes the task that waits, if one does."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Waits until somebody calls `wake`. The caller looks at the state before and after: a wake-up without a waiter is not kept."""
        self._waiter = self.owner.loop.create_future()
        await self._waiter

    # --- what the legs report

    def first_token(self, now: float) -> None:
        """Decode's first bytes are here."""
        self.first_token_at = self.last_read_at = now
        self.handle(FirstTokenSeen())
        self.owner.handed_over(self, now)

    def prefill_ended(self, event: PrefillFinished | PrefillFailed, *, is_its_fault: bool = True) -> None:
        """Prefill's answer ended, one way or the other."""
        prefill = self.choice.prefill
        assert prefill is not None
        if is_its_fault and not self.finished and isinstance(event, PrefillFailed):
            self.blamed.append(prefill.id)
        self.prefill_connection = None
        if isinstance(event, PrefillFinished):
            self.promise.prompt_read(self.owner.clock())
        self.promise.end(prefill.slot)
        self.handle(event)
        if self.whole and not self.finished:
            self.owner.handed_over(self, self.owner.clock())
        self._settle()

    def decode_ended(self, event: DecodeFinished | DecodeFailed, *, is_its_fault: bool = True) -> None:
        """Decode's answer ended, one way or the other."""
        if is_its_fault and not self.finished and isinstance(event, DecodeFailed):
            self.blamed.append(self.choice.decode.id)
        self.decode_connection = None
        self.promise.end(self.choice.decode.slot)
        self.handle(event)
        self._settle()

    def unconnected(self, event: PrefillFailed | DecodeFailed) -> None:
        """An engine could not be connected: nothing was sent to either."""
        self.handle(event)
        self._settle()

    def engine_lost(self, engine: EngineId, cause: str) -> None:
        """An engine is given up: its leg ends here, and the handoff decides what becomes of the other one."""
        prefill, decode = self.choice.prefill, self.choice.decode
        error = EngineError(f"the engine {engine} was lost: {cause}")
        if self.connecting is not None and engine in {decode.id, prefill.id if prefill is not None else decode.id}:
            self.lost.append(engine)
            self.unconnected(DecodeFailed(error))
            self.connecting.cancel()
            return
        if prefill is not None and prefill.id == engine and self.prefill_connection is not None:
            self._lose(self.prefill_connection, prefill)
            self.prefill_ended(PrefillFailed(error))
        if decode.id == engine and self.decode_connection is not None:
            self._lose(self.decode_connection, decode)
            self.decode_ended(DecodeFailed(error))

    def works_on(self, engine: EngineId) -> bool:
        """True while the client's answer depends on this engine."""
        prefill, decode = self.choice.prefill, self.choice.decode
        if decode.id == engine:
            return True
        return prefill is not None and prefill.id == engine and (self.handoff.prefill_live or self.handoff.state is State.BOOTSTRAPPING)

    def _lose(self, connection: UpstreamConnection, engine: EngineView) -> None:
        connection.abandon()
        self.lost.append(engine.id)
        self.broken.append(engine)

    def client_left(self) -> None:
        """The client closed its connection."""
        if self.handoff.state not in FINAL:
            self.finished = True
            self.handle(ClientLeft())
            self._settle()

    def blamed_engines(self) -> list[EngineView]:
        """The engines that another attempt had better leave alone: those that failed, or both where a deadline tells no names."""
        engines = [e for e in (self.choice.prefill, self.choice.decode) if e is not None]
        guilty = {*self.blamed, *self.lost}
        if not guilty and isinstance(self.error, EngineTimeoutError):
            return engines if not self.first_token_at else [self.choice.decode]
        return [e for e in engines if e.id in guilty]

    def give_up(self, error: DisaggError) -> None:
        """The router itself stops: whoever waits gets this error, and aborts both legs."""
        if not self.finished:
            self._resolve(error)

    def tick(self, now: float) -> None:
        """Called by the relay's one timer."""
        due = self.handoff.next_deadline()
        if due is not None and now >= due and self.handoff.state is State.PREFILLING:
            self.handoff.wait_longer(self.owner.reads_until(self))
            due = self.handoff.next_deadline()
        if due is not None and now >= due:
            self.handle(Tick(now if self.stalled else self.last_read_at))  # a client that reads slowly is not a silent engine
            self._settle()

    def pause(self) -> None:
        """The client reads too slowly: stop reading decode's answer."""
        self.stalled = self.was_paused = True
        if self.decode_connection is not None:
            self.decode_connection.pause()
        self.wake()

    def resume(self) -> None:
        """The client caught up."""
        self.stalled = False
        if self.decode_connection is not None:
            self.decode_connection.resume()

    def _settle(self) -> None:
        if self.handoff.settled:
            self.owner.settled(self)

    def __repr__(self) -> str:
        return f"<Attempt {self.rids[0]} {self.handoff!r}>"


class PrefillLeg:
    """Drains prefill's answer; it is read for an error's sentence and for input logprobs, else dropped."""

    __slots__ = ("_parts", "_size", "_status", "attempt")

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self._status = 0
        self._parts: list[bytes] = []
        self._size = 0

    def head(self, status: int, *, is_stream: bool) -> None:
        """The response head arrived."""
        self._status = status

    def payload(self, data: bytes) -> None:
        """A part of the body."""
        self._size += len(data)
        if self._size <= ANSWER_LIMIT:
            self._parts.append(data)

    def frames(self, raw: bytes, aligned: bool) -> None:
        """Whole HTTP chunks of the body."""
        for data in unframe(raw):
            self.payload(data)

    def ended(self) -> None:
        """The answer is complete."""
        body = b"".join(self._parts)
        self._parts = []
        error = refusal(self.attempt.choice.prefill, self._status, body)
        if error is not None:
            self.attempt.prefill_ended(PrefillFailed(error))
            return
        if self.attempt.on_prefill_answer is not None:
            self.attempt.on_prefill_answer(body)
        self.attempt.prefill_ended(PrefillFinished())
        self.attempt.wake()

    def broken(self, error: EngineError, *, stale: bool) -> None:
        """The connection is gone."""
        attempt = self.attempt
        attempt.is_stale |= stale
        if not attempt.finished and attempt.choice.prefill is not None:
            attempt.broken.append(attempt.choice.prefill)
        attempt.prefill_ended(PrefillFailed(error), is_its_fault=not stale)


class DecodeLeg:
    """What all decode legs share: the head, and an answer that is an error."""

    __slots__ = ("_error_parts", "_failed", "_size", "attempt", "is_stream", "status")

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.status = 0
        self.is_stream = False
        self._error_parts: list[bytes] = []
        self._failed = False
        self._size = 0

    def head(self, status: int, *, is_stream: bool) -> None:
        """The response head arrived. The client hears nothing yet: until the first body bytes an error can still have a real status."""
        self.status = status
        self.is_stream = is_stream

    def payload(self, data: bytes) -> None:
        """A part of a body that is not chunked."""
        if self._failed:
            return  # what the same read still holds
        self._size += len(data)
        if self.status == 200:
            self.answer(data)
        elif self._size <= ANSWER_LIMIT:
            self._error_parts.append(data)

    def frames(self, raw: bytes, aligned: bool) -> None:
        """Whole HTTP chunks."""
        for data in unframe(raw):
            self.payload(data)

    def ended(self) -> None:
        """The response is complete."""
        if self.status == 200:
            self.finish()
        else:
            error = refusal(self.attempt.choice.decode, self.status, b"".join(self._error_parts))
            assert error is not None
            self.attempt.decode_ended(DecodeFailed(error))

    def broken(self, error: EngineError, *, stale: bool) -> None:
        """The connection is gone."""
        attempt = self.attempt
        attempt.is_stale |= stale
        if not attempt.finished:
            attempt.broken.append(attempt.choice.decode)
        attempt.decode_ended(DecodeFailed(error), is_its_fault=not stale)

    def fail(self, error: EngineError) -> None:
        """The answer is not what was promised: stop reading it. Its rid is aborted, so that the engine stops too."""
        self._failed = True
        if self.attempt.decode_connection is not None:
            self.attempt.decode_connection.abandon()
        self.attempt.owner.abort_rids(self.attempt.upstreams[1], self.attempt.rids)
        self.attempt.decode_ended(DecodeFailed(error))

    def answer(self, data: bytes) -> None:
        """A part of a good answer's body."""
        raise NotImplementedError

    def finish(self) -> None:
        """A good answer's body is complete."""
        raise NotImplementedError


def refusal(engine: EngineView | None, status: int, body: bytes) -> EngineRefusedError | None:
    """The error that a complete answer carries; None for a good one.

    SGLang's native route answers 200 and puts an error into the stream, so a stream's events are looked at too. What is no error of the
    client's (a redirect, an engine that does not know the router's key) becomes a 502.
    """
    if status == 200:
        return split_failure(body)[1] if body.startswith(b"data:") else None
    name = engine.id if engine is not None else "?"
    if status in {401, 403}:
        return EngineRefusedError(f"the engine {name} does not accept the router's API key (HTTP {status})", status=502)
    if not 400 <= status <= 599:
        return EngineRefusedError(f"the engine {name} answered with HTTP {status}, which is neither an answer nor an error", status=502)
    return EngineRefusedError(f"the engine {name} refused the request (HTTP {status})", status=status, body=body)
