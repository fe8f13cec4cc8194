"""The control plane's sockets: ZeroMQ with CURVE, plain callbacks on the event loop, limits on what a peer may cost.

CURVE is always on: there is no way to make a socket without keys. Who may connect is asked of the caller for each handshake (ZAP, RFC
27), by the client's public key; a peer without a known key never gets a byte of a message parsed. The authenticated key comes with every
message, so that nobody can speak for somebody else.

Why no `zmq.asyncio`: its sockets make a future per message; here the loop watches the socket's descriptor, and messages are taken in
batches. The descriptor is edge-triggered, so after each batch and each send the socket is asked whether more is waiting.

What protects the router: frames over 1 MiB are cut off by libzmq, a handshake must end within 2 s, a peer's queue is short so that a flood
is pushed back into the flooder's own TCP connection, at most `DRAIN_RATE` messages per second are taken (`FLOODED_RATE` while most of them
are thrown away), fairly from all peers (libzmq takes turns), and a key that says more than `PEER_BURST` messages beyond `PEER_RATE` per
second is not listened to for `FLOOD_PENALTY_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog
import zmq
import zmq.utils.monitor
from zmq.utils import z85

from disagg.errors import StartError
from disagg.security.keys import KeyPair
from disagg.wire.codec import FRAME_LIMIT

HANDSHAKE_MS = 2000
QUEUE_LENGTH = 128
BATCH = 64
DRAIN_RATE = 1600.0
FLOODED_RATE = 640.0
PEER_RATE = 100.0
PEER_BURST = 200.0
NONSENSE_COST = 10.0
"""A frame that makes no sense counts as so many: to find that out may take milliseconds, and no honest host sends any."""
FLOOD_PENALTY_S = 10.0
KEYS_REMEMBERED = 4096
ZAP_DOMAIN = b"disagg"
_AT_ONCE = int(zmq.NOBLOCK)  # a plain number: pyzmq's own flags are enums, and cost more than the call
_FIRST_OF_TWO = int(zmq.NOBLOCK | zmq.SNDMORE)
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"

OnMessage = Callable[[bytes, str, bytes], bool]
"""Session, the peer's public key, frame; says whether the frame made sense."""


class _Readable:
    """Calls back whenever a socket has something to read; never more than a batch at a time.

    After messages were taken it waits for `pause_s()` before it looks again: the rest waits in the kernel of the one who sent it, and what
    comes from many peers is taken together, which costs a fraction of as many wake-ups. Meanwhile the loop does not watch the descriptor,
    which stays readable and would wake it for nothing.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        loop: asyncio.AbstractEventLoop,
        take: Callable[[], bool],
        pause_s: Callable[[], float] | None = None,
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._take = take
        self._pause_s = pause_s
        self._later: asyncio.Handle | None = None
        self._taking = False
        self._watching = False
        self._watch()
        self.look()

    def look(self) -> None:
        """Takes a batch; comes back for the rest later, so that others get their turn."""
        if self._later is not None or self._taking:
            return
        taken = self._take_batch()
        if taken == BATCH or (taken and self._pause_s is not None):
            self._unwatch()
            self._later = self._loop.call_later(self._pause_s() if self._pause_s is not None else 0.0, self._again)
        else:
            self._watch()

    def _take_batch(self) -> int:
        self._taking = True
        taken = 0
        try:
            while taken < BATCH and not self._socket.closed and self._take():  # taking from an empty one is how libzmq is told to look
                taken += 1
        finally:
            self._taking = False
        return taken

    def _again(self) -> None:
        self._later = None
        self.look()

    def _watch(self) -> None:
        if not self._watching and not self._socket.closed:
            self._watching = True
            self._loop.add_reader(self._socket.FD, self.look)

    def _unwatch(self) -> None:
        if self._watching and not self._socket.closed:
            self._watching = False
            self._loop.remove_reader(self._socket.FD)

    def close(self) -> None:
        if self._later is not None:
            self._later.cancel()
        self._unwatch()


class Bucket:
    """A token bucket: `rate` per second, at most `burst` at once."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def waste(self, cost: float) -> None:
        """Takes so many at once, and may leave a debt."""
        self._left -= cost

    def take(self, now: float) -> bool:
        """True when there was one left."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Complaints:
    """Refusals, counted, and at most one log line a second about them, whatever a peer does."""

    def __init__(self, log: structlog.typing.FilteringBoundLogger, loop: asyncio.AbstractEventLoop) -> None:
        self.counts: Counter[str] = Counter()
        self._log = log
        self._loop = loop
        self._new: Counter[str] = Counter()
        self._example = ""
        self._said_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def add(self, why: str, example: str = "") -> None:
        """Counts one. `example`: a sentence about this one; never anything that the peer wrote."""
        self.counts[why] += 1
        self._new[why] += 1
        self._example = self._example or example
        if self._timer is None:
            self._timer = self._loop.call_at(max(self._loop.time(), self._said_at + 1.0), self._say)

    def _say(self) -> None:
        self._timer = None
        self._said_at = self._loop.time()
        self._log.warning("the control plane refused peers", **dict(self._new), example=self._example)
        self._new.clear()
        self._example = ""

    def close(self) -> None:
        """Says nothing more."""
        if self._timer is not None:
            self._timer.cancel()


class ControlServer:
    """The router's end.

    Args:
        key: the router's key pair; hosts know its public half.
        allows: whether a peer with this public key may connect; asked once per handshake.

    Attributes:
        on_message: called for each message; must not raise. Until it is set, messages are dropped.

    Raises:
        StartError: the address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        key: KeyPair,
        allows: Callable[[str], bool],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.complaints = Complaints(log, self._loop)
        self._allows = allows
        self.on_message: OnMessage | None = None
        self._buckets: dict[str, Bucket] = {}
        self._deaf_until: dict[str, float] = {}
        self._unheard = 0  # messages of this batch that nobody listened to
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with contextlib.suppress(zmq.ZMQError):
            self._context.set(zmq.MAX_SOCKETS, 65535)
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP_ENDPOINT)
        self._socket = _curve_socket(self._context, zmq.ROUTER)
        self._listen(host, port, key)
        self.port = _port_of(self._socket)
        self._zap_reader = _Readable(self._zap, self._loop, self._answer_zap)
        self._reader = _Readable(self._socket, self._loop, self._take, self._pause_s)

    def _listen(self, host: str, port: int, key: KeyPair) -> None:
        socket = self._socket
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = key.public.encode(), key.secret.encode()
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.setsockopt(zmq.BACKLOG, 1024)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a session that is gone is an error that `send` swallows, not a message in limbo
        bare = host.strip("[]")
        place = f"[{bare}]" if ":" in bare else bare or "*"
        try:
            socket.bind(f"tcp://{place}:{port or '*'}")
        except zmq.ZMQError as error:
            self._zap.close()
            socket.close()
            self._context.term()
            raise StartError(
                f"cannot listen on {host}:{port} for hosts: {error.strerror}; stop the program that listens there, or choose another"
                " address with --control"
            ) from error

    def send(self, session: bytes, frame: bytes) -> None:
        """Sends a frame to a session; one that is gone, or too slow to read, loses it."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(session, _FIRST_OF_TWO)
            self._socket.send(frame, _AT_ONCE)
        self._reader.look()

    def close(self) -> None:
        """Closes everything at once."""
        self._reader.close()
        self._zap_reader.close()
        self.complaints.close()
        self._socket.close()
        self._zap.close()
        self._context.term()

    def _take(self) -> bool:
        try:  # by hand: `recv_multipart` asks for an option between two frames
            session = self._socket.recv(_AT_ONCE)
            frame = self._socket.recv(_AT_ONCE, copy=False)
        except zmq.ZMQError:
            return False
        rest = self._rest_of(frame)
        key = _key_of(frame)
        if self._listens_to(key):
            if rest:
                self.complaints.add("garbage", "a message did not come as one frame")
            elif self.on_message is not None and not self.on_message(session, key, frame.bytes):
                self._buckets[key].waste(NONSENSE_COST)
        return True

    def _rest_of(self, frame: zmq.Frame) -> int:
        """Takes the frames that follow where only one may be; libzmq hands over whole messages, so they are there."""
        count = 0
        while frame.more:
            frame = self._socket.recv(_AT_ONCE, copy=False)
            count += 1
        return count

    def _pause_s(self) -> float:
        """What is only thrown away need not be taken often; libzmq takes turns, so that honest hosts wait for one batch and not for all."""
        unheard, self._unheard = self._unheard, 0
        return BATCH / (FLOODED_RATE if unheard > BATCH // 2 else DRAIN_RATE)

    def _listens_to(self, key: str) -> bool:
        now = self._loop.time()
        if now < self._deaf_until.get(key, 0.0):
            self._unheard += 1
            self.complaints.counts["flood"] += 1
            return False
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= KEYS_REMEMBERED:
                self._buckets.clear()
            bucket = self._buckets[key] = Bucket(PEER_RATE, PEER_BURST, now)
        if bucket.take(now):
            return True
        self._deaf_until[key] = now + FLOOD_PENALTY_S
        self.complaints.add("flood", f"a host sends far too much and is not listened to for {FLOOD_PENALTY_S:g} s")
        return False

    def _answer_zap(self) -> bool:
        try:
            request = self._zap.recv_multipart(zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        status, user = self._judge(request)
        text = b"OK" if status == b"200" else b"this key is not known"
        self._zap.send_multipart((b"1.0", request[1] if len(request) > 1 else b"", status, text, user, b""), zmq.NOBLOCK)
        return True

    def _judge(self, request: list[bytes]) -> tuple[bytes, bytes]:
        """A ZAP request: version, id, domain, address, identity, mechanism, and for CURVE the client's public key, 32 bytes."""
        if len(request) != 7 or request[5] != b"CURVE" or request[2] != ZAP_DOMAIN or len(request[6]) != 32:
            return b"400", b""
        key = z85.encode(request[6])
        if self._allows(key.decode()):
            return b"200", key
        self.complaints.add("unknown_key", "a peer's key is not registered, and no token that is still good belongs to it")
        return b"400", b""

    def __repr__(self) -> str:
        return f"<ControlServer port={self.port} refused={sum(self.complaints.counts.values())}>"


class ControlClient:
    """A host's end: one connection to the router.

    Args:
        key: the host's own key pair, or a token's one-time one.
        router_key: the router's public key; a router with another one cannot decrypt our hello and is never answered.
        on_frame: called for each frame.
        on_denied: called when the router refused this key.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        key: KeyPair,
        router_key: str,
        on_frame: Callable[[bytes], None],
        on_denied: Callable[[str], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _curve_socket(self._context, zmq.DEALER)
        self._on_frame = on_frame
        self._on_denied = on_denied
        socket = self._socket
        socket.curve_publickey, socket.curve_secretkey = key.public.encode(), key.secret.encode()
        socket.curve_serverkey = router_key.encode()
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 400)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, 2000)
        socket.setsockopt(zmq.TCP_MAXRT, 3000)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        bare = host.strip("[]")
        socket.connect(f"tcp://{f'[{bare}]' if ':' in bare else bare}:{port}")
        self._monitor_reader = _Readable(self._monitor, loop, self._take_monitor)
        self._reader = _Readable(socket, loop, self._take)

    @property
    def has_room(self) -> bool:
        """Whether the next frame will not be dropped."""
        events = self._socket.getsockopt(zmq.EVENTS)
        self._reader.look()  # asking resets the descriptor, as sending does
        return bool(int(events) & zmq.POLLOUT)

    def send(self, frame: bytes) -> None:
        """Sends a frame; with a full queue, which means that nobody reads, it is dropped: the next one tells it all again."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(frame, zmq.NOBLOCK)
        self._reader.look()

    def close(self, *, linger_ms: int = 0) -> None:
        """Closes. `linger_ms`: how long what was sent last may take to leave."""
        self._reader.close()
        self._monitor_reader.close()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._context.destroy(linger_ms or None)

    def _take(self) -> bool:
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        if len(frames) == 1:
            self._on_frame(frames[0])
        return True

    def _take_monitor(self) -> bool:
        try:
            event = zmq.utils.monitor.parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.ZMQError:
            return False
        if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._on_denied("the router does not know this key")
        return True


def _curve_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    for option, value in (
        (zmq.MAXMSGSIZE, FRAME_LIMIT),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        (zmq.SNDHWM, QUEUE_LENGTH),
        (zmq.RCVHWM, QUEUE_LENGTH),
        (zmq.IPV6, 1),
        (zmq.IMMEDIATE, int(kind == zmq.DEALER)),
    ):
        socket.setsockopt(option, value)
    return socket


def _key_of(frame: zmq.Frame) -> str:
    """The public key that ZAP has authenticated for the connection on which this frame came."""
    user: Any = frame.get("User-Id")
    return user if isinstance(user, str) else bytes(user).decode()


def _port_of(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").rpartition(b":")[2])  # type: ignore[union-attr]
