"""Those who mean no good, each in a process of its own: a flood of messages, idle connections, and the sink of the control run.

    attacker flood PORT RATE     RATE messages/s with a registered key, as fast as they are taken; the keys come on standard input
    attacker idle PORT COUNT     COUNT open TCP connections that say nothing, opened again when they are closed
    attacker sink                a control plane of nobody: it shakes hands, and then reads nothing. Reading would cost the core of the
                                 engines, and flatter the router that is compared with it

Once a second, or when it is asked to end, each says what it did. Only ever on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import sys
import time

import msgspec
import uvloop
import zmq

from disagg.cluster.transport import ControlServer
from disagg.life import set_limits
from disagg.observe.log import make_logger
from disagg.security.keys import KeyPair, make_key
from disagg.wire.codec import encode
from disagg.wire.messages import Heartbeat
from tests.rig.fleet import say

TURN_S = 0.001
REOPEN_S = 0.2


class Keys(msgspec.Struct, frozen=True):
    """The attacker's own, and the router's public one."""

    public: str
    secret: str
    router: str


def flood(port: int, rate: float, keys: Keys) -> None:
    """Attempts so many messages per second, evenly; those that find the queue full are attempts all the same."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = (
        keys.public.encode(),
        keys.secret.encode(),
        keys.router.encode(),
    )
    dealer.linger = 0
    dealer.connect(f"tcp://127.0.0.1:{port}")
    frame = encode(Heartbeat(1, "nonce of an attacker", 1, 0))
    began = said_at = time.monotonic()
    tried = taken = 0
    while True:
        now = time.monotonic()
        due = int((now - began) * rate)
        while tried < due:
            tried += 1
            with contextlib.suppress(zmq.ZMQError):
                dealer.send(frame, zmq.NOBLOCK)
                taken += 1
        if now - said_at >= 1.0:
            said_at = now
            say(f"{tried / (now - began):.0f} attempted/s, {taken / (now - began):.0f} queued/s")
        with contextlib.suppress(zmq.ZMQError):
            while True:
                dealer.recv(zmq.NOBLOCK)
        time.sleep(TURN_S)


def idle(port: int, count: int) -> None:
    """Keeps so many connections open; those that the other side closes are opened again."""
    selector = selectors.DefaultSelector()
    opened = 0
    ready = False
    while True:
        with contextlib.suppress(BlockingIOError):
            while len(selector.get_map()) < count:
                one = socket.create_connection(("127.0.0.1", port), timeout=5)
                one.setblocking(False)
                selector.register(one, selectors.EVENT_READ)
                opened += 1
        if not ready:
            ready = True
            say(f"{opened} open")
        for key, _ in selector.select(REOPEN_S):
            gone = key.fileobj
            assert isinstance(gone, socket.socket)
            if _is_closed(gone):
                selector.unregister(gone)
                gone.close()
        time.sleep(REOPEN_S)


def _is_closed(one: socket.socket) -> bool:
    try:
        return not one.recv(4096)
    except BlockingIOError:
        return False
    except OSError:
        return True


async def sink() -> None:
    """Prints where it listens and its key."""
    key: KeyPair = make_key()
    log = make_logger("error", "json")
    server = ControlServer("127.0.0.1", 0, key=key, allows=lambda _: True, log=log)
    server._reader.close()
    say(f"{server.port} {key.public}")
    await asyncio.Event().wait()


def main() -> None:
    """Plays the part that is asked for."""
    set_limits()
    match sys.argv[1:]:
        case ["flood", port, rate]:
            flood(int(port), float(rate), msgspec.json.decode(sys.stdin.buffer.readline(), type=Keys))
        case ["idle", port, count]:
            idle(int(port), int(count))
        case ["sink"]:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(sink())
        case _:
            sys.exit(str(__doc__))


if __name__ == "__main__":
    main()
