"""Bodies that nobody meant: a sentence for their sender, never a traceback, never a fault of ours."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.errors import RequestError
from disagg.model import Role
from disagg.router.openai import MAX_DEPTH, MAX_NESTED, MAX_PROMPTS, ClientRequest, Route, key_prefix, parse_request
from tests.fuzz import TIMES
from tests.router.conftest import running_rig

MUTANTS = 20_000 * TIMES
SAMPLE = 300

SEEDS: dict[Route, tuple[bytes, ...]] = {
    Route.CHAT: (
        b'{"model":"fake","messages":[{"role":"user","content":"h\\u00e9 \\ud83d\\ude00 \\"x\\""}],"stream":true,"n":2,"seed":7,"top_p":1}',
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"[{\\\\"}]}],"stream_options":{"include_usage":true},"rid":"mine"}',
    ),
    Route.COMPLETIONS: (
        b'{"model":"fake","prompt":["a","b"],"max_tokens":5,"temperature":1e-3}',
        b'{"prompt":[[1,2],[3]],"n":2,"logit_bias":{"5":-100}}',
    ),
    Route.GENERATE: (
        b'{"text":["a","b"],"sampling_params":[{"n":2},{"n":2,"max_new_tokens":3}],"return_logprob":[true,false]}',
        b'{"input_ids":[1,2,3],"sampling_params":{"stop":["x"]},"bootstrap_room":9}',
    ),
}
PARTS = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"01", b"1.", b".5", b"0x1", b"1e", b"nul", b"True", b"undefined", b"'a'"),
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xef\xbb\xbf", b"\x00", b"\x1f", b"\x7f", b"\xe2\x80\xa8"),
    *(b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\u00"', b'"\\x"', b'"\\', b"\\", b'"', b"[", b"]", b"{", b"}", b",", b":", b"/*", b"//", b"#"),
    *(
        b"[" * 70 + b"]" * 70,
        b"[" * 5000,
        b'{"a":' * 70,
        b'"rid":1,',
        b'"n":-1,',
        b'"n":64,',
        b'"n":1e1,',
        b'"stream":1,',
        b'"model":[],',
        b"9" * 5000,
    ),
    *(
        b'"seed":1e400,',
        b'"messages":null,',
        b'"messages":"x",',
        b'"prompt":{},',
        b'"text":1,',
        b'"input_ids":"a",',
        b'"sampling_params":[],',
        b"[]",
        b"{}",
        b"null",
    ),
)


def mutant(chance: random.Random, body: bytes) -> bytes:
    for _ in range(chance.randint(1, 3)):
        at, to = sorted((chance.randint(0, len(body)), chance.randint(0, len(body))))
        match chance.randrange(6):
            case 0:
                body = body[:at] + chance.choice(PARTS) + body[at:]
            case 1:
                body = body[:at] + chance.choice(PARTS) + body[to:]
            case 2:
                body = body[:at] + body[min(to, at + 8) :]
            case 3:
                body = body[:at]
            case 4:
                body = body[:to] + body[at:]
            case _:
                body = body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :]
    return body


def strict(body: bytes) -> dict[str, Any]:
    """What a strict reader makes of it. Raises ValueError."""

    def no(word: str) -> None:
        raise ValueError(word)

    value = json.loads(body.decode(), parse_constant=no, parse_int=str)
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004
    return value


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def judged(route: Route, body: bytes) -> ClientRequest | None:
    """Parses it; whatever is let through is what a strict reader reads, and the router's keys stand in front of it alone."""
    request = refusal = None
    try:
        request = parse_request(route, body)
    except RequestError as error:
        refusal = error
    if refusal is not None or request is None:
        assert refusal is not None
        assert refusal.status == 400
        assert 0 < len(str(refusal)) < 500
        assert "Traceback" not in str(refusal)
        return None
    value = strict(body)
    assert depth(value) <= MAX_DEPTH
    own = {"rid", "bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "disagg_prefill_dp_rank"}
    sent = json.loads(key_prefix({"rid": "ours"}, request.rest) + request.rest, parse_int=str)
    wanted = {**{k: v for k, v in value.items() if k not in own}, "rid": "ours"}
    assert json.dumps(sent, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    return request


def test_twenty_thousand_mutants_are_refused_with_a_sentence_or_are_what_a_strict_reader_reads() -> None:
    chance = random.Random(42)
    seen: Counter[bool] = Counter()
    for number in range(MUTANTS):
        route = list(SEEDS)[number % 3]
        seen[judged(route, mutant(chance, chance.choice(SEEDS[route]))) is not None] += 1
    assert min(seen.values()) > MUTANTS / 50, "both outcomes are tried"


def test_the_judge_itself_refuses_what_it_must() -> None:
    for body in (b'{"a":NaN}', b'{"a":"\\ud800"}', b'{"a":"\xff"}', b"[]", b'{"a":1,}'):
        with pytest.raises(ValueError):  # noqa: PT011  # all of them are
            strict(body)


async def test_a_sample_of_them_over_a_socket_is_never_a_fault_of_ours() -> None:
    chance = random.Random(7)
    async with running_rig(Role.PREFILL, Role.DECODE) as rig:
        statuses: Counter[int] = Counter()
        for number in range(SAMPLE):
            route = list(SEEDS)[number % 3]
            body = mutant(chance, chance.choice(SEEDS[route]))
            async with await rig.post(body, route.value) as response:
                statuses[response.status] += 1
                text = await response.read()
                if response.status == 400:
                    assert msgspec.json.decode(text)["error"]["type"] == "invalid_request_error"
        assert statuses.keys() <= {200, 400, 404, 413}, statuses
        assert statuses[400] > SAMPLE / 4
        assert 'outcome="internal_error"' not in rig.metrics()


@given(
    st.recursive(
        st.none() | st.text(max_size=5) | st.integers(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    st.integers(0, 80),
)
@settings(deadline=None, max_examples=200)
def test_depth_is_counted_as_nesting_and_never_in_strings(value: Any, more: int) -> None:
    for _ in range(more):
        value = [value, '[["\\']
    body = msgspec.json.encode({"messages": [], "x": value, "pad": [[] for _ in range(32)]})
    is_fine = depth({"x": value}) <= MAX_DEPTH
    assert (judged(Route.CHAT, body) is not None) == is_fine


@pytest.mark.parametrize("pad", [0, 1, 65_530, 65_536, 65_537, 131_071])
def test_brackets_and_escapes_at_the_edge_of_a_piece(pad: int) -> None:
    for text in ('\\" [[[', "\\" * 9 + '"[', '"' * 7 + "[{", "é[" * 9):
        body = json.dumps({"messages": [" " * pad + text * 20, [[]] * 40]}, ensure_ascii=False).encode()
        assert judged(Route.CHAT, body) is not None
        deep = json.dumps({"messages": [" " * pad + text * 20, json.loads("[" * 63 + "]" * 63)]}, ensure_ascii=False).encode()
        assert judged(Route.CHAT, deep) is None


@pytest.mark.parametrize(
    ("route", "body", "word"),
    [
        (Route.CHAT, b'{"messages":[' + b",".join([b"[]"] * (MAX_NESTED + 1)) + b"]}", "lists and objects"),
        (Route.CHAT, b'{"messages":[],"rid":1,' + b",".join(b'"%d":1' % i for i in range(20_000)) + b"}", "fields"),
        (Route.CHAT, b'{"messages":[],"n":2,' + b",".join(b'"%d":1' % i for i in range(20_000)) + b"}", "fields"),
        (Route.COMPLETIONS, b'{"prompt":[' + b",".join([b'"a"'] * (MAX_PROMPTS + 1)) + b"]}", "or more"),
        (Route.COMPLETIONS, b'{"prompt":[' + b",".join([b"[1]"] * (MAX_PROMPTS + 1)) + b"]}", "or more"),
        (Route.COMPLETIONS, b'{"prompt":[[1],2]}', "prompt list"),
        (Route.COMPLETIONS, b'{"prompt":[[1],[2.5]]}', "prompt list"),
        (Route.COMPLETIONS, b'{"prompt":[[1],[[2]]]}', "prompt list"),
        (Route.COMPLETIONS, b'{"prompt":["a",["b"]]}', "prompt list"),
        (Route.COMPLETIONS, b'{"prompt":5}', "a list or a string"),
        (Route.CHAT, b'{"messages":"a"}', "takes a list"),
        (Route.GENERATE, b'{"input_ids":5}', "takes a list"),
    ],
)
def test_what_would_cost_more_than_it_says_is_refused(route: Route, body: bytes, word: str) -> None:
    with pytest.raises(RequestError, match=word):
        parse_request(route, body)


def test_the_last_of_two_equal_keys_counts_here_as_in_the_engines() -> None:
    """Finding them would cost more than half of a parse. What counts is that router and engines agree, and that no spelling gets past."""
    request = judged(Route.CHAT, b'{"model":"a","model":"b","messages":[],"messages":[{}],"rid":1,"r\\u0069d":2}')
    assert request is not None
    assert request.model == "b"
