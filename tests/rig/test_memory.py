"""The memory bench counts what it should, and its verdict can be bad."""

from __future__ import annotations

import shutil

import pytest

from tests.rig.bench import pick_cores
from tests.rig.binary import build
from tests.rig.memory import GROWTH, Memory, Sample, measure, table
from tests.rig.processes import Rig


def test_growth_counts_from_the_end_of_the_warm_up_to_the_most_that_came_later() -> None:
    memory = Memory([Sample(5, 50.0, 60.0), Sample(10, 80.0, 90.0), Sample(60, 82.0, 84.0), Sample(100, 80.0, 81.0)])
    assert memory.warm.requests == 10
    assert memory.growth == pytest.approx(0.05)
    assert "growth after the warm-up: +5.0 %" in table(memory)


def test_a_leak_is_seen() -> None:
    memory = Memory([Sample(n, 70.0 + n / 10, 70.0 + n / 10) for n in range(10, 110, 10)])
    assert memory.growth > GROWTH


@pytest.mark.skipif(shutil.which("cc") is None, reason="the rig needs a C compiler")
def test_requests_go_through_a_router_and_its_memory_is_seen() -> None:
    said: list[str] = []
    memory = measure(Rig(build(), *pick_cores()), 1, 0.5, said.append)
    (sample,) = memory.samples
    assert not any(memory.errors.values())
    assert sample.requests > 0
    assert 20.0 < sample.rss_mb <= sample.most_mb < 500.0
    assert len(said) == 1
