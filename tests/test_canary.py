"""Who answers right: the machine that compares pairs, without engines."""

from __future__ import annotations

import random

import msgspec
import pytest

from disagg.cluster.canary import (
    PROMPTS,
    Answer,
    Answered,
    Answers,
    Ask,
    Canary,
    Failed,
    Judged,
    Pairing,
    Tick,
    ViewChanged,
    difference,
    read_answer,
    request,
)
from disagg.errors import EngineError
from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineState, EngineView, Role

RIGHT = tuple(Answer((1, 2, 3), (5.0, 5.0, 5.0)) for _ in PROMPTS)
WRONG = (*RIGHT[:-1], Answer((1, 2, 4), (5.0, 5.0, 5.0)))
FACTS = EngineFacts(model="m", model_hash="a")


def engine(role: Role, number: int, *, pid: int = 1, state: EngineState = EngineState.READY, facts: EngineFacts = FACTS) -> EngineView:
    slot = {Role.PREFILL: 0, Role.DECODE: 100, Role.UNIFIED: 200}[role] + number
    return EngineView(EngineAddress(EngineId(f"{role[0]}{number}"), role, "h", 1, pid=pid), slot, state, facts)


def view(prefill: int = 0, decode: int = 0, unified: int = 0) -> ClusterView:
    counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.UNIFIED: unified}
    return ClusterView.of([engine(role, i) for role, n in counts.items() for i in range(n)])


class Town:
    """A machine, and engines of which some answer wrong."""

    def __init__(self, wrong: frozenset[str] = frozenset()) -> None:
        self.machine = Canary()
        self.wrong = wrong
        self.now = 0.0
        self.asked: list[str] = []
        self.told: list[str] = []

    def see(self, view: ClusterView) -> None:
        self.run(self.machine.handle(ViewChanged(view), now=self.now))

    def answer_of(self, who: Pairing) -> Answers:
        return WRONG if str(who) in self.wrong else RIGHT

    def run(self, commands: list[Ask | Judged]) -> None:
        while commands:
            command = commands.pop(0)
            if isinstance(command, Judged):
                self.told.append(command.sentence)
            else:
                self.asked.append(str(command.pairing))
                commands += self.machine.handle(Answered(command.pairing, self.answer_of(command.pairing)), now=self.now)
            self.machine.check()

    @property
    def quarantined(self) -> set[str]:
        return {f"{p} with {d}" if p else d for p, d in self.machine.quarantined}


def test_every_pair_is_asked_once_and_unified_engines_first() -> None:
    town = Town()
    town.see(view(2, 2, 1))
    assert town.asked[0] == "u0"
    assert sorted(town.asked) == ["p0 with d0", "p0 with d1", "p1 with d0", "p1 with d1", "u0"]
    town.see(view(2, 2, 1))
    assert len(town.asked) == 5
    assert town.machine.next_deadline() is None


def test_a_new_process_is_a_new_pair() -> None:
    town = Town(frozenset({"p0 with d1"}))
    town.see(view(1, 2, 1))
    assert town.quarantined == {"p0 with d1"}
    town.wrong = frozenset()
    town.see(ClusterView.of([engine(Role.PREFILL, 0), engine(Role.DECODE, 0), engine(Role.DECODE, 1, pid=2), engine(Role.UNIFIED, 0)]))
    assert town.asked[-1] == "p0 with d1"
    assert town.quarantined == set()


def test_a_drain_is_no_way_out_of_a_quarantine() -> None:
    town = Town(frozenset({"p0 with d1"}))
    town.see(view(1, 2, 1))
    others = [engine(Role.PREFILL, 0), engine(Role.DECODE, 0), engine(Role.UNIFIED, 0)]
    town.see(ClusterView.of([*others, engine(Role.DECODE, 1, state=EngineState.DRAINING)]))
    town.see(view(1, 2, 1))
    assert town.quarantined == {"p0 with d1"}
    assert len(town.asked) == 3


def test_a_unified_engine_is_right_against_any_number_of_pairs() -> None:
    town = Town(frozenset({"p0 with d0", "p0 with d1"}))
    town.see(view(1, 2))
    assert town.quarantined == set()  # both alike: nobody knows better
    town.see(view(1, 2, 1))
    assert town.quarantined == {"p0 with d0", "p0 with d1"}


def test_without_one_the_most_are_right_even_if_the_first_was_not() -> None:
    town = Town(frozenset({"p0 with d0"}))
    town.see(view(1, 1))
    assert town.quarantined == set()
    town.see(view(1, 2))
    assert town.quarantined == {"p0 with d1"}  # one against one: the first
    town.see(view(1, 5))
    assert town.quarantined == {"p0 with d0"}
    assert any("p0 with d1 is trusted again" in sentence for sentence in town.told)


def test_what_a_unified_engine_said_stays_right_when_it_is_gone() -> None:
    town = Town(frozenset({"p0 with d0"}))
    town.see(view(1, 1, 1))
    town.see(view(1, 1))
    assert town.quarantined == {"p0 with d0"}
    town.see(view())
    town.see(view(1, 1))
    assert town.quarantined == set()  # other processes, and nobody is left who could tell


def test_an_upgrade_of_all_engines_is_not_the_end_of_service() -> None:
    town = Town()
    town.see(view(2, 2, 1))
    town.wrong = frozenset({"u0", *(f"p{p} with d{d}" for p in range(2) for d in range(2))})
    town.see(view())
    town.see(view(2, 2))
    assert town.quarantined == set()


def test_one_new_engine_that_differs_from_those_that_stayed_is_quarantined() -> None:
    town = Town()
    town.see(view(1, 2))
    town.wrong = frozenset({"p0 with d1"})
    town.see(ClusterView.of([engine(Role.PREFILL, 0), engine(Role.DECODE, 0), engine(Role.DECODE, 1, pid=2)]))
    assert town.quarantined == {"p0 with d1"}


def test_where_weights_are_unknown_the_next_engines_may_have_others() -> None:
    facts = EngineFacts(model="m")
    pair = [engine(Role.PREFILL, 0, facts=facts), engine(Role.DECODE, 0, facts=facts)]
    town = Town()
    town.see(ClusterView.of(pair))
    town.see(view())
    town.wrong = frozenset({"p0 with d0"})
    town.see(ClusterView.of(pair))
    assert town.quarantined == set()


def test_other_weights_are_another_truth() -> None:
    facts = EngineFacts(model="m", model_hash="b")
    town = Town(frozenset({"p1 with d1"}))
    town.see(
        ClusterView.of(
            [
                *(engine(Role.PREFILL, 0), engine(Role.PREFILL, 1, facts=facts)),
                *(engine(Role.DECODE, 0), engine(Role.DECODE, 1, facts=facts)),
            ]
        )
    )
    assert sorted(town.asked) == ["p0 with d0", "p1 with d1"]
    assert town.quarantined == set()


def test_a_failure_is_asked_again_later_and_ever_more_rarely() -> None:
    machine = Canary()
    (ask,) = machine.handle(ViewChanged(view(1, 1)), now=0.0)
    assert isinstance(ask, Ask)
    waits = []
    now = 0.0
    for _ in range(6):
        assert machine.handle(Failed(ask.pairing, "no"), now=now) == []
        due = machine.next_deadline()
        assert due is not None
        waits.append(due - now)
        assert machine.handle(Tick(), now=due - 0.01) == []
        now = due
        assert machine.handle(Tick(), now=now) == [ask]
        machine.check()
    assert waits == [5, 10, 20, 40, 60, 60]


def test_an_answer_of_engines_that_are_gone_is_nobodys() -> None:
    machine = Canary()
    (ask,) = machine.handle(ViewChanged(view(1, 1)), now=0.0)
    assert isinstance(ask, Ask)
    machine.handle(ViewChanged(ClusterView()), now=0.0)
    assert machine.handle(Answered(ask.pairing, RIGHT), now=0.0) == []
    assert machine.tried == 0
    assert machine.handle(ViewChanged(view(1, 1)), now=1.0) == [ask]


def test_a_random_walk_never_distrusts_everybody() -> None:
    rng = random.Random(7)
    for _ in range(300):
        town = Town()
        for _ in range(20):
            engines = [
                engine(role, i, pid=rng.randint(1, 2), state=rng.choice([EngineState.READY, EngineState.READY, EngineState.DRAINING]))
                for role in Role
                for i in range(rng.randint(0, 3))
            ]
            everyone = {f"p{p} with d{d}" for p in range(3) for d in range(3)} | {"u0", "u1", "u2"}
            town.wrong = frozenset(rng.sample(sorted(everyone), rng.randint(0, 6)))
            town.see(ClusterView.of(engines))
            town.now += rng.random() * 10


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (RIGHT, ""),
        (WRONG, f"token 3 of its answer to canary {len(PROMPTS)} is 4 instead of 3"),
        ((Answer((1, 2), (5.0, 5.0)), *RIGHT[1:]), "its answer to canary 1 has 2 tokens instead of 3"),
    ],
)
def test_where_answers_part(seen: Answers, said: str) -> None:
    assert difference(RIGHT, seen) == said


def test_only_the_trusted_answers_margin_decides_what_a_near_tie_is() -> None:
    tie = tuple(Answer(a.ids, (5.0, 5.0, 0.2)) for a in RIGHT)
    assert difference(tie, WRONG) == ""
    assert difference(WRONG, tie) != ""


def test_an_answer_is_read_as_sglang_gives_it() -> None:
    top = [[[-0.1, 7, None], [-2.1, 9, None]], [[-0.5, 8, None], [-0.6, 9, None]]]
    body = msgspec.json.encode({"text": "x", "output_ids": [7, 8], "meta_info": {"output_top_logprobs": top}})
    answer = read_answer(body)
    assert answer.ids == (7, 8)
    assert answer.margins == pytest.approx((2.0, 0.1))
    assert read_answer(b'{"output_ids": [7], "meta_info": {}}').margins == (float("inf"),)


NO_ANSWERS = [b"", b"[]", b"{}", b'{"output_ids": 3, "meta_info": {}}', b'{"output_ids": ["x"], "meta_info": {}}', b"\xff"]


@pytest.mark.parametrize("body", NO_ANSWERS)
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    with pytest.raises(EngineError, match="makes no sense"):
        read_answer(body)


def test_each_request_has_its_salt_and_is_greedy() -> None:
    body = msgspec.json.decode(request(PROMPTS[0], "s1"))
    assert body["extra_key"] == "s1"
    assert body["sampling_params"]["temperature"] == 0


# --- what a view makes of it


def test_a_quarantined_unified_engine_is_in_no_pool() -> None:
    engines = [engine(Role.PREFILL, 0), engine(Role.DECODE, 0), engine(Role.UNIFIED, 0)]
    seen = ClusterView.of(engines, quarantined={(None, EngineId("u0")): "it errs"})
    assert seen.pools["m"].unified == ()
    assert seen.pools["m"].can_pair
    assert next(e for e in seen.engines if e.id == "u0").unpaired == "is quarantined: it errs"


def test_a_quarantined_pair_is_still_tried_when_its_engines_are_others() -> None:
    engines = [engine(Role.PREFILL, 0), engine(Role.DECODE, 0)]
    seen = ClusterView.of(engines, quarantined={(EngineId("p0"), EngineId("d0")): "it errs"})
    assert not seen.pools["m"].can_pair
    (proving,) = seen.proving
    assert proving.can_pair


def test_a_part_of_an_engine_over_several_hosts_is_in_no_pool() -> None:
    part = engine(Role.DECODE, 1, facts=EngineFacts(model="m", part=1))
    seen = ClusterView.of([engine(Role.PREFILL, 0), engine(Role.DECODE, 0), part])
    assert [e.id for e in seen.pools["m"].decode] == ["d0"]
