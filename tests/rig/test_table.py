"""The tables say what the cells say: ratios within a round, medians over rounds, verdicts with their count."""

from __future__ import annotations

import pytest

from tests.rig.processes import Measured, Quantiles
from tests.rig.table import NO_ROUTER, SCENARIOS, TARGETS, Cell, Results, duration, page, short, spread_of

TITLES = {NO_ROUTER: "no router", "disagg": "disagg", "sglang-router": "sglang-router 0.3.2", "smg": "smg 1.13.0"}


def cell(
    router: str,
    cpu_us: float,
    *,
    scenario: str = "whole-32",
    number: int = 0,
    first_us: float = 0,
    peak_mb: float = 60,
    faults: dict[str, int] | None = None,
) -> Cell:
    units = 1000
    return Cell(
        round=number,
        scenario=scenario,
        router=router,
        measured=Measured(
            seconds=2.0,
            requests=units,
            events=units,
            latency_us=Quantiles(units, 100, 200),
            first_us=Quantiles(units, first_us, 2 * first_us),
            event_us=Quantiles(units, 10, 20),
            cpu_s=[],
            errors={},
        ),
        router_cpu_s=units * cpu_us / 1e6,
        rig_cpu_s=0.1,
        memory_mb=(50, peak_mb),
        faults=faults or {},
        core_ms=3.0,
    )


def verdict(results: Results, title: str) -> str:
    text = page(results, TITLES, {"command": "./scripts/bench"})
    return next(line for line in text.splitlines() if line.startswith(f"| {title}"))


def test_drift_between_rounds_leaves_ratios_alone() -> None:
    drift = (1.0, 3.0, 0.5)
    cells = [
        cell(router, cpu_us * slow, number=number)
        for number, slow in enumerate(drift)
        for router, cpu_us in (("disagg", 40), ("sglang-router", 80))
    ]
    line = verdict(Results(cells), "CPU, whole answers, c=32, against sglang-router")
    assert "| 0.50 | reached (3 of 3 rounds) |" in line


def test_the_median_decides_and_the_rounds_are_counted() -> None:
    cells = [
        made
        for number, cpu_us in enumerate((70, 90, 100))
        for made in (cell("disagg", cpu_us, number=number), cell("sglang-router", 100, number=number))
    ]
    line = verdict(Results(cells), "CPU, whole answers, c=32, against sglang-router")
    assert "0.90 (0.70 to 1.00)" in line
    assert "**not reached** (1 of 3 rounds)" in line


def test_added_waiting_is_against_no_router() -> None:
    results = Results(cell(router, 50, scenario="paced-32", first_us=us) for router, us in ((NO_ROUTER, 60), ("disagg", 360)))
    assert "| 300 | reached" in verdict(results, "added TTFT p50")
    assert "TTFT +300 µs" in page(results, TITLES, {})


def test_what_was_left_out_is_not_measured() -> None:
    results = Results([cell("disagg", 40)])
    for target in TARGETS:
        assert "not measured" in verdict(results, target.title)


@pytest.mark.parametrize(("peak_mb", "word"), [(79, "reached"), (81, "**not reached**")])
def test_memory_is_the_peak_of_a_round_with_256_connections(peak_mb: float, word: str) -> None:
    cells = [cell("disagg", 40), cell("disagg", 40, scenario="stream-256", peak_mb=peak_mb)]
    assert f"| {word} (" in verdict(Results(cells), "memory peak")


def test_faults_are_shown_and_told_apart() -> None:
    results = Results([cell("disagg", 40), cell("smg", 40, faults={"room_reused": 2})])
    assert results.faults() == ["smg, whole answers, c=32: 2 room_reused"]
    assert not results.faults({"disagg"})
    assert "Broken promises" in page(results, TITLES, {})


def test_every_scenario_has_its_row() -> None:
    results = Results([cell(router, 40, scenario=key) for key in SCENARIOS for router in TITLES])
    text = page(results, TITLES, {"date": "today"})
    assert all(f"| {scenario.title} |" in text for scenario in SCENARIOS.values())
    assert "- date: today" in text


def test_figures_are_short() -> None:
    assert [short(9.4), short(14123), duration(75), duration(43900)] == ["9.4", "14.1k", "75 µs", "43.9 ms"]
    assert f"{spread_of([3, 1, 2]):.1f}" == "2.0 (1.0 to 3.0)"
    assert f"{spread_of([3]):.1f}" == "3.0"
