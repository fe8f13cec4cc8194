"""A virtual-time event loop for many simulated processes.

What asyncio promises is kept: callbacks of one process run in the order in which they were scheduled, and timers in that of their times.
What it does not promise is drawn from the seed: in each round one process may lag behind the others, as another loop on another machine
would. A process is known by a context variable, which tasks, timers and callbacks inherit.

Time moves only when nobody has anything to do, and by `ROUND_S` with each round, so that a loop that polls without sleeping moves it too.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import random
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar, TypeVarTuple

Result = TypeVar("Result")
Args = TypeVarTuple("Args")

ROUND_S = 1e-6
LAG_ONE_IN = 16
THREAD_S = 0.002
"""How long work in a thread takes."""
ROUNDS_PER_S = 200_000
"""More rounds in a simulated second mean that somebody polls without sleeping."""


class StuckError(Exception):
    """The simulation cannot go on: nobody waits for anything, or somebody never waits."""


class Process:
    """One simulated operating system process.

    Attributes:
        ip: of its host.
        dead: it was killed: nothing that it does has any effect.
    """

    def __init__(self, name: str, ip: str, number: int) -> None:
        self.name = name
        self.ip = ip
        self.number = number
        self.dead = False
        self.on_death: list[Callable[[bool], None]] = []
        self.backlog: list[asyncio.Handle] = []

    def __repr__(self) -> str:
        return f"<Process {self.name}{' dead' if self.dead else ''}>"


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)
KERNEL: Context = Context()
"""Where what belongs to no process runs: the network, faults."""


class SimTask(asyncio.Task[Any]):
    """A task with a number: sets of tasks, which asyncio iterates over, have the same order in each run."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, number: int, process: Process | None, **options: Any) -> None:
        self.number = number
        self.process = process
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


def _nothing() -> None:
    """What a cancelled callback does; it holds on to nothing."""


class Soon(asyncio.Handle):
    """A callback of this round, without asyncio's debugging, which costs more than most callbacks."""

    __slots__ = ()

    def __init__(
        self, callback: Callable[..., object], args: Sequence[Any], loop: asyncio.AbstractEventLoop, context: Context | None
    ) -> None:
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True
        self._callback, self._args = _nothing, ()


class Later(asyncio.TimerHandle):
    """A timer, as lean."""

    __slots__ = ()

    def __init__(
        self, when: float, callback: Callable[..., object], args: Sequence[Any], loop: asyncio.AbstractEventLoop, context: Context | None
    ) -> None:
        self._when = when
        self._scheduled = True
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True
        self._callback, self._args = _nothing, ()


class SimLoop(asyncio.BaseEventLoop):
    """The loop.

    Args:
        chance: decides who lags.

    Attributes:
        faults: unhandled exceptions, as sentences.
        frozen: processes that stand still.
        network: where connections are made; set by who builds it.
    """

    _ready: Any
    _stopping: bool

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._clock = [1000.0]
        self.time = functools.partial(self._clock.__getitem__, 0)  # type: ignore[method-assign]  # asked more often than anything else
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._count = 0
        self._chance = chance
        self._tasks_made = 0
        self._tasks_kept = 100
        self._second = 0.0
        self._rounds = 0
        self.faults: list[str] = []
        self.frozen: dict[Process, None] = {}
        self.network: Any = None
        self.set_exception_handler(self._note_fault)
        self.tasks: dict[SimTask, None] = {}

    # --- time

    def call_later(
        self, delay: float, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None
    ) -> asyncio.TimerHandle:
        when = self._clock[0] + delay
        timer = Later(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, timer))
        return timer

    def call_at(
        self, when: float, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = Later(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, timer))
        return timer

    def call_soon(self, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None) -> asyncio.Handle:
        handle = Soon(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _run_once(self) -> None:
        timers, ready, clock = self._timers, self._ready, self._clock
        now = clock[0] + ROUND_S
        if not ready and not self._stopping:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers:
                raise StuckError("nobody waits for anything")
            now = max(now, timers[0][0])
        clock[0] = now
        self._rounds += 1
        if now >= self._second:
            self._second, self._rounds = now + 1.0, 0
        elif self._rounds > ROUNDS_PER_S:
            raise StuckError(f"somebody polls without sleeping: {next(iter(ready), None)!r}")
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)[2]
            if not timer._cancelled:
                ready.append(timer)
        if self.frozen or (len(ready) > 1 and self._chance.random() * LAG_ONE_IN < 1.0):
            self._sort_out()
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001  # a fault of what is simulated, and a finding
                self._note_fault(self, {"message": f"exception in {handle._callback}", "exception": error})

    def _sort_out(self) -> None:
        """Sets aside what belongs to frozen processes, and lets one process lag behind."""
        batch = list(self._ready)
        self._ready.clear()
        owners = [handle._context.get(PROCESS) for handle in batch]
        names = list(dict.fromkeys(o for o in owners if o is not None and o not in self.frozen))
        late = self._chance.choice(names) if len(names) > 1 else None
        last: list[asyncio.Handle] = []
        for handle, owner in zip(batch, owners, strict=True):
            if owner is None:
                self._ready.append(handle)
            elif owner in self.frozen:
                owner.backlog.append(handle)
            elif owner is late:
                last.append(handle)
            else:
                self._ready.append(handle)
        self._ready.extend(last)

    def freeze(self, process: Process) -> None:
        """Stops a process as SIGSTOP does: what is due waits, in order."""
        self.frozen[process] = None

    def thaw(self, process: Process) -> None:
        """Lets it go on."""
        if process in self.frozen:
            del self.frozen[process]
            self._ready.extend(process.backlog)
            process.backlog.clear()

    # --- tasks and threads

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> SimTask:
        self._tasks_made += 1
        process = PROCESS.get() if context is None else context.get(PROCESS)
        task = SimTask(coro, number=self._tasks_made, process=process, loop=self, name=name or f"task {self._tasks_made}", context=context)
        self.tasks[task] = None
        if len(self.tasks) > self._tasks_kept:
            self.tasks = {task: None for task in self.tasks if not task.done()}
            self._tasks_kept = 2 * len(self.tasks) + 100
        return task

    def of(self, process: Process) -> list[SimTask]:
        """The tasks of a process that have not ended."""
        return [task for task in self.tasks if task.process is process and not task.done()]

    def run_in_executor(self, executor: Any, func: Callable[[*Args], Result], *args: *Args) -> asyncio.Future[Result]:
        """Runs it on this thread, a moment later."""
        future: asyncio.Future[Result] = self.create_future()
        self.call_later(THREAD_S, self._execute, future, PROCESS.get(), func, args)
        return future

    def _execute(self, future: asyncio.Future[Any], process: Process | None, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if process is not None and process.dead:
            future.cancel()
            return
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001  # it belongs to who waits
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(result)

    def _note_fault(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.faults.append(f"{self.time():.3f} {context.get('message')}: {type(error).__name__}: {error}")

    # --- connections

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_options: Any) -> Any:
        return await self.network.connect(protocol_factory, host, port)

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **_options: Any) -> Any:
        return self.network.listen(protocol_factory, host, port)

    # --- what a loop must have and a simulation never needs

    def _process_events(self, event_list: Any) -> None:
        raise NotImplementedError

    def _write_to_self(self) -> None:
        pass


def finish(coro: Generator[Any, Any, Result] | Coroutine[Any, Any, Result], loop: SimLoop) -> Result:
    """Runs a coroutine to its end, and closes the loop."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(coro)
    finally:
        asyncio.set_event_loop(None)
        loop.close()
