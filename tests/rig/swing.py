"""A load that swings from long prompts to long answers and back, through real processes: does the ratio of engines follow?

Started by ``scripts/bench-swing``. Engines are the embedded ones, four of them, paced and without arithmetic: their KV cache, handoffs and
role switches are real, each answer is a function of its prompt, and the machine is left to the router and the clients. The router watches
and moves engines `SPEED` times as fast as it does by default, because the load swings that much faster than one of a day.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import msgspec
import numpy as np

from disagg.engines.embedded.checkpoint import load_config
from disagg.engines.embedded.engine import _plain_tokens
from disagg.engines.embedded.pace import stand_in_token
from disagg.engines.embedded.tokens import Tokenizer
from disagg.launches import DEMO_MODEL
from tests.cluster.conftest import running_cluster
from tests.cluster.prompts import prompt_ids
from tests.quantile import quantile

SPEED = 20.0
TTFT_S = 1.0
ITL_S = 0.06
PLACES = 8
PACE = "10,0.2;20,2"
FLAGS = (
    *("--log-level", "warning", "--ttft-s", f"{TTFT_S:g}", "--itl-s", f"{ITL_S:g}", "--queue-timeout-s", f"{TTFT_S / 2:g}"),
    *("--engine-arg=--paced", f"--engine-arg={PACE}", "--engine-arg=--paced-compute", "--engine-arg=off"),
    *("--engine-arg=--max-running-requests", f"--engine-arg={PLACES}", "--kv-pool-tokens", "32768", "--chunk-tokens", "512"),
)


class Phase(NamedTuple):
    """A load.

    Attributes:
        prompt, answer: tokens.
        rate: requests a second, at random times.
    """

    name: str
    prompt: int
    answer: int
    rate: float


PHASES = (Phase("long prompts", 400, 4, 28.0), Phase("long answers", 40, 24, 23.0))
RATIOS = ((1, 3), (2, 2), (3, 1))


@dataclass
class Seen:
    """What clients saw, and what the router's status said each second.

    Attributes:
        good: answers that were right, with their first token and all others in time.
        late: right, but not in time.
        refused: sent away with 503.
        wrong: answers that are not what they should be, or incomplete.
        others: any other outcome.
        ratios: after so many seconds, how many prefill and decode engines were ready, and how many were wanted.
        moves: what was said of each move.
    """

    good: int = 0
    late: int = 0
    refused: int = 0
    wrong: int = 0
    others: Counter[str] = field(default_factory=Counter)
    by_phase: Counter[int] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    ratios: list[tuple[float, tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)
    engines_cpu: float = 0.0

    @property
    def lost(self) -> int:
        """What nobody should ever see."""
        return self.wrong + self.others.total()


@functools.cache
def _vocabulary() -> Sequence[int]:
    return _plain_tokens(Tokenizer.load(DEMO_MODEL), load_config(DEMO_MODEL))


def right_answer(prompt: Sequence[int], tokens: int) -> list[int]:
    """What an engine without arithmetic answers: each token is a function of all before it."""
    ids = np.array([*prompt, *[0] * tokens], dtype=np.int32)
    for at in range(len(prompt), len(ids)):
        ids[at] = stand_in_token(ids[:at], _vocabulary())
    return [int(i) for i in ids[len(prompt) :]]


async def ask(session: aiohttp.ClientSession, url: str, phase: Phase, number: int, seen: Seen, which: int) -> None:
    """One stream, compared with what it should be."""
    prompt = prompt_ids(phase.prompt, number)
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": phase.answer, "ignore_eos": True},
        "stream": True,
    }
    began = time.monotonic()
    times, last = [], b""
    try:
        async with session.post(url + "/generate", json=body) as response:
            if response.status != 200:
                seen.refused += response.status == 503
                if response.status != 503:
                    seen.others[str(response.status)] += 1
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    times.append(time.monotonic())
                    last = line
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.others[type(error).__name__] += 1
        return
    got: dict[str, Any] = msgspec.json.decode(last[6:]) if last else {}
    if got.get("output_ids") != right_answer(prompt, phase.answer):
        seen.wrong += 1
        return
    seen.first_s.append(times[0] - began)
    in_time = times[0] - began <= TTFT_S and (times[-1] - times[0]) / (len(times) - 1) <= ITL_S
    seen.good += in_time
    seen.late += not in_time
    seen.by_phase[which] += in_time


async def load(session: aiohttp.ClientSession, url: str, phases: Sequence[tuple[Phase, float]], seed: int, seen: Seen) -> None:
    """One phase after the other, each for so many seconds; requests come whatever becomes of those before."""
    chance, loop = random.Random(seed), asyncio.get_running_loop()
    at = loop.time()
    number = seed * 1_000_000
    async with asyncio.TaskGroup() as group:
        for which, (phase, seconds) in enumerate(phases):
            until = at + seconds
            while (at := at + chance.expovariate(phase.rate)) < until:
                await asyncio.sleep(at - loop.time())
                number += 1
                group.create_task(ask(session, url, phase, number, seen, which))
            at = until


async def watch(session: aiohttp.ClientSession, admin: str, seen: Seen, *, say: bool) -> None:
    """Reads the status until cancelled."""
    began = time.monotonic()
    while True:
        async with session.get(admin + "/admin/cluster") as response:
            cluster = await response.json()
        counts = Counter(e["role"] for e in cluster["engines"] if e["state"] == "ready")
        for row in cluster["ratio"]:
            seen.ratios.append((time.monotonic() - began, (counts["prefill"], counts["decode"]), tuple(row["wanted"])))
            for _, what in reversed(row["history"]):
                if what.startswith("to ") and what not in seen.moves:
                    seen.moves.append(what)
                    if say:
                        sys.stderr.write(f"  {time.monotonic() - began:5.1f} s  {what}\n")
        await asyncio.sleep(0.25)


async def swing(url: str, admin: str, phases: Sequence[tuple[Phase, float]], *, seed: int = 1, say: bool = False) -> Seen:
    """The whole load through one cluster."""
    seen = Seen()
    _vocabulary()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(60), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        watching = asyncio.ensure_future(watch(session, admin, seen, say=say))  # noqa: TID251  # it ends with this function
        try:
            await load(session, url, phases, seed, seen)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    return seen


def run(prefill: int, decode: int, flips: str, phases: Sequence[tuple[Phase, float]], *, seed: int = 1, say: bool = False) -> Seen:
    """Starts a cluster, swings the load, and ends it."""
    flags = ("--prefill", str(prefill), "--decode", str(decode), "--flips", flips, "--policy-speed", f"{SPEED:g}", *FLAGS)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with running_cluster(*flags) as cluster:
        if say:
            sys.stderr.write(f"to watch it: .venv/bin/disagg status --watch --admin {cluster.admin.removeprefix('http://')}\n")
        seen = asyncio.run(swing(cluster.url, cluster.admin, phases, seed=seed, say=say))
        if say:
            sys.stderr.write(cluster.log.read_text())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seen.engines_cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / sum(s for _, s in phases)
    return seen


COLUMNS = ("ratio", "good", "of the best fixed one", "late", "refused", "wrong or lost", "p50 / p99 to the first token", "moves", "cores")


def row(name: str, seen: Seen, best: int) -> str:
    """For a table in Markdown."""
    first = f"{quantile(seen.first_s, 0.5):.2f} / {quantile(seen.first_s, 0.99):.2f} s"
    cells = (
        name,
        seen.good,
        f"{seen.good / best:.2f}",
        seen.late,
        seen.refused,
        seen.lost,
        first,
        len(seen.moves),
        f"{seen.engines_cpu:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measures and prints a table; 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(prog="scripts/bench-swing", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each of the four half swings (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only-auto", action="store_true", help="without the fixed ratios")
    options = parser.parse_args()
    phases = [(phase, options.seconds) for _ in range(2) for phase in PHASES]
    found = {}
    for prefill, decode in () if options.only_auto else RATIOS:
        sys.stderr.write(f"{prefill} prefill and {decode} decode engines\n")
        found[f"{prefill}P:{decode}D"] = run(prefill, decode, "off", phases, seed=options.seed)
    best = max((seen.good for seen in found.values()), default=0)
    sys.stderr.write("auto\n")
    found["auto"] = auto = run(2, 2, "auto", phases, seed=options.seed, say=True)
    sys.stdout.write(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n")
    sys.stdout.write("".join(row(name, seen, best or auto.good) + "\n" for name, seen in found.items()))
    sys.exit(1 if any(seen.lost for seen in found.values()) else 0)


if __name__ == "__main__":
    main()
