"""A request that makes engines die: it is found out at the second death, and nobody else loses anything."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.model import Role
from disagg.policy.blame import SOLO_S, Ledger
from disagg.policy.replay import SAME_AGAIN_S
from disagg.router.openai import Route, parse_event
from disagg.router.trial import PATIENCE_S, Trial
from tests.fake_engine import Call, FakeEngine, answer_well, until
from tests.router.conftest import CHAT, Rig, running_rig
from tests.router.test_go_on import asked, assert_whole, staged
from tests.router.test_lost import nothing_left
from tests.router.test_seam import body_of

INNOCENTS = 40
POISON = {**CHAT, "messages": [{"role": "user", "content": "the marker that kills"}]}


class Ward:
    """Engines that die of the marker, with all that they work on.

    Args:
        acts_s: so long after it came.
    """

    def __init__(self, rig: Rig, acts_s: float = 0.0) -> None:
        self.rig = rig
        self.acts_s = acts_s
        self.deaths = 0
        self.killing: list[asyncio.Future[None]] = []
        self.spared = asyncio.Event()  # as long as it is not set, the marker makes work and kills nobody
        self.spared.set()
        self.tried = 0
        for engine in rig.engines:
            engine.behave = self.behave

    async def behave(self, call: Call) -> None:
        await asyncio.sleep(0.05)  # work
        if b"the marker that kills" in call.raw:
            self.tried += 1
            await self.spared.wait()
            await asyncio.sleep(self.acts_s)
            await self.kill(call.engine)
        await answer_well(call)

    async def kill(self, engine: FakeEngine) -> None:
        self.deaths += 1
        self.killing.append(asyncio.ensure_future(engine.stop()))  # noqa: TID251  # it ends this very task, too
        await asyncio.Event().wait()


async def status(rig: Rig, body: Any) -> tuple[int, Any]:
    async with await rig.post(body) as response:
        return response.status, await response.json()


async def flood(rig: Rig, poisons: int = 1) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
    """Innocents come at a steady pace, poison in their midst."""
    bad: list[asyncio.Task[tuple[int, Any]]] = []
    good: list[asyncio.Task[tuple[int, Any]]] = []
    async with asyncio.TaskGroup() as group:
        for i in range(INNOCENTS):
            body = {**CHAT, "messages": [{"role": "user", "content": f"an innocent, number {i}"}]}
            good.append(group.create_task(status(rig, body)))
            if i in range(10, 10 + poisons):
                bad.append(group.create_task(status(rig, POISON)))
            await asyncio.sleep(0.01)
    return [t.result() for t in good], [t.result() for t in bad]


@pytest.mark.parametrize("probe_interval_s", [0.2, 5.0])
async def test_poison_kills_two_engines_and_no_innocent_is_lost(probe_interval_s: float) -> None:
    """Also where engines are looked at so seldom that their deaths would come to light after the request was judged."""
    async with running_rig(*[Role.UNIFIED] * 5, probe_interval_s=probe_interval_s) as rig:
        ward = Ward(rig)
        good, bad = await flood(rig)
        assert [code for code, _ in good] == [200] * INNOCENTS
        assert [(code, answer["error"]["code"]) for code, answer in bad] == [(500, "request_crashed_engine")]
        assert ward.deaths == 2
        again = await status(rig, POISON)
        assert (again[0], ward.deaths) == (500, 2), "it is refused at the door"
        await nothing_left(rig)


async def test_poison_in_a_whole_answer_is_found_out_though_it_acts_after_its_time_alone() -> None:
    """Nothing is seen of such an answer: how long it has run is all that can prove it."""
    async with running_rig(*[Role.UNIFIED] * 5) as rig:
        ward = Ward(rig, acts_s=2 * SOLO_S)
        good, bad = await flood(rig)
        assert [code for code, _ in good] == [200] * INNOCENTS
        assert [(code, answer["error"]["code"]) for code, answer in bad] == [(500, "request_crashed_engine")]
        assert ward.deaths == 3
        again = await status(rig, POISON)
        assert (again[0], ward.deaths) == (500, 3), "it is refused at the door"
        await nothing_left(rig)


async def test_a_whole_answer_that_outlives_its_age_at_the_death_is_proved_before_it_ends() -> None:
    async with running_rig(*[Role.UNIFIED] * 2) as rig:
        ward = Ward(rig)
        ward.spared.clear()
        innocent = asyncio.ensure_future(status(rig, POISON))  # noqa: TID251  # it is none as long as it is spared
        await until(lambda: ward.tried == 1)
        killing = asyncio.ensure_future(ward.kill(next(e for e in rig.engines if e.live)))  # noqa: TID251
        ledger = rig.router.listener._owner._crashes
        await until(lambda: ward.tried == 2 and not ledger.is_calm)
        await until(lambda: ledger.is_calm)
        assert not innocent.done()
        for task in (innocent, killing):
            task.cancel()
        await asyncio.gather(innocent, killing, return_exceptions=True)


async def test_a_copy_of_a_suspect_waits_for_what_becomes_of_it() -> None:
    async with running_rig(*[Role.UNIFIED] * 5) as rig:
        ward = Ward(rig)
        first = asyncio.ensure_future(status(rig, POISON))  # noqa: TID251
        await until(lambda: ward.deaths == 1)
        ward.spared.clear()
        await until(lambda: ward.tried == 2)
        copies = [asyncio.ensure_future(status(rig, POISON)) for _ in range(3)]  # noqa: TID251
        bystander = await status(rig, {**CHAT, "messages": [{"role": "user", "content": "an innocent, after the copies"}]})
        assert bystander[0] == 200
        ward.spared.set()
        answers = await asyncio.gather(first, *copies)
        assert [(code, answer["error"]["code"]) for code, answer in answers] == [(500, "request_crashed_engine")] * 4
        assert (ward.deaths, ward.tried) == (2, 2)
        await nothing_left(rig)


@pytest.mark.parametrize("with_ids", [True, False])
async def test_copies_of_a_stream_that_kills_in_the_middle_all_end_with_the_same_error(with_ids: bool) -> None:
    """After the first deaths one of them is tried, and the other waits for what becomes of that; ids may have to be asked for."""
    async with staged(Role.PREFILL, *[Role.DECODE] * 5, with_ids=with_ids, probe_interval_s=0.1) as stage:
        ward = Ward(stage.rig)

        async def kill(call: Call) -> None:
            await until(lambda: len(stage.spoken) >= 2)
            await ward.kill(call.engine)

        stage.step_s = 0.02
        stage.breaks = [(5, kill), (5, kill), *[(1, kill)] * 9]
        for engine in stage.rig.engines:
            engine.behave = answer_well if engine.role is Role.PREFILL else stage.speak
        body = body_of(Route.CHAT)
        told = await asyncio.gather(*(asked(stage, Route.CHAT, body) for _ in range(2)))
        codes = [(parse_event(events[-1]) or {})["error"]["code"] for events, _ in told]
        assert codes == ["request_crashed_engine"] * 2
        assert ward.deaths == 3, "the first two died at the same time"
        await nothing_left(stage.rig)


async def test_without_the_ledger_it_kills_as_many_as_it_may_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_strike", lambda *_: False)
    async with running_rig(*[Role.UNIFIED] * 5) as rig:
        ward = Ward(rig)
        _, bad = await flood(rig)
        assert bad[0][0] >= 500
        assert ward.deaths == 3


async def test_who_was_there_when_an_engine_was_killed_is_no_poison() -> None:
    async with running_rig(*[Role.UNIFIED] * 3) as rig:
        ward = Ward(rig)
        asking = [asyncio.ensure_future(status(rig, CHAT | {"user": str(i)})) for i in range(6)]  # noqa: TID251
        await until(lambda: all(e.live for e in rig.engines))
        killing = asyncio.ensure_future(ward.kill(rig.engines[0]))  # noqa: TID251
        answers = await asyncio.gather(*asking)
        assert [code for code, _ in answers] == [200] * 6
        killing.cancel()
        await nothing_left(rig)


async def test_streams_that_ran_well_are_tried_together_where_the_first_was_innocent(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other would be a long pause where many lost their engine: it is one, then two at a time, then four."""
    monkeypatch.setattr("disagg.policy.pace.FLOOR_S", 60.0)  # nobody gives the silent ones up meanwhile
    async with staged(Role.PREFILL, Role.DECODE, Role.DECODE, probe_interval_s=0.1) as stage:
        ward = Ward(stage.rig)
        dying, other = stage.rig.engines[1:]
        ends = {engine.address.id: asyncio.Event() for engine in (dying, other)}
        may_go_on = asyncio.Event()
        again: list[Call] = []

        async def speak(call: Call) -> None:
            for i, event in enumerate(stage.function.events(Route.CHAT, call.json)):
                if i == 20:
                    await ends[call.engine.address.id].wait()
                    if call.engine is dying:
                        await ward.kill(dying)
                await call.write(event)
            await call.end()

        async def go_on(call: Call) -> None:
            again.append(call)
            if len(again) > 1:
                await may_go_on.wait()
            await stage.speak(call)

        stage.rig.prefill.behave, dying.behave, other.behave = answer_well, speak, speak
        bodies = [{**body_of(Route.CHAT, limit=40), "user": str(i)} for i in range(8)]
        asking = [asyncio.ensure_future(asked(stage, Route.CHAT, body)) for body in bodies]  # noqa: TID251
        await until(lambda: [len(e.live) for e in (dying, other)] == [4, 4])
        ends[other.address.id].set()
        await until(lambda: sum(a.done() for a in asking) == 4)
        other.behave = go_on
        ends[dying.address.id].set()
        await until(lambda: len(again) == 3 and len(other.live) == 2)
        await asyncio.sleep(PATIENCE_S + SAME_AGAIN_S + 0.1)  # the fourth waits until time alone changes nothing any more
        may_go_on.set()
        for body, (events, _) in zip(bodies, await asyncio.gather(*asking), strict=True):
            assert_whole(Route.CHAT, events, stage, body)
        await nothing_left(stage.rig)


async def test_a_stream_does_not_wait_for_a_copy_of_it_that_was_under_way() -> None:
    async with staged(Role.PREFILL, *[Role.DECODE] * 3, probe_interval_s=0.1) as stage:
        ward = Ward(stage.rig)
        may_end = asyncio.Event()
        begun: list[Call] = []

        async def speak(call: Call) -> None:
            begun.append(call)
            number = len(begun)
            for i, event in enumerate(stage.function.events(Route.CHAT, call.json)):
                if i == 10 and number == 1:
                    await until(lambda: len(begun) == 2)
                    await ward.kill(call.engine)
                if i == 10 and number == 2:
                    await may_end.wait()
                await call.write(event)
            await call.end()

        for engine in stage.rig.engines:
            engine.behave = answer_well if engine.role is Role.PREFILL else speak
        body = body_of(Route.CHAT)
        asking = [asyncio.ensure_future(asked(stage, Route.CHAT, body)) for _ in range(2)]  # noqa: TID251
        await until(lambda: sum(a.done() for a in asking) == 1)
        may_end.set()
        for events, _ in await asyncio.gather(*asking):
            assert_whole(Route.CHAT, events, stage, body)
        await nothing_left(stage.rig)


async def test_a_death_is_noticed_although_the_other_leg_had_broken_before_and_its_engine_lives() -> None:
    """Both engines are looked at at once: the one that lives must not use up the time of the one that died."""
    async with staged(Role.PREFILL, *[Role.DECODE] * 4, probe_interval_s=0.8) as stage:
        ward = Ward(stage.rig)

        async def read(call: Call) -> None:
            room = call.json["bootstrap_room"]
            await until(lambda: room in decoding)
            call.cut()

        async def kill(call: Call) -> None:
            decoding.add(call.json["bootstrap_room"])
            await asyncio.sleep(0.2)  # until the router has seen that prefill's connection is gone
            await ward.kill(call.engine)

        decoding: set[int] = set()
        stage.breaks = [(1, kill)] * 9
        for engine in stage.rig.engines:
            engine.behave = read if engine.role is Role.PREFILL else stage.speak
        events, _ = await asked(stage, Route.CHAT, body_of(Route.CHAT))
        assert (parse_event(events[-1]) or {})["error"]["code"] == "request_crashed_engine"
        assert ward.deaths == 2


def test_a_trial_knows_when_more_is_open_to_it() -> None:
    now = 10.0
    trial = Trial(Ledger(), 1, lambda: now, lambda: None)
    trial.begin()
    assert trial.next_change(10.1) == 10.0 + PATIENCE_S
    assert trial.next_change(10.0 + PATIENCE_S) is None
