"""Structured logs on standard error. A prompt, an answer or a secret is never an argument of a log call."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog


def make_logger(level: str, form: str, stream: TextIO | None = None) -> structlog.typing.FilteringBoundLogger:
    """A logger.

    Args:
        level: debug, info, warning or error.
        form: text (for people), json (one object per line), or auto: text on a terminal.
        stream: standard error by default.
    """
    stream = stream or sys.stderr
    text = form == "text" or (form == "auto" and stream.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=24) if text else structlog.processors.JSONRenderer()
    )
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text)
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[structlog.processors.add_log_level, stamp, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    return logger  # the annotation is what the line above is for
