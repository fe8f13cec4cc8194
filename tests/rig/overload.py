"""What is served when more is asked for than the engines can do: real processes, peak load first, then twice and ten times as much.

Then, whether ``Retry-After`` is right: twice as much as the engines can do for some seconds, and then nobody comes any more but one who
asks every tenth of a second. When that one is let in, all who were refused shortly before would have been. A fifth of all ask with a low
priority, who are refused sooner and have to wait for longer. It is right within a factor of two if that time is neither less than half of
what was said nor more than twice; less than a second counts as one, for the header knows whole seconds only.

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
SLOW_WRITERS = ("20,0.1;20,1", PLACES, 512, 8, 22.0)
SLOW_READERS = ("20,2;2,0.1", 64, 64, 16, 11.0)
"""What passes and steps take; how many requests and how many tokens of a pass an engine takes; how often a prompt says the same; how many
requests a second the engines can do then. The long prompts do not fit into one pass: else an engine would read all that wait at once."""
AGAIN_S = 10.0
"""Longest wait, and for a first token, where ``Retry-After`` is measured."""
LOAD_S = 25.0
JUDGED_S = 2.0
"""Refusals of the last so many seconds before nobody came any more."""
LOW_EVERY = 5
PROBE_EVERY_S = 0.1
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


@dataclass
class Refusal:
    """One that was sent away: by its clock, and what it was told, seconds."""

    at: float
    retry_after_s: int
    low: bool


class Returning:
    """Measures whether ``Retry-After`` is right."""

    def __init__(self, session: aiohttp.ClientSession, url: str, times: int) -> None:
        self._session = session
        self._url = url
        self._times = times
        self._number = 0

    async def measure(self, per_s: float) -> list[tuple[Refusal, float]]:
        """One load that ends; returns what was told in its last seconds, and after how many each would have been let in."""
        loop = asyncio.get_running_loop()
        refusals: list[Refusal] = []
        async with asyncio.TaskGroup() as group:

            async def one(*, low: bool) -> bool:
                self._number += 1
                at = loop.time()
                prompt = f"{self._number} bottles " * self._times
                body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
                headers = {"x-disagg-priority": "-1" if low else "0"}
                async with self._session.post(f"{self._url}/v1/completions", json=body, headers=headers) as response:
                    if response.status == 200:
                        await response.read()
                        return True
                    if response.status not in REFUSED:
                        raise RuntimeError(f"the router said {response.status}: {await response.text()}")
                    refusals.append(Refusal(at, int(response.headers["Retry-After"]), low))
                    return False

            began = loop.time()
            for number in range(int(LOAD_S * per_s)):
                await asyncio.sleep(began + number / per_s - loop.time())
                group.create_task(one(low=number % LOW_EVERY == 0))
            ended = loop.time()
            judged = [refusal for refusal in refusals if refusal.at > ended - JUDGED_S]
            let_in = {low: loop.create_future() for low in (False, True)}

            async def probe(*, low: bool) -> None:
                """Whether it is let in is known when it was not refused for a while: a refusal takes milliseconds."""
                at = loop.time()
                asked = group.create_task(one(low=low))
                done, _ = await asyncio.wait([asked], timeout=1.0)
                if (not done or asked.result()) and not let_in[low].done():
                    let_in[low].set_result(at)

            for low, known in let_in.items():
                while not known.done():
                    group.create_task(probe(low=low))
                    await asyncio.sleep(PROBE_EVERY_S)
        return [(refusal, let_in[refusal.low].result() - refusal.at) for refusal in judged]


def again_row(name: str, found: Sequence[tuple[Refusal, float]]) -> tuple[str, float]:
    """For a table in Markdown, and the share of those that were right."""
    right = [0.5 <= max(1.0, took) / told.retry_after_s <= 2.0 for told, took in found]
    share = sum(right) / max(1, len(right))
    said, was = [float(told.retry_after_s) for told, _ in found], [took for _, took in found]
    spread = [" / ".join(f"{quantile(values, q):.1f}" for q in (0.05, 0.5, 0.95)) if found else "-" for values in (said, was)]
    return f"| {name} | {len(found)} | {spread[0]} s | {spread[1]} s | {share:.1%} |", share


AGAIN_COLUMNS = ("refused by", "refusals judged", "told: p5 / p50 / p95", "would have been let in after", "right within a factor of 2")
AGAIN_HEAD = f"| {' | '.join(AGAIN_COLUMNS)} |\n|{'---|' * len(AGAIN_COLUMNS)}"


async def measure_again(url: str, times: int, per_s: float, rounds: int) -> list[tuple[Refusal, float]]:
    """So many loads that end, one after the other."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(60), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        returning = Returning(session, url, times)
        return [each for _ in range(rounds) for each in await returning.measure(per_s)]


def again(rounds: int) -> list[tuple[str, float]]:
    """The rows, and the share of each that was right: where steps are slow, and where passes are."""
    rows = []
    for name, (paced, places, chunk, times, per_s) in (
        ("decode engines that are full", SLOW_WRITERS),
        ("prefill engines that are late", SLOW_READERS),
    ):
        flags = (
            *("--prefill", "2", "--decode", "2", "--queue-timeout-s", f"{AGAIN_S:g}", "--ttft-s", f"{AGAIN_S:g}", "--log-level", "error"),
            *("--engine-arg=--paced", f"--engine-arg={paced}", "--engine-arg=--paced-compute", "--engine-arg=off"),
            *("--engine-arg=--max-running-requests", f"--engine-arg={places}"),
            *("--engine-arg=--chunked-prefill-size", f"--engine-arg={chunk}"),
        )
        with running_cluster(*flags) as cluster:
            rows.append(again_row(name, asyncio.run(measure_again(cluster.url, times, 2.0 * per_s, rounds))))
    return rows


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
    parser.add_argument("--rounds", type=int, default=3, help="loads that end, of each kind (default: %(default)s)")
    parser.add_argument("--only-again", action="store_true", help="measure Retry-After alone")
    options = parser.parse_args()
    if not options.only_again:
        good = overloaded(options.seconds)
    rows = again(options.rounds)
    sys.stdout.write("\n".join(["", AGAIN_HEAD, *(row for row, _ in rows)]) + "\n")
    sys.exit(0 if (options.only_again or good) and all(share >= 0.9 for _, share in rows) else 1)


def overloaded(window_s: float) -> bool:
    """Prints the table; True if all is as promised."""
    with running_cluster(*FLAGS) as cluster:
        found = asyncio.run(measure(cluster.url, window_s, (2.0, 10.0)))
    peak = found[0][1]
    sys.stdout.write("\n".join([HEAD, *(seen.row(name, peak) for name, seen in found)]) + "\n")
    shares = [seen.goodput / peak.goodput for _, seen in found[1:]]
    return shares[0] >= 0.95 and shares[1] >= 0.9 and not any(seen.others or seen.late for _, seen in found)


if __name__ == "__main__":
    main()
