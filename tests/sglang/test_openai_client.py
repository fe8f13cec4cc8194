"""The official OpenAI client against real SGLang: chat, streams, JSON schema, tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import openai
import pytest

from tests.sglang.conftest import Cluster

ASK: list[Any] = [{"role": "user", "content": "Say the word lantern."}]
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "animal",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"legs": {"type": "integer", "minimum": 0, "maximum": 9}, "wild": {"type": "boolean"}},
            "required": ["legs", "wild"],
            "additionalProperties": False,
        },
    },
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"day": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["day"]},
    },
}


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=ASK, temperature=0, max_tokens=16)
    stream = client.chat.completions.create(
        model="demo", messages=ASK, temperature=0, max_tokens=16, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert "lantern" in text
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="Once there was", max_tokens=6, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def twice(cluster: Cluster, client: openai.OpenAI, **body: Any) -> list[Any]:
    """What the pair and what the unified engine answers."""
    found = []
    for absent in ("u", "d"):
        with cluster.without(absent):
            found.append(client.chat.completions.create(model="demo", temperature=0, max_tokens=120, **body).choices[0])
    return found


def test_a_json_schema_binds_the_pair_as_it_binds_the_unified_engine(cluster: Cluster, client: openai.OpenAI) -> None:
    pair, unified = twice(cluster, client, messages=ASK, response_format=SCHEMA)
    assert pair.message.content == unified.message.content
    answer = msgspec.json.decode(pair.message.content)
    assert set(answer) == {"legs", "wild"}
    assert isinstance(answer["legs"], int)
    assert isinstance(answer["wild"], bool)


def test_a_tool_is_called_by_the_pair_as_by_the_unified_engine(cluster: Cluster, client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    pair, unified = twice(cluster, client, messages=ASK, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert pair.finish_reason == unified.finish_reason == "tool_calls"
    (call,), (same,) = pair.message.tool_calls, unified.message.tool_calls
    assert call.function.name == same.function.name == "weather"
    assert call.function.arguments == same.function.arguments
    msgspec.json.decode(call.function.arguments)


def test_a_bad_request_is_the_engines_own_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=ASK, temperature=-3)


def test_an_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is demo"):
        client.chat.completions.create(model="other", messages=ASK)
