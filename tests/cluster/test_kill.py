"""kill -9 of an engine in any phase: the client has an answer or an error within 2 s, and the survivor holds nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.cluster.conftest import Cluster, holds_nothing, load_of, running_cluster
from tests.cluster.prompts import prompt_ids

pytestmark = pytest.mark.slow

BOUND_S = 2.0
# Steps that last as long as a big model's, so that each phase can be met: 40 ms a step, and 0.2 ms a prompt token.
PACED = ("--engine-arg=--paced", "--engine-arg=40,0.2;40,0")


async def counter(session: aiohttp.ClientSession, cluster: Cluster, role: str) -> dict[str, Any]:
    return await load_of(session, cluster.engine(role))


async def until(condition: Any, limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await condition():  # noqa: ASYNC110  # what is waited for happens in other processes
            await asyncio.sleep(0.01)


async def ask(session: aiohttp.ClientSession, cluster: Cluster, *, stream: bool) -> tuple[int, bytes]:
    body = {
        "input_ids": prompt_ids(3000, 1),
        "sampling_params": {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True},
        "stream": stream,
    }
    async with session.post(cluster.url + "/generate", json=body) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "transfer", "decode"])
@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_kill(session: aiohttp.ClientSession, victim: str, phase: str, stream: bool) -> None:
    with running_cluster(*PACED, "--log-level", "error") as cluster:

        async def in_phase() -> bool:
            prefill, decode = await counter(session, cluster, "prefill"), await counter(session, cluster, "decode")
            if phase == "prefill":
                return bool(prefill["num_running_reqs"] or prefill["num_used_tokens"])
            if phase == "transfer":
                return bool(decode["decode_transfer_queue_reqs"] and prefill["total_prefill_uncached_tokens"])
            return bool(decode["num_running_reqs"] and decode["total_generated_tokens"] > 3)

        async with asyncio.TaskGroup() as group:
            asking = group.create_task(ask(session, cluster, stream=stream))
            await until(in_phase)
            assert not asking.done()
            pid = cluster.engine(victim)["pid"]
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            harmless = victim == "prefill" and phase == "decode"
            async with asyncio.timeout(60 if harmless else BOUND_S):
                status, body = await asking
        if harmless:
            assert status == 200
            assert b'"error"' not in body
        else:
            assert time.monotonic() - killed_at < BOUND_S
            assert_failed(status, body, stream=stream)
        survivor = "decode" if victim == "prefill" else "prefill"

        async def free() -> bool:
            return holds_nothing(await counter(session, cluster, survivor))

        await until(free, BOUND_S + 1)


def assert_failed(status: int, body: bytes, *, stream: bool) -> None:
    if status == 200:
        assert stream
        last = body.decode().split("\n\n")[-2]
        assert msgspec.json.decode(last.removeprefix("data: "))["error"]["message"]
        assert b"[DONE]" not in body
    else:
        assert status in {500, 502, 503}  # 500: the survivor's own sentence about its lost partner came first
        assert msgspec.json.decode(body)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_frees_both_engines_within_a_second(session: aiohttp.ClientSession, phase: str, stream: bool) -> None:
    with running_cluster(*PACED, "--log-level", "error") as cluster:

        async def busy() -> bool:
            load = await counter(session, cluster, phase)
            return bool(load["num_running_reqs"] and (phase == "prefill" or load["total_generated_tokens"] > 3))

        async with asyncio.TaskGroup() as group:
            asking = group.create_task(ask(session, cluster, stream=stream))
            await until(busy)
            asking.cancel()

        async def free() -> bool:
            return all([holds_nothing(await counter(session, cluster, role)) for role in ("prefill", "decode")])

        await until(free, 1.0)
