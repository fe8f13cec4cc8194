"""Whatever is asked, a pair answers as a unified engine does: each shape, whole and streamed."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.prompts import prompt_ids

STORY = [{"role": "user", "content": "Tell a story about a fox and a lantern."}]
SAMPLING = {"temperature": 0, "max_new_tokens": 12}

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": "demo", "messages": STORY, "temperature": 0}),
    "chat with logprobs": (
        "/v1/chat/completions",
        {"model": "demo", "messages": STORY, "temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 9},
    ),
    "chat with a stop string": (
        "/v1/chat/completions",
        {"model": "demo", "messages": STORY, "temperature": 0, "stop": ["river", "bridge"]},
    ),
    "chat with n": ("/v1/chat/completions", {"model": "demo", "messages": STORY, "temperature": 0, "n": 3, "max_tokens": 9}),
    "chat without an end": (
        "/v1/chat/completions",
        {"model": "demo", "messages": STORY, "temperature": 0, "ignore_eos": True, "max_tokens": 99},
    ),
    "chat with penalties": (
        "/v1/chat/completions",
        {"model": "demo", "messages": STORY, "temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "max_tokens": 40},
    ),
    "completions": ("/v1/completions", {"model": "demo", "prompt": "Once there was", "temperature": 0, "max_tokens": 12}),
    "a prompt list": ("/v1/completions", {"model": "demo", "prompt": ["Once", "One cold", "At"], "temperature": 0, "max_tokens": 12}),
    "token ids": ("/v1/completions", {"model": "demo", "prompt": prompt_ids(700, 1), "temperature": 0, "max_tokens": 12}),
    "generate": ("/generate", {"text": "Once there was", "sampling_params": SAMPLING}),
    "generate with input logprobs": (
        "/generate",
        {
            "input_ids": prompt_ids(600, 2),
            "sampling_params": SAMPLING,
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
        },
    ),
    "generate one token": ("/generate", {"input_ids": prompt_ids(40, 3), "sampling_params": {"temperature": 0, "max_new_tokens": 1}}),
    "generate from one token": ("/generate", {"input_ids": prompt_ids(1, 4), "sampling_params": SAMPLING}),
    "generate a list": ("/generate", {"text": ["Once", "One cold"], "sampling_params": SAMPLING}),
    "generate with n": ("/generate", {"text": "Once there was", "sampling_params": {**SAMPLING, "n": 2}}),
}

VOLATILE = {"id", "created", "e2e_latency", "cached_tokens", "prompt_tokens_details"}


def comparable(value: Any) -> Any:
    """Without what differs from run to run; floats rounded."""
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [comparable(v) for v in value]
    return round(value, 3) + 0.0 if isinstance(value, float) else value


async def ask(session: aiohttp.ClientSession, cluster: Cluster, path: str, body: dict[str, Any]) -> Any:
    async with session.post(cluster.url + path, json=body) as response:
        text = await response.text()
        assert response.status == 200, text
    if not body.get("stream"):
        return comparable(msgspec.json.decode(text))
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return said([comparable(msgspec.json.decode(e.removeprefix("data: "))) for e in events[:-2]])


def said(events: list[dict[str, Any]]) -> Any:
    """What a stream said in sum, per index: how it was cut into events depends on timing."""
    texts: dict[int, str] = {}
    last: dict[int, Any] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        if "text" in event:
            last[event.get("index") or 0] = event
        for choice in event.get("choices", []):
            delta = choice.get("delta", {}).get("content") or choice.get("text") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + delta
            if choice.get("finish_reason"):
                last[choice["index"]] = (choice["finish_reason"], choice.get("matched_stop"))
    return texts, last, usage


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", BODIES)
async def test_same(session: aiohttp.ClientSession, pair: Cluster, collocated: Cluster, name: str, stream: bool) -> None:
    path, body = BODIES[name]
    if stream:
        body = {**body, "stream": True} | ({} if path == "/generate" else {"stream_options": {"include_usage": True}})
    assert await ask(session, pair, path, body) == await ask(session, collocated, path, body)
