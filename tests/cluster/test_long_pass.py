"""An engine whose pass takes longer than a hang is noticed in does not hang: the router knows how long its prompts take."""

from __future__ import annotations

import httpx2
import pytest

from tests.cluster.conftest import running_cluster
from tests.cluster.prompts import prompt_ids
from tests.serve.conftest import wait_for

SLOW = ("--engine-arg=--paced", "--engine-arg=0,10;5,0", "--engine-arg=--paced-compute", "--engine-arg=off")
"""10 ms a token: 500 of them are one pass of 5 s."""


@pytest.mark.slow
def test_a_pass_of_five_seconds_is_no_hang() -> None:
    with running_cluster("--measure-at-start", "--log-level", "info", *SLOW) as cluster:
        wait_for(lambda: "disagg_benchmarks_total{" in httpx2.get(cluster.admin + "/metrics").text, "engines are not measured")
        body = {"input_ids": prompt_ids(500, 1), "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
        answer = httpx2.post(cluster.url + "/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-disagg-attempts"] == "1"
        assert "have not moved" not in cluster.log.read_text()
