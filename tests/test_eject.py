"""Who gets no new work because it is sick, and that suspicion never does more harm than sickness."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineState, EngineView, Role
from disagg.policy.eject import (
    CUT_S,
    FAULTS_WITHIN_S,
    OUT_MAX_S,
    OUT_S,
    PROBATION_S,
    PROBE_LOST_S,
    QUIET_S,
    SLOW_FOR_S,
    WEIGHT_MAX,
    Changed,
    Command,
    Ejector,
    Event,
    Faulted,
    HandedOver,
    Measure,
    Paced,
    PairFaulted,
    Probed,
    ProbePair,
    Served,
    Tick,
    ViewChanged,
)

P, D, U = Role.PREFILL, Role.DECODE, Role.UNIFIED


def name(role: Role, number: int) -> EngineId:
    return EngineId(f"{role}-{number}")


P0, P1, P2, D0, D1, D2 = (name(role, number) for role in (P, D) for number in range(3))


def view(
    prefill: int = 0, decode: int = 0, unified: int = 0, *, down: Iterable[EngineId] = (), pids: dict[EngineId, int] | None = None
) -> ClusterView:
    names = [(role, name(role, i)) for role, count in ((P, prefill), (D, decode), (U, unified)) for i in range(count)]
    down = set(down)
    return ClusterView.of(
        EngineView(
            EngineAddress(engine, role, "h", 1, pid=(pids or {}).get(engine, 1)),
            slot,
            EngineState.DEAD if engine in down else EngineState.READY,
            EngineFacts(model="m"),
        )
        for slot, (role, engine) in enumerate(names)
    )


class Rig:
    """A machine with a view."""

    def __init__(self, prefill: int = 3, decode: int = 3, unified: int = 0) -> None:
        self.machine = Ejector()
        self.feed(ViewChanged(view(prefill, decode, unified)), 0.0)

    def feed(self, event: Event, now: float) -> list[Command]:
        commands = self.machine.handle(event, now=now)
        self.machine.check()
        return commands

    def fault(self, engine: EngineId, *times: float) -> list[Command]:
        return [c for at in times for c in self.feed(Faulted(engine, "it closed the connection"), at)]

    def pair_fault(self, prefill: EngineId, decode: EngineId, now: float) -> list[Command]:
        return self.feed(PairFaulted(prefill, decode, "no first token within 5 s"), now)

    @property
    def out(self) -> set[EngineId]:
        return set(self.machine.ejected)

    @property
    def cut(self) -> set[tuple[EngineId, EngineId]]:
        return set(self.machine.cut)


# --- transport faults


def test_three_faults_in_ten_seconds_eject_for_five() -> None:
    rig = Rig()
    assert rig.fault(D0, 1.0, 2.0) == []
    [changed] = rig.fault(D0, 3.0)
    assert isinstance(changed, Changed)
    assert changed.reason == "faults"
    reason = "gets no new work for 5 s: 3 transport faults in 10 s, the last one: it closed the connection"
    assert rig.machine.ejected == {D0: reason}
    assert rig.machine.next_deadline() == 3.0 + OUT_S
    assert rig.feed(Tick(), 7.9) == []
    assert rig.feed(Tick(), 8.0) != []
    assert rig.out == set()
    assert rig.machine.next_deadline() is None
    assert [sentence for _, sentence in rig.machine.history][-1].startswith("decode-0 gets work again, on probation")


def test_faults_that_are_far_apart_do_not_count() -> None:
    rig = Rig()
    rig.fault(D0, 0.0, 5.0, FAULTS_WITHIN_S + 0.1)
    assert rig.out == set()


def test_a_served_request_resets() -> None:
    rig = Rig()
    rig.fault(D0, 1.0, 2.0)
    rig.feed(Served(D0), 2.5)
    rig.fault(D0, 3.0, 4.0)
    assert rig.out == set()
    rig.fault(P0, 1.0, 2.0)
    rig.feed(HandedOver(P0, D0), 2.5)
    rig.fault(P0, 3.0, 4.0)
    assert rig.out == set()


def test_a_first_token_does_not_excuse_a_decode_engine_that_breaks_off_after_it() -> None:
    rig = Rig()
    for at in (1.0, 2.0, 3.0):
        rig.feed(HandedOver(P0, D0), at)
        rig.fault(D0, at + 0.1)
    assert rig.out == {D0}


def test_each_time_is_twice_as_long_up_to_a_minute() -> None:
    rig, now, times = Rig(), 0.0, []
    for _ in range(6):
        rig.fault(D0, now, now, now)
        until = rig.machine.next_deadline()
        assert until is not None
        times.append(until - now)
        now = until
        rig.feed(Tick(), now)
    assert times == [5.0, 10.0, 20.0, 40.0, OUT_MAX_S, OUT_MAX_S]


def test_on_probation_one_fault_is_enough_and_later_it_is_not() -> None:
    rig = Rig()
    rig.fault(D0, 0.0, 0.0, 0.0)
    rig.feed(Tick(), 5.0)
    rig.fault(D0, 5.0 + PROBATION_S - 0.1)
    assert rig.out == {D0}
    rig.feed(Tick(), 100.0)
    rig.fault(D0, 100.0 + PROBATION_S)
    assert rig.out == set()


def test_quiet_brings_the_back_off_down() -> None:
    rig = Rig()
    for at in (0.0, 5.0):
        rig.fault(D0, at, at, at)
        rig.feed(Tick(), at + 10.0)
    now = 15.0 + 2 * QUIET_S
    rig.fault(D0, now, now, now)
    assert rig.machine.next_deadline() == now + OUT_S


def test_the_last_of_a_role_stays_whatever_it_does() -> None:
    rig = Rig(1, 2)
    for at in range(20):
        rig.fault(P0, float(at))
    assert rig.out == set()
    rig.fault(D0, 20.0, 20.0, 20.0)
    rig.fault(D1, 21.0, 21.0, 21.0)
    assert rig.out == {D0}


def test_a_unified_engine_is_no_last_one_where_pairs_serve() -> None:
    rig = Rig(1, 1, 1)
    unified = name(U, 0)
    rig.fault(unified, 0.0, 0.0, 0.0)
    assert rig.out == {unified}
    alone = Rig(0, 0, 1)
    alone.fault(unified, 0.0, 0.0, 0.0)
    assert alone.out == set()


def test_what_becomes_the_last_one_is_used_again() -> None:
    rig = Rig(1, 2)
    rig.fault(D0, 0.0, 0.0, 0.0)
    assert rig.out == {D0}
    rig.feed(ViewChanged(view(1, 2, down=[D1])), 1.0)
    assert rig.out == set()


@pytest.mark.parametrize("after", [view(3, 3, pids={D0: 2}), view(3, 3, down=[D0])], ids=["another process", "judged by the detector"])
def test_what_is_another_process_or_was_given_up_starts_anew(after: ClusterView) -> None:
    rig = Rig()
    rig.fault(D0, 0.0, 0.0, 0.0)
    assert rig.out == {D0}
    rig.feed(ViewChanged(after), 1.0)
    rig.feed(ViewChanged(view(3, 3, pids={D0: 2})), 2.0)
    assert rig.out == set()


def test_strangers_are_nobodys_concern() -> None:
    rig, stranger = Rig(), EngineId("stranger")
    for event in (Faulted(stranger, "x"), PairFaulted(P0, stranger, "x"), Served(stranger), HandedOver(stranger, D0), Probed(P0, D0, True)):
        assert rig.feed(event, 1.0) == []


# --- pairs


def test_one_failed_handoff_cuts_the_pair_and_nothing_else() -> None:
    rig = Rig()
    [changed] = rig.pair_fault(P0, D0, 1.0)
    assert isinstance(changed, Changed)
    assert changed.reason == "cut"
    assert rig.cut == {(P0, D0)}
    assert rig.out == set()
    assert rig.pair_fault(P0, D0, 1.1) == [], "what was under way when it was cut"


def test_a_cut_pair_heals_by_a_probe_and_only_by_one() -> None:
    rig = Rig()
    rig.pair_fault(P0, D0, 0.0)
    assert rig.machine.next_deadline() == CUT_S
    assert rig.feed(Tick(), CUT_S) == [ProbePair(P0, D0)]
    assert rig.cut == {(P0, D0)}
    assert rig.feed(Tick(), CUT_S + 1.0) == [], "one probe at a time"
    rig.feed(Probed(P0, D0, False, "no answer within 4 s"), CUT_S + 4.0)
    assert rig.machine.cut == {(P0, D0): "until a probe passes: no answer within 4 s"}
    assert rig.machine.next_deadline() == 2 * CUT_S, "the next one is not put off by a probe that took long"
    assert rig.feed(Tick(), 2 * CUT_S) == [ProbePair(P0, D0)]
    assert rig.feed(Probed(P0, D0, True), 2 * CUT_S + 0.1) != []
    assert rig.cut == set()


def test_a_probe_of_which_nothing_is_heard_is_made_again() -> None:
    rig = Rig()
    rig.pair_fault(P0, D0, 0.0)
    rig.feed(Tick(), CUT_S)
    assert rig.machine.next_deadline() == CUT_S + PROBE_LOST_S
    assert rig.feed(Tick(), CUT_S + PROBE_LOST_S) == [ProbePair(P0, D0)]


def test_a_pair_that_comes_and_goes_is_left_alone_for_longer_each_time() -> None:
    rig, now, holds = Rig(), 0.0, []
    for _ in range(5):
        rig.pair_fault(P0, D0, now)
        until = rig.machine.next_deadline()
        assert until is not None
        holds.append(until - now)
        rig.feed(Tick(), until)
        rig.feed(Probed(P0, D0, True), until + 0.1)
        now = until + 1.0
    assert holds == [5.0, 10.0, 20.0, 40.0, 60.0]
    now += 10 * QUIET_S
    rig.pair_fault(P0, D0, now)
    assert rig.machine.next_deadline() == now + CUT_S


def test_the_last_pair_is_never_cut() -> None:
    rig = Rig(1, 1)
    assert rig.pair_fault(P0, D0, 0.0) == []
    rig = Rig(2, 1)
    rig.pair_fault(P0, D0, 0.0)
    rig.pair_fault(P1, D0, 0.0)
    assert rig.cut == {(P0, D0)}


def test_a_cut_pair_that_becomes_the_last_one_is_used_again() -> None:
    rig = Rig(2, 1)
    rig.pair_fault(P0, D0, 0.0)
    rig.feed(ViewChanged(view(2, 1, down=[P1])), 1.0)
    assert rig.cut == set()


def test_who_fails_with_several_partners_is_ejected_itself() -> None:
    rig = Rig()
    for number, decode in enumerate((D0, D1, D2)):
        rig.pair_fault(P0, decode, float(number))
    assert rig.out == {P0}
    assert "3 handoffs with 3 others failed" in rig.machine.ejected[P0]
    assert rig.cut == set(), "the pairs were not at fault"


def test_who_hands_over_to_somebody_is_not_ejected_for_links() -> None:
    rig = Rig()
    for at in range(10):
        rig.pair_fault(P0, D0, float(at))
        rig.pair_fault(P0, D1, float(at))
        rig.feed(HandedOver(P0, D2), at + 0.5)
    assert rig.out == set()
    assert rig.cut == {(P0, D0), (P0, D1)}


# --- slow engines


def pace(rig: Rig, steps: dict[EngineId, float], now: float, samples: int) -> list[Command]:
    return rig.feed(Paced({engine: Measure(step, samples) for engine, step in steps.items()}), now)


def test_an_engine_that_reads_little_at_a_time_is_not_slow() -> None:
    """Each byte takes longer where there are few of them; the prompts are through sooner all the same."""
    rig = Rig()
    for at in range(20):
        rig.feed(Paced({P0: Measure(1e-4, 10 + at, 0.05), P1: Measure(1e-5, 10 + at, 0.1), P2: Measure(1e-5, 10 + at, 0.1)}), float(at))
    assert rig.out == set()
    assert rig.machine.weights == {}
    for at in range(20, 40):
        rig.feed(Paced({P0: Measure(1e-4, 10 + at, 1.0), P1: Measure(1e-5, 10 + at, 0.1), P2: Measure(1e-5, 10 + at, 0.1)}), float(at))
    assert rig.out == {P0}


def test_a_slow_engine_is_weighted_at_once_and_ejected_after_ten_seconds() -> None:
    rig, steps = Rig(), {D0: 0.08, D1: 0.02, D2: 0.02}
    for at in range(int(SLOW_FOR_S)):
        pace(rig, steps, float(at), 100 * (at + 1))
        assert rig.machine.weights == {D0: 4.0}
        assert rig.out == set()
    pace(rig, steps, SLOW_FOR_S, 2000)
    assert rig.out == {D0}
    assert "4.0 times as slow as the median of its pool" in rig.machine.ejected[D0]
    rig.feed(Tick(), SLOW_FOR_S + OUT_S)
    assert rig.out == set()
    assert rig.machine.weights == {D0: 4.0}, "on probation it gets little"


def test_less_than_three_times_is_weighted_and_never_ejected() -> None:
    rig = Rig()
    for at in range(100):
        pace(rig, {D0: 0.05, D1: 0.02, D2: 0.02}, float(at), at + 1)
    assert rig.out == set()
    assert rig.machine.weights == {D0: 2.5}


def test_a_third_of_a_role_at_most_is_ejected_for_being_slow() -> None:
    rig = Rig(1, 3)
    for at in range(100):
        pace(rig, {D0: 0.2, D1: 0.1, D2: 0.01}, float(at), at + 1)
    assert len(rig.out) <= 1
    rig = Rig(1, 2)
    for at in range(100):
        pace(rig, {D0: 0.2, D1: 0.01}, float(at), at + 1)
    assert rig.out == set()
    assert rig.machine.weights == {D0: WEIGHT_MAX}


def test_noise_is_no_slowness_and_small_changes_bring_no_new_view() -> None:
    rig = Rig()
    assert pace(rig, {D0: 0.028, D1: 0.02, D2: 0.021}, 1.0, 10) == []
    assert len(pace(rig, {D0: 0.05, D1: 0.02, D2: 0.02}, 2.0, 20)) == 1
    assert pace(rig, {D0: 0.055, D1: 0.02, D2: 0.02}, 3.0, 30) == []


def test_milliseconds_are_noise_whatever_the_ratio() -> None:
    def fed(rig: Rig, decode_s: float, read_s: float) -> Rig:
        for at in range(20):
            pace(rig, {D0: decode_s, D1: 0.001, D2: 0.001}, float(at), 10 + at)
            rig.feed(Paced({e: Measure(s / 1000, 10 + at, s) for e, s in ((P0, read_s), (P1, 0.005), (P2, 0.005))}), float(at))
        return rig

    assert fed(Rig(), 0.0039, 0.024).machine.weights == {}
    assert fed(Rig(), 0.0041, 0.026).out == {D0, P0}


def test_who_gets_no_work_is_tried_again() -> None:
    rig = Rig(1, 2)
    pace(rig, {D0: 0.2, D1: 0.02}, 0.0, 10)
    assert rig.machine.weights == {D0: WEIGHT_MAX}
    for at in range(1, 60):
        rig.feed(Paced({D0: Measure(0.2, 10), D1: Measure(0.02, 10 + at)}), float(at))
    assert rig.machine.weights == {}


def test_one_that_came_back_is_not_ejected_for_what_was_measured_before() -> None:
    rig, steps = Rig(), {D0: 0.2, D1: 0.02, D2: 0.02}
    for at in range(11):
        pace(rig, steps, float(at), at + 1)
    assert rig.out == {D0}
    rig.feed(Tick(), 15.0)
    for at in range(16, 40):
        rig.feed(Paced({D0: Measure(0.2, 11), D1: Measure(0.02, 20 + at), D2: Measure(0.02, 20 + at)}), float(at))
        assert rig.out == set()


# --- whatever happens


@pytest.mark.parametrize("seed", range(25))
def test_whatever_happens_somebody_is_left(seed: int) -> None:
    chance = random.Random(seed)
    counts = (chance.randrange(1, 5), chance.randrange(1, 5), chance.randrange(3))
    rig, now = Rig(*counts), 0.0
    prefills, decodes = ([name(role, i) for i in range(count)] for role, count in ((P, counts[0]), (D, counts[1])))
    everyone = [*prefills, *decodes, *(name(U, i) for i in range(counts[2]))]
    asked: list[tuple[EngineId, EngineId]] = []
    samples = 0
    for _ in range(300):
        now += chance.choice((0.01, 0.1, 1.0, 7.0))
        pair = (chance.choice(prefills), chance.choice(decodes))
        samples += chance.randrange(3)
        event: Event = chance.choice(
            (
                Faulted(chance.choice(everyone), "x"),
                PairFaulted(*pair, "x"),
                PairFaulted(*pair, "x"),
                HandedOver(*pair),
                Served(chance.choice(everyone)),
                Paced({e: Measure(chance.choice((0.01, 0.02, 0.1)), samples) for e in everyone if chance.random() < 0.9}),
                ViewChanged(
                    view(
                        *counts,
                        down=[e for e in everyone if chance.random() < 0.2],
                        pids={e: chance.choice((1, 1, 1, 2)) for e in everyone},
                    )
                ),
                Probed(*(asked.pop() if asked else pair), chance.random() < 0.5),
                Tick(),
                Tick(),
            )
        )
        asked += [(c.prefill, c.decode) for c in rig.feed(event, now) if isinstance(c, ProbePair)]
        due = rig.machine.next_deadline()
        assert due is None or due <= now + OUT_MAX_S
    for _ in range(150):  # and all heals once nothing happens any more
        now += 1.0
        for command in rig.feed(Tick(), now):
            if isinstance(command, ProbePair):
                rig.feed(Probed(command.prefill, command.decode, True), now)
    assert (rig.out, rig.cut) == (set(), set())
    assert repr(rig.machine).startswith("<Ejector engines=")
