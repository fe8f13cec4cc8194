"""F34: a host that is told to stop, an engine that is drained, a flip. What runs may finish; what does not in time goes on elsewhere."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import canaries
from tests.serve.conftest import Site, wait_for
from tests.serve.streams import Answer

pytestmark = pytest.mark.slow

PACED = ("--engine-arg=--paced", "--engine-arg=1,0;20,0")
TOKENS = 160
"""At 20 ms a token more than 3 s: far more than the drain takes."""
LONG = 400
"""8 s: less than from the end of the drain to the hard stop."""
MANY = 12
DRAIN = ("--drain-timeout-s", "0.5", "--stop-timeout-s", "0.3")
"""No patience with what runs; nor with an engine, for the embedded one finishes what it has after its SIGTERM."""
SIGTERMS = int(os.environ.get("DISAGG_TEST_SIGTERMS", "3"))
"""How often a host is stopped under load; FAILURES.md wants 100, which scripts/drains makes."""


def text_of(number: int) -> str:
    return f"Tell me the story of lantern number {number}."


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Site]:
    """A prefill host and two decode hosts, one as slow as the other; they and the router have little patience with what runs."""
    with three_hosts(tmp_path, ("-m", "disagg")) as site:
        yield site


@pytest.fixture
def careless(tmp_path: Path) -> Iterator[Site]:
    """The defence off: agents that know nothing of the time after the drain, and end their engines then."""
    with three_hosts(tmp_path, ("-c", "from disagg import host, cli; host.MOVE_S = 0.0; cli.main()")) as site:
        yield site


@contextmanager
def three_hosts(tmp_path: Path, program: tuple[str, ...]) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        site.start_router(*DRAIN)
        site.start_host("p", "prefill")
        for name in ("d", "d2"):
            site.start_host(name, "decode", *PACED, *DRAIN, program=program)
        for name in ("p", "d", "d2"):
            site.wait_engine(name, "ready")
        wait_for(lambda: canaries.are_over(site.admin), "canaries are not over")
        yield site
    finally:
        site.close()


def begun(answer: Answer) -> Answer:
    wait_for(lambda: len(answer.text) > 20 or not answer.is_alive(), lambda: f"it does not begin: {answer.error}")
    assert answer.is_alive(), answer.error
    return answer


def order(site: Site, engine: str, verb: str, **fields: str) -> dict[str, Any]:
    """As the command does it, without the seconds that Python takes to start."""
    answer: dict[str, Any] = httpx2.post(f"{site.admin}/admin/engines/{engine}/{verb}", json={"cause": "a test", **fields}).json()
    return answer


def flipped(site: Site, engine: str) -> list[str]:
    """The steps of a flip to prefill, which has ended."""
    number = order(site, engine, "flip", role="prefill")["change"]

    def story() -> dict[str, Any]:
        found: dict[str, Any] = httpx2.get(f"{site.admin}/admin/changes/{number}").json()
        return found

    wait_for(lambda: story()["phase"] in {"done", "failed"}, lambda: str(story()))
    return [step["what"] for step in story()["steps"]]


def moved(site: Site) -> int:
    """How many requests went on elsewhere, as the router's log says."""
    assert site.router is not None
    return site.router.said().count('"event": "requests go on on other engines"')


def made_again(site: Site) -> float:
    """How many attempts were made anew, for whatever reason."""
    lines = httpx2.get(site.admin + "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("disagg_replays_total{"))


def stop_under_many(site: Site) -> tuple[str, list[Answer]]:
    """Tells the host with most of the streams to stop; which that was, and the streams, which have ended."""
    answers = [Answer(site.url, text_of(0), TOKENS) for _ in range(MANY)]
    for answer in answers:
        begun(answer)
    used = Counter(answer.headers["x-disagg-decode"] for answer in answers).most_common(1)[0][0]
    site.hosts[used].process.send_signal(signal.SIGTERM)
    for answer in answers:
        answer.join(60)
    return used, answers


def test_streams_outlive_the_host_that_is_told_to_stop(three: Site) -> None:
    """All of them: no budget for faults applies, for this is none."""
    used, answers = stop_under_many(three)
    assert len({answer.whole() for answer in answers}) == 1, "cut or not, they say the same"
    assert three.hosts[used].process.wait(15) == 0
    assert three.host(used)["state"] == "left"
    assert moved(three) >= 1, "they ended by themselves: that proves nothing"


def test_without_the_move_each_of_those_streams_is_cut_and_mended_like_a_fault(careless: Site) -> None:
    stop_under_many(careless)
    assert moved(careless) == 0
    assert made_again(careless) > 0


PENALTY: dict[str, Any] = {"frequency_penalty": 0.5}
"""No other engine could go on with it."""


def stop_under_one_that_cannot_move(site: Site) -> list[Answer]:
    answers = [begun(Answer(site.url, text_of(1), LONG, **PENALTY)) for _ in range(2)]
    site.hosts[answers[0].headers["x-disagg-decode"]].process.send_signal(signal.SIGTERM)
    for answer in answers:
        answer.join(60)
    assert moved(site) == 0
    return answers


def test_what_cannot_go_on_elsewhere_may_finish_where_it_is(three: Site) -> None:
    """Until the hard stop, 15 s after the drain: longer than this stream takes."""
    answers = stop_under_one_that_cannot_move(three)
    assert len({answer.whole() for answer in answers}) == 1
    assert three.hosts[answers[0].headers["x-disagg-decode"]].process.wait(15) == 0


def test_without_the_hard_stop_it_is_cut(careless: Site) -> None:
    errors = [answer.error for answer in stop_under_one_that_cannot_move(careless) if not answer.done]
    assert errors
    assert "cannot go on elsewhere" in errors[0]


def test_a_whole_answer_is_made_anew_when_its_host_stops(three: Site) -> None:
    answers = [Answer(three.url, text_of(2), TOKENS, stream=False) for _ in range(2)]
    wait_for(lambda: sum(three.engine(name)["load"]["running"] for name in ("d", "d2")) == 2)
    used, other = ("d", "d2") if three.engine("d")["load"]["running"] else ("d2", "d")
    three.hosts[used].process.send_signal(signal.SIGTERM)
    assert len({answer.whole() for answer in answers}) == 1
    assert {answer.headers["x-disagg-decode"] for answer in answers} == {other}
    assert three.hosts[used].process.wait(15) == 0


def test_a_drained_engine_is_empty_soon_and_a_flip_is_not_held_up_although_streams_are_long(three: Site) -> None:
    answers = [begun(Answer(three.url, text_of(3), LONG)) for _ in range(2)]
    used = answers[1].headers["x-disagg-decode"]
    assert "takes no new work" in order(three, used, "drain")["will"]
    wait_for(lambda: moved(three) == 1 and not three.engine(used)["load"]["running"])
    assert all(answer.is_alive() for answer in answers)
    assert three.engine(used)["state"] == "draining"
    assert "back in service" in order(three, used, "undrain")["will"]
    uncut = {answer.whole() for answer in answers}
    answers = [begun(Answer(three.url, text_of(3), LONG)) for _ in range(2)]
    used = answers[1].headers["x-disagg-decode"]
    steps = flipped(three, used)
    assert "requests still ran after 0.5 s; they go on on other engines" in steps
    assert "back in service as prefill" in steps[-1]
    assert {answer.whole() for answer in answers} == uncut
    assert len(uncut) == 1


def test_the_last_engine_of_a_pool_is_not_emptied_by_a_flip(three: Site) -> None:
    """There is nothing to move to: the flip gives up, as it always did, and the stream goes on."""
    three.hosts["d2"].end()
    answer = begun(Answer(three.url, text_of(5), LONG))
    assert "it goes on as decode" in flipped(three, "d")[-1]
    answer.whole()
    assert moved(three) == 0


def test_hosts_stop_one_after_the_other_under_mixed_streams(three: Site) -> None:
    """Long and short, streamed and whole: each ends with its whole text, whichever host is told to stop in the middle."""
    lengths = (8, 60, TOKENS)
    asking = {n: Answer(three.url, text_of(6), n) for n in lengths}
    uncut = {n: answer.whole() for n, answer in asking.items()}
    asked: list[tuple[int, Answer]] = []
    for round_ in range(SIGTERMS):
        name = ("d", "d2")[round_ % 2]
        batch = [(n, Answer(three.url, text_of(6), n, stream=stream)) for n in lengths for stream in (True, False)]
        wait_for(lambda n=name: bool(three.engine(n)["load"]["running"]), limit_s=10)  # type: ignore[misc]
        three.hosts[name].process.send_signal(signal.SIGTERM)
        asked += batch
        assert three.hosts[name].process.wait(30) == 0, three.hosts[name].said()
        three.start_host(name, "decode", *PACED, *DRAIN)
        three.wait_engine(name, "ready")
        for n, answer in batch:
            assert answer.whole() == uncut[n]
    assert len(asked) == 6 * SIGTERMS
    assert moved(three) >= 1
