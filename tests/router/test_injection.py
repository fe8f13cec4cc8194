"""Text that would like to be more than text: events, header lines, whole answers."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.errors import EngineError, EngineRefusedError, RequestError, UnknownModelError
from disagg.router.merge import StreamMerge
from disagg.router.openai import Route, encode_event, error_body, error_event, models_body, parse_event, parse_request
from tests.fake_engine import Call, answer_well, chat_chunk
from tests.fuzz import TIMES
from tests.router.conftest import CHAT, Rig
from tests.router.raw import answers, exchange, post

EVIL = (
    "\r",
    "\n",
    "\r\n\r\ndata: [DONE]\n\n",
    "\u2028",
    "\u2029",
    "\x85",
    "\x00",
    "\x0b\x0c\x1c\x1d\x1e",
    '"}\n\ndata: {',
    "data:",
    ": ",
    "\ufeff",
    "é",
    "😀",
    "\\r",
    "</script>",
)
evil = (
    st.lists(st.sampled_from(EVIL) | st.text(max_size=4), max_size=8)
    .map("".join)
    .filter(lambda t: t.isascii() or not any("\ud800" <= c <= "\udfff" for c in t))
)


def read(stream: bytes) -> list[Any]:
    """The events as a reader understands them that cuts lines wherever any reader does."""
    text = stream.decode()
    assert not text.startswith("\ufeff")
    events: list[Any] = []
    data: list[str] = []
    for line in text.splitlines():
        if not line:
            events.append(json.loads("\n".join(data)))
            data = []
        else:
            assert line.startswith("data: "), "no field but data"
            data.append(line[6:])
    assert not data, "each event has an end"
    return events


@given(evil)
@settings(deadline=None, max_examples=2000 * TIMES)
def test_what_the_router_writes_is_one_event_that_says_what_was_meant(text: str) -> None:
    value = {"model": text, "id": text, "choices": [{"index": 0, "delta": {"content": text}}], text: text}
    assert read(encode_event(value)) == [value]
    assert parse_event(encode_event(value)) == value
    for error in (EngineError(text), RequestError(text, param=text, code=text), UnknownModelError(text)):
        (event,) = read(error_event(error))
        assert event["error"]["message"] == text
        assert event == json.loads(error_body(error))
    refusal = EngineRefusedError(
        "x", status=400, body=msgspec.json.encode({"error": {"message": text, "type": text, "param": text, "code": text}})
    )
    assert read(error_event(refusal))[0]["error"]["message"] == text
    assert json.loads(models_body({text: 1}, created=0))["data"][0]["id"] == text


@given(evil, evil)
@settings(deadline=None, max_examples=500 * TIMES)
def test_merged_streams_say_what_the_engines_said(text: str, name: str) -> None:
    request = parse_request(Route.CHAT, b'{"messages":[],"n":2}')
    merge = StreamMerge(request)
    chunk = {**chat_chunk(text), "model": name, "id": name}
    event = b"data: " + json.dumps(chunk, ensure_ascii=False).encode()  # as engines write it
    (seen,) = read(merge.rewrite(1, event))
    assert seen["choices"][0]["delta"]["content"] == text
    assert (seen["id"], seen["model"]) == (name, name)


def test_the_reader_of_this_test_sees_what_is_not_escaped() -> None:
    with pytest.raises((AssertionError, json.JSONDecodeError)):
        read(b"data: " + msgspec.json.encode({"a": "\u2028"}) + b"\n\n")
    with pytest.raises((AssertionError, json.JSONDecodeError)):
        read(b'data: {"a": "\r"}\n\n')


@pytest.mark.parametrize("text", EVIL)
async def test_an_engines_error_is_one_event_for_the_client(rig: Rig, text: str) -> None:
    async def fail(call: Call) -> None:
        if call.engine is not rig.decode:
            await answer_well(call)
            return
        await call.event(chat_chunk("one"))
        await call.event({"error": {"message": text, "type": "BadRequest", "code": 400}})
        await call.end()

    rig.decode.behave = fail
    async with await rig.post({**CHAT, "stream": True}) as response:
        events = read(await response.read())
    assert [e["choices"][0]["delta"]["content"] for e in events[:1]] == ["one"]
    assert [e["error"]["message"] for e in events[1:]] == [text]


@pytest.mark.parametrize("text", [t for t in EVIL if t.isprintable() or t in "\r\n\u2028\x85"])
async def test_a_model_that_is_not_there_is_named_and_no_more(rig: Rig, text: str) -> None:
    async with await rig.post({**CHAT, "model": f"a{text}b", "stream": True}) as response:
        assert response.status == 404
        assert {name.lower() for name in response.headers} <= {"content-type", "content-length", "x-request-id"}
        assert (await response.json())["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("value", ["a\tb", "\x7f", "é", "\x01", "a" * 500, "plain"])
async def test_a_clients_request_id_comes_back_only_where_it_is_plain(rig: Rig, value: str) -> None:
    data = await exchange(rig.url, post(msgspec.json.encode(CHAT), f"x-request-id: {value}", "Connection: close"))
    (answer,) = answers(data)
    if answer.status == 400:
        assert value in {"\x7f", "\x01"}
        return
    lines = [line for line in answer.head.split(b"\r\n") if line.startswith(b"x-client-request-id: ")]
    assert lines == ([b"x-client-request-id: " + value[:200].encode()] if value.isascii() and value.isprintable() else [])
