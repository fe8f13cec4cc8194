"""The cluster on virtual time: seeds, replays, and an oracle that can fail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sim import engine, oracle
from tests.sim.world import DEFECTS, Plan, simulate

SEEDS = range(1, 9)
QUIET = ("none",)
KNOWN = ("engine garbage",)
"""Faults against which there is no defence yet: a stream's broken event goes on to the client."""


def faults() -> tuple[str, ...]:
    from tests.sim.faults import KINDS

    return tuple(kind.name for kind in KINDS if kind.name not in KNOWN)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_goes_wrong_in_a_simulated_minute(seed: int) -> None:
    result = simulate(Plan(seed, faults=faults()))
    assert result.found == [], f"faults {result.faults}; replay with ./scripts/simulate --seed {seed} --minutes 1 --trace"
    assert result.outcomes["ok"] > 10


def test_without_faults_every_request_is_answered() -> None:
    result = simulate(Plan(1, faults=QUIET))
    assert (result.found, set(result.outcomes)) == ([], {"ok", "left"})


def test_a_seed_replays_identically() -> None:
    first, second = simulate(Plan(3), keep=True), simulate(Plan(3), keep=True)
    assert first.lines == second.lines
    assert first.trace == second.trace != simulate(Plan(4)).trace


def test_a_seed_replays_identically_in_another_process() -> None:
    """Hashes of strings and addresses of objects are others there."""
    program = "from tests.sim.world import Plan, simulate; print(simulate(Plan(5, load_s=20.0, gap_s=3.0)).trace)"
    traces = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120)
        traces.add(done.stdout)
    assert len(traces) == 1


CLAUSES = {
    "engines leak pages": "engines empty",
    "engines answer wrong": "right",
    "engines fail": "lost",
    "a task stays": "tasks",
    "a connection stays": "connections",
    "a callback fails": "faults",
    "prompts are logged": "logs",
    "attempts are kept": "attempts",
    "nothing is aborted": "orphans",
    "the router stands still": "ended",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_oracle_sees_a_planted_bug(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "EXPECT_LOST", 0)
    result = simulate(Plan(1, load_s=20.0, faults=QUIET, defect=defect))
    assert CLAUSES[defect] in {found.clause for found in result.found}


def test_the_oracle_sees_answers_that_come_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "LIMIT_S", 0.5)
    assert "in time" in {found.clause for found in simulate(Plan(1, load_s=20.0, faults=QUIET)).found}


def test_the_oracle_sees_writes_into_pages_that_were_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "RELEASE_S", 0.0)
    assert "late writes" in {found.clause for found in simulate(Plan(1, load_s=60.0, rate=8.0, faults=QUIET)).found}
