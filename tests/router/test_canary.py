"""Pairs that answer wrong are not used: a real router, scripted engines that answer its canaries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from disagg.model import EngineId, Role
from tests.fake_engine import HUNG_S, Call, answer_well
from tests.router.conftest import CHAT, Rig, running_rig

Wrong = Callable[[Call], bool]


def generate_answer(ids: list[int], margin: float = 3.0) -> dict[str, object]:
    tops = [[[-0.1, i, None], [-0.1 - margin, 0, None]] for i in ids]
    return {"text": "", "output_ids": ids, "meta_info": {"output_token_logprobs": [], "output_top_logprobs": tops}}


def answering(wrong: Wrong, *, margin: float = 3.0) -> Callable[[Call], object]:
    """Engines of which some answer canaries otherwise: as a decode engine whose KV pages are garbage would."""

    async def behave(call: Call) -> None:
        if call.path != "/generate" or call.engine.role is Role.PREFILL:
            await answer_well(call)
        else:
            await call.json_answer(generate_answer([5, 6, 9] if wrong(call) else [5, 6, 7], margin))

    return behave


def by_decode(number: int) -> Wrong:
    return lambda call: call.engine.role is Role.DECODE and call.engine.number == number


async def tried(rig: Rig, count: int) -> None:
    """Waits until so many pairs have answered."""
    examiner = rig.router.controller.examiner
    assert examiner is not None
    async with asyncio.timeout(HUNG_S):
        while examiner.outcomes.total() < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def quarantined(rig: Rig) -> set[tuple[EngineId | None, EngineId]]:
    return set(rig.router.controller.view.quarantined)


async def test_pairs_that_answer_alike_are_all_used() -> None:
    behave = answering(lambda _: False)
    async with running_rig(Role.PREFILL, Role.DECODE, Role.DECODE, Role.UNIFIED, canaries=True, behave=behave) as rig:  # type: ignore[arg-type]
        await tried(rig, 3)
        assert quarantined(rig) == set()
        assert 'disagg_canaries_total{outcome="same"} 3.0' in rig.metrics()


async def test_the_pair_that_differs_is_named_and_gets_no_request() -> None:
    behave = answering(by_decode(1))
    async with running_rig(Role.PREFILL, Role.DECODE, Role.DECODE, Role.UNIFIED, canaries=True, behave=behave) as rig:  # type: ignore[arg-type]
        await tried(rig, 3)
        assert quarantined(rig) == {("prefill-0", "decode-1")}
        for _ in range(6):
            async with await rig.post(CHAT) as response:
                assert response.headers["x-disagg-decode"] != "decode-1"
        async with rig.session.get(rig.admin + "/admin/cluster") as response:
            cluster = await response.json()
        (bad,) = cluster["quarantined"]
        assert (bad["prefill"], bad["decode"]) == ("prefill-0", "decode-1")
        assert "token 3 of its answer to canary 1 is 9 instead of 7" in bad["reason"]
        reason = next(e["reason"] for e in cluster["engines"] if e["id"] == "decode-1")
        assert "never paired with prefill-0" in reason
        assert "disagg_quarantined_pairs 1.0" in rig.metrics()


async def test_without_a_pair_that_can_be_trusted_no_request_is_taken() -> None:
    """The unified engine tells what is right, and it serves; once it is gone nothing is left."""
    behave = answering(by_decode(0))
    three = (Role.PREFILL, Role.DECODE, Role.UNIFIED)
    async with running_rig(*three, canaries=True, behave=behave, queue_timeout_s=1.0) as rig:  # type: ignore[arg-type]
        await tried(rig, 2)
        async with await rig.post(CHAT) as response:
            assert response.headers["x-disagg-decode"] == "unified-0"
        await rig.engine(Role.UNIFIED).stop()
        async with asyncio.timeout(HUNG_S):
            while rig.state("unified-0") != "dead":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with await rig.post(CHAT) as response:
            assert response.status == 503
            assert "quarantined" in (await response.json())["error"]["message"]


async def test_a_near_tie_is_no_difference() -> None:
    behave = answering(by_decode(1), margin=0.1)
    async with running_rig(Role.PREFILL, Role.DECODE, Role.DECODE, Role.UNIFIED, canaries=True, behave=behave) as rig:  # type: ignore[arg-type]
        await tried(rig, 3)
        assert quarantined(rig) == set()


async def test_a_canary_that_is_not_answered_says_nothing_about_right_and_wrong() -> None:
    async def refuse(call: Call) -> None:
        await call.json_answer({"error": {"message": "no"}}, status=500)

    async with running_rig(Role.PREFILL, Role.DECODE, canaries=True, behave=refuse) as rig:
        await tried(rig, 1)
        assert quarantined(rig) == set()
        assert 'disagg_canaries_total{outcome="failed"} 1.0' in rig.metrics()
        for engine in rig.engines:
            engine.behave = answer_well
        async with await rig.post(CHAT) as response:
            assert response.status == 200


async def test_an_engine_that_is_taken_out_between_two_prompts_gets_no_second_one() -> None:
    """It is idle between them, so that its role switch may begin: a prompt sent then would wait for nobody."""
    taken = asyncio.Event()

    async def behave(call: Call) -> None:
        if call.path == "/generate" and call.engine.role is Role.DECODE and not taken.is_set():
            taken.set()
            await rig.router.controller.drain("decode-0", "a test")
        await (answer_well(call) if call.engine.role is Role.PREFILL else call.json_answer(generate_answer([5, 6, 7])))

    async with running_rig(Role.PREFILL, Role.DECODE, canaries=True, wait=False) as rig:
        for engine in rig.engines:
            engine.behave = behave
        async with asyncio.timeout(HUNG_S):
            await taken.wait()
            while rig.decode.live or rig.prefill.live:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        examiner = rig.router.controller.examiner
        assert examiner is not None
        await rig.router.controller.undrain("decode-0", "a test")
        assert len(rig.decode.calls) == 1
        assert examiner.outcomes["failed"] == 0
