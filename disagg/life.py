"""What every long-running command shares: the loop, the two-stage stop, tasks that somebody owns, what systemd is told."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import structlog
import uvloop

from disagg.config import ObserveSection
from disagg.observe.log import Foreign, Sink, make_logger
from disagg.observe.notify import Notifier

Say = Callable[[str], None]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a coroutine to its end on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@contextlib.contextmanager
def voice(section: ObserveSection) -> Iterator[tuple[structlog.typing.FilteringBoundLogger, Sink]]:
    """A logger on standard error that nobody waits for, and what stands behind it; libraries speak through it too."""
    with Sink(sys.stderr) as sink:
        log = make_logger(section.log_level, section.log_format, sink)
        libraries = Foreign(log)
        logging.getLogger().addHandler(libraries)
        try:
            yield log, sink
        finally:
            logging.getLogger().removeHandler(libraries)


@contextlib.contextmanager
def people() -> Iterator[Say]:
    """What is said to people on standard output; nobody waits for them either."""
    with Sink(sys.stdout) as sink:

        def say(line: str) -> None:
            sink.write(f"{line}\n")

        yield say


class Stop:
    """The two-stage stop: the first signal drains, the second one ends at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, say: Say) -> None:
        self.asked = asyncio.Event()
        self.urgent = asyncio.Event()
        self.notifier = Notifier.from_environ(os.environ)
        self._say = say
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if not self.asked.is_set():
            self._say("Stopping: running requests may finish; once more stops at once.")
            self.notifier.stopping("stopping: running requests may finish")
            self.asked.set()
        else:
            self.urgent.set()

    async def wait(self, *others: asyncio.Future[Any]) -> None:
        """Waits for the first signal, or for one of these tasks to end, and tells the watchdog meanwhile that the loop turns."""
        pause_s = self.notifier.watchdog_interval_s
        while not self.asked.is_set() and not any(task.done() for task in others):
            self.notifier.watchdog()
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(self.asked.wait(), name="wait for a signal")
                await asyncio.wait({asked, *others}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Goes on telling the watchdog while the body takes its time."""
        async with owned_tasks() as group:
            if self.notifier.watchdog_interval_s is not None:
                group.create_task(self._bark(self.notifier.watchdog_interval_s), name="watchdog")
            yield

    async def _bark(self, pause_s: float) -> None:
        while True:
            self.notifier.watchdog()
            await asyncio.sleep(pause_s)


@contextlib.asynccontextmanager
async def owned_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose tasks end with the context. What the body raises comes out as it is, not in a group."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            try:
                yield group
            except BaseException as error:  # noqa: BLE001  # raised again below
                failure = error
            raise _Over  # noqa: TRY301  # leaving a group with an exception is how its tasks are cancelled
    except* _Over:
        pass
    if failure is not None:
        raise failure


class _Over(Exception):  # noqa: N818  # not an error
    """The context is over."""


async def supervised(work: Coroutine[Any, Any, None], name: str, log: structlog.typing.FilteringBoundLogger) -> None:
    """One failed background task must not end the process."""
    try:
        await work
    except Exception:
        log.exception("a background task failed", task=name)


def spawned(group: asyncio.TaskGroup, work: Coroutine[Any, Any, None], name: str, log: structlog.typing.FilteringBoundLogger) -> Any:
    """Runs supervised work as a task of a group; where the group is closing, the work is not begun.

    Returns:
        The task; None where there is none.
    """
    guarded = supervised(work, name, log)
    try:
        task = group.create_task(guarded, name=name)
    except RuntimeError:
        guarded.close()
        work.close()
        return None
    task.add_done_callback(lambda _: work.close())  # it may be cancelled before its first step
    return task


def settle_memory() -> None:
    """What lives now lives as long as the process: the collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def set_limits() -> None:
    """As many files as the system allows: every connection is one. No core files, of engines neither: they would hold keys and prompts."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def file_limit() -> int:
    """How many files this process may open; a connection is one."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft != resource.RLIM_INFINITY else 1 << 30
