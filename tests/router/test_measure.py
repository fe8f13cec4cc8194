"""Engines that are idle when they come are measured: a real router, scripted engines that take their time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.config import PolicySection, SloSection
from disagg.model import Role
from disagg.policy.benchmark import AT_ONCE, LENGTHS, TIMES
from disagg.policy.cost import ENOUGH, Prior, square
from tests.fake_engine import HUNG_S, Call, answer_well, until
from tests.router.conftest import CHAT, Rig, running_rig
from tests.router.test_canary import generate_answer
from tests.router.test_lost import relay_of

PAIR = (Role.PREFILL, Role.DECODE)
MEASURED = PolicySection(measure_at_start=True)
TOKEN_S = 1e-4
STEP_S = 0.003
ALL = TIMES * (len(LENGTHS) + sum(AT_ONCE))


def is_measuring(call: Call) -> bool:
    return call.path == "/generate" and bool(call.json.get("stream"))


async def take_time(call: Call) -> None:
    """As long as an engine with these speeds would; canaries and clients are answered at once."""
    if not is_measuring(call):
        if call.path == "/generate" and call.engine.role is not Role.PREFILL:
            await call.json_answer(generate_answer([5, 6, 7]))
        else:
            await answer_well(call)
        return
    await asyncio.sleep(TOKEN_S * len(call.json["input_ids"]))
    if call.engine.role is Role.PREFILL:
        await call.json_answer({"text": "a", "meta_info": {}})
        return
    for _ in range(call.json["sampling_params"]["max_new_tokens"]):
        await call.event({"text": "a", "output_ids": [1], "meta_info": {}})
        await asyncio.sleep(STEP_S)
    await call.done()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.cluster.measurer.LOOK_S", 0.05)


def outcomes(rig: Rig) -> dict[str, int]:
    measurer = rig.router.controller.measurer
    assert measurer is not None
    return dict(measurer.outcomes)


async def another_look(rig: Rig) -> None:
    measurer = rig.router.controller.measurer
    assert measurer is not None
    before = measurer._looked_at
    await until(lambda: measurer._looked_at > before)


def measured(rig: Rig) -> list[dict[str, Any]]:
    """The bodies that the decode engine was asked to answer."""
    return [call.json for call in rig.decode.calls if is_measuring(call)]


async def seen_by(rig: Rig) -> list[dict[str, Any]]:
    async with rig.session.get(rig.admin + "/admin/cluster") as response:
        return [engine["forecast"] for engine in (await response.json())["engines"]]


@pytest.mark.usefixtures("at_once")
async def test_what_idle_engines_take_is_known_before_the_first_client_comes() -> None:
    writing = []

    def are_measured() -> bool:
        writing.append(relay_of(rig).admission.books.forecast.writing(1))
        return bool(outcomes(rig))

    async with running_rig(*PAIR, canaries=True, behave=take_time, policy=MEASURED) as rig:
        await until(are_measured)
        assert outcomes(rig) == {"done": 1}
        assert max(writing) == 0, "nobody asked for these answers: no more engines are needed for them"
        reads, steps = (row[name] for row, name in zip(await seen_by(rig), ("reads", "steps"), strict=True))
        assert min(reads["samples"], steps["samples"]) >= ENOUGH
        (first_s, *more), work = reads["line"], (2048.0, float(square(0, 2048)))
        assert sum(c * x for c, x in zip(more, work, strict=True)) > first_s, "long prompts take longer"
        asked = measured(rig)
        assert len(asked) == ALL
        assert len({body["extra_key"] for body in asked}) == ALL, "no prompt can be in a cache"
        assert len({tuple(body["input_ids"][:16]) for body in asked}) > ALL / 2
        assert 'disagg_benchmarks_total{outcome="done"} 1.0' in rig.metrics()
        async with rig.session.get(rig.admin + "/admin/cluster") as response:
            assert (await response.json())["ratio"][0]["offered"] == [0, 0], "nobody asked for it"


@pytest.mark.usefixtures("at_once")
async def test_it_stops_at_once_when_a_client_needs_the_engines() -> None:
    """Though its whole request fits into a round; and what was being read for nobody is aborted."""
    began = asyncio.Event()

    async def behave(call: Call) -> None:
        if is_measuring(call):
            if call.engine.role is Role.DECODE:
                began.set()
            await asyncio.sleep(HUNG_S)  # until it is aborted
        await take_time(call)

    async with running_rig(*PAIR, canaries=True, behave=behave, policy=MEASURED, slo=SloSection(ttft_s=0.01)) as rig:
        await asyncio.wait_for(began.wait(), HUNG_S)
        async with rig.session.get(rig.admin + "/admin/cluster") as response:
            cluster = await response.json()
        assert [engine.get("measuring") for engine in cluster["engines"]] == [True, True]
        assert cluster["ratio"][0]["offered"] == [0, 0], "nobody asked for it"
        knows(rig)
        async with await rig.post(CHAT) as response:
            assert response.status == 200, "nobody is sent away because the router is curious"
        await until(lambda: bool(outcomes(rig)))
        assert outcomes(rig) == {"stopped": 1}
        await until(lambda: len(rig.prefill.aborted) == len(rig.decode.aborted) == 1)
        await until(lambda: relay_of(rig).admission.books.is_empty)
        for _ in range(3):
            await another_look(rig)
        assert len(measured(rig)) == 1, "it is not tried again at once"


def knows(rig: Rig) -> None:
    """The prefill engine's line is trusted, as after an earlier measurement with another decode engine."""
    slow = Prior((5.0, 1e-4, 0.0), ((64.0, 4096.0), (256.0, 65536.0)), "a test", own=True, samples=ENOUGH)
    relay_of(rig).admission.books.forecast.measured(0, reads=slow, now=0.0)


@pytest.mark.usefixtures("at_once")
async def test_an_engine_that_refuses_to_be_measured_serves_all_the_same() -> None:
    async def behave(call: Call) -> None:
        if is_measuring(call):
            await call.json_answer({"error": {"message": "no"}}, status=400)
        else:
            await take_time(call)

    async with running_rig(*PAIR, canaries=True, behave=behave, policy=MEASURED) as rig:
        await until(lambda: bool(outcomes(rig)))
        assert outcomes(rig) == {"failed": 1}
        async with await rig.post(CHAT) as response:
            assert response.status == 200
        assert [rig.state(name) for name in ("prefill-0", "decode-0")] == ["ready", "ready"]
        assert relay_of(rig).admission.books.is_empty


@pytest.mark.usefixtures("at_once")
async def test_who_does_not_want_it_switches_it_off() -> None:
    async with running_rig(*PAIR, canaries=True, behave=take_time, policy=PolicySection(measure_at_start=False)) as rig:
        await until(lambda: 'disagg_canaries_total{outcome="same"} 1.0' in rig.metrics())
        assert rig.router.controller.measurer is None


@pytest.mark.usefixtures("at_once")
async def test_a_prefill_engine_that_ends_a_moment_after_the_answer_is_no_client() -> None:
    async def behave(call: Call) -> None:
        if is_measuring(call) and call.engine.role is Role.PREFILL:
            await asyncio.sleep(TOKEN_S * len(call.json["input_ids"]) + STEP_S * call.json["sampling_params"]["max_new_tokens"] + 0.1)
            await call.json_answer({"text": "a", "meta_info": {}})
        else:
            await take_time(call)

    async with running_rig(*PAIR, canaries=True, behave=behave, policy=MEASURED) as rig:
        await until(lambda: bool(outcomes(rig)))
        assert outcomes(rig) == {"done": 1}


@pytest.mark.usefixtures("at_once")
async def test_canaries_go_first() -> None:
    """Measured beside them, on other engines at first, they would seem slower than they are."""
    at_work = {True: 0, False: 0}
    beside: list[int] = []

    async def behave(call: Call) -> None:
        measured = is_measuring(call)
        at_work[measured] += 1
        beside.append(at_work[not measured])
        if not measured:
            await asyncio.sleep(0.2)
        await take_time(call)
        at_work[measured] -= 1

    async with running_rig(*PAIR, *PAIR, canaries=True, behave=behave, policy=MEASURED) as rig:
        await until(lambda: bool(outcomes(rig)))
        assert outcomes(rig)["done"] >= 1
        assert max(beside) == 0
