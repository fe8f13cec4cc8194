"""From measured cells to tables and verdicts. Pure: the same cells, read back from JSON, give the same page.

The machine's own speed drifts by more than the differences looked for. So the routers take turns within a round, a ratio is
formed within its round, and what is shown is the median over the rounds with its extremes.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from tests.rig.processes import Load, Measured

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

NO_ROUTER = "none"


@dataclass(frozen=True)
class Scenario:
    """One row of the bench: what the clients do."""

    key: str
    title: str
    load: Load

    @property
    def unit(self) -> str:
        """What CPU time is divided by."""
        return "chunk" if self.load.stream else "req"


SCENARIOS = {
    scenario.key: scenario
    for scenario in (
        Scenario("whole-1", "whole answers, c=1", Load(connections=1)),
        Scenario("whole-32", "whole answers, c=32", Load(connections=32)),
        Scenario("prompt-32", "32 KB prompt, c=32", Load(connections=32, prompt_bytes=32 * 1024)),
        Scenario("stream-1", "stream of 128 chunks, c=1", Load(connections=1, stream=True)),
        Scenario("stream-32", "stream unpaced, c=32", Load(connections=32, stream=True)),
        Scenario("stream-256", "stream unpaced, c=256", Load(connections=256, stream=True)),
        Scenario("paced-32", "paced 10 ms/chunk, c=32", Load(connections=32, stream=True, pace_us=10_000)),
        Scenario("paced-256", "paced 20 ms/chunk, c=256", Load(connections=256, stream=True, pace_us=20_000)),
    )
}


class Cell(msgspec.Struct, frozen=True):
    """One router in one scenario of one round.

    Attributes:
        router: its name, or ``none``.
        router_cpu_s: of its processes within the window.
        rig_cpu_s: of fake engines and load within the window.
        memory_mb: resident before the round's first request, and the most it has been so far in this round.
        faults: what the fake engines and the load hold against the router.
        core_ms: how long a fixed loop took on the router's core just before; the machine's own speed.
    """

    round: int
    scenario: str
    router: str
    measured: Measured
    router_cpu_s: float
    rig_cpu_s: float
    memory_mb: tuple[float, float]
    faults: dict[str, int]
    core_ms: float

    @property
    def units(self) -> int:
        """Chunks or requests; at least one, so that a broken router has figures too."""
        return max(1, self.measured.events if SCENARIOS[self.scenario].load.stream else self.measured.requests)


METRICS: dict[str, Callable[[Cell], float]] = {
    "rate": lambda cell: cell.units / max(cell.measured.seconds, 1e-9),
    "cpu": lambda cell: 1e6 * cell.router_cpu_s / cell.units,
    "latency": lambda cell: cell.measured.latency_us.p50,
    "latency99": lambda cell: cell.measured.latency_us.p99,
    "ttft": lambda cell: cell.measured.first_us.p50,
    "ttft99": lambda cell: cell.measured.first_us.p99,
    "chunk": lambda cell: cell.measured.event_us.p50,
    "chunk99": lambda cell: cell.measured.event_us.p99,
    "router busy": lambda cell: cell.router_cpu_s / max(cell.measured.seconds, 1e-9),
    "rig busy": lambda cell: cell.rig_cpu_s / max(cell.measured.seconds, 1e-9),
}


class Spread(msgspec.Struct, frozen=True):
    """One figure over the rounds."""

    low: float
    median: float
    high: float

    def __format__(self, spec: str) -> str:
        """``median (low to high)``, each in the given format; the median alone where that is all."""
        if self.low == self.high:
            return f"{self.median:{spec}}"
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def spread_of(values: Sequence[float]) -> Spread:
    """The median and the extremes of at least one value."""
    return Spread(min(values), statistics.median(values), max(values))


class Results:
    """The cells of one run, by what they are asked for."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self.cells = list(cells)
        self.routers = list(dict.fromkeys(cell.router for cell in self.cells))
        self.scenarios = [key for key in SCENARIOS if any(cell.scenario == key for cell in self.cells)]
        self._by_key = {(cell.scenario, cell.router, cell.round): cell for cell in self.cells}
        self.rounds = sorted({cell.round for cell in self.cells})

    def values(self, scenario: str, router: str, metric: str) -> list[float]:
        """One figure per round."""
        cells = (self._by_key.get((scenario, router, number)) for number in self.rounds)
        return [METRICS[metric](cell) for cell in cells if cell]

    def compared(self, scenario: str, metric: str, router: str, other: str, how: Callable[[float, float], float]) -> list[float]:
        """Per round: how this router's figure stands to the other's."""
        pairs = ((self._by_key.get((scenario, router, number)), self._by_key.get((scenario, other, number))) for number in self.rounds)
        return [how(METRICS[metric](ours), METRICS[metric](theirs)) for ours, theirs in pairs if ours and theirs]

    def memory_mb(self, router: str, which: Literal[0, 1]) -> list[float]:
        """Per round: idle (0) or peak (1)."""
        by_round = ([c.memory_mb[which] for c in self.cells if c.router == router and c.round == r] for r in self.rounds)
        return [max(values) for values in by_round if values]

    def faults(self, routers: Collection[str] | None = None) -> list[str]:
        """One line per router (of these, or any) and scenario that broke a promise."""
        sums: dict[tuple[str, str], Counter[str]] = {}
        for cell in self.cells:
            if cell.faults and (routers is None or cell.router in routers):
                sums.setdefault((cell.router, cell.scenario), Counter()).update(cell.faults)
        return [
            f"{router}, {SCENARIOS[scenario].title}: " + ", ".join(f"{count} {name}" for name, count in counts.items())
            for (router, scenario), counts in sums.items()
        ]


def ratio(ours: float, theirs: float) -> float:
    """How many times theirs ours is."""
    return ours / theirs if theirs else float("inf")


def difference(ours: float, theirs: float) -> float:
    """What ours adds."""
    return ours - theirs


# ---- what is to be reached -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One promise: a figure of disagg, alone or against another's in the same round, and its limit."""

    title: str
    scenario: str
    metric: str
    against: str
    how: Callable[[float, float], float]
    limit: float

    def values(self, results: Results) -> list[float]:
        """Per round."""
        return results.compared(self.scenario, self.metric, "disagg", self.against, self.how)


@dataclass(frozen=True)
class MemoryTarget:
    """The promise about memory, which is of a whole round: what a scenario leaves behind counts for the next."""

    title: str
    limit: float

    def values(self, results: Results) -> list[float]:
        """Peak per round, if the round had 256 connections."""
        wide = any(SCENARIOS[key].load.connections >= 256 for key in results.scenarios)
        return results.memory_mb("disagg", 1) if wide else []


def _cpu(scenario: str, against: str, limit: float) -> Target:
    return Target(f"CPU, {SCENARIOS[scenario].title}, against {against}", scenario, "cpu", against, ratio, limit)


TARGETS: tuple[Target | MemoryTarget, ...] = (
    _cpu("whole-32", "sglang-router", 0.75),
    _cpu("prompt-32", "sglang-router", 0.65),
    _cpu("paced-32", "sglang-router", 1.0),
    _cpu("paced-256", "sglang-router", 1.0),
    _cpu("stream-32", "sglang-router", 1.2),
    _cpu("stream-256", "sglang-router", 1.2),
    _cpu("stream-32", "smg", 0.85),
    _cpu("stream-256", "smg", 0.85),
    Target("added TTFT p50 in µs, paced, c=32", "paced-32", "ttft", NO_ROUTER, difference, 500),
    Target("chunk latency p50, unpaced, c=256, against sglang-router", "stream-256", "chunk", "sglang-router", ratio, 0.1),
    Target("chunk latency p50, unpaced, c=256, against smg", "stream-256", "chunk", "smg", ratio, 0.1),
    MemoryTarget("memory peak in MB, c=256 included", 80),
)


# ---- the page --------------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """A rate in as few digits as it deserves."""
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def duration(us: float) -> str:
    """A time in the unit that reads best."""
    return f"{us / 1000:.3g} ms" if abs(us) >= 1000 else f"{us:.3g} µs"


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


@dataclass(frozen=True)
class Shown:
    """One figure of the overview: its metric, its name, and whether what it is without a router is taken off."""

    metric: str
    name: str
    added: bool = False

    def text(self, results: Results, scenario: Scenario, router: str) -> str:
        """As it stands in the table."""
        added = self.added and NO_ROUTER in results.routers and router != NO_ROUTER
        if added:
            values = results.compared(scenario.key, self.metric, router, NO_ROUTER, difference)
        else:
            values = results.values(scenario.key, router, self.metric)
        value = statistics.median(values)
        if self.metric == "rate":
            return f"{short(value)} {scenario.unit}/s"
        return f"{self.name} {'+' if added else ''}{duration(value)}"


RATE, CHUNK, CHUNK_99 = Shown("rate", ""), Shown("chunk", "chunk"), Shown("chunk99", "p99")
ADDED_TTFT = Shown("ttft", "TTFT", added=True)
SHOWN = {
    "whole-1": (RATE, Shown("latency", "p50")),
    "whole-32": (RATE, Shown("latency99", "p99")),
    "prompt-32": (RATE, Shown("latency99", "p99")),
    "stream-1": (ADDED_TTFT, CHUNK),
    "stream-32": (RATE, CHUNK),
    "stream-256": (RATE, CHUNK, CHUNK_99),
    "paced-32": (ADDED_TTFT, CHUNK, CHUNK_99),
    "paced-256": (ADDED_TTFT, Shown("ttft99", "p99"), CHUNK, CHUNK_99),
}


def _cell(results: Results, scenario: Scenario, router: str) -> str:
    parts = [shown.text(results, scenario, router) for shown in SHOWN[scenario.key]]
    if router != NO_ROUTER:
        parts.append(f"**{statistics.median(results.values(scenario.key, router, 'cpu')):.3g} µs/{scenario.unit}**")
    return "; ".join(parts)


def overview(results: Results, titles: dict[str, str]) -> list[str]:
    """Medians of everything, scenario by scenario; the router's CPU time in bold."""
    rows = [[SCENARIOS[key].title, *(_cell(results, SCENARIOS[key], router) for router in results.routers)] for key in results.scenarios]
    memory = [
        "-" if router == NO_ROUTER else " / ".join(f"{statistics.median(results.memory_mb(router, w)):.0f}" for w in (0, 1))
        for router in results.routers
    ]
    return _grid(["", *(titles[router] for router in results.routers)], [*rows, ["memory idle / peak MB", *memory]])


def cpu_table(results: Results, titles: dict[str, str]) -> list[str]:
    """CPU time of each router with its extremes, and disagg's against the others'; how busy both cores were."""
    routers = [router for router in results.routers if router != NO_ROUTER]
    peers = [router for router in routers if router != "disagg" and "disagg" in routers]
    rows = []
    for key in results.scenarios:
        row = [f"{SCENARIOS[key].title}, µs/{SCENARIOS[key].unit}"]
        row += [f"{spread_of(results.values(key, router, 'cpu')):.3g}" for router in routers]
        row += [f"{spread_of(results.compared(key, 'cpu', 'disagg', peer, ratio)):.2f}" for peer in peers]
        busy = (
            " ".join(f"{100 * statistics.median(results.values(key, r, which)):.0f}" for which in ("router busy", "rig busy"))
            for r in routers
        )
        rows.append([*row, " · ".join(busy)])
    head = ["CPU of the router", *(titles[router] for router in routers), *(f"disagg ÷ {peer}" for peer in peers)]
    return _grid([*head, "busy %: router's core, rig's core"], rows)


def verdicts(results: Results) -> list[str]:
    """Each target: what was measured, and whether the median keeps it."""
    rows = []
    for target in TARGETS:
        values = target.values(results)
        if not values:
            rows.append([target.title, f"≤ {target.limit:g}", "-", "not measured"])
            continue
        kept = sum(value <= target.limit for value in values)
        word = "reached" if statistics.median(values) <= target.limit else "**not reached**"
        figure = f"{spread_of(values):{'.2f' if target.limit < 10 else '.0f'}}"
        rows.append([target.title, f"≤ {target.limit:g}", figure, f"{word} ({kept} of {len(values)} rounds)"])
    return _grid(["target", "limit", "median (min to max)", ""], rows)


def page(results: Results, titles: dict[str, str], facts: dict[str, str]) -> str:
    """The whole report in Markdown. ``facts`` say where, when and how it was measured."""
    core = spread_of([cell.core_ms for cell in results.cells])
    lines = [
        "# Router benchmark",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- the machine's own speed, ms for a fixed loop on the router's core before each cell: {core:.3g}",
        "",
        f"Medians of {len(results.rounds)}. Ratios are formed within a round, whose routers take turns in each scenario.",
        "",
        *overview(results, titles),
        "",
        *cpu_table(results, titles),
        "",
        *(verdicts(results) if "disagg" in results.routers else []),
    ]
    if faults := results.faults():
        lines += ["", "## Broken promises", "", *(f"- {line}" for line in faults)]
    return "\n".join(lines) + "\n"
