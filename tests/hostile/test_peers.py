"""Peers that do not speak as they should: refused, counted, one line in the log per second at most, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq

from disagg.cluster.agent import Agent
from disagg.cluster.transport import HANDSHAKE_MS, ControlClient, ControlServer
from disagg.observe.log import make_logger
from disagg.security.keys import KeyPair, make_key
from disagg.wire.codec import FRAME_LIMIT, MAJOR, MINOR, FrameError, encode, to_host, to_router
from disagg.wire.messages import Heartbeat, Hello, Refused, Register
from tests.fake_engine import HUNG_S
from tests.hostile.conftest import Scene
from tests.rig.hosts import LogLine, wall

pytestmark = pytest.mark.slow

HEADER = b"dsg\x01\x00"
ATTACK_S = 2.5
Say = Callable[[], bytes]


def pack(value: object) -> bytes:
    return HEADER + msgspec.msgpack.encode(value)


BAD_FRAMES: dict[str, tuple[str, Say]] = {
    "random": ("garbage", lambda: os.urandom(200)),
    "empty": ("garbage", lambda: b""),
    "no message": ("garbage", lambda: pack([1, 2, 3])),
    "no kind": ("garbage", lambda: pack({"name": "x"})),
    "wrong types": ("garbage", lambda: pack({"kind": "heartbeat", "incarnation": "x", "nonce": 1, "seq": [], "acked": {}})),
    "a long word that is no role": (
        "garbage",
        lambda: pack({"kind": "register", "name": "n", "public_key": "k", "roles": ["EVIL\n" * 50_000]}),
    ),
    "cut short": ("garbage", lambda: encode(Hello("evil", 1, "n"))[:-3]),
    "unknown kind": ("unknown_kind", lambda: pack({"kind": "from the future"})),
    "another major version": ("version", lambda: b"dsg\x09\x00" + msgspec.msgpack.encode({"kind": "hello"})),
    "deep": ("too_deep", lambda: HEADER + b"\x91" * 100_000 + b"\xc0"),
    "deep in a field": ("too_deep", lambda: HEADER + b"\x82\xa4kind\xa5hello\xa1x" + b"\x91" * 5_000 + b"\xc0"),
}


@contextmanager
def peer(scene: Scene, key: KeyPair, heard: list[bytes] | None = None, denied: list[str] | None = None) -> Iterator[ControlClient]:
    """A connection of somebody who knows how to connect."""
    port, router_key = scene.router.control, scene.router.key.public
    on_frame, on_denied = ([] if heard is None else heard).append, ([] if denied is None else denied).append
    client = ControlClient("127.0.0.1", port, key=key, router_key=router_key, on_frame=on_frame, on_denied=on_denied)
    try:
        yield client
    finally:
        client.close()


async def until(is_so: Callable[[], bool], limit_s: float = HUNG_S) -> None:
    async with asyncio.timeout(limit_s):
        while not is_so():  # noqa: ASYNC110  # a router's log is a file, which tells nobody
            await asyncio.sleep(0.02)


async def met(peer: ControlClient, heard: list[bytes]) -> None:
    """Until the connection stands: what is sent before that goes nowhere."""
    async with asyncio.timeout(HUNG_S):
        while not heard:
            peer.send(encode(Hello("evil", 1, "n")))
            await asyncio.sleep(0.1)


def quietly(lines: list[LogLine]) -> None:
    """Whatever was refused: a line a second, of ordinary length."""
    strangers = [line for line in lines if line.event != "ratio"]  # that one is about the pools, whoever knocks
    about_others = [line for line in strangers if not str(line.fields.get("host", line.fields.get("engine", ""))).startswith("good")]
    times = sorted(line.at for line in about_others)
    assert all(b - a > 0.95 for a, b in itertools.pairwise(times)), lines
    assert all(len(str(line)) < 1000 for line in lines)


async def test_bad_frames_of_a_registered_host_are_counted_and_told_in_one_line_a_second(scene: Scene, good: Agent) -> None:
    heard: list[bytes] = []
    expected = Counter({why: 0 for why, _ in BAD_FRAMES.values()})
    with peer(scene, scene.keys["evil"], heard) as evil:
        await met(evil, heard)
        since = wall()
        for why, say in BAD_FRAMES.values():
            evil.send(say())
            expected[why] += 1
            await asyncio.sleep(0.002)
        await until(lambda: told(scene, since) == expected)
    quietly([line for line in scene.router.lines(since) if line.level != "info"])
    (answer,) = [answer for frame in heard if isinstance(answer := to_host.decode(frame), Refused) and "version" in answer.reason]
    assert answer.final
    assert "version 9.0" in answer.reason
    assert f"{MAJOR}.{MINOR}" in answer.reason


async def test_a_host_that_sends_nonsense_is_soon_not_listened_to(scene: Scene, good: Agent) -> None:
    heard: list[bytes] = []
    with peer(scene, scene.keys["other"], heard) as evil:
        await met(evil, heard)
        since = wall()
        for _ in range(200):
            evil.send(b"nonsense")
            await asyncio.sleep(0.002)
        await until(lambda: told(scene, since)["flood"] >= 1)
        await asyncio.sleep(1.1)  # the next line of complaints, if there is one, has been written
    assert told(scene, since)["garbage"] < 40


def told(scene: Scene, since: float) -> Counter[str]:
    """What the log says was refused, by why."""
    found: Counter[str] = Counter()
    for line in scene.complaints(since):
        found.update({name: value for name, value in line.fields.items() if isinstance(value, int)})
    return found


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_what_is_said_about_a_bad_frame_never_repeats_it(name: str) -> None:
    why, say = BAD_FRAMES[name]
    with pytest.raises(FrameError) as refused:
        to_router.decode(say())
    assert refused.value.why == why
    assert "EVIL" not in str(refused.value)
    assert len(str(refused.value)) < 300


async def test_a_frame_over_the_limit_never_arrives(scene: Scene, good: Agent) -> None:
    since = wall()
    with peer(scene, scene.keys["evil"]) as evil:
        for _ in range(20):
            evil.send(HEADER + b"\x00" * FRAME_LIMIT)
            await asyncio.sleep(0.05)
    assert all(len(line.fields) < 10 for line in scene.router.lines(since))
    quietly(scene.router.lines(since))


@pytest.mark.slow
async def test_a_key_that_nobody_registered_gets_no_message_through(scene: Scene, good: Agent) -> None:
    since = wall()
    denied: list[str] = []
    heard: list[bytes] = []
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stranger = stack.enter_context(peer(scene, make_key(), heard, denied))
            stranger.send(encode(Hello("good", 1, "x")))
        await asyncio.sleep(ATTACK_S)  # the attack goes on for so long
    assert denied
    assert not heard
    lines = scene.router.lines(since)
    assert any("unknown_key" in line.fields for line in lines)
    quietly(lines)


@pytest.mark.slow
async def test_peers_without_curve_and_raw_garbage_get_nothing(scene: Scene, good: Agent) -> None:
    since = wall()
    port = scene.router.control
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(f"tcp://127.0.0.1:{port}")
    plain.send(encode(Hello("good", 1, "x")))
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + ATTACK_S
    raw = 0
    while loop.time() < ends_at:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as one:
            one.sendall(os.urandom(500) if raw % 2 else b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00" + os.urandom(60))
        raw += 1
        await asyncio.sleep(0.005)
    assert raw > 100
    with pytest.raises(zmq.Again):
        plain.recv(zmq.NOBLOCK)
    plain.close()
    context.term()
    quietly(scene.router.lines(since))


@pytest.mark.slow
async def test_a_registered_host_that_lies_about_everything_fills_no_log(scene: Scene, good: Agent) -> None:
    """Hellos under another name, heartbeats of a seat it does not hold, a registration without a token."""
    since = wall()
    heard: list[bytes] = []
    with peer(scene, scene.keys["evil"], heard) as evil:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + ATTACK_S
        seq = 0
        while loop.time() < ends_at:
            seq += 1
            evil.send(encode(Hello("good", seq, "x")))
            evil.send(encode(Heartbeat(seq, "y", seq, 0)))
            evil.send(encode(Register("good", make_key().public, ())))
            await asyncio.sleep(0.04)
    reasons = {answer.reason for frame in heard if isinstance(answer := to_host.decode(frame), Refused)}
    assert any("registered as evil and not as good" in reason for reason in reasons)
    assert any("does not hold the host's seat" in reason for reason in reasons)
    quietly(scene.router.lines(since))


@pytest.mark.parametrize("says", [b"", b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f"], ids=["nothing", "half a greeting"])
async def test_a_peer_that_does_not_go_on_with_its_handshake_is_cut_off(says: bytes) -> None:
    """After HANDSHAKE_MS; else it would hold a file for ever."""
    server = ControlServer("127.0.0.1", 0, key=make_key(), allows=lambda _: True, log=make_logger("critical", "text"))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(says)
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 10 * HANDSHAKE_MS / 1000)  # the router's own greeting, and the end
        finally:
            writer.close()
    finally:
        server.close()
