"""One KV handoff, seen from either end, and the table in which its two legs find each other.

Theory of operation. Decode reserves pages and names them in HELLO; from then on prefill may write into them at any time
without asking, as an RDMA writer would. That is why decode never reuses a page before the writer is proven to be done:

    Receiver (decode)                                        Sender (prefill)
    CONNECTING ─connected─▶ GREETED ─first page─▶ RECEIVING  SENDING ─last page and END sent─▶ ENDED ─ACK─▶ DONE
         │                     │  PROGRESS: wait on    │        │  CANCEL: drop the queue, answer STOPPED   │
         │                     └── END, sums right ────┤        └──▶ FAILED (closed, stalled, aborted here) ┘
         ▼                                             ▼
       FAILED ◀──closed── STOPPING (CANCEL sent)     DONE
    ``WriterDone`` comes exactly once, whatever happens: with END or STOPPED or FAIL from the writer, or when the
    connection is closed and drained. Pages of a failed handoff stay in quarantine until then.

Limits: between HELLO and the first sign of life ``bootstrap_s``; between signs of life, and for ACK, ``stall_s``. A
prefill engine in whose queue the request waits sends PROGRESS while its steps advance, so that queueing is no fault and
hanging is.

Pure: bytes and times in, commands out; nothing here raises for a peer's fault.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from disagg.engines.embedded.frames import (
    Frame,
    FrameReader,
    HandedOver,
    Header,
    Hello,
    Kind,
    ProtocolError,
    end_frame,
    frame,
    handed_of,
    page_header,
    sentence_frame,
    sentence_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Leg = TypeVar("Leg")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a handoff waits, seconds.

    Attributes:
        bootstrap_s: for the other leg to appear.
        stall_s: for the next sign of life once both are there.
        tombstone_s: how long the number of an ended room stays refused.
    """

    bootstrap_s: float = 30.0
    stall_s: float = 10.0
    tombstone_s: float = 300.0


class Send(NamedTuple):
    """Write these bytes to the peer."""

    data: bytes


class Close(NamedTuple):
    """Close the connection after what was written; ``now``: at once, nothing more is read."""

    now: bool = False


class Arrived(NamedTuple):
    """All pages are here and their sums are right."""

    handed: HandedOver


class Failed(NamedTuple):
    """The handoff ended without success. The sentence is for the client, the log and the other engine."""

    sentence: str


class WriterDone(NamedTuple):
    """The peer will not write into the pages any more: proven."""


class HandedToDecode(NamedTuple):
    """Decode has acknowledged everything: prefill may forget the request."""


Command = Send | Close | Arrived | Failed | WriterDone | HandedToDecode


class ReceiverState(enum.Enum):
    """Where decode's side of a handoff is."""

    CONNECTING = enum.auto()
    GREETED = enum.auto()
    RECEIVING = enum.auto()
    STOPPING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class Receiver:
    """Decode's side. Feed it with ``reader`` and the methods; each returns what to do.

    Args:
        hello: room, profile and the reserved pages.
        page_bytes: the memory of a page.
        limits: waiting times.
        now: monotonic seconds.
    """

    def __init__(self, hello: Hello, *, page_bytes: Callable[[int], memoryview], limits: Limits, now: float) -> None:
        self.hello = hello
        self.state = ReceiverState.CONNECTING
        self.reader = FrameReader(self._place)
        self.bytes_received = 0
        self.late_writes = 0
        self.seconds = 0.0
        self._first_page_at: float | None = None
        self._page_bytes = page_bytes
        self._limits = limits
        self._deadline = now + limits.bootstrap_s
        self._missing = set(range(len(hello.pages)))
        self._writer_done = False

    def connected(self, *, now: float) -> list[Command]:
        """The connection stands."""
        if self.state is not ReceiverState.CONNECTING:
            return [Close(now=True)]  # cancelled while it was being made: the peer never learned of the pages
        self.state = ReceiverState.GREETED
        self._deadline = now + self._limits.bootstrap_s
        return [Send(self.hello.pack())]

    def received(self, got: Frame, *, now: float) -> list[Command]:
        """A frame is complete."""
        kind = got.header.kind
        if self.state in {ReceiverState.DONE, ReceiverState.FAILED}:
            return []
        if kind is Kind.PAGE:
            return self._page(got, now)
        if not got.intact:
            return self._give_up(f"a {kind.name} frame from prefill was damaged on its way", now)
        if kind is Kind.END:
            return self._end(got, now)
        return self._word(got, now)

    def _word(self, got: Frame, now: float) -> list[Command]:
        kind = got.header.kind
        if kind is Kind.PROGRESS:
            self._sign_of_life(now)
            return []
        if kind is Kind.FAIL:
            return [*self._finish(f"prefill gave up: {sentence_of(got.payload)}"), Close()]
        if kind is Kind.STOPPED:
            return [*self._finish("prefill stopped writing"), Close()]
        return self._give_up(f"prefill sent {kind.name}, which only decode may send", now)

    def broken(self, error: ProtocolError, *, now: float) -> list[Command]:
        """The stream cannot be read any further. Closing is the only proof left that nothing is written."""
        commands = self._give_up(str(error), now)
        return [*commands, Close(now=True)]

    def cancel(self, sentence: str, *, now: float) -> list[Command]:
        """The request ended here: have the writer stop. Its pages belong into quarantine until WriterDone."""
        if self.state is ReceiverState.CONNECTING:
            return self._finish(sentence)
        return self._give_up(sentence, now)

    def closed(self, reason: str) -> list[Command]:
        """The connection is closed and drained, or could not be made."""
        return self._finish(reason)

    def tick(self, *, now: float) -> list[Command]:
        """Time has passed."""
        if self.state in {ReceiverState.DONE, ReceiverState.FAILED} or now < self._deadline:
            return []
        if self.state in {ReceiverState.CONNECTING, ReceiverState.STOPPING}:
            return [Close(now=True), *self._finish("prefill could not be reached in time")]
        phase = "the KV cache to begin to arrive" if self.state is ReceiverState.GREETED else "the next KV page"
        return self._give_up(f"prefill was silent for too long while decode waited for {phase}", now)

    def next_deadline(self) -> float | None:
        """When ``tick`` has something to do."""
        return None if self.state in {ReceiverState.DONE, ReceiverState.FAILED} else self._deadline

    def check(self) -> None:
        """Assert the invariants."""
        assert self._writer_done == (self.state in {ReceiverState.DONE, ReceiverState.FAILED})
        assert self.state is not ReceiverState.DONE or not self._missing

    def _place(self, header: Header) -> memoryview:
        pages = self.hello.pages
        if header.position >= len(pages) or pages[header.position] != header.page:
            raise ProtocolError(f"prefill wrote to page {header.page}, which this room does not own")
        return self._page_bytes(header.page)

    def _page(self, got: Frame, now: float) -> list[Command]:
        self.bytes_received += got.header.length
        if self.state is ReceiverState.STOPPING:
            self.late_writes += 1
            return []
        self.state = ReceiverState.RECEIVING
        self._sign_of_life(now)
        if self._first_page_at is None:
            self._first_page_at = now
        self.seconds = now - self._first_page_at
        if got.header.position not in self._missing:
            return self._give_up(f"prefill sent page {got.header.position} twice", now)
        if not got.intact:
            return self._give_up(f"the checksum of KV page {got.header.position} is wrong", now)
        self._missing.discard(got.header.position)
        return []

    def _end(self, got: Frame, now: float) -> list[Command]:
        if self.state is ReceiverState.STOPPING:
            return [
                *self._finish("cancelled"),
                Close(),
            ]  # END crossed our CANCEL: it proves the writer done all the same
        if self._missing:
            return self._give_up(f"prefill ended the transfer with {len(self._missing)} KV pages missing", now)
        try:
            handed = handed_of(got.payload)
        except ProtocolError as error:
            return self._give_up(str(error), now)
        self.state = ReceiverState.DONE
        self._writer_done = True
        acknowledge = frame(Kind.ACK, position=len(self.hello.pages))
        return [Arrived(handed), WriterDone(), Send(acknowledge), Close()]

    def _give_up(self, sentence: str, now: float) -> list[Command]:
        if self.state in {ReceiverState.STOPPING, ReceiverState.DONE, ReceiverState.FAILED}:
            return []
        self.state = ReceiverState.STOPPING
        self._deadline = now + self._limits.stall_s
        return [Failed(sentence), Send(sentence_frame(Kind.CANCEL, sentence))]

    def _finish(self, sentence: str) -> list[Command]:
        if self.state in {ReceiverState.DONE, ReceiverState.FAILED}:
            return []
        known = self.state is ReceiverState.STOPPING
        self.state = ReceiverState.FAILED
        self._writer_done = True
        return [WriterDone()] if known else [Failed(sentence), WriterDone()]

    def _sign_of_life(self, now: float) -> None:
        if self.state is not ReceiverState.STOPPING:
            self._deadline = now + self._limits.stall_s

    def __repr__(self) -> str:
        return f"<Receiver room {self.hello.room} {self.state.name}, {len(self._missing)} pages missing>"


class SenderState(enum.Enum):
    """Where prefill's side of a handoff is."""

    SENDING = enum.auto()
    ENDED = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class Sender:
    """Prefill's side, from the moment at which both legs are there.

    Args:
        hello: what decode asked for.
        page_bytes: the memory of one of prefill's own pages.
        limits: waiting times.
        now: monotonic seconds.
    """

    def __init__(self, hello: Hello, *, page_bytes: Callable[[int], memoryview], limits: Limits, now: float) -> None:
        self.hello = hello
        self.state = SenderState.SENDING
        self.bytes_sent = 0
        self.page_bytes = page_bytes
        self._limits = limits
        self._queue: deque[tuple[int, int]] = deque()  # (position in the prompt, page of ours)
        self.pushed: list[int] = []
        self._handed: HandedOver | None = None
        self._moved_at = now

    def push(self, pages: Sequence[int]) -> None:
        """The next pages of the prompt are computed."""
        assert len(self.pushed) + len(pages) <= len(self.hello.pages), "more pages than decode reserved"
        if self.state is SenderState.SENDING:
            self._queue.extend(enumerate(pages, len(self.pushed)))
            self.pushed += pages

    def finish(self, handed: HandedOver) -> None:
        """All pages were pushed; END follows the last."""
        assert len(self.pushed) == len(self.hello.pages) or self.state is not SenderState.SENDING
        self._handed = handed

    def pull(self, *, now: float) -> tuple[bytes, memoryview] | None:
        """The next header and body to write when the transport has room, or None.

        The body is a page's memory and not a copy: the page must be kept until ACK or the end of the connection.
        """
        if self.state is not SenderState.SENDING:
            return None
        if self._queue:
            position, own = self._queue.popleft()
            content = self.page_bytes(own)
            self.bytes_sent += len(content)
            self._moved_at = now
            return page_header(self.hello.pages[position], position, content), content
        if self._handed is None:
            return None
        self.state = SenderState.ENDED
        self._moved_at = now
        return end_frame(self._handed), memoryview(b"")

    def progress(self, *, now: float) -> list[Command]:
        """The engine's steps advance while this prompt waits or computes: say so."""
        if self.state is not SenderState.SENDING or self._queue:
            return []
        self._moved_at = now
        return [Send(frame(Kind.PROGRESS))]

    def received(self, got: Frame) -> list[Command]:
        """A frame is complete."""
        if self.state in {SenderState.DONE, SenderState.FAILED}:
            return []
        kind = got.header.kind
        if not got.intact:
            return self.abort("a frame from decode was damaged on its way")
        if kind is Kind.CANCEL:
            self._drop()
            return [Send(frame(Kind.STOPPED)), Failed(f"decode cancelled: {sentence_of(got.payload)}"), Close()]
        if kind is Kind.ACK and self.state is SenderState.ENDED and got.header.position == len(self.hello.pages):
            self.state = SenderState.DONE
            return [HandedToDecode(), Close()]
        return self.abort(f"decode sent {kind.name}, which may not come now")

    def abort(self, sentence: str) -> list[Command]:
        """The request ended here: tell decode, and write nothing more."""
        if self.state in {SenderState.DONE, SenderState.FAILED}:
            return []
        self._drop()
        return [Send(sentence_frame(Kind.FAIL, sentence)), Failed(sentence), Close()]

    def closed(self, reason: str) -> list[Command]:
        """The connection is gone."""
        if self.state in {SenderState.DONE, SenderState.FAILED}:
            return []
        self._drop()
        return [Failed(reason)]

    def tick(self, *, now: float) -> list[Command]:
        """Time has passed. What waits for our own compute has no limit here; what waits for decode has."""
        if self.state is SenderState.SENDING and not self._queue:
            self._moved_at = now
        if self.state not in {SenderState.SENDING, SenderState.ENDED} or now < self._moved_at + self._limits.stall_s:
            return []
        what = "acknowledge the KV cache" if self.state is SenderState.ENDED else "take the next KV page"
        return [*self.abort(f"decode did not {what} in time"), Close(now=True)]

    def check(self) -> None:
        """Assert the invariants."""
        assert self.state is SenderState.SENDING or not self._queue
        assert len(self.pushed) <= len(self.hello.pages)

    def _drop(self) -> None:
        self.state = SenderState.FAILED
        self._queue.clear()

    def __repr__(self) -> str:
        return f"<Sender room {self.hello.room} {self.state.name}, {len(self.pushed)}/{len(self.hello.pages)} pages pushed>"


class RoomUsedError(Exception):
    """The room's number is in use, was used before, or its other leg has failed already. One sentence."""


class Parked(NamedTuple, Generic[Leg]):
    """A leg that waits for the other one."""

    leg: Leg
    deadline: float


class Rooms(Generic[Leg]):
    """Where the HTTP request and the connection of a room meet, whichever comes first.

    A room is used once: after its end its number is refused for ``tombstone_s``, because a straggler of the old attempt
    that met the new one would write one request's keys into the other's pages.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._requests: dict[int, Parked[str]] = {}
        self._links: dict[int, Parked[Leg]] = {}
        self._live: set[int] = set()
        self._ended: OrderedDict[int, tuple[float, str]] = OrderedDict()

    def request_came(self, room: int, rid: str, *, now: float, alone: bool = False) -> Leg | None:
        """The HTTP leg is there. Returns the connection that waited for it, if any.

        Args:
            room: its number.
            rid: the request's id.
            now: monotonic seconds.
            alone: no other leg is to come here (decode engines only keep the number from being used twice).

        Raises:
            RoomUsedError: the number may not be used.
        """
        self._refuse_used(room, now)
        if room in self._requests:
            raise RoomUsedError(f"bootstrap room {room} is in use")
        if alone:
            self._live.add(room)
            return None
        link = self._links.pop(room, None)
        if link is None:
            self._requests[room] = Parked(rid, now + self._limits.bootstrap_s)
            return None
        self._live.add(room)
        return link.leg

    def link_came(self, room: int, leg: Leg, *, now: float) -> str | None:
        """Decode's HELLO is there. Returns the id of the request that waited for it, if any.

        Raises:
            RoomUsedError: the number may not be used.
        """
        self._refuse_used(room, now)
        if room in self._links:
            raise RoomUsedError(f"bootstrap room {room} is in use")
        request = self._requests.pop(room, None)
        if request is None:
            self._links[room] = Parked(leg, now + self._limits.bootstrap_s)
            return None
        self._live.add(room)
        return request.leg

    def end(self, room: int, sentence: str, *, now: float) -> None:
        """Whatever the room held is over; ``sentence`` is told to a leg that still comes."""
        self._requests.pop(room, None)
        self._links.pop(room, None)
        self._live.discard(room)
        self._ended[room] = (now + self._limits.tombstone_s, sentence)

    def link_gone(self, room: int, leg: Leg, sentence: str, *, now: float) -> None:
        """A connection that waited was closed: its room ends. A connection that did not wait changes nothing."""
        if room in self._links and self._links[room].leg is leg:
            self.end(room, sentence, now=now)

    def expire(self, *, now: float) -> tuple[list[tuple[int, str]], list[tuple[int, Leg]]]:
        """Requests and connections whose other leg did not come in time, each with its room; their rooms end."""
        requests = [(room, parked.leg) for room, parked in self._requests.items() if now >= parked.deadline]
        links = [(room, parked.leg) for room, parked in self._links.items() if now >= parked.deadline]
        for room, _ in (*requests, *links):
            self.end(room, "its other leg did not come in time", now=now)
        while self._ended and next(iter(self._ended.values()))[0] <= now:
            self._ended.popitem(last=False)
        return requests, links

    @property
    def waiting(self) -> int:
        """Legs that wait for their other one."""
        return len(self._requests) + len(self._links)

    def check(self) -> None:
        """Assert that a room is in one place."""
        places = [*self._requests, *self._links, *self._live, *self._ended]
        assert len(places) == len(set(places))

    def _refuse_used(self, room: int, now: float) -> None:
        if room in self._live:
            raise RoomUsedError(f"bootstrap room {room} is in use")
        ended = self._ended.get(room)
        if ended is not None and now < ended[0]:
            raise RoomUsedError(f"bootstrap room {room} was used before and has ended: {ended[1]}")
        self._ended.pop(room, None)

    def __repr__(self) -> str:
        return f"<Rooms {len(self._requests)} requests and {len(self._links)} links wait, {len(self._live)} live, {len(self._ended)} ended>"
