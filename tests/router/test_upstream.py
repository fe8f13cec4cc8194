"""Connections to engines, fed with bytes by hand; the transport is a list."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disagg.errors import EngineError, NoCapacityError
from disagg.handoff import Handoff, Limits, State
from disagg.model import Choice, EngineAddress, EngineId, EngineState, EngineView, Role
from disagg.router import upstream as upstream_module
from disagg.router.admission import Admission, Promise
from disagg.router.attempt import Attempt, DecodeLeg, refusal
from disagg.router.client import Client
from disagg.router.journal import Journal
from disagg.router.legs import EventLeg, StreamLeg, WholeLeg
from disagg.router.openai import Route
from disagg.router.upstream import (
    FRAME_LIMIT,
    HEAD_LIMIT,
    IDLE_LIMIT_S,
    Upstream,
    UpstreamConnection,
    frame,
    unframe,
)
from tests.fake_engine import until

ADDRESS = EngineAddress(EngineId("decode-0"), Role.DECODE, "10.0.0.2", 30000)


class Wire:
    """A transport that writes into a list."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.ended = ""
        self.reading = True

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.written.append(data)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True


class Soon:
    """The loop's `call_soon`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., object], Sequence[Any]]] = []

    def call_soon(self, call: Callable[..., object], *args: Any) -> None:
        self.calls.append((call, args))


class Ear:
    """A leg that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.status = 0
        self.is_stream = False
        self.body = b""
        self.aligned: list[bool] = []
        self.error: EngineError | None = None
        self.stale = False

    def head(self, status: int, *, is_stream: bool) -> None:
        assert self.heard == []
        self.heard.append("head")
        self.status, self.is_stream = status, is_stream

    def payload(self, data: bytes) -> None:
        assert data
        self._more("body")
        self.body += data

    def frames(self, raw: bytes, aligned: bool) -> None:
        self._more("body")
        parts = list(unframe(raw))
        assert parts
        assert all(parts)
        assert aligned is all(p.endswith(b"\n\n") for p in parts)
        self.aligned.append(aligned)
        self.body += b"".join(parts)

    def _more(self, what: str) -> None:
        assert self.heard in (["head"], ["head", "body"])
        if self.heard[-1] != what:
            self.heard.append(what)

    def ended(self) -> None:
        assert self.heard[:1] == ["head"]
        assert "ended" not in self.heard
        self.heard.append("ended")

    def broken(self, error: EngineError, *, stale: bool) -> None:
        assert not {"ended", "broken"} & set(self.heard)
        self.heard.append("broken")
        self.error, self.stale = error, stale

    @property
    def sum(self) -> tuple[Any, ...]:
        """What it heard in sum, however it was cut."""
        return (self.heard, self.status, self.is_stream, self.body, str(self.error), self.stale)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Exchange:
    """A connection in the middle of an exchange."""

    def __init__(self, *, reused: bool = False) -> None:
        self.clock = Clock()
        self.soon = Soon()
        self.upstream = Upstream(ADDRESS, cast("asyncio.AbstractEventLoop", self.soon), self.clock)
        self.connection = UpstreamConnection(self.upstream)
        self.wire = Wire()
        self.ear = Ear()
        self.connection.connection_made(cast("asyncio.Transport", self.wire))
        self.connection.reused = reused
        self.connection.send(self.ear, b"request")

    def feed(self, data: bytes, cuts: Sequence[int] = ()) -> Exchange:
        """Feeds bytes, cut at these offsets, as long as the connection lives."""
        edges = [0, *sorted(c for c in set(cuts) if 0 < c < len(data)), len(data)]
        for start, end in itertools.pairwise(edges):
            if not self.wire.ended and start < end:
                self.connection.data_received(data[start:end])
        return self

    def lose(self, error: Exception | None = None) -> Exchange:
        self.connection.connection_lost(error)
        return self

    @property
    def is_idle(self) -> bool:
        return self.connection in self.upstream._idle


def chunked(*payloads: bytes) -> bytes:
    return b"".join(map(frame, payloads)) + b"0\r\n\r\n"


OK = b"HTTP/1.1 200 OK\r\n"
STREAM_HEAD = OK + b"Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = (b"data: {}\n\n", b"data: {}\n\ndata: {}\n\n", b"data: [DONE]\n\n")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

ANSWERS: dict[str, bytes] = {
    "a stream": STREAM_HEAD + chunked(*EVENTS),
    "events cut by chunks": STREAM_HEAD + chunked(b"data: {", b"}\n", b"\ndata: 1\n\n"),
    "a whole answer": OK + b"Content-Length: 11\r\nContent-Type: application/json\r\n\r\nhello world",
    "an empty answer": OK + b"content-length: 0\r\n\r\n",
    "an empty chunked answer": OK + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "an error": b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}",
    "one that closes": OK + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}",
    "interim answers first": CONTINUE * 3 + OK + b"Content-Length: 2\r\n\r\n{}",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "no reason": b"HTTP/1.1 200\r\ncontent-length: 1\r\n\r\nx",
    "odd spaces and cases": b"HTTP/1.1 200 OK\r\nCONTENT-TYPE:text/event-stream\r\nTrAnSfEr-EnCoDiNg:  Chunked \r\n\r\n"
    + chunked(EVENTS[0]),
    "spaces around the length": OK + b"Content-Length:\t 3 \r\n\r\nabc",
    "chunk sizes in capitals and with zeros": OK + b"transfer-encoding: chunked\r\n\r\n000B\r\n" + b"x" * 11 + b"\r\n0\r\n\r\n",
}
BODIES: dict[str, tuple[int, bool, bytes, bool]] = {
    "a stream": (200, True, b"".join(EVENTS), True),
    "events cut by chunks": (200, True, b"data: {}\n\ndata: 1\n\n", True),
    "a whole answer": (200, False, b"hello world", True),
    "an empty answer": (200, False, b"", True),
    "an empty chunked answer": (200, False, b"", True),
    "an error": (400, False, b"{}", True),
    "one that closes": (200, False, b"{}", False),
    "interim answers first": (200, False, b"{}", True),
    "no content": (204, False, b"", True),
    "no reason": (200, False, b"x", True),
    "odd spaces and cases": (200, True, EVENTS[0], True),
    "spaces around the length": (200, False, b"abc", True),
    "chunk sizes in capitals and with zeros": (200, False, b"x" * 11, True),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_understood_and_the_connection_kept_where_the_engine_keeps_it(name: str) -> None:
    exchange = Exchange().feed(ANSWERS[name])
    status, is_stream, body, kept = BODIES[name]
    ear = exchange.ear
    assert (ear.heard[-1], ear.status, ear.is_stream, ear.body) == ("ended", status, is_stream, body)
    assert exchange.is_idle is kept
    assert exchange.wire.ended == ("" if kept else "closed")
    heard = list(ear.heard)
    exchange.lose()
    assert ear.heard == heard, "who has its answer hears nothing more"
    assert not exchange.is_idle


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_byte_by_byte_says_the_same(name: str) -> None:
    data = ANSWERS[name]
    assert Exchange().feed(data, range(len(data))).ear.sum == Exchange().feed(data).ear.sum


BROKEN: dict[str, bytes] = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "a status that is no number": b"HTTP/1.1 abc Secret prompt\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 x\r\n\r\n",
    "a negative status": b"HTTP/1.1 -12 x\r\n\r\n",
    "a length that is no number": OK + b"Content-Length: secret\r\n\r\n",
    "a negative length": OK + b"Content-Length: -5\r\n\r\n",
    "an endless length": OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "more than the length": OK + b"Content-Length: 2\r\n\r\nabc",
    "a chunk size that is no number": STREAM_HEAD + b"secret\r\nx\r\n",
    "a negative chunk size": STREAM_HEAD + b"-5\r\nhello\r\n",
    "an empty chunk size": STREAM_HEAD + b"\r\nhello\r\n",
    "a chunk size without end": STREAM_HEAD + b"1" * 30,
    "a chunk over the limit": STREAM_HEAD + b"%x\r\n" % (FRAME_LIMIT + 1),
    "a chunk that is longer than it says": STREAM_HEAD + b"2\r\nhello\r\n",
    "a last chunk with something in it": STREAM_HEAD + b"0\r\nxx",
    "bytes after the end": STREAM_HEAD + chunked(EVENTS[0]) + b"HTTP/1.1 200 OK\r\n\r\n",
    "whole chunks and then garbage": STREAM_HEAD + frame(EVENTS[0]) + b"zz\r\n",
    "a head without end": OK + b"x: " + b"y" * HEAD_LIMIT,
    "interim answers without end": CONTINUE * 5000 + b"x" * (HEAD_LIMIT + 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_garbage_breaks_the_leg_and_closes_the_connection(name: str) -> None:
    exchange = Exchange(reused=True).feed(BROKEN[name])
    ear = exchange.ear
    assert ear.heard[-1] == "broken"
    assert ear.error is not None
    assert str(ear.error).startswith("the engine decode-0 sent garbage: ")
    assert "ecret" not in str(ear.error), "what an engine sent may be a part of an answer"
    assert not ear.stale, "it was alive enough to talk nonsense"
    assert exchange.wire.ended == "aborted"
    assert not exchange.is_idle
    exchange.lose()
    assert ear.heard.count("broken") == 1


def test_whole_chunks_before_garbage_are_passed_on() -> None:
    assert Exchange().feed(BROKEN["whole chunks and then garbage"]).ear.body == EVENTS[0]


# Left out: bytes after a complete answer say "broken" or "unasked", as they come in one read or in two; and the slowest.
SPLIT = sorted([*ANSWERS, *(set(BROKEN) - {"bytes after the end", "more than the length", "interim answers without end"})])


@given(st.sampled_from(SPLIT), st.data())
@settings(deadline=None, max_examples=250)
def test_any_split_of_the_bytes_says_the_same_in_sum(name: str, data: st.DataObject) -> None:
    answer = ANSWERS.get(name) or BROKEN[name]
    cuts = data.draw(st.lists(st.integers(1, len(answer)), max_size=12))
    whole, split = Exchange().feed(answer), Exchange().feed(answer, cuts)
    assert split.ear.sum == whole.ear.sum
    assert split.wire.ended == whole.wire.ended
    assert split.is_idle is whole.is_idle


payloads = st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.sampled_from(EVENTS)), max_size=8)


@given(payloads, st.lists(st.integers(1, 600), max_size=12), st.booleans())
@example([b"\n"], [], False)
@settings(deadline=None, max_examples=200)
def test_any_chunked_body_arrives_whole_and_the_aligned_flag_is_right(parts: list[bytes], cuts: list[int], stream: bool) -> None:
    head = STREAM_HEAD if stream else OK + b"Transfer-Encoding: chunked\r\n\r\n"
    exchange = Exchange().feed(head + chunked(*parts), cuts)
    assert exchange.ear.body == b"".join(parts)
    assert exchange.ear.heard[-1] == "ended"
    assert exchange.is_idle
    if all(p.endswith(b"\n\n") for p in parts):
        assert all(exchange.ear.aligned)


@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(1, 300), max_size=6), st.sampled_from([b"", OK, STREAM_HEAD]))
@settings(deadline=None, max_examples=250)
def test_any_bytes_are_understood_or_break_the_leg_with_an_engine_error(data: bytes, cuts: list[int], before: bytes) -> None:
    exchange = Exchange().feed(before + data, cuts).lose()
    assert exchange.ear.heard[-1] in {"ended", "broken"}
    assert len([h for h in exchange.ear.heard if h in {"ended", "broken"}]) == 1


@given(payloads)
@settings(deadline=None, max_examples=50)
def test_unframe_undoes_frame(parts: list[bytes]) -> None:
    assert list(unframe(b"".join(map(frame, parts)))) == parts


def test_nothing_of_a_broken_chunk_is_passed_on() -> None:
    assert Exchange().feed(BROKEN["a chunk that is longer than it says"]).ear.heard == ["head", "broken"]


# --- ends


def test_without_length_and_chunks_the_body_ends_with_the_connection() -> None:
    exchange = Exchange().feed(OK + b"Content-Type: text/event-stream\r\n\r\nab").feed(b"cd")
    assert exchange.ear.heard == ["head", "body"]
    exchange.lose()
    assert (exchange.ear.heard[-1], exchange.ear.body) == ("ended", b"abcd")
    assert not exchange.is_idle


def test_a_reset_in_such_a_body_is_no_end() -> None:
    exchange = Exchange().feed(OK + b"\r\nab").lose(ConnectionResetError("reset"))
    assert exchange.ear.heard[-1] == "broken"
    assert "reset" in str(exchange.ear.error)


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 2", OK + b"Content-Length: 5\r\n\r\nhell", STREAM_HEAD, STREAM_HEAD + frame(EVENTS[0])])
@pytest.mark.parametrize("reused", [True, False])
def test_a_connection_that_dies_in_an_answer_breaks_the_leg_and_is_stale_only_if_nothing_came(part: bytes, reused: bool) -> None:
    exchange = Exchange(reused=reused).feed(part).lose()
    assert exchange.ear.heard[-1] == "broken"
    assert exchange.ear.stale is (reused and not part)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", OK + b"connection:keep-alive, Close\r\ncontent-length: 1\r\n\r\nx"]
)
def test_a_connection_that_the_engine_will_close_is_not_kept(answer: bytes) -> None:
    exchange = Exchange().feed(answer)
    assert exchange.ear.heard[-1] == "ended"
    assert exchange.wire.ended == "closed"
    assert not exchange.is_idle


def test_an_engine_that_speaks_unasked_is_dropped() -> None:
    exchange = Exchange().feed(ANSWERS["a whole answer"]).feed(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert exchange.wire.ended == "aborted"
    assert exchange.ear.heard[-1] == "ended"
    assert exchange.upstream.take() is None


def test_a_leg_that_was_abandoned_hears_nothing() -> None:
    exchange = Exchange().feed(STREAM_HEAD)
    exchange.connection.abandon()
    exchange.connection.data_received(chunked(*EVENTS))
    exchange.lose(ConnectionResetError())
    assert exchange.ear.heard == ["head"]
    assert exchange.wire.ended == "aborted"


def test_a_connection_that_was_lost_before_it_was_used_breaks_its_leg_soon() -> None:
    exchange = Exchange()
    exchange.feed(ANSWERS["a whole answer"])
    exchange.lose()
    late = Ear()
    exchange.connection.send(late, b"request")
    assert late.heard == [], "not while the other leg is being sent"
    for call, args in exchange.soon.calls:
        call(*args)
    assert late.heard == ["broken"]
    assert late.stale, "nothing was written: another attempt loses nothing"
    assert exchange.wire.written == [b"request"]


def test_reading_is_paused_and_goes_on_for_the_next_leg() -> None:
    exchange = Exchange().feed(STREAM_HEAD + frame(EVENTS[0]))
    exchange.connection.pause()
    exchange.connection.pause()
    paused = exchange.wire.reading
    exchange.connection.resume()
    exchange.connection.resume()
    assert (paused, exchange.wire.reading) == (False, True)
    exchange.connection.pause()
    exchange.feed(b"0\r\n\r\n")
    assert exchange.wire.reading
    assert exchange.is_idle


# --- the pool


class Pool:
    def __init__(self) -> None:
        self.clock = Clock()
        self.upstream = Upstream(ADDRESS, cast("asyncio.AbstractEventLoop", Soon()), self.clock)

    def idle(self) -> UpstreamConnection:
        """A connection that was given back just now."""
        connection = UpstreamConnection(self.upstream)
        connection.connection_made(cast("asyncio.Transport", Wire()))
        self.upstream._open[connection] = None
        self.upstream.give_back(connection)
        return connection


def ended(connection: UpstreamConnection) -> str:
    return cast("Wire", connection.transport).ended


def test_the_connection_used_last_is_used_first() -> None:
    pool = Pool()
    first, second = pool.idle(), pool.idle()
    assert [pool.upstream.take() for _ in range(3)] == [second, first, None]
    assert second.reused


def test_connections_that_idled_too_long_are_closed_when_one_is_asked_for() -> None:
    pool = Pool()
    old = pool.idle()
    pool.clock.now += IDLE_LIMIT_S
    new = pool.idle()
    pool.clock.now += 0.001
    assert [pool.upstream.take() for _ in range(2)] == [new, None]
    assert (ended(old), ended(new)) == ("aborted", "")


def test_prune_closes_those_and_only_those() -> None:
    pool = Pool()
    old = [pool.idle() for _ in range(3)]
    pool.clock.now += 2.0
    new = [pool.idle() for _ in range(2)]
    pool.clock.now += IDLE_LIMIT_S - 1.0
    pool.upstream.prune()
    assert [ended(c) for c in old] == ["aborted"] * 3
    assert [ended(c) for c in new] == [""] * 2
    assert repr(pool.upstream) == "<Upstream decode-0 open=5 idle=2>"
    for connection in old:
        connection.connection_lost(None)
    assert repr(pool.upstream) == "<Upstream decode-0 open=2 idle=2>"


def test_a_connection_that_died_idle_is_never_handed_out() -> None:
    pool = Pool()
    dead = pool.idle()
    dead.connection_lost(None)
    assert pool.upstream.take() is None
    also_dead = pool.idle()
    also_dead.closed = True  # its loss is on its way
    assert pool.upstream.take() is None


def test_close_ends_the_idle_and_the_busy() -> None:
    pool = Pool()
    idle, busy = pool.idle(), pool.idle()
    assert pool.upstream.take() is busy
    pool.upstream.close()
    assert (ended(idle), ended(busy)) == ("aborted", "aborted")


def test_the_request_is_one_piece_with_an_exact_length() -> None:
    pool = Pool()
    assert pool.upstream.request("/generate", b'{"a":1,', b'"b":2}') == (
        b'POST /generate HTTP/1.1\r\nHost: 10.0.0.2:30000\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"a":1,"b":2}'
    )
    six = EngineAddress(EngineId("d"), Role.DECODE, "fd00::2", 1, api_key="sesame")
    head = Upstream(six, cast("asyncio.AbstractEventLoop", Soon()), pool.clock).request("/x")
    assert b"\r\nHost: [fd00::2]:1\r\n" in head
    assert b"\r\nAuthorization: Bearer sesame\r\n" in head


async def test_an_engine_that_closes_at_once_leaves_nothing_behind() -> None:
    def slam(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cast("asyncio.Transport", writer.transport).abort()

    server = await asyncio.start_server(slam, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(EngineAddress(EngineId("d"), Role.DECODE, "127.0.0.1", port), asyncio.get_running_loop(), Clock())
        connection = await upstream.connect(5.0)
        await until(lambda: connection.closed)
        assert repr(upstream) == "<Upstream d open=0 idle=0>"
        ear = Ear()
        connection.send(ear, b"request")
        await until(lambda: ear.heard == ["broken"])


async def test_a_connection_that_is_lost_while_it_is_made_is_not_counted_as_open() -> None:
    class Hasty(Soon):
        async def create_connection(self, factory: Callable[[], UpstreamConnection], *_: Any) -> tuple[Wire, UpstreamConnection]:
            connection = factory()
            connection.connection_made(cast("asyncio.Transport", Wire()))
            connection.connection_lost(None)
            return Wire(), connection

    upstream = Upstream(ADDRESS, cast("asyncio.AbstractEventLoop", Hasty()), Clock())
    assert (await upstream.connect(5.0)).closed
    assert repr(upstream) == "<Upstream decode-0 open=0 idle=0>"


async def test_a_refused_connection_is_an_engine_error_that_names_the_engine() -> None:
    server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    upstream = Upstream(EngineAddress(EngineId("d"), Role.DECODE, "127.0.0.1", port), asyncio.get_running_loop(), Clock())
    with pytest.raises(EngineError, match=rf"the engine d at http://127.0.0.1:{port} refused the connection"):
        await upstream.connect(5.0)


# --- legs on such a connection: what an engine sends late or wrongly must not hurt the router's own books


class Books:
    """The attempt's owner, and who counts for the router."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = Clock()
        self.loop = cast("asyncio.AbstractEventLoop", Soon())
        self.ended: list[int] = []
        self.aborted: list[str] = []
        self.is_settled = False
        self.reads_until_s = 0.0

    def abort_rids(self, upstream: Upstream, rids: Sequence[str]) -> None:
        self.aborted += rids

    def taken_back(self, slot: int, _tokens: int) -> None:
        self.ended.append(slot)

    def over(self, promise: Promise) -> None:
        """Its last leg ended."""

    def handed_over(self, attempt: Attempt, now: float) -> None:
        """The prompt was read."""

    def reads_until(self, attempt: Attempt) -> float:
        return self.reads_until_s

    def settled(self, attempt: Attempt) -> None:
        self.is_settled = True


class Reader:
    """A client that takes what it gets."""

    def __init__(self) -> None:
        self.started = False
        self.chunked = True
        self.got = b""

    def start_stream(self, _choice: Choice, _attempt: int, first: bytes) -> bool:
        self.started = True
        return self.write(first)

    def write(self, data: bytes) -> bool:
        self.got += data
        return True

    def frame(self, payload: bytes) -> bytes:
        return frame(payload)

    def end_stream(self) -> None:
        self.got += b"0\r\n\r\n"


class Live:
    """An attempt on one unified engine, sent and waiting."""

    def __init__(self, make: Callable[[Attempt, Client], DecodeLeg]) -> None:
        self.books = Books()
        engine = EngineView(ADDRESS, 0, EngineState.READY)
        upstream = Upstream(ADDRESS, self.books.loop, self.books.clock)
        self.connection = UpstreamConnection(upstream)
        self.connection.connection_made(cast("asyncio.Transport", Wire()))
        handoff = Handoff(paired=False, limits=Limits())
        promise = Promise(cast("Admission", self.books), Choice(None, engine, "the only one"), 0, 1)
        self.attempt = Attempt(self.books, promise, ["rid"], handoff, None, upstream)
        self.reader = Reader()
        self.attempt.send(make(self.attempt, cast("Client", self.reader)), (None, self.connection), (b"", b"request"))

    @property
    def state(self) -> State:
        return self.attempt.handoff.state


def journal() -> Journal:
    return Journal(Route.CHAT, lambda _gap, _times: None)


def test_an_attempt_behind_an_engine_that_is_at_work_is_given_up_later() -> None:
    live = Live(lambda attempt, client: StreamLeg(attempt, client, journal(), 1))
    due = live.attempt.handoff.next_deadline()
    assert due is not None
    live.books.reads_until_s = due + 10.0
    states = []
    for now in (due + 1.0, due + 10.0):
        live.books.clock = lambda now=now: now  # type: ignore[misc]
        live.attempt.tick(now)
        states.append(live.state)
    assert states == [State.PREFILLING, State.FAILED]


def test_a_good_stream_ends_the_leg_once() -> None:
    live = Live(lambda attempt, client: StreamLeg(attempt, client, journal(), 1))
    live.connection.data_received(STREAM_HEAD + chunked(*EVENTS))
    assert (live.state, live.books.ended, live.books.is_settled) == (State.DONE, [0], True)
    assert live.reader.got == chunked(*EVENTS)


def test_a_wrong_answer_in_several_chunks_ends_the_leg_once() -> None:
    live = Live(lambda attempt, client: StreamLeg(attempt, client, journal(), 1))
    live.connection.data_received(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"{}", b"{}", b"{}"))
    assert live.state is State.FAILED
    assert live.books.ended == [0]


def test_a_whole_answer_that_comes_after_the_client_left_ends_the_leg() -> None:
    live = Live(lambda attempt, _client: WholeLeg(attempt))
    live.attempt.client_left()
    live.connection.data_received(ANSWERS["a whole answer"])
    assert (live.state, live.books.ended, live.books.is_settled) == (State.ABORTED, [0], True)


def test_events_that_come_after_the_client_left_do_no_harm() -> None:
    kept = journal()
    live = Live(lambda attempt, _client: EventLeg(attempt, kept))
    live.attempt.client_left()
    live.connection.data_received(STREAM_HEAD + chunked(*EVENTS))
    assert kept.is_empty
    assert (live.state, live.books.ended, live.books.is_settled) == (State.ABORTED, [0], True)


def test_a_relayed_stream_that_comes_after_the_client_left_is_dropped() -> None:
    live = Live(lambda attempt, client: StreamLeg(attempt, client, journal(), 1))
    live.attempt.client_left()
    live.connection.data_received(STREAM_HEAD + chunked(*EVENTS[:2]))
    assert live.reader.got == b""
    assert live.state is State.ABORTED


@pytest.mark.parametrize("status", [201, 204, 302, 304])
def test_an_engine_that_answers_neither_200_nor_an_error_is_a_502(status: int) -> None:
    error = refusal(None, status, b"")
    assert error is not None
    assert error.status == 502


@pytest.mark.parametrize("status", [401, 403])
def test_an_engine_that_refuses_the_routers_key_is_a_502(status: int) -> None:
    error = refusal(None, status, b"")
    assert error is not None
    assert error.status == 502


# --- files


async def test_a_connection_that_takes_a_file_kept_for_others_is_closed_and_no_engine_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        writer.close()
        ended.set()

    async with await asyncio.start_server(hear, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        upstream = Upstream(EngineAddress(EngineId("decode-0"), Role.DECODE, "127.0.0.1", port), loop, loop.time)
        try:
            (await upstream.connect(5.0)).abandon()
            await asyncio.wait_for(ended.wait(), 5.0)
            ended.clear()
            monkeypatch.setattr(upstream_module, "ENGINE_SHARE", 0.0)
            with pytest.raises(NoCapacityError, match="as many connections as it can take"):
                await upstream.connect(5.0)
            await asyncio.wait_for(ended.wait(), 5.0)
            assert "open=0 idle=0" in repr(upstream)
        finally:
            upstream.close()
