"""The router benchmark: disagg, its peers and no router at all, side by side in one run. Started by ``scripts/bench``.

One core belongs to the router, the other to everything around it: fake engines, load and this program. Per round each router
is started afresh with engines of its own; then every scenario goes through all of them in turn, so that drift of the machine
meets them alike.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import pstats
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from tests.rig.binary import RigError, build
from tests.rig.contestants import CONTESTANTS, Contestant, install, router_of
from tests.rig.processes import Counters, Fakes, Load, Rig, Router
from tests.rig.table import NO_ROUTER, SCENARIOS, Cell, Results, page

ROOT = Path(__file__).parents[2]
PROFILE_LINES = 30
PROFILE_S = 5.0  # at least: the profile has the start in it, half a second of imports


def say(line: str) -> None:
    """Progress; the tables alone go to stdout."""
    sys.stderr.write(f"bench: {line}\n")
    sys.stderr.flush()


# ---- the machine -----------------------------------------------------------------------------------------------------------


def pick_cores() -> tuple[int, int]:
    """Two cores that we may use and that are not two threads of one, if there is a choice."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RigError("the bench needs two cores: one for the router, one for engines and load")
    siblings = Path(f"/sys/devices/system/cpu/cpu{cores[0]}/topology/thread_siblings_list")
    shared = siblings.read_text().strip() if siblings.exists() else ""
    first, _, last = shared.replace(",", "-").partition("-")
    others = [core for core in cores[1:] if str(core) not in {first, last}]
    return cores[0], (others or cores[1:])[0]


def speed_of(rig: Rig) -> float:
    """How long a fixed loop takes on the router's core, in ms. Guests of a busy host differ by a factor within seconds."""
    os.sched_setaffinity(0, {rig.router_core})
    start = time.perf_counter()
    for _ in range(200_000):
        pass
    took_ms = 1000 * (time.perf_counter() - start)
    os.sched_setaffinity(0, {rig.rig_core})
    return took_ms


def machine_facts(options: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to judge the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    revision = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(revision, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join(["./scripts/bench", *sys.argv[1:]]),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{model}, {os.cpu_count()} cores, Linux {platform.release()}",
        "Python": platform.python_version(),
        "disagg": commit or "not a git checkout",
        "window": f"{options.seconds:g} s after {options.warmup:g} s of warm-up, {options.rounds} rounds",
        "peers": "round_robin (one pair: nothing to choose, and the cheapest policy both have), log level warn, else defaults",
    }


# ---- measuring -------------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A router that is up, or none, with its engines."""

    name: str
    fakes: Fakes
    router: Router | None
    idle_mb: float
    seen: Counters

    @property
    def port(self) -> int:
        """Where the load goes."""
        return self.router.port if self.router else self.fakes.decode


def enter(name: str, rig: Rig, python: Path | None, scratch: Path, stack: ExitStack) -> Entry:
    """Starts engines and router; the stack ends them."""
    fakes = stack.enter_context(Fakes(rig, solo=python is None))
    router = None
    if python is not None:
        router = stack.enter_context(router_of(CONTESTANTS[name], rig, fakes, python, scratch))
    return Entry(name, fakes, router, router.memory_mb()[0] if router else 0.0, fakes.counters())


def faults_of(entry: Entry, errors: dict[str, int]) -> dict[str, int]:
    """What this cell adds to the router's list of sins, as engines and load saw it."""
    before, entry.seen = entry.seen, entry.fakes.counters()
    at_engines = {name: count - before.faults[name] for name, count in entry.seen.faults.items()}
    return {name: count for name, count in (at_engines | errors).items() if count}


def measure(number: int, scenario: str, entry: Entry, load: Load, rig: Rig) -> Cell:
    """One cell."""
    speed_ms = speed_of(rig)
    pids = entry.router.pids() if entry.router else []
    measured = load.run(rig, entry.port, cpu_of=[*pids, entry.fakes.pid])
    peak_mb = entry.router.memory_mb()[1] if entry.router else 0.0
    return Cell(
        round=number,
        scenario=scenario,
        router=entry.name,
        measured=measured,
        router_cpu_s=sum(measured.cpu_s[: len(pids)]),
        rig_cpu_s=sum(measured.cpu_s[len(pids) :]),
        memory_mb=(entry.idle_mb, peak_mb),
        faults=faults_of(entry, measured.errors),
        core_ms=speed_ms,
    )


def brief(cell: Cell) -> str:
    """One line of progress."""
    per_unit = f"{1e6 * cell.router_cpu_s / cell.units:7.1f} µs/{SCENARIOS[cell.scenario].unit}" if cell.router_cpu_s else ""
    faults = f"  BROKEN {cell.faults}" if cell.faults else ""
    return f"{cell.scenario:<11}{cell.router:<14}{cell.units / max(cell.measured.seconds, 1e-9):9.0f}/s {per_unit}{faults}"


def run_round(number: int, pythons: dict[str, Path | None], options: argparse.Namespace, rig: Rig) -> list[Cell]:
    """Every scenario through every router, all started afresh."""
    cells = []
    with tempfile.TemporaryDirectory(prefix="disagg-bench-") as scratch, ExitStack() as stack:
        entries = [enter(name, rig, python, Path(scratch), stack) for name, python in pythons.items()]
        entries = entries[number % len(entries) :] + entries[: number % len(entries)]  # no one is always first
        for key in options.scenarios:
            load = replace(SCENARIOS[key].load, seconds=options.seconds, warmup_s=options.warmup)
            for entry in entries:
                cell = measure(number, key, entry, load, rig)
                say(f"round {number + 1}/{options.rounds}  {brief(cell)}")
                cells.append(cell)
    return cells


def profile(python: Path, contestant: Contestant, options: argparse.Namespace, rig: Rig, stem: Path) -> None:
    """Runs each scenario once more with our router under cProfile, which slows it by half: for shares, not for figures."""
    for key in options.scenarios:
        target = stem.with_name(f"{stem.name}-{key}.prof")
        load = replace(SCENARIOS[key].load, seconds=max(options.seconds, PROFILE_S), warmup_s=options.warmup)
        with tempfile.TemporaryDirectory(prefix="disagg-bench-") as scratch, Fakes(rig) as fakes:
            with router_of(contestant, rig, fakes, python, Path(scratch), profile=target) as router:
                load.run(rig, router.port)
            text = io.StringIO()
            pstats.Stats(str(target), stream=text).sort_stats("tottime").print_stats(PROFILE_LINES)
        target.with_suffix(".txt").write_text(text.getvalue())
        say(f"profile of {key}: {target.with_suffix('.txt')}")


# ---- the command -----------------------------------------------------------------------------------------------------------


def names(allowed: list[str], text: str) -> list[str]:
    """A comma-separated choice out of some names, in their own order."""
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in allowed]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
    return [name for name in allowed if name in chosen]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    routers, scenarios = [NO_ROUTER, *CONTESTANTS], list(SCENARIOS)
    parser = argparse.ArgumentParser(prog="scripts/bench", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--routers", type=lambda t: names(routers, t), default=routers, help=f"some of {','.join(routers)}")
    parser.add_argument("--scenarios", type=lambda t: names(scenarios, t), default=scenarios, help=f"some of {','.join(scenarios)}")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds of load before it (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of half a second each: does it work at all")
    parser.add_argument("--profile", action="store_true", help="besides, profile disagg in each scenario with cProfile")
    parser.add_argument("--cores", help="ROUTER,RIG: the cores to use (default: two that share nothing)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench-results", help="folder for the reports")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds, options.warmup = 1, 0.5, 0.25
    if not 1 <= options.rounds <= 100 or not 0.1 <= options.seconds <= 60 or not 0 <= options.warmup <= 60:
        parser.error("rounds 1 to 100, seconds 0.1 to 60, warm-up 0 to 60")
    return options


def write(results: Results, options: argparse.Namespace, stem: Path) -> None:
    """The page to stdout and to the folder, the cells beside it."""
    facts = machine_facts(options)
    titles = {NO_ROUTER: "no router"} | {name: contestant.title for name, contestant in CONTESTANTS.items()}
    text = page(results, titles, facts)
    sys.stdout.write(text)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_bytes(msgspec.json.encode({"facts": facts, "cells": results.cells}))
    say(f"written to {stem.with_suffix('.md')} and .json")


def run(options: argparse.Namespace) -> int:
    """Measures and reports; 1 if our router, or the rig itself, broke a promise. The peers' faults are told, and theirs."""
    router_core, rig_core = map(int, options.cores.split(",")) if options.cores else pick_cores()
    rig = Rig(build(), router_core, rig_core)
    pythons = {name: None if name == NO_ROUTER else install(CONTESTANTS[name], say) for name in options.routers}
    os.sched_setaffinity(0, {rig_core})
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"router-{datetime.now(UTC):%Y-%m-%d-%H%M%S}"
    cells: list[Cell] = []
    for number in range(options.rounds):
        cells += run_round(number, pythons, options, rig)
    results = Results(cells)
    write(results, options, stem)
    if options.profile and "disagg" in options.routers:
        profile(Path(sys.executable), CONTESTANTS["disagg"], options, rig, stem)
    return 1 if results.faults({NO_ROUTER, "disagg"}) else 0


def main() -> None:
    """Parses, runs, and says in one sentence what is wrong."""
    options = parse(sys.argv[1:])
    try:
        code = run(options)
    except RigError as error:
        say(str(error))
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
