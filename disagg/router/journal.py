"""What a stream has said so far, kept at the price of a list append per read. Pure.

The hot path adds raw bytes and a time; every `FOLD_EVERY` reads or `FOLD_BYTES` bytes, or when somebody asks, a slow path folds them into
counts, the emitted text and inter-token gaps. Continuing a broken stream, telling a finished answer from a cut one, and inter-token times
are built on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from disagg.router.openai import DONE_EVENT, Route

FOLD_EVERY = 32
FOLD_BYTES = 8 * 1024  # a flooded stream is read in large pieces: its journal must not keep 32 of them
_CLOSING_READS = 4
_TAIL = 4096  # enough for the chunks that end a stream: finish reason, usage, `[DONE]`
TEXT_LIMIT = 256 * 1024

# Inside a JSON string a quote is escaped, so these cannot match within model text. They find the one text field of a stream's chunk.
_CHAT_TEXT = re.compile(rb'"content":\s?"([^"\\]*(?:\\.[^"\\]*)*)"')
_COMPLETION_TEXT = re.compile(rb'"text":\s?"([^"\\]*(?:\\.[^"\\]*)*)"')
_TOKEN_IDS = re.compile(rb'"token_ids":\s?\[([0-9, ]+)\]')
_FINISH = re.compile(rb'"finish_reason":\s?"(\w+)"')
_NO_CHOICES = re.compile(rb'"choices":\s?\[\]')
_USAGE = re.compile(rb'"usage":\s?\{')

GapSink = Callable[[float, int], None]


class Said(msgspec.Struct, frozen=True):
    """What a stream has said until it broke.

    Attributes:
        text: what was passed on.
        ids: the ids of the tokens behind it, and possibly of some more whose text was still held back; None where the engine does not say.
        first: the JSON of its first event; of its last one on the native route.
        finish: why the engine ended the answer on purpose, where it had come so far.
        usage: the usage chunk was passed on, so that only `[DONE]` is missing.
        opaque: it held more than text (tool calls, reasoning), which cannot be told again.
    """

    text: str
    ids: Sequence[int] | None
    first: dict[str, Any]
    finish: str = ""
    usage: bool = False
    opaque: bool = False


class Journal:
    """The journal of one stream.

    Args:
        route: decides which field carries the text.
        on_gap: told (seconds per event, number of events) at each fold, for the inter-token histogram.

    Attributes:
        events: server-sent events folded so far, `[DONE]` included.
        tokens: those of them that are tokens, as far as that can be seen: what ends a stream is none.
        with_ids: the chunks carry token ids.
        on_fold: told at each fold how many seconds a token took after the one before, how many came so, and the longest pause; None for
            nobody.
        overflowed: the text grew over `TEXT_LIMIT` bytes and was dropped; such a stream cannot be continued.
    """

    __slots__ = (
        "_first",
        "_ids",
        "_last",
        "_on_gap",
        "_pieces",
        "_previous_at",
        "_reads",
        "_route",
        "_size",
        "_text",
        "_times",
        "_unfolded",
        "events",
        "on_fold",
        "overflowed",
        "tokens",
        "with_ids",
    )

    def __init__(self, route: Route, on_gap: GapSink) -> None:
        self.events = self.tokens = 0
        self.overflowed = False
        self._unfolded = 0
        self._route = route
        self._on_gap = on_gap
        self._reads: list[bytes] = []
        self._times: list[float] = []
        self._text: list[bytes] = []
        self._size = 0
        self._last = b""
        self._first = b""
        self._previous_at = 0.0
        self.with_ids = False
        self.on_fold: Callable[[float, int, float], None] | None = None
        self._ids: list[bytes] = []
        self._pieces = 0

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
        if not self._first:
            self._first = self._reads[0][: self._reads[0].find(b"\n\n")]
        joined = b"".join(self._reads)
        self._last = (self._last + joined[-_TAIL:])[-_TAIL:]  # the chunks that end a stream may come in several reads
        if not self.overflowed:
            self._fold_text(joined)
        self._reads.clear()
        self._times.clear()
        self._unfolded = 0

    def _fold_gaps(self) -> None:
        previous, events, steps, longest = self._previous_at, 0, 0, 0.0
        began = previous or self._times[0]
        for raw, at in zip(self._reads, self._times, strict=True):
            count = raw.count(b"\n\n")
            events += count
            if previous and count:
                steps += count
                gap = at - previous
                self._on_gap(gap / count, count)
                longest = max(longest, gap)
            elif count > 1:
                self._on_gap(0.0, count - 1)  # the first of them was waited for: that is TTFT
            previous = at
        self._previous_at = previous
        self.events += events
        closing = self._closing()
        self.tokens += events - closing
        steps -= closing
        if self.on_fold is not None and longest and steps > 0:
            self.on_fold((previous - began) / steps, steps, longest)

    def _closing(self) -> int:
        """Events that end a stream and are no tokens: of a short answer they would be most of it."""
        if DONE_EVENT not in self._reads[-1]:
            return 0
        tail = b"".join(self._reads[-_CLOSING_READS:])
        finish = len(_FINISH.findall(tail)) if self._route is Route.CHAT else 0  # elsewhere the last token says it
        return 1 + finish + len(_NO_CHOICES.findall(tail))

    def _fold_text(self, joined: bytes) -> None:
        if self._route is Route.GENERATE:
            self._keep_last_event(joined)
        else:
            pieces = (_CHAT_TEXT if self._route is Route.CHAT else _COMPLETION_TEXT).findall(joined)
            self._pieces += len(pieces)
            self._text.append(b"".join(pieces))
            self._size += len(self._text[-1])
            if self.with_ids:
                self._ids += _TOKEN_IDS.findall(joined)
        if self._size > TEXT_LIMIT:
            self.overflowed = True
            self._text.clear()
            self._ids.clear()

    def _keep_last_event(self, joined: bytes) -> None:
        """SGLang's native stream repeats the whole text in each event, so the last one says it all."""
        at = joined.rfind(b"\ndata: {") + 1  # a line of its own: model text has its line ends escaped
        if joined.startswith(b"data: {", at):
            self._text = [joined[at + 6 : joined.index(b"\n\n", at)]]
            self._size = len(self._text[0])

    @property
    def is_empty(self) -> bool:
        """True when nothing was passed on yet."""
        return not (self._reads or self.events)

    @property
    def saw_done(self) -> bool:
        """True when the last thing read was `[DONE]`: the engine ended its answer on purpose."""
        last = self._reads[-1] if self._reads else self._last
        return last.startswith(DONE_EVENT, last.rfind(b"data: "))

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

    def said(self) -> Said:
        """What must be known to let another engine go on.

        Raises:
            ValueError: it overflowed, or what it holds is not in the shape of its route.
        """
        text = self.text()
        tail = self._last
        if self._route is Route.GENERATE:
            return self._said_natively(text)
        first = msgspec.json.decode(self._first[self._first.index(b"data:") + 5 :], type=dict[str, Any])
        finish = _FINISH.search(tail)
        last = [event for event in tail.split(b"\n\n") if _NO_CHOICES.search(event)]
        ends = (1 if finish else 0) + tail.count(DONE_EVENT) + len(last)
        return Said(
            text,
            [int(i) for piece in self._ids for i in piece.split(b",")] if self.with_ids else None,
            first,
            finish=finish[1].decode() if finish else "",
            usage=any(_USAGE.search(event) for event in last),
            opaque=self.events - ends > self._pieces,
        )

    def _said_natively(self, text: str) -> Said:
        last = msgspec.json.decode(self._text[0], type=dict[str, Any])
        ids, info = last["output_ids"], last["meta_info"]
        finish = info.get("finish_reason") or {}
        return Said(text, ids, last, finish=str(finish.get("type") or ""), opaque=len(ids) != info["completion_tokens"])

    def go_on(self, ids: Sequence[int]) -> None:
        """From here on another engine speaks, which was told that these are the answer's ids so far."""
        self._ids = [b",".join(b"%d" % i for i in ids)] if ids else []

    def __repr__(self) -> str:
        return f"<Journal events={self.events} unfolded={len(self._reads)} text={self._size} bytes>"
