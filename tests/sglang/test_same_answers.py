"""Thirty requests of every shape: the pair answers as the unified engine does, token for token."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.sglang.conftest import Cluster, text_of

STORY = [{"role": "user", "content": "Tell a story about a fox and a lantern."}]
GREEDY = {"temperature": 0, "max_new_tokens": 10}
AT_ONCE = 4
CLOSE = 2e-3
"""Nats. Kernels add in another order when a prompt comes in other pieces."""


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": "demo", "messages": STORY, "temperature": 0, "max_tokens": 10, **more}


def completion(prompt: Any, **more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 10, **more}


def generate(tokens: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return "/generate", {"input_ids": text_of(tokens, tokens), "sampling_params": GREEDY, **more}


STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": chat(),
    "chat, streamed": chat(**USAGE),
    "chat with logprobs": chat(logprobs=True, top_logprobs=2),
    "chat with logprobs, streamed": chat(logprobs=True, top_logprobs=2, **STREAM),
    "chat with a stop string": chat(stop=["the", "bridge"], max_tokens=24),
    "chat with a stop string, streamed": chat(stop=["the", "bridge"], max_tokens=24, **STREAM),
    "chat with n": chat(n=2),
    "chat with n, streamed": chat(n=2, **USAGE),
    "chat with penalties": chat(frequency_penalty=1.5, presence_penalty=0.5, max_tokens=20),
    "chat without an end": chat(ignore_eos=True, max_tokens=40),
    "a long conversation": chat(messages=[*STORY, {"role": "assistant", "content": "A fox. " * 200}, *STORY]),
    "completion": completion("Once there was"),
    "completion, streamed": completion("Once there was", **USAGE),
    "completion with n": completion("Once there was", n=2),
    "completion with logprobs": completion("Once there was", logprobs=2),
    "completion of token ids": completion(text_of(700, 1)),
    "completion of a list": completion(["Once", "One cold", "At"]),
    "completion with a stop string": completion("Once there was", stop=["a"]),
    "1 token": generate(1),
    "16 tokens: exactly one page": generate(16),
    "17 tokens: one more": generate(17),
    "200 tokens, streamed": generate(200, **STREAM),
    "600 tokens with logprobs": generate(600, **LOGPROBS),
    "600 tokens with logprobs, streamed": generate(600, **LOGPROBS, **STREAM),
    "1,000 tokens": generate(1000),
    "2,000 tokens, streamed": generate(2000, **STREAM),
    "3,000 tokens": generate(3000),
    "one token of answer": generate(40, sampling_params={"temperature": 0, "max_new_tokens": 1}),
    "text": ("/generate", {"text": "Once there was", "sampling_params": GREEDY}),
    "a list of texts": ("/generate", {"text": ["Once", "One cold"], "sampling_params": GREEDY}),
}


async def ask_all(cluster: Cluster, engine: str) -> dict[str, Any]:
    """Every request, a few at once; all of them answered by this decode or unified engine."""
    turns = asyncio.Semaphore(AT_ONCE)
    answers: dict[str, Any] = {}

    async def ask(name: str, path: str, body: dict[str, Any]) -> None:
        async with turns, session.post(cluster.url + path, json=body) as response:
            text = await response.text()
            assert response.status == 200, (name, text)
            assert response.headers["x-disagg-decode"] == engine
            answers[name] = streamed(text) if body.get("stream") else essence(msgspec.json.decode(text))

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session, asyncio.TaskGroup() as group:
        for name, (path, body) in REQUESTS.items():
            group.create_task(ask(name, path, body))
    return answers


def essence(answer: Any) -> Any:
    """What must be the same: text, ids, logprobs, how it ended, and the counts."""
    if isinstance(answer, list):
        return [essence(a) for a in answer]
    if "choices" in answer:
        choices = [{k: c[k] for k in ("index", "text", "message", "finish_reason", "logprobs") if k in c} for c in answer["choices"]]
        return {"choices": choices, "usage": counts(answer.get("usage"))}
    meta = answer["meta_info"]
    wanted = ("finish_reason", "prompt_tokens", "completion_tokens", "input_token_logprobs", "output_token_logprobs")
    return {"text": answer["text"], "ids": answer["output_ids"], **{k: meta[k] for k in wanted if k in meta}}


def counts(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    return usage and {k: usage[k] for k in ("prompt_tokens", "completion_tokens")}


def streamed(text: str) -> Any:
    """What a stream said in sum: how it was cut into events depends on timing."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    parts = [msgspec.json.decode(e.removeprefix("data: ")) for e in events]
    if "meta_info" in parts[-1]:
        return essence(parts[-1])  # SGLang repeats what it has said so far
    said: dict[int, dict[str, Any]] = {}
    for part in parts:
        for choice in part["choices"]:
            sample = said.setdefault(choice["index"], {"text": "", "logprobs": [], "finish": None})
            sample["text"] += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            sample["logprobs"] += (choice.get("logprobs") or {}).get("content") or []
            sample["finish"] = choice.get("finish_reason") or sample["finish"]
    return said, counts(parts[-1].get("usage"))


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < CLOSE
    return bool(one == other)


@pytest.fixture(scope="module")
def answers(cluster: Cluster) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the pair, and of the unified engine."""
    with cluster.without("u"):
        pair = asyncio.run(ask_all(cluster, "d"))
    with cluster.without("d"):
        unified = asyncio.run(ask_all(cluster, "u"))
    return pair, unified


@pytest.mark.parametrize("name", REQUESTS)
def test_the_pair_answers_as_the_unified_engine_does(answers: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    pair, unified = answers
    assert alike(pair[name], unified[name]), (pair[name], unified[name])


def test_the_answers_are_not_all_the_same(answers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert len({str(a) for a in answers[0].values()}) > 20


def test_nothing_is_held_afterwards(cluster: Cluster, answers: Any) -> None:
    cluster.wait_idle("p", "d", "u", limit_s=10.0)
