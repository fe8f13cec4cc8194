"""What a stream has said so far, kept at the price of a list append per read. Pure.

The hot path adds raw bytes and a time; every `FOLD_EVERY` reads or `FOLD_BYTES` bytes, or when somebody asks, a slow path folds them into
counts, the emitted text and inter-token gaps. Continuing a broken stream, telling a finished answer from a cut one, and inter-token times
are built on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from disagg.router.openai import DONE_EVENT, Route

FOLD_EVERY = 32
FOLD_BYTES = 8 * 1024  # a flooded stream is read in large pieces: its journal must not keep 32 of them
_TAIL = 64  # enough for `[DONE]` in its HTTP chunk
TEXT_LIMIT = 256 * 1024

# Inside a JSON string a quote is escaped, so these cannot match within model text. They find the one text field of a stream's chunk.
_CHAT_TEXT = re.compile(rb'"content":\s?"([^"\\]*(?:\\.[^"\\]*)*)"')
_COMPLETION_TEXT = re.compile(rb'"text":\s?"([^"\\]*(?:\\.[^"\\]*)*)"')

GapSink = Callable[[float, int], None]


class Journal:
    """The journal of one stream.

    Args:
        route: decides which field carries the text.
        on_gap: told (seconds per event, number of events) at each fold, for the inter-token histogram.

    Attributes:
        events: server-sent events folded so far, `[DONE]` included.
        overflowed: the text grew over `TEXT_LIMIT` bytes and was dropped; such a stream cannot be continued.
    """

    __slots__ = (
        "_last",
        "_on_gap",
        "_previous_at",
        "_reads",
        "_route",
        "_size",
        "_text",
        "_times",
        "_unfolded",
        "events",
        "overflowed",
    )

    def __init__(self, route: Route, on_gap: GapSink) -> None:
        self.events = 0
        self.overflowed = False
        self._unfolded = 0
        self._route = route
        self._on_gap = on_gap
        self._reads: list[bytes] = []
        self._times: list[float] = []
        self._text: list[bytes] = []
        self._size = 0
        self._last = b""
        self._previous_at = 0.0

    def add(self, raw: bytes, now: float) -> None:
        """Notes whole events as they were read, HTTP chunk framing included."""
        reads = self._reads
        reads.append(raw)
        self._times.append(now)
        self._unfolded += len(raw)
        if len(reads) >= FOLD_EVERY or self._unfolded >= FOLD_BYTES:
            self.fold()

    def fold(self) -> None:
        """Turns raw reads into counts, text and gaps."""
        if not self._reads:
            return
        self._fold_gaps()
        self._last = self._reads[-1][-_TAIL:]
        if not self.overflowed:
            self._fold_text(b"".join(self._reads))
        self._reads.clear()
        self._times.clear()
        self._unfolded = 0

    def _fold_gaps(self) -> None:
        previous, events = self._previous_at, 0
        for raw, at in zip(self._reads, self._times, strict=True):
            count = raw.count(b"\n\n")
            events += count
            if previous and count:
                self._on_gap((at - previous) / count, count)
            elif count > 1:
                self._on_gap(0.0, count - 1)  # the first of them was waited for: that is TTFT
            previous = at
        self._previous_at = previous
        self.events += events

    def _fold_text(self, joined: bytes) -> None:
        if self._route is Route.GENERATE:
            self._keep_last_event(joined)
        else:
            pieces = (_CHAT_TEXT if self._route is Route.CHAT else _COMPLETION_TEXT).findall(joined)
            self._text.append(b"".join(pieces))
            self._size += len(self._text[-1])
        if self._size > TEXT_LIMIT:
            self.overflowed = True
            self._text.clear()

    def _keep_last_event(self, joined: bytes) -> None:
        """SGLang's native stream repeats the whole text in each event, so the last one says it all."""
        at = joined.rfind(b"\ndata: {") + 1  # a line of its own: model text has its line ends escaped
        if joined.startswith(b"data: {", at):
            self._text = [joined[at + 6 : joined.index(b"\n\n", at)]]
            self._size = len(self._text[0])

    @property
    def saw_done(self) -> bool:
        """True when the last thing read was `[DONE]`: the engine ended its answer on purpose."""
        return DONE_EVENT in (self._reads[-1] if self._reads else self._last)

    def text(self) -> str:
        """The text that was passed on so far.

        Raises:
            ValueError: it overflowed and was dropped.
        """
        self.fold()
        if self.overflowed:
            raise ValueError("the journal of this stream overflowed")
        if self._route is Route.GENERATE:
            return str(msgspec.json.decode(self._text[0])["text"]) if self._text else ""
        return msgspec.json.decode(b'"' + b"".join(self._text) + b'"', type=str)

    def __repr__(self) -> str:
        return f"<Journal events={self.events} unfolded={len(self._reads)} text={self._size} bytes>"
