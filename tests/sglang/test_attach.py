"""`--attach`: a second cluster uses engines that somebody else has started; it neither started them nor ends them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import Site, wait_for
from tests.sglang.conftest import Cluster


@pytest.fixture
def second(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """A router of its own, and two agents that know no more than a URL and a key."""
    made = Site(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(made.close)
        made.start_router()
        for name, role in (("p", "prefill"), ("d", "decode")):
            launch = cluster.record(name).launch
            made.start_host(name, role, "--attach", launch.url, env={"DISAGG_ENGINE_API_KEY": launch.api_key})
        wait_for(lambda: made.answers("/readyz"), lambda: str(made.cluster()))
        yield made
        made.engine_pids.clear()  # they are the first cluster's


def test_engines_that_run_already_are_used_and_left_alone(cluster: Cluster, second: Site) -> None:
    pids = {name: cluster.engine(name)["pid"] for name in ("p", "d")}
    answer = second.ask()
    assert answer.status_code == 200, answer.text
    assert (answer.headers["x-disagg-prefill"], answer.headers["x-disagg-decode"]) == ("p", "d")
    with cluster.without("u"):
        assert answer.json()["choices"][0]["message"] == cluster.ask().json()["choices"][0]["message"]
    for host in list(second.hosts.values()):
        assert host.end() == 0
    assert {name: cluster.engine(name)["pid"] for name in pids} == pids
    assert cluster.ask().status_code == 200
