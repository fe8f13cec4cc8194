"""The official OpenAI client against a demo cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.cluster.conftest import Cluster

ASK: list[Any] = [{"role": "user", "content": "Spell: harbour"}]
STORY: list[Any] = [{"role": "user", "content": "Tell a story about a fox and a lantern."}]


@pytest.fixture(scope="module")
def client(pair: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=pair.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]


def test_a_chat_answers_in_readable_words(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=ASK, temperature=0)
    assert answer.choices[0].message.content == "h a r b o u r"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_answer_with_usage_at_the_end(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=STORY, temperature=0)
    stream = client.chat.completions.create(
        model="demo", messages=STORY, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, usage, finish = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert finish == "stop"
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="Once there was", max_tokens=8, temperature=0)
    stream = client.completions.create(model="demo", prompt="Once there was", max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in stream) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    assert whole.choices[0].finish_reason == "length"


def test_a_prompt_list_has_a_choice_for_each_prompt(client: openai.OpenAI) -> None:
    prompts = ["Once there was", "One cold morning the"]
    both = client.completions.create(model="demo", prompt=prompts, max_tokens=6, temperature=0)
    single = [client.completions.create(model="demo", prompt=p, max_tokens=6, temperature=0).choices[0].text for p in prompts]
    assert [c.text for c in sorted(both.choices, key=lambda c: c.index)] == single


@pytest.mark.parametrize("stream", [False, True])
def test_two_samples_are_two_choices_and_a_seed_makes_them_repeatable(client: openai.OpenAI, stream: bool) -> None:
    def ask() -> dict[int, str]:
        made = client.chat.completions.create(model="demo", messages=STORY, n=2, seed=7, temperature=1.5, max_tokens=24, stream=stream)
        texts: dict[int, str] = {}
        if isinstance(made, openai.Stream):
            for chunk in made:
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        else:
            texts = {c.index: c.message.content or "" for c in made.choices}
        return texts

    first = ask()
    assert set(first) == {0, 1}
    assert first[0] != first[1]
    assert ask() == first


def test_samples_of_a_prompt_list(client: openai.OpenAI) -> None:
    made = client.completions.create(model="demo", prompt=["Once", "One"], n=3, max_tokens=2, temperature=0)
    assert [c.index for c in made.choices] == [0, 1, 2, 3, 4, 5]
    assert made.choices[0].text == made.choices[2].text
    assert made.usage is not None
    assert made.usage.completion_tokens == 12


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=ASK, temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert answer.usage is not None
    assert len(content.content) in {answer.usage.completion_tokens, answer.usage.completion_tokens - 1}  # the end token may be left out
    for token in content.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_stop_strings_end_an_answer_before_them(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=STORY, temperature=0).choices[0].message.content
    assert whole is not None
    stop = whole[20:27]
    answer = client.chat.completions.create(model="demo", messages=STORY, temperature=0, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_tool_definition_reaches_the_engine(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    plain = client.chat.completions.create(model="demo", messages=ASK, temperature=0, max_tokens=4)
    answer = client.chat.completions.create(model="demo", messages=ASK, tools=tools, temperature=0, max_tokens=4)
    assert answer.choices[0].message.role == "assistant"
    assert plain.usage is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens >= plain.usage.prompt_tokens


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.chat.completions.create(model="nope", messages=ASK)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=ASK, temperature=-1)
    with pytest.raises(openai.BadRequestError, match=r"(?i)context|long"):
        client.completions.create(model="demo", prompt=[5] * 20_000, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="a", max_tokens=0)


def test_the_answer_says_which_engines_made_it(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=ASK, extra_headers={"x-request-id": "abc"})
    assert raw.headers["x-disagg-prefill"] == "prefill-0"
    assert raw.headers["x-disagg-decode"] == "decode-0"
    assert raw.headers["x-client-request-id"] == "abc"
