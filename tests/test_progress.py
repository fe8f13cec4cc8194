"""Progress: a counter that stands under work, and how it is read from what engines say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.engines.progress import Progress, read_progress


def test_an_idle_engine_is_never_still() -> None:
    progress = Progress()
    for now in range(100):
        progress.seen(7, working=False, now=float(now))
        assert progress.still_s(float(now)) == 0.0


def test_stillness_counts_from_the_first_sight_of_work() -> None:
    progress = Progress()
    progress.seen(7, working=False, now=0.0)
    progress.seen(7, working=True, now=10.0)
    assert progress.still_s(10.0) == 0.0
    progress.seen(7, working=True, now=12.0)
    assert progress.still_s(14.5) == 4.5


@pytest.mark.parametrize("counter", [8, 6, 0])
def test_any_change_is_a_move(counter: int) -> None:
    progress = Progress()
    progress.seen(7, working=True, now=0.0)
    progress.seen(counter, working=True, now=4.0)
    assert progress.still_s(4.0) == 0.0


def test_a_moment_without_work_ends_the_stillness() -> None:
    progress = Progress()
    progress.seen(7, working=True, now=0.0)
    progress.seen(7, working=False, now=4.0)
    assert progress.still_s(4.0) == 0.0
    progress.seen(7, working=True, now=5.0)
    assert progress.still_s(6.0) == 1.0


def test_the_longest_step_is_the_longest_gap_that_ended_with_a_move() -> None:
    progress = Progress()
    for now in (0.0, 1.0, 2.0, 3.0):
        progress.seen(1, working=True, now=now)
    assert progress.longest_s == 0.0
    progress.seen(2, working=True, now=3.5)
    assert progress.longest_s == 3.0
    progress.seen(3, working=True, now=4.0)
    assert progress.longest_s == 3.0


def test_an_engine_that_does_not_answer_stands_still() -> None:
    progress = Progress()
    progress.seen(1, working=True, now=0.0)
    progress.missed(6.0)
    assert progress.still_s(6.0) == 6.0
    progress.seen(2, working=True, now=7.0)
    assert progress.longest_s == 6.0


def test_a_watcher_that_slept_has_seen_no_long_step() -> None:
    progress = Progress()
    progress.seen(1, working=True, now=0.0)
    progress.seen(1, working=True, now=0.25)
    progress.seen(900, working=True, now=60.0)
    assert progress.longest_s == 0.25


# --- what engines say

SGLANG: dict[str, Any] = {
    "dp_rank": 0,
    "num_running_reqs": 0,
    "num_waiting_reqs": 0,
    "total_prefill_uncached_tokens": 1000,
    "total_prefill_busy_us": 250_000,
    "decode_moments": [2.0, 30.0, 3000.0, 500.0, 50_000.0, 60.0],
    "queues": {"waiting": 0},
    "disaggregation": {"mode": "null"},
}


def said(*, queues: dict[str, Any] | None = None, peers: dict[str, int] | None = None, **core: Any) -> dict[str, Any]:
    disaggregation = {f"{name}_queue_reqs": count for name, count in (peers or {}).items()}
    return {"loads": [{**SGLANG, **core, "queues": queues or {}, "disaggregation": disaggregation}]}


def test_the_counter_sums_what_advances_over_all_ranks() -> None:
    assert read_progress({"loads": [SGLANG]})[0] == 1000 + 250_000 + 53_592
    assert read_progress({"loads": [SGLANG, SGLANG]})[0] == 2 * (1000 + 250_000 + 53_592)


@pytest.mark.parametrize(
    "moved",
    [
        {"total_prefill_uncached_tokens": 1001},
        {"total_prefill_busy_us": 250_001},
        {"decode_moments": [3.0, 30.0, 3000.0, 500.0, 50_000.0, 60.0]},
        {"total_steps": 1},
        {"total_generated_tokens": 1},
    ],
)
def test_each_sign_of_life_moves_the_counter(moved: dict[str, Any]) -> None:
    assert read_progress(said(**moved))[0] > read_progress(said())[0]


def test_the_embedded_engine_names_its_moments() -> None:
    entry = {"decode_moments": {"steps": 3, "requests": 5, "busy_us": 100}, "total_steps": 4}
    assert read_progress({"loads": [entry]}) == (112, False)


@pytest.mark.parametrize(
    ("load", "working"),
    [
        (said(), False),
        (said(num_running_reqs=1), True),
        (said(num_waiting_reqs=1), True),
        (said(num_waiting_reqs=3, queues={"waiting": 0}, peers={"prefill_bootstrap": 3}), False),
        (said(num_waiting_reqs=4, queues={"waiting": 1}, peers={"prefill_bootstrap": 3}), True),
        (said(num_waiting_reqs=5, queues={"waiting": 0}, peers={"decode_prealloc": 2, "decode_transfer": 3}), False),
        (said(num_waiting_reqs=6, queues={"waiting": 1}, peers={"decode_prealloc": 2, "decode_transfer": 3}), True),
        (said(peers={"prefill_inflight": 4}), False),
        (said(num_running_reqs=1, num_waiting_reqs=3, peers={"prefill_bootstrap": 3}), True),
    ],
)
def test_waiting_for_a_peer_is_no_work_in_sglang(load: dict[str, Any], working: bool) -> None:
    assert read_progress(load)[1] is working


@pytest.mark.parametrize(
    ("load", "working"),
    [
        (said(num_waiting_reqs=0, queues={"waiting": 0}, peers={"prefill_bootstrap": 5}), False),
        (said(num_waiting_reqs=3, queues={"waiting": 3}, peers={"prefill_bootstrap": 5}), True),
        (said(num_waiting_reqs=2, queues={"waiting": 2}, peers={"decode_prealloc": 2, "decode_transfer": 1}), False),
        (said(num_waiting_reqs=0, queues={"waiting": 0}, peers={"prefill_inflight": 2}), False),
    ],
)
def test_waiting_for_a_peer_is_no_work_in_the_embedded_engine(load: dict[str, Any], working: bool) -> None:
    assert read_progress(load)[1] is working


def test_one_working_rank_is_work() -> None:
    idle, busy = said()["loads"][0], said(num_running_reqs=2)["loads"][0]
    assert read_progress({"loads": [idle, busy]})[1] is True


@pytest.mark.parametrize("odd", [None, 3, "loads", [], {}, {"loads": None}, {"loads": {}}, {"loads": [None, 3, []]}, {"loads": [{}]}])
def test_what_makes_no_sense_is_neither_progress_nor_work(odd: Any) -> None:
    assert read_progress(odd) == (0, False)


NAMES = st.sampled_from(["loads", *SGLANG, "total_steps", "prefill_bootstrap_queue_reqs", "decode_prealloc_queue_reqs", "waiting", "odd"])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=20)


@given(JSON | st.fixed_dictionaries({"loads": st.lists(st.dictionaries(NAMES, JSON), max_size=3)}))
def test_any_json_is_read_without_a_complaint(loads: Any) -> None:
    counter, working = read_progress(loads)
    assert type(counter) is int
    assert type(working) is bool
