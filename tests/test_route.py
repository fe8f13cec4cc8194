"""Choosing a pair: a function of the view and of what is in flight."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from disagg.errors import NoCapacityError, UnknownModelError
from disagg.model import (
    Choice,
    ClusterView,
    EngineAddress,
    EngineFacts,
    EngineId,
    EngineState,
    EngineView,
    HostId,
    HostState,
    HostView,
    Pool,
    Role,
)
from disagg.policy.cost import Line, at, square
from disagg.policy.forecast import READS, STEPS, Forecast, Outlook, Reading
from disagg.policy.route import InFlight, choose, pool_of

P, D, U = Role.PREFILL, Role.DECODE, Role.UNIFIED
S = EngineState


def view(*engines: tuple[Role, str], down: Iterable[int] = ()) -> ClusterView:
    """Engines by role and model, ready unless their slot is `down`."""
    down = set(down)
    return ClusterView.of(
        EngineView(
            EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1),
            slot,
            EngineState.DEAD if slot in down else EngineState.READY,
            EngineFacts(model=model),
        )
        for slot, (role, model) in enumerate(engines)
    )


def pool(*roles: Role) -> Pool:
    return view(*((r, "m") for r in roles)).pools["m"]


def loads(*now: int, turn: tuple[int, ...] = ()) -> InFlight:
    made = InFlight()
    made.now = list(now)
    made.turn = list(turn or [0] * len(now))
    return made


def chosen(pool: Pool, in_flight: InFlight, exclude: Iterable[str] = ()) -> tuple[str | None, str]:
    choice = choose(pool, in_flight, exclude={EngineId(e) for e in exclude})
    return (choice.prefill.id if choice.prefill else None), choice.decode.id


def test_a_request_that_a_pair_must_not_see_goes_to_a_unified_engine_however_loaded() -> None:
    choice = choose(pool(P, D, U), loads(0, 0, 9), unified_only=True)
    assert (choice.prefill, choice.decode.id) == (None, "unified-2")
    with pytest.raises(NoCapacityError):
        choose(pool(P, D), loads(0, 0), unified_only=True)


# --- which pool


def test_a_model_has_its_own_pool() -> None:
    both = view((P, "a"), (D, "a"), (U, "b"))
    assert [e.id for e in pool_of(both, "a").decode] == ["decode-1"]
    assert [e.id for e in pool_of(both, "b").unified] == ["unified-2"]


def test_without_a_name_the_only_model_is_meant() -> None:
    assert pool_of(view((U, "a")), "").unified[0].id == "unified-0"


def test_without_a_name_and_with_several_models_the_client_must_choose() -> None:
    with pytest.raises(UnknownModelError, match=r"name the model: several are served; there is a, b"):
        pool_of(view((U, "a"), (U, "b")), "")


def test_an_unknown_model_is_named_with_those_that_exist() -> None:
    with pytest.raises(UnknownModelError, match=r"no engine serves the model 'c'; there is a, b") as caught:
        pool_of(view((U, "a"), (U, "b")), "c")
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


@pytest.mark.parametrize("asked", ["a", ""])
@pytest.mark.parametrize("down", [{0}, {1}, {0, 1}])
def test_a_known_model_whose_engines_are_down_is_no_capacity_and_not_unknown(asked: str, down: set[int]) -> None:
    with pytest.raises(NoCapacityError) as caught:
        pool_of(view((P, "a"), (D, "a"), down=down), asked)
    assert caught.value.retry_after_s >= 1
    assert "no ready" in str(caught.value)


@pytest.mark.parametrize("asked", ["a", ""])
def test_without_engines_there_is_no_capacity(asked: str) -> None:
    with pytest.raises(NoCapacityError, match="no engine is configured"):
        pool_of(ClusterView(), asked)


def test_a_model_that_only_half_a_pair_serves_is_no_capacity_while_another_is_served() -> None:
    with pytest.raises(NoCapacityError, match="'a'"):
        pool_of(view((P, "a"), (U, "b")), "a")


def test_a_long_name_is_cut_in_the_sentence() -> None:
    with pytest.raises(UnknownModelError) as caught:
        pool_of(view((U, "a")), "x" * 5000)
    assert len(str(caught.value)) < 200


# --- what is missing


def states(*parts: tuple[Role, EngineState, str]) -> ClusterView:
    return ClusterView.of(
        EngineView(EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1), slot, state, EngineFacts(model=model))
        for slot, (role, state, model) in enumerate(parts)
    )


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "no engine is configured"),
        ([(P, S.READY, "a"), (D, S.READY, "a")], ""),
        ([(U, S.READY, "a")], ""),
        ([(P, S.READY, "a"), (D, S.READY, "b")], "prefill-0 is never paired with decode-1: they serve different models, a and b"),
        ([(P, S.READY, "a"), (D, S.DEAD, "a")], "no ready decode engine (prefill-0 ready, decode-1 dead)"),
        ([(P, S.SUSPECT, "a"), (D, S.READY, "a")], "no ready prefill engine"),
        ([(U, S.STARTING, "")], "no ready prefill and no ready decode engine (unified-0 starting)"),
    ],
)
def test_the_view_says_what_is_missing(parts: list[tuple[Role, EngineState, str]], why: str) -> None:
    sentence = states(*parts).why_not_ready()
    assert why in sentence
    assert bool(sentence) is bool(why)


def test_a_router_that_hosts_may_join_says_that_it_waits_for_them() -> None:
    assert "no host has joined yet" in ClusterView.of((), may_join=True).why_not_ready()
    hosts = (HostView(HostId("box-1"), HostState.ONLINE), HostView(HostId("box-2"), HostState.LEFT))
    waiting = ClusterView.of((), hosts, may_join=True).why_not_ready()
    assert waiting == "no engine is there: the hosts that have joined (box-1, box-2) report none"


# --- which of them may be paired

WHOLE = EngineFacts("m", "a" * 64, 64, 8192, 1024, "0.5.3", "bfloat16", 2)
OTHERS: dict[str, tuple[EngineFacts, str]] = {
    "model hash": (replace(WHOLE, model_hash="b" * 64), "model hash aaaaaaaaaaaa against bbbbbbbbbbbb"),
    "page size": (replace(WHOLE, page_size=16), "page size 64 against 16"),
    "dtype": (replace(WHOLE, dtype="fp8_e5m2"), "KV precision bfloat16 against fp8_e5m2"),
    "tp": (replace(WHOLE, tp_size=4), "tensor parallelism 2 against 4"),
    "version": (replace(WHOLE, version="0.6.0"), "engine version 0.5 against 0.6"),
}


def engines(*kinds: tuple[Role, EngineFacts]) -> ClusterView:
    return ClusterView.of(
        EngineView(EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1), slot, S.READY, facts)
        for slot, (role, facts) in enumerate(kinds)
    )


def test_engines_of_one_kind_are_one_pool_without_islands() -> None:
    alike = [WHOLE, replace(WHOLE, version="0.5.9"), EngineFacts("m"), replace(WHOLE, context_tokens=1, kv_bytes_per_token=0)]
    seen = engines(*((role, facts) for role in (P, D) for facts in alike))
    assert seen.pools["m"].islands == ()
    assert {e.unpaired for e in seen.engines} == {""}


@pytest.mark.parametrize("what", OTHERS)
def test_engines_that_differ_are_never_paired_and_the_reason_is_said(what: str) -> None:
    other, why = OTHERS[what]
    seen = engines((P, WHOLE), (D, other))
    assert not seen.pools["m"].can_serve
    assert seen.engines[0].unpaired == f"is never paired with decode-1: {why}"
    assert seen.engines[1].unpaired.startswith("is never paired with prefill-0: ")
    assert seen.why_not_ready() == f"no pair can be made: prefill-0 is never paired with decode-1: {why}"
    with pytest.raises(NoCapacityError, match="never paired"):
        pool_of(seen, "m")


@pytest.mark.parametrize("what", OTHERS)
def test_each_goes_with_its_own_kind_to_the_least_loaded_island(what: str) -> None:
    other = OTHERS[what][0]
    seen = engines((P, WHOLE), (P, other), (D, WHOLE), (D, other), (D, other))
    found = pool_of(seen, "m")
    assert [([p.id for p in i.prefill], [d.id for d in i.decode]) for i in found.islands] == [
        (["prefill-0"], ["decode-2"]),
        (["prefill-1"], ["decode-3", "decode-4"]),
    ]
    assert {e.unpaired for e in seen.engines} == {""}
    assert chosen(found, loads(0, 1, 1, 5, 0)) == ("prefill-0", "decode-2")
    assert chosen(found, loads(1, 1, 1, 5, 0)) == ("prefill-1", "decode-4")
    assert chosen(found, loads(0, 9, 0, 9, 9), exclude={"decode-2"}) == ("prefill-1", "decode-3")
    with pytest.raises(NoCapacityError):
        chosen(found, loads(0, 0, 0, 0, 0), exclude={"decode-2", "prefill-1"})


def test_one_that_says_nothing_of_itself_does_not_bring_those_together_that_differ() -> None:
    mute, other = EngineFacts("m"), OTHERS["page size"][0]
    seen = engines((P, mute), (P, WHOLE), (D, WHOLE), (D, other))
    for now in ((0, 0, 0, 0), (9, 0, 9, 0), (0, 9, 9, 0)):
        prefill, decode = chosen(seen.pools["m"], loads(*now))
        assert (prefill, decode) != ("prefill-1", "decode-3")
    assert chosen(seen.pools["m"], loads(0, 9, 9, 0)) == ("prefill-0", "decode-3")
    assert {e.unpaired for e in seen.engines} == {""}


def test_the_order_of_engines_does_not_make_a_pair_impossible() -> None:
    """A silent prefill engine could go with either; the other one must not be its only reason to be."""
    mute, other = EngineFacts("m"), OTHERS["dtype"][0]
    seen = engines((P, mute), (P, WHOLE), (D, other))
    assert chosen(seen.pools["m"], loads(5, 0, 0)) == ("prefill-0", "decode-2")
    assert [bool(e.unpaired) for e in seen.engines] == [False, True, False]


def test_a_unified_engine_belongs_to_no_island_and_serves_all_the_same() -> None:
    seen = engines((P, WHOLE), (D, OTHERS["tp"][0]), (U, OTHERS["version"][0]))
    assert chosen(pool_of(seen, "m"), loads(0, 0, 9)) == (None, "unified-2")
    assert seen.why_not_ready() == ""
    assert [bool(e.unpaired) for e in seen.engines] == [True, True, False]


def test_nobody_is_unpaired_for_want_of_a_ready_partner() -> None:
    down = states((P, S.READY, "a"), (D, S.STARTING, "b"), (U, S.READY, "a"))
    assert {e.unpaired for e in down.engines} == {""}
    dead = states((P, S.READY, "a"), (D, S.DEAD, "a"), (P, S.READY, "b"), (D, S.READY, "b"))
    assert {e.unpaired for e in dead.engines} == {""}, "its partner is only dead for now"


def test_a_silent_version_of_a_word_is_still_compared() -> None:
    assert "engine version main against 0.5" in replace(WHOLE, version="main").why_not_paired_with(WHOLE)


def test_no_two_engines_that_differ_are_ever_paired() -> None:
    chance = random.Random(11)
    for _ in range(400):
        kinds = [
            EngineFacts(
                "m", chance.choice(("", "x", "y")), chance.choice((0, 16, 64)), version=chance.choice(("", "1.0.1", "1.1.0")), tp_size=2
            )
            for _ in range(chance.randrange(2, 8))
        ]
        seen = engines(*((chance.choice((P, D)), facts) for facts in kinds))
        counts = loads(*(chance.randrange(4) for _ in kinds))
        possible = [
            (p, d)
            for p in seen.engines
            for d in seen.engines
            if p.address.role is P and d.address.role is D and not p.facts.why_not_paired_with(d.facts)
        ]
        assert seen.pools["m"].can_pair is bool(possible)
        for engine in seen.engines:
            partners = [e for e in seen.engines if e.address.role not in {engine.address.role, U}]
            alone = bool(partners) and not any(engine.id in {p.id, d.id} for p, d in possible)
            assert bool(engine.unpaired) is alone
        if possible:
            choice = choose(seen.pools["m"], counts)
            assert choice.prefill is not None
            assert not choice.prefill.facts.why_not_paired_with(choice.decode.facts)
            least = min(counts.now[p.slot] + counts.now[d.slot] for p, d in possible)
            assert counts.now[choice.prefill.slot] + counts.now[choice.decode.slot] == least


# --- which engines


def test_the_least_loaded_of_each_role() -> None:
    assert chosen(pool(P, P, D, D), loads(3, 1, 2, 5)) == ("prefill-1", "decode-2")


def test_equal_loads_go_to_the_one_not_used_for_longest_and_then_to_the_lower_slot() -> None:
    assert chosen(pool(P, P, D, D), loads(1, 1, 0, 0, turn=(9, 4, 7, 7))) == ("prefill-1", "decode-2")


def test_a_unified_engine_is_taken_where_it_has_less_to_do_than_decode() -> None:
    assert chosen(pool(P, D, U), loads(0, 1, 0)) == (None, "unified-2")
    assert chosen(pool(P, D, U), loads(0, 1, 1)) == ("prefill-0", "decode-1")


def test_half_a_pair_is_no_pair() -> None:
    assert chosen(pool(P, U), loads(0, 5)) == (None, "unified-1")


def test_engines_that_were_tried_are_left_out() -> None:
    assert chosen(pool(P, P, D), loads(0, 9, 0), exclude={"prefill-0"}) == ("prefill-1", "decode-2")
    assert chosen(pool(P, D, U), loads(0, 0, 9), exclude={"decode-1"}) == (None, "unified-2")


def test_when_all_were_tried_there_is_no_capacity() -> None:
    with pytest.raises(NoCapacityError):
        chosen(pool(P, D), loads(0, 0), exclude={"decode-1"})


def test_a_choice_says_why() -> None:
    assert choose(pool(P, D), loads(2, 3)).reason == "fewest in flight: prefill-0 2, decode-1 3"
    assert choose(pool(P, D, U), loads(0, 4, 1)).reason == "unified-2 has 1 in flight, decode-1 4"
    assert "unified-0" in choose(pool(U), loads(0)).reason


def test_in_flight_grows_without_forgetting() -> None:
    made = InFlight()
    made.grow(1)
    made.start(0)
    made.grow(3)
    made.grow(2)
    assert (made.now, made.turn) == ([1, 0, 0], [1, 0, 0])
    made.end(0)
    assert (made.now, made.turn) == ([0, 0, 0], [1, 0, 0])


def test_an_engine_that_was_away_gets_its_share_and_not_everything() -> None:
    three = pool(D, D, D, P)
    counts = InFlight()
    counts.grow(4)
    for _ in range(1000):
        counts.start(0)
        counts.end(0)
    used: Counter[str] = Counter()
    for _ in range(30):
        decode = choose(three, counts).decode
        used[decode.id] += 1
        counts.start(decode.slot)
        counts.end(decode.slot)
    assert set(used.values()) == {10}


def test_equal_engines_share_evenly_and_the_same_history_gives_the_same_choices() -> None:
    def run(seed: int) -> list[tuple[str | None, str]]:
        chance = random.Random(seed)
        six = pool(P, P, P, D, D, U)
        counts = InFlight()
        counts.grow(6)
        running: list[list[int]] = []
        story: list[tuple[str | None, str]] = []
        for _ in range(2000):
            choice = choose(six, counts)
            slots = [e.slot for e in (choice.prefill, choice.decode) if e is not None]
            least = min(counts.now[s] for s in (3, 4, 5))
            assert counts.now[choice.decode.slot] == least, "never one that has more to do than another"
            for slot in slots:
                counts.start(slot)
            running.append(slots)
            story.append((choice.prefill.id if choice.prefill is not None else None, choice.decode.id))
            while len(running) > 12 or (running and chance.random() < 0.3):
                for slot in running.pop(chance.randrange(len(running))):
                    counts.end(slot)
        used = Counter(prefill for prefill, _ in story if prefill is not None)
        assert max(used.values()) - min(used.values()) < 0.2 * max(used.values())
        assert min(counts.now) >= 0
        return story

    assert run(5) == run(5)


# --- the sick


def treated(
    *roles: Role, ejected: Iterable[str] = (), cut: Iterable[tuple[str, str]] = (), weights: dict[str, float] | None = None
) -> ClusterView:
    return ClusterView.of(
        view(*((role, "m") for role in roles)).engines,
        ejected={EngineId(e): "gets no new work for 5 s: it fails" for e in ejected},
        cut={(EngineId(p), EngineId(d)): "until a probe passes: no first token" for p, d in cut},
        weights={EngineId(e): weight for e, weight in (weights or {}).items()},
    )


def test_an_ejected_engine_is_in_no_pool_and_says_why() -> None:
    seen = treated(P, D, D, ejected=["decode-1"])
    assert [e.id for e in seen.pools["m"].decode] == ["decode-2"]
    assert (seen.engines[1].state, seen.engines[1].reason) == (S.SUSPECT, "gets no new work for 5 s: it fails")
    assert chosen(seen.pools["m"], loads(0, 0, 9)) == ("prefill-0", "decode-2")


def test_an_engine_that_is_not_ready_keeps_its_own_reason() -> None:
    seen = ClusterView.of(view((P, "m"), (D, "m"), down=[1]).engines, ejected={EngineId("decode-1"): "it fails"})
    assert seen.engines[1].state is S.DEAD


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_pair_is_never_chosen_and_both_work_with_others(seed: int) -> None:
    chance = random.Random(seed)
    pool = treated(P, P, D, D, cut=[("prefill-0", "decode-2")]).pools["m"]
    seen = {chosen(pool, loads(*(chance.randrange(5) for _ in range(4)))) for _ in range(200)}
    assert seen == {("prefill-0", "decode-3"), ("prefill-1", "decode-2"), ("prefill-1", "decode-3")}


def test_an_engine_whose_pairs_are_all_cut_says_so() -> None:
    seen = treated(P, P, D, cut=[("prefill-0", "decode-2")])
    assert seen.engines[0].unpaired == "is not paired with decode-2: until a probe passes: no first token"
    assert seen.engines[1].unpaired == ""
    assert seen.pools["m"].can_serve
    assert (seen.quarantined, set(seen.cut)) == ({}, {("prefill-0", "decode-2")})


def test_a_slow_engine_gets_less() -> None:
    pool = treated(P, D, D, weights={"decode-1": 4.0}).pools["m"]
    in_flight = loads(0, 0, 0)
    took: Counter[str] = Counter()
    for _ in range(50):
        choice = choose(pool, in_flight)
        took[choice.decode.id] += 1
        in_flight.start(choice.decode.slot)
    assert took == {"decode-1": 10, "decode-2": 40}


def test_a_slow_unified_engine_is_not_preferred_for_being_idle() -> None:
    pool = treated(P, D, U, weights={"unified-2": 4.0}).pools["m"]
    assert chosen(pool, loads(0, 2, 0)) == ("prefill-0", "decode-1")
    assert chosen(pool, loads(0, 4, 0)) == (None, "unified-2")


# --- by what they will take


class Site:
    """Engines, what is in flight there, and what is foretold of them. Lines are taught by passes and steps.

    Args:
        reads, steps: lines by slot.
        links: seconds for each token, by the slots that read and write.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        reads: dict[int, Line] | None = None,
        steps: dict[int, Line] | None = None,
        links: dict[tuple[int, int], float] | None = None,
    ) -> None:
        self.pool = pool
        slots = 1 + max(engine.slot for engine in (*pool.prefill, *pool.decode, *pool.unified))
        self.in_flight = InFlight()
        self.in_flight.grow(slots)
        self.kv = [0] * slots
        self.forecast = Forecast()
        self.forecast.grow(slots)
        self.now = 0.0
        links = links or {}
        partners = {slot: [d for p, d in links if p == slot] for slot, _ in links}
        for slot in {engine.slot for engine in (*pool.prefill, *pool.unified)}:
            self._teach_reading(slot, (reads or {}).get(slot, READS), partners.get(slot, []), links)
        for engine in (*pool.decode, *pool.unified):
            self._teach_writing(engine.slot, (steps or {}).get(engine.slot, STEPS))
        for _ in range(2 * slots):
            self.now += 5.0
            self.forecast.tick(self.now)

    def _teach_reading(self, slot: int, line: Line, partners: list[int], links: dict[tuple[int, int], float]) -> None:
        for number in range(30):
            self.now += 5.0
            new = (100, 1000, 8000)[number % 3]
            decode = partners[number // 3 % len(partners)] if partners else None
            way = 0.0 if decode is None else links[slot, decode] * new
            reading = self.forecast.sent(slot, new, now=self.now)
            self.forecast.read(reading, decode, now=self.now + at(line, (float(new), float(square(0, new)))) + way)
            self.forecast.tick(self.now + 4.0)

    def _teach_writing(self, slot: int, line: Line) -> None:
        for batch in (1, 4, 16, 64) * 3:
            for _ in range(batch):
                self.forecast.began(slot, 1000)
            self.now += 1.0
            self.forecast.stepped(slot, at(line, (float(batch), 1000.0 * batch)), now=self.now)
            for _ in range(batch):
                self.forecast.ended(slot, 1000)

    def read(self, slot: int, new: int) -> Reading:
        """One more prompt that this engine has to read."""
        self.in_flight.start(slot)
        return self.forecast.sent(slot, new, now=self.now)

    def write(self, slot: int, answers: int, kv: int = 1000) -> None:
        """So many more answers that this engine writes, each of so many tokens."""
        for _ in range(answers):
            self.in_flight.start(slot)
            self.kv[slot] += kv
            self.forecast.began(slot, kv)

    def choose(
        self, tokens: int, *, cached: dict[int, int] | None = None, exclude: Iterable[str] = (), unified_only: bool = False
    ) -> Choice:
        outlook = Outlook(self.forecast, tokens=tokens, cached=cached or {}, batches=self.in_flight.now, kv=self.kv, now=self.now)
        left_out = {EngineId(e) for e in exclude}
        return choose(self.pool, self.in_flight, exclude=left_out, unified_only=unified_only, outlook=outlook)

    def chosen(self, tokens: int, *, cached: dict[int, int] | None = None, exclude: Iterable[str] = ()) -> tuple[str | None, str]:
        choice = self.choose(tokens, cached=cached, exclude=exclude)
        return (choice.prefill.id if choice.prefill else None), choice.decode.id


def test_a_prefix_that_is_held_wins_unless_its_queue_is_longer_than_what_it_saves() -> None:
    """To read 8,000 tokens takes 0.72 s, the last 1,000 of them 0.11 s: 0.61 s are saved. A prompt of 1,000 in the queue takes 0.1 s."""
    site = Site(pool(P, P, D))
    waiting = 0
    while site.chosen(8000, cached={0: 7000})[0] == "prefill-0":
        site.read(0, 1000)
        waiting += 1
        assert waiting < 20
    assert waiting in {6, 7}
    assert site.chosen(8000, cached={0: 7000, 1: 7000})[0] == "prefill-1", "held by both, the queue decides"
    assert site.chosen(8000)[0] == "prefill-1"


def test_a_long_prompt_in_the_queue_counts_for_more_than_several_short_ones() -> None:
    site = Site(pool(P, P, D))
    site.read(0, 16_000)
    for _ in range(4):
        site.read(1, 200)
    assert site.chosen(1000)[0] == "prefill-1"


def test_equal_engines_take_turns_though_one_was_measured_a_little_faster() -> None:
    a_little = (READS[0] * 1.02, READS[1] * 1.02, READS[2] * 1.02)
    site = Site(pool(P, P, D, D), reads={1: a_little}, steps={3: (STEPS[0] * 1.02, *STEPS[1:])})
    took: Counter[str] = Counter()
    for _ in range(40):
        choice = site.choose(1000)
        assert choice.prefill is not None
        for engine in (choice.prefill, choice.decode):
            took[engine.id] += 1
            site.in_flight.start(engine.slot)
            site.in_flight.end(engine.slot)
    assert set(took.values()) == {20}


def test_what_is_alike_only_by_a_little_would_else_get_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.policy.route.ALIKE", 0.0)
    monkeypatch.setattr("disagg.policy.route.ALIKE_S", 0.0)
    with pytest.raises(AssertionError):
        test_equal_engines_take_turns_though_one_was_measured_a_little_faster()


def test_the_answer_goes_to_the_smaller_batch() -> None:
    site = Site(pool(P, D, D))
    site.write(1, 30)
    site.write(2, 5)
    assert site.chosen(1000)[1] == "decode-2"


def test_of_equal_batches_it_goes_to_the_one_with_less_kv() -> None:
    site = Site(pool(P, D, D))
    site.write(1, 10, kv=50_000)
    site.write(2, 10, kv=1000)
    site.in_flight.turn[1] = 0  # by count and turn it would be the other one
    assert site.chosen(1000)[1] == "decode-2"
    site.write(2, 1, kv=1000)
    assert site.chosen(1000)[1] == "decode-2", "though it has one more"


def test_a_slow_link_is_avoided_by_long_prompts_and_costs_short_ones_too_little_to_care() -> None:
    site = Site(pool(P, P, D, D), links={(0, 2): 0.0, (0, 3): 2e-4})
    assert {site.chosen(20_000, exclude={"prefill-1"})[1] for _ in range(3)} == {"decode-2"}
    site.in_flight.start(2)
    site.in_flight.end(2)  # it would be the other one's turn
    assert site.chosen(20_000, exclude={"prefill-1"})[1] == "decode-2"
    assert site.chosen(100, exclude={"prefill-1"})[1] == "decode-3"
    assert site.chosen(20_000, exclude={"prefill-0"})[1] == "decode-3", "its link to the other one is as good as any"


def test_a_faster_engine_is_not_filled_until_it_is_as_slow_as_the_slow_one() -> None:
    """Each answer makes all others of its engine slower. So the slow one gets some while the fast one is still the faster one by far."""
    quick, slow = (0.01, 1e-3, 1e-8), (0.02, 1e-3, 1e-8)
    site = Site(pool(P, D, D), steps={1: quick, 2: slow})
    batches = [0, 0, 0]
    for _ in range(40):
        slot = site.choose(1000).decode.slot
        site.write(slot, 1)
        batches[slot] += 1
        if batches[2] == 1 and slot == 2:
            step_s = [site.forecast.step_s(s, batches[s], 1000 * batches[s]) for s in (1, 2)]
            assert step_s[0] < 0.8 * step_s[1]
    assert 0 < batches[2] < batches[1]
    assert batches[1] - batches[2] < 8, "5 more: where one more costs all of them the same. Where both are equally slow it would be 10"


def test_without_what_it_costs_the_others_the_fast_one_would_be_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    def selfish(self: Outlook, slot: int) -> float:
        return self.answer * self._forecast.step_s(slot, self._batches[slot] + 1, self._kv[slot] + self.tokens)

    monkeypatch.setattr(Outlook, "answer_s", selfish)
    with pytest.raises(AssertionError):
        test_a_faster_engine_is_not_filled_until_it_is_as_slow_as_the_slow_one()


def test_short_prompts_go_to_a_unified_engine_that_is_idle_and_long_ones_to_a_pair_when_it_writes() -> None:
    site = Site(pool(P, D, U))
    site.write(1, 8)
    assert site.chosen(100) == (None, "unified-2")
    site.write(2, 8)
    assert site.chosen(8000) == ("prefill-0", "decode-1"), "eight answers would stand still for 0.7 s"
    for _ in range(8):
        site.read(0, 8000)
    assert site.chosen(100) == (None, "unified-2"), "a short prompt holds them up for less than it would wait"


def test_without_the_pause_a_busy_unified_engine_would_read_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(pool(P, D, U))
    site.write(1, 12)
    site.write(2, 8)
    assert site.chosen(8000) == ("prefill-0", "decode-1")
    monkeypatch.setattr(Outlook, "pause_s", lambda *_: 0.0)
    assert site.chosen(8000) == (None, "unified-2")


def test_the_best_of_several_unified_engines() -> None:
    site = Site(pool(U, U, U))
    site.write(0, 3)
    site.read(1, 8000)
    assert site.chosen(1000) == (None, "unified-2")
    assert site.chosen(1000, exclude={"unified-2"}) == (None, "unified-0")
    assert site.chosen(8000, cached={1: 7999}, exclude={"unified-2", "unified-0"}) == (None, "unified-1")


def test_islands_are_compared_as_pairs() -> None:
    other = OTHERS["page size"][0]
    site = Site(pool_of(engines((P, WHOLE), (P, other), (D, WHOLE), (D, other)), "m"))
    site.read(0, 16_000)
    assert site.chosen(1000) == ("prefill-1", "decode-3")
    assert site.chosen(16_000, cached={0: 15_999}) == ("prefill-1", "decode-3"), "it would wait there for longer than that saves"
    assert site.chosen(20_000, cached={0: 19_000}) == ("prefill-0", "decode-2")
    site.write(3, 60, kv=8000)
    assert site.chosen(1000) == ("prefill-0", "decode-2"), "the best reader of the other island is worth less than its writer costs"
    assert site.chosen(1000, exclude={"decode-2"}) == ("prefill-1", "decode-3")
    with pytest.raises(NoCapacityError):
        site.chosen(1000, exclude={"decode-2", "prefill-1"})


def test_what_was_tried_is_left_out_however_good() -> None:
    site = Site(pool(P, P, D, D, U))
    site.read(1, 8000)
    site.write(3, 10)
    assert site.chosen(1000, cached={0: 999}, exclude={"prefill-0", "decode-2", "unified-4"}) == ("prefill-1", "decode-3")
    assert site.chosen(1000, exclude={"prefill-0", "prefill-1"}) == (None, "unified-4")
    with pytest.raises(NoCapacityError):
        site.chosen(1000, exclude={"prefill-0", "prefill-1", "unified-4"})
    alone = site.choose(1000, unified_only=True)
    assert (alone.prefill, alone.decode.id) == (None, "unified-4")


def test_a_choice_by_outlook_says_why() -> None:
    site = Site(pool(P, D, U))
    site.write(2, 60)
    site.read(0, 1000)
    site.write(1, 2)
    assert re.fullmatch(
        r"prefill-0 gives the first token in 0\.2\d\d s \(0\.09\d s of them waiting, it should hold 500 of 2000 tokens\); "
        r"decode-1 has 2 requests in flight",
        site.choose(2000, cached={0: 500}).reason,
    )
    assert re.fullmatch(
        r"prefill-0 gives the first token in \S+ s \(\S+ s of them waiting\); decode-1 has 2 requests in flight",
        site.choose(2000).reason,
    )
    idle = Site(pool(P, D, U))
    idle.read(0, 16_000)
    assert re.fullmatch(r"unified-2 costs 2\.\d\d s, prefill-0 and decode-1 [\d.]+ s", idle.choose(100).reason)
    assert idle.choose(100, exclude={"prefill-0"}).reason == "no pair can take it; unified-2 has 0 requests in flight"
