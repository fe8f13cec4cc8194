"""What a replay says to people. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from disagg.plan.simulate import Cluster, Outcome, Spread
from disagg.plan.trace import Trace


def told(outcome: Outcome, trace: Trace, cluster: Cluster) -> Iterator[str]:
    """Lines of text.

    Args:
        outcome: of the replay.
        trace: that was replayed.
        cluster: what it was replayed on.
    """
    slo = cluster.slo
    engines = f"{cluster.prefill} prefill, {cluster.decode} decode and {cluster.unified} unified engines"
    yield f"{outcome.requests} requests in {_clock(outcome.seconds)} on {engines}; placement {cluster.placement}"
    if trace.tick_s:
        yield f"  the trace has its times in ticks of {trace.tick_s:g} s: arrivals were spread within them at random"
    share = outcome.good / outcome.requests
    yield f"goodput     {outcome.goodput:.3f} requests/s within {slo.ttft_s:g} s and {1e3 * slo.itl_s:g} ms a token: {share:.1%} of all"
    if outcome.refused:
        yield f"refused     {outcome.refused}, which would have waited too long for their first token"
    if outcome.waits:
        yield f"no room     {outcome.waits} requests waited for KV"
    yield f"TTFT        {_spread(outcome.ttft, 's', 1.0)}"
    yield f"ITL         {_spread(outcome.itl, 'ms', 1e3)}"
    if trace.block:
        yield f"prefixes    {outcome.hits:.1%} of prompt tokens were found in caches; the router expected {outcome.believed:.1%}"
    busy = f"prefill {outcome.prefill_busy:.0%} and decode {outcome.decode_busy:.0%} of the time"
    yield f"busy        {busy}; all was answered after {_clock(outcome.ended_s)}"
    if cluster.flips:
        yield f"flips       {len(outcome.flips) or 'none'}"
    for flip in outcome.flips:
        took = f"took {flip.took_s:.0f} s" if math.isfinite(flip.took_s) else "was under way at the end"
        yield f"  {_clock(flip.at)}  engine-{flip.engine} to {flip.role} ({took}): {flip.reason}"


def _spread(spread: Spread, unit: str, times: float) -> str:
    figures = (("mean", spread.mean), ("p50", spread.p50), ("p90", spread.p90), ("p95", spread.p95), ("p99", spread.p99))
    return "  ".join(f"{name} {value * times:.4g}" for name, value in figures) + f" {unit}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
