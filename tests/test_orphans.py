"""Work that no entry explains, as a machine: when it is believed to be there, what is done, and what is left alone."""

from __future__ import annotations

import itertools
import random

import pytest

from disagg.cluster.orphans import (
    GRACE_BESIDE_S,
    GRACE_S,
    LATE_S,
    REPEAT_MOST_S,
    RETRY_S,
    RIDS_KEPT,
    STAYS_S,
    AbortAll,
    AbortRids,
    Command,
    Ended,
    Event,
    Found,
    Gone,
    Looked,
    Met,
    Orphans,
    Phase,
    ReapAsked,
    Restart,
    Stalled,
    Unseen,
)
from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Role
from disagg.policy.holds import Hold, Unexplained, accounts, why_kept
from disagg.status import kv_table

E = EngineId("e")
STEP_S = 0.25


def look(requests: int, entries: int = 0, *, process: int = 7, lone: bool = True) -> Looked:
    return Looked(process, requests, requests * 100, entries, lone)


class Life:
    """A machine that is told four times a second how its engine is."""

    def __init__(self) -> None:
        self.made = Orphans(E)
        self.now = 1000.0
        self.said: list[tuple[float, Command]] = []

    def tell(self, event: Event) -> list[Command]:
        commands = self.made.handle(event, now=self.now)
        self.made.check()
        self.said += [(self.now, command) for command in commands]
        return commands

    def run(self, seconds: float, event: Event) -> list[Command]:
        """The same look again and again; what was said to it."""
        began = len(self.said)
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            self.tell(event)
        return [command for _, command in self.said[began:]]

    def first(self, kind: type[Command]) -> float:
        return next(at for at, command in self.said if isinstance(command, kind))


@pytest.fixture
def life() -> Life:
    made = Life()
    assert made.tell(look(0)) == []
    return made


def test_work_that_entries_explain_is_no_orphan(life: Life) -> None:
    assert life.run(60.0, look(3, 3)) == []
    assert life.run(60.0, look(2, 5)) == []
    assert life.made.next_deadline() is None


def test_a_strangers_work_is_found_after_the_grace_and_aborted_whole(life: Life) -> None:
    began = life.now
    assert life.run(GRACE_S, look(2)) == []
    assert life.made.unexplained(life.now) is None, "not an orphan yet"
    assert life.run(STEP_S, look(2)) == [Found(E, 2, 200, GRACE_S), AbortAll(E)]
    assert life.now - began <= GRACE_S + STEP_S
    shown = life.made.unexplained(life.now)
    assert shown == Unexplained(2, 200, GRACE_S, "2 requests run there that nobody sent; they are being aborted")
    assert life.run(STEP_S, look(0)) == [Gone(E, 2, GRACE_S + STEP_S)]
    assert life.made.phase is Phase.CLEAN


def test_what_an_engine_said_before_our_work_ended_accuses_nobody(life: Life) -> None:
    life.run(10.0, look(8, 8))
    assert life.run(LATE_S, look(8, 0)) == [], "a report may be so old"
    assert life.made.phase is Phase.CLEAN
    assert life.run(30.0, look(0, 0)) == []


def test_five_seconds_after_our_last_entry_the_rest_is_an_orphan(life: Life) -> None:
    life.run(10.0, look(8, 8))
    ended = life.now
    life.run(10.0, look(3, 0))
    assert 5.0 <= life.first(AbortAll) - ended <= 5.0 + 2 * STEP_S


def test_beside_our_work_more_patience_and_never_an_abort_of_everything(life: Life) -> None:
    life.run(10.0, look(4, 4))
    began = life.now
    life.tell(Ended(("a", "b")))
    commands = life.run(20.0, look(6, 4))
    assert commands[:2] == [Found(E, 2, 200, GRACE_BESIDE_S), AbortRids(E, ("a", "b"))]
    assert life.first(Found) - began >= GRACE_BESIDE_S
    assert not any(isinstance(c, AbortAll) for c in commands)
    assert isinstance(life.run(STEP_S, look(4, 4))[-1], Gone)


def test_counts_that_are_off_now_and_then_accuse_nobody(life: Life) -> None:
    for _ in range(40):
        assert life.run(1.0, look(6, 4)) == []
        assert life.run(STEP_S, look(6, 6)) == []


def test_rids_of_what_failed_there_come_first_and_everything_after(life: Life) -> None:
    life.tell(Ended(("a",)))
    life.tell(Ended(("b", "a")))
    commands = life.run(GRACE_S + 2.0, look(1))
    assert commands == [Found(E, 1, 100, GRACE_S), AbortRids(E, ("a", "b")), AbortRids(E, ("a", "b")), AbortAll(E)]


def test_aborts_are_repeated_ever_more_seldom_and_then_it_is_to_be_started_anew(life: Life) -> None:
    life.run(GRACE_S + STAYS_S + 2 * RETRY_S + REPEAT_MOST_S + 1.0, look(1))
    found = life.first(Found)
    aborts = [at for at, c in life.said if isinstance(c, AbortAll)]
    assert [round(b - a, 2) for a, b in itertools.pairwise(aborts)][:4] == [1.0, 2.0, 4.0, 8.0]
    restarts = [at for at, c in life.said if isinstance(c, Restart)]
    assert STAYS_S <= restarts[0] - found <= STAYS_S + REPEAT_MOST_S
    assert len(restarts) >= 3, "one that was refused is asked for again"
    shown = life.made.unexplained(life.now)
    assert shown is not None
    assert "started anew" in shown.note


def test_a_new_process_has_none_of_the_old_ones_orphans(life: Life) -> None:
    life.tell(Ended(("a",)))
    life.run(GRACE_S + STAYS_S + 10.0, look(1))
    assert isinstance(life.said[-1][1], Restart | AbortRids | AbortAll)
    assert life.run(20.0, Unseen()) == []
    assert life.made.unexplained(life.now) is not None, "nobody knows yet what became of it"
    (gone,) = life.run(STEP_S, look(0, process=8))
    assert isinstance(gone, Gone)
    assert life.run(GRACE_S + 1.0, look(1, process=8))[1:] == [AbortAll(E)], "no rids of the dead"


def test_an_engine_that_is_met_with_work_is_freed_at_once() -> None:
    made = Orphans(E)
    assert made.handle(Met(look(20)), now=5.0) == [Found(E, 20, 2000, 0.0), AbortAll(E)]
    made.check()
    idle = Orphans(E)
    assert idle.handle(Met(look(0)), now=5.0) == []
    idle.check()
    attached = Orphans(E)
    assert attached.handle(Met(look(20, lone=False)), now=5.0) == []
    attached.check()


def test_an_engine_that_may_have_other_clients_loses_only_what_was_ours(life: Life) -> None:
    assert life.run(100.0, look(5, lone=False)) == []
    life.tell(Ended(("a",)))
    assert life.run(100.0, look(5, lone=False)) == [AbortRids(E, ("a",))]
    assert life.made.unexplained(life.now) is None


def test_a_person_need_not_wait(life: Life) -> None:
    assert life.tell(ReapAsked()) == []
    life.run(STEP_S, look(2))
    assert life.tell(ReapAsked()) == [Found(E, 2, 200, 0.0), AbortAll(E)]
    assert life.tell(ReapAsked()) == [AbortAll(E)]


def test_time_in_which_nobody_looked_is_no_patience_lost(life: Life) -> None:
    life.run(1.0, look(2))
    life.now += 60.0
    life.tell(Stalled(60.0))
    assert life.run(1.0, look(2)) == []
    assert isinstance(life.run(1.0, look(2))[0], Found)


def test_an_engine_that_was_not_heard_is_not_started_anew_on_its_first_word(life: Life) -> None:
    life.run(GRACE_S + 1.0, look(2))
    life.run(100.0, Unseen())
    assert not any(isinstance(c, Restart) for c in life.run(STAYS_S / 2, look(2)))
    assert any(isinstance(c, Restart) for c in life.run(STAYS_S, look(2)))


def test_what_is_remembered_is_bounded(life: Life) -> None:
    for number in range(3 * RIDS_KEPT):
        life.tell(Ended((f"r{number}",)))
    commands = life.run(GRACE_S + 1.0, look(1))
    (asked,) = {c.rids for c in commands if isinstance(c, AbortRids)}
    assert (len(asked), asked[-1]) == (RIDS_KEPT, f"r{3 * RIDS_KEPT - 1}")
    life.run(1.0, look(0))
    life.run(400.0, look(0))
    life.tell(Ended(("new",)))
    assert AbortRids(E, ("new",)) in life.run(GRACE_S + 1.0, look(1))


@pytest.mark.parametrize("seed", range(30))
def test_at_random_entries_are_never_swept_away_and_orphans_always_end(seed: int) -> None:
    """An engine whose reports are up to 2.4 s old, with work of ours that comes and goes and strangers now and then."""
    chance = random.Random(seed)
    life = Life()
    ours, strangers, deaf = 0, 0, False
    seen: list[int] = [0] * 10
    since: float | None = None
    for step in range(2400):
        life.now += STEP_S
        is_quiet = step % 1200 >= 600  # nobody comes for long enough to see that every orphan ends
        ours = (
            0
            if is_quiet
            else max(0, ours + chance.choice((-2, -1, 0, 0, 1, 2)))
            if chance.random() < 0.5
            else ours * (chance.random() > 0.05)
        )
        if chance.random() < 0.01 and not is_quiet:
            strangers, deaf = chance.randrange(1, 5), chance.random() < 0.5
        seen = [*seen[1:], ours + strangers]
        if chance.random() < 0.01:
            life.tell(chance.choice((Unseen(), Stalled(3.0), ReapAsked(), Ended(("x",)))))
        for command in life.tell(look(seen[-chance.randrange(1, 10)], ours)):
            match command:
                case AbortAll():
                    assert ours == 0, "ours would end with the rest"
                    strangers = strangers if deaf else 0
                case Restart():
                    assert strangers, "started anew for nothing"
                    strangers, deaf = 0, False
        since = None if not strangers or ours else since or life.now
        assert since is None or life.now - since < 2 * (STAYS_S + RETRY_S), repr(life.made)


# --- what people are shown, and which engine may end


def engine(name: str, role: Role = Role.DECODE, state: EngineState = EngineState.READY, **load: int) -> EngineView:
    return EngineView(EngineAddress(EngineId(name), role, "h", 1), 0, state, EngineFacts(model="m"), EngineLoad(**load))


def test_an_account_is_what_is_used_and_what_of_it_holds_explain() -> None:
    view = ClusterView.of([engine("d", kv_used_tokens=900, kv_quarantined_tokens=100, kv_total_tokens=4096), engine("d2")])
    hold = Hold("r" * 32, ("a", "b"), EngineId("d"), Role.DECODE, "decoding", 1.26, tokens=300, requests=2)
    found = accounts(view, [hold, hold], {EngineId("d"): Unexplained(1, 200, 6.0, "one is too many")})
    first = found[0]
    assert (first.capacity_tokens, first.used_tokens, first.explained_tokens, first.drift_tokens) == (4096, 800, 600, 200)
    assert (first.quarantined_tokens, first.orphan_tokens, first.orphan_for_s, first.note) == (100, 200, 6.0, "one is too many")
    assert found[1].used_tokens == found[1].orphan_tokens == 0


def test_the_table_says_who_holds_what() -> None:
    numbers = dict.fromkeys(("capacity_tokens", "used_tokens", "explained_tokens", "drift_tokens", "quarantined_tokens"), 0)
    row = {"id": "d", **numbers, "orphan_tokens": 64, "orphan_for_s": 7.25, "note": "they are being aborted"}
    hold = {"request": "abc", "rids": ["x", "y"], "engine": "d", "leg": "decode", "phase": "decoding", "age_s": 2.0, "tokens": 0}
    text = kv_table({"holds": [hold], "engines": [row], "reaped": 3})
    assert "64" in text
    assert "7.2 s  they are being aborted" in text
    assert "abc      d       decode  decoding  2.0 s  -       x and 1 more" in text
    assert text.endswith("Holds: 1. Requests that no hold explained, reaped since the router started: 3.")
    assert kv_table({"holds": [], "engines": [], "reaped": 0}).startswith("Holds: 0.")


@pytest.mark.parametrize(
    ("others", "changing", "why"),
    [
        ([engine("d2")], (), ""),
        ([], (), "it is the last decode engine of its pool that serves"),
        ([engine("d2", state=EngineState.SUSPECT)], (), "it is the last decode engine of its pool that serves"),
        ([engine("p", Role.PREFILL)], (), "it is the last decode engine of its pool that serves"),
        ([engine("d2"), engine("d3")], ("d2",), "d2 of the same pool is being changed"),
        ([engine("d2")], ("d",), "it is being changed already"),
        ([engine("d2"), engine("p", Role.PREFILL)], ("p",), ""),
    ],
)
def test_an_engine_ends_only_if_its_pool_can_do_without(others: list[EngineView], changing: tuple[str, ...], why: str) -> None:
    mine = engine("d")
    assert why_kept(mine, [mine, *others], [EngineId(name) for name in changing]) == why
