"""Recorded loads: both formats, their ticks, and what is said when something is wrong in them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from disagg.errors import TraceError
from disagg.plan.trace import Trace, parse_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ONE = '{"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 3]}'


def parse(text: str, chance: Callable[[], float] = lambda: 0.5) -> Trace:
    return parse_trace(text, file="t", chance=chance)


def test_mooncake_has_names_for_full_blocks_alone() -> None:
    trace = parse(ONE + '\n\n{"timestamp": 1500, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n')
    assert trace.block == 512
    assert [(a.at, a.prompt, a.answer, a.names) for a in trace.arrivals] == [(0.0, 1300, 5, (1, 2)), (1.5, 512, 1, (1,))]


def test_the_size_of_blocks_is_read_off_the_lines() -> None:
    assert parse('{"timestamp": 0, "input_length": 100, "output_length": 1, "hash_ids": [1, 2, 3, 4, 5, 6]}').block == 16
    assert parse('{"timestamp": 0, "input_length": 100, "output_length": 1}').block == 0


def test_azure_begins_at_its_first_request_and_is_put_in_order() -> None:
    trace = parse(AZURE + "2023-11-17 00:00:01.2500000,10,2\r\n2023-11-16 23:59:59.7500000,20,3\n")
    assert [(a.at, a.prompt, a.answer) for a in trace.arrivals] == [(0.0, 20, 3), (1.5, 10, 2)]


def test_ticks_are_spread_and_the_same_numbers_make_the_same_trace() -> None:
    text = "\n".join(f'{{"timestamp": {3000 * (n // 10)}, "input_length": 9, "output_length": 1}}' for n in range(200))
    trace = parse(text, random.Random(1).random)
    assert trace.tick_s == 3.0
    assert trace == parse(text, random.Random(1).random)
    assert trace != parse(text, random.Random(2).random)
    times = [a.at for a in trace.arrivals]
    assert len(set(times)) == 200
    assert all(a <= b for a, b in pairwise(times))
    assert [sum(3 * k <= at < 3 * k + 3 for at in times) for k in range(20)] == [10] * 20


def test_times_that_differ_stay_as_they_are() -> None:
    text = AZURE + "".join(f"2023-11-16 18:17:{n:02d},5,5\n" for n in (3, 4, 4, 9))
    assert [a.at for a in parse(text).arrivals] == [0.0, 1.0, 1.0, 6.0]


def test_faster_and_shorter() -> None:
    trace = parse(AZURE + "".join(f"2023-11-16 18:17:{n:02d},5,5\n" for n in range(10)))
    assert trace.scaled(2.0).seconds == 4.5
    assert len(trace.first(3.0).arrivals) == 3
    with pytest.raises(TraceError, match="no request of the trace comes in its first 0 s"):
        trace.first(0.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "t is empty"),
        ("hello", r"t, line 1: this is neither a JSON object .* nor the head TIMESTAMP,ContextTokens,GeneratedTokens .*'hello'"),
        (AZURE, "t has a head and no requests"),
        (AZURE + "2023-11-16 18:17:03,1", "t, line 2: 2 cells instead of 3"),
        (AZURE + "\n2023-13-16 18:17:03,1,1", "t, line 3: TIMESTAMP is '2023-13-16 18:17:03' and not like"),
        (AZURE + "now,1,1", "t, line 2: TIMESTAMP is 'now' and not like"),
        (AZURE + "2023-11-16 18:17:03,x,1", "t, line 2: ContextTokens is 'x' and not a number of tokens"),
        (AZURE + "2023-11-16 18:17:03,1,0", "t, line 2: GeneratedTokens is 0, allowed is 1 to 100,000,000"),
        (ONE + '\n{"timestamp": 1}', "t, line 2: .*input_length"),
        (ONE + "\n{", "t, line 2: Input data was truncated"),
        (ONE.replace("1300", "0"), "t, line 1: input_length is 0"),
        (ONE + "\n" + ONE.replace("1300", "5000"), "t, line 2: 3 hash_ids do not cut a prompt of 5000 tokens into blocks of 512 tokens"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_file_and_line(text: str, sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
