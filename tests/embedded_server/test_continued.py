"""An answer that was cut at any token and is asked for again, with what came of it at the end of the prompt, goes on as if whole."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from disagg.engines.embedded.engine import Engine, Settings
from disagg.engines.embedded.generation import Ask, Generation, Inbox, Room
from disagg.engines.embedded.sampler import SamplingParams
from disagg.engines.embedded.tokens import REPLACEMENT
from tests.embedded_server.conftest import LIMITS, Answer, Client, House, Trio, finished, some_prompt
from tests.engines import EngineProcess, launch_engine, running_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from disagg.engines.embedded.checkpoint import Checkpoint
    from disagg.engines.embedded.tokens import Tokenizer

NEW = 24
MESSAGES = [{"role": "user", "content": "count from one to five"}]
PROMPT = "one two three four"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STREAMED = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def with_cache() -> Iterator[EngineProcess]:
    """A decode engine with a prefix cache of its own."""
    with running_engines(launch_engine("decode", extra_args=(*LIMITS, "--disaggregation-decode-enable-radix-cache"))) as (engine,):
        yield engine


@pytest.fixture(autouse=True)
async def nothing_is_held(client: Client, trio: Trio, with_cache: EngineProcess) -> AsyncIterator[None]:
    yield
    await client.wait_free(*trio, with_cache)


class Streamed:
    """What the events of one choice say together."""

    def __init__(self, answer: Answer, index: int = 0) -> None:
        assert answer.status == 200, answer.raw
        *events, done = answer.events
        assert done == "data: [DONE]"
        self.usage: dict[str, Any] = next((event["usage"] for event in events if event["usage"]), {})
        self.choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        self.pieces = [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in self.choices]
        self.text = "".join(self.pieces)
        self.ids = [token for choice in self.choices for token in choice.get("token_ids", [])]
        self.finish_reason = self.choices[-1]["finish_reason"]


class Place:
    """Where requests go: a unified engine, or a pair."""

    def __init__(self, client: Client, engines: Sequence[EngineProcess]) -> None:
        self._client = client
        self._engines = engines

    async def __call__(self, path: str, body: dict[str, Any]) -> Answer:
        if len(self._engines) == 1:
            return await self._client.post(self._engines[0], path, body)
        return (await self._client.both(self._engines[0], self._engines[1], path, body))[1]


async def prompt_ids(client: Client, engine: EngineProcess, path: str) -> list[int]:
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    ids: list[int] = (await client.post(engine, "/v1/tokenize", body)).json["tokens"]
    return ids


async def text_of(client: Client, engine: EngineProcess, ids: list[int]) -> str:
    text: str = (await client.post(engine, "/v1/detokenize", {"tokens": ids})).json["text"]
    return text


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "seed": 11}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("where", ["unified", "pair", "pair with a decode cache"])
async def test_an_answer_cut_at_every_token_goes_on(
    client: Client, trio: Trio, with_cache: EngineProcess, where: str, path: str, sampling: dict[str, Any]
) -> None:
    ask = Place(client, {"unified": trio[:1], "pair": trio[1:]}.get(where, (trio.prefill, with_cache)))
    own = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    whole = Streamed(await ask(path, {**own, **sampling, **STREAMED, "max_tokens": NEW, "ignore_eos": True}))
    prompt = await prompt_ids(client, trio.unified, path)
    assert len(whole.ids) == NEW
    assert whole.text == await text_of(client, trio.unified, whole.ids)
    for k in range(1, NEW):
        own = {"messages": MESSAGES, "input_ids": prompt + whole.ids[:k]} if path == CHAT else {"prompt": prompt + whole.ids[:k]}
        rest = Streamed(await ask(path, {**own, **sampling, **STREAMED, "max_tokens": NEW - k, "ignore_eos": True}))
        assert rest.ids == whole.ids[k:]
        assert (await text_of(client, trio.unified, whole.ids[:k])) + rest.text == whole.text
        assert rest.finish_reason == whole.finish_reason == "length"
        assert (rest.usage["prompt_tokens"], rest.usage["completion_tokens"]) == (len(prompt) + k, NEW - k)


async def test_a_continued_answer_stops_where_the_whole_one_does(client: Client, trio: Trio) -> None:
    """At an end token, and at a stop string that comes after the cut."""
    body = {"messages": MESSAGES, "temperature": 0, **STREAMED}
    prompt = await prompt_ids(client, trio.unified, CHAT)
    free = Streamed(await client.post(trio.unified, CHAT, {**body, "max_tokens": 200}))
    assert free.finish_reason == "stop"
    stop = free.text[-3:]
    at = free.text.index(stop)
    stopped = Streamed(await client.post(trio.unified, CHAT, {**body, "max_tokens": 200, "stop": stop}))
    assert stopped.text == free.text[:at]
    for whole, more in ((free, {}), (stopped, {"stop": stop})):
        sent = whole.ids[:3]
        again = {**body, **more, "input_ids": prompt + sent, "max_tokens": 200 - len(sent)}
        rest = Streamed(await client.post(trio.unified, CHAT, again))
        assert rest.ids == whole.ids[3:]
        assert (await text_of(client, trio.unified, sent)) + rest.text == whole.text
        assert (rest.finish_reason, rest.choices[-1]["matched_stop"]) == ("stop", whole.choices[-1]["matched_stop"])


async def random_places(house: House) -> list[tuple[str, list[Engine]]]:
    base = Settings(context_length=256, chunked_prefill_size=32, bootstrap_port=0)
    unified, prefill = await house.build(base), await house.build(base._replace(role="prefill"))
    plain, caching = await house.build(base._replace(role="decode")), await house.build(base._replace(role="decode", decode_cache=True))
    return [("unified", [unified]), ("pair", [prefill, plain]), ("pair with a decode cache", [prefill, caching])]


ROOMS = iter(range(1, 1 << 30))


async def asked(engines: list[Engine], prompt: Sequence[int], params: SamplingParams) -> Generation:
    room = Room("127.0.0.1", engines[0].bootstrap_port, next(ROOMS)) if len(engines) > 1 else None
    made: list[tuple[Generation, Inbox]] = []
    for engine in engines:
        inbox = Inbox()
        ask = Ask(f"{engine.role} {next(ROOMS)}", np.array(prompt, np.int32), params, room=room)
        made.append((engine.submit([ask], inbox)[0], inbox))
    for generation, inbox in made:
        await finished(generation, inbox)
        assert generation.finish is not None
        assert generation.finish.kind == "length", generation.finish
    return made[-1][0]


def characters(content: bytes) -> Iterator[tuple[int, str]]:
    """Where each character ends, and the character; bytes that are part of none as U+FFFD."""
    at = 0
    while at < len(content):
        try:
            character = content[at : at + 4].decode()[0]
        except UnicodeDecodeError as error:
            character = content[at : at + error.start].decode()[0] if error.start else REPLACEMENT
            at += 0 if error.start else error.end
        at += 0 if character == REPLACEMENT else len(character.encode())
        yield at, character


def rest_of(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int]) -> tuple[str, bool]:
    """The text from the first character on that the ids after the cut complete, told by its bytes, and whether the cut is inside of it."""

    def content(ids: Sequence[int]) -> bytes:
        return b"".join(tokenizer.token_bytes(token) for token in ids if not tokenizer.is_special(token))

    cut = len(content(before))
    spans = list(characters(content([*before, *after])))
    return "".join(character for end, character in spans if end > cut), cut not in {0, *(end for end, _ in spans)}


@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "seeded"])
async def test_a_random_models_answer_goes_on_through_broken_characters(checkpoint: Checkpoint, seed: int | None) -> None:
    """Random weights draw from all tokens, many of them parts of characters, so that cuts are inside of some."""
    new, cuts_inside = 16, 0
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        house = House(checkpoint, tasks)
        params = SamplingParams(max_new_tokens=new, temperature=0.0 if seed is None else 1.0, seed=seed, ignore_eos=True)
        prompt = some_prompt(45, 3)
        for where, engines in await random_places(house):
            whole = await asked(engines, prompt, params)
            assert len(set(whole.ids)) > new // 4, "a model that says one thing over and over proves nothing"
            for k in range(1, new):
                left = SamplingParams(max_new_tokens=new - k, temperature=params.temperature, seed=seed, ignore_eos=True)
                rest = await asked(engines, prompt + whole.ids[:k], left)
                assert rest.ids == whole.ids[k:], f"cut at {k}: {where}"
                expected, inside = rest_of(house.tokenizer, prompt + whole.ids[:k], whole.ids[k:])
                assert rest.text == expected, f"cut at {k}: {where}"
                cuts_inside += inside
        house.stop()
    if seed is not None:
        assert cuts_inside > 0


async def test_a_character_cut_by_the_end_of_the_prompt_comes_whole(client: Client, trio: Trio) -> None:
    *begun, last = (await client.post(trio.unified, "/v1/tokenize", {"prompt": "one 😀", "add_special_tokens": False})).json["tokens"]
    body = {"prompt": begun, "max_tokens": 1, "temperature": 0, "logit_bias": {str(last): 1e6}}
    for path, own in ((COMPLETIONS, {}), (CHAT, {"messages": MESSAGES, "input_ids": begun})):
        answer = Streamed(await client.post(trio.unified, path, {**body, **own, **STREAMED}))
        assert (answer.ids, answer.text) == ([last], "😀")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_ids_come_with_the_tokens_also_where_their_text_is_held_back(client: Client, trio: Trio, path: str) -> None:
    own: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    body = {**own, "temperature": 0, "max_tokens": NEW, "n": 2}
    plain = await client.post(trio.unified, path, body)
    assert not any("token_ids" in choice for choice in plain.json["choices"])
    assert b"token_ids" not in (await client.post(trio.unified, path, {**body, "stream": True})).raw
    whole = (await client.post(trio.unified, path, {**body, "return_token_ids": True})).json
    text = Streamed(await client.post(trio.unified, path, {**body, **STREAMED})).text
    held = {**body, **STREAMED, "stop": text[:-1] + "\x00"}  # the answer begins as this does, to its last character but one
    streamed = await client.post(trio.unified, path, held)
    assert whole["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])
    for index in (0, 1):
        found = Streamed(streamed, index)
        assert found.text == text
        assert found.ids == whole["choices"][index]["token_ids"]
        silent = [choice for choice, piece in zip(found.choices, found.pieces, strict=True) if choice.get("token_ids") and not piece]
        assert len(silent) > 2


async def test_the_server_says_that_its_streams_can_carry_ids(client: Client, trio: Trio) -> None:
    for engine in trio:
        assert (await client.get(engine, "/server_info")).json["stream_token_ids"] is True


# --- tokenize and detokenize ---


async def test_ids_and_text_there_and_back(client: Client, trio: Trio) -> None:
    for prefix in ("/v1", ""):
        ids = (await client.post(trio.unified, f"{prefix}/tokenize", {"prompt": ["one 😀", "two"]})).json["tokens"]
        answer = await client.post(trio.unified, f"{prefix}/detokenize", {"model": "any", "tokens": ids})
        assert (answer.status, answer.json) == (200, {"text": ["one 😀", "two"]})
        assert (await client.post(trio.unified, f"{prefix}/detokenize", {"tokens": ids[0]})).json == {"text": "one 😀"}
    assert await text_of(client, trio.unified, []) == ""
    assert await text_of(client, trio.unified, ids[0][:-1]) == "one \ufffd"


async def test_special_tokens_are_left_out_of_text_unless_they_are_wanted(client: Client, trio: Trio) -> None:
    ids = (await client.post(trio.unified, "/v1/tokenize", {"messages": MESSAGES})).json["tokens"]
    found = [
        (await client.post(trio.unified, "/v1/detokenize", {"tokens": ids, "skip_special_tokens": skip})).json["text"]
        for skip in (True, False)
    ]
    assert "<|im_start|>" not in found[0]
    assert found[1].count("<|im_start|>") == 2


@pytest.mark.parametrize(
    "tokens", ["one", None, 5, [1, "two"], [1.5], [True], [-1], [1 << 40], [[1], 2], [1, [2]], [["two"]], [[[1]]], [None]]
)
async def test_what_is_no_list_of_ids_is_a_400_that_says_so(client: Client, trio: Trio, tokens: Any) -> None:
    answer = await client.post(trio.unified, "/v1/detokenize", {"tokens": tokens})
    assert answer.status == 400
    assert answer.json["object"] == "error"
    assert "tokens" in answer.json["message"]


async def test_tokenize_reads_what_a_chat_reads(client: Client, trio: Trio) -> None:
    async def tokens(**body: Any) -> list[int]:
        answer = await client.post(trio.unified, "/v1/tokenize", body)
        assert answer.status == 200, answer.raw
        assert answer.json["count"] == len(answer.json["tokens"])
        found: list[int] = answer.json["tokens"]
        return found

    opened = await tokens(messages=MESSAGES)
    assert await tokens(messages=MESSAGES, chat_template_kwargs={"unknown": 1}, temperature=0, stream=True) == opened
    closed = await tokens(messages=MESSAGES, add_generation_prompt=False)
    assert opened[: len(closed)] == closed
    assert len(opened) > len(closed)
    begun = [*MESSAGES, {"role": "assistant", "content": "one two"}]
    words = await tokens(prompt="one two", add_special_tokens=False)
    assert await tokens(messages=begun, continue_final_message=True) == opened + words
    chat = {"temperature": 0, "max_tokens": 8}
    by_text = await client.post(trio.unified, CHAT, {**chat, "messages": begun, "continue_final_message": True})
    by_ids = await client.post(trio.unified, CHAT, {**chat, "messages": begun, "input_ids": opened + words})
    assert by_text.json["choices"] == by_ids.json["choices"]
    assert by_text.json["usage"]["prompt_tokens"] == len(opened + words)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "exactly one"),
        ({"prompt": "a", "messages": MESSAGES}, "exactly one"),
        ({"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": []}, "empty"),
        ({"prompt": 5}, "prompt"),
    ],
)
async def test_what_cannot_be_tokenized_is_a_400(client: Client, trio: Trio, body: dict[str, Any], word: str) -> None:
    answer = await client.post(trio.unified, "/v1/tokenize", body)
    assert answer.status == 400
    assert word in answer.json["message"]
