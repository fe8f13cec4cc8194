"""Whether the router's memory stays flat: very many requests through one router process, whole answers and short streams in turn.

Started by ``scripts/bench-memory``. Engines and load are the fast fakes of the router benchmark; see ``rig.c``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from tests.rig.bench import pick_cores
from tests.rig.binary import RigError, build
from tests.rig.contestants import CONTESTANTS, router_of
from tests.rig.processes import Fakes, Load, Rig, Router

WARM_SHARE = 0.1
"""Of all requests: what comes before the first figure that counts."""
GROWTH = 0.05
SAMPLE_S = 0.25
ROWS = 12
"""Of the table, whatever the number of requests."""
LOADS = (
    Load(connections=32, warmup_s=0.0),
    Load(connections=32, warmup_s=0.0, stream=True, chunks=8),
    Load(connections=32, warmup_s=0.0, path="/generate"),
    Load(connections=32, warmup_s=0.0, stream=True, chunks=8, path="/v1/completions"),
)


class Sample(msgspec.Struct, frozen=True):
    """The router after so many requests: resident MB then, and the most since the sample before."""

    requests: int
    rss_mb: float
    most_mb: float


@dataclass
class Memory:
    """What a run saw."""

    samples: list[Sample] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def warm(self) -> Sample:
        """The first sample that counts."""
        enough = WARM_SHARE * self.samples[-1].requests
        return next(sample for sample in self.samples if sample.requests >= enough)

    @property
    def growth(self) -> float:
        """By which share the most that was resident after the warm-up is more than what was resident at its end."""
        warm = self.warm
        later = [sample.most_mb for sample in self.samples if sample.requests > warm.requests]
        return max(later, default=warm.rss_mb) / warm.rss_mb - 1


def measure(rig: Rig, requests: int, slice_s: float, say: Callable[[str], None]) -> Memory:
    """Sends at least so many requests through a router started for that, in slices of so many seconds."""
    memory, sent, number = Memory(), 0, 0
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disagg-memory-")))
        fakes = stack.enter_context(Fakes(rig))
        router = stack.enter_context(router_of(CONTESTANTS["disagg"], rig, fakes, Path(sys.executable), scratch))
        while sent < requests:
            load = LOADS[number % len(LOADS)]
            with watched(router) as seen:
                measured = replace(load, seconds=slice_s).run(rig, router.port)
            sent, number = sent + measured.requests, number + 1
            for name, count in measured.errors.items():
                memory.errors[name] = memory.errors.get(name, 0) + count
            now = router.memory_mb()[0]
            memory.samples.append(Sample(sent, now, max([now, *seen])))
            say(f"{sent:>9} requests  {now:6.1f} MB")
    return memory


@contextmanager
def watched(router: Router) -> Iterator[list[float]]:
    """Samples what is resident, for as long as the block lasts."""
    seen: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_S):
            seen.append(router.memory_mb()[0])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def table(memory: Memory) -> str:
    """For people: some of the samples, and the verdict."""
    every = max(1, len(memory.samples) // ROWS)
    shown = [s for i, s in enumerate(memory.samples) if i % every == 0 or s in {memory.warm, memory.samples[-1]}]
    lines = ["  requests   RSS MB  most since"]
    lines += [f"{s.requests:>10}  {s.rss_mb:7.1f}  {s.most_mb:10.1f}{'  warm' if s == memory.warm else ''}" for s in shown]
    errors = {name: count for name, count in memory.errors.items() if count}
    return "\n".join([*lines, f"growth after the warm-up: {100 * memory.growth:+.1f} %; errors: {errors or 'none'}", ""])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-memory", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("requests", type=int, nargs="?", default=1_000_000, help="how many at least (default: %(default)s)")
    parser.add_argument("--slice", type=float, default=5.0, help="seconds of one kind of load at a time (default: %(default)s)")
    parser.add_argument("--cores", help="ROUTER,RIG: the cores to use (default: two that share nothing)")
    options = parser.parse_args(arguments)
    if options.requests < 1 or not 0.1 <= options.slice <= 60:
        parser.error("at least one request, a slice of 0.1 to 60 s")
    return options


def say(line: str) -> None:
    """Progress; the table alone goes to stdout."""
    sys.stderr.write(f"bench-memory: {line}\n")
    sys.stderr.flush()


def main() -> None:
    """Measures; 1 if memory grows, or if the fakes hold anything against the router."""
    options = parse(sys.argv[1:])
    try:
        router_core, rig_core = map(int, options.cores.split(",")) if options.cores else pick_cores()
        memory = measure(Rig(build(), router_core, rig_core), options.requests, options.slice, say)
    except RigError as error:
        say(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdout.write(table(memory))
    sys.exit(1 if memory.growth > GROWTH or any(memory.errors.values()) else 0)


if __name__ == "__main__":
    main()
