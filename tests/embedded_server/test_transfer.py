"""Both ends of a handoff as pure machines, with bytes in between."""

from __future__ import annotations

import random
import zlib
from collections import deque

import pytest

from disagg.engines.embedded.frames import (
    HEADER_BYTES,
    FrameReader,
    HandedOver,
    Header,
    Hello,
    Kind,
    Profile,
    ProtocolError,
    end_frame,
    feed,
    frame,
    handed_of,
    page_header,
    sentence_frame,
    sentence_of,
)
from disagg.engines.embedded.transfer import (
    Arrived,
    Close,
    Command,
    Failed,
    HandedToDecode,
    Limits,
    Receiver,
    ReceiverState,
    Rooms,
    RoomUsedError,
    Send,
    Sender,
    SenderState,
    WriterDone,
)

PROFILE = Profile("ab" * 8, "float32", (2, 2, 16, 1, 8))
PAGE_BYTES = 64
LIMITS = Limits(bootstrap_s=30, stall_s=10, tombstone_s=100)
HANDED = HandedOver(7, -0.5, [(7, -0.5), (3, -1.0)], 16)


def refuse_pages(_header: Header) -> memoryview:
    raise ProtocolError("no pages here")


class Pair:
    """A sender and a receiver joined by two byte queues."""

    def __init__(self, pages: int = 4, *, slice_bytes: int = 1 << 20) -> None:
        self.now = 0.0
        self.slice_bytes = slice_bytes
        self.ours = [bytearray(random.Random(page).randbytes(PAGE_BYTES)) for page in range(pages)]
        self.theirs = {page: bytearray(PAGE_BYTES) for page in range(100, 100 + pages + 4)}
        self.targets = tuple(range(100 + pages - 1, 99, -1))
        self.receiver = Receiver(Hello(5, PROFILE, self.targets), page_bytes=lambda p: memoryview(self.theirs[p]), limits=LIMITS, now=0)
        self.sender: Sender | None = None
        self.reader = FrameReader(refuse_pages)
        self.to_prefill: deque[bytes] = deque()
        self.to_decode: deque[bytes] = deque()
        self.said: list[Command] = []
        self.do(self.receiver.connected(now=0), self.to_prefill)

    def do(self, commands: list[Command], queue: deque[bytes]) -> None:
        for command in commands:
            if isinstance(command, Send):
                queue.append(command.data)
            else:
                self.said.append(command)

    def to_sender(self) -> None:
        while self.to_prefill:
            for got in feed(self.reader, self.to_prefill.popleft()):
                if got.header.kind is Kind.HELLO:
                    hello = Hello.unpack(got.payload)
                    page_bytes = lambda p: memoryview(self.ours[p])  # noqa: E731
                    self.sender = Sender(hello, page_bytes=page_bytes, limits=LIMITS, now=self.now)
                else:
                    assert self.sender is not None
                    self.do(self.sender.received(got), self.to_decode)

    def pull(self) -> None:
        assert self.sender is not None
        while (item := self.sender.pull(now=self.now)) is not None:
            self.to_decode.append(item[0] + bytes(item[1]))

    def to_receiver(self) -> None:
        while self.to_decode:
            data = self.to_decode.popleft()
            for at in range(0, len(data), self.slice_bytes):
                for got in feed(self.receiver.reader, data[at : at + self.slice_bytes]):
                    self.do(self.receiver.received(got, now=self.now), self.to_prefill)

    def run(self) -> None:
        for _ in range(4):
            self.to_sender()
            self.pull()
            self.to_receiver()
        self.check()

    def check(self) -> None:
        self.receiver.check()
        if self.sender is not None:
            self.sender.check()


@pytest.mark.parametrize("slice_bytes", [1, 7, 1 << 20])
def test_pages_arrive_where_decode_wanted_them(slice_bytes: int) -> None:
    pair = Pair(slice_bytes=slice_bytes)
    pair.run()
    assert pair.sender is not None
    pair.sender.push([0, 1])
    pair.run()
    assert pair.receiver.state is ReceiverState.RECEIVING
    pair.sender.push([2, 3])
    pair.sender.finish(HANDED)
    pair.run()
    assert pair.said == [Arrived(HANDED), WriterDone(), Close(), HandedToDecode(), Close()]
    assert [bytes(pair.theirs[page]) for page in pair.targets] == [bytes(page) for page in pair.ours]
    assert pair.receiver.bytes_received == pair.sender.bytes_sent == 4 * PAGE_BYTES


def test_prefill_is_done_only_when_decode_said_so() -> None:
    pair = Pair()
    pair.run()
    assert pair.sender is not None
    pair.sender.push([0, 1, 2, 3])
    pair.sender.finish(HANDED)
    pair.pull()
    assert pair.sender.state is SenderState.ENDED
    assert not pair.said


@pytest.mark.parametrize("position", [0, 3])
def test_a_flipped_bit_in_a_page_fails_the_transfer(position: int) -> None:
    pair = Pair()
    pair.run()
    assert pair.sender is not None
    pair.sender.push([0, 1, 2, 3])
    pair.sender.finish(HANDED)
    pair.pull()
    damaged = bytearray(pair.to_decode[position])
    damaged[-1] ^= 1
    pair.to_decode[position] = bytes(damaged)
    pair.run()
    assert Failed(f"the checksum of KV page {position} is wrong") in pair.said
    assert not any(isinstance(command, Arrived | HandedToDecode) for command in pair.said)
    assert pair.said.count(WriterDone()) == 1


def test_every_single_bit_flip_anywhere_in_the_stream_is_noticed() -> None:
    clean = Pair(2)
    clean.run()
    assert clean.sender is not None
    clean.sender.push([0, 1])
    clean.sender.finish(HANDED)
    clean.pull()
    stream = b"".join(clean.to_decode)
    for bit in range(0, 8 * len(stream), 3):
        pair = Pair(2)
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            pair.to_decode.append(bytes(damaged))
            pair.to_receiver()
        except ProtocolError as error:
            pair.do(pair.receiver.broken(error, now=0), pair.to_prefill)
        pair.do(pair.receiver.closed("end of stream"), pair.to_prefill)
        header_padding = any(bit // 8 - start in {1, 2, 3} for start in (0, HEADER_BYTES + PAGE_BYTES, 2 * (HEADER_BYTES + PAGE_BYTES)))
        unused = bit // 8 - 2 * (HEADER_BYTES + PAGE_BYTES) in range(8, 16)  # END's page and position mean nothing
        arrived = any(isinstance(command, Arrived) for command in pair.said)
        assert arrived == (header_padding or unused), f"bit {bit}"


def test_cancel_quarantines_until_stopped_and_counts_late_writes() -> None:
    pair = Pair()
    pair.run()
    assert pair.sender is not None
    pair.sender.push([0, 1, 2])
    pair.pull()
    pair.do(pair.receiver.cancel("the client is gone", now=1), pair.to_prefill)
    assert pair.receiver.state is ReceiverState.STOPPING
    assert WriterDone() not in pair.said
    pair.to_receiver()
    assert pair.receiver.late_writes == 3
    pair.run()
    assert pair.said == [
        Failed("the client is gone"),
        Failed("decode cancelled: the client is gone"),
        Close(),
        WriterDone(),
        Close(),
    ]


def test_a_cancel_while_connecting_needs_no_proof() -> None:
    receiver = Receiver(Hello(5, PROFILE, (1,)), page_bytes=lambda _: memoryview(b""), limits=LIMITS, now=0)
    assert receiver.cancel("gone", now=1) == [Failed("gone"), WriterDone()]
    assert receiver.connected(now=2) == [Close(now=True)]
    assert receiver.closed("closed") == []


def test_an_end_that_crosses_the_cancel_is_proof_enough() -> None:
    pair = Pair(1)
    pair.run()
    assert pair.sender is not None
    pair.sender.push([0])
    pair.sender.finish(HANDED)
    pair.pull()
    pair.do(pair.receiver.cancel("gone", now=1), pair.to_prefill)
    pair.to_receiver()
    assert pair.said == [Failed("gone"), WriterDone(), Close()]


@pytest.mark.parametrize("phase", ["greeted", "receiving", "stopping"])
def test_a_lost_connection_is_proof(phase: str) -> None:
    pair = Pair()
    pair.run()
    assert pair.sender is not None
    if phase != "greeted":
        pair.sender.push([0])
        pair.run()
    if phase == "stopping":
        pair.do(pair.receiver.cancel("gone", now=1), pair.to_prefill)
    pair.do(pair.receiver.closed("lost"), pair.to_prefill)
    pair.do(pair.sender.closed("lost"), pair.to_decode)
    assert pair.said.count(WriterDone()) == 1
    assert [type(command) for command in pair.said].count(Failed) == 2


def test_pages_that_the_room_does_not_own_cannot_be_written() -> None:
    pair = Pair()
    pair.run()
    content = memoryview(bytes(PAGE_BYTES))
    for page, position in ((101, 0), (104, 9), (999, 0)):
        with pytest.raises(ProtocolError, match="does not own"):
            feed(Pair().receiver.reader, page_header(page, position, content))
    too_long = Header(Kind.PAGE, PAGE_BYTES + 1, pair.targets[0], 0, 0).pack()
    with pytest.raises(ProtocolError, match="pages here have"):
        feed(pair.receiver.reader, too_long)


def test_a_page_twice_or_too_few_pages_fail() -> None:
    pair = Pair(1)
    content = memoryview(pair.ours[0])
    pair.to_decode.append((page_header(100, 0, content) + bytes(content)) * 2)
    pair.to_receiver()
    assert Failed("prefill sent page 0 twice") in pair.said
    pair = Pair(1)
    pair.to_decode.append(end_frame(HANDED))
    pair.to_receiver()
    assert Failed("prefill ended the transfer with 1 KV pages missing") in pair.said


def test_waiting_has_limits_on_both_sides() -> None:
    pair = Pair()
    assert pair.receiver.next_deadline() == 30
    assert pair.receiver.tick(now=29) == []
    assert isinstance(pair.receiver.tick(now=30)[0], Failed)
    assert pair.receiver.tick(now=39) == []
    assert pair.receiver.tick(now=40) == [Close(now=True), WriterDone()]
    pair = Pair()
    pair.run()
    assert pair.sender is not None
    assert pair.sender.tick(now=1_000) == []  # our own compute is not decode's fault
    pair.sender.push([0])
    assert pair.sender.tick(now=1_009) == []
    assert pair.sender.tick(now=1_010)[-1] == Close(now=True)


def test_progress_keeps_a_queued_handoff_alive() -> None:
    pair = Pair()
    pair.run()
    assert pair.sender is not None
    for second in range(5, 200, 5):
        pair.now = float(second)
        pair.do(pair.sender.progress(now=pair.now), pair.to_decode)
        pair.run()
        assert pair.receiver.tick(now=pair.now) == []
    assert isinstance(pair.receiver.tick(now=pair.now + 10)[0], Failed)


def test_prefills_refusal_reaches_decode() -> None:
    pair = Pair()
    pair.to_decode.append(sentence_frame(Kind.FAIL, "the engines serve different models"))
    pair.to_receiver()
    assert pair.said == [Failed("prefill gave up: the engines serve different models"), WriterDone(), Close()]


def test_hello_survives_the_wire_and_other_versions_are_told_apart() -> None:
    hello = Hello(2**63 - 1, PROFILE, tuple(range(1000)))
    data = hello.pack()
    assert Hello.unpack(memoryview(data)[HEADER_BYTES:]) == hello
    payload = bytearray(data[HEADER_BYTES:])
    payload[9] = 9
    with pytest.raises(ProtocolError, match="1 here, 9 there"):
        Hello.unpack(memoryview(payload))
    with pytest.raises(ProtocolError, match="does not speak"):
        Hello.unpack(memoryview(b"GET / HTTP/1.1\r\n"))
    with pytest.raises(ProtocolError, match="cut short"):
        Hello.unpack(memoryview(payload[:8] + b"\0\1" + payload[10:40]))
    with pytest.raises(ProtocolError, match="page numbers"):
        Hello.unpack(memoryview(Hello(1, PROFILE, (1, 1)).pack()[HEADER_BYTES:]))


def test_profiles_that_differ_are_named() -> None:
    assert PROFILE.difference(PROFILE) is None
    other_size = PROFILE._replace(page_shape=(2, 2, 32, 1, 8))
    assert "different models" in str(PROFILE.difference(PROFILE._replace(model_hash="cd")))
    assert PROFILE.difference(other_size) == "the engines' --page-size differs: prefill 16, decode 32"
    assert "KV pages differ" in str(PROFILE.difference(PROFILE._replace(dtype="float16")))


def test_frames_have_limits() -> None:
    for kind, length in ((Kind.CANCEL, 5_000), (Kind.ACK, 1), (Kind.END, 1 << 20), (Kind.HELLO, 1 << 20)):
        with pytest.raises(ProtocolError, match="at most"):
            feed(FrameReader(refuse_pages), Header(kind, length, 0, 0, 0).pack())
    with pytest.raises(ProtocolError, match="unknown kind"):
        feed(FrameReader(refuse_pages), bytes(HEADER_BYTES))
    assert len(sentence_frame(Kind.FAIL, "x" * 9_999)) == HEADER_BYTES + 1024
    assert sentence_of(memoryview(b"a\r\nb\xff")) == "a  b\ufffd"
    with pytest.raises(ProtocolError, match="END"):
        handed_of(memoryview(b'{"token": "x"}'))


@pytest.mark.parametrize("seed", range(200))
def test_garbage_never_raises_anything_but_a_protocol_error(seed: int) -> None:
    chance = random.Random(seed)
    pair = Pair(2)
    content = memoryview(pair.ours[0])
    good = [
        page_header(101, 0, content) + bytes(content),
        end_frame(HANDED),
        frame(Kind.PROGRESS),
        frame(Kind.STOPPED),
        sentence_frame(Kind.FAIL, "no"),
        frame(Kind.ACK),
        frame(Kind.HELLO),
    ]
    data = bytearray(b"".join(chance.choice(good) for _ in range(5)))
    for _ in range(chance.randrange(4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    pair.to_decode.append(bytes(data))
    try:
        pair.to_receiver()
    except ProtocolError as error:
        pair.do(pair.receiver.broken(error, now=0), pair.to_prefill)
    pair.do(pair.receiver.closed("lost"), pair.to_prefill)
    pair.receiver.check()
    assert pair.said.count(WriterDone()) == 1


def test_crc_is_zlibs() -> None:
    assert Header.unpack(frame(Kind.CANCEL, b"abc")[:HEADER_BYTES]).crc == zlib.crc32(b"abc")


def test_rooms_bring_both_legs_together_whichever_comes_first() -> None:
    rooms: Rooms[str] = Rooms(LIMITS)
    assert rooms.request_came(1, "request", now=0) is None
    assert rooms.link_came(1, "link", now=1) == "request"
    assert rooms.link_came(2, "link", now=0) is None
    assert rooms.request_came(2, "request", now=1) == "link"
    rooms.check()


def test_a_room_is_used_once() -> None:
    rooms: Rooms[str] = Rooms(LIMITS)
    rooms.request_came(1, "first", now=0)
    with pytest.raises(RoomUsedError, match="in use"):
        rooms.request_came(1, "second", now=0)
    rooms.link_came(1, "link", now=0)
    with pytest.raises(RoomUsedError, match="in use"):
        rooms.link_came(1, "link", now=0)
    rooms.end(1, "it is done", now=10)
    for leg in (rooms.request_came, rooms.link_came):
        with pytest.raises(RoomUsedError, match="used before and has ended: it is done"):
            leg(1, "late", now=109)
    assert rooms.request_came(1, "much later", now=110) is None
    rooms.check()


def test_a_leg_does_not_wait_for_ever() -> None:
    rooms: Rooms[str] = Rooms(LIMITS)
    rooms.request_came(1, "request", now=0)
    rooms.link_came(2, "link", now=5)
    assert rooms.expire(now=29) == ([], [])
    assert rooms.expire(now=30) == ([(1, "request")], [])
    assert rooms.expire(now=35) == ([], [(2, "link")])
    with pytest.raises(RoomUsedError, match="did not come in time"):
        rooms.link_came(1, "link", now=40)
    assert rooms.waiting == 0
    rooms.expire(now=1_000)
    assert "0 ended" in repr(rooms)


def test_a_parked_link_that_closes_ends_its_room_and_no_other() -> None:
    rooms: Rooms[str] = Rooms(LIMITS)
    rooms.link_came(1, "link", now=0)
    rooms.link_gone(1, "another", "closed", now=1)
    assert rooms.waiting == 1
    rooms.link_gone(1, "link", "closed", now=1)
    with pytest.raises(RoomUsedError, match="closed"):
        rooms.request_came(1, "request", now=2)
