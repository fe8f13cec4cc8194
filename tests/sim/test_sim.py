"""The cluster on virtual time: seeds, replays, and an oracle that can fail."""

from __future__ import annotations

import pytest

from tests.sim.world import Plan, simulate

SEEDS = range(1, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_goes_wrong_in_a_simulated_minute(seed: int) -> None:
    result = simulate(Plan(seed, faults=("engine crash", "cut", "agent crash", "host pause", "power loss", "bad messages", "router block")))
    assert result.found == [], f"replay with ./scripts/simulate --seed {seed} --trace"
    assert result.outcomes["ok"] > 10


def test_a_seed_replays_identically() -> None:
    first, second = simulate(Plan(3), keep=True), simulate(Plan(3), keep=True)
    assert first.lines == second.lines
    assert first.trace == second.trace
