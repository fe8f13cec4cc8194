"""The life of an engine: events in, commands out, time as an argument."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from disagg.engines.restart import (
    HISTORY_LIMIT,
    KILL_REPEAT_S,
    Adopted,
    BecameReady,
    Command,
    EngineLife,
    Event,
    Exited,
    IllegalMoveError,
    Kill,
    Limits,
    Probe,
    ProbeAnswered,
    ProbeFailed,
    ProgressMissed,
    ProgressSeen,
    Report,
    RestartAsked,
    Spawn,
    Spawned,
    SpawnFailed,
    StartAsked,
    State,
    StopAsked,
    Terminate,
    Tick,
)

LIMITS = Limits(start_limit_s=120.0, stop_limit_s=10.0)
START = (StartAsked("the agent begins"), Spawned(100))
RUN = (*START, BecameReady())
HOLD = (StartAsked("x"), *(e for _ in range(5) for e in (SpawnFailed("no such file"), Tick())))
TO_STATE: dict[State, tuple[Event, ...]] = {
    State.STOPPED: (),
    State.STARTING: START,
    State.RUNNING: RUN,
    State.STOPPING: (*RUN, StopAsked("x")),
    State.BACKOFF: (*RUN, Exited(1)),
    State.HELD: HOLD,
}
EVENTS: tuple[Event, ...] = (
    *(StartAsked("x"), StopAsked("x"), RestartAsked("x"), Spawned(7), SpawnFailed("x"), Adopted(7), BecameReady(), Exited(0)),
    *(ProgressSeen(1, working=True), ProgressMissed(), ProbeAnswered(), ProbeFailed("x"), Tick()),
)
ANYWHERE = {StartAsked, StopAsked, RestartAsked, BecameReady, ProgressSeen, ProgressMissed, ProbeAnswered, ProbeFailed, Tick}
LEGAL: dict[State, set[type]] = {
    State.STOPPED: {Adopted},
    State.STARTING: {Exited},
    State.RUNNING: {Exited},
    State.STOPPING: {Exited},
    State.BACKOFF: set(),
    State.HELD: set(),
}


class Life:
    """A machine with a clock, and what it said."""

    def __init__(self, *events: Event, limits: Limits = LIMITS, now: float = 1000.0) -> None:
        self.machine = EngineLife(limits)
        self.now = now
        for event in events:
            self.machine.handle(event, now=self._due_time() if isinstance(event, Tick) else self.now)
            self.machine.check()

    def _due_time(self) -> float:
        self.now = max(self.now, self.machine.next_deadline() or self.now)
        return self.now

    def tell(self, event: Event, *, after: float = 0.0) -> list[Command]:
        self.now += after
        commands = self.machine.handle(event, now=self.now)
        self.machine.check()
        return commands

    def tick(self) -> list[Command]:
        """At its deadline."""
        self._due_time()
        return self.tell(Tick())

    def watch(self, counter: int, seconds: float, *, working: bool = True, every: float = 0.5) -> list[Command]:
        """The same counter again and again."""
        said: list[Command] = []
        for _ in range(round(seconds / every)):
            said += self.tell(ProgressSeen(counter, working), after=every)
        return said


def state_of(life: Life) -> State:
    return life.machine.state


def kinds(commands: Sequence[Command]) -> list[type]:
    return [type(c) for c in commands]


# --- the table


@pytest.mark.parametrize("state", list(State))
def test_the_way_to_each_state(state: State) -> None:
    life = Life(*TO_STATE[state])
    assert state_of(life) is state
    assert str(state) in repr(life.machine)


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("state", list(State))
def test_an_illegal_move_raises_and_changes_nothing(state: State, event: Event) -> None:
    life = Life(*TO_STATE[state])
    if type(event) in LEGAL[state] | ANYWHERE:
        life.tell(event)
        return
    before = (repr(life.machine), life.machine.reason, life.machine.next_deadline(), list(life.machine.history))
    with pytest.raises(IllegalMoveError, match=type(event).__name__):
        life.tell(event)
    assert before == (repr(life.machine), life.machine.reason, life.machine.next_deadline(), list(life.machine.history))


@pytest.mark.parametrize(
    ("before", "event", "after", "commands"),
    [
        ((), StartAsked("x"), State.STARTING, [Spawn("x")]),
        ((), RestartAsked("x"), State.STARTING, [Spawn("x")]),
        ((), StopAsked("x"), State.STOPPED, []),
        (START, BecameReady(100), State.RUNNING, []),
        (START, StartAsked("x"), State.STARTING, []),
        (START, StopAsked("x"), State.STOPPING, [Terminate("x")]),
        (START[:1], StopAsked("x"), State.STOPPING, []),
        (START[:1], SpawnFailed("x"), State.BACKOFF, [Report]),
        (START, Exited(3), State.BACKOFF, [Report]),
        (RUN, Exited(0), State.BACKOFF, [Report]),
        (RUN, StartAsked("x"), State.RUNNING, []),
        (RUN, RestartAsked("x"), State.STOPPING, [Terminate("x")]),
        ((*RUN, StopAsked("x")), Exited(-9), State.STOPPED, []),
        ((*RUN, RestartAsked("x")), Exited(-9), State.STARTING, [Spawn("x")]),
        ((*RUN, StopAsked("x"), StartAsked("y")), Exited(0), State.STARTING, [Spawn("y")]),
        ((*RUN, RestartAsked("x"), StopAsked("y")), Exited(0), State.STOPPED, []),
        ((*START[:1], StopAsked("x")), Spawned(9), State.STOPPING, [Terminate("x")]),
        ((*START[:1], StopAsked("x")), SpawnFailed("y"), State.STOPPED, []),
        ((*START[:1], StopAsked("x")), StartAsked("y"), State.STARTING, []),
        (TO_STATE[State.BACKOFF], StartAsked("x"), State.STARTING, [Spawn("x")]),
        (TO_STATE[State.BACKOFF], StopAsked("x"), State.STOPPED, []),
        (HOLD, StartAsked("x"), State.STARTING, [Spawn("x")]),
        (HOLD, RestartAsked("x"), State.STARTING, [Spawn("x")]),
        (HOLD, StopAsked("x"), State.STOPPED, []),
        (HOLD, Tick(), State.HELD, []),
        ((), Adopted(7), State.RUNNING, [Report]),
        ((), Adopted(7, ready=False), State.STARTING, [Report]),
    ],
)
def test_moves(before: tuple[Event, ...], event: Event, after: State, commands: list[Command | type]) -> None:
    life = Life(*before)
    said = life.tell(event)
    assert state_of(life) is after
    assert [type(s) if isinstance(c, type) else s for s, c in zip(said, commands, strict=True)] == commands


def test_news_of_another_process_is_ignored() -> None:
    life = Life(*RUN)
    for event in (Exited(1, pid=99), ProbeFailed("x", pid=99), ProgressSeen(1, working=True, pid=99), BecameReady(pid=99)):
        assert life.tell(event) == []
    assert state_of(life) is State.RUNNING
    life.tell(Exited(1, pid=100))
    assert state_of(life) is State.BACKOFF


def test_the_reason_names_code_or_signal() -> None:
    for code, words in ((137, "code 137"), (-9, "signal 9"), (None, "only init knows")):
        life = Life(*RUN)
        life.tell(Exited(code))
        assert words in life.machine.reason


# --- deaths


def die_young(life: Life) -> float:
    """One short life. Returns the wait after it."""
    life.tell(Spawned(1))
    life.tell(Exited(1))
    return (life.machine.next_deadline() or life.now) - life.now


def test_back_off_doubles_from_one_to_sixty_seconds() -> None:
    life = Life(StartAsked("x"), limits=Limits(hold_deaths=100))
    waits = []
    for _ in range(9):
        waits.append(die_young(life))
        assert kinds(life.tick()) == [Spawn]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_nothing_is_spawned_before_its_time() -> None:
    life = Life(*RUN, Exited(1))
    assert life.tell(Tick(), after=0.9) == []
    assert kinds(life.tell(Tick(), after=0.1)) == [Spawn]


def test_a_life_that_ran_well_begins_the_row_anew() -> None:
    life = Life(StartAsked("x"), limits=Limits(hold_deaths=100))
    for _ in range(4):
        die_young(life)
        life.tick()
    life.tell(Spawned(1))
    life.tell(BecameReady())
    life.tell(Exited(1), after=59.0)
    assert life.machine.next_deadline() == life.now + 16.0
    life.tick()
    life.tell(Spawned(1))
    life.tell(BecameReady())
    life.tell(Exited(1), after=60.0)
    assert life.machine.next_deadline() == life.now + 1.0


def test_the_fifth_death_in_ten_minutes_holds_it() -> None:
    life = Life(StartAsked("x"))
    for _ in range(4):
        die_young(life)
        assert state_of(life) is State.BACKOFF
        life.tick()
    die_young(life)
    assert state_of(life) is State.HELD
    assert life.machine.deaths == 5
    assert life.machine.next_deadline() is None
    assert "5 deaths" in life.machine.reason
    assert life.tell(Tick(), after=10_000.0) == []


def test_five_deaths_over_more_than_ten_minutes_do_not() -> None:
    life = Life(StartAsked("x"))
    for _ in range(20):
        life.now += 160.0
        die_young(life)
        assert state_of(life) is State.BACKOFF
        life.tick()


@pytest.mark.parametrize("way", [(StartAsked("x"),), (RestartAsked("x"),), (StopAsked("x"), StartAsked("x"))])
def test_a_person_who_starts_a_held_engine_forgives_its_deaths(way: tuple[Event, ...]) -> None:
    life = Life(*HOLD)
    for event in way:
        life.tell(event)
    assert life.machine.deaths == 0
    assert die_young(life) == 1.0


def test_a_restart_is_no_death_and_waits_for_nothing() -> None:
    life = Life(*RUN)
    for _ in range(20):
        life.tell(RestartAsked("a new role"))
        assert life.tell(Exited(-15)) == [Spawn("a new role")]
        life.tell(Spawned(5))
        life.tell(BecameReady())
    assert life.machine.deaths == 0


# --- limits


def test_a_stop_that_takes_too_long_becomes_a_kill_and_the_kill_is_repeated() -> None:
    life = Life(*RUN)
    life.tell(StopAsked("x"))
    assert life.tell(Tick(), after=9.9) == []
    assert kinds(life.tell(Tick(), after=0.1)) == [Kill]
    assert life.tell(Tick(), after=KILL_REPEAT_S - 0.1) == []
    assert kinds(life.tell(Tick(), after=0.1)) == [Kill]
    assert life.tell(Exited(-9)) == []
    assert state_of(life) is State.STOPPED
    assert life.machine.deaths == 0


def test_a_start_that_takes_too_long_is_killed_and_is_a_death() -> None:
    life = Life(*START)
    assert life.tell(Tick(), after=119.9) == []
    assert kinds(life.tell(Tick(), after=0.1)) == [Kill, Report]
    life.tell(Exited(-9))
    assert state_of(life) is State.BACKOFF
    assert life.machine.deaths == 1
    assert "120 s" in life.machine.reason


def test_an_adopted_engine_that_still_starts_has_the_start_limit() -> None:
    life = Life(Adopted(7, ready=False))
    assert life.machine.next_deadline() == life.now + 120.0
    life.tell(BecameReady(7))
    assert state_of(life) is State.RUNNING


# --- hangs


def test_still_counters_under_work_make_it_hung_after_five_seconds() -> None:
    life = Life(*RUN)
    assert life.watch(1, 5.0) == []
    assert "hung" not in repr(life.machine)
    (report,) = life.watch(1, 0.5)
    assert isinstance(report, Report)
    assert life.machine.hung
    assert "5.0 s" in life.machine.reason
    assert life.watch(1, 10.0) == [], "said once"


def test_without_work_nothing_hangs() -> None:
    life = Life(*RUN)
    assert life.watch(1, 1000.0, working=False) == []
    assert not life.machine.hung


def test_a_start_is_exempt() -> None:
    life = Life(*START)
    assert life.watch(1, 100.0) == []
    life.tell(BecameReady())
    assert not life.machine.hung
    assert life.watch(1, 5.0) == [], "what was seen during the start does not count"


@pytest.mark.parametrize(("counter", "working"), [(2, True), (1, False)])
def test_a_move_or_the_end_of_work_clears_it(counter: int, working: bool) -> None:
    life = Life(*RUN)
    life.watch(1, 20.0)
    assert life.machine.hung
    assert kinds(life.tell(ProgressSeen(counter, working), after=0.5)) == [Report]
    assert not life.machine.hung


def hung_for(seconds: float, *, longest: float = 0.0) -> Life:
    life = Life(*RUN, limits=Limits())
    if longest:
        life.watch(1, longest + 0.5)
    life.watch(2, seconds + 0.5)
    return life


def test_a_kill_needs_a_minute_and_a_failed_probe() -> None:
    life = hung_for(59.5)
    assert life.tell(ProbeFailed("nobody asked")) == []
    assert kinds(life.watch(2, 0.5)) == [Probe]
    assert life.watch(2, 100.0) == [], "one probe at a time"
    commands = life.tell(ProbeFailed("no token in 10 s"))
    assert kinds(commands) == [Kill, Report]
    assert state_of(life) is State.STOPPING
    life.tell(Exited(-9))
    assert state_of(life) is State.BACKOFF
    assert life.machine.deaths == 1
    assert "no token in 10 s" in life.machine.reason


def test_a_probe_that_is_answered_saves_it_and_is_repeated() -> None:
    life = hung_for(59.5)
    assert kinds(life.watch(2, 0.5)) == [Probe]
    assert life.tell(ProbeAnswered()) == []
    assert life.machine.hung
    assert life.watch(2, 9.5) == []
    assert kinds(life.watch(2, 0.5)) == [Probe]


def test_the_kill_waits_for_three_of_the_longest_steps_seen() -> None:
    life = hung_for(89.5, longest=30.0)
    assert life.machine.longest_step_s == 30.0
    assert state_of(life) is State.RUNNING
    assert kinds(life.watch(2, 0.5)) == [Probe]


def test_the_longest_step_is_remembered_over_a_restart() -> None:
    life = hung_for(1.0, longest=30.0)
    life.tell(RestartAsked("x"))
    life.tell(Exited(0))
    life.tell(Spawned(101))
    life.tell(BecameReady())
    assert life.machine.longest_step_s == 30.0


def test_a_probe_that_fails_after_the_counters_moved_proves_nothing() -> None:
    life = hung_for(60.0)
    life.tell(ProgressSeen(3, working=True), after=0.5)
    assert Probe not in kinds(life.watch(3, 200.0)), "the first probe is still under way"
    assert life.tell(ProbeFailed("late")) == []
    assert kinds(life.watch(3, 0.5)) == [Probe]


def test_an_engine_that_does_not_answer_any_more_hangs_as_well() -> None:
    life = Life(*RUN)
    life.tell(ProgressSeen(1, working=True))
    said = [c for _ in range(6) for c in life.tell(ProgressMissed(), after=1.0)]
    assert kinds(said) == [Report]
    assert life.machine.hung


def test_an_agent_that_slept_accuses_nobody() -> None:
    life = Life(*RUN)
    life.watch(1, 3.0)
    assert life.tell(Tick(), after=3600.0) == []
    assert life.tell(ProgressSeen(50, working=True), after=0.5) == []
    assert not life.machine.hung
    assert life.machine.longest_step_s < 3.0


# --- random lives


class Walk:
    """Sends what a real agent could send in this state, with any timing."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.machine = EngineLife(Limits())
        self.now = 0.0
        self.pids = 0
        self.spawning = self.probing = False
        self.kills_of_hung = 0
        self.counter = 0

    def step(self) -> None:
        self.now += self.chance.choice((0.0, 0.1, 0.5, 2.0, 30.0))
        if self.chance.random() < 0.3:
            self.now = max(self.now, self.machine.next_deadline() or 0.0)
        for command in self.machine.handle(self.event(), now=self.now):
            self.obey(command)
        self.machine.check()
        assert len(self.machine.history) <= HISTORY_LIMIT

    def obey(self, command: Command) -> None:
        assert not isinstance(command, Report) or command.sentence
        if isinstance(command, Spawn):
            assert not self.spawning
            assert self.machine.pid is None, "never two processes of one engine"
            self.spawning = True
        elif isinstance(command, Probe):
            assert not self.probing
            self.probing = True
        elif isinstance(command, Terminate | Kill):
            assert self.machine.pid is not None
            self.kills_of_hung += isinstance(command, Kill) and "a probe failed" in command.cause

    def event(self) -> Event:
        chance = self.chance
        events: list[Event] = [Tick(), Tick(), ProgressMissed(), BecameReady(), Exited(1, pid=10**9)]
        if chance.random() < 0.1:
            events = [StartAsked("a"), StopAsked("b"), RestartAsked("c")]
        elif self.spawning:
            events += [self.spawned, SpawnFailed("no memory")] if chance.random() < 0.5 else []
        elif self.machine.pid is not None:
            self.counter += chance.random() < 0.2
            events += [ProgressSeen(self.counter, chance.random() < 0.9)] * 20 + [Exited(chance.choice((0, 1, -9, None)))]
        elif self.machine.state is State.STOPPED:
            events.append(Adopted(10**6 + self.pids, ready=chance.random() < 0.5))
        if self.probing:
            events += [ProbeFailed("no answer"), ProbeAnswered()]
        event = chance.choice(events)
        self.spawning = self.spawning and not isinstance(event, Spawned | SpawnFailed)
        self.probing = self.probing and not isinstance(event, ProbeFailed | ProbeAnswered | Exited)
        return event

    @property
    def spawned(self) -> Spawned:
        self.pids += 1
        return Spawned(self.pids)


def test_a_hundred_thousand_random_events_keep_every_invariant() -> None:
    visited: set[State] = set()
    hung = kills_of_hung = 0
    for seed in range(20):
        walk = Walk(seed)
        for _ in range(5000):
            walk.step()
            visited.add(walk.machine.state)
            hung += walk.machine.hung
        kills_of_hung += walk.kills_of_hung
    assert visited == set(State)
    assert hung > 0
    assert kills_of_hung > 0
