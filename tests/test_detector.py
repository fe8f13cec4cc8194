"""The detector of one engine: probes in, its state and the next probe out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web

from disagg.cluster import controller as controller_module
from disagg.cluster.controller import Controller
from disagg.cluster.detector import (
    HISTORY_LIMIT,
    Answered,
    EngineDetector,
    Event,
    Exited,
    Probe,
    Publish,
    Refused,
    Tick,
    TimedOut,
)
from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, Role
from disagg.observe.log import make_logger
from tests.fake_engine import FakeEngine, fake_engine, until

S = EngineState
FACTS = EngineFacts(model="demo", context_tokens=8192)
WELL = Answered(FACTS, EngineLoad())
LATE = TimedOut("its probe failed: TimeoutError")
INTERVAL_S = 1.0
WAYS: Mapping[S, tuple[Event, ...]] = {
    S.STARTING: (),
    S.READY: (WELL,),
    S.SUSPECT: (WELL, LATE),
    S.DEAD: (Exited(-9),),
    S.QUARANTINED: (Answered(FACTS, EngineLoad(), "decode"),),
}


def detector(role: Role = Role.PREFILL, *events: Event) -> EngineDetector:
    address = EngineAddress(EngineId(f"{role}-0"), role, "10.0.0.1", 30000, 8998 if role is Role.PREFILL else 0)
    made = EngineDetector(address, slot=3, probe_interval_s=INTERVAL_S, now=10.0)
    for event in events:
        made.handle(event, now=10.0)
        made.check()
    return made


def in_state(state: S) -> EngineDetector:
    made = detector(Role.PREFILL, *WAYS[state])
    assert made.view.state is state
    return made


def test_it_starts_with_a_probe_at_once_and_one_at_a_time() -> None:
    made = detector()
    assert (made.view.state, made.view.slot, made.view.reason) == (S.STARTING, 3, "it has not answered yet")
    assert made.next_deadline() == 10.0
    assert made.handle(Tick(), now=9.9) == []
    assert made.handle(Tick(), now=10.0) == [Probe()]
    assert made.next_deadline() is None
    assert made.handle(Tick(), now=99.0) == [], "a probe is under way"


@pytest.mark.parametrize(
    ("before", "event", "after"),
    [
        (S.STARTING, WELL, S.READY),
        (S.STARTING, Refused(), S.STARTING),
        (S.STARTING, LATE, S.STARTING),
        (S.STARTING, Exited(1), S.DEAD),
        (S.READY, WELL, S.READY),
        (S.READY, Refused(), S.SUSPECT),
        (S.READY, LATE, S.SUSPECT),
        (S.READY, Exited(-9), S.DEAD),
        (S.SUSPECT, WELL, S.READY),
        (S.SUSPECT, LATE, S.SUSPECT),
        (S.SUSPECT, Exited(0), S.DEAD),
        (S.DEAD, WELL, S.READY),
        (S.DEAD, Refused(), S.DEAD),
        (S.DEAD, LATE, S.DEAD),
        (S.DEAD, Exited(1), S.DEAD),
        (S.QUARANTINED, WELL, S.READY),
        (S.QUARANTINED, LATE, S.SUSPECT),
        (S.QUARANTINED, Exited(1), S.DEAD),
    ],
)
def test_moves(before: S, event: Event, after: S) -> None:
    made = in_state(before)
    made.handle(event, now=11.0)
    made.check()
    assert made.view.state is after


def test_two_refusals_in_a_row_are_death_and_it_stays_dead_until_it_answers() -> None:
    made = detector(Role.DECODE, WELL)
    states = []
    for event in (Refused(), Refused(), Refused(), Refused(), WELL, Refused()):
        made.handle(event, now=11.0)
        states.append(made.view.state)
    assert states == [S.SUSPECT, S.DEAD, S.DEAD, S.DEAD, S.READY, S.SUSPECT]


def test_an_engine_whose_process_ended_does_not_come_back_by_refusing() -> None:
    made = detector(Role.DECODE, WELL, Exited(-9))
    for _ in range(5):
        made.handle(Refused(), now=11.0)
        assert (made.view.state, made.view.reason) == (S.DEAD, "its process ended with code -9")


def test_refusals_with_something_else_in_between_are_not_in_a_row() -> None:
    made = detector(Role.DECODE, WELL, Refused(), LATE, Refused())
    assert made.view.state is S.SUSPECT


@pytest.mark.parametrize(
    ("role", "mode", "after"),
    [
        (Role.PREFILL, "prefill", S.READY),
        (Role.DECODE, "decode", S.READY),
        (Role.UNIFIED, "null", S.READY),
        (Role.PREFILL, "", S.READY),
        (Role.PREFILL, "decode", S.QUARANTINED),
        (Role.UNIFIED, "prefill", S.QUARANTINED),
        (Role.DECODE, "null", S.QUARANTINED),
    ],
)
def test_an_engine_in_another_mode_than_it_was_given_gets_no_work(role: Role, mode: str, after: S) -> None:
    made = detector(role, Answered(FACTS, EngineLoad(), mode))
    assert made.view.state is after
    if after is S.QUARANTINED:
        assert f"a {role} engine" in made.view.reason
        assert mode in made.view.reason


def test_an_engine_without_a_model_is_not_ready() -> None:
    made = detector(Role.DECODE, Answered(EngineFacts(), EngineLoad()))
    assert (made.view.state, made.view.reason) == (S.SUSPECT, "it does not say which model it serves")


@pytest.mark.parametrize(
    ("event", "wait_s"), [(WELL, INTERVAL_S), (Refused(), INTERVAL_S / 4), (LATE, INTERVAL_S / 4), (Exited(1), INTERVAL_S / 4)]
)
def test_trouble_makes_probes_four_times_as_frequent(event: Event, wait_s: float) -> None:
    made = detector()
    made.handle(Tick(), now=10.0)
    made.handle(event, now=20.0)
    assert made.next_deadline() == 20.0 + wait_s
    assert made.handle(Tick(), now=20.0 + wait_s) == [Probe()]


def test_looking_soon_brings_the_next_probe_forward_but_never_makes_two() -> None:
    made = detector(Role.DECODE, WELL)
    made.look_soon(10.1)
    assert made.handle(Tick(), now=10.1) == [Probe()]
    made.look_soon(10.2)
    assert made.next_deadline() is None


def test_a_change_is_published_and_an_answer_that_says_nothing_new_is_not() -> None:
    made = detector()
    assert made.handle(WELL, now=11.0) == [Publish()]
    assert made.handle(WELL, now=12.0) == []
    assert made.handle(Answered(FACTS, EngineLoad(running=1)), now=13.0) == [Publish()]
    assert made.view.load.running == 1


def test_facts_and_load_survive_trouble() -> None:
    made = detector(Role.DECODE, Answered(FACTS, EngineLoad(kv_transfer_bytes=7)), LATE, Refused(), Refused())
    assert (made.view.facts, made.view.load.kv_transfer_bytes) == (FACTS, 7)


def test_history_tells_the_story_and_is_bounded() -> None:
    made = detector()
    for at, event in ((11.0, WELL), (12.0, WELL), (13.0, LATE), (14.0, Exited(1))):
        made.handle(event, now=at)
    assert list(made.history) == [
        (11.0, "Answered: starting -> ready"),
        (13.0, "TimedOut: ready -> suspect"),
        (14.0, "Exited: suspect -> dead"),
    ]
    for _ in range(HISTORY_LIMIT):
        made.handle(WELL, now=15.0)
        made.handle(LATE, now=15.0)
    assert len(made.history) == HISTORY_LIMIT


def test_repr() -> None:
    assert repr(detector(Role.PREFILL, WELL, Refused())) == "<EngineDetector prefill-0 suspect refusals=1>"


def test_check_notices_a_ready_engine_without_a_model() -> None:
    made = detector(Role.PREFILL, WELL)
    made._change(S.READY, "", facts=EngineFacts(model=""))
    with pytest.raises(AssertionError):
        made.check()


def test_random_lives_keep_every_invariant() -> None:
    chance = random.Random(7)
    seen = set()
    for _ in range(60):
        made = detector(chance.choice(list(Role)))
        now, probing = 10.0, False
        for _ in range(80):
            now += chance.choice([0.0, 0.1, 0.25, 1.0, 5.0])
            load = EngineLoad(running=chance.randrange(3))
            answers: list[Event] = [WELL, Answered(FACTS, load, chance.choice(["", "prefill", "decode", "null"])), Refused(), LATE]
            event: Event = chance.choice([*answers, Exited(1)]) if probing else Tick()
            before = made.view
            commands = made.handle(event, now=now)
            made.check()
            assert (Publish() in commands) is (made.view != before)
            assert Probe() not in commands or isinstance(event, Tick)
            probing = made.next_deadline() is None
            assert not probing or isinstance(event, Tick)
            assert made.view.reason
            if before.state is S.DEAD and made.view.state is not S.DEAD:
                assert isinstance(event, Answered), "only an answer brings an engine back"
            seen.add(made.view.state)
    assert seen == {S.STARTING, S.READY, S.SUSPECT, S.DEAD, S.QUARANTINED}


# --- its shell


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
    bad = Babbler(answer)
    await bad.start()
    try:
        async with fake_engine(Role.UNIFIED, 1, "demo") as good, asyncio.TaskGroup() as group:
            watcher = Controller([bad.address, good.address], probe_interval_s=0.05, probe_timeout_s=2.0, log=make_logger("error", "text"))
            task = group.create_task(watcher.run(), name="controller")
            await until(lambda: task.done() or (bad.probes >= 3 and watcher.view.engines[1].state is S.READY))
            assert not task.done()
            assert watcher.view.pools.keys() == {"demo"}
            task.cancel()
    finally:
        await bad.stop()


def test_loads_are_summed_over_ranks_and_nonsense_counts_as_nothing() -> None:
    ranks = [
        {"num_running_reqs": 2, "num_waiting_reqs": 1, "num_used_tokens": 10, "max_total_num_tokens": 100},
        {"num_running_reqs": 3, "num_used_tokens": "x", "max_total_num_tokens": 100, "disaggregation": {"kv_transfer_bytes_total": 9}},
        "rank",
    ]
    load = controller_module._load({"loads": ranks})
    assert load == EngineLoad(running=5, waiting=1, kv_used_tokens=10, kv_total_tokens=200, kv_transfer_bytes=9)


# --- what the router makes of it


def view_of(*parts: tuple[Role, S, str]) -> ClusterView:
    engines = []
    for slot, (role, state, model) in enumerate(parts):
        address = EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1)
        made = EngineDetector(address, slot=slot, probe_interval_s=1.0, now=0.0)
        made._change(state, "so", facts=EngineFacts(model=model))
        engines.append(made.view)
    return ClusterView.of(engines)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "no engine is configured"),
        ([(Role.PREFILL, S.READY, "a"), (Role.DECODE, S.READY, "a")], ""),
        ([(Role.UNIFIED, S.READY, "a")], ""),
        ([(Role.PREFILL, S.READY, "a"), (Role.DECODE, S.READY, "b")], "serve different models"),
        ([(Role.PREFILL, S.READY, "a"), (Role.DECODE, S.DEAD, "a")], "no ready decode engine (prefill-0 ready, decode-1 dead)"),
        ([(Role.PREFILL, S.SUSPECT, "a"), (Role.DECODE, S.READY, "a")], "no ready prefill engine"),
        ([(Role.UNIFIED, S.STARTING, "")], "no ready prefill and no ready decode engine (unified-0 starting)"),
    ],
)
def test_the_view_says_what_is_missing(parts: list[tuple[Role, S, str]], why: str) -> None:
    sentence = view_of(*parts).why_not_ready()
    assert why in sentence
    assert bool(sentence) is bool(why)
