"""More is asked for than the engines can do, of real processes: a small version of ``scripts/bench-overload``."""

from __future__ import annotations

import httpx2
import pytest

from tests.cluster.conftest import running_cluster
from tests.rig.overload import FLAGS, measure


@pytest.mark.slow
async def test_twice_the_load_is_refused_at_once_and_costs_no_goodput() -> None:
    with running_cluster(*FLAGS) as cluster:
        (_, peak), (_, twice) = await measure(cluster.url, 6.0, (2.0,))
        metrics = httpx2.get(cluster.admin + "/metrics").text
    assert (peak.refused, peak.late, peak.others) == ([], 0, {})  # half as many again as there are places: they wait
    assert twice.goodput > 0.8 * peak.goodput
    assert len(twice.refused) > 0.3 * twice.offered
    assert (twice.late, twice.others) == (0, {})
    assert all(1 <= seconds <= 60 for seconds in twice.retry_after)
    assert _waited_in_vain(metrics) < 0.1 * len(twice.refused)


def _waited_in_vain(metrics: str) -> float:
    """How many were refused only when their time in the queue was up."""
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("disagg_") and 'reason="timeout"' in line)
