"""Has idle engines read and write, and tells the forecast how long they took: the hands of `disagg.policy.benchmark`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol

import structlog

from disagg.cluster.canary import pairing
from disagg.errors import DisaggError
from disagg.model import Choice, ClusterView, EngineId, EngineView
from disagg.policy.benchmark import Benchmark, Plan, Round, request
from disagg.policy.forecast import Forecast

LOOK_S = 1.0
SETTLE_S = 1.0
SETTLE_LOOK_S = 0.01


class Table(Protocol):
    """What the measurer needs of the controller."""

    @property
    def view(self) -> ClusterView:
        """The current view."""


class Measurer:
    """Measures one pair, or unified engine, at a time.

    Args:
        table: the controller.
        forecast: is told.
        time: has a pair stream the answer to a ``/generate`` body with a prompt and an answer of so many tokens; returns when its events
            came, raises DisaggError.
        legs_of: how many legs run on the engine in a slot.
        on_measuring: told which slots are being measured from now on, and whom to call when a client needs one of them.
        spawn: runs a coroutine as a task that somebody owns.
        new_salt: a fresh word each time.
        clock: monotonic seconds.

    Attributes:
        outcomes: of measurements: done, stopped (somebody needs the engines), failed.
        measuring: the engines that are being measured.
    """

    def __init__(
        self,
        *,
        table: Table,
        forecast: Forecast,
        time: Callable[[Choice, bytes, int, int], Awaitable[Sequence[float]]],
        legs_of: Callable[[int], int],
        on_measuring: Callable[[Collection[int], Callable[[], None]], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], Any],
        new_salt: Callable[[], str],
        clock: Callable[[], float],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._table = table
        self._forecast = forecast
        self._time = time
        self._legs_of = legs_of
        self._on_measuring = on_measuring
        self._spawn = spawn
        self._new_salt = new_salt
        self._clock = clock
        self._log = log
        self._benchmark = Benchmark()
        self.measuring: Collection[EngineId] = ()
        self._looked_at = float("-inf")
        self._round: asyncio.Future[Any] | None = None
        self._is_needed = False

    def look(self, now: float) -> None:
        """Called at each beat while no canary is asked: looks whether there is an engine to measure."""
        if self.measuring or 0.0 <= now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        choice = self._benchmark.next(self._table.view, known=self._known, is_idle=self._is_idle, now=now)
        if choice is not None:
            self.measuring = [engine.id for engine in (choice.prefill, choice.decode) if engine is not None]
            self._spawn(self._measure(choice), f"measurement of {pairing(choice)}")

    def _known(self, slot: int) -> tuple[bool, bool]:
        return self._forecast.is_known(slot) if slot < self._forecast.engines else (True, True)  # no request has seen it yet

    def _is_idle(self, engine: EngineView) -> bool:
        return not self._legs_of(engine.slot) and not engine.load.requests

    async def _measure(self, choice: Choice) -> None:
        plan, began, outcome = Plan(choice), self._clock(), "failed"
        reader, writer = (choice.prefill or choice.decode).slot, choice.decode.slot
        self._is_needed = False
        self._on_measuring({reader, writer}, self._stop)
        try:
            outcome = await self._go_through(choice, plan)
            self._forecast.measured(reader, reads=plan.reads, now=self._clock())
            self._forecast.measured(writer, steps=plan.steps, now=self._clock())
        except Exception:  # noqa: BLE001  # a fault of ours must not end all measurements
            self._log.exception("a measurement failed", engines=str(pairing(choice)))
        finally:
            self.measuring = ()
            self._on_measuring((), self._stop)
        self.outcomes[outcome] += 1
        self._log.info("measured", engines=str(pairing(choice)), outcome=outcome, seconds=round(self._clock() - began, 2))

    async def _go_through(self, choice: Choice, plan: Plan) -> str:
        """One round after the other. How it ended."""
        try:
            while (one := plan.next()) is not None:
                if not await self._is_free(choice):
                    return "stopped"
                since = self._clock()
                times = await self._run(choice, one)
                plan.took(one, self._clock() - since, [[at - since for at in each] for each in times])
        except asyncio.CancelledError:
            if not self._is_needed:
                raise
            return "stopped"
        except DisaggError as error:
            self._log.info("an engine could not be measured", engines=str(pairing(choice)), why=str(error))
            return "failed"
        return "done"

    async def _run(self, choice: Choice, one: Round) -> Sequence[Sequence[float]]:
        """When the tokens of each answer came. Raises DisaggError."""
        asked = [self._time(choice, request(one, self._new_salt()), one.prompt, one.answer) for _ in range(one.at_once)]
        self._round = asyncio.gather(*asked, return_exceptions=True)
        try:
            answers = await self._round
        finally:
            self._round = None
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def _stop(self) -> None:
        """A client needs the engines: what they do for us ends at once."""
        self._is_needed = True
        if self._round is not None:
            self._round.cancel()

    async def _is_free(self, choice: Choice) -> bool:
        """Nobody else wants these engines. SGLang's prefill engines end a request of ours a moment after its answer has ended."""
        pair = [e for e in (choice.prefill, choice.decode) if e is not None]
        until = self._clock() + SETTLE_S
        while any(self._legs_of(e.slot) for e in pair):
            if self._clock() >= until or self._is_needed:
                return False
            await asyncio.sleep(SETTLE_LOOK_S)
        engines = {e.id: e for e in self._table.view.engines}
        return not self._is_needed and all(e.id in engines and engines[e.id].serves_as(e) for e in pair)
