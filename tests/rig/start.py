"""How well does the router foretell the very first requests, with engines that were measured at their start and without?

Started by ``scripts/bench-start``. One prefill and one decode engine; what the router says of them before any client came is compared with
what one prompt after the other then takes until its first token, and with the steps of answers that are written at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import aiohttp

from disagg.policy.benchmark import overlap_step_s
from disagg.policy.cost import REFIT_LIMIT_S, at, square
from tests.cluster.conftest import running_cluster
from tests.cluster.prompts import prompt_ids

PACED = ("--engine-arg=--paced", "--engine-arg=10,0.2;20,2", "--engine-arg=--paced-compute", "--engine-arg=off")
LENGTHS = (100, 300, 700, 1500)
BATCHES = (1, 2, 8, 12)
ANSWER = 96
TIMES = 3
LIMIT_S = 60.0
START_LIMIT_S = 300.0
"""SGLang on few cores takes minutes."""


async def ask(session: aiohttp.ClientSession, url: str, prompt: int, number: int, answer: int) -> list[float]:
    """Seconds from the request to each of its events."""
    sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
    body = {"input_ids": prompt_ids(prompt, number), "sampling_params": sampling, "stream": True}
    began = time.monotonic()
    async with session.post(url + "/generate", json=body) as response:
        response.raise_for_status()
        return [time.monotonic() - began async for line in response.content if line.startswith(b"data: {")]


async def forecast(session: aiohttp.ClientSession, admin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the router knows of passes and of steps."""
    async with session.get(admin + "/admin/cluster") as response:
        rows = {e["role"]: e["forecast"] for e in (await response.json())["engines"]}
    return rows["prefill"]["reads"], rows["decode"]["steps"]


async def wait_measured(session: aiohttp.ClientSession, admin: str) -> float:
    """Until the router has measured both engines; how many seconds that took from now."""
    began = time.monotonic()
    while True:
        async with session.get(admin + "/metrics") as response:
            if 'disagg_benchmarks_total{outcome="done"} 1.0' in await response.text():
                break
        if time.monotonic() - began > LIMIT_S:
            raise SystemExit(f"the engines were not measured within {LIMIT_S:g} s")
        await asyncio.sleep(0.1)
    passed_s = time.monotonic() - began
    await asyncio.sleep(REFIT_LIMIT_S)
    return passed_s


async def run(url: str, admin: str, *, measured: bool) -> list[tuple[str, float, float]]:
    """What is seen, and what was foretold: name, seconds, seconds."""
    rows = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LIMIT_S)) as session:
        if measured:
            sys.stderr.write(f"  measured within {await wait_measured(session, admin):.1f} s after the canaries\n")
        reads, steps = await forecast(session, admin)
        sys.stderr.write(f"  {json.dumps({'reads': reads, 'steps': steps})}\n")
        number = 0
        for length in LENGTHS:
            seen = []
            for _ in range(TIMES):
                number += 1
                seen.append((await ask(session, url, length, number, 1))[0])
            said_s = at(tuple(reads["line"]), (length, square(0, length)))
            rows.append((f"first token of {length} tokens", sorted(seen)[TIMES // 2], said_s))
        for batch in BATCHES:
            began = time.monotonic()
            asked = [
                ask(session, url, 64, number + n, ANSWER) for n in range(batch)
            ]  # long ones: the first must not end before the last begins
            number += batch
            times = await asyncio.gather(*asked)
            step_s = overlap_step_s(times)
            assert step_s is not None, f"{batch} answers were not written at once within {time.monotonic() - began:.1f} s"
            kv = batch * (64 + ANSWER // 2)
            rows.append((f"step of {batch} answers", step_s, at(tuple(steps["line"]), (batch, kv))))
    return rows


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="scripts/bench-start", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("flags", nargs="*", help="of `disagg up`, after --; without any, paced embedded engines")
    flags = parser.parse_args().flags or PACED
    found = {}
    for measured in (False, True):
        sys.stderr.write("engines are measured at their start\n" if measured else "engines are not measured\n")
        flag = "--measure-at-start" if measured else "--no-measure-at-start"
        with running_cluster(flag, "--flips", "off", "--log-level", "warning", *flags, limit_s=START_LIMIT_S) as cluster:
            found[measured] = asyncio.run(run(cluster.url, cluster.admin, measured=measured))
    sys.stdout.write("| what | seen | foretold, not measured | foretold, measured |\n|---|---|---|---|\n")
    for (name, _, before_s), (_, seen_s, said_s) in zip(found[False], found[True], strict=True):
        cells = [f"{1000 * seen_s:.1f} ms", *(f"{1000 * s:.1f} ms ({s / seen_s:.2f})" for s in (before_s, said_s))]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
