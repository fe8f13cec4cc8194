"""The hands of the self-benchmark: whom they leave alone, and what ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace

import msgspec
import pytest

from disagg.cluster.measurer import Measurer
from disagg.errors import EngineError
from disagg.model import Choice, ClusterView, EngineLoad, EngineState, Role
from disagg.observe.log import make_logger
from disagg.policy.benchmark import AGAIN_S
from disagg.policy.forecast import Forecast
from tests.fake_engine import until
from tests.test_benchmark import engine

PAIR = (engine(0, Role.PREFILL), engine(1, Role.DECODE))


class Bench:
    """A measurer over engines that answer at once."""

    def __init__(self) -> None:
        self.table = SimpleNamespace(view=ClusterView.of(PAIR))
        self.forecast = Forecast()
        self.forecast.grow(2)
        self.legs = [0] * 4
        self.asked = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.on_needed: Callable[[], None] = lambda: None
        self.slots: Collection[int] = ()
        self.during: Callable[[], None] = lambda: None
        self.now = 100.0
        self.made = Measurer(
            table=self.table,
            forecast=self.forecast,
            time=self.time,
            legs_of=lambda slot: self.legs[slot],
            on_measuring=self.on_measuring,
            spawn=lambda work, _: self.tasks.append(asyncio.get_running_loop().create_task(work)),
            new_salt=lambda: "0123456789abcdef",
            clock=asyncio.get_running_loop().time,
            log=make_logger("critical", "text"),
        )

    def on_measuring(self, slots: Collection[int], on_needed: Callable[[], None]) -> None:
        self.slots, self.on_needed = slots, on_needed

    async def time(self, _choice: Choice, _body: bytes, _tokens: int, answer: int) -> Sequence[float]:
        self.asked += 1
        began = asyncio.get_running_loop().time()
        self.during()
        await asyncio.sleep(0)
        return [began + 0.01 * (n + 1) for n in range(answer)]

    async def look(self) -> dict[str, int]:
        self.now += AGAIN_S * 100
        self.made.look(self.now)
        await until(lambda: all(task.done() for task in self.tasks))
        return dict(self.made.outcomes)

    def change(self, slot: int, **what: object) -> None:
        engines = [msgspec.structs.replace(e, **what) if e.slot == slot else e for e in self.table.view.engines]
        self.table.view = ClusterView.of(engines)


async def test_both_engines_of_a_pair_are_known_afterwards() -> None:
    bench = Bench()
    assert await bench.look() == {"done": 1}
    assert (bench.forecast.is_known(0)[0], bench.forecast.is_known(1)[1]) == (True, True)
    assert (list(bench.slots), list(bench.made.measuring)) == ([], [])
    asked = bench.asked
    assert await bench.look() == {"done": 1}
    assert bench.asked == asked


async def test_an_engine_that_works_for_others_is_left_alone() -> None:
    bench = Bench()
    bench.change(1, load=EngineLoad(requests=1))
    assert await bench.look() == {}, "another router's, or a client's of its own"
    bench.change(1, load=EngineLoad())
    bench.legs[0] = 1
    assert await bench.look() == {}, "ours"
    bench.legs[0] = 0
    assert await bench.look() == {"done": 1}


async def test_an_engine_that_no_request_has_seen_yet_waits() -> None:
    bench = Bench()
    bench.table.view = ClusterView.of([*PAIR, engine(2, Role.DECODE), engine(3, Role.PREFILL)])
    assert await bench.look() == {"done": 1}
    assert await bench.look() == {"done": 1}, "slots 2 and 3 are not in the books"


@pytest.mark.parametrize(
    "change",
    [{"state": EngineState.DRAINING}, {"address": engine(1, Role.DECODE, pid=99).address}, {"address": engine(1, Role.PREFILL).address}],
)
async def test_it_ends_when_an_engine_is_wanted_for_something_else(change: dict[str, object]) -> None:
    bench = Bench()
    bench.during = lambda: bench.change(1, **change)
    assert await bench.look() == {"stopped": 1}
    assert bench.asked == 1


async def test_what_an_engine_refuses_and_what_is_our_fault_ends_this_measurement_and_no_other() -> None:
    for error in (EngineError("no"), ZeroDivisionError("ours")):
        bench = Bench()

        def fail(error: Exception = error) -> None:
            raise error

        bench.during = fail
        assert await bench.look() == {"failed": 1}
        assert (list(bench.slots), list(bench.made.measuring)) == ([], [])
        bench.during = lambda: None
        assert await bench.look() == {"failed": 1, "done": 1}


async def test_what_was_measured_before_an_engine_refused_is_kept() -> None:
    bench = Bench()

    def refuse_the_third() -> None:
        if bench.asked == 3:
            raise EngineError("no")

    bench.during = refuse_the_third
    assert await bench.look() == {"failed": 1}
    assert bench.forecast.known(0, now=bench.now).reads_trust.samples == 2


async def test_the_end_of_the_router_is_no_client() -> None:
    bench = Bench()

    def end() -> None:
        bench.tasks[0].cancel()

    bench.during = end
    assert await bench.look() == {}
    assert bench.tasks[0].cancelled()
