"""How many decode engines are needed, by what came and by what is being written."""

from __future__ import annotations

import pytest

from disagg.model import EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Role
from disagg.policy.books import ITL_SHARE, Books, Slo
from disagg.policy.forecast import STEPS

SLO = Slo(5.0, 0.1)


def engines(count: int) -> list[EngineView]:
    load, facts = EngineLoad(kv_total_tokens=3_000_000), EngineFacts(model="m")
    return [EngineView(EngineAddress(EngineId(f"d{n}"), Role.DECODE, "h", 1), n, EngineState.READY, facts, load) for n in range(count)]


def books(writing: int, *, slots: int = 2) -> Books:
    made = Books(SLO)
    made.grow(slots)
    for number in range(writing):
        made.forecast.began(number % slots, 1000)
    for _ in range(500):
        made.forecast.answered(400, 800)
    return made


def test_as_many_answers_as_fit_into_a_step_need_one_engine() -> None:
    a, b, c = STEPS
    most = (ITL_SHARE * SLO.itl_s - a) / (b + c * 1000)
    assert books(0).writers_busy(engines(2)) == 0.0
    assert books(300).writers_busy(engines(2)) == pytest.approx(300 / most, rel=0.01)
    assert books(3000).writers_busy(engines(2)) == pytest.approx(3000 / most, rel=0.01), "more than there are, if more are needed"


def test_an_engine_is_not_counted_on_for_steps_as_long_as_was_promised() -> None:
    """They wander: with this mean half of them would be too long."""
    made, engine = books(0), engines(1)[0]
    assert made.write_s(engine) > made.forecast.write_s(0, limit_s=SLO.itl_s, kv_tokens=3_000_000)
