"""The controller over real sockets: engines that answer probes with nonsense."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest
from aiohttp import web

from disagg.cluster.controller import Controller
from disagg.cluster.prober import read_facts, read_load
from disagg.life import owned_tasks, supervised
from disagg.model import EngineLoad, EngineState, Role
from disagg.observe.log import make_logger
from tests.fake_engine import FakeEngine, fake_engine, until

S = EngineState


class Babbler(FakeEngine):
    """An engine that answers probes with JSON of another shape."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(Role.UNIFIED, 0, "confused")
        self.answer = answer
        self.probes = 0

    async def _models(self, _request: web.Request) -> web.Response:
        self.probes += 1
        return web.json_response({"data": [{"id": self.model}], **self.answer})

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response(self.answer)

    async def _loads(self, _request: web.Request) -> web.Response:
        return web.json_response(self.answer)


@pytest.mark.parametrize(
    "answer",
    [
        {"data": 3},
        {"data": [3]},
        {"data": {"a": 1}},
        {"internal_states": 5},
        {"internal_states": [None]},
        {"internal_states": {"x": 1}},
        {"loads": 5},
        {"loads": [{"disaggregation": [1]}]},
    ],
    ids=str,
)
async def test_an_engine_that_answers_probes_with_nonsense_hurts_nobody(answer: dict[str, Any]) -> None:
    bad, log = Babbler(answer), make_logger("error", "text")
    await bad.start()
    try:
        async with fake_engine(Role.UNIFIED, 1, "demo") as good, owned_tasks() as group:

            def spawn(work: Coroutine[Any, Any, None], name: str) -> Any:
                return group.create_task(supervised(work, name, log), name=name)

            watcher = Controller([bad.address, good.address], probe_interval_s=0.05, probe_timeout_s=2.0, spawn=spawn, log=log)
            task = group.create_task(watcher.run(), name="controller")
            await until(lambda: task.done() or (bad.probes >= 3 and watcher.view.engines[1].state is S.READY))
            assert not task.done()
            assert watcher.view.pools.keys() == {"demo"}
    finally:
        await bad.stop()


def test_loads_are_summed_over_ranks_and_nonsense_counts_as_nothing() -> None:
    ranks = [
        {"num_running_reqs": 2, "num_waiting_reqs": 1, "num_used_tokens": 10, "max_total_num_tokens": 100},
        {"num_running_reqs": 3, "num_used_tokens": "x", "max_total_num_tokens": 100, "disaggregation": {"kv_transfer_bytes_total": 9}},
        "rank",
    ]
    load = read_load({"loads": ranks})
    assert load == EngineLoad(running=5, waiting=1, kv_used_tokens=10, kv_total_tokens=200, kv_transfer_bytes=9, requests=6)


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ({"max_running_requests": 32}, 32),  # the embedded engine
        ({"max_running_requests": None, "internal_states": [{"effective_max_running_requests_per_dp": 48}]}, 48),
        ({"max_running_requests": 64, "internal_states": [{"effective_max_running_requests_per_dp": 30}] * 2}, 60),
        ({"max_running_requests": None}, 0),
        ({"internal_states": [{"effective_max_running_requests_per_dp": "x"}]}, 0),
        ({}, 0),
    ],
)
def test_how_many_requests_run_at_once_is_what_the_schedulers_say(info: dict[str, object], wanted: int) -> None:
    info = {"internal_states": [{}], **info}
    assert read_facts({}, info)[0].max_running == wanted


@pytest.mark.parametrize(
    ("rank", "requests"),
    [
        ({"num_running_reqs": 2, "num_waiting_reqs": 5, "disaggregation": {"prefill_bootstrap_queue_reqs": 4}}, 7),
        ({"num_waiting_reqs": 0, "disaggregation": {"prefill_bootstrap_queue_reqs": 3, "prefill_inflight_queue_reqs": 1}}, 4),
        (
            {
                "num_running_reqs": 1,
                "num_waiting_reqs": 2,
                "disaggregation": {"decode_prealloc_queue_reqs": 2, "decode_transfer_queue_reqs": 1},
            },
            4,
        ),
        ({"num_running_reqs": "many", "disaggregation": {"decode_transfer_queue_reqs": None}}, 0),
    ],
    ids=["sglang-prefill", "embedded-prefill", "embedded-decode", "nonsense"],
)
def test_requests_that_wait_for_a_peer_are_counted_once(rank: dict[str, Any], requests: int) -> None:
    assert read_load({"loads": [rank]}).requests == requests
