"""An engine's KV events over real sockets: a PUB socket that can lose batches, and a ROUTER that says the last ones again."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import Self

import msgspec
import zmq

from disagg.engines.base import KvSource
from disagg.wire.kv_events import END, KvEvent


class FakePublisher:
    """As SGLang's publisher: numbered batches from 0, the last ones kept; replays are answered in a thread of its own.

    Args:
        folder: of its sockets.
        buffer: how many batches are kept.
        answers: False: it takes requests for replays and says nothing.

    Attributes:
        requests: numbers from which replays were asked for.
        ends_dropped: of how many answers the end is dropped, as it is when a socket's queue is full.
    """

    def __init__(self, folder: Path, *, buffer: int = 10_000, answers: bool = True) -> None:
        self.source = KvSource(f"ipc://{folder}/events", f"ipc://{folder}/replay")
        self.requests: list[int] = []
        self.ends_dropped = 0
        self._answers = answers
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffer)
        self._seq = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.XPUB)  # which tells when somebody subscribes
        self._router = self._context.socket(zmq.ROUTER)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> Self:
        self._pub.bind(self.source.events)
        self._router.bind(self.source.replay)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def subscribed(self) -> bool:
        """Whether a subscriber came since it was last asked."""
        return bool(self._pub.poll(0)) and self._pub.recv() == b"\x01"

    def publish(self, *events: KvEvent, lose: bool = False, spoil: bool = False) -> None:
        """One batch. `lose`: subscribers do not get it. `spoil`: it makes no sense."""
        payload = b"\xc1" if spoil else msgspec.msgpack.encode([float(self._seq), list(events), 0])
        number = self._seq.to_bytes(8, "big")
        self._seq += 1
        self._buffer.append((number, payload))
        if not lose:
            self._pub.send_multipart((b"kv", number, payload))

    def _answer(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(20):
                continue
            peer, _, start = self._router.recv_multipart()
            self.requests.append(int.from_bytes(start, "big"))
            if self._answers:
                for number, payload in [said for said in list(self._buffer) if said[0] >= start]:
                    self._router.send_multipart((peer, b"", b"kv", number, payload))
                if self.ends_dropped:
                    self.ends_dropped -= 1
                else:
                    self._router.send_multipart((peer, b"", b"", END, b""))
