"""The judge can say no: logs and answers that were doctored are found out. Without this a good report would prove nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.chaos.answers import Said
from tests.chaos.judge import After, Away, Entry, Heard, Log, Mark, outcome_of, page, report_of
from tests.chaos.picture import save

CHAT = "/v1/chat/completions"
RIGHT = Said("a small fox", "length", (5, 3), ended=True)
GOOD_AFTER = After({"p1": 0, "d1": 0}, 0, (30, 32), (70.0, 71.0), {})


@dataclass
class Stream:
    """A stream of a chat, as the router sends it; a test changes one thing."""

    texts: list[str] = field(default_factory=lambda: ["a ", "small", " fox"])
    finish: str = "length"
    usage: tuple[int, int] = (5, 3)
    last: bytes = b"data: [DONE]\n\n"
    name: str = "chatcmpl-1"

    def events(self) -> list[bytes]:
        first = self.event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        said = [self.event({"choices": [{"delta": {"content": text}, "finish_reason": None}]}) for text in self.texts]
        end = self.event({"choices": [{"delta": {}, "finish_reason": self.finish}]})
        usage = self.event({"choices": [], "usage": {"prompt_tokens": self.usage[0], "completion_tokens": self.usage[1]}})
        return [first, *said, end, usage, self.last]

    def event(self, body: dict[str, Any]) -> bytes:
        return b"data: " + msgspec.json.encode({"id": self.name, **body}) + b"\n\n"


def judged(raw: bytes, end: str = "end", status: int = 200) -> str:
    return outcome_of(CHAT, True, Heard(status, raw, end), RIGHT)[0]


def test_the_right_stream_is_right() -> None:
    assert judged(b"".join(Stream().events())) == "right"


@pytest.mark.parametrize(
    "stream",
    [
        Stream(texts=["a ", "small", " dog"]),
        Stream(texts=["a ", "small", "small", " fox"]),
        Stream(texts=["a ", " fox"]),
        Stream(texts=["a ", "small"]),
        Stream(texts=["a ", "small", " fox", "!"]),
        Stream(finish="stop"),
        Stream(usage=(5, 4)),
        Stream(usage=(8, 3)),
        Stream(last=b"data: [DONE]\n\ndata: [DONE]\n\n"),
        Stream(last=b"data: nonsense\n\n"),
        Stream(last=b": comment\n\n"),
    ],
)
def test_a_stream_that_differs_in_one_thing_is_wrong(stream: Stream) -> None:
    assert judged(b"".join(stream.events())) == "wrong"


def test_a_second_role_and_a_second_id_are_wrong() -> None:
    events = Stream().events()
    assert judged(b"".join([*events[:2], events[0], *events[2:]])) == "wrong"
    assert judged(b"".join([*events[:2], *Stream(name="chatcmpl-2").events()[2:]])) == "wrong"


@pytest.mark.parametrize("count", range(7))
def test_a_stream_that_ends_too_early_is_lost_whoever_closed_it(count: int) -> None:
    raw = b"".join(Stream().events()[:count])
    assert judged(raw) == "lost"
    assert judged(raw, "ClientPayloadError") == "lost"
    assert judged(raw + b'data: {"error": {"message": "no"}}\n\n') == "lost"
    assert judged(raw, "left") == "left"
    assert judged(raw, "stuck") == "stuck"


def test_what_came_before_an_error_or_a_leave_must_be_right_too() -> None:
    raw = b"".join(Stream(texts=["a ", "big"]).events()[:3])
    assert judged(raw, "left") == "wrong"
    assert judged(raw + b'data: {"error": {"message": "no"}}\n\n') == "wrong"


def test_refusals_are_lost_or_shed_and_their_bodies_are_error_objects() -> None:
    body = b'{"error": {"message": "no pair is ready"}}'
    assert (judged(body, status=503), judged(body, status=429), judged(body, status=500)) == ("shed", "shed", "lost")
    assert judged(b"Internal Server Error", status=500) == "wrong"
    assert judged(b"", "ConnectionResetError", status=0) == "lost"


def test_whole_answers_are_compared_whole() -> None:
    def answer(text: str, tokens: int = 3) -> bytes:
        usage = {"prompt_tokens": 5, "completion_tokens": tokens}
        return msgspec.json.encode({"choices": [{"message": {"content": text}, "finish_reason": "length"}], "usage": usage})

    def judged_whole(raw: bytes) -> str:
        return outcome_of(CHAT, False, Heard(200, raw, "end"), RIGHT)[0]

    assert judged_whole(answer("a small fox")) == "right"
    for raw in (answer("a small"), answer("a small fox", 4), answer("a big fox"), b"{nonsense", b"{}"):
        assert judged_whole(raw) == "wrong"


def log_of(*outcomes: str, storm: bool = False) -> Log:
    entries = [Entry(float(n), n + 0.5, CHAT, True, outcome, first_s=0.1) for n, outcome in enumerate(outcomes)]
    return Log(1, storm, float(len(entries)), entries, [Mark("kill", "d1", 2.0, 3.0)], after=GOOD_AFTER)


def test_a_good_log_is_good() -> None:
    report = report_of(log_of(*["right"] * 1999, "lost", "left"))
    assert report.broken == []
    assert report.availability == 1999 / 2000


@pytest.mark.parametrize("outcome", ["wrong", "stuck"])
def test_one_wrong_or_stuck_of_many_breaks_it_in_a_storm_too(outcome: str) -> None:
    assert report_of(log_of(*["right"] * 5000, outcome, storm=True)).broken == [f"1 requests are {outcome}"]


def test_too_many_lost_break_it_but_in_a_storm() -> None:
    lost = [*["right"] * 1000, "lost", "shed"]
    assert "availability" in report_of(log_of(*lost)).broken[0]
    assert report_of(log_of(*lost, storm=True)).broken == []


def test_only_what_a_router_that_was_away_touched_is_excused() -> None:
    log = log_of("right", "lost", "lost", "lost", "right", "wrong")
    log.away = [Away(2.2, 3.2, killed=False)]
    assert report_of(log).outcomes["excused"] == 1, "what came while it was away"
    log.away = [Away(2.2, 3.2, killed=True)]
    assert report_of(log).outcomes["excused"] == 2, "and what was in flight"
    log.away = [Away(0.0, 9.0, killed=True)]
    assert report_of(log).outcomes["wrong"] == 1, "a wrong answer has no excuse"


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (msgspec.structs.replace(GOOD_AFTER, used_tokens={"p1": 0, "d1": 16}), "d1 holds 16 KV tokens"),
        (msgspec.structs.replace(GOOD_AFTER, used_tokens={"p1": -1}), "p1 does not tell what it holds"),
        (msgspec.structs.replace(GOOD_AFTER, live=2), "the router holds entries for 2 legs"),
        (msgspec.structs.replace(GOOD_AFTER, fds=(30, 60)), "the router has 60 descriptors, 30 before"),
        (None, "nobody looked for leaks"),
    ],
)
def test_leaks_break_it(after: After | None, sentence: str) -> None:
    log = log_of(*["right"] * 10)
    log.after = after
    assert report_of(log).broken == [sentence]


def test_a_run_without_requests_or_without_faults_proves_nothing() -> None:
    assert "nobody asked anything" in report_of(log_of()).broken[0]
    log = log_of("right")
    log.marks = []
    assert report_of(log).broken == ["nothing was broken: this proves nothing"]


def test_the_page_and_the_picture_show_what_happened(tmp_path: Path) -> None:
    log = log_of("right", "lost", "right")
    assert "BROKEN: availability" in page(report_of(log))
    drawn = save(log, tmp_path / "run.svg").read_text()
    assert "kill: d1" in drawn
