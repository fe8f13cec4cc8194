"""What good clients feel beside two thousand slow ones: heads and bodies that come byte by byte, and come again when they are sent away.

Started by ``scripts/bench-slow-clients``. The router has one core; engines, good clients and slow ones have the other. In the control runs
the slow ones talk to a sink beside them, so that they cost their core the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.rig.bench import pick_cores
from tests.rig.binary import RigError, build
from tests.rig.contestants import CONTESTANTS, router_of
from tests.rig.processes import Fakes, Load, Measured, Quantiles, Rig, stop

ADDRESSES = 10
"""The router lets one address have 256 connections."""
BODY = 2048
BODY_BYTES = 1 << 20
EVERY_S = 2.0
QUIET_SHARE = 0.5
"""Of the pairs of runs: those count during which a virtual machine's host took the least from it, for what it takes is most of a p99."""
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: slow\r\ncontent-length: %d\r\n" % BODY_BYTES
LOADS = {
    "whole answers": Load(connections=8, seconds=4.0, warmup_s=0.5),
    "streams, 10 ms a chunk": Load(connections=8, stream=True, chunks=8, pace_us=10_000, seconds=8.0, warmup_s=0.5),
}
"""Short streams: the p99 of first tokens is worth something only if there are many hundreds of them."""


# --- the slow ones


async def _linger(port: int, number: int, count: int, opened: asyncio.Semaphore) -> None:
    """One of them: every second one has sent its head and is slow with its body, at just the rate that is asked for."""
    await asyncio.sleep(EVERY_S * number / count)  # they do not all write in the same moment
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(f"127.0.0.{2 + number % ADDRESSES}", 0))
        except OSError:
            await asyncio.sleep(EVERY_S)
            continue
        opened.release()
        ends = asyncio.ensure_future(reader.read())  # noqa: TID251  # it ends with the connection
        try:
            writer.write(HEAD + b"\r\n" if number % 2 else HEAD[:40])
            while not ends.done():
                writer.write(b" " * BODY if number % 2 else b"x")
                await writer.drain()
                await asyncio.wait([ends], timeout=EVERY_S)
        except OSError:
            pass
        finally:
            ends.cancel()
            writer.close()


async def _attack(port: int, count: int) -> None:
    """Says so when all have been connected once; until it is ended. Port 0: to a sink of its own."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(65536):
                pass
        writer.close()

    if not port:
        sink = await asyncio.start_server(swallow, "127.0.0.1", 0, backlog=count)
        port = sink.sockets[0].getsockname()[1]
    opened = asyncio.Semaphore(0)
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(_linger(port, number, count, opened))
        for _ in range(count):
            await opened.acquire()
        sys.stdout.write("connected\n")
        sys.stdout.flush()


@contextmanager
def slow_clients(rig: Rig, port: int, count: int) -> Iterator[None]:
    """They are there as long as the block lasts."""
    command = rig.pinned(rig.rig_core, [sys.executable, "-m", "tests.rig.slow", "--attack", str(port), "--count", str(count)])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"connected\n":
            raise RigError("the slow clients did not come; can this user open enough files (ulimit -n)?")
        yield
    finally:
        stop(process)


# --- what is measured


@dataclass(frozen=True)
class Felt:
    """What good clients felt in one run: times in µs, and the share of the cores that the machine's host kept to itself."""

    times: Quantiles
    stolen: float


def felt(name: str, measured: Measured, stolen: float) -> dict[str, Felt]:
    """By what it is of."""
    if name == "whole answers":
        return {"whole answers": Felt(measured.latency_us, stolen)}
    return {"streams, first token": Felt(measured.first_us, stolen), "streams, token": Felt(measured.event_us, stolen)}


@contextmanager
def stolen_share(shares: list[float]) -> Iterator[None]:
    """Appends what the machine's host took of all cores while the block ran, from /proc/stat."""

    def ticks() -> tuple[int, int]:
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of the first two
        first = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return first[7], sum(first)

    stolen, total = ticks()
    yield
    stolen_then, total_then = ticks()
    shares.append((stolen_then - stolen) / max(1, total_then - total))


def measure(rig: Rig, rounds: int, count: int) -> dict[str, list[tuple[Felt, Felt]]]:
    """By what it is of: beside slow ones at the sink, and beside slow ones at the router; a pair for each round."""
    found: dict[str, list[tuple[Felt, Felt]]] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disagg-slow-")))
        fakes = stack.enter_context(Fakes(rig))
        router = stack.enter_context(router_of(CONTESTANTS["disagg"], rig, fakes, Path(sys.executable), scratch))
        for number in range(rounds):
            seen: dict[int, dict[str, Felt]] = {}
            for target in (0, router.port) if number % 2 else (router.port, 0):
                with slow_clients(rig, target, count):
                    told: dict[str, Felt] = {}
                    for name, load in LOADS.items():
                        shares: list[float] = []
                        with stolen_share(shares):
                            measured = load.run(rig, router.port)
                        if any(measured.errors.values()):
                            raise RigError(f"good clients had errors: {measured.errors}")
                        told |= felt(name, measured, shares[0])
                seen[target] = told
            for name, control in seen[0].items():
                found.setdefault(name, []).append((control, seen[router.port][name]))
            sys.stderr.write(f"bench-slow-clients: round {number + 1} of {rounds}\n")
    return found


def table(found: dict[str, list[tuple[Felt, Felt]]]) -> str:
    """For people, in Markdown: ratios of one pair of runs each."""
    what = ("slow ones at a sink", "at the router", "ratio, median (least to most)")
    head = ["good clients", *(f"{q}, {each}" for q in ("p50", "p99") for each in what), "pairs", "taken by the host"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, pairs in found.items():
        kept = sorted(pairs, key=lambda pair: max(one.stolen for one in pair))[: math.ceil(len(pairs) * QUIET_SHARE)]
        most = max(one.stolen for pair in kept for one in pair)
        cells = [name]
        p50s = [(control.times.p50, there.times.p50) for control, there in kept]
        p99s = [(control.times.p99, there.times.p99) for control, there in kept]
        for times in (p50s, p99s):
            ratios = sorted(there / control for control, there in times)
            cells += [f"{median(each) / 1000:.2f} ms" for each in zip(*times, strict=True)]
            cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {' | '.join([*cells, f'{len(kept)} of {len(pairs)}', f'{most:.1%} at most'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(prog="scripts/bench-slow-clients", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--count", type=int, default=2000, help="slow clients (default: %(default)s)")
    parser.add_argument("--attack", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.attack is not None:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_attack(options.attack, options.count))
        return
    try:
        sys.stdout.write(table(measure(Rig(build(), *pick_cores()), options.rounds, options.count)))
    except RigError as error:
        sys.stderr.write(f"bench-slow-clients: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
