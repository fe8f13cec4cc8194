"""What the router learns from must not lead it astray: engines started anew, that change their speed, a router that stood still."""

from __future__ import annotations

import re
from statistics import median

import msgspec
import pytest

from disagg.cluster.detector import Answered, EngineDetector
from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Pool, Role
from disagg.policy import forecast as module
from disagg.policy.books import Books
from disagg.policy.cost import ENOUGH, FEW_MOST, Fit, Line, at
from disagg.policy.forecast import OWN, TRY_EACH, Forecast, Outlook
from disagg.policy.reports import Contradictions, Reports, possible
from disagg.policy.route import InFlight, choose
from disagg.router.admin import forecast_json
from disagg.status import _doubts
from tests.test_forecast import CPU, GPU, Engine, World

TOLERANCE = 1.5


class Fleet(World):
    """Prefill engines of one pool, chosen as the router chooses them; the slot after them writes."""

    def __init__(self, *engines: Engine, seed: int = 0) -> None:
        super().__init__(*engines, seed=seed)
        views = [_view(slot, Role.PREFILL) for slot in range(len(engines))]
        self.pool = Pool(tuple(views), (_view(len(engines), Role.DECODE),))
        self.in_flight = InFlight()
        self.in_flight.grow(len(engines) + 2)
        self.reasons: list[str] = []

    def come(self, rate: float, seconds: float) -> list[int]:
        """Requests at random times; returns which engine each of them was sent to."""
        before, end = len(self.prompts), self.now + seconds

        def one() -> None:
            if self.now < end:
                new, counts = self._size(100, 4000), [0] * (len(self.engines) + 2)
                outlook = Outlook(self.forecast, tokens=new, cached={}, batches=counts, kv=counts, now=self.now)
                choice = choose(self.pool, self.in_flight, outlook=outlook)
                assert choice.prefill is not None
                self.reasons.append(choice.reason)
                self.in_flight.start(choice.prefill.slot)
                self.in_flight.end(choice.prefill.slot)
                self.send(choice.prefill.slot, new)
                self.after(self.chance.expovariate(rate), one)

        one()
        self.run(seconds)
        return [prompt.reading.slot for prompt in self.prompts[before:]]


def _view(slot: int, role: Role) -> EngineView:
    address = EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1000 + slot)
    return EngineView(address, slot, EngineState.READY, EngineFacts(model="m"))


# --- an engine that is slower, or faster, from one moment on


def recovery_s(rate: float, before: float, after: float, seed: int, *, line: Line = GPU) -> float:
    """Seconds from a change of speed, in the middle of a pause, until all that is foretold of its passes is right."""
    world = World(Engine(line), seed=seed)
    world.engines[0].slow = before
    running = True

    def one() -> None:
        if running:
            world.send(0, world._size(100, 4000))
            world.after(1 / rate, one)

    one()
    world.run(60.5 / rate)
    world.engines[0].slow, changed_at, wrong_s = after, world.now, 0.0
    while world.now < changed_at + 40.0:
        world.run(0.25)
        real = {n: at(line, (float(n), float(n * n))) * after for n in (200, 1000, 3000)}
        if any(not 1 / TOLERANCE < world.forecast.pass_s(0, n) / seconds < TOLERANCE for n, seconds in real.items()):
            wrong_s = world.now - changed_at
    running = False
    return wrong_s


SMALL: Line = (0.006, 1.8e-5, 3e-10)
SLOWER, FASTER = (1.0, 5.0), (5.0, 1.0)


@pytest.mark.parametrize(
    ("rate", "line", "before", "after"),
    [(rate, line, *way) for rate, line in ((0.2, GPU), (1.0, GPU), (5.0, SMALL)) for way in (SLOWER, FASTER)] + [(5.0, GPU, *SLOWER)],
)
def test_an_engine_of_another_speed_is_foretold_within_ten_seconds(rate: float, line: Line, before: float, after: float) -> None:
    """At five a second the small model has work for four fifths of its time when it is slow. The other has more than it can do, and would
    never catch up: that it became faster would not be seen."""
    assert max(recovery_s(rate, before, after, seed, line=line) for seed in range(2)) <= 10.0


def test_two_that_are_off_are_not_enough_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them an engine with little to do would be foretold wrongly for half a minute."""
    monkeypatch.setattr("disagg.policy.cost.FEW_MOST", 1.0)
    assert recovery_s(0.2, 1.0, 5.0, 0) > 10.0
    assert recovery_s(1.0, 1.0, 5.0, 0) <= 10.0


@pytest.mark.parametrize("apart_s", [0.3, 30.0])
def test_what_goes_wrong_twice_but_not_alike_changes_nothing(apart_s: float) -> None:
    """Neighbours go wrong together, two that do not agree say nothing, and what lies off absurdly was no pass."""
    for times in ((5.0, 5.0) if apart_s < 1.0 else (2.5, 9.0), (10 * FEW_MOST, 10 * FEW_MOST)):
        fit = Fit(2)
        for number in range(50):
            new = 100.0 + 50.0 * number
            fit.seen((new, new**2), at(GPU, (new, new**2)), now=float(number))
            fit.refit(now=float(number))
        for number, slow in enumerate(times):
            assert fit.seen((1000.0, 1e6), slow * at(GPU, (1000.0, 1e6)), now=100.0 + apart_s * number) == 1.0
        assert fit.trust.changed == 1.0


def test_what_was_late_before_the_engine_changed_delays_nobody_after() -> None:
    world = World(Engine(GPU))
    world.traffic(0, 0.7, 60.0)
    world.engines[0].slow = 5.0
    world.traffic(0, 0.7, 10.0)
    world.run(200.0)
    world.engines[0].slow = 1.0
    world.traffic(0, 0.7, 20.0)
    assert world.forecast.late_s(0) < 0.3
    assert world.forecast.busy_s(0, 1000) == pytest.approx(at(GPU, (1000.0, 1e6)), rel=0.3)


def test_what_keeps_an_engine_busy_changes_with_what_it_takes() -> None:
    """That is learnt from queues: with little to do there would be none for a long time."""
    world = World(Engine(GPU))
    world.traffic(0, 0.8, 60.0)
    world.run(30.0)
    world.engines[0].slow = 5.0
    for _ in range(6):
        world.send(0, 1000)
        world.run(5.0)
    assert world.forecast.busy_s(0, 1000) == pytest.approx(5 * at(GPU, (1000.0, 1e6)), rel=0.2)


def test_that_it_changed_is_known_with_the_time_and_forgotten_when_it_changes_back() -> None:
    world = World(Engine(GPU))
    world.traffic(0, 0.5, 60.0)
    world.engines[0].slow = 5.0
    world.traffic(0, 0.1, 30.0)
    trust = world.forecast.known(0, now=world.now).reads_trust
    assert trust.changed == pytest.approx(5.0, rel=0.2)
    assert 0.0 < world.now - trust.changed_at < 30.0
    world.engines[0].slow = 1.0
    world.traffic(0, 0.5, 30.0)
    assert world.forecast.known(0, now=world.now).reads_trust.changed == pytest.approx(1.0, rel=0.2)


# --- a slow engine that is avoided


@pytest.mark.parametrize(("rate", "seed"), [(1.0, 0), (1.0, 1), (5.0, 2)])
def test_an_engine_that_is_well_again_gets_its_share_again(rate: float, seed: int) -> None:
    """Its peers have time for all there is to do, so that nothing would send anybody there."""
    fleet = Fleet(Engine(GPU), Engine(GPU), Engine(GPU), seed=seed)
    fleet.come(rate, 100.0)
    fleet.engines[0].slow = 5.0
    fleet.come(rate, 60.0)
    assert fleet.forecast.pass_s(0, 1000) > 3 * fleet.forecast.pass_s(1, 1000)
    fleet.engines[0].slow = 1.0
    fleet.come(rate, TRY_EACH / rate + 15.0)
    sent = fleet.come(rate, 60.0)
    assert sent.count(0) > 0.6 * len(sent) / 3


@pytest.mark.parametrize(("rate", "slow"), [(0.2, 5.0), (1.0, 1.3), (1.0, 5.0), (1.0, 50.0), (5.0, 5.0)])
def test_one_that_stays_slow_costs_few_requests_and_little_time(rate: float, slow: float) -> None:
    fleet = Fleet(Engine(GPU), Engine(GPU), Engine(GPU))
    fleet.come(rate, 60.0 / min(rate, 1.0))
    fleet.engines[0].slow = slow
    fleet.come(rate, 60.0 / min(rate, 1.0))
    before, began = len(fleet.prompts), fleet.now
    fleet.come(rate, 300.0 / min(rate, 1.0))
    prompts = [p for p in fleet.prompts[before:] if p.took_s is not None]
    tried = [p for p in prompts if p.reading.slot == 0 and p.foretold_s > 1.05 * fleet.forecast.pass_s(1, p.reading.new) + 0.01]
    assert len(tried) <= len(prompts) / TRY_EACH + 1
    if slow == 5.0:
        assert tried, "or nobody would learn that it is well again"
        assert any("is tried again" in reason for reason in fleet.reasons)
    more_s = sum(p.took_s - fleet.forecast.pass_s(1, p.reading.new) for p in tried if p.took_s is not None)
    assert more_s < 0.06 * (fleet.now - began)


def test_without_tries_it_would_stay_away_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRY_SHARE", 0.0)
    with pytest.raises(AssertionError):
        test_an_engine_that_is_well_again_gets_its_share_again(1.0, 0)


def test_one_request_at_a_time_tries_it() -> None:
    fleet = Fleet(Engine(GPU), Engine(GPU))
    fleet.come(2.0, 60.0)
    fleet.engines[0].slow = 5.0
    fleet.come(2.0, 60.0)
    fleet.engines[0].slow = 0.0  # it hangs now
    sent = fleet.come(5.0, 60.0)
    assert sent.count(0) <= 1


class Steps:
    """Engines in slots 1 and 2 of which steps were seen for 50 s, those of the second five times as slow; then slot 0 gets prompts."""

    def __init__(self, role: Role = Role.DECODE) -> None:
        self.forecast, line = Forecast(), (0.02, 1e-4, 1e-7)
        self.forecast.grow(3)
        self.in_flight = InFlight()
        self.in_flight.grow(3)
        self.role = role
        for number in range(100):
            for slot, slow in ((1, 1.0), (2, 5.0)):
                self.forecast.stepped(slot, slow * at(line, (1.0, 0.0)), now=0.5 * number)
            self.forecast.tick(0.5 * number)
        self.prompts(60.0)

    def prompts(self, now: float) -> None:
        for number in range(TRY_EACH):
            self.forecast.left(self.forecast.sent(0, 100, now=now + 0.01 * number), now=now + 0.01 * number)

    def chosen(self, now: float) -> int:
        self.forecast.tick(now)
        two = (_view(1, self.role), _view(2, self.role))
        pool = Pool(unified=two) if self.role is Role.UNIFIED else Pool((_view(0, Role.PREFILL),), two)
        outlook = Outlook(self.forecast, tokens=100, cached={}, batches=self.in_flight.now, kv=(0, 0, 0), now=now)
        return choose(pool, self.in_flight, outlook=outlook).decode.slot


@pytest.mark.parametrize("role", [Role.DECODE, Role.UNIFIED])
def test_an_engine_whose_steps_were_slow_is_tried_again_by_one_request_at_a_time(role: Role) -> None:
    steps = Steps(role)
    assert steps.chosen(60.5) == 1
    assert steps.chosen(1000.0) == 2
    steps.in_flight.start(2)
    assert steps.chosen(1000.0) == 1, "its first token has not come yet"
    steps.in_flight.end(2)
    steps.forecast.tried(2, now=1000.0)
    steps.prompts(1001.0)
    assert steps.chosen(1002.0) == 1, "it was tried, though nothing was seen of it"
    assert steps.chosen(1500.0) == 2


def test_one_that_was_started_anew_is_not_tried_at_any_price() -> None:
    steps = Steps()
    steps.forecast.forget(2)
    assert steps.chosen(1000.0) == 1, "it has just come"
    steps.prompts(1000.0)
    steps.forecast.tick(1001.0)
    assert steps.forecast.try_s(2, 1, writes=True, now=1001.0) < 60.0


def test_one_that_is_as_fast_as_its_pool_is_not_slow_for_being_slower_than_strangers() -> None:
    """Of another model, or of hardware that is gone."""
    steps = Steps()
    for number in range(100):
        steps.forecast.stepped(0, 0.001, now=100.0 + 0.5 * number)
        steps.forecast.tick(100.0 + 0.5 * number)
    steps.prompts(200.0)
    steps.forecast.tick(1000.0)
    assert steps.forecast.due_steps == {1, 2}
    assert steps.forecast.try_s(2, 1, writes=True, now=1000.0) > 0.0
    assert steps.forecast.try_s(1, 2, writes=True, now=1000.0) == 0.0


def test_an_engine_that_is_due_stands_in_nobodys_light() -> None:
    """A slow prefill engine makes its pair no worse than it is, beside a unified engine that is slower than the pair."""
    forecast = Forecast()
    forecast.grow(4)
    for number in range(100):
        for slot, slow in ((0, 1.0), (1, 20.0), (3, 3.0)):
            now = 30.0 * number
            forecast.read(forecast.sent(slot, 500 + 20 * number, now=now), now=now + slow * at(GPU, (500.0 + 20 * number, 1e6)))
            forecast.tick(now + 20.0)
    for number in range(TRY_EACH):
        forecast.left(forecast.sent(2, 10, now=3000.0 + number), now=3000.0 + number)
    forecast.tick(4000.0)
    assert forecast.due_reads >= {1}
    in_flight = InFlight()
    in_flight.grow(4)
    pool = Pool((_view(0, Role.PREFILL), _view(1, Role.PREFILL)), (_view(2, Role.DECODE),), (_view(3, Role.UNIFIED),))
    outlook = Outlook(forecast, tokens=1000, cached={}, batches=(0, 0, 0, 0), kv=(0, 0, 0, 0), now=4000.0)
    choice = choose(pool, in_flight, outlook=outlook)
    assert choice.prefill is not None
    assert choice.prefill.slot == 1, "it is tried"
    assert choice.reason.endswith("prefill-1 was slow and is tried again")
    forecast.tried(1, now=4000.0)
    choice = choose(pool, in_flight, outlook=outlook)
    assert choice.prefill is not None
    assert choice.prefill.slot == 0


# --- an engine that was started anew


@pytest.mark.parametrize("peers", [0, 2])
def test_an_engine_that_was_started_anew_is_taken_to_be_what_it_was(peers: int) -> None:
    """Its peers have another GPU, or there are none: neither they nor another machine say what it takes."""
    world = World(Engine(CPU), *(Engine(GPU) for _ in range(peers)))
    for slot in range(peers + 1):
        world.traffic(slot, 0.3, 60.0)
    world.run(5.0)
    world.forecast.forget(0)
    world.run(1.0)
    assert world.pass_error(0) < TOLERANCE - 1
    trust = world.forecast.known(0, now=world.now).reads_trust
    assert trust.own
    assert trust.samples < ENOUGH
    assert OWN in trust.doubt
    world.traffic(0, 0.3, 60.0)
    assert not world.forecast.doubt(0)


def test_one_that_has_another_speed_after_its_start_is_foretold_after_some_prompts() -> None:
    world = World(Engine(CPU))
    world.traffic(0, 0.3, 60.0)
    world.run(5.0)
    world.forecast.forget(0)
    world.engines[0].slow = 0.2
    for _ in range(3):
        world.send(0, world._size(100, 4000))
        world.run(3.0)
    assert world.pass_error(0) < TOLERANCE - 1


# --- a router that stood still


def stalled(seconds: float, *, known: bool, stall_s: float = 1.0) -> World:
    """Prompts wait in an engine while the router, and nobody else, stands still. `known`: its beat comes before what has arrived."""
    world = World(Engine(GPU), seed=2)
    world.forecast = forecast = Forecast(stall_s=stall_s)
    forecast.grow(3)
    world.traffic(0, 0.5, 60.0)
    world.run(3.0)
    waiting = [world.send(0, 1000, decode=1) for _ in range(20)]
    then = world.now + seconds
    if known:
        forecast.tick(then)
    for prompt in waiting:
        forecast.read(prompt.reading, 1, now=then)
        prompt.gone = True
    forecast.stepped(1, seconds, now=then)
    forecast.tick(then + 0.01)
    forecast.stepped(1, seconds, now=then + 0.02)
    forecast.check()
    world.run(seconds)
    return world


@pytest.mark.parametrize("known", [True, False], ids=["the beat first", "the sockets first"])
@pytest.mark.parametrize("seconds", [3.0, 180.0])
def test_a_router_that_stood_still_believes_nothing_of_that_time(seconds: float, known: bool) -> None:
    world = stalled(seconds, known=known)
    assert world.pass_error(0) < 0.1
    assert world.forecast.late_s(0) < 0.1
    assert world.forecast.wait_s(0, now=world.now) == 0.0
    assert world.forecast.known(1, now=world.now).steps_trust.samples == 0
    read = world.traffic(0, 0.5, 10.0)
    assert median(prompt.error for prompt in read) < TOLERANCE - 1


def test_one_that_does_not_notice_takes_all_engines_to_be_late() -> None:
    assert stalled(180.0, known=False, stall_s=float("inf")).forecast.late_s(0) > 10.0


# --- load reports

GOOD = EngineLoad(running=3, waiting=1, kv_used_tokens=500, kv_total_tokens=1000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_total_tokens": -1},
        {"kv_total_tokens": 1 << 62},
        {"kv_used_tokens": -5},
        {"kv_used_tokens": 1 << 62},
        {"running": -1},
        {"requests": 1 << 60},
        {"kv_quarantined_tokens": 900},
        {"kv_quarantined_tokens": -900},
        {"kv_total_tokens": 0},
        {"kv_total_tokens": 1},
    ],
    ids=str,
)
def test_a_report_that_cannot_be_true_takes_no_room_and_is_told(wrong: dict[str, int]) -> None:
    reports, books = Reports(), Books()
    books.grow(1)
    for _ in range(10):
        books.ledger.note_report(0, reports.take(GOOD))
    assert not reports.doubt
    load = reports.take(msgspec.structs.replace(GOOD, **wrong))
    assert reports.doubt.startswith("its load reports are not believed: ")
    books.ledger.note_report(0, load)
    engine = msgspec.structs.replace(_view(0, Role.DECODE), load=load)
    assert possible(load) == (load, ""), "what is passed on can be"
    assert load.kv_total_tokens in {0, 1000}
    assert books.ledger.room(engine, 400, 0)
    assert books.ledger.drift(0) <= 500
    books.holds(engine, now=0.0)
    assert books.write_s(engine) > 0.0
    reports.take(GOOD)
    reports.take(GOOD)
    assert not reports.doubt, "it is well again"


def test_without_a_look_at_them_one_report_would_close_an_engine_for_long() -> None:
    books = Books()
    books.grow(1)
    books.ledger.note_report(0, msgspec.structs.replace(GOOD, kv_used_tokens=1 << 62))
    for _ in range(20):
        books.ledger.note_report(0, GOOD)
    assert not books.ledger.room(msgspec.structs.replace(_view(0, Role.DECODE), load=GOOD), 100, 0)


def test_a_capacity_is_believed_when_it_was_said_twice_and_one_that_changes_always_never() -> None:
    reports = Reports()
    reports.take(GOOD)
    for total in range(2000, 2100):
        assert reports.take(msgspec.structs.replace(GOOD, kv_total_tokens=total)).kv_total_tokens == 1000
        assert reports.doubt == "its load reports are not believed: its KV capacity of 1000 tokens changes"
    assert reports.take(msgspec.structs.replace(GOOD, kv_total_tokens=2099)).kv_total_tokens == 2099
    assert not reports.doubt


def test_a_detector_shows_what_is_believed_and_a_new_process_begins_anew() -> None:
    detector = EngineDetector(EngineAddress(EngineId("d"), Role.DECODE, "h", 1), slot=0, probe_interval_s=1.0, now=0.0)
    facts = EngineFacts(model="m")
    detector.handle(Answered(facts, GOOD), now=1.0)
    assert (detector.view.load, detector.view.distrust) == (GOOD, "")
    detector.handle(Answered(facts, msgspec.structs.replace(GOOD, kv_used_tokens=-3)), now=2.0)
    assert detector.view.load.kv_used_tokens == 0
    assert "counts below 0" in detector.view.distrust
    detector.handle(Answered(facts, GOOD), now=3.0)
    assert (detector.view.load, detector.view.distrust) == (GOOD, "")
    detector.check()


def test_a_report_that_contradicts_what_was_sent_there_is_told_within_ten_seconds() -> None:
    looks, idle = Contradictions(), EngineLoad(kv_total_tokens=1000)
    for tenth in range(100):
        looks.look(0, idle, 2, now=tenth / 10)
        looks.look(1, GOOD, 2, now=tenth / 10)
        looks.look(2, idle, tenth % 3, now=tenth / 10)
    assert "contradict what was sent there" in looks.doubt(0, now=10.0)
    assert not any(looks.doubt(slot, now=10.0) for slot in (1, 2)), "short answers come and go between reports"
    looks.look(0, GOOD, 2, now=11.0)
    assert not looks.doubt(0, now=20.0)


# --- what a person sees


def test_what_is_distrusted_is_told_and_nothing_where_all_is_well() -> None:
    world = World(Engine(GPU))
    world.traffic(0, 0.5, 60.0)
    books, view = Books(), _view(0, Role.PREFILL)
    books.forecast = world.forecast

    def told() -> list[str]:
        return _doubts(forecast_json(books, view, ClusterView.of([view]), world.now))

    assert told() == []
    world.engines[0].slow = 5.1
    world.traffic(0, 0.2, 12.0)
    assert re.fullmatch(r"how long it reads: [45]\.\d times slower than it was, since \d+ s", told()[0])
    world.engines[0].slow = 1.0
    world.traffic(0, 0.5, 60.0)
    assert told() == []
    world.run(5.0)
    world.forecast.forget(0)
    assert told() == [], "nobody has asked it since"
    world.send(0, 1000)
    world.run(2.0)
    assert told() == [f"how long it reads is not trusted: 1 samples so far; taken from {OWN}"]
