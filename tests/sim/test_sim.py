"""The cluster on virtual time: seeds, replays, and an oracle that can fail."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from disagg.cluster import controller
from disagg.model import HostState
from tests.sim import engine, oracle, scenarios, words
from tests.sim.world import DEFECTS, Plan, Result, simulate

SEEDS = range(1, 9)
QUIET = ("none",)
KNOWN: tuple[str, ...] = ()
"""Faults against which there is no defence yet: a stream's broken event goes on to the client."""


def faults() -> tuple[str, ...]:
    from tests.sim.faults import KINDS

    return tuple(kind.name for kind in KINDS if kind.name not in KNOWN)


@pytest.mark.parametrize("seed", [*SEEDS[:2], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[2:])])
def test_nothing_goes_wrong_in_a_simulated_minute(seed: int) -> None:
    result = simulate(Plan(seed, faults=faults()))
    assert result.found == [], f"faults {result.faults}; replay with ./scripts/simulate --seed {seed} --minutes 1 --trace"
    assert result.outcomes["ok"] > 10


def test_without_faults_every_request_is_answered() -> None:
    result = simulate(Plan(1, faults=QUIET))
    assert (result.found, set(result.outcomes)) == ([], {"ok", "left"})


def test_a_seed_replays_identically() -> None:
    first, second, other = (simulate(Plan(seed, load_s=20.0, gap_s=3.0), keep=True) for seed in (3, 3, 4))
    assert first.lines == second.lines
    assert first.trace == second.trace != other.trace


@pytest.mark.slow
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


@pytest.mark.parametrize(("release_s", "expected"), [(0.0, {"late writes"}), (engine.RELEASE_S, set())])
def test_the_oracle_sees_writes_into_pages_that_were_given_back(
    release_s: float, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RELEASE_S", release_s)
    result = simulate(Plan(1), script=scenarios.leavings(800, tokens=90, within_s=0.04))
    assert {found.clause for found in result.found} == expected


# --- the model


def test_an_answer_that_is_cut_anywhere_has_one_right_rest() -> None:
    chance = random.Random(1)
    for _ in range(50):
        prompt = [chance.randrange(words.VOCABULARY) for _ in range(chance.randrange(90))]
        whole, finish = words.answer(prompt, 60)
        assert words.ids_of(words.text_of(whole)) == whole
        for cut in range(len(whole)):
            rest, end = words.answer([*prompt, *whole[:cut]], 60 - cut)
            assert (whole[:cut] + rest, end) == (whole, finish)


# --- stories


def worse(result: Result) -> list[str]:
    """Hosts and engines of which the router came to think ill."""
    return [
        line for line in result.logs if any(word in line for word in ("state=suspect", "state=silent", "now=suspect", "now=dead reason=it"))
    ]


def test_a_router_that_stood_still_thinks_ill_of_nobody() -> None:
    result = simulate(Plan(1), script=scenarios.stall(3.0))
    assert (result.found, worse(result)) == ([], [])


def test_a_router_that_does_not_know_that_it_stood_still_thinks_ill_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "LAG_S", 1e9)
    assert worse(simulate(Plan(1), script=scenarios.stall(3.0)))


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_a_step_of_the_wall_clock_changes_nothing(seconds: float) -> None:
    result, still = (simulate(Plan(1), script=scenarios.step(by)) for by in (seconds, 0.0))
    assert (result.found, worse(result), result.outcomes) == ([], [], {"ok": 2})
    assert result.trace == still.trace, "nothing at all, down to the last byte on a wire"


@pytest.mark.parametrize(("inwards", "outwards"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_host_that_is_cut_off_is_suspected_after_a_second_and_silent_after_two(seed: int, inwards: bool, outwards: bool) -> None:
    story = scenarios.Cutting(inwards=inwards, outwards=outwards)
    result = simulate(Plan(seed), script=story)
    assert result.found == []
    assert 0.7 < story.seen[HostState.SUSPECT] < 1.3
    assert 1.7 < story.seen[HostState.SILENT] < 2.3
    assert story.back_s < 2.0


def test_a_bad_network_is_no_reason_to_think_ill_of_a_host() -> None:
    result = simulate(Plan(1), script=scenarios.crowd(0.01, 0.05, 120.0))
    assert (result.found, worse(result)) == ([], [])


def test_a_worse_network_is() -> None:
    assert worse(simulate(Plan(1), script=scenarios.crowd(0.7, 0.0, 30.0)))


def test_streams_that_are_cut_all_end_right() -> None:
    result = simulate(Plan(1), script=scenarios.cuts(72))
    assert result.found == []
    assert set(result.outcomes) == {"ok"}
    assert sum(result.outcomes.values()) == 72


def test_clients_that_leave_leave_nothing_behind() -> None:
    result = simulate(Plan(1), script=scenarios.leavings(400))
    assert result.found == []
    assert result.outcomes["left"] > 200
