"""Sick engines and pairs in a real router: what the relay tells of its attempts becomes a view, and heals."""

from __future__ import annotations

import time

import msgspec
import pytest

from disagg.cluster.controller import BEAT_S, LAG_S
from disagg.handoff import Limits
from disagg.model import Choice, EngineId, EngineState, Role
from disagg.policy.eject import Command, Ejector, Event
from disagg.policy.pace import Pace
from disagg.policy.replay import Blame
from disagg.status import table
from tests.fake_engine import Call, answer_well, until
from tests.router.conftest import CHAT, Rig, running_rig

HEAL_S = 20.0
"""Five seconds of being out and a probe, on a busy machine."""
P0, P1, D0, D1 = (EngineId(f"{role}-{i}") for role in ("prefill", "decode") for i in (0, 1))
FOUR = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)


def choice(rig: Rig, prefill: EngineId, decode: EngineId) -> Choice:
    engines = {e.id: e for e in rig.router.controller.view.engines}
    return Choice(engines[prefill], engines[decode], "a test")


async def chosen(rig: Rig, count: int) -> set[tuple[str, str]]:
    """The pairs that so many requests went to; each is to be answered."""
    pairs = set()
    for _ in range(count):
        async with await rig.post(CHAT) as response:
            assert response.status == 200
            pairs.add((response.headers["x-disagg-prefill"], response.headers["x-disagg-decode"]))
    return pairs


async def status(rig: Rig) -> str:
    async with rig.session.get(f"{rig.admin}/admin/cluster") as response:
        return table(msgspec.json.decode(await response.read()))


async def test_an_engine_that_fails_three_times_gets_no_work_and_then_it_does() -> None:
    async with running_rig(*FOUR) as rig:
        controller = rig.router.controller
        for _ in range(3):
            controller.fault(choice(rig, P0, D0), Blame.ENGINE, "it closed the connection", engine=D0)
        assert rig.state(D0) == "suspect"
        assert {d for _, d in await chosen(rig, 8)} == {D1}
        assert "gets no new work for 5 s: 3 transport faults in 10 s, the last one: it closed the connection" in await status(rig)
        assert 'disagg_ejections_total{reason="faults"} 1.0' in rig.metrics()
        assert any("gets no new work" in what for _, what in controller.story(D0))
        await until(lambda: rig.state(D0) == "ready", HEAL_S)
        assert D0 in {d for _, d in await chosen(rig, 8)}


async def test_a_served_request_resets_and_what_is_nobodys_fault_never_counts() -> None:
    async with running_rig(*FOUR) as rig:
        controller, pair = rig.router.controller, choice(rig, P0, D0)
        for _ in range(2):
            controller.fault(pair, Blame.ENGINE, "x", engine=D0)
            controller.fault(pair, Blame.ENGINE, "x", engine=P0)
        controller.handed_over(pair)
        controller.served(pair)
        for _ in range(2):
            controller.fault(pair, Blame.ENGINE, "x", engine=D0)
            controller.fault(pair, Blame.ENGINE, "x", engine=P0)
        for _ in range(20):
            controller.fault(pair, Blame.NOBODY, "x", engine=D0)
        assert {e.state for e in controller.view.engines} == {EngineState.READY}


async def test_what_a_process_did_that_is_gone_is_not_held_against_the_next_one() -> None:
    async with running_rig(*FOUR) as rig:
        pair = choice(rig, P0, D0)
        old = msgspec.structs.replace(pair.decode, address=msgspec.structs.replace(pair.decode.address, pid=77))
        for _ in range(5):
            rig.router.controller.fault(msgspec.structs.replace(pair, decode=old), Blame.ENGINE, "x", engine=D0)
        assert rig.state(D0) == "ready"


async def test_what_is_late_because_the_router_slept_is_nobodys_fault() -> None:
    async with running_rig(*FOUR) as rig:
        time.sleep(LAG_S + 3 * BEAT_S)  # noqa: ASYNC251  # that is the fault
        for _ in range(5):
            rig.router.controller.fault(choice(rig, P0, D0), Blame.ENGINE, "x", engine=D0)
            rig.router.controller.fault(choice(rig, P0, D0), Blame.PAIR, "x")
        assert not rig.router.controller.view.cut
        assert rig.state(D0) == "ready"
        await until(lambda: _counts(rig, D0), HEAL_S)


def _counts(rig: Rig, engine: EngineId) -> bool:
    rig.router.controller.fault(choice(rig, P0, engine), Blame.ENGINE, "x", engine=engine)
    return rig.state(engine) == "suspect"


async def test_a_slow_engine_gets_less_and_its_measures_end_with_its_process() -> None:
    async with running_rig(*FOUR) as rig:
        controller, pace = rig.router.controller, Pace(Limits(), 600.0)
        pace.grow(4)
        controller.pace = pace
        for slot, step_s in ((2, 0.08), (3, 0.02)):
            pace.token_gap(slot, step_s, 100)
        await until(lambda: controller.view.engines[2].weight > 1.0)
        assert controller.view.engines[2].weight == pytest.approx(4.0)
        assert "it is 4 times as slow as the median of its pool" in await status(rig)
        await rig.engine(Role.DECODE).stop()
        await until(lambda: rig.state(D0) == "dead", HEAL_S)
        assert pace.step_s(2) is None
        assert pace.step_s(3) == 0.02


class Link:
    """Engines whose canaries are not answered over one pair while it is cut."""

    def __init__(self) -> None:
        self.is_cut = False
        self.probes = 0
        self.port = 0

    async def behave(self, call: Call) -> None:
        if call.path != "/generate" or call.engine.role is Role.PREFILL:
            await answer_well(call)
            return
        if self.is_cut:
            self.probes += 1
            await call.json_answer({"error": {"message": "the transfer failed", "code": 500}}, status=500)
            return
        tops = [[[-0.1, i, None], [-3.1, 0, None]] for i in (5, 6)]
        await call.json_answer({"text": "", "output_ids": [5, 6], "meta_info": {"output_top_logprobs": tops}})


async def test_a_cut_pair_gets_no_work_until_a_probe_passes() -> None:
    link = Link()
    async with running_rig(*FOUR, canaries=True, behave=link.behave) as rig:
        controller = rig.router.controller
        examiner = controller.examiner
        assert examiner is not None
        await until(lambda: examiner.outcomes["same"] == 4)
        link.is_cut = True
        controller.fault(choice(rig, P0, D0), Blame.PAIR, "no first token within 5 s")
        assert set(controller.view.cut) == {(P0, D0)}
        assert (P0, D0) not in await chosen(rig, 12)
        assert "prefill-0 with decode-0  until a probe passes: no first token within 5 s" in await status(rig)
        assert "disagg_cut_pairs 1.0" in rig.metrics()
        await until(lambda: link.probes > 0, HEAL_S)
        await until(lambda: "a probe failed" in controller.view.cut.get((P0, D0), ""))
        assert {e.state for e in controller.view.engines} == {EngineState.READY}, "the engines are well"
        link.is_cut = False
        await until(lambda: not controller.view.cut, HEAL_S)
        assert "disagg_cut_pairs 0.0" in rig.metrics()
        assert (P0, D0) in await chosen(rig, 24)


async def test_without_an_examiner_the_requests_are_the_probe() -> None:
    async with running_rig(*FOUR) as rig:
        rig.router.controller.fault(choice(rig, P0, D0), Blame.PAIR, "no first token within 5 s")
        assert rig.router.controller.view.cut
        await until(lambda: not rig.router.controller.view.cut, HEAL_S)


class Absent(Ejector):
    """The defence is off."""

    def handle(self, event: Event, *, now: float) -> list[Command]:
        return []


async def test_without_the_defence_a_failing_engine_gets_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.cluster.controller.Ejector", Absent)
    async with running_rig(*FOUR) as rig:
        for _ in range(3):
            rig.router.controller.fault(choice(rig, P0, D0), Blame.ENGINE, "x", engine=D0)
            rig.router.controller.fault(choice(rig, P0, D0), Blame.PAIR, "x")
        assert {d for _, d in await chosen(rig, 8)} == {D0, D1}
