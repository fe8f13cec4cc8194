"""What becomes of decode's answer: relayed as it comes, relayed whole, or handed over event by event."""

from __future__ import annotations

from collections import deque

from disagg.errors import EngineError
from disagg.handoff import DecodeFailed, DecodeFinished
from disagg.router.attempt import ANSWER_LIMIT, Attempt, DecodeLeg
from disagg.router.client import Client
from disagg.router.journal import Journal
from disagg.router.openai import DONE_EVENT, FAILURES, Route, is_json, may_hold_failure, split_failure, split_garbage
from disagg.router.seam import Seam
from disagg.router.upstream import unframe

_BUFFERED_EVENTS = 256
_ENDS = (b"}\n\n\r\n", b"]\n\n\r\n")  # of a chunk whose last event is an object, or `[DONE]`
_PARTIAL_LIMIT = 16 * 1024 * 1024


class StreamLeg(DecodeLeg):
    """Relays an event stream: bytes in, the same bytes out, only whole events.

    The usual read holds whole chunks of whole events, and those bytes go to the client's transport untouched. Everything else (an event cut
    by a chunk, an error event, a client without chunks) takes the careful way, which frames anew.
    """

    __slots__ = ("_careful", "_client", "_now", "_number", "_partial", "journal")

    def __init__(self, attempt: Attempt, client: Client, journal: Journal, number: int) -> None:
        super().__init__(attempt)
        self.journal = journal
        self._client = client
        self._number = number
        self._partial = b""
        self._now = attempt.owner.clock
        self._careful = True

    def frames(self, raw: bytes, aligned: bool) -> None:
        """Whole HTTP chunks: the hot path."""
        if not aligned or self._careful or FAILURES[0] in raw or FAILURES[1] in raw or not raw.endswith(_ENDS):
            self._careful_frames(raw)
            return
        attempt, client = self.attempt, self._client
        if not client.started or attempt.finished:
            self._pass(raw)
            return
        now = attempt.last_read_at = self._now()
        self.journal.add(raw, now)
        if not client.write(raw):
            attempt.pause()

    def head(self, status: int, *, is_stream: bool) -> None:
        """The response head arrived."""
        super().head(status, is_stream=is_stream)
        self._careful = status != 200 or not is_stream or not self._client.chunked

    def _pass(self, raw: bytes) -> None:
        """Passes on whole events that are framed for this client."""
        attempt = self.attempt
        if attempt.finished:
            return
        now = attempt.last_read_at = self._now()
        self.journal.add(raw, now)
        if self._client.started:
            flowing = self._client.write(raw)
        else:
            attempt.first_token(now)
            flowing = self._client.start_stream(attempt.choice, self._number, raw)
        if not flowing:
            attempt.pause()

    def _careful_frames(self, raw: bytes) -> None:
        for data in unframe(raw):
            self.payload(data)

    def answer(self, data: bytes) -> None:
        """A part of the body, cut anywhere."""
        if not self.is_stream:
            self.fail(EngineError(f"the engine {self.attempt.choice.decode.id} answered a stream request with something else"))
            return
        data = self._partial + data
        end = data.rfind(b"\n\n") + 2
        whole, self._partial = (data[:end], data[end:]) if end > 1 else (b"", data)
        if len(self._partial) > _PARTIAL_LIMIT:
            self.fail(EngineError(f"the engine {self.attempt.choice.decode.id} sent an event without an end"))
            return
        self._careful = bool(self._partial) or not self._client.chunked
        good, refused = split_failure(whole)
        good, garbage = split_garbage(good)
        error: EngineError | None = refused
        if garbage:
            error = EngineError(f"the engine {self.attempt.choice.decode.id} sent an event that is not JSON")
        if good:
            self._pass(self._client.frame(good))
        if error is not None:
            self.fail(error)

    def finish(self) -> None:
        """The body is complete: with `[DONE]`, or it was cut."""
        if self.journal.saw_done and not self._partial:
            if not self.attempt.finished:
                self._client.end_stream()
            self.attempt.decode_ended(DecodeFinished())
        else:
            where = self.attempt.choice.decode.id
            self.attempt.decode_ended(DecodeFailed(EngineError(f"the engine {where} ended its stream in the middle of the answer")))


class WholeLeg(DecodeLeg):
    """Collects a whole answer.

    Attributes:
        body: the answer, once the attempt finished.
    """

    __slots__ = ("_parts", "body")

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self.body = b""
        self._parts: list[bytes] = []

    def answer(self, data: bytes) -> None:
        """A part of the body."""
        self._parts.append(data)
        if self._size > ANSWER_LIMIT:
            self.fail(EngineError(f"the engine {self.attempt.choice.decode.id} sent an answer over the limit"))

    def finish(self) -> None:
        """The body is complete."""
        self.body = b"".join(self._parts)
        attempt = self.attempt
        if not is_json(self.body):
            self.fail(EngineError(f"the engine {attempt.choice.decode.id} sent an answer that is not JSON"))
            return
        if not attempt.finished:
            attempt.first_token(attempt.owner.clock())
        attempt.decode_ended(DecodeFinished())


class EventLeg(DecodeLeg):
    """Cuts an event stream into events for a task that rewrites them.

    Args:
        journal: of the whole answer.
        seam: makes this stream the continuation of one that broke; None for a first one.

    Attributes:
        events: what was not taken yet, each a whole event without its blank line.
    """

    __slots__ = ("_partial", "_saw_done", "events", "journal", "seam")

    def __init__(self, attempt: Attempt, journal: Journal, seam: Seam | None = None) -> None:
        super().__init__(attempt)
        self.events: deque[bytes] = deque()
        self.journal = journal
        self.seam = seam
        self._partial = b""
        self._saw_done = False

    def answer(self, data: bytes) -> None:
        """A part of the body, cut anywhere. What comes after the attempt's end the client never hears, so the journal must not, either."""
        attempt = self.attempt
        if attempt.finished:
            return
        now = attempt.last_read_at = attempt.owner.clock()
        *events, self._partial = (self._partial + data).split(b"\n\n")
        if len(self._partial) > _PARTIAL_LIMIT:
            self.fail(EngineError(f"the engine {attempt.choice.decode.id} sent an event without an end"))
            return
        good: list[bytes] = []
        error = self._sort(events, good)
        if good:
            self.journal.add(b"\n\n".join([*good, b""]), now)
        if events and not attempt.first_token_at and error is None:
            attempt.first_token(now)
        self.pass_on(good)
        if error is not None:
            self.fail(error)
        elif self.seam is not None and self.seam.stopped:
            self._stop(self.seam)
        attempt.wake()

    def _sort(self, events: list[bytes], good: list[bytes]) -> EngineError | None:
        for event in events:
            if may_hold_failure(event) and (error := split_failure(event + b"\n\n")[1]) is not None:
                return error
            if event + b"\n\n" == DONE_EVENT:
                self._saw_done = True
            elif self.seam is None:
                good.append(event)
            elif not self.seam.stopped:
                try:
                    made = self.seam.rewrite(event)
                except EngineError as error:
                    return error
                if made:
                    good.append(made.removesuffix(b"\n\n"))
        return None

    def _stop(self, seam: Seam) -> None:
        """The answer is over, though the engine does not know."""
        attempt = self.attempt
        self.pass_on([event for event in seam.closing().split(b"\n\n") if event])
        self._failed = self._saw_done = True  # what comes now is of no interest
        if attempt.decode_connection is not None:
            attempt.decode_connection.abandon()
        attempt.owner.abort_rids(attempt.upstreams[1], attempt.rids)
        self.finish()

    def pass_on(self, events: list[bytes]) -> None:
        """Hands events over, each without its blank line."""
        self.events += events
        if len(self.events) > _BUFFERED_EVENTS:
            self.attempt.pause()

    def finish(self) -> None:
        """The body is complete: with `[DONE]`, or it was cut."""
        if self._saw_done:
            self.attempt.decode_ended(DecodeFinished())
        else:
            where = self.attempt.choice.decode.id
            self.attempt.decode_ended(DecodeFailed(EngineError(f"the engine {where} ended its stream in the middle of the answer")))


class TimedLeg(EventLeg):
    """Notes when the events of an answer came, and forgets what they say.

    Attributes:
        times: of the events so far, on the owner's clock.
    """

    __slots__ = ("times",)

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt, Journal(Route.GENERATE, lambda _seconds, _count: None))
        self.times: list[float] = []

    def pass_on(self, events: list[bytes]) -> None:
        """Some more."""
        self.times += [self.attempt.last_read_at] * len(events)


class SeamLeg(EventLeg):
    """Continues a stream that broke: what is said from now on is rewritten, and written to the client at once."""

    __slots__ = ("_client",)

    def __init__(self, attempt: Attempt, client: Client, journal: Journal, seam: Seam) -> None:
        super().__init__(attempt, journal, seam)
        self._client = client

    def pass_on(self, events: list[bytes]) -> None:
        """Writes events to the client."""
        if events and not self.attempt.finished and not self._client.write(self._client.frame(b"\n\n".join([*events, b""]))):
            self.attempt.pause()

    def finish(self) -> None:
        """The body is complete: with `[DONE]`, or it was cut."""
        if self._saw_done and not self.attempt.finished:
            self._client.write(self._client.frame(DONE_EVENT))
            self._client.end_stream()
        super().finish()
