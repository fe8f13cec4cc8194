"""What breaks between and on five hosts, how fast the router notices, what clients see, and that all is well again afterwards."""

from __future__ import annotations

import asyncio

import pytest

from tests.hosts.conftest import Cluster

pytestmark = pytest.mark.slow


async def test_requests_flow_over_all_hosts(cluster: Cluster) -> None:
    load = cluster.load()
    async with load.running(0.15):
        await asyncio.sleep(2)
    assert all(cluster.is_whole(a) for a in load.answers)
    for a in load.answers: print(a.prefill,a.decode,a.attempts,a.ended_at-a.sent_at)
    print(await cluster.healed())
