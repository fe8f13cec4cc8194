"""The journal of a stream: whatever the text and however it was cut, it can be told again."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.router.journal import FOLD_BYTES, FOLD_EVERY, TEXT_LIMIT, Journal
from disagg.router.openai import DONE_EVENT, Route, encode_event
from disagg.router.upstream import frame

CHAT, COMPLETIONS, GENERATE = Route.CHAT, Route.COMPLETIONS, Route.GENERATE


class Gaps:
    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def __call__(self, seconds: float, times: int) -> None:
        self.seen.append((seconds, times))

    @property
    def events(self) -> int:
        return sum(times for _, times in self.seen)


def journal(route: Route = CHAT) -> tuple[Journal, Gaps]:
    gaps = Gaps()
    return Journal(route, gaps), gaps


def value(route: Route, piece: str, so_far: str) -> dict[str, Any]:
    """One chunk of a stream in the shape of its route."""
    if route is CHAT:
        return {"id": "x", "choices": [{"index": 0, "delta": {"content": piece}, "logprobs": None, "finish_reason": None}]}
    if route is COMPLETIONS:
        return {"id": "x", "choices": [{"index": 0, "text": piece, "logprobs": None}]}
    return {"text": so_far, "output_ids": [1], "meta_info": {"id": "x", "finish_reason": None}}


def spaced(event: dict[str, Any]) -> bytes:
    """As Python's own json writes it: spaces, everything but ASCII escaped."""
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def stream(route: Route, pieces: list[str], write: Any = encode_event) -> list[bytes]:
    return [write(value(route, piece, "".join(pieces[: i + 1]))) for i, piece in enumerate(pieces)]


def fed(route: Route, reads: list[bytes]) -> tuple[Journal, Gaps]:
    made, gaps = journal(route)
    for i, raw in enumerate(reads):
        made.add(raw, 1.0 + i)
    return made, gaps


nasty = st.sampled_from(
    ['"', "\\", '\\"', '"content": "x"', '"text":"y"', "data: [DONE]", "\n\n", "\r\n", "\0", "\u2028", "é", "😀", "\\u0041", "5\r\n", ""]
)
pieces = st.lists(st.one_of(nasty, st.text(max_size=6)), max_size=80)


@given(st.sampled_from([CHAT, COMPLETIONS, GENERATE]), pieces, st.booleans(), st.booleans(), st.data())
@settings(deadline=None, max_examples=200)
def test_any_text_round_trips_however_it_was_cut_and_folded(
    route: Route, said: list[str], as_python: bool, framed: bool, data: st.DataObject
) -> None:
    made, gaps = journal(route)
    at = 0.0
    rest = stream(route, said, spaced if as_python else encode_event)
    while rest:
        count = data.draw(st.integers(1, 5))
        now, rest = rest[:count], rest[count:]
        at += 1.0
        made.add(b"".join(map(frame, now) if framed else now), at)
        if data.draw(st.integers(0, 9)) == 0:
            made.fold()
    assert made.text() == "".join(said)
    assert made.events == len(said)
    assert gaps.events == max(0, len(said) - 1), "the first event is waited for: its time is TTFT"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, GENERATE])
def test_text_can_be_asked_for_at_any_time(route: Route) -> None:
    made, _ = journal(route)
    assert made.text() == ""
    for i, event in enumerate(stream(route, ["al", 'p"', "ha"])):
        made.add(event, float(i + 1))
        assert made.text() == 'alp"ha'[: 2 * i + 2]


def test_a_native_stream_that_talks_about_server_sent_events_round_trips() -> None:
    said = ["Send", ' data: {"a": 1} ', "and data: {}."]
    made, _ = fed(GENERATE, stream(GENERATE, said))
    assert made.text() == "".join(said)


def test_what_is_not_text_is_not_told() -> None:
    events = [
        encode_event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        encode_event({"choices": [{"delta": {"reasoning_content": "hm"}}]}),
        encode_event({"choices": [{"delta": {"content": None, "tool_calls": [{"function": {"arguments": '{"content": "no"}'}}]}}]}),
        encode_event({"choices": [{"delta": {"content": "yes"}, "logprobs": {"content": [{"token": "no"}]}}]}),
        encode_event({"choices": [], "usage": {"total_tokens": 3}}),
    ]
    made, _ = fed(CHAT, events)
    assert made.text() == "yes"
    assert made.events == 5


@pytest.mark.parametrize("count", [1, FOLD_EVERY - 1, FOLD_EVERY, FOLD_EVERY + 1, 3 * FOLD_EVERY])
def test_a_journal_folds_by_itself(count: int) -> None:
    made, _ = fed(CHAT, stream(CHAT, ["a"] * count))
    assert made.events == count - count % FOLD_EVERY
    assert f"unfolded={count % FOLD_EVERY} " in repr(made)
    assert made.text() == "a" * count


def test_large_reads_are_folded_at_once() -> None:
    made, _ = fed(CHAT, [encode_event(value(CHAT, "x" * FOLD_BYTES, ""))])
    assert "unfolded=0 " in repr(made)
    made.add(encode_event(value(CHAT, "y", "")), 9.0)
    assert "unfolded=1 " in repr(made), "and small ones wait again"


def test_gaps_are_shared_by_the_events_of_a_read() -> None:
    made, gaps = journal()
    one = encode_event(value(CHAT, "a", ""))
    for raw, at in ((one, 10.0), (one, 10.5), (one * 4, 11.5), (b"", 12.0), (one, 14.0)):
        made.add(raw, at)
    made.fold()
    assert gaps.seen == [(0.5, 1), (0.25, 4), (2.0, 1)]


def test_a_stream_whose_first_read_holds_all_of_it_has_gaps_of_zero() -> None:
    made, gaps = fed(CHAT, [b"".join(stream(CHAT, ["a", "b", "c"]))])
    made.fold()
    assert gaps.seen == [(0.0, 2)]


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_the_end_on_purpose_is_seen(framed: bool, folded: bool, large: bool) -> None:
    made, _ = journal()
    events = [encode_event(value(CHAT, "data: [DONE]\n\n" * (3000 if large else 1), "")), DONE_EVENT]
    first, last = [frame(e) if framed else e for e in events]
    seen = [made.saw_done]
    for at, raw in enumerate((first, first + last, first)):
        made.add(raw, 1.0 + at)
        if folded:
            made.fold()
        seen.append(made.saw_done)
    assert seen == [False, False, True, False]


# --- bounds


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, GENERATE])
def test_an_endless_stream_is_dropped_and_says_so(route: Route) -> None:
    made, _ = journal(route)
    said = "x" * 5000
    for i in range(TEXT_LIMIT // 2500):
        made.add(encode_event(value(route, said, said * (i + 1))), float(i + 1))
    assert made.overflowed
    with pytest.raises(ValueError, match="overflowed"):
        made.text()
    assert held(made) < 3 * FOLD_BYTES
    assert made.events > 50, "counting goes on"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_text_at_the_limit_is_kept(route: Route) -> None:
    made, _ = fed(route, stream(route, ["x" * (TEXT_LIMIT // 4)] * 4))
    assert made.text() == "x" * TEXT_LIMIT
    made.add(encode_event(value(route, "y", "")), 9.0)
    made.fold()
    assert made.overflowed


def test_a_long_stream_of_short_pieces_holds_little_more_than_its_text() -> None:
    made, _ = journal()
    one = encode_event(value(CHAT, "ab", ""))
    for i in range(4000):
        made.add(one, float(i))
    made.fold()
    assert held(made) < 80 * 4000, "about 40 bytes for each piece"


def test_the_limit_bounds_memory_and_not_only_text() -> None:
    made, _ = journal()
    one = encode_event(value(CHAT, "a", ""))
    for i in range(2000):
        made.add(one * 100, float(i))
    made.fold()
    assert not made.overflowed
    assert held(made) < 2 * TEXT_LIMIT


def held(made: Journal) -> int:
    """Bytes that a journal keeps alive."""
    parts = [*made._reads, *made._text, made._last]
    return sum(map(sys.getsizeof, parts)) + sys.getsizeof(made._text) + sys.getsizeof(made._reads)


@pytest.mark.parametrize("tokens", [2, 3, 4, 16, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("at_once", [True, False], ids=["closing in one read", "closing in reads of their own"])
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, GENERATE])
def test_a_step_is_what_a_token_takes_however_few_there_are(route: Route, at_once: bool, tokens: int) -> None:
    """What ends a stream is no token: finish reason and usage of a chat, `[DONE]`."""
    made, _ = journal(route)
    told: list[tuple[float, int, float]] = []
    made.on_fold = lambda *seen: told.append(seen)
    usage = encode_event({"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}})
    finish = encode_event({"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    closing = [*([finish] if route is CHAT else []), *([] if route is GENERATE else [usage]), DONE_EVENT]
    for number in range(tokens):
        made.add(encode_event(value(route, "a", "a" * (number + 1))), 5.0 + 0.011 * number)
    ended = 5.0 + 0.011 * (tokens - 1) + 1e-5
    for number, events in enumerate([b"".join(closing)] if at_once else closing):
        made.add(events, ended + 1e-5 * number)
    made.fold()
    assert sum(count for _, count, _ in told) == tokens - 1
    assert made.tokens == tokens
    assert [seconds for seconds, _, _ in told] == pytest.approx([0.011] * len(told), rel=0.02)
