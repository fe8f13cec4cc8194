"""Runs simulated clusters, one for each seed, or replays one seed with its trace.

./scripts/simulate --seeds 1..300 --minutes 2      many seeds
./scripts/simulate --seed 42 --minutes 2 --trace   one of them again, everything that happened on standard output
./scripts/simulate --story cuts:10000              streams that are cut, at each token index in turn
./scripts/simulate --story leavings:10000          clients that leave
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import TextIO

from tests.sim import scenarios
from tests.sim.faults import KINDS
from tests.sim.world import Plan, Result, Script, simulate


def main() -> int:
    options = read_options()
    if options.trace:
        result = simulate(plan_of(options.seed, options), on_line=sys.stdout.write, script=options.story)
        tell(result, sys.stderr)
        return bool(result.found)
    return run_all(range(options.seed, options.seed + 1) if options.seed is not None else options.seeds, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=span, metavar="A..B", help="1..20 if not given, 1 for a story")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long clients ask, simulated")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per simulated second")
    kinds = ", ".join(kind.name for kind in KINDS)
    parser.add_argument("--faults", default="", help=f"kinds, with commas between; all if not given; none for none. There is: {kinds}")
    parser.add_argument("--gap", type=float, default=10.0, help="simulated seconds between two faults, on average")
    parser.add_argument("--at-once", type=int, default=1, help="how many faults may be there at the same time")
    parser.add_argument("--tokens", type=int, default=16384, help="of KV in each engine")
    parser.add_argument("--story", type=story, metavar="NAME:COUNT", help="in place of random load and faults: cuts, leavings")
    parser.add_argument("--trace", action="store_true", help="print everything that happens; wants --seed")
    options = parser.parse_args()
    if options.trace and options.seed is None:
        parser.error("--trace wants --seed N")
    options.seeds = options.seeds or (range(1, 2) if options.story else range(1, 21))
    known = {kind.name for kind in KINDS} | {"none"}
    if strange := [name for name in options.faults.split(",") if name and name not in known]:
        parser.error(f"there is no fault {strange[0]!r}; there is {kinds}")
    return options


def span(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), int(last or first) + 1)


def story(text: str) -> Script:
    name, _, count = text.partition(":")
    if name not in {"cuts", "leavings"} or not (count or "1").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no story: give cuts:COUNT or leavings:COUNT")
    wanted = int(count or 1000)

    def told(number: int) -> None:
        if number % max(1, wanted // 100) == 0:
            sys.stderr.write(f"\r{number}/{wanted} {name} ")
            sys.stderr.flush()

    return (scenarios.cuts if name == "cuts" else scenarios.leavings)(wanted, told=told)


def plan_of(seed: int, options: argparse.Namespace) -> Plan:
    faults = tuple(filter(None, options.faults.split(",")))
    return Plan(
        seed,
        load_s=options.minutes * 60.0,
        rate=options.rate,
        faults=faults,
        gap_s=options.gap,
        at_once=options.at_once,
        tokens=options.tokens,
    )


def run_all(seeds: range, options: argparse.Namespace) -> int:
    began, bad, simulated_s, cpu_s = time.monotonic(), 0, 0.0, 0.0
    outcomes: Counter[str] = Counter()
    for number, seed in enumerate(seeds, 1):
        result = simulate(plan_of(seed, options), script=options.story)
        simulated_s += result.simulated_s
        cpu_s += result.cpu_s
        outcomes.update(result.outcomes)
        if result.found:
            bad += 1
            tell(result, sys.stdout)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{number}/{len(seeds)} seeds, {bad} bad, {simulated_s:.0f} s simulated ")
    wall_s = time.monotonic() - began
    sys.stdout.write(f"{len(seeds)} seeds, {bad} bad: {dict(sorted(outcomes.items()))}\n")
    speed = f"{simulated_s / wall_s:.0f} per second, {simulated_s / cpu_s:.0f} per second of CPU"
    sys.stdout.write(f"{simulated_s:.0f} s simulated in {wall_s:.0f} s: {speed}\n")
    return bool(bad)


def tell(result: Result, to: TextIO) -> None:
    lines = [f"seed {result.seed}: trace {result.trace}, {result.outcomes}"]
    lines += [f"  fault {fault}" for fault in result.faults]
    lines += [f"  FOUND {found.clause}: {found.story}" for found in result.found]
    to.write("\n".join(lines) + "\n")
    to.flush()


if __name__ == "__main__":
    sys.exit(main())
