"""Bad input costs its sender an OpenAI error object and nobody anything else."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import msgspec
import pytest

from disagg.model import Role
from tests.fake_engine import HUNG_S
from tests.router.conftest import CHAT, Rig, running_rig

CHAT_PATH, COMPLETIONS_PATH, GENERATE_PATH = "/v1/chat/completions", "/v1/completions", "/generate"


def nested(depth: int) -> bytes:
    return b'{"model":"fake","messages":' + b"[" * depth + b"]" * depth + b"}"


BAD_BODIES = {
    "no json": (CHAT_PATH, b"hello"),
    "empty": (CHAT_PATH, b""),
    "cut": (CHAT_PATH, b'{"model":"fake","messages":['),
    "a list": (CHAT_PATH, b"[]"),
    "two values": (CHAT_PATH, b'{"model":"fake","messages":[]}{}'),
    "wrong utf-8 in the prompt": (CHAT_PATH, b'{"model":"fake","messages":"\xff"}'),
    "wrong utf-8 in the model": (CHAT_PATH, b'{"model":"\xc3","messages":[]}'),
    "lone surrogate": (CHAT_PATH, b'{"model":"fake","messages":"\\ud800"}'),
    "NaN": (CHAT_PATH, b'{"model":"fake","messages":[],"temperature":NaN}'),
    "NaN in an unknown field": (CHAT_PATH, b'{"model":"fake","messages":[],"x":[NaN]}'),
    "control character": (CHAT_PATH, b'{"model":"fake","messages":"\x01"}'),
    "too deep": (CHAT_PATH, nested(70)),
    "very deep": (CHAT_PATH, nested(100_000)),
    "no messages": (CHAT_PATH, b'{"model":"fake"}'),
    "model is a number": (CHAT_PATH, b'{"model":1,"messages":[]}'),
    "stream is a word": (CHAT_PATH, b'{"model":"fake","messages":[],"stream":"yes"}'),
    "n is 0": (CHAT_PATH, b'{"model":"fake","messages":[],"n":0}'),
    "n is 65": (CHAT_PATH, b'{"model":"fake","messages":[],"n":65}'),
    "max_tokens is 0": (CHAT_PATH, b'{"model":"fake","messages":[],"max_tokens":0}'),
    "max_completion_tokens is -1": (CHAT_PATH, b'{"model":"fake","messages":[],"max_completion_tokens":-1}'),
    "temperature is a list": (CHAT_PATH, b'{"model":"fake","messages":[],"temperature":[1]}'),
    "temperature is negative": (CHAT_PATH, b'{"model":"fake","messages":[],"temperature":-1}'),
    "top_p is 2": (CHAT_PATH, b'{"model":"fake","messages":[],"top_p":2}'),
    "no prompt": (COMPLETIONS_PATH, b'{"model":"fake"}'),
    "empty prompt list": (COMPLETIONS_PATH, b'{"model":"fake","prompt":[]}'),
    "mixed prompt list": (COMPLETIONS_PATH, b'{"model":"fake","prompt":["a",1]}'),
    "no text": (GENERATE_PATH, b'{"sampling_params":{}}'),
    "text and ids": (GENERATE_PATH, b'{"text":"a","input_ids":[1]}'),
    "embeddings": (GENERATE_PATH, b'{"input_embeds":[[0.5]]}'),
    "max_new_tokens is 0": (GENERATE_PATH, b'{"text":"a","sampling_params":{"max_new_tokens":0}}'),
    "sampling_params is a word": (GENERATE_PATH, b'{"text":"a","sampling_params":"hot"}'),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_a_400_and_reaches_no_engine(rig: Rig, name: str) -> None:
    path, body = BAD_BODIES[name]
    async with asyncio.timeout(HUNG_S), await rig.post(body, path) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "Traceback" not in error["message"]
    assert not any(e.calls for e in rig.engines)
    async with await rig.post(CHAT) as response:
        assert response.status == 200, "the next request is served"


async def test_depth_64_is_fine_and_brackets_in_text_are_not_depth(rig: Rig) -> None:
    for body in (nested(60), msgspec.json.encode({**CHAT, "x": "[{" * 500}), msgspec.json.encode({**CHAT, "x": [[i] for i in range(200)]})):
        async with await rig.post(body) as response:
            assert response.status == 200


async def test_an_unknown_model_is_a_404_that_names_the_models(rig: Rig) -> None:
    async with await rig.post({**CHAT, "model": "nope"}) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert error["code"] == "model_not_found"
    assert "fake" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_a_413(chunked: bool) -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, body_limit_mib=1) as rig:
        body = msgspec.json.encode({**CHAT, "x": "y" * (2 << 20)})

        async def pieces() -> Any:
            for at in range(0, len(body), 1 << 16):
                yield body[at : at + (1 << 16)]

        data = pieces() if chunked else io.BytesIO(body)
        async with asyncio.timeout(HUNG_S), await rig.session.post(rig.url + CHAT_PATH, data=data) as response:
            assert response.status == 413
            assert (await response.json())["error"]["type"] == "invalid_request_error"
        assert not any(e.calls for e in rig.engines)


async def test_a_body_at_the_limit_is_served() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, body_limit_mib=1) as rig:
        frame = len(msgspec.json.encode({**CHAT, "x": ""}))
        body = msgspec.json.encode({**CHAT, "x": "y" * ((1 << 20) - frame)})
        assert len(body) == 1 << 20
        async with await rig.post(body) as response:
            assert response.status == 200


async def test_a_compressed_body_is_refused(rig: Rig) -> None:
    async with await rig.post(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 400


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "", "9" * 40])
async def test_a_bad_deadline_is_a_400(rig: Rig, value: str) -> None:
    async with await rig.post(CHAT, headers={"x-disagg-deadline-ms": value}) as response:
        assert response.status == (200 if value == "9" * 40 else 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT_PATH, 405), ("POST", "/v1/models", 405), ("GET", "/nothing", 404), ("POST", "/v1/chat/completions/", 404)],
)
async def test_wrong_paths_and_methods_are_openai_errors(rig: Rig, method: str, path: str, status: int) -> None:
    async with await rig.session.request(method, rig.url + path) as response:
        assert response.status == status
        assert (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_a_400_and_the_end_of_the_connection(rig: Rig, raw: bytes) -> None:
    host, _, port = rig.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert not any(e.calls for e in rig.engines)


async def test_without_engines_the_router_says_so() -> None:
    async with running_rig(wait=False) as rig:
        async with await rig.session.get(rig.url + "/healthz") as response:
            assert response.status == 200
        async with await rig.session.get(rig.url + "/readyz") as response:
            assert response.status == 503
            assert "--prefill" in (await response.json())["error"]["message"]
        async with await rig.post(CHAT) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["error"]["type"] == "service_unavailable"


async def test_half_a_pair_is_not_ready() -> None:
    async with running_rig(Role.PREFILL, wait=False) as rig:
        await rig.router.controller.wait_settled()
        async with await rig.session.get(rig.url + "/readyz") as response:
            assert response.status == 503
            assert "no ready decode engine" in (await response.json())["error"]["message"]
