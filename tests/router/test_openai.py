"""The shapes of the public listener: what clients may send, and what reaches the engines of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.errors import (
    DisaggError,
    EngineError,
    EngineRefusedError,
    EngineTimeoutError,
    NoCapacityError,
    RequestError,
    UnknownModelError,
)
from disagg.policy.prefix import IDS_NAMED, hashes
from disagg.router.openai import (
    DONE_EVENT,
    MAX_DEPTH,
    MAX_PROMPTS,
    MAX_SAMPLES,
    ClientRequest,
    Route,
    encode_event,
    error_body,
    error_event,
    key_prefix,
    may_hold_failure,
    models_body,
    parse_event,
    parse_request,
    split_failure,
)

CHAT, COMPLETIONS, GENERATE = Route.CHAT, Route.COMPLETIONS, Route.GENERATE
MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
ENOUGH: dict[Route, dict[str, Any]] = {CHAT: MESSAGES, COMPLETIONS: {"prompt": "hi"}, GENERATE: {"text": "hi"}}
OURS = {"rid": "ours", "bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 2**63 - 1}
OWN_KEYS = (*OURS, "bootstrap_pair_key", "disagg_prefill_dp_rank")


def parse(route: Route, body: Any) -> ClientRequest:
    return parse_request(route, body if isinstance(body, bytes) else json.dumps(body).encode())


def refused(route: Route, body: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(route, body)
    assert caught.value.status == 400
    return caught.value


def at_engine(request: ClientRequest) -> Any:
    """What an engine reads. A key that stands twice in it would be read by chance."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        assert not {k for k in keys if keys.count(k) > 1} & set(OWN_KEYS), f"a key of ours stands twice: {keys}"
        return dict(pairs)

    return json.loads(key_prefix(OURS, request.rest) + request.rest, object_pairs_hook=once)


# --- what is taken from a body


def test_a_small_chat_request() -> None:
    request = parse(CHAT, MESSAGES)
    assert (request.model, request.stream, request.samples, request.prompts) == ("", False, 1, None)
    assert (request.include_usage, request.merge_logprobs) == (False, False)


def test_a_full_one() -> None:
    body = {
        **MESSAGES,
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True, "x": 1},
        "n": 3,
        "seed": -1,
        "max_tokens": 1,
    }
    request = parse(CHAT, {**body, "temperature": 0, "top_p": 1, "max_completion_tokens": 5, "tools": [{"a": [{}]}]})
    assert (request.model, request.stream, request.samples, request.include_usage) == ("m", True, 3, True)


@pytest.mark.parametrize(
    "key", ["model", "stream", "stream_options", "n", "seed", "max_tokens", "temperature", "top_p", "max_completion_tokens"]
)
def test_null_means_that_a_field_was_not_sent(key: str) -> None:
    request = parse(CHAT, {**MESSAGES, key: None})
    assert (request.model, request.stream, request.samples) == ("", False, 1)


@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("body", [b' \t\r\n{"a": 1, %s} \n', b"{%s}", b"{\n%s\n}"])
def test_white_space_does_not_matter(route: Route, body: bytes) -> None:
    request = parse(route, body % json.dumps(ENOUGH[route]).encode()[1:-1])
    assert at_engine(request).items() >= {**OURS, **ENOUGH[route]}.items()


@pytest.mark.parametrize(
    ("prompt", "length"),
    [
        ('"text"', None),
        ("[1, 2, 3]", None),
        ("[ 1]", None),
        ('["a"]', 1),
        ('["a", "b"]', 2),
        ('[ "a" , "]" ]', 2),
        ("[[1], [2], [3]]", 3),
        ("[\n\t[1]]", 1),
        ("[" + " " * 1000 + '"a", "b"]', 2),
        (" " * 1000 + '["a", "b"]', 2),
        ('["\\u005b"]', 1),
    ],
)
@pytest.mark.parametrize(("route", "key"), [(COMPLETIONS, "prompt"), (GENERATE, "text"), (GENERATE, "input_ids")])
def test_a_list_of_prompts_is_told_from_one_prompt(route: Route, key: str, prompt: str, length: int | None) -> None:
    assert parse(route, f'{{"{key}": {prompt}}}'.encode()).prompts == length


@pytest.mark.parametrize(
    "prompt",
    ["[]", "[ ]", '["a", 1]', '["a", null]', '[[1], "a"]', '[[1], ["a"]]', "[[1], [true]]", "[[1], [1.5]]", "[[1], 2]", "[[1e999]]"],
)
def test_a_list_of_prompts_of_several_kinds_is_a_400(prompt: str) -> None:
    error = refused(COMPLETIONS, f'{{"prompt": {prompt}}}'.encode())
    assert error.param == "prompt"


def test_a_list_of_prompts_has_a_limit() -> None:
    assert parse(COMPLETIONS, {"prompt": ["x"] * MAX_PROMPTS}).prompts == MAX_PROMPTS
    assert f"1 to {MAX_PROMPTS}" in str(refused(COMPLETIONS, {"prompt": ["x"] * (MAX_PROMPTS + 1)}))


@pytest.mark.parametrize(
    "body",
    [
        {"text": None, "input_ids": [1]},
        {"text": "a", "input_ids": None, "input_embeds": None},
        {"text": "a", "sampling_params": None},
        {"text": "a", "sampling_params": {}},
        {"text": ["a", "b"], "sampling_params": [{}, {"n": 1}]},
    ],
    ids=str,
)
def test_null_on_the_native_route_means_not_sent_either(body: dict[str, Any]) -> None:
    assert parse(GENERATE, body).samples == 1


@pytest.mark.parametrize("sampling", [{"n": 4}, [{"n": 4}, {"n": 4, "temperature": 0}]])
def test_samples_on_the_native_route(sampling: Any) -> None:
    assert parse(GENERATE, {"text": "a", "sampling_params": sampling}).samples == 4


@pytest.mark.parametrize(
    ("sampling", "limit"),
    [
        (None, 128),
        ({}, 128),
        ([], 128),
        ({"max_new_tokens": 7}, 7),
        ({"max_new_tokens": None}, None),
        ([{"max_new_tokens": 7}, {"max_new_tokens": 200}], 200),
        ([{"max_new_tokens": 7}, {}], 128),
        ([{"max_new_tokens": 7}, {"max_new_tokens": None}], None),
    ],
)
def test_how_long_an_answer_may_become_on_the_native_route(sampling: Any, limit: int | None) -> None:
    """The longest of all prompts; null is as much as the context holds."""
    assert parse(GENERATE, {"text": "a", "sampling_params": sampling}).max_tokens == limit


@pytest.mark.parametrize(
    ("value", "merge"), [(True, True), (False, False), (None, False), ([False, True], True), ([False], False), ([], False)]
)
def test_logprobs_are_merged_where_they_were_asked_for(value: Any, merge: bool) -> None:
    assert parse(GENERATE, {"text": ["a", "b"], "return_logprob": value}).merge_logprobs is merge


# --- what is refused


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (GENERATE, {}, "text"),
        (GENERATE, {"text": None}, "text"),
        (GENERATE, {"text": "a", "input_ids": [1]}, "text"),
        (GENERATE, {"input_embeds": [[0.5]]}, "input_embeds"),
        (GENERATE, {"text": "a", "input_embeds": [[0.5]]}, "input_embeds"),
        (GENERATE, {"text": "a", "sampling_params": 3}, "sampling_params"),
        (GENERATE, {"text": "a", "sampling_params": "n"}, "sampling_params"),
        (GENERATE, {"text": "a", "sampling_params": [3]}, "sampling_params"),
        (GENERATE, {"text": "a", "sampling_params": {"n": 0}}, "sampling_params"),
        (GENERATE, {"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params"),
        (GENERATE, {"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 3}]}, "sampling_params"),
        (GENERATE, {"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "sampling_params"),
        (GENERATE, {"text": "a", "stream": "yes"}, "stream"),
        (CHAT, {**MESSAGES, "n": 0}, "n"),
        (CHAT, {**MESSAGES, "n": -1}, "n"),
        (CHAT, {**MESSAGES, "n": MAX_SAMPLES + 1}, "n"),
        (CHAT, {**MESSAGES, "n": True}, "n"),
        (CHAT, {**MESSAGES, "n": "2"}, "n"),
        (CHAT, {**MESSAGES, "n": 1.5}, "n"),
        (CHAT, {**MESSAGES, "n": 10**30}, "n"),
        (CHAT, {**MESSAGES, "stream": 1}, "stream"),
        (CHAT, {**MESSAGES, "stream": "false"}, "stream"),
        (CHAT, {**MESSAGES, "stream_options": []}, "stream_options"),
        (CHAT, {**MESSAGES, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (CHAT, {**MESSAGES, "model": 3}, "model"),
        (CHAT, {**MESSAGES, "seed": 1.5}, "seed"),
        (CHAT, {**MESSAGES, "max_tokens": 0}, "max_tokens"),
        (CHAT, {**MESSAGES, "max_completion_tokens": -1}, "max_completion_tokens"),
        (CHAT, {**MESSAGES, "temperature": -0.1}, "temperature"),
        (CHAT, {**MESSAGES, "top_p": 0}, "top_p"),
        (CHAT, {**MESSAGES, "top_p": 1.1}, "top_p"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(route: Route, body: dict[str, Any], param: str) -> None:
    assert refused(route, body).param == param


DEEP = b"[" * 40 + b"]" * 40
MALFORMED = {
    "empty": b"",
    "blank": b"  ",
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "number": b"1",
    "cut": b'{"messages": [',
    "two": b'{"messages": []} {}',
    "trailing comma": b'{"messages": [],}',
    "single quotes": b"{'messages': []}",
    "comment": b'{"messages": [] /* x */}',
    "NaN": b'{"messages": NaN}',
    "NaN in an unknown field": b'{"messages": [], "x": NaN}',
    "Infinity": b'{"messages": [], "x": -Infinity}',
    "control character": b'{"messages": ["a\nb"]}',
    "bad escape": b'{"messages": ["\\q"]}',
    "leading zero": b'{"messages": [], "x": 01}',
    "byte order mark": b'\xef\xbb\xbf{"messages": []}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "latin-1 in a prompt": b'{"messages": ["\xe9"]}',
    "a surrogate": b'{"messages": ["\xed\xa0\x80"]}',
    "an overlong slash": b'{"messages": ["\xc0\xaf"]}',
    "too deep": b'{"messages": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "much too deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep and cut": b'{"messages": ' + b'{"a":' * 50_000,
    "an endless seed": b'{"messages": [], "seed": 1' + b"0" * 5000 + b"}",
}


WELL_FORMED = frozenset({"null", "list", "string", "number", "an endless seed"})


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_not_a_json_object_is_a_400_with_one_sentence(name: str) -> None:
    error = refused(CHAT, MALFORMED[name])
    assert error.code == ("invalid_value" if name in WELL_FORMED else "invalid_json"), "JSON of a wrong kind is JSON"
    assert str(error).isprintable()
    assert len(str(error)) < 200


def test_depth_counts_brackets_and_not_text() -> None:
    deepest = MAX_DEPTH - 1  # the object around it counts
    assert parse(CHAT, b'{"messages": ' + b"[" * deepest + b"]" * deepest + b"}")
    assert parse(CHAT, {"messages": ["[" * 500 + "{" * 500]})
    assert parse(CHAT, {"messages": [[{}] for _ in range(300)]})


@given(
    st.binary(max_size=80),
    st.sampled_from(list(Route)),
    st.sampled_from([b"", b'{"prompt":', b'{"messages":[],', b'{"text":"a","sampling_params":']),
)
@settings(deadline=None, max_examples=250)
def test_any_bytes_are_a_request_or_a_request_error(data: bytes, route: Route, before: bytes) -> None:
    try:
        request = parse_request(route, before + data)
    except RequestError:
        return
    assert isinstance(at_engine(request), dict)


# --- what reaches an engine


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
known_fields = {"model", "stream", "stream_options", "n", "seed", "max_tokens", "temperature", "top_p", "max_completion_tokens"}
unknown_keys = st.text(max_size=8).filter(lambda k: k not in {*known_fields, *OWN_KEYS, "messages", "input_ids"})


def written(key: str, escape: bool) -> str:
    """A key as JSON, each of its characters escaped where asked for."""
    return '"' + "".join(f"\\u{ord(c):04x}" for c in key) + '"' if escape else json.dumps(key)


@given(
    st.dictionaries(unknown_keys, json_values, max_size=5),
    st.lists(st.tuples(st.sampled_from(OWN_KEYS), json_values, st.booleans()), max_size=5),
    st.randoms(),
)
@settings(deadline=None, max_examples=200)
def test_unknown_fields_reach_the_engine_unchanged_and_the_routers_keys_cannot_be_smuggled_in(
    unknown: dict[str, Any], own: list[tuple[str, Any, bool]], chance: Any
) -> None:
    pairs = [(json.dumps(k), json.dumps(v)) for k, v in {**unknown, **MESSAGES}.items()]
    pairs += [(written(k, escape), json.dumps(v)) for k, v, escape in own]
    chance.shuffle(pairs)
    body = "{" + chance.choice([", ", ",", " ,\n"]).join(f"{k}: {v}" for k, v in pairs) + "}"
    assert at_engine(parse(CHAT, body.encode())) == {**unknown, **MESSAGES, **OURS}


def test_bytes_stay_as_they_were_sent() -> None:
    body = b'{ "messages" : [], "x": 1.10e+1, "y": 123456789012345678901234567890, "z": "\\u00e9\\/" }'
    assert parse(CHAT, body).rest == body[1:]
    assert parse(CHAT, b'{"rid": 1, "messages" : [], "y": 123456789012345678901234567890, "x": 1.10e+1}').rest == (
        b'"messages":[],"y":123456789012345678901234567890,"x":1.10e+1}'
    )


@pytest.mark.parametrize("rest", [b"}", b" }", b"\n\t }  "])
def test_keys_in_front_of_nothing_need_no_comma(rest: bytes) -> None:
    assert json.loads(key_prefix(OURS, rest) + rest) == OURS


# --- errors


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RequestError("no", param="n", code="c"), {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}),
        (UnknownModelError("no"), {"message": "no", "type": "invalid_request_error", "param": None, "code": None}),
        (NoCapacityError("no"), {"message": "no", "type": "service_unavailable", "param": None, "code": None}),
        (EngineTimeoutError("no"), {"message": "no", "type": "engine_error", "param": None, "code": None}),
        (DisaggError("no"), {"message": "no", "type": "internal_error", "param": None, "code": None}),
        (
            EngineRefusedError(
                "x", status=400, body=b'{"object":"error","message":"long","type":"BadRequestError","param":"p","code":400}'
            ),
            {"message": "long", "type": "invalid_request_error", "param": "p", "code": None},
        ),
        (
            EngineRefusedError("x", status=500, body=b'{"error":{"message":"boom","code":7}}'),
            {"message": "boom", "type": "engine_error", "param": None, "code": 7},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_in_openais_shape(error: DisaggError, shown: dict[str, Any]) -> None:
    assert json.loads(error_body(error)) == {"error": shown}
    event = error_event(error)
    assert event.startswith(b'data: {"error":')
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Internal Server Error",
        b"[]",
        b"{}",
        b'{"error": "x"}',
        b'{"error": {}}',
        b'{"message": 3}',
        b"\xff",
        b'{"error":' + b"[" * 5000,
    ],
)
def test_an_engines_error_that_makes_no_sense_is_told_in_our_words(body: bytes) -> None:
    error = EngineRefusedError("the engine d refused the request (HTTP 500)", status=500, body=body)
    assert json.loads(error_body(error))["error"]["message"] == "the engine d refused the request (HTTP 500)"


# --- events


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
@settings(deadline=None, max_examples=100)
def test_events_round_trip(value: dict[str, Any]) -> None:
    event = encode_event(value)
    assert event.count(b"\n\n") == 1
    assert parse_event(event) == value


@pytest.mark.parametrize("event", [DONE_EVENT, b": ping\n\n", b"event: x\n\n", b"data: 3\n\n", b"data: null\n\n", b"", b"data:[DONE]"])
def test_what_is_no_object_is_no_event(event: bytes) -> None:
    assert parse_event(event) is None


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: x", b"data:", b"data: " + b"[" * 5000])
def test_an_event_that_is_not_json_is_the_engines_fault(event: bytes) -> None:
    with pytest.raises(EngineError):
        parse_event(event)


GOOD = b'data: {"text":"a"}\n\n'


@pytest.mark.parametrize(
    ("bad", "status", "message"),
    [
        (b'data: {"error":{"message":"full","code":503}}\n\n', 503, "full"),
        (b'data: {"error":{"message":"odd","code":200}}\n\n', 400, "odd"),
        (b'data: {"error":{"message":"none"}}\n\n', 400, "none"),
        (b'data: {"error":"words"}\n\n', 502, "words"),
        (b'data: {"error": not json}\n\n', 502, "not JSON"),
        (b'data: {"text":"","meta_info":{"finish_reason":{"type":"abort","message":"out","status_code":507}}}\n\n', 507, "out"),
        (b'data: {"meta_info":{"finish_reason":{"type":"abort"}}}\n\n', 500, "aborted"),
    ],
)
def test_a_failure_in_a_stream_is_found_with_its_status(bad: bytes, status: int, message: str) -> None:
    for before in (b"", GOOD, GOOD * 3):
        good, error = split_failure(before + bad + GOOD)
        assert good == before
        assert error is not None
        assert (error.status, message in str(error)) == (status, True)
    assert may_hold_failure(GOOD + bad)


@pytest.mark.parametrize(
    "events",
    [
        b"",
        GOOD * 3,
        encode_event({"text": 'data: {"error": {"message": "x"}}\n\n', "more": '"type":"abort"'}),
        b'data: {"error":null,"text":"a"}\n\n',
        b'data: {"meta_info":[{"type":"abort"}]}\n\n',
        b'data: {"meta_info":{"finish_reason":{"type":"stop"},"x":{"type":"abort"}}}\n\n',
        DONE_EVENT,
    ],
)
def test_what_only_looks_like_a_failure_is_none(events: bytes) -> None:
    assert split_failure(events) == (events, None)


def test_models() -> None:
    body = msgspec.json.decode(models_body({"b": 0, "a": 8192}, created=5))
    assert body == {
        "object": "list",
        "data": [
            {"id": "a", "object": "model", "created": 5, "owned_by": "disagg", "max_model_len": 8192},
            {"id": "b", "object": "model", "created": 5, "owned_by": "disagg"},
        ],
    }


# --- token ids


@pytest.mark.parametrize(("route", "key"), [(COMPLETIONS, "prompt"), (GENERATE, "input_ids")])
def test_token_ids_are_read_where_they_are_asked_for(route: Route, key: str) -> None:
    body = json.dumps({key: [5, 6, 7, 2**32 - 1]}).encode()
    ids = parse_request(route, body, with_ids=True).ids
    assert ids is not None
    assert (ids.count, ids.kept) == (4, 4)
    assert ids.held(set(hashes([5, 6, 7, 2**32 - 1], 2)), 2) == 4
    assert parse_request(route, body).ids is None


@pytest.mark.parametrize(
    "prompt", ['"text"', '["text"]', "[[1,2],[3]]", "[]", "[-1]", "[4294967296]", "[1.5]", "[1,true]", "[1,null]", "[%s]" % ("9" * 200_000)]
)
def test_what_is_no_prompt_of_token_ids_has_none(prompt: str) -> None:
    body = b'{"prompt":%s}' % prompt.encode()
    try:
        assert parse_request(COMPLETIONS, body, with_ids=True).ids is None
    except RequestError:
        parse_refused = True
        with pytest.raises(RequestError):
            parse_request(COMPLETIONS, body)
        assert parse_refused


@pytest.mark.parametrize("key", ["cache_salt", "extra_key", "lora_path"])
def test_what_an_engine_keeps_apart_is_not_matched(key: str) -> None:
    body = json.dumps({"prompt": [1, 2, 3], key: "of a tenant"}).encode()
    assert parse_request(COMPLETIONS, body, with_ids=True).ids is None


def test_of_many_token_ids_the_first_ones_are_read() -> None:
    tokens = list(range(10_000_000, 10_000_000 + 2 * IDS_NAMED))
    ids = parse_request(COMPLETIONS, json.dumps({"prompt": tokens}).encode(), with_ids=True).ids
    assert ids is not None
    assert ids.count == len(tokens)
    assert IDS_NAMED // 2 < ids.kept <= IDS_NAMED
    assert ids.held(set(hashes(tokens, 16)), 16) == ids.kept // 16 * 16


def test_a_list_that_is_no_prompt_of_ids_is_not_counted_as_one() -> None:
    """Only its beginning is read: commas in what comes after would count as tokens, and tokens take time."""
    many = [1] * (2 * IDS_NAMED)
    for more in (["," * 100], [[1]], [None]):
        body = json.dumps({"prompt": many * 4 + more}).encode()
        assert parse_request(COMPLETIONS, body, with_ids=True).ids is None
    ids = parse_request(COMPLETIONS, json.dumps({"prompt": many * 4}).encode(), with_ids=True).ids
    assert ids is not None
    assert ids.count == 4 * len(many)


@pytest.mark.parametrize("key", ["cache_salt", "extra_key", "lora_path"])
def test_what_an_engine_keeps_apart_from_all_else_is_not_looked_for_in_its_cache(key: str) -> None:
    body = {"prompt": "a" * 4096}
    assert len(parse_request(COMPLETIONS, json.dumps(body).encode(), named=True).names) == 4
    assert not parse_request(COMPLETIONS, json.dumps({**body, key: "x"}).encode(), named=True).names
