"""What is served when more is asked for than the engines can do: real processes, peak load first, then twice and ten times as much.

Started by ``scripts/bench-overload``. Engines are the embedded ones, two prefill and two decode, paced and without arithmetic: their KV
cache, their handoffs and their limits are real, and they leave the machine to the router and the clients.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from tests.cluster.conftest import running_cluster
from tests.quantile import quantile

PLACES = 8
"""Requests that run on a decode engine at a time."""
QUEUE_S = 2.0
TOKENS = 24
FLAGS = (
    *("--prefill", "2", "--decode", "2", "--queue-timeout-s", f"{QUEUE_S:g}", "--log-level", "error"),
    *("--engine-arg=--paced", "--engine-arg=20,0.1;20,1", "--engine-arg=--paced-compute", "--engine-arg=off"),
    *("--engine-arg=--max-running-requests", f"--engine-arg={PLACES}"),
)
PEAK_CLIENTS = 3 * PLACES
"""Each asks again as soon as it has its answer: half as many again as have a place, so the engines are always full."""
SETTLE_SHARE = 0.25
"""Of a measurement: before it begins to count."""
PROMPT_S = 0.05
"""A refusal takes no longer, but for those who were let in to wait."""
REFUSED = frozenset({429, 503})


@dataclass
class Seen:
    """What clients saw in a window of `window_s` seconds; times in seconds.

    Attributes:
        good: how long each answer took that was in time.
        late: answers that were not.
        refused: how long each refusal took.
        retry_after: what refusals said, whole seconds.
        others: any other outcome.
    """

    window_s: float
    limit_s: float
    offered: int = 0
    good: list[float] = field(default_factory=list)
    late: int = 0
    refused: list[float] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        """Answers in time, per second."""
        return len(self.good) / self.window_s

    def row(self, name: str, peak: Seen) -> str:
        """For a table in Markdown."""
        times = self.refused
        refusals = " / ".join(f"{quantile(times, share) * 1000:.0f}" for share in (0.5, 0.99, 1.0)) + " ms" if times else "-"
        slow = sum(took > PROMPT_S for took in times)
        asked_again = f"{min(self.retry_after)} to {max(self.retry_after)} s" if self.retry_after else "-"
        return (
            f"| {name} | {self.offered / self.window_s:.1f}/s | {self.goodput:.1f}/s | {self.goodput / peak.goodput:.3f} "
            f"| {quantile(self.good, 0.99):.2f} s | {self.late} | {len(times)} | {slow} | {refusals} | {asked_again} "
            f"| {dict(self.others) or 'none'} |"
        )


COLUMNS = (
    *("load", "asked", "answered in time", "of the peak", "p99 of these", "late"),
    *("refused", "after 50 ms", "p50 / p99 / longest", "Retry-After", "anything else"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


class Clients:
    """Those who ask one router."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._number = 0

    async def ask(self, seen: Seen | None = None) -> float:
        """One request; returns how long it took. What is asked differs from one to the next."""
        self._number += 1
        body = {"prompt": f"{self._number} bottles " * 8, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        began = time.monotonic()
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            if seen is not None:
                seen.others[type(error).__name__] += 1
            return time.monotonic() - began
        took = time.monotonic() - began
        if seen is not None:
            _note(seen, response, took)
        return took

    async def always(self, clients: int, seen: Seen) -> None:
        """So many ask again and again, until what they ask has been counted for the window."""
        began = time.monotonic()
        counts_from = began + SETTLE_SHARE * seen.window_s
        until = counts_from + seen.window_s

        async def one() -> None:
            while (at := time.monotonic()) < until:
                counts = at >= counts_from
                seen.offered += counts
                await self.ask(seen if counts else None)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one())

    async def at_rate(self, per_s: float, seen: Seen) -> None:
        """Requests come at this rate, whatever becomes of those before."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        settle_s = SETTLE_SHARE * seen.window_s
        async with asyncio.TaskGroup() as group:
            for number in range(int(per_s * (settle_s + seen.window_s))):
                at_s = number / per_s
                await asyncio.sleep(began + at_s - loop.time())
                counts = at_s >= settle_s
                seen.offered += counts
                group.create_task(self.ask(seen if counts else None))


def _note(seen: Seen, response: aiohttp.ClientResponse, took: float) -> None:
    if response.status == 200:
        if took <= seen.limit_s:
            seen.good.append(took)
        else:
            seen.late += 1
    elif response.status in REFUSED:
        seen.refused.append(took)
        seen.retry_after.append(int(response.headers["Retry-After"]))
    else:
        seen.others[str(response.status)] += 1


async def measure(url: str, window_s: float, times: Sequence[float]) -> list[tuple[str, Seen]]:
    """The peak, and what is left of it under so many times as much, each in a window of so many seconds."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(60), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        clients = Clients(session, url)
        alone_s = min([await clients.ask() for _ in range(3)])
        limit_s = QUEUE_S + 3 * alone_s
        peak = Seen(window_s, limit_s)
        await clients.always(PEAK_CLIENTS, peak)
        found = [("peak", peak)]
        for each in times:
            seen = Seen(window_s, limit_s)
            await clients.at_rate(each * peak.goodput, seen)
            found.append((f"{each:g} times", seen))
    return found


def main() -> None:
    """Measures and prints a table; 1 if goodput, refusals or anything else is not as promised."""
    parser = argparse.ArgumentParser(prog="scripts/bench-overload", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each of the three measurements (default: %(default)s)")
    options = parser.parse_args()
    with running_cluster(*FLAGS) as cluster:
        found = asyncio.run(measure(cluster.url, options.seconds, (2.0, 10.0)))
    peak = found[0][1]
    sys.stdout.write("\n".join([HEAD, *(seen.row(name, peak) for name, seen in found)]) + "\n")
    shares = [seen.goodput / peak.goodput for _, seen in found[1:]]
    sys.exit(0 if shares[0] >= 0.95 and shares[1] >= 0.9 and not any(seen.others or seen.late for _, seen in found) else 1)


if __name__ == "__main__":
    main()
