"""Engines that send garbage: the client gets an error, never an end that looks like a good one."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from disagg.router.upstream import frame
from tests.fake_engine import Call, answer_well, chat_answer, chat_chunk
from tests.router.conftest import CHAT, Rig

pytestmark = pytest.mark.usefixtures("judged_soon")

LIMIT_S = 20.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EVENT = b"data: " + msgspec.json.encode(chat_chunk("one")) + b"\n\n"
ANSWER = msgspec.json.encode(chat_answer("good"))

STREAMS = {
    "nothing": b"",
    "not HTTP": b"hello\r\n\r\n",
    "a cut head": b"HTTP/1.1 200 OK\r\nContent-",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    "an endless status line": b"HTTP/1.1 200 " + b"O" * 100_000,
    "a head alone": CHUNKED,
    "an empty stream": CHUNKED + b"0\r\n\r\n",
    "one event, then the end": CHUNKED + frame(EVENT),
    "one event, then the last chunk": CHUNKED + frame(EVENT) + b"0\r\n\r\n",
    "half an event": CHUNKED + frame(EVENT + EVENT[:-10]) + b"0\r\n\r\n",
    "a wrong chunk size": CHUNKED + frame(EVENT) + b"zz\r\n",
    "a negative chunk size": CHUNKED + frame(EVENT) + b"-5\r\nhello\r\n",
    "a chunk that is too short": CHUNKED + frame(EVENT) + b"5\r\nhelloworld\r\n",
    "an endless chunk size": CHUNKED + frame(EVENT) + b"0" * 1000,
    "a length that is too long": HEAD + b"Content-Length: %d\r\n\r\n" % (len(EVENT) + 9) + EVENT,
    "a length that is too short": HEAD + b"Content-Length: %d\r\n\r\n" % (len(EVENT) - 9) + EVENT,
    "a length that is none": HEAD + b"Content-Length: x\r\n\r\n" + EVENT,
    "until close": HEAD + b"\r\n" + EVENT,
    "200, then an error": CHUNKED + frame(EVENT + b'data: {"error": {"message": "out of memory", "code": 500}}\n\n') + b"0\r\n\r\n",
    "200, then an error that is not JSON": CHUNKED + frame(EVENT + b'data: {"error": oops\n\n') + b"0\r\n\r\n",
    "200, then an error and an end": CHUNKED + frame(b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n') + b"0\r\n\r\n",
    "a page instead of a stream": JSON + b"Content-Length: 2\r\n\r\n{}",
    "the end within an event": CHUNKED + frame(b'data: "data: [DONE]') + b"0\r\n\r\n",
    "an end without its blank line": CHUNKED + frame(EVENT + b"data: [DONE]\n") + b"0\r\n\r\n",
    "500": b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n",
    "302": b"HTTP/1.1 302 no\r\nLocation: http://evil/\r\nContent-Length: 0\r\n\r\n",
    "zeros": b"\x00" * 1000,
}
WHOLE = {
    **{k: STREAMS[k] for k in ("nothing", "not HTTP", "a cut head", "an endless head", "500", "302", "zeros")},
    "a length that is too long": JSON + b"Content-Length: %d\r\n\r\n" % (len(ANSWER) + 1) + ANSWER,
    "a length that is too short": JSON + b"Content-Length: %d\r\n\r\n" % (len(ANSWER) - 1) + ANSWER,
    "a cut chunk": JSON + b"Transfer-Encoding: chunked\r\n\r\n" + frame(ANSWER)[:-20],
    "chunks without the last": JSON + b"Transfer-Encoding: chunked\r\n\r\n" + frame(ANSWER),
}


def sends(rig: Rig, raw: bytes) -> None:
    async def behave(call: Call) -> None:
        if call.engine is not rig.decode:
            await answer_well(call)
            return
        call.raw_write(raw)
        await asyncio.sleep(0)
        assert call._request.transport is not None
        call._request.transport.close()
        await asyncio.Event().wait()

    rig.decode.behave = behave


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_of_garbage_never_looks_complete(rig: Rig, name: str) -> None:
    sends(rig, STREAMS[name])
    async with asyncio.timeout(LIMIT_S), await rig.post({**CHAT, "stream": True}) as response:
        text = await response.text()
    assert "[DONE]" not in text
    assert '"stop"' not in text
    if response.status == 200:
        assert '"error"' in text.strip().rpartition("\n\n")[2]
    else:
        assert 400 <= response.status < 600
        assert msgspec.json.decode(text)["error"]["message"]


@pytest.mark.parametrize("name", WHOLE)
async def test_a_broken_answer_is_an_error(rig: Rig, name: str) -> None:
    sends(rig, WHOLE[name])
    async with asyncio.timeout(LIMIT_S), await rig.post(CHAT) as response:
        assert response.status >= 500
        assert msgspec.json.decode(await response.read())["error"]["message"]


async def test_a_stream_that_ends_without_a_reason_gets_none_from_us(rig: Rig) -> None:
    sends(rig, CHUNKED + frame(EVENT + b"data: [DONE]\n\n") + b"0\r\n\r\n")
    async with await rig.post({**CHAT, "stream": True}) as response:
        text = await response.text()
    assert '"stop"' not in text


async def test_the_same_bytes_whole_are_an_answer(rig: Rig) -> None:
    """So it is the garbage that was refused above."""
    sends(rig, CHUNKED + frame(EVENT + b"data: [DONE]\n\n") + b"0\r\n\r\n")
    async with await rig.post({**CHAT, "stream": True}) as response:
        assert (response.status, await response.read()) == (200, EVENT + b"data: [DONE]\n\n")
    sends(rig, JSON + b"Content-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER)
    async with await rig.post(CHAT) as response:
        assert (response.status, await response.read()) == (200, ANSWER)
