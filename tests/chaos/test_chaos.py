"""Some minutes of chaos against real processes; ``./scripts/chaos --minutes 60`` is the same for longer."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import say
from tests.chaos.judge import page, report_of
from tests.chaos.run import Plan, run

pytestmark = pytest.mark.slow

MINUTES = 5.0
SEED = 20261121


async def test_one_fault_at_a_time() -> None:
    log = await run(Plan(MINUTES, SEED), say)
    report = report_of(log)
    assert report.broken == [], page(report)
    assert sum(report.faults.values()) >= MINUTES * 3, page(report)
    assert report.outcomes["right"] >= MINUTES * 60, page(report)
