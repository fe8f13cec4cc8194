"""One answer out of several: samples, usage, input logprobs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.errors import EngineError
from disagg.router.merge import InputLogprobs, StreamMerge, merge_usage, merge_whole, sample_bodies
from disagg.router.openai import DONE_EVENT, ClientRequest, Route, encode_event, parse_event, parse_request

CHAT, COMPLETIONS, GENERATE = Route.CHAT, Route.COMPLETIONS, Route.GENERATE


def asked(route: Route, **fields: Any) -> ClientRequest:
    bases: dict[Route, dict[str, Any]] = {CHAT: {"messages": []}, COMPLETIONS: {"prompt": "p"}, GENERATE: {"text": "t"}}
    return parse_request(route, json.dumps({**bases[route], **fields}).encode())


def bodies(request: ClientRequest) -> list[Any]:
    return [json.loads(b"{" + rest) for rest in sample_bodies(request)]


def dumped(*values: Any) -> list[bytes]:
    return [json.dumps(v).encode() for v in values]


# --- n requests out of one


def test_each_sample_has_its_own_seed_and_no_n() -> None:
    assert bodies(asked(CHAT, n=3, seed=7, x={"n": 3})) == [{"messages": [], "seed": 7 + i, "x": {"n": 3}} for i in range(3)]


@pytest.mark.parametrize("fields", [{}, {"seed": None}])
def test_without_a_seed_none_is_made_up(fields: dict[str, Any]) -> None:
    assert bodies(asked(COMPLETIONS, n=2, **fields)) == [{"prompt": "p", **fields}] * 2


def test_the_native_route_carries_n_and_seed_in_its_sampling_params() -> None:
    sampling = {"n": 2, "sampling_seed": 10, "temperature": 0.5}
    assert bodies(asked(GENERATE, sampling_params=sampling)) == [
        {"text": "t", "sampling_params": {"sampling_seed": 10 + i, "temperature": 0.5}} for i in range(2)
    ]
    both = asked(GENERATE, text=["a", "b"], sampling_params=[sampling, {"n": 2}])
    assert [b["sampling_params"] for b in bodies(both)] == [[{"sampling_seed": 10 + i, "temperature": 0.5}, {}] for i in range(2)]


def test_all_else_stays_as_it_was_sent() -> None:
    body = b'{"n": 2, "seed": 18446744073709551615, "messages": [ ], "x": 1.10e+1, "y": 1e999, "z": 123456789012345678901234567890}'
    assert sample_bodies(parse_request(CHAT, body)) == [
        b'"seed":%d,"messages":[ ],"x":1.10e+1,"y":1e999,"z":123456789012345678901234567890}' % (2**64 - 1 + i) for i in range(2)
    ]


@given(st.integers(2, 64), st.integers(-5, 5) | st.none(), st.lists(st.text(max_size=3), min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_a_pair_never_sees_n(n: int, seed: int | None, prompts: list[str]) -> None:
    made = bodies(asked(COMPLETIONS, n=n, seed=seed, prompt=prompts))
    assert len(made) == n
    assert all("n" not in b and b["prompt"] == prompts for b in made)
    assert [b["seed"] for b in made] == [None if seed is None else seed + i for i in range(n)]


# --- whole answers


def answer(*texts: str, prompt: int = 7, completion: int = 3, **more: Any) -> dict[str, Any]:
    choices = [{"index": i, "text": t, "finish_reason": "stop"} for i, t in enumerate(texts)]
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, "prompt_tokens_details": None}
    return {"id": f"cmpl-{texts[0]}", "object": "text_completion", "choices": choices, "usage": usage, **more}


def test_choices_are_numbered_as_openai_numbers_them() -> None:
    merged = json.loads(merge_whole(asked(COMPLETIONS, n=3), dumped(*(answer(f"a{s}", f"b{s}") for s in range(3)))))
    assert [(c["index"], c["text"]) for c in merged["choices"]] == list(enumerate(["a0", "a1", "a2", "b0", "b1", "b2"]))
    assert merged["id"] == "cmpl-a0"


def test_the_prompt_counts_once() -> None:
    merged = json.loads(merge_whole(asked(COMPLETIONS, n=2), dumped(answer("a"), answer("b", completion=5))))
    assert merged["usage"] == {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15, "prompt_tokens_details": None}
    assert merge_usage([{}, {"completion_tokens": None}])["total_tokens"] == 0


def test_an_answer_without_usage_gets_none() -> None:
    merged = json.loads(merge_whole(asked(COMPLETIONS, n=2), dumped({**answer("a"), "usage": None}, {**answer("b"), "usage": None})))
    assert merged["usage"] is None


def test_the_native_route_answers_a_list_with_a_prompts_samples_side_by_side() -> None:
    one = asked(GENERATE, sampling_params={"n": 2})
    assert json.loads(merge_whole(one, dumped({"text": "a"}, {"text": "b"}))) == [{"text": "a"}, {"text": "b"}]
    several = asked(GENERATE, text=["p", "q"], sampling_params={"n": 2})
    assert [
        a["text"] for a in json.loads(merge_whole(several, dumped([{"text": "p0"}, {"text": "q0"}], [{"text": "p1"}, {"text": "q1"}])))
    ] == (["p0", "p1", "q0", "q1"])


@pytest.mark.parametrize(
    ("route", "bad"),
    [
        *((CHAT, b) for b in (b"", b"not JSON", b"[]", b"3", b"null", b"{}", b'{"choices":3}', b'{"choices":[3]}', b'{"choices":[{}]}')),
        *((CHAT, b) for b in (b'{"choices":[{"index":"x"}]}', b'{"choices":[],"usage":3}', b'{"choices":[]}', b"[" * 5000)),
        (CHAT, b'{"choices":[],"usage":{"completion_tokens":"many"}}'),
        *((GENERATE, b) for b in (b"", b'[{"text":"a"},{"text":"b"}]', b"[]")),
    ],
)
def test_an_answer_of_another_shape_is_the_engines_fault(route: Route, bad: bytes) -> None:
    request = asked(route, n=2) if route is CHAT else asked(route, sampling_params={"n": 2})
    good = dumped(answer("a") if route is CHAT else {"text": "a"})[0]
    with pytest.raises(EngineError, match="shape"):
        merge_whole(request, [good, bad])


# --- streams


def chunk(text: str, index: int = 0, identity: str = "x", **more: Any) -> bytes:
    return encode_event({"id": identity, "object": "c", "choices": [{"index": index, "delta": {"content": text}}], **more})


def test_streams_become_one_with_one_id_and_their_own_indices() -> None:
    merge = StreamMerge(asked(COMPLETIONS, n=2, prompt=["p", "q"], stream=True))
    seen = [parse_event(merge.rewrite(s, chunk("t", index, f"id-{s}"))) for s, index in ((1, 0), (0, 0), (0, 1), (1, 1))]
    assert [(e["id"], e["choices"][0]["index"]) for e in seen if e] == [("id-1", 1), ("id-1", 0), ("id-1", 2), ("id-1", 3)]
    assert merge.finish() == b""


def test_one_usage_chunk_comes_at_the_end() -> None:
    merge = StreamMerge(asked(CHAT, n=2, stream=True, stream_options={"include_usage": True}))
    for sample, completion in ((0, 2), (1, 5)):
        assert merge.rewrite(sample, chunk("a", usage=None)) != b""
        usage = {"prompt_tokens": 4, "completion_tokens": completion, "total_tokens": 4 + completion}
        assert merge.rewrite(sample, encode_event({"id": "y", "object": "c", "choices": [], "usage": usage})) == b""
        assert merge.rewrite(sample, DONE_EVENT) == b""
    last = parse_event(merge.finish())
    assert last == {"id": "x", "object": "c", "choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 7, "total_tokens": 11}}


def test_native_events_are_numbered() -> None:
    merge = StreamMerge(asked(GENERATE, text=["p", "q"], sampling_params={"n": 3}, stream=True))
    seen = [
        parse_event(merge.rewrite(s, encode_event({"text": "t", **more}))) for s, more in ((2, {}), (0, {"index": 1}), (1, {"index": None}))
    ]
    assert [e["index"] for e in seen if e] == [2, 3, 1]


@pytest.mark.parametrize(
    "event",
    [b"data: {", b"data: " + b"[" * 5000, *(b'data: {"choices":%s}' % c for c in (b"3", b"[3]", b"[{}]", b'[{"index":"x"}]', b'{"a":1}'))],
)
def test_an_event_of_another_shape_is_the_engines_fault(event: bytes) -> None:
    with pytest.raises(EngineError):
        StreamMerge(asked(CHAT, n=2, stream=True)).rewrite(1, event)


# --- input logprobs


def native(*logprobs: float, index: int | None = None, **more: Any) -> dict[str, Any]:
    info = {"input_token_logprobs": [[p, 1, None] for p in logprobs], **more}
    return {"text": "t", "meta_info": info} | ({} if index is None else {"index": index})


def shown(value: Any) -> list[float]:
    return [p for p, *_ in value["meta_info"]["input_token_logprobs"]]


def test_prefills_logprobs_stand_in_front_of_decodes() -> None:
    merge = InputLogprobs(dumped(native(-1, -2))[0])
    assert shown(json.loads(merge.in_whole(dumped(native(-3))[0]))) == [-1, -2, -3]
    assert shown(json.loads(merge.in_whole(dumped({"text": "t", "meta_info": {}})[0]))) == [-1, -2]


def test_each_prompt_of_a_list_gets_its_own() -> None:
    merge = InputLogprobs(dumped([native(-1), native(-2)])[0])
    assert [shown(v) for v in json.loads(merge.in_whole(dumped([native(-3), native(-4), native(-5)])[0]))] == [[-1, -3], [-2, -4], [-5]]


def test_streams_on_both_sides() -> None:
    prefill = b"".join(encode_event(native(-1 - i, index=i)) for i in range(2)) + DONE_EVENT
    merge = InputLogprobs(prefill)
    for index in (1, 0, 1):
        event = merge.in_event(encode_event(native(-9, index=index)).removesuffix(b"\n\n"))
        assert not event.endswith(b"\n")
        assert shown(parse_event(event)) == [-1 - index, -9]
    assert merge.in_event(b"data: [DONE]") == b"data: [DONE]"


def test_only_keys_that_prefill_sent_are_touched() -> None:
    merge = InputLogprobs(dumped({"meta_info": {"input_top_logprobs": None, "id": "p"}})[0])
    merged = json.loads(merge.in_whole(dumped({"meta_info": {"id": "d", "input_top_logprobs": [1]}})[0]))
    assert merged == {"meta_info": {"id": "d", "input_top_logprobs": [1]}}


@pytest.mark.parametrize(
    "body", [b"", b"oops", b"3", b"[3]", b'{"meta_info":3}', b'{"meta_info":{"input_token_logprobs":3}}', b"data: {", b"[" * 5000]
)
def test_garbage_of_prefill_is_found_where_somebody_can_be_told(body: bytes) -> None:
    merge = InputLogprobs(body)  # runs inside of `data_received`, where nobody catches
    with pytest.raises(EngineError):
        merge.in_whole(dumped(native(-1))[0])
    with pytest.raises(EngineError):
        merge.in_event(encode_event(native(-1)))


@pytest.mark.parametrize("body", [b"oops", b"3", b"[3]", b"[" * 5000])
def test_garbage_of_decode_is_an_engine_error(body: bytes) -> None:
    with pytest.raises(EngineError):
        InputLogprobs(dumped(native(-1))[0]).in_whole(body)
