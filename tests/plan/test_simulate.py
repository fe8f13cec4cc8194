"""Replays: what must come out of simple loads, how placements compare, and whom the balance moves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest

from disagg.model import Role
from disagg.plan.dispatch import Placement
from disagg.plan.hardware import Hardware
from disagg.plan.simulate import Cluster, Outcome, replay
from disagg.plan.trace import Arrival, Trace
from disagg.policy.books import Slo
from tests.plan.swing import CHAT, CODE, COSTS, Swing, arrivals, best, good, oracle, run

HARDWARE = Hardware()


def simulate(trace: Trace, cluster: Cluster, seed: int = 1) -> Outcome:
    return replay(trace, cluster, chance=random.Random(seed).random)


def alike(rate: float, seconds: float, prompt: int, answer: int, *, seed: int = 1) -> Trace:
    chance, now, found = random.Random(seed), 0.0, []
    while (now := now + chance.expovariate(rate)) < seconds:
        found.append(Arrival(now, prompt, answer))
    return Trace(tuple(found))


def test_a_request_that_is_alone_takes_what_the_lines_say() -> None:
    outcome = simulate(Trace((Arrival(0.0, 1000, 101),)), Cluster(1, 1))
    (a, b, c), (d, e, f) = HARDWARE.read, HARDWARE.step
    first = a + b * 1000 + c * 1000**2 + 1000 * HARDWARE.kv_bytes / HARDWARE.bandwidth + HARDWARE.rtt_s
    assert outcome.ttft.mean == pytest.approx(first)
    assert outcome.ended_s == pytest.approx(first + 100 * (d + e + f * 1001) + f * 100 * 99 / 2)
    assert outcome.itl.mean == pytest.approx((outcome.ended_s - first) / 100, rel=0.01)
    assert outcome.good == 1


def test_a_unified_engine_that_is_alone_takes_no_transfer() -> None:
    outcome = simulate(Trace((Arrival(0.0, 1000, 101),)), Cluster(0, 0, 1))
    a, b, c = HARDWARE.read
    assert outcome.ttft.mean == pytest.approx(a + b * 1000 + c * 1000**2)


def test_a_queue_of_equal_prompts_is_as_long_as_queueing_theory_says() -> None:
    """M/D/1 at 70 %: prompts longer than a chunk, so that each has a pass of its own."""
    hardware = msgspec.structs.replace(HARDWARE, bandwidth=1e15, rtt_s=0.0)
    a, b, c = hardware.read
    pass_s = a + b * 9000 + c * 9000**2
    outcome = simulate(alike(0.7 / pass_s, 20_000.0, 9000, 2), Cluster(1, 1, hardware=hardware, refuse=False))
    assert outcome.ttft.mean - pass_s == pytest.approx(0.7 * pass_s / (2 * 0.3), rel=0.1)
    assert outcome.prefill_busy == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("cluster", [Cluster(2, 2), Cluster(0, 0, 4), Cluster(2, 1, 1), Cluster(3, 1, flips=True)])
@pytest.mark.parametrize("placement", list(Placement))
def test_everything_is_answered_and_the_same_seed_gives_the_same_bytes(cluster: Cluster, placement: Placement) -> None:
    cluster = msgspec.structs.replace(cluster, placement=placement, refuse=False)
    trace = shared(2.0, 300.0)
    first, second = (msgspec.json.encode(simulate(trace, cluster)) for _ in range(2))
    assert first == second
    outcome = msgspec.json.decode(first, type=Outcome)
    assert outcome.requests == len(trace.arrivals)
    assert outcome.refused == 0


def shared(rate: float, seconds: float, *, seed: int = 1, talks: int = 60) -> Trace:
    """Conversations that go on: each turn repeats all of those before it."""
    chance, now, found = random.Random(seed), 0.0, []
    names: dict[int, list[int]] = {}
    fresh = 0
    while (now := now + chance.expovariate(rate)) < seconds:
        talk = names.setdefault(chance.randrange(talks), [])
        for _ in range(chance.randrange(2, 8)):
            fresh += 1
            talk.append(fresh)
        found.append(Arrival(now, 512 * len(talk) + 100, chance.randrange(2, 200), tuple(talk)))
        if len(talk) > 40:
            talk.clear()
    return Trace(tuple(found), 512)


def test_who_knows_what_caches_hold_is_faster_and_nearly_as_good_as_who_sees_them() -> None:
    trace = shared(2.6, 1200.0)
    found = {p: simulate(trace, Cluster(4, 4, placement=p, refuse=False)) for p in Placement}
    assert found[Placement.CACHE].ttft.mean < 0.7 * found[Placement.LOAD].ttft.mean
    assert found[Placement.LOAD].ttft.mean < found[Placement.RANDOM].ttft.mean
    assert found[Placement.CACHE].hits > 0.95 * found[Placement.PERFECT].hits
    assert found[Placement.CACHE].hits > 1.3 * found[Placement.LOAD].hits
    assert found[Placement.CACHE].believed == pytest.approx(found[Placement.CACHE].hits, rel=0.02)


def test_without_room_they_wait_in_the_order_in_which_they_came() -> None:
    hardware = msgspec.structs.replace(HARDWARE, batch=2)
    outcome = simulate(alike(1.0, 60.0, 100, 100), Cluster(1, 1, hardware=hardware, refuse=False))
    assert outcome.waits > 10
    assert outcome.itl.p99 < HARDWARE.step[0] + 3 * (HARDWARE.step[1] + HARDWARE.step[2] * 200)


def test_who_would_come_too_late_is_refused_and_the_others_are_in_time() -> None:
    trace = alike(6.0, 600.0, 2000, 10)
    slo = Slo(3.0, 0.1)
    patient, strict = (simulate(trace, Cluster(1, 1, slo=slo, refuse=refuse)) for refuse in (False, True))
    assert patient.refused == 0
    assert patient.good < 0.1 * patient.requests
    assert strict.good > 0.8 * (strict.requests - strict.refused) > 5 * patient.good


# --- flips


def mixed(load: Callable[[float], tuple[float, float]], seconds: float, *, seed: int = 1) -> Trace:
    """Requests that need so many prefill and decode engines."""
    (code_p, code_d), (chat_p, chat_d) = COSTS
    chance, found, now, most = random.Random(seed), [], 0.0, 40.0
    while (now := now + chance.expovariate(most)) < seconds:
        p, d = load(now)
        chat = max(0.0, (d * code_p - p * code_d) / (chat_d * code_p - chat_p * code_d))
        code = max(0.0, (p - chat * chat_p) / code_p)
        assert code + chat < most
        drawn = chance.random() * most
        if drawn < code:
            found.append(Arrival(now, *chance.choice(CODE)))
        elif drawn < code + chat:
            found.append(Arrival(now, *chance.choice(CHAT)))
    return Trace(tuple(found))


@pytest.mark.parametrize("load", [(1.5, 1.5), (2.7, 2.4)])
def test_a_steady_load_is_left_alone(load: tuple[float, float]) -> None:
    assert len(run(mixed(lambda _: load, 1800.0), 4, flips=True).flips) <= 2


def test_a_step_leads_to_the_new_ratio_without_a_step_back() -> None:
    outcome = run(mixed(lambda at: (3.6, 1.4) if at < 900 else (1.4, 3.6), 2700.0), 5, flips=True)
    assert {flip.role for flip in outcome.flips if flip.at > 900} == {Role.DECODE}
    assert outcome.samples[-1].prefill in {2, 3}


@pytest.mark.parametrize("period_s", [100.0, 250.0])  # the horizon is 300 s
def test_a_sine_that_is_faster_than_a_move_can_follow_moves_nothing(period_s: float) -> None:
    def load(at: float) -> tuple[float, float]:
        turn = math.sin(2 * math.pi * at / period_s)
        return 2.4 + turn, 2.2 - turn

    assert run(mixed(load, 1800.0), 4, flips=True).flips == ()


def test_bursts_of_seconds_move_nothing() -> None:
    """Ten seconds of 12.8 times the mean every five minutes, as in Azure's code trace."""
    quiet = 1.1 / (1 + 11.8 * 10 / 300)
    trace = mixed(lambda at: (quiet * (12.8 if 100 <= at % 300 < 110 else 1.0), 1.0), 1800.0)
    assert run(trace, 4, flips=True).flips == ()


@pytest.mark.slow
def test_flips_serve_a_swing_that_no_fixed_ratio_can_serve() -> None:
    swing = Swing(8.5, 4.0, 1.0)
    trace = arrivals(swing)
    fixed = max(good(run(trace, p)) for p in (3, 4, 5))
    began = best(swing, 0.0)
    assert good(run(trace, began, plan=oracle(swing))) > 1.3 * fixed
    moved = run(trace, began, flips=True)
    assert good(moved) > 1.15 * fixed
    towards = [flip.role for flip in moved.flips]
    assert sum(a is not b for a, b in pairwise(towards)) == 1, "it turns once, with the swing"
