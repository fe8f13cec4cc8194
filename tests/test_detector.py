"""The detector of one engine: what four sides say in, its state, probes and fail-overs out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from disagg.cluster.detector import (
    HANG_S,
    HASTY_PATIENCE_S,
    HASTY_PROBE_S,
    HISTORY_LIMIT,
    REASON_LIMIT,
    SIGN_OF_LIFE_S,
    Answered,
    Command,
    EngineDetector,
    Event,
    FailOver,
    HostJudged,
    Ordered,
    Probe,
    ProbeVoided,
    Publish,
    Refused,
    Reported,
    Stalled,
    Tick,
    TimedOut,
    Troubled,
)
from disagg.model import EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, HostId, HostState, Role
from disagg.router.owner import FATE_S
from disagg.wire.messages import EngineReport

S = EngineState
H = HostState
FACTS = EngineFacts(model="demo", context_tokens=8192)
WELL = Answered(FACTS, EngineLoad())
LATE = TimedOut("its probe failed: TimeoutError")
INTERVAL_S = 1.0
WAYS: Mapping[S, tuple[Event, ...]] = {
    S.STARTING: (),
    S.READY: (WELL,),
    S.SUSPECT: (WELL, LATE),
    S.DEAD: (WELL, Refused(), Refused()),
    S.QUARANTINED: (Answered(FACTS, EngineLoad(), "decode"),),
}


def address_of(role: Role) -> EngineAddress:
    return EngineAddress(EngineId(f"{role}-0"), role, "10.0.0.1", 30000, 8998 if role is Role.PREFILL else 0)


def detector(role: Role = Role.PREFILL, *events: Event) -> EngineDetector:
    made = EngineDetector(address_of(role), slot=3, probe_interval_s=INTERVAL_S, now=10.0)
    for event in events:
        made.handle(event, now=10.0)
        made.check()
    return made


def in_state(state: S) -> EngineDetector:
    made = detector(Role.PREFILL, *WAYS[state])
    assert made.view.state is state
    return made


def why(made: EngineDetector) -> tuple[S, str]:
    return made.view.state, made.view.reason


# --- an engine without an agent


def test_it_starts_with_a_probe_at_once_and_one_at_a_time() -> None:
    made = detector()
    assert (*why(made), made.view.slot) == (S.STARTING, "it has not answered yet", 3)
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
        (S.READY, WELL, S.READY),
        (S.READY, Refused(), S.SUSPECT),
        (S.READY, LATE, S.SUSPECT),
        (S.READY, Troubled(), S.READY),
        (S.SUSPECT, WELL, S.READY),
        (S.SUSPECT, LATE, S.SUSPECT),
        (S.SUSPECT, ProbeVoided(), S.SUSPECT),
        (S.DEAD, WELL, S.READY),
        (S.DEAD, Refused(), S.DEAD),
        (S.DEAD, LATE, S.DEAD),
        (S.QUARANTINED, WELL, S.QUARANTINED),
        (S.QUARANTINED, Answered(FACTS, EngineLoad(), "prefill"), S.READY),
        (S.QUARANTINED, LATE, S.QUARANTINED),
    ],
)
def test_moves(before: S, event: Event, after: S) -> None:
    made = in_state(before)
    made.handle(event, now=11.0)
    made.check()
    assert made.view.state is after


def test_two_refusals_in_a_row_are_death_and_it_stays_dead_until_it_answers() -> None:
    made = detector(Role.DECODE, WELL)
    states, lost = [], 0
    for event in (Refused(), Refused(), Refused(), Refused(), WELL, Refused()):
        lost += sum(isinstance(c, FailOver) for c in made.handle(event, now=11.0))
        states.append(made.view.state)
    assert states == [S.SUSPECT, S.DEAD, S.DEAD, S.DEAD, S.READY, S.SUSPECT]
    assert lost == 1


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
    assert why(made) == (S.SUSPECT, "it does not say which model it serves")


@pytest.mark.parametrize(
    ("event", "wait_s"), [(WELL, INTERVAL_S), (Refused(), INTERVAL_S / 4), (LATE, INTERVAL_S / 4), (ProbeVoided(), 0.0)]
)
def test_trouble_makes_probes_four_times_as_frequent(event: Event, wait_s: float) -> None:
    made = detector()
    made.handle(Tick(), now=10.0)
    made.handle(event, now=20.0)
    assert made.next_deadline() == 20.0 + wait_s
    assert made.handle(Tick(), now=20.0 + wait_s) == [Probe()]


def test_who_refused_once_is_asked_again_soon_however_seldom_it_is_looked_at() -> None:
    made = EngineDetector(address_of(Role.DECODE), slot=0, probe_interval_s=30.0, now=10.0)
    made.handle(WELL, now=10.0)
    made.handle(Troubled(), now=20.0)
    assert made.handle(Tick(), now=20.0) == [Probe()]
    made.handle(Refused(), now=20.0)
    again_at = made.next_deadline()
    assert again_at is not None
    assert again_at - 20.0 < FATE_S / 1.5, "the verdict is there before the request is judged"
    assert made.handle(Tick(), now=again_at) == [Probe()]
    made.handle(Refused(), now=again_at)
    assert made.view.state is S.DEAD
    assert made.next_deadline() == again_at + 30.0 / 4, "once it is known there is no hurry"


def test_trouble_brings_the_next_probe_forward_but_never_makes_two() -> None:
    made = detector(Role.DECODE, WELL)
    made.handle(Troubled(), now=10.1)
    assert made.handle(Tick(), now=10.1) == [Probe()]
    made.handle(Troubled(), now=10.2)
    assert made.next_deadline() is None
    assert made.handle(Tick(), now=10.2) == []


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
    for at, event in ((11.0, WELL), (12.0, WELL), (13.0, LATE), (14.0, Refused()), (15.0, Refused())):
        made.handle(event, now=at)
    assert list(made.history) == [
        (11.0, "Answered: starting -> ready: it answers"),
        (13.0, "TimedOut: ready -> suspect: its probe failed: TimeoutError"),
        (15.0, "Refused: suspect -> dead: it refused 2 connections in a row"),
    ]
    for _ in range(HISTORY_LIMIT):
        made.handle(WELL, now=15.0)
        made.handle(LATE, now=15.0)
    assert len(made.history) == HISTORY_LIMIT


def test_repr() -> None:
    assert repr(detector(Role.PREFILL, WELL, Refused())) == "<EngineDetector prefill-0 suspect refusals=1>"


def test_check_notices_a_ready_engine_without_a_model() -> None:
    made = detector(Role.PREFILL, WELL)
    made._view = msgspec.structs.replace(made.view, facts=EngineFacts())
    with pytest.raises(AssertionError):
        made.check()


# --- an engine with an agent


class Kept:
    """A decode engine of a host, its agent's reports, and a clock."""

    def __init__(self, role: Role = Role.DECODE) -> None:
        self.made = EngineDetector(address_of(role), slot=0, probe_interval_s=INTERVAL_S, now=100.0, host=HostId("box"))
        self.now = 100.0
        self.said = EngineReport(
            EngineId(f"{role}-0"), role, S.READY, "it answers its agent", "10.0.0.1", 30000, pid=7, start_ticks=70, facts=FACTS
        )
        self.bytes_at = self.long_s = 0.0
        self.lost: list[str] = []
        self.asked: Probe | None = None
        self.ends_at: float | None = None

    def tell(self, event: Event, *, after: float = 0.0) -> list[Command]:
        self.now += after
        commands = self.made.handle(event, now=self.now)
        self.made.check()
        self.lost += [c.cause for c in commands if isinstance(c, FailOver)]
        if isinstance(event, Answered | Refused | TimedOut | ProbeVoided):
            self.asked = self.ends_at = None
        self.asked = next((c for c in commands if isinstance(c, Probe)), self.asked)
        return commands

    def report(self, *, after: float = 0.0, **changes: Any) -> list[Command]:
        self.said = msgspec.structs.replace(self.said, **changes)
        return self.tell(Reported(self.said), after=after)

    def host(self, state: HostState, reason: str = "no heartbeat for 1 s", *, gone: bool = False) -> list[Command]:
        return self.tell(HostJudged(state, reason, self.bytes_at, gone))

    def tick(self, *, after: float = 0.0) -> list[Command]:
        return self.tell(Tick(self.bytes_at, self.long_s), after=after)

    def run(self, seconds: float, each: Callable[[], object] = lambda: None, *, answer: Event | None = None, takes: float = 0.01) -> None:
        """Time passes as in the router: a tick when one is due; `each` eight times a second; probes end as `answer` after `takes` s."""
        end, beat_at = self.now + seconds, self.now + 0.125
        while True:
            if self.asked and self.ends_at is None:
                self.ends_at = self.now + (takes if answer else (self.asked.patience_s or 2.0))
            due = self.made.next_deadline()
            self.now = max(self.now, min(x for x in (due, beat_at, self.ends_at, end) if x is not None))
            if self.now >= end:
                break
            if self.ends_at is not None and self.now >= self.ends_at:
                self.tell(answer or LATE)
            elif due is not None and self.now >= due:
                self.tick()
            elif self.now >= beat_at:
                beat_at += 0.125
                each()

    def silence(self, each: Callable[[], object] = lambda: None, *, answer: Event | None = None) -> None:
        """The agent is silent, as the hosts' machine tells it; what the engine itself says is `answer`."""
        self.host(H.SUSPECT)
        self.run(1.0, each, answer=answer)
        self.host(H.SILENT, "no heartbeat for 2 s")

    @property
    def why(self) -> tuple[S, str]:
        return why(self.made)

    def state(self) -> S:
        return self.made.view.state

    def order(self) -> S | None:
        return self.made.order


@pytest.fixture
def kept() -> Kept:
    made = Kept()
    made.report()
    return made


def test_what_ran_on_a_process_is_forgotten_with_it(kept: Kept) -> None:
    kept.report(load=EngineLoad(running=1, kv_used_tokens=99))
    assert kept.made.view.load.running == 1
    kept.report(state=S.STARTING, reason="it starts", pid=8, start_ticks=80, facts=EngineFacts(), load=EngineLoad())
    assert kept.made.view.load == EngineLoad()


def test_a_part_of_an_engine_over_several_hosts_serves_nothing_and_is_well_all_the_same() -> None:
    made = Kept()
    made.report(facts=EngineFacts(part=1))
    assert made.state() is S.READY
    assert made.made.view.facts.part == 1


def test_its_agents_report_is_enough_and_nobody_probes(kept: Kept) -> None:
    assert kept.why == (S.READY, "it answers")
    view = kept.made.view
    assert (view.facts, view.host, view.address.pid) == (FACTS, "box", 7)
    assert kept.made.next_deadline() is None
    assert kept.tick(after=3600.0) == []


def test_before_the_first_report_it_starts(kept: Kept) -> None:
    assert why(Kept().made) == (S.STARTING, "it has not answered yet")


@pytest.mark.parametrize(
    ("state", "reason", "shown"),
    [
        (S.STARTING, "", "it is starting"),
        (S.STARTING, "loading", "loading"),
        (S.DEAD, "exit code -9", "exit code -9"),
        (S.HELD, "5 deaths in 10 min", "5 deaths in 10 min"),
        (S.QUARANTINED, "", "its agent says so"),
        (S.SUSPECT, "it does not answer", "it does not answer"),
        (S.DRAINING, "its host stops", "its host stops"),
        (S.SWITCHING, "to prefill", "to prefill"),
    ],
)
def test_what_its_agent_says_is_its_state(kept: Kept, state: S, reason: str, shown: str) -> None:
    kept.report(state=state, reason=reason)
    assert kept.why == (state, shown)
    assert kept.lost == ([shown] if state in {S.DEAD, S.HELD} else [])
    kept.report(state=S.READY)
    assert kept.state() is S.READY


def test_the_death_that_its_agent_saw_fails_over_at_once_and_once(kept: Kept) -> None:
    assert kept.report(state=S.DEAD, reason="exit code -9") == [FailOver("exit code -9"), Publish()]
    for after in range(20):
        kept.report(after=0.25, state=S.DEAD, reason=f"it starts again in {after} s")
    kept.report(state=S.HELD, reason="held")
    assert kept.lost == ["exit code -9"]


def test_the_place_is_the_same_object_as_long_as_it_is_the_same_place(kept: Kept) -> None:
    before = kept.made.view.address
    kept.report(counter=5, load=EngineLoad(running=1))
    assert kept.made.view.address is before
    kept.report(port=30001)
    assert kept.made.view.address.port == 30001


def test_a_long_reason_is_cut_before_it_is_kept(kept: Kept) -> None:
    kept.report(state=S.SUSPECT, reason="x" * 100_000)
    assert len(kept.made.view.reason) == REASON_LIMIT


# --- another process


def test_a_new_process_is_forgiven(kept: Kept) -> None:
    for _ in range(3):
        kept.tell(Refused())
    assert kept.state() is S.DEAD
    kept.report(pid=8, start_ticks=80, state=S.STARTING, facts=EngineFacts())
    assert kept.state() is S.STARTING
    assert kept.made.view.facts == EngineFacts()
    kept.report(state=S.READY, facts=FACTS)
    assert kept.state() is S.READY
    assert kept.lost == ["it refused 2 connections in a row"]


def test_decode_engines_are_told_another_place_after_each_role_switch(kept: Kept) -> None:
    """They keep under its name what they know of a prefill engine, and that is not true any more when it comes back to its role."""
    kept.report()
    assert kept.made.view.address.bootstrap_host == "10.0.0.1"
    kept.report(switches=2)
    assert kept.made.view.address.bootstrap_host == "2@10.0.0.1"
    assert kept.made.view.address.url == "http://10.0.0.1:30000"
    kept.report(host="::1")
    assert kept.made.view.address.bootstrap_host == "2@[::1]"
    kept.report(switches=0, pid=8, start_ticks=80)
    assert kept.made.view.address.bootstrap_host == "[::1]"


def test_what_ran_on_a_process_that_was_replaced_unseen_is_lost(kept: Kept) -> None:
    kept.report(pid=8, start_ticks=80, state=S.READY)
    assert kept.state() is S.READY
    assert kept.lost == ["its process 7 was replaced by 8"]


def test_the_same_pid_with_another_start_is_another_process(kept: Kept) -> None:
    kept.report(start_ticks=71)
    assert kept.lost == ["its process 7 was replaced by 7"]


def test_a_death_that_was_seen_is_not_told_again_when_the_next_process_comes(kept: Kept) -> None:
    kept.report(state=S.DEAD, reason="exit code 1", pid=0, start_ticks=0)
    kept.report(state=S.STARTING, pid=8, start_ticks=80)
    kept.report(state=S.READY)
    assert kept.lost == ["exit code 1"]


def test_an_agent_that_does_not_know_the_pid_says_nothing_about_the_process(kept: Kept) -> None:
    """A new agent says hello before it has adopted its engine: what runs there goes on."""
    kept.report(state=S.STARTING, pid=0, start_ticks=0, facts=EngineFacts())
    assert kept.state() is S.STARTING
    kept.report(state=S.READY, pid=7, start_ticks=70, facts=FACTS)
    assert (kept.state(), kept.lost) == (S.READY, [])


def test_an_answer_of_the_process_before_is_not_believed(kept: Kept) -> None:
    kept.tell(Troubled())
    assert kept.tick() == [Probe()]
    kept.report(pid=8, start_ticks=80, state=S.STARTING, facts=EngineFacts())
    kept.tell(Answered(FACTS, EngineLoad(running=9), "prefill"))
    assert kept.state() is S.STARTING
    assert kept.made.view.facts == EngineFacts()


# --- its host is not heard


def test_no_new_work_while_the_host_is_suspect_but_what_runs_goes_on(kept: Kept) -> None:
    kept.host(H.SUSPECT)
    assert kept.why == (S.SUSPECT, "its host: no heartbeat for 1 s")
    kept.run(0.9)
    assert (kept.state(), kept.lost) == (S.SUSPECT, [])
    kept.host(H.ONLINE, "it answers")
    kept.run(2.0, answer=WELL)
    assert (kept.state(), kept.lost) == (S.READY, [])


def test_it_is_asked_itself_from_then_on(kept: Kept) -> None:
    kept.host(H.SUSPECT)
    assert kept.made.next_deadline() == kept.now
    assert kept.tick() == [Probe(HASTY_PATIENCE_S)]
    kept.tell(WELL, after=0.01)
    assert kept.made.next_deadline() == kept.now + HASTY_PROBE_S


def test_an_engine_that_answers_loses_nothing_however_long_its_agent_is_silent(kept: Kept) -> None:
    kept.silence(answer=WELL)
    kept.run(600.0, answer=WELL)
    assert kept.why == (S.SUSPECT, "its host: no heartbeat for 2 s")
    assert kept.lost == []


def test_an_engine_whose_bytes_flow_loses_nothing_although_it_answers_no_probe(kept: Kept) -> None:
    def flow() -> None:
        kept.bytes_at = kept.now

    flow()
    kept.silence(flow)
    kept.run(60.0, flow)
    assert (kept.state(), kept.lost) == (S.SUSPECT, [])
    kept.run(2.5)
    assert kept.state() is S.DEAD
    assert len(kept.lost) == 1


def test_an_engine_that_is_silent_too_is_dead_two_seconds_after_its_host_fell_silent(kept: Kept) -> None:
    kept.silence()
    fell_silent = kept.now - 2.0
    kept.tick()
    assert kept.why == (S.DEAD, "its host is not heard (no heartbeat for 2 s) and it gives no sign of life itself")
    assert kept.now - fell_silent == pytest.approx(2.0)
    kept.run(60.0)
    assert len(kept.lost) == 1


def test_a_late_answer_brings_it_back_but_not_into_service(kept: Kept) -> None:
    kept.silence()
    kept.tick()
    assert kept.state() is S.DEAD
    kept.run(1.0, answer=WELL)
    assert kept.state() is S.SUSPECT
    kept.host(H.ONLINE, "it answers")
    kept.run(1.0, answer=WELL)
    assert kept.state() is S.READY
    assert len(kept.lost) == 1


def test_it_dies_again_when_it_is_lost_again(kept: Kept) -> None:
    for times in (1, 2):
        kept.silence()
        kept.run(2.0)
        assert len(kept.lost) == times
        kept.host(H.ONLINE, "it answers")
        kept.run(1.0, answer=WELL)
        assert kept.state() is S.READY


@pytest.mark.parametrize("state", [H.SILENT, H.LEFT])
def test_nobody_is_dead_before_he_was_asked(kept: Kept, state: HostState) -> None:
    """An agent that is stopped for an update leaves at once, and its engines were not looked at for hours."""
    kept.now += 3600.0
    kept.host(state, "its agent stopped; its engines go on")
    assert (kept.state(), kept.lost) == (S.SUSPECT, [])
    kept.run(60.0, answer=WELL, takes=0.5)
    assert (kept.state(), kept.lost) == (S.SUSPECT, [])


def test_after_a_host_left_without_its_engines_a_silent_one_is_dead_when_it_was_asked_in_vain(kept: Kept) -> None:
    kept.host(H.LEFT, "its agent stopped; its engines go on")
    kept.run(HASTY_PATIENCE_S - 0.01)
    assert kept.lost == []
    kept = Kept()
    kept.report()
    kept.host(H.LEFT, "its agent stopped; its engines go on")
    kept.run(HASTY_PATIENCE_S + 0.01)
    assert len(kept.lost) == 1


def test_a_host_that_takes_its_engines_along_takes_them_at_once(kept: Kept) -> None:
    kept.host(H.LEFT, "its agent stopped and took its engines down", gone=True)
    assert kept.why == (S.DEAD, "its host: its agent stopped and took its engines down")
    assert len(kept.lost) == 1
    kept.host(H.ONLINE, "it joined")
    kept.report(pid=8, start_ticks=80)
    assert (kept.state(), len(kept.lost)) == (S.READY, 1)


def test_a_probe_with_more_patience_than_there_is_now_does_not_delay_the_verdict(kept: Kept) -> None:
    kept.tell(Troubled())
    assert kept.tick() == [Probe()], "with the patience of a usual one"
    kept.host(H.SUSPECT)
    assert kept.tick(after=1.0) == [], "one at a time"
    kept.host(H.SILENT, "no heartbeat for 2 s")
    assert kept.made.next_deadline() is not None
    kept.tick()
    assert kept.state() is S.DEAD


def test_two_refusals_are_death_while_the_agent_is_silent_too(kept: Kept) -> None:
    kept.host(H.SUSPECT)
    kept.run(0.5, answer=Refused())
    assert kept.why == (S.DEAD, "it refused 2 connections in a row")


def test_reports_still_count_while_we_are_not_heard(kept: Kept) -> None:
    """A cut in one direction: what its agent saw is true."""
    kept.host(H.SUSPECT, "its heartbeats arrive")
    kept.report(state=S.DEAD, reason="exit code 1")
    assert kept.lost == ["exit code 1"]


# --- hangs


def work(kept: Kept, counter: int = 5) -> Callable[[], object]:
    return lambda: kept.report(counter=counter, working=True)


def test_counters_that_stand_for_five_seconds_under_work_are_a_hang(kept: Kept) -> None:
    work(kept)()
    began = kept.now
    kept.run(HANG_S - 0.1, work(kept))
    assert (kept.state(), kept.lost) == (S.READY, [])
    kept.run(0.6, work(kept))
    assert kept.why == (S.SUSPECT, "it has work and its counters have not moved for 4.25 s")
    assert kept.made.view.still_s >= HANG_S
    assert len(kept.lost) == 1
    assert kept.made.history[-1][0] - began <= HANG_S + 0.25
    kept.run(60.0, work(kept))
    assert len(kept.lost) == 1
    kept.report(counter=6, working=True)
    assert (kept.state(), kept.made.view.still_s) == (S.READY, 0.0)


def test_a_long_prompt_gives_an_engine_time(kept: Kept) -> None:
    kept.long_s = 20.0
    work(kept)()
    kept.run(19.5, work(kept))
    assert (kept.state(), kept.lost) == (S.READY, [])
    kept.run(1.0, work(kept))
    assert kept.why == (S.SUSPECT, "it has work and its counters have not moved for 20 s")


def test_the_time_that_a_long_prompt_gave_ends_with_it(kept: Kept) -> None:
    kept.long_s = 50.0
    work(kept)()
    kept.run(10.0, work(kept))
    kept.long_s = 0.0  # its client has left
    kept.run(1.5, work(kept))
    assert (kept.state(), len(kept.lost)) == (S.SUSPECT, 1)
    kept.report(counter=6, working=True)
    kept.run(HANG_S - 0.1, work(kept, 6))
    assert kept.state() is S.READY
    kept.run(0.6, work(kept, 6))
    assert kept.why == (S.SUSPECT, "it has work and its counters have not moved for 4.25 s")


def test_an_engine_that_was_given_time_and_moved_has_no_more_than_others(kept: Kept) -> None:
    kept.long_s = 50.0
    work(kept)()
    kept.run(10.0, work(kept))
    kept.long_s = 0.0
    kept.report(counter=6, working=True)
    kept.run(HANG_S + 0.5, work(kept, 6))
    assert (kept.state(), len(kept.lost)) == (S.SUSPECT, 1)


def test_no_work_no_hang(kept: Kept) -> None:
    kept.run(60.0, lambda: kept.report(counter=5, working=False))
    assert (kept.state(), kept.lost) == (S.READY, [])


@pytest.mark.parametrize("state", [S.STARTING, S.SWITCHING])
def test_loading_and_graph_capture_take_as_long_as_they_take(kept: Kept, state: S) -> None:
    kept.run(60.0, lambda: kept.report(counter=5, working=True, state=state))
    assert kept.lost == []
    kept.run(HANG_S - 0.5, lambda: kept.report(counter=5, working=True, state=S.READY))
    assert (kept.state(), kept.lost) == (S.READY, []), "and what was then does not count afterwards"


def test_a_switch_that_the_router_ordered_is_exempt_as_well(kept: Kept) -> None:
    kept.tell(Ordered(S.SWITCHING, "flip"))
    kept.run(60.0, work(kept))
    assert kept.lost == []


def test_bytes_that_flow_are_progress(kept: Kept) -> None:
    def flow() -> None:
        kept.bytes_at = kept.now
        work(kept)()

    kept.run(60.0, flow)
    assert kept.lost == []
    kept.run(HANG_S + 0.5, work(kept))
    assert len(kept.lost) == 1


def test_nobody_hangs_because_nobody_looked(kept: Kept) -> None:
    """Its agent was killed in the middle of work (F53); the engine answers the router, and bytes flow or not: nothing is lost."""
    work(kept)()
    counter = 5

    def answer() -> Answered:
        nonlocal counter
        counter += 1
        return Answered(FACTS, EngineLoad(), "", counter, working=True)

    kept.now += 0.9
    kept.host(H.SUSPECT)
    for _ in range(100):
        kept.run(0.25, answer=answer(), takes=0.2)
    assert kept.lost == []


def test_the_router_sees_a_hang_itself_while_the_agent_is_silent(kept: Kept) -> None:
    stuck = Answered(FACTS, EngineLoad(), "", 5, working=True)
    kept.silence(answer=stuck)
    kept.run(HANG_S, answer=stuck)
    assert kept.lost == ["it has work and its counters have not moved for 4.25 s"]


def test_an_engine_without_an_agent_that_stops_answering_under_work_hangs_as_well() -> None:
    made = Kept()
    made.made = detector(Role.DECODE)
    made.now = 10.0
    made.run(1.5, answer=Answered(FACTS, EngineLoad(), "", 5, working=True))
    assert made.state() is S.READY
    made.run(HANG_S + 2.0)
    assert made.lost == ["it has work and its counters have not moved for 4.25 s"]


def test_its_agents_old_count_beside_our_own_is_no_progress(kept: Kept) -> None:
    """The agent repeats the last count it saw; the router, that had trouble, reads another: both stand still."""
    ours = Answered(FACTS, EngineLoad(), "", 9, working=True)

    def each() -> None:
        kept.report(counter=5, working=True)
        kept.tell(Troubled())

    kept.run(HANG_S + 1.0, each, answer=ours)
    assert len(kept.lost) == 1


# --- the router itself stood still


def test_a_stall_of_the_router_is_nobodys_fault(kept: Kept) -> None:
    work(kept)()
    kept.run(3.0, work(kept))
    kept.tell(Stalled(3.0), after=3.0)
    kept.run(HANG_S - 3.5, work(kept))
    assert kept.lost == []
    kept.run(1.0, work(kept))
    assert len(kept.lost) == 1


def test_a_stall_does_not_use_up_the_signs_of_life(kept: Kept) -> None:
    kept.silence(answer=WELL)
    assert kept.tick(after=HASTY_PROBE_S) == [Probe(HASTY_PATIENCE_S)]
    kept.tell(Stalled(3.0), after=3.0)
    kept.tick()
    kept.tell(ProbeVoided())
    kept.tick()
    assert (kept.state(), kept.lost) == (S.SUSPECT, [])


def test_a_stall_makes_nobody_look_as_if_he_had_answered() -> None:
    made = detector()
    made.handle(Stalled(3.0), now=13.0)
    assert why(made) == (S.STARTING, "it has not answered yet")


def test_only_a_tick_says_what_time_says(kept: Kept) -> None:
    """Reports that lay in a queue while the router slept are handled before it knows that it slept."""
    work(kept)()
    kept.host(H.ONLINE)
    kept.now += 7.0
    for _ in range(12):
        work(kept)()
        kept.tell(Troubled())
    assert kept.lost == []
    kept.tell(Stalled(6.9))
    kept.tick()
    assert kept.lost == []


# --- orders


@pytest.mark.parametrize("state", [S.DRAINING, S.SWITCHING])
def test_an_order_takes_it_out_of_service_and_brings_it_back(kept: Kept, state: S) -> None:
    assert kept.tell(Ordered(state, "operator: update")) == [Publish()]
    assert kept.why == (state, "operator: update")
    assert kept.order() is state
    kept.run(2.0, kept.report)
    assert kept.state() is state
    kept.tell(Ordered(None))
    assert (kept.state(), kept.order(), kept.lost) == (S.READY, None, [])


@pytest.mark.parametrize(
    ("events", "state"),
    [((Refused(), Refused()), S.DEAD), ((LATE,), S.SUSPECT), ((HostJudged(H.SUSPECT, "x"),), S.SUSPECT)],
    ids=["dead", "late", "host"],
)
def test_worse_news_than_an_order_is_shown_and_the_order_stays(kept: Kept, events: tuple[Event, ...], state: S) -> None:
    kept.tell(Ordered(S.DRAINING, "operator"))
    for event in events:
        kept.tell(event)
    assert kept.state() is state
    kept.host(H.ONLINE, "it answers")
    kept.run(1.0, answer=WELL)
    assert kept.why == (S.DRAINING, "operator")


def test_an_order_outlives_the_process(kept: Kept) -> None:
    kept.tell(Ordered(S.DRAINING, "operator"))
    kept.report(pid=8, start_ticks=80)
    assert kept.why == (S.DRAINING, "operator")


@pytest.mark.parametrize("side", ["order", "agent"])
def test_a_switch_is_not_a_wrong_mode(kept: Kept, side: str) -> None:
    if side == "order":
        kept.tell(Ordered(S.SWITCHING, "flip"))
    else:
        kept.report(state=S.SWITCHING, reason="flip")
    kept.tell(Troubled())
    kept.tick()
    kept.tell(Answered(FACTS, EngineLoad(), "prefill"))
    assert kept.why == (S.SWITCHING, "flip")
    kept.report(state=S.READY, role=Role.PREFILL)
    kept.tell(Ordered(None))
    assert kept.state() is S.READY
    assert kept.made.view.address.role is Role.PREFILL


def test_a_switch_that_came_to_nothing_in_words_only_is_found_out_and_healed(kept: Kept) -> None:
    kept.tell(Ordered(S.SWITCHING, "flip"))
    kept.tell(Troubled())
    kept.tick()
    kept.tell(Answered(FACTS, EngineLoad(), "prefill"))
    kept.tell(Ordered(None))
    assert kept.state() is S.QUARANTINED
    kept.run(1.0, answer=Answered(FACTS, EngineLoad(), "decode"))
    assert kept.state() is S.READY


# --- random lives


class Life:
    """Any event at any time. What must hold is written down here once more, apart from how the machine does it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        has_agent = self.chance.random() < 0.7
        self.role = self.chance.choice(list(Role))
        self.made = EngineDetector(
            address_of(self.role), slot=0, probe_interval_s=INTERVAL_S, now=0.0, host=HostId("box") if has_agent else None
        )
        self.has_agent = has_agent
        self.now = 0.0
        self.awake = 0.0  # a clock that stands while the router sleeps
        self.probing = False
        self.host = H.ONLINE
        self.pid = 7
        self.counter = 0
        self.sign_at = -100.0
        self.lost = self.was_lost = self.outdated = False
        self.known_pid = 0
        self.seen: set[str] = set()

    def step(self) -> None:
        chance = self.chance
        waited = chance.choice((0.0, 0.05, 0.25, 0.25, 1.0))
        self.now += waited
        self.awake += waited
        event = self.event()
        before = self.made.view
        commands = self.made.handle(event, now=self.now)
        self.made.check()
        self.judge(event, before, commands)

    def event(self) -> Event:
        chance = self.chance
        kind = chance.random()
        due = self.made.next_deadline()
        if kind < 0.4 or (kind < 0.8 and due is not None and self.now >= due):
            return Tick(self.flow() if chance.random() < 0.1 else 0.0)
        if kind < 0.55 and self.probing:
            return self.end_of_probe()
        if kind < 0.58:
            return self.from_elsewhere()
        if self.has_agent:
            return self.from_the_host(kind)
        return Tick()

    def from_elsewhere(self) -> Event:
        chance = self.chance
        if chance.random() < 0.3:
            lag = chance.choice((0.6, 3.0))
            self.now += lag
            return Stalled(lag)
        return chance.choice((Troubled(), Ordered(None), Ordered(S.DRAINING, "a"), Ordered(S.SWITCHING, "b")))

    def from_the_host(self, kind: float) -> Event:
        chance = self.chance
        if kind < 0.64:
            self.host = chance.choice(list(H))
            gone = self.host is H.LEFT and chance.random() < 0.3
            return HostJudged(self.host, "so", self.flow() if chance.random() < 0.2 else 0.0, gone)
        return self.report()

    def end_of_probe(self) -> Event:
        chance = self.chance
        self.counter += chance.random() < 0.5
        mode = chance.choice(("", "", "prefill", "decode", "null"))
        facts = FACTS if chance.random() < 0.95 else EngineFacts()
        answer = Answered(facts, EngineLoad(running=chance.randrange(3)), mode, self.counter, chance.random() < 0.7)
        return chance.choice((answer, answer, answer, Refused(), LATE, ProbeVoided()))

    def report(self) -> Event:
        chance = self.chance
        if chance.random() < 0.02:
            self.pid += 1
        self.counter += chance.random() < 0.1
        states = [S.READY] * 40 + [S.STARTING, S.SUSPECT, S.DRAINING, S.SWITCHING, S.DEAD, S.HELD, S.QUARANTINED]
        pid = 0 if chance.random() < 0.05 else self.pid
        return Reported(
            EngineReport(
                EngineId("e"),
                self.role,
                chance.choice(states),
                chance.choice(("", "so")),
                "h",
                1,
                pid=pid,
                start_ticks=pid,
                counter=self.counter,
                working=chance.random() < 0.9,
                facts=FACTS,
            )
        )

    def flow(self) -> float:
        self.sign_at = self.awake
        return self.now

    def judge(self, event: Event, before: Any, commands: list[Command]) -> None:
        view = self.made.view
        self.seen |= {str(view.state), *(type(c).__name__ for c in commands)}
        assert (Publish() in commands) is (view != before)
        fails = [c for c in commands if isinstance(c, FailOver)]
        assert len(fails) <= 1
        assert all(c.cause for c in fails)
        if any(isinstance(c, Probe) for c in commands):
            assert isinstance(event, Tick)
            assert not self.probing, "one at a time"
            self.probing = True
        elif isinstance(event, Answered | Refused | TimedOut | ProbeVoided):
            self.probing = False
        self.note_signs(event)
        self.judge_loss(event, before.state, fails)

    def note_signs(self, event: Event) -> None:
        if isinstance(event, Reported) and event.report.pid not in {0, self.known_pid}:
            self.outdated = self.probing
            self.known_pid, self.sign_at = event.report.pid, -100.0
        elif isinstance(event, Answered) and not self.outdated:
            self.sign_at = self.awake
        if not self.probing:
            self.outdated = False

    def judge_loss(self, event: Event, was: S, fails: list[FailOver]) -> None:
        view = self.made.view
        if view.state is S.DEAD and was not in {S.DEAD, S.HELD} and "no sign of life" in view.reason:
            assert isinstance(event, Tick)
            assert self.host in {H.SILENT, H.LEFT}
            assert self.awake - self.sign_at >= SIGN_OF_LIFE_S - 1e-6
            self.seen.add("lifeless")
        if fails and "counters" in fails[0].cause:
            assert isinstance(event, Tick)
            self.seen.add("hung")
        replaced = bool(fails) and "was replaced by" in fails[0].cause
        if fails and not replaced:
            assert not self.lost or isinstance(event, Reported), "once"
        if replaced:
            assert not self.lost, "what was lost before is not lost again"
            self.seen.add("replaced")
        self.lost = view.state in {S.DEAD, S.HELD} or view.still_s > 0.0
        assert not self.lost or fails or was in {S.DEAD, S.HELD} or self.was_lost, "who dies, or hangs, loses what runs on it"
        self.was_lost = self.lost
        if self.host is not H.ONLINE:
            assert view.state is not S.READY
        due = self.made.next_deadline()
        assert due is not None or self.probing or (self.has_agent and self.host is H.ONLINE)


def a_hundred_thousand_events() -> set[str]:
    seen: set[str] = set()
    for seed in range(50):
        life = Life(seed)
        for _ in range(2000):
            life.step()
        seen |= life.seen
    return seen


def test_a_hundred_thousand_random_events_keep_every_invariant() -> None:
    seen = a_hundred_thousand_events()
    assert seen >= {str(state) for state in EngineState}
    assert seen >= {"Probe", "Publish", "FailOver", "lifeless", "hung", "replaced"}


@pytest.mark.parametrize("seed", range(30))
def test_an_engine_that_lives_is_never_lost_and_one_that_does_not_is_lost_soon(seed: int) -> None:
    """Its host comes and goes, the router stalls, probes are slow and now and then one is lost: as long as it works, nothing ends."""
    chance = random.Random(seed)
    kept = Kept()
    kept.report()
    for counter in range(60):
        alive = Answered(FACTS, EngineLoad(running=1), "decode", counter, working=True)
        state = chance.choice(list(H))
        kept.host(state, "so")
        if state is H.ONLINE:
            kept.report(counter=counter, working=True)
        elif chance.random() < 0.3:
            kept.bytes_at = kept.now
        if chance.random() < 0.2:
            kept.tell(Stalled(3.0), after=3.0)
        if chance.random() < 0.1:
            kept.tell(Troubled())
        kept.run(chance.uniform(0.1, 4.0), answer=alive, takes=chance.uniform(0.001, 0.7))
        assert kept.lost == []
    kept.host(H.SUSPECT, "so")
    kept.run(1.0)
    kept.host(H.SILENT, "so")
    kept.run(1.0)
    assert kept.state() is S.DEAD
    assert len(kept.lost) == 1


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_lifeless_at", lambda self: 0.0 if self._host_state in {H.SILENT, H.LEFT} else None),
        ("_note_bytes", lambda _self, at: None),
        ("_is_past", lambda self: False),
        ("_fail_over_once", lambda self: [FailOver(self.view.reason)] if self.view.state is S.DEAD else []),
    ],
)
def test_the_walk_notices_when_a_defence_is_off(monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Any]) -> None:
    monkeypatch.setattr(EngineDetector, name, broken)
    with pytest.raises(AssertionError):
        a_hundred_thousand_events()
