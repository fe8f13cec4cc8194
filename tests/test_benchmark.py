"""Which engines are measured at their start, with what, and what is learnt from it."""

from __future__ import annotations

import msgspec
import pytest

from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Role
from disagg.policy.benchmark import (
    AGAIN_S,
    AT_ONCE,
    HARD_S,
    LENGTHS,
    LIMIT_S,
    LONG_S,
    MOST_S,
    TIMES,
    TRIES,
    Benchmark,
    Plan,
    Round,
    overlap_step_s,
)
from disagg.policy.cost import ENOUGH, at
from disagg.policy.forecast import LONG_LIMIT_S, LONG_TIMES, Forecast

P, D, U = Role.PREFILL, Role.DECODE, Role.UNIFIED
NOTHING = (False, False)
EVERYTHING = (True, True)


def engine(slot: int, role: Role, *, pid: int = 0, context: int = 0, kv: int = 0, most: int = 0) -> EngineView:
    address = EngineAddress(EngineId(f"e{slot}"), role, "127.0.0.1", 1000 + slot, pid=pid or slot + 1)
    facts = EngineFacts(model="demo", context_tokens=context, max_running=most)
    return EngineView(address, slot, EngineState.READY, facts, EngineLoad(kv_total_tokens=kv))


def chosen(
    benchmark: Benchmark, *engines: EngineView, known: dict[int, tuple[bool, bool]] | None = None, busy: int = -1, now: float = 0.0
) -> list[int] | None:
    def knows(slot: int) -> tuple[bool, bool]:
        return (known or {}).get(slot, NOTHING)

    choice = benchmark.next(ClusterView.of(engines), known=knows, is_idle=lambda e: e.slot != busy, now=now)
    return None if choice is None else [e.slot for e in (choice.prefill, choice.decode) if e is not None]


def test_each_engine_is_measured_once() -> None:
    benchmark, four = Benchmark(), (engine(0, P), engine(1, P), engine(2, D), engine(3, D))
    assert [chosen(benchmark, *four) for _ in range(3)] == [[0, 2], [1, 3], None]


def test_where_one_kind_is_left_a_partner_is_measured_again() -> None:
    benchmark, three = Benchmark(), (engine(0, P), engine(1, D), engine(2, D))
    assert [chosen(benchmark, *three) for _ in range(3)] == [[0, 1], [0, 2], None]


def test_what_is_known_is_not_measured() -> None:
    two = engine(0, P), engine(1, D)
    assert chosen(Benchmark(), *two, known={0: EVERYTHING, 1: EVERYTHING}) is None
    assert chosen(Benchmark(), *two, known={0: (True, False), 1: (False, True)}) is None, "who reads only has no steps to know"
    assert chosen(Benchmark(), *two, known={0: EVERYTHING}) == [0, 1]
    assert chosen(Benchmark(), engine(0, U), known={0: (True, False)}) == [0]


def test_an_engine_that_works_is_left_alone_and_measured_when_it_rests() -> None:
    benchmark, two = Benchmark(), (engine(0, P), engine(1, D))
    assert chosen(benchmark, *two, busy=1) is None
    assert chosen(benchmark, *two) == [0, 1]


def test_an_engine_of_which_nothing_was_learnt_is_measured_again_later_and_not_for_ever() -> None:
    benchmark, two, now = Benchmark(), (engine(0, P), engine(1, D)), 0.0
    assert chosen(benchmark, *two, now=now) == [0, 1]
    assert chosen(benchmark, *two, now=now + AGAIN_S - 1) is None
    assert chosen(benchmark, *two, known={0: EVERYTHING}, now=now + AGAIN_S) == [0, 1]
    assert chosen(benchmark, *two, now=now + 2 * AGAIN_S) is None, "it takes longer each time"
    assert sum(chosen(benchmark, *two, now=1e6 * n) is not None for n in range(1, 20)) == TRIES - 2


def test_another_process_and_another_role_are_measured_again() -> None:
    benchmark = Benchmark()
    assert chosen(benchmark, engine(0, P), engine(1, D), known={0: EVERYTHING}) == [0, 1]
    assert chosen(benchmark, engine(0, P), engine(1, D), known={0: EVERYTHING}) is None
    assert chosen(benchmark, engine(0, P), engine(1, D, pid=77), known={0: EVERYTHING}) == [0, 1]
    assert chosen(benchmark, engine(0, D), engine(1, P, pid=77), known={0: (True, False), 1: EVERYTHING}) == [1, 0]


def test_unified_engines_are_measured_alone() -> None:
    assert chosen(Benchmark(), engine(0, P), engine(1, D), engine(2, U)) == [2]


def rounds(plan: Plan, seconds: float = 0.01) -> list[Round]:
    found = []
    while (one := plan.next()) is not None:
        found.append(one)
        plan.took(one, seconds, [[seconds]] * one.at_once)
    return found


def plan_of(**what: int) -> Plan:
    benchmark = Benchmark()
    choice = benchmark.next(
        ClusterView.of([engine(0, P, **what), engine(1, D, **what)]), known=lambda _: NOTHING, is_idle=lambda _: True, now=0.0
    )
    assert choice is not None
    return Plan(choice)


def test_a_plan_has_prompts_of_each_length_and_answers_at_once() -> None:
    found = rounds(plan_of())
    reads = [one for one in found if one.at_once == 1]
    assert sorted(one.prompt for one in reads) == sorted(LENGTHS * TIMES)
    assert len(reads) >= ENOUGH
    assert [one.at_once for one in found if one.at_once > 1] == [*AT_ONCE] * TIMES


def test_a_plan_asks_for_no_more_than_there_is_room_for() -> None:
    assert max(one.prompt for one in rounds(plan_of(context=1024))) == 256
    few = rounds(plan_of(kv=512))
    assert max(one.prompt for one in few) == 64
    assert max(one.at_once for one in few) == 1
    assert max(one.at_once for one in rounds(plan_of(most=2))) == 2
    assert rounds(plan_of(context=100)) == []


def test_what_takes_long_is_not_repeated_and_all_of_it_ends() -> None:
    plan = plan_of()
    first = []
    for seconds in (0.1, LONG_S * 1.1):
        one = plan.next()
        assert one is not None
        first.append(one)
        plan.took(one, seconds, [[seconds]])
    assert [one.prompt for one in first] == [64, 256]
    rest = rounds(plan)
    assert {one.prompt for one in rest} == {64}
    assert sum(one.at_once == 1 for one in rest) + len(first) >= ENOUGH, "what is left out is made up for"
    assert len(rounds(plan_of(), LIMIT_S / 3)) == 3 * MOST_S / LIMIT_S, "it goes on while there is too little, but not for ever"
    plan, number = plan_of(), 0
    while (one := plan.next()) is not None:
        plan.took(one, 1.0, [[0.05 * (n + 1) for n in range(one.answer)]] * one.at_once)
        number += 1
    assert LIMIT_S <= number < TIMES * (len(LENGTHS) + len(AT_ONCE)), "there was enough before the end"


@pytest.mark.parametrize("token_s", [1e-4, 1e-3, 5e-3, 2e-2, 0.2])
def test_no_engine_is_asked_for_what_it_takes_long_for(token_s: float) -> None:
    plan, asked = plan_of(), []
    while (one := plan.next()) is not None:
        asked.append(one)
        first_s = token_s * one.prompt
        plan.took(one, first_s * one.at_once, [[first_s * (n + 1) + 0.01 * m for m in range(one.answer)] for n in range(one.at_once)])
    assert all(one.prompt * one.at_once * token_s <= HARD_S for one in asked if one.prompt * one.at_once > LENGTHS[0])
    assert asked[0].prompt == LENGTHS[0]
    assert len(asked) >= (ENOUGH if token_s < 0.01 else 1)


def test_a_step_is_measured_while_all_answers_are_written() -> None:
    even = [[0.1 * n for n in range(10)], [0.35 + 0.1 * n for n in range(10)]]
    assert overlap_step_s(even) == pytest.approx(0.1, rel=0.1)
    slow_at_first = [[0.0, 0.01, 0.02, 0.03, *(1.0 + 0.2 * n for n in range(5))], [1.0 + 0.2 * n for n in range(6)]]
    assert overlap_step_s(slow_at_first) == pytest.approx(0.2), "what came before the other one began was another batch"
    assert overlap_step_s([[1.0, 1.2, 1.4]]) == pytest.approx(0.2)
    assert overlap_step_s([[0.0, 0.1], [0.2, 0.3]]) is None
    assert overlap_step_s([[0.0, 0.1], []]) is None
    assert overlap_step_s([]) is None


READ = (0.01, 0.001, 1e-7)
STEP = (0.02, 0.005, 1e-6)
"""Of an engine on which one more answer costs a lot: no prior from elsewhere has this shape."""


def play(plan: Plan, *, wrong: int = -1, rounds: int = 1000) -> Plan:
    """Has an engine with these lines do what the plan asks for; the round `wrong` takes ten times as long."""
    number = 0
    while number < rounds and (one := plan.next()) is not None:
        first_s = at(READ, (one.prompt, one.prompt**2))
        step_s = at(STEP, (one.at_once, one.at_once * (one.prompt + one.answer // 2)))
        times = 10.0 if number == wrong else 1.0
        seen = [[times * (first_s + 0.003 * n + step_s * m) for m in range(one.answer)] for n in range(one.at_once)]
        plan.took(one, 0.01, seen)
        number += 1
    return plan


@pytest.mark.parametrize("wrong", [-1, 0, 4, 8])
def test_what_is_measured_is_what_engines_do_though_one_round_went_wrong(wrong: int) -> None:
    plan = play(plan_of(), wrong=wrong)
    assert plan.reads is not None
    assert plan.steps is not None
    for tokens in (64, 500, 2048, 8192):
        assert at(plan.reads.line, (tokens, tokens**2)) == pytest.approx(at(READ, (tokens, tokens**2)), rel=0.02)
    for batch in (1, 4, 8, 16, 32):
        assert at(plan.steps.line, (batch, 100 * batch)) == pytest.approx(at(STEP, (batch, 100 * batch)), rel=0.05)


def test_what_is_measured_is_trusted_from_the_first_client_on() -> None:
    forecast, plan = Forecast(), play(plan_of())
    forecast.grow(4)
    assert [forecast.is_known(slot) for slot in (0, 1)] == [NOTHING, NOTHING]
    forecast.measured(0, reads=plan.reads, now=100.0)
    forecast.measured(1, steps=plan.steps, now=100.0)
    assert [forecast.is_known(slot) for slot in (0, 1)] == [(True, False), (False, True)]
    forecast.measured(0, reads=msgspec.structs.replace(plan.reads, line=(9.0, 9.0, 9.0)), now=100.0)  # type: ignore[type-var]
    assert forecast.pass_s(0, 1000) < 9.0, "what is known is not measured again"
    known = forecast.known(0, now=100.0), forecast.known(1, now=100.0)
    assert (known[0].reads_trust.doubt, known[1].steps_trust.doubt) == ("", "")
    assert forecast.pass_s(0, 1000) == pytest.approx(at(READ, (1000, 1e6)), rel=0.02)
    assert forecast.step_s(1, 8, 800) == pytest.approx(at(STEP, (8, 800)), rel=0.05)
    assert forecast.pass_s(2, 1000) == pytest.approx(forecast.pass_s(0, 1000)), "its peers are taken to be like it"
    assert forecast.known(2, now=100.0).reads_trust.doubt, "but that is not trusted"


def test_what_engines_do_later_counts_for_more_than_what_was_measured() -> None:
    forecast, now = Forecast(), 100.0
    forecast.grow(2)
    forecast.measured(0, reads=play(plan_of()).reads, now=now)
    for number in range(40):
        tokens = 200 + 100 * (number % 10)
        reading = forecast.sent(0, tokens, now=now)
        now += 0.05 + 0.002 * tokens
        forecast.read(reading, 1, now=now)
        now += 1.0
        forecast.tick(now)
    assert forecast.pass_s(0, 500) == pytest.approx(0.05 + 0.002 * 500, rel=0.1)


def test_of_one_kind_of_round_nothing_is_concluded() -> None:
    assert play(plan_of(), rounds=1).reads is None
    few = play(plan_of(), rounds=2)
    assert few.reads is not None
    forecast = Forecast()
    forecast.grow(1)
    forecast.measured(0, reads=few.reads, now=1.0)
    assert forecast.known(0, now=1.0).reads_trust.doubt == "2 samples so far; taken from a measurement when it came"


def test_what_clients_have_taught_is_kept() -> None:
    forecast, now = Forecast(), 100.0
    forecast.grow(2)
    for _ in range(4):
        reading = forecast.sent(0, 500, now=now)
        forecast.read(reading, 1, now=now + 0.5)
        now += 10.0
        forecast.tick(now)
    assert forecast.known(0, now=now).reads_trust.samples == 4
    plan = play(plan_of())
    assert plan.reads is not None
    forecast.measured(0, reads=plan.reads, now=now)
    assert forecast.known(0, now=now).reads_trust.samples == 4 + plan.reads.samples


def test_a_time_that_is_none_breaks_nothing() -> None:
    plan = plan_of()
    while (one := plan.next()) is not None:
        plan.took(one, 0.1, [[0.0] * one.answer] * one.at_once)
    assert (plan.reads, plan.steps) == (None, None)


def test_a_long_prompt_gives_its_engine_time_but_not_for_ever() -> None:
    forecast = Forecast()
    forecast.grow(1)
    forecast.measured(0, reads=play(plan_of()).reads, now=0.0)
    assert forecast.patience_s(0) == forecast.patience_s(7) == 0.0
    short = forecast.sent(0, 1000, now=1.0)
    long = forecast.sent(0, 5000, now=1.0)
    assert forecast.patience_s(0) == pytest.approx(LONG_TIMES * at(READ, (5000, 25e6)), rel=0.02)
    endless = forecast.sent(0, 10_000_000, now=1.0)
    assert forecast.patience_s(0) == LONG_LIMIT_S
    for reading in (endless, long, short):
        forecast.left(reading, now=2.0)
    assert forecast.patience_s(0) == 0.0


def test_events_of_several_tokens_tell_no_steps() -> None:
    plan = plan_of()
    while (one := plan.next()) is not None:
        plan.took(one, 0.01, [[0.1 * n for n in range(1, one.answer // 2)]] * one.at_once)
    assert plan.steps is None
    assert plan.reads is not None


def test_prompts_of_the_routers_own_say_nothing_of_what_clients_ask() -> None:
    forecast = Forecast()
    forecast.grow(1)
    forecast.read(forecast.sent(0, 2048, now=1.0, of_client=False), 0, now=2.0)
    forecast.tick(10.0)
    assert forecast.prompt_tokens == 0.0
    assert forecast.known(0, now=10.0).reads_trust.samples == 0, "the plan is told of it"
    forecast.left(forecast.sent(0, 300, now=3.0), now=4.0)
    assert forecast.prompt_tokens == 300.0


def test_an_engine_that_is_gone_is_forgotten() -> None:
    benchmark = Benchmark()
    assert chosen(benchmark, engine(0, P), engine(1, D)) == [0, 1]
    assert chosen(benchmark, engine(0, P)) is None
    assert chosen(benchmark, engine(0, P), engine(1, D)) == [0, 1]
