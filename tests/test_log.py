"""Whoever reads the log may be slow: who writes it does not wait."""

from __future__ import annotations

import io
import logging
import os
import threading

import pytest

from disagg.observe.log import Foreign, Sink, make_logger


def test_lines_arrive_whole_and_in_order() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as read:
        got: list[str] = []
        taking = threading.Thread(target=lambda: got.extend(read))
        taking.start()
        with Sink(stream) as sink:
            log = make_logger("info", "json", sink)
            for number in range(5000):
                log.info("line", number=number)
        stream.close()
        taking.join(10)
    assert [line.partition('"number": ')[2].partition(",")[0] for line in got] == [str(n) for n in range(5000)]
    assert sink.dropped == 0


def test_what_nobody_reads_is_dropped_and_counted_and_the_newest_does_not_wait() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        sink = Sink(stream, limit=100_000)
        for _ in range(1000):
            sink.write("x" * 1023 + "\n")
        sink.finish(0.05)
        assert 1000 - (100_000 + 65_536 + 4096) // 1024 - 2 <= sink.dropped < 1000
        os.close(reader)  # the thread gets EPIPE and ends
        sink._thread.join(10)
        assert not sink._thread.is_alive()
        assert sink.dropped <= 1000


def test_a_pipe_without_a_reader_costs_lines_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, Sink(stream) as sink:
        sink.write("a\n")
        sink.finish(10)
        assert sink.dropped == 1


def test_what_is_no_file_is_written_to_as_well() -> None:
    stream = io.StringIO()
    with Sink(stream) as sink:
        make_logger("info", "json", sink).warning("it works")
    assert '"it works"' in stream.getvalue()
    assert not sink.isatty()
    sink.write("too late\n")
    assert sink.dropped == 1


@pytest.mark.parametrize("defended", [True, False])
def test_a_sentence_of_a_library_is_said_once_in_a_second(defended: bool) -> None:
    """As asyncio's own loop does when it has no file left to accept a connection with."""
    stream = io.StringIO()
    handler = Foreign(make_logger("info", "json", stream)) if defended else logging.StreamHandler(stream)
    logger = logging.Logger("asyncio")  # noqa: LOG001  # nobody else shall hear it
    logger.addHandler(handler)
    for number in range(10_000):
        logger.error("socket.accept() out of system resource, %d", number)
    logger.error("something else")
    lines = stream.getvalue().splitlines()
    assert (len(lines) <= 60) == defended, "one line a second, on the slowest machine"
    assert any("something else" in line for line in lines)
