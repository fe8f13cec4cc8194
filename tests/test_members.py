"""Which hosts belong to the cluster: seats, fencing, silence; random walks; and an agent in a bad network that always heals."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from disagg.cluster import members as machine
from disagg.cluster.members import (
    ACKS_KEPT,
    HISTORY_LIMIT,
    SILENT_S,
    SUSPECT_S,
    Command,
    Event,
    ForgetHost,
    GoodbyeSeen,
    HeartbeatSeen,
    HelloSeen,
    HostRevoked,
    Members,
    PublishHost,
    SendAck,
    SendRefusal,
    SendWelcome,
    Stalled,
    TakeReports,
    Tick,
)
from disagg.model import EngineId, EngineState, HostId, HostState, Role
from disagg.wire.codec import encode, to_host, to_router
from disagg.wire.messages import Ack, EngineReport, Goodbye, Heartbeat, Hello, Refused, ToHost, ToRouter, Welcome

BOX = HostId("box-1")
S = HostState
BEAT_S = 0.25


def report(name: str = "e") -> EngineReport:
    return EngineReport(EngineId(name), Role.DECODE, EngineState.READY)


class Town:
    """A machine, a clock, and short ways to say things."""

    def __init__(self) -> None:
        self.members = Members()
        self.now = 100.0

    def tell(self, event: Event, *, after: float = 0.0) -> list[Command]:
        self.now += after
        commands = self.members.handle(event, now=self.now)
        self.members.check()
        return commands

    def hello(self, incarnation: int = 1, nonce: str = "a", session: bytes = b"1", *, after: float = 0.0) -> list[Command]:
        return self.tell(HelloSeen(BOX, session, incarnation, nonce, release="1.0", engines=(report(nonce),)), after=after)

    def beat(
        self, seq: int, acked: int = 0, incarnation: int = 1, nonce: str = "a", session: bytes = b"1", *, after: float = 0.0
    ) -> list[Command]:
        return self.tell(HeartbeatSeen(BOX, session, incarnation, nonce, seq, acked, (report(f"{nonce}{seq}"),)), after=after)

    def tick(self, *, after: float = 0.0) -> list[Command]:
        return self.tell(Tick(), after=after)

    def live(self, seconds: float, first: int = 1, *, heard: bool = True, **who: Any) -> int:
        """Heartbeats for so long, each acknowledging the one before where acknowledgements are `heard`; returns the next number."""
        seq = first
        for _ in range(round(seconds / BEAT_S)):
            self.tick()
            self.beat(seq, seq - 1 if heard else first - 1, after=BEAT_S, **who)
            seq += 1
        return seq

    def state(self) -> HostState | None:
        return self.members.state(BOX)

    @property
    def reason(self) -> str:
        return next(h.reason for h in self.members.hosts if h.id == BOX)


@pytest.fixture
def town() -> Town:
    return Town()


def refusal(commands: list[Command]) -> SendRefusal:
    assert len(commands) == 1
    assert isinstance(commands[0], SendRefusal)
    return commands[0]


# --- joining


def test_a_host_that_says_hello_belongs_to_the_cluster(town: Town) -> None:
    welcome, publish, take = town.hello()
    assert welcome == SendWelcome(BOX, b"1")
    assert take == TakeReports(BOX, (report("a"),))
    assert isinstance(publish, PublishHost)
    assert (publish.view.id, publish.view.state, publish.view.incarnation, publish.view.release) == (BOX, S.ONLINE, 1, "1.0")
    assert town.members.session(BOX) == b"1"
    assert town.members.hosts == [publish.view]


def test_nobody_is_there_before(town: Town) -> None:
    assert (town.state(), town.members.session(BOX), town.members.hosts, town.members.next_deadline()) == (None, None, [], None)
    assert refusal(town.beat(1)).reason == "this incarnation does not hold the host's seat: say hello again"
    assert town.members.fenced == 1


def test_each_heartbeat_is_acknowledged_and_its_reports_are_taken(town: Town) -> None:
    town.hello()
    assert town.beat(1) == [SendAck(b"1", 1), TakeReports(BOX, (report("a1"),))]
    assert town.beat(2, 1, after=BEAT_S) == [SendAck(b"1", 2), TakeReports(BOX, (report("a2"),))]


def test_the_same_agent_over_a_new_connection_keeps_its_seat_and_nothing_is_published(town: Town) -> None:
    town.hello()
    town.live(5.0)
    assert town.hello(session=b"2") == [SendWelcome(BOX, b"2"), TakeReports(BOX, (report("a"),))]
    assert (town.state(), town.members.session(BOX)) == (S.ONLINE, b"2")


def test_the_newest_heartbeat_says_where_the_host_is_reached(town: Town) -> None:
    """The socket connects anew by itself; an agent may not notice, and a late hello may come from a connection that is gone."""
    town.hello()
    town.beat(1)
    assert SendAck(b"2", 2) in town.beat(2, 1, session=b"2", after=BEAT_S)
    town.hello(session=b"1")
    assert town.members.session(BOX) == b"1"
    assert SendAck(b"2", 3) in town.beat(3, 2, session=b"2", after=BEAT_S)
    assert town.members.session(BOX) == b"2"


# --- who may have the seat


def test_a_clone_stays_out_as_long_as_the_original_lives(town: Town) -> None:
    town.hello()
    seq = 1
    for _ in range(40):
        seq = town.live(BEAT_S, seq)
        found = refusal(town.hello(nonce="b", session=b"9"))
        assert (found.session, found.final) == (b"9", False)
        assert "a clone: box-1 incarnation 1 is alive elsewhere" in found.reason
        assert refusal(town.beat(seq + 5, nonce="b", session=b"9")).session == b"9"
        town.tick()
        assert (town.state(), town.members.session(BOX)) == (S.ONLINE, b"1")


def test_a_clone_stays_out_when_the_original_is_heard_but_does_not_hear_us(town: Town) -> None:
    town.hello()
    town.live(5.0, heard=False)
    town.tick()
    assert town.state() is S.SILENT
    assert "a clone" in refusal(town.hello(nonce="b")).reason


def test_a_stale_incarnation_is_refused_for_good_whatever_the_holder_does(town: Town) -> None:
    town.hello(7)
    for after in (0.1, 1.5, 5.0, 3600.0):
        found = refusal(town.hello(6, "old", after=after))
        assert found.final
        assert "incarnation 6 of box-1, and incarnation 7 was here before" in found.reason
        town.tick()
    town.tell(GoodbyeSeen(BOX, 7, "a"))
    assert refusal(town.hello(6, "old")).final


@pytest.mark.parametrize("gap_s", [0.05, 0.3, 0.9])
def test_an_agent_that_was_killed_and_started_again_is_back_within_two_seconds(town: Town, gap_s: float) -> None:
    town.hello()
    town.live(3.0)
    killed_at = town.now
    town.now += gap_s
    while not isinstance(town.hello(2, "b", b"2")[0], SendWelcome):
        assert "still alive" in refusal(town.hello(2, "b", b"2")).reason
        assert town.now - killed_at < 2.0
        town.tick(after=BEAT_S)
    assert town.now - killed_at <= SUSPECT_S + BEAT_S
    assert (town.state(), town.members.hosts[0].incarnation) == (S.ONLINE, 2)
    assert refusal(town.beat(99, 98)).reason.startswith("this incarnation does not hold")


def test_after_a_goodbye_the_next_incarnation_waits_for_nothing(town: Town) -> None:
    town.hello()
    town.tell(GoodbyeSeen(BOX, 1, "a", engines_stay=True))
    assert isinstance(town.hello(2, "b")[0], SendWelcome)
    assert not town.members.engines_stay(BOX)


# --- fencing


def test_frames_of_the_past_change_nothing(town: Town) -> None:
    town.hello()
    town.live(2.0)
    before, fenced = repr(town.members.hosts), town.members.fenced
    for seq in range(1, 9):
        assert town.beat(seq, 10**6) == []
    assert town.members.fenced == fenced + 8
    town.tick(after=SUSPECT_S)
    assert town.state() is S.SUSPECT, "what was said again proves nothing"
    assert before != repr(town.members.hosts)


def test_frames_of_an_incarnation_before_are_fenced(town: Town) -> None:
    town.hello(1, "a")
    town.live(1.0)
    town.tick(after=3.0)
    town.hello(2, "b", b"2")
    town.beat(1, incarnation=2, nonce="b", session=b"2")
    for late in (town.beat(5, 4), town.beat(6, 5, nonce="b"), town.beat(7, 6, incarnation=2)):
        assert isinstance(late[0], SendRefusal)
    assert town.tell(GoodbyeSeen(BOX, 1, "a")) == []
    assert refusal(town.hello(1, "a")).final
    assert (town.state(), town.members.session(BOX)) == (S.ONLINE, b"2")


def test_who_said_goodbye_does_not_come_back_by_what_was_still_under_way(town: Town) -> None:
    town.hello()
    town.beat(1)
    town.tell(GoodbyeSeen(BOX, 1, "a", engines_stay=True))
    assert "said goodbye" in refusal(town.hello()).reason
    assert isinstance(town.beat(2, 1)[0], SendRefusal)
    assert town.tell(GoodbyeSeen(BOX, 1, "a", engines_stay=False)) == []
    assert town.members.engines_stay(BOX)
    assert town.state() is S.LEFT


# --- silence


def test_a_host_that_is_heard_and_hears_stays_online_for_ever(town: Town) -> None:
    town.hello()
    town.live(60.0)
    assert [what for _, what in town.members.story(BOX)] == ["incarnation 1 joined"]


@pytest.mark.parametrize(
    ("silent_s", "state"), [(0.99, S.ONLINE), (1.0, S.SUSPECT), (1.99, S.SUSPECT), (2.0, S.SILENT), (3600.0, S.SILENT)]
)
def test_silence(town: Town, silent_s: float, state: HostState) -> None:
    town.hello()
    joined_at = town.now
    while (due := town.members.next_deadline()) is not None and due <= joined_at + silent_s:
        town.now = due
        assert isinstance(town.tick()[0], PublishHost)
    town.now = joined_at + silent_s
    assert town.tick() == []
    assert town.state() is state
    if state is not S.ONLINE:
        assert town.reason == f"no heartbeat for {1 if state is S.SUSPECT else 2} s"


def test_a_cut_is_noticed_within_two_seconds_of_it(town: Town) -> None:
    town.hello()
    town.live(3.0)
    cut_at = town.now
    while town.state() is not S.SILENT:
        due = town.members.next_deadline()
        assert due is not None
        town.now = due
        town.tick()
        assert town.reason.startswith("no heartbeat"), "and not that heartbeats arrive"
        if town.state() is S.SUSPECT:
            assert town.now - cut_at <= SUSPECT_S
    assert town.now - cut_at <= SILENT_S
    assert town.members.next_deadline() is None


def test_a_cut_in_one_direction_is_noticed_although_heartbeats_arrive(town: Town) -> None:
    town.hello()
    seq = town.live(3.0)
    cut_at = town.now
    at: dict[HostState | None, float] = {}
    last_heard = seq - 1
    for late in range(12):
        town.beat(seq + late, last_heard, after=BEAT_S)
        town.tick()
        at.setdefault(town.state(), town.now)
        if town.state() is not S.ONLINE:
            assert town.reason.startswith("its heartbeats arrive, but for ")
    assert at[S.SUSPECT] - cut_at <= SUSPECT_S
    assert at[S.SILENT] - cut_at <= SILENT_S
    assert town.reason == "its heartbeats arrive, but for 2 s it has not heard ours"


def test_a_cut_heals_without_a_hello(town: Town) -> None:
    town.hello()
    seq = town.live(5.0, heard=False)
    town.tick()
    assert town.state() is S.SILENT
    seq = town.live(2 * BEAT_S, seq)
    assert (town.state(), town.reason) == (S.ONLINE, "it answers")
    town.live(5.0, seq)
    assert town.state() is S.ONLINE


def test_a_hello_proves_nothing_however_often_it_is_said(town: Town) -> None:
    """The agent hears nothing in a one-way cut, so it says hello again and again."""
    town.hello()
    for _ in range(12):
        town.tick()
        town.hello(after=BEAT_S)
    assert town.state() is S.SILENT
    town.beat(1)
    town.beat(2, 1, after=BEAT_S)
    assert town.state() is S.ONLINE


def test_an_old_acknowledgement_proves_no_more_than_that_it_was_heard_long_ago(town: Town) -> None:
    town.hello()
    town.beat(1)
    for seq in range(2, 14):
        town.tick()
        town.beat(seq, 1, after=BEAT_S)
    assert town.state() is S.SILENT


@pytest.mark.parametrize("order", ["queue first", "stall first"])
def test_a_stall_of_the_router_of_three_seconds_changes_nothing(town: Town, order: str) -> None:
    """Which of them the loop serves first when it comes to itself is chance: a timer, or a socket full of old heartbeats."""
    town.hello()
    seq = town.live(5.0)
    published: list[Command] = []

    def queue() -> None:
        nonlocal seq
        for _ in range(12):
            published.extend(town.beat(seq, seq - 1 if seq < 22 else 21))
            seq += 1

    town.now += 3.0
    if order == "queue first":
        queue()
    town.tell(Stalled(2.95))
    published += town.tick()
    if order == "stall first":
        queue()
    for _ in range(40):
        published += town.tick()
        published += town.beat(seq, seq - 1, after=BEAT_S)
        seq += 1
    assert not any(isinstance(c, PublishHost) for c in published)
    assert town.state() is S.ONLINE


def test_a_stall_does_not_make_the_dead_alive(town: Town) -> None:
    town.hello()
    for after in (1.5, 1.0):
        town.tick(after=after)
    assert town.state() is S.SILENT
    town.tell(Stalled(3.0), after=3.0)
    town.tell(Stalled(3.0))
    assert town.tick() == []
    assert town.state() is S.SILENT


def test_silence_goes_on_after_a_stall_where_it_was(town: Town) -> None:
    town.hello()
    town.tick(after=0.8)
    town.tell(Stalled(3.0), after=3.0)
    town.tick(after=0.19)
    assert town.state() is S.ONLINE
    town.tick(after=0.02)
    assert town.state() is S.SUSPECT


# --- leaving


@pytest.mark.parametrize(
    ("stay", "why"), [(True, "its agent stopped; its engines go on"), (False, "its agent stopped and took its engines down")]
)
def test_goodbye(town: Town, stay: bool, why: str) -> None:
    town.hello()
    (published,) = town.tell(GoodbyeSeen(BOX, 1, "a", stay))
    assert isinstance(published, PublishHost)
    assert (published.view.state, published.view.reason) == (S.LEFT, why)
    assert town.members.engines_stay(BOX) is stay
    assert (town.members.session(BOX), town.members.next_deadline()) == (None, None)
    assert town.tick(after=3600.0) == []


def test_a_revoked_host_is_refused_for_good_and_forgotten(town: Town) -> None:
    town.hello(7)
    refused, forgotten = town.tell(HostRevoked(BOX))
    assert refused == SendRefusal(BOX, b"1", "its key was revoked: it can come back with a new token only", final=True)
    assert forgotten == ForgetHost(BOX, "its key was revoked")
    assert (town.state(), town.members.hosts) == (None, [])
    assert town.tell(HostRevoked(BOX)) == []
    assert isinstance(town.hello(1, "new")[0], SendWelcome), "a new token, a new state directory"


# --- what it tells of itself


def test_repr_and_story(town: Town) -> None:
    town.hello()
    town.tick(after=5.0)
    town.beat(1, nonce="x")
    assert repr(town.members) == "<Members silent=1 fenced=1>"
    assert repr(Members()) == "<Members none fenced=0>"
    assert town.members.story(BOX) == [(100.0, "incarnation 1 joined"), (105.0, "online -> silent: no heartbeat for 2 s")]


def test_memory_is_bounded(town: Town) -> None:
    town.hello()
    for seq in range(1, 3000):
        town.beat(seq)
        town.tick(after=1.0)
        town.hello(nonce=f"n{seq}", session=b"%d" % seq)
    assert len(town.members.history) == HISTORY_LIMIT
    assert len(town.members._seats) == 1
    assert len(town.members._seats[BOX].acks) <= ACKS_KEPT


# --- random walks


class Sender:
    """An agent's process, or a clone's, and what it ever said."""

    def __init__(self, host: HostId, incarnation: int, nonce: str, session: bytes) -> None:
        self.host, self.incarnation, self.nonce, self.session = host, incarnation, nonce, session
        self.seq = self.acked = 0
        self.said: list[Event] = []

    def say(self, chance: random.Random) -> Event:
        if self.said and chance.random() < 0.15:
            return chance.choice(self.said[-40:])  # from the past, over whatever connection it came
        event = self.fresh(chance)
        self.said.append(event)
        return event

    def fresh(self, chance: random.Random) -> Event:
        kind = chance.random()
        engines = (report(f"{self.nonce}-{len(self.said)}"),)
        if kind < 0.1:
            self.session = b"%d" % chance.randrange(10**9)
        if kind < 0.2:
            return HelloSeen(self.host, self.session, self.incarnation, self.nonce, engines=engines)
        if kind < 0.205:
            return GoodbyeSeen(self.host, self.incarnation, self.nonce, chance.random() < 0.5)
        self.seq += 1
        return HeartbeatSeen(self.host, self.session, self.incarnation, self.nonce, self.seq, self.acked, engines)


class Oracle:
    """What must hold, kept apart from how the machine does it. Its clock stands while the router sleeps."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.slept_s = 0.0
        self.holder: dict[HostId, tuple[int, str]] = {}
        self.newest: dict[tuple[HostId, int, str], int] = {}
        self.acked_at: dict[tuple[HostId, int, str, int], float] = {}
        self.proof: dict[HostId, float] = {}
        self.heard: dict[HostId, float] = {}
        self.left: set[HostId] = set()

    def watch(self, event: Event, now: float) -> list[Command]:
        states = {h.id: h.state for h in self.members.hosts}
        if isinstance(event, Stalled):
            self.slept_s += event.lag_s
        commands = self.members.handle(event, now=now)
        self.members.check()
        awake = now - self.slept_s
        match event:
            case HelloSeen():
                self.hello(event, commands, awake)
            case HeartbeatSeen():
                self.heartbeat(event, commands, awake)
            case GoodbyeSeen():
                if self.holder.get(event.host) == (event.incarnation, event.nonce):
                    self.left.add(event.host)
            case HostRevoked():
                for book in (self.holder, self.proof, self.heard):
                    book.pop(event.host, None)
                self.left.discard(event.host)
                self.newest = {k: v for k, v in self.newest.items() if k[0] != event.host}
        self.after(event, states, awake)
        published = {c.view.id: c.view for c in commands if isinstance(c, PublishHost)}
        for view in self.members.hosts:
            assert published.get(view.id, view) == view
            assert view.state is states.get(view.id) or view.id in published, "a change of state is always told"
        return commands

    def hello(self, event: HelloSeen, commands: list[Command], awake: float) -> None:
        host, who = event.host, (event.incarnation, event.nonce)
        before = self.holder.get(host)
        if not isinstance(commands[0], SendWelcome):
            assert isinstance(commands[0], SendRefusal)
            assert len(commands) == 1
            assert before is not None
            assert commands[0].final is (who[0] < before[0])
            assert who != before or host in self.left
            return
        assert commands[-1] == TakeReports(host, event.engines)
        if who != before:
            if before is not None:
                assert who[0] >= before[0], "never a stale incarnation"
                assert host in self.left or awake - self.heard[host] >= SUSPECT_S - 1e-6, "never while the holder lives"
            self.holder[host] = who
            self.proof[host] = awake
            self.left.discard(host)
            self.newest[host, *who] = 0
            self.acked_at = {k: v for k, v in self.acked_at.items() if k[0] != host}
        assert host not in self.left
        self.heard[host] = awake

    def heartbeat(self, event: HeartbeatSeen, commands: list[Command], awake: float) -> None:
        host, who = event.host, (event.incarnation, event.nonce)
        if self.holder.get(host) != who or host in self.left:
            assert len(commands) == 1
            assert isinstance(commands[0], SendRefusal), "fenced, and told so"
            return
        if event.seq <= self.newest[host, *who]:
            assert commands == [], "the past changes nothing"
            return
        assert commands[0] == SendAck(event.session, event.seq)
        assert commands[-1] == TakeReports(host, event.engines)
        assert self.members.session(host) == event.session
        self.newest[host, *who] = event.seq
        self.heard[host] = awake
        proofs = [at for (h, i, n, seq), at in self.acked_at.items() if (h, i, n) == (host, *who) and seq <= event.acked]
        self.proof[host] = max([self.proof[host], *proofs])
        self.acked_at = {k: v for k, v in self.acked_at.items() if k[0] != host or k[3] > event.acked}
        self.acked_at[host, *who, event.seq] = awake

    def after(self, event: Event, states: dict[HostId, HostState], awake: float) -> None:
        assert {h.id for h in self.members.hosts} == set(self.holder), "a host has one seat, or none"
        worse = [S.ONLINE, S.SUSPECT, S.SILENT]
        for view in self.members.hosts:
            assert (view.state is S.LEFT) is (view.id in self.left)
            assert view.incarnation == self.holder[view.id][0]
            was = states.get(view.id, view.state)
            if was in worse and view.state in worse and view.state is not was:
                by_tick = worse.index(view.state) > worse.index(was)
                assert isinstance(event, Tick if by_tick else HeartbeatSeen | HelloSeen)
            if isinstance(event, Tick):
                silent_s = awake - self.proof[view.id]
                assert view.state is not S.ONLINE or silent_s < SUSPECT_S + 1e-6
                assert view.state is not S.SUSPECT or silent_s < SILENT_S + 1e-6
                assert view.state not in {S.SUSPECT, S.SILENT} or silent_s >= -1e-6


class Walk:
    """Hosts whose agents are killed, cloned, cut off, restarted and revoked, and messages that come late, twice or never."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.members = Members()
        self.oracle = Oracle(self.members)
        self.now = 0.0
        self.hosts = [HostId(f"box-{n}") for n in range(3)]
        self.last = dict.fromkeys(self.hosts, 0)
        self.senders: list[Sender] = []
        self.seen: set[str] = set()

    def step(self) -> None:
        chance = self.chance
        self.now += chance.choice((0.0, 0.01, 0.05, 0.1, 0.25))
        event = self.event()
        for command in self.oracle.watch(event, self.now):
            self.seen.add(type(command).__name__)
            if isinstance(command, SendAck) and chance.random() < 0.8:
                for sender in self.senders:
                    if isinstance(event, HeartbeatSeen) and sender.nonce == event.nonce:
                        sender.acked = max(sender.acked, command.seq)
        if isinstance(event, Tick):
            due = self.members.next_deadline()
            assert due is None or due > self.now
        self.seen |= {str(h.state) for h in self.members.hosts}

    def event(self) -> Event:
        chance = self.chance
        kind = chance.random()
        if kind < 0.2:
            return Tick()
        if kind < 0.203:
            lag = chance.choice((0.6, 3.0))
            self.now += lag
            return Stalled(lag)
        if kind < 0.204:
            self.now += 5.0
            return Tick()
        if kind < 0.206:
            host = chance.choice(self.hosts)
            self.last[host] = 0
            return HostRevoked(host)
        if len(self.senders) < 3 or kind < 0.22:
            self.another()
        return chance.choice(self.senders).say(chance)

    def another(self) -> None:
        chance = self.chance
        if len(self.senders) >= 6:
            self.senders.pop(chance.randrange(len(self.senders)))
        host = chance.choice(self.hosts)
        old = chance.random()
        self.last[host] += old >= 0.3  # else a clone, or a copy of an older directory
        incarnation = max(0, self.last[host] - (old < 0.1))
        self.senders.append(Sender(host, incarnation, f"n{chance.randrange(10**9)}", b"%d" % chance.randrange(10**9)))


def a_hundred_thousand_events() -> set[str]:
    seen: set[str] = set()
    for seed in range(20):
        walk = Walk(seed)
        for _ in range(5000):
            walk.step()
        seen |= walk.seen
    return seen


def test_a_hundred_thousand_random_events_keep_every_invariant() -> None:
    seen = a_hundred_thousand_events()
    assert seen >= {c.__name__ for c in (SendWelcome, SendRefusal, SendAck, TakeReports, PublishHost, ForgetHost)}
    assert seen >= {str(s) for s in HostState}


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_welcome_again", lambda self, seat, event, now: self._seat_anew(event, now)),
        ("_prove", lambda _self, seat, acked: setattr(seat, "proved_at", seat.heard_at)),
        ("_fence", lambda _self, event: [SendAck(event.session, event.seq)]),
        ("_tick", lambda _self, event, now: []),
    ],
)
def test_the_walk_notices_when_a_defence_is_off(monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Any]) -> None:
    monkeypatch.setattr(Members, name, broken)
    monkeypatch.setattr(machine, "_MOVES", {**machine._MOVES, Tick: Members._tick})
    with pytest.raises(AssertionError):
        a_hundred_thousand_events()


# --- in pairs: agents and the machine, bytes and a bad network in between

LINK_LOST_S = 2.0
RETRY_S = 0.2


class Network:
    """Delivers in virtual time: late, twice, in another order, or not at all."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.cut: dict[str, bool] = defaultdict(bool)
        self.loss = 0.0
        self.delay_s = 0.001

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (when, next(self.order), do))

    def send(self, link: str, deliver: Callable[[], None]) -> None:
        chance = self.chance
        for _ in range(2 if chance.random() < self.loss / 2 else 1):
            if not self.cut[link] and chance.random() >= self.loss:
                self.at(self.now + chance.uniform(0.0, self.delay_s), deliver)

    def run_until(self, end: float) -> None:
        while self.queue and self.queue[0][0] <= end:
            self.now, _, do = heapq.heappop(self.queue)
            do()
        self.now = end


class Router:
    """The machine with its sockets and its beat left away."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.members = Members()
        self.oracle = Oracle(self.members)
        self.back: dict[bytes, Callable[[bytes], None]] = {}
        self.online_s: dict[HostId, float] = defaultdict(float)
        self.taken: dict[HostId, tuple[EngineReport, ...]] = {}
        net.at(0.05, self.beat)

    def beat(self) -> None:
        due = self.members.next_deadline()
        if due is not None and self.net.now >= due:
            self.feed(Tick())
        self.net.at(self.net.now + 0.05, self.beat)

    def hear(self, host: HostId, session: bytes, frame: bytes) -> None:
        message: ToRouter = to_router.decode(frame)
        match message:
            case Hello():
                self.feed(HelloSeen(host, session, message.incarnation, message.nonce, "", message.release, message.engines))
            case Heartbeat():
                self.feed(HeartbeatSeen(host, session, message.incarnation, message.nonce, message.seq, message.acked, message.engines))
            case Goodbye():
                self.feed(GoodbyeSeen(host, message.incarnation, message.nonce, message.engines_stay))

    def feed(self, event: Event) -> None:
        for command in self.oracle.watch(event, self.net.now):
            match command:
                case SendWelcome(session=session):
                    self.back[session](encode(Welcome("r")))
                case SendAck(session=session, seq=seq):
                    self.back[session](encode(Ack(seq)))
                case SendRefusal(session=session, reason=reason, final=final):
                    self.back[session](encode(Refused(reason, final)))
                case TakeReports(host=host, engines=engines):
                    self.taken[host] = engines


class Agent:
    """What the real one does with its link, without its engines."""

    def __init__(self, net: Network, router: Router, host: HostId, incarnation: int, nonce: str) -> None:
        self.net, self.router, self.host, self.incarnation, self.nonce = net, router, host, incarnation, nonce
        self.seq = self.acked = 0
        self.links = 0
        self.alive = True
        self.out_for_good = ""
        self.refused = 0
        self.open()

    def open(self) -> None:
        self.links += 1
        self.joined = False
        self.acked_at = self.net.now
        self.session = f"{self.host}/{self.nonce}/{self.links}".encode()
        self.router.back[self.session] = lambda frame, link=self.links: self.net.send(  # type: ignore[misc]
            f"to {self.host}", lambda: self.hear(link, frame)
        )
        self.net.at(self.net.now, lambda link=self.links: self.beat(link))  # type: ignore[misc]

    def beat(self, link: int) -> None:
        if not self.alive or link != self.links:
            return
        if self.net.now - self.acked_at > LINK_LOST_S:
            self.net.at(self.net.now + RETRY_S, self.open)
            self.links += 1
            return
        engines = (report(f"{self.nonce}-{self.seq}"),)
        if self.joined:
            self.seq += 1
            self.say(Heartbeat(self.incarnation, self.nonce, self.seq, self.acked, engines))
        else:
            self.say(Hello(self.host, self.incarnation, self.nonce, "", engines))
        self.net.at(self.net.now + BEAT_S, lambda: self.beat(link))

    def say(self, message: Hello | Heartbeat | Goodbye) -> None:
        session, frame = self.session, encode(message)
        self.net.send(f"from {self.host}", lambda: self.router.hear(self.host, session, frame))

    def hear(self, link: int, frame: bytes) -> None:
        if not self.alive or link != self.links:
            return
        message: ToHost = to_host.decode(frame)
        match message:
            case Welcome():
                self.joined, self.acked_at = True, self.net.now
            case Ack(seq=seq):
                self.acked, self.acked_at = max(self.acked, seq), self.net.now
            case Refused(reason=reason, final=True):
                self.alive, self.out_for_good = False, reason
            case Refused():
                self.refused += 1
                self.links += 1
                self.net.at(self.net.now + RETRY_S, self.open)


def assert_all_online(router: Router, agents: list[Agent]) -> None:
    for agent in agents:
        assert router.members.state(agent.host) is S.ONLINE
        assert router.taken[agent.host][0].id.startswith(f"{agent.nonce}-")
        assert router.members.session(agent.host) == agent.session
        assert agent.joined


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_network_did_to_them_they_heal(seed: int) -> None:
    """Loss, doubles, disorder, cuts in one or both directions and restarts for half a minute; three good seconds later all is well."""
    net = Network(seed)
    router = Router(net)
    agents = [Agent(net, router, HostId(f"box-{n}"), 1, f"n{n}") for n in range(4)]
    chance = random.Random(seed)
    for _ in range(3):
        net.loss, net.delay_s = chance.choice((0.0, 0.1, 0.4)), chance.choice((0.001, 0.1, 0.6))
        for _ in range(20):
            agent = chance.choice(agents)
            link = chance.choice((f"to {agent.host}", f"from {agent.host}"))
            net.cut[link] = not net.cut[link]
            if chance.random() < 0.1:
                agent.alive = False
                agents.remove(agent)
                agents.append(Agent(net, router, agent.host, agent.incarnation + 1, f"{agent.nonce}x"))
            net.run_until(net.now + 0.5)
        net.loss, net.delay_s = 0.0, 0.005
        net.cut.clear()
        net.run_until(net.now + LINK_LOST_S + RETRY_S + 2.0)
        assert_all_online(router, agents)
        assert not any(a.out_for_good for a in agents)


def test_a_little_loss_and_jitter_make_nobody_suspect() -> None:
    """What TCP leaves of 1 % loss: now and then a quarter of a second of delay."""
    net = Network(5)
    router = Router(net)
    agents = [Agent(net, router, HostId(f"box-{n}"), 1, f"n{n}") for n in range(8)]
    net.delay_s = 0.05
    net.run_until(120.0)
    assert_all_online(router, agents)
    assert [what for _, _, what in router.members.history] == ["incarnation 1 joined"] * 8


def test_a_clone_and_its_original_do_not_take_the_seat_from_each_other() -> None:
    net = Network(1)
    router = Router(net)
    original = Agent(net, router, BOX, 3, "original")
    net.run_until(1.0)
    clone = Agent(net, router, BOX, 3, "clone")
    net.run_until(60.0)
    assert clone.refused > 50
    assert_all_online(router, [original])
    assert [what for _, what in router.members.story(BOX)] == ["incarnation 3 joined"]
    original.alive = False
    net.run_until(62.0)
    assert_all_online(router, [clone])


@pytest.mark.parametrize("direction", ["to", "from", "both"])
def test_cuts_of_a_link_are_bounded_and_heal_within_three_seconds(direction: str) -> None:
    net = Network(2)
    router = Router(net)
    agent = Agent(net, router, BOX, 1, "n")
    net.run_until(5.1)
    for way in ("to", "from") if direction == "both" else (direction,):
        net.cut[f"{way} {BOX}"] = True
    net.run_until(5.1 + SUSPECT_S + 0.05)
    assert router.members.state(BOX) is S.SUSPECT
    net.run_until(5.1 + SILENT_S + 0.05)
    assert router.members.state(BOX) is S.SILENT
    net.run_until(30.0)
    assert router.members.state(BOX) is S.SILENT
    net.cut.clear()
    net.run_until(33.0)
    assert_all_online(router, [agent])
