"""Structured logs on standard error. A prompt, an answer or a secret is never an argument of a log call.

Whoever reads the log may be slow, or stopped: a `Sink` stands between, so that nobody who writes a line waits for him.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from typing import Self, TextIO, cast

import structlog

SINK_LIMIT = 4 * 1024 * 1024
FLUSH_LIMIT_S = 1.0
REPEAT_S = 1.0
_EVENT_LIMIT = 500


class Sink:
    """Text that a thread writes to a stream. Who writes into it never waits: what does not fit is dropped and counted.

    Args:
        stream: standard error, standard output, or anything that takes text.
        limit: characters that may wait.

    Attributes:
        dropped: how many texts were dropped.
    """

    def __init__(self, stream: TextIO, limit: int = SINK_LIMIT) -> None:
        self.dropped = 0
        self._stream = stream
        self._file = _file_of(stream)
        self._limit = limit
        self._waiting: deque[str] = deque()
        self._size = 0
        self._over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)  # daemon: nobody waits for a reader at the exit
        self._thread.start()

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self._stream.isatty()

    def flush(self) -> None:
        """Nothing waits here."""

    def write(self, text: str) -> int:
        """Takes a text, whole lines of it."""
        with self._changed:
            if self._size + len(text) > self._limit or self._over:
                self.dropped += 1
            else:
                self._waiting.append(text)
                self._size += len(text)
                self._changed.notify()
        return len(text)

    def finish(self, limit_s: float = FLUSH_LIMIT_S) -> None:
        """Waits until everything is written, but not for a reader that does not read; takes nothing more."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join(limit_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._over:
                        return
                    self._changed.wait()
                text = "".join(self._waiting)
                texts = len(self._waiting)
                self._waiting.clear()
            try:
                self._write_through(text)
            except (OSError, ValueError):  # nobody reads it any more, or it is closed
                with self._changed:
                    self.dropped += texts
            with self._changed:
                self._size -= len(text)

    def _write_through(self, text: str) -> None:
        if self._file < 0:
            self._stream.write(text)
            self._stream.flush()
            return
        left = memoryview(text.encode(errors="backslashreplace"))
        while left:  # not through the stream: a thread that is stuck in its lock makes the interpreter abort at the exit
            left = left[os.write(self._file, left) :]


def _file_of(stream: TextIO) -> int:
    try:
        stream.flush()
        return stream.fileno()
    except (OSError, ValueError):
        return -1


def make_logger(level: str, form: str, stream: TextIO | Sink | None = None) -> structlog.typing.FilteringBoundLogger:
    """A logger.

    Args:
        level: debug, info, warning or error.
        form: text (for people), json (one object per line), or auto: text on a terminal.
        stream: standard error by default; a `Sink` for whoever must not wait.
    """
    stream = stream or sys.stderr
    text = form == "text" or (form == "auto" and stream.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=24) if text else structlog.processors.JSONRenderer()
    )
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text)
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(cast("TextIO", stream)),
        processors=[structlog.processors.add_log_level, stamp, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    return logger  # the annotation is what the line above is for


class Foreign(logging.Handler):
    """What libraries say through `logging`, said through ours: each sentence at most once in a second, whatever fills its blanks."""

    def __init__(self, log: structlog.typing.FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._said: dict[tuple[str, str], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Part of `logging.Handler`."""
        sentence = (record.name, str(record.msg)[:_EVENT_LIMIT])
        now = time.monotonic()
        if now < self._said.get(sentence, -REPEAT_S) + REPEAT_S:
            return
        if len(self._said) > 1000:
            self._said.clear()
        self._said[sentence] = now
        self._log.log(record.levelno, record.getMessage()[:_EVENT_LIMIT], library=record.name, exc_info=record.exc_info)
