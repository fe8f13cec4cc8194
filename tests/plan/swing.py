"""A load that swings within half an hour from long prompts with short answers to short prompts with long ones, and back.

Prompts and answers are those of Azure's code trace and of ShareGPT. Both classes come as Poisson processes whose rates swing against each
other as cosines, so that prefill and decode need the same number of engines together all the time, and a different ratio.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from disagg.plan.hardware import Hardware
from disagg.plan.simulate import Cluster, Outcome, replay
from disagg.plan.trace import Arrival, Trace, parse_trace
from disagg.policy.books import Slo
from disagg.policy.cost import at, square

DATA = Path(__file__).parent.parent / "data"
PERIOD_S = 1800.0
STEADY_S = 600.0
"""Before the swing begins the load is as at its beginning for so long."""
ENGINES = 8
HARDWARE = Hardware()
SLO = Slo(5.0, 0.1)
LEAD_S = 0.0
"""An oracle of the ratio at this time ahead does best."""


class Swing(NamedTuple):
    """Requests a second of both classes on average, and how far that swings: 1 is from nothing to twice as many."""

    code: float = 9.0
    chat: float = 4.2
    amplitude: float = 1.0

    def rates(self, now: float, period_s: float = PERIOD_S) -> tuple[float, float]:
        turn = self.amplitude * math.cos(2 * math.pi * max(0.0, now - STEADY_S) / period_s)
        return self.code * (1 + turn), self.chat * (1 - turn)


def lengths(name: str) -> list[tuple[int, int]]:
    path = DATA / name
    trace = parse_trace(path.read_text(encoding="utf-8"), file=path.name, chance=lambda: 0.0)
    return [(a.prompt, a.answer) for a in trace.arrivals]


CODE, CHAT = lengths("azure_llm_2023_code_tenth.csv"), lengths("sharegpt_llama_300_lengths.jsonl")


def cost(requests: list[tuple[int, int]]) -> tuple[float, float]:
    """Seconds that a request keeps a prefill engine busy, and its share of a decode engine that is as busy as the objective allows."""
    read_s = sum(at(HARDWARE.read, (float(p), float(square(0, p)))) for p, _ in requests) / len(requests)
    tokens = sum(answer for _, answer in requests)
    context = sum(answer * (prompt + answer / 2) for prompt, answer in requests) / tokens
    a, b, c = HARDWARE.step
    return read_s, tokens / len(requests) * SLO.itl_s * (b + c * context) / (SLO.itl_s - a)


COSTS = cost(CODE), cost(CHAT)


def needed(swing: Swing, now: float) -> tuple[float, float]:
    """Engines that prefill and decode keep busy."""
    p, d = (sum(rate * cost for rate, cost in zip(swing.rates(now), costs, strict=True)) for costs in zip(*COSTS, strict=True))
    return p, d


def arrivals(swing: Swing, seconds: float = STEADY_S + PERIOD_S, *, seed: int = 1, period_s: float = PERIOD_S) -> Trace:
    chance = random.Random(seed)
    found = []
    for which, requests in enumerate((CODE, CHAT)):
        now, most = 0.0, swing[which] * (1 + swing.amplitude)
        while (now := now + chance.expovariate(most)) < seconds:
            if chance.random() * most < swing.rates(now, period_s)[which]:
                found.append(Arrival(now, *chance.choice(requests)))
    return Trace(tuple(sorted(found, key=lambda a: a.at)))


def best(swing: Swing, now: float) -> int:
    """Prefill engines of the ratio that fits this moment best."""
    p, d = needed(swing, now)
    return min(range(1, ENGINES), key=lambda n: max(p / n, d / (ENGINES - n)))


def oracle(swing: Swing) -> Callable[[float], int]:
    return lambda now: best(swing, now + LEAD_S)


def cluster(prefill: int, *, flips: bool = False, refuse: bool = True) -> Cluster:
    return Cluster(prefill, ENGINES - prefill, slo=SLO, flips=flips, refuse=refuse)


def run(trace: Trace, prefill: int, *, flips: bool = False, refuse: bool = True, plan: Callable[[float], int] | None = None) -> Outcome:
    return replay(trace, cluster(prefill, flips=flips, refuse=refuse), chance=random.Random(2).random, plan=plan)


def good(outcome: Outcome) -> int:
    """Good requests of the swing itself."""
    return sum(at >= STEADY_S for at in outcome.good_at)
