"""A prefill and a decode process give what one unified process gives, and hold nothing afterwards."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.embedded_server.conftest import Client, Trio, greedy, room_at, some_prompt
from tests.engines import launch_engine, running_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.engines import EngineProcess

CHAT = {"messages": [{"role": "user", "content": "count from one to five"}], "temperature": 0, "max_tokens": 24}


@pytest.fixture(autouse=True)
async def nothing_is_held(client: Client, trio: Trio) -> AsyncIterator[None]:
    yield
    await client.wait_free(*trio)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100, 511, 512, 513, 1025, 3000])
async def test_greedy_ids_of_a_pair_are_those_of_a_unified_engine(client: Client, trio: Trio, length: int) -> None:
    body = greedy(some_prompt(length), 20)
    alone = await client.post(trio.unified, "/generate", body)
    first, answer = await client.both(trio.prefill, trio.decode, "/generate", body)
    assert answer.status == first.status == 200
    assert len(answer.ids) == 20
    assert answer.ids == alone.ids
    assert answer.json["text"] == alone.json["text"]
    assert first.json["output_ids"] == alone.ids[:1]


async def test_many_requests_at_once(client: Client, trio: Trio) -> None:
    bodies = [greedy(some_prompt(length, 7), 12) for length in (3, 700, 40, 1200, 16, 90, 300, 5) * 2]
    for at, body in enumerate(bodies):
        body["input_ids"][0] = 10 + at
    async with asyncio.TaskGroup() as tasks:
        alone = [tasks.create_task(client.post(trio.unified, "/generate", body)) for body in bodies]
        pairs = [tasks.create_task(client.both(trio.prefill, trio.decode, "/generate", body)) for body in bodies]
    for one, pair in zip(alone, pairs, strict=True):
        assert pair.result()[1].ids == one.result().ids


async def test_a_generate_stream_repeats_everything_from_the_start(client: Client, trio: Trio) -> None:
    body = greedy(some_prompt(30), 9)
    alone = await client.post(trio.unified, "/generate", body)
    _, answer = await client.both(trio.prefill, trio.decode, "/generate", {**body, "stream": True})
    *events, done = answer.events
    assert done == "data: [DONE]"
    assert [len(event["output_ids"]) for event in events] == sorted({len(event["output_ids"]) for event in events})
    assert events[-1]["text"] == alone.json["text"]
    assert events[-1]["output_ids"] == alone.ids
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 9}
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])


async def test_a_chat_stream_adds_up_to_the_whole_answer(client: Client, trio: Trio) -> None:
    whole = (await client.post(trio.unified, "/v1/chat/completions", CHAT)).json
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, answer = await client.both(trio.prefill, trio.decode, "/v1/chat/completions", {**CHAT, **options})
    *chunks, usage, done = answer.events
    assert done == "data: [DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_completions_echo_lists_and_logprobs(client: Client, trio: Trio) -> None:
    body = {"prompt": ["one two", "three"], "max_tokens": 5, "temperature": 0, "echo": True, "logprobs": 2}
    answer = (await client.post(trio.unified, "/v1/completions", body)).json
    first, second = answer["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["text"].startswith("one two")
    assert second["text"].startswith("three")
    assert first["logprobs"]["token_logprobs"][0] is None
    assert first["logprobs"]["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in first["logprobs"]["token_logprobs"][1:])
    assert len(first["logprobs"]["tokens"]) == len(first["logprobs"]["token_logprobs"])
    assert answer["usage"]["completion_tokens"] == 10
    streamed = await client.post(trio.unified, "/v1/completions", {**body, "stream": True})
    for index, choice in enumerate((first, second)):
        pieces = [event["choices"][0] for event in streamed.events[:-1] if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces][-1] == choice["finish_reason"]


async def test_prompt_lists_with_room_lists(client: Client, trio: Trio) -> None:
    prompts = [some_prompt(length, 3) for length in (4, 600, 33)]
    alone = [(await client.post(trio.unified, "/generate", greedy(prompt, 8))).ids for prompt in prompts]
    rooms = [room_at(trio.prefill) for _ in prompts]
    lists = {name: [room[name] for room in rooms] for name in rooms[0]}
    rids = [f"list-{at}" for at in range(3)]
    _, answer = await client.both(trio.prefill, trio.decode, "/generate", greedy(prompts, 8, rid=rids), **lists)  # type: ignore[arg-type]
    assert [one["output_ids"] for one in answer.json] == alone
    assert [one["meta_info"]["id"] for one in answer.json] == rids


async def test_stop_strings_and_stop_tokens(client: Client, trio: Trio) -> None:
    body = greedy(some_prompt(12), 40)
    plain = (await client.post(trio.unified, "/generate", body)).json
    stop = plain["text"][3:5]
    body["sampling_params"] |= {"stop": ["never to be seen", stop]}
    for answer in (
        await client.post(trio.unified, "/generate", body),
        (await client.both(trio.prefill, trio.decode, "/generate", body))[1],
    ):
        assert answer.json["text"] == plain["text"][: plain["text"].index(stop)]
        assert answer.json["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    body["sampling_params"] |= {"stop": [], "stop_token_ids": [plain["output_ids"][2]]}
    answer = (await client.both(trio.prefill, trio.decode, "/generate", body))[1]
    assert answer.json["meta_info"]["finish_reason"] == {"type": "stop", "matched": plain["output_ids"][2]}
    assert answer.ids == plain["output_ids"][: plain["output_ids"].index(plain["output_ids"][2]) + 1]


async def test_one_token_answers_end_with_the_handoff(client: Client, trio: Trio) -> None:
    body = greedy(some_prompt(20), 1)
    alone = await client.post(trio.unified, "/generate", body)
    _, answer = await client.both(trio.prefill, trio.decode, "/generate", body)
    assert answer.ids == alone.ids


async def test_logprobs_come_half_from_each_leg(client: Client, trio: Trio) -> None:
    body = greedy(some_prompt(40, 5), 6, return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    alone = (await client.post(trio.unified, "/generate", body)).json["meta_info"]
    first, answer = await client.both(trio.prefill, trio.decode, "/generate", body)
    inputs, outputs = first.json["meta_info"], answer.json["meta_info"]
    for name, mine in (("input_token_logprobs", inputs), ("output_token_logprobs", outputs)):
        assert [entry[1] for entry in mine[name]] == [entry[1] for entry in alone[name]]
        pairs = zip(mine[name], alone[name], strict=True)
        assert all(a[0] == b[0] or a[0] == pytest.approx(b[0], abs=1e-3) for a, b in pairs)
    assert len(inputs["input_token_logprobs"]) == 40
    assert inputs["input_token_logprobs"][0][0] is None
    assert [len(top) for top in outputs["output_top_logprobs"]] == [2] * 6


async def test_a_seed_gives_the_same_draws_in_one_process_and_in_two(client: Client, trio: Trio) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 12, "sampling_seed": 42, "frequency_penalty": 0.5, "ignore_eos": True}
    body = {"input_ids": some_prompt(25), "sampling_params": params}
    alone = await client.post(trio.unified, "/generate", body)
    _, answer = await client.both(trio.prefill, trio.decode, "/generate", body)
    assert answer.ids == alone.ids


async def test_samples_of_one_prompt_on_a_unified_engine(client: Client, trio: Trio) -> None:
    answer = await client.post(trio.unified, "/v1/chat/completions", {**CHAT, "n": 3, "temperature": 1, "seed": 7})
    assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2]
    one = await client.post(trio.unified, "/v1/chat/completions", {**CHAT, "temperature": 1, "seed": 8})
    assert answer.json["choices"][1]["message"] == one.json["choices"][0]["message"]
    assert answer.json["usage"]["prompt_tokens"] == one.json["usage"]["prompt_tokens"]
    refused = await client.both(trio.prefill, trio.decode, "/v1/chat/completions", {**CHAT, "n": 2})
    assert [leg.status for leg in refused] == [400, 400]


@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_the_legs_meet_whichever_comes_first(client: Client, trio: Trio, first: str) -> None:
    body = {**greedy(some_prompt(18), 5), **room_at(trio.prefill)}
    early, late = (trio.prefill, trio.decode) if first == "prefill" else (trio.decode, trio.prefill)
    waits = "prefill_bootstrap_queue_reqs" if first == "prefill" else "decode_transfer_queue_reqs"
    async with asyncio.TaskGroup() as tasks:
        one = tasks.create_task(client.post(early, "/generate", body))
        await client.wait_for(early, "disaggregation", waits, 1)
        other = tasks.create_task(client.post(late, "/generate", body))
    decoded = one.result() if first == "decode" else other.result()
    assert len(decoded.ids) == 5


@pytest.mark.parametrize("alone", ["prefill", "decode"])
async def test_a_leg_whose_other_never_comes_ends_with_a_sentence(client: Client, trio: Trio, alone: str) -> None:
    engine: EngineProcess = getattr(trio, alone)
    answer = await client.post(engine, "/v1/completions", {"prompt": "one", "max_tokens": 2, **room_at(trio.prefill)})
    assert answer.status == 500
    assert "3 s" in answer.json["message"] or "too long" in answer.json["message"]
    assert answer.json["object"] == "error"


async def test_a_room_is_refused_the_second_time(client: Client, trio: Trio) -> None:
    room = room_at(trio.prefill)
    body = greedy(some_prompt(5), 2)
    await client.both(trio.prefill, trio.decode, "/generate", body, **room)
    for answer in await client.both(trio.prefill, trio.decode, "/generate", body, **room):
        assert answer.status == 400
        assert "was used before" in answer.json["error"]["message"]


async def test_engines_that_do_not_fit_say_so_on_both_sides(client: Client, trio: Trio) -> None:
    with running_engines(launch_engine("decode", extra_args=("--page-size", "32"))) as (other,):
        legs = await client.both(trio.prefill, other, "/v1/completions", {"prompt": "one two", "max_tokens": 4})
        assert [leg.status for leg in legs] == [500, 500]
        for leg in legs:
            assert "--page-size differs: prefill 16, decode 32" in leg.json["message"]
        await client.wait_free(other)


async def test_prefill_with_a_prefix_cache_still_sends_every_page(client: Client, trio: Trio) -> None:
    prompt = some_prompt(200, 9)
    answers = [(await client.both(trio.prefill, trio.decode, "/generate", greedy(prompt, 6)))[1].json for _ in range(2)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert answers[1]["meta_info"]["cached_tokens"] == 192


async def test_a_pool_that_is_too_small_for_all_serves_all(client: Client) -> None:
    """Two answers outgrow what admission reserved for them: one is retracted and computed again."""
    args = ("--max-total-tokens", "1280", "--context-length", "700")
    with running_engines(launch_engine("unified", extra_args=args)) as (small,):
        bodies = [greedy(some_prompt(10, seed), 650) for seed in range(3)]
        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(client.post(small, "/generate", body)) for body in bodies]
        assert [len(answer.result().ids) for answer in answers] == [650] * 3
        load = await client.load(small)
        assert load["num_retractions_total"] > 0
        await client.wait_free(small)


BAD: list[tuple[str, Any, str]] = [
    ("/generate", b'{"text": "a', "not valid JSON"),
    ("/generate", b'{"text": "\xff"}', "not valid JSON"),
    ("/generate", b'{"text": "\\ud800"}', "not valid JSON"),
    ("/generate", b'{"text": "a", "sampling_params": {"temperature": NaN}}', "not valid JSON"),
    ("/generate", b"[" * 100 + b"]" * 100, ""),
    ("/generate", b'{"text": "a", "x": ' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
    ("/generate", {"text": 5}, "text"),
    ("/generate", {}, "exactly one of text and input_ids"),
    ("/generate", {"text": ""}, "empty"),
    ("/generate", {"input_ids": []}, "empty"),
    ("/generate", {"input_ids": [1, 1 << 40]}, "token ids"),
    ("/generate", {"input_ids": [1, True]}, "token ids"),
    ("/generate", {"input_ids": [10] * 9000}, "context"),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 9000}}, "context"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
    ("/generate", {"text": "a", "sampling_params": {"json_schema": "{}"}}, "json_schema"),
    ("/generate", {"text": ["a", "b"], "rid": ["x"]}, "rid"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_new_tokens"),
    ("/v1/completions", {"prompt": "a", "n": 0}, "n"),
    ("/v1/completions", {"max_tokens": 4}, "prompt"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": "hello"}, "messages"),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "role"),
    ("/v1/chat/completions", {**CHAT, "top_p": 7}, "top_p"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, "grammar"),
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/chat/completions", {**CHAT, "bootstrap_host": "h", "bootstrap_room": -1}, "bootstrap_room"),
]


async def test_bad_input_is_a_400_with_the_endpoints_error_object(client: Client, trio: Trio) -> None:
    for path, body, word in BAD:
        for engine in trio:
            answer = await client.post(engine, path, body)
            assert answer.status == 400, (path, body, answer.raw)
            error = answer.json["error"] if path == "/generate" else answer.json
            assert word in error["message"], (body, error)
            if path != "/generate":
                assert (error["object"], error["code"]) == ("error", 400)
    assert "Traceback" not in trio.unified.log


async def test_bad_input_is_answered_within_a_tenth_of_a_second(client: Client, trio: Trio) -> None:
    fastest = {}
    for path, body, _ in BAD:
        tries = [(await client.post(trio.unified, path, body)).seconds for _ in range(3)]
        fastest[str(body)[:60]] = min(tries)
    assert max(fastest.values()) < 0.1, fastest


async def test_engines_of_a_pair_refuse_requests_without_a_room(client: Client, trio: Trio) -> None:
    for engine in (trio.prefill, trio.decode):
        for path, body in (("/generate", {"text": "a"}), ("/v1/chat/completions", CHAT)):
            answer = await client.post(engine, path, body)
            assert answer.status == 400
            assert "bootstrap_room" in str(answer.json)


async def test_a_body_that_is_too_large_and_an_unknown_path(client: Client, trio: Trio) -> None:
    answer = await client.session.post(trio.unified.url + "/generate", data=io.BytesIO(b" " * (17 << 20)))
    assert answer.status == 413
    assert (await client.get(trio.unified, "/nothing")).status == 404
    assert (await client.get(trio.unified, "/generate")).status == 405


async def test_what_the_engines_say_about_themselves(client: Client, trio: Trio) -> None:
    for engine, role in zip(trio, ("null", "prefill", "decode"), strict=True):
        info = (await client.get(engine, "/server_info")).json
        state = info["internal_states"][0]
        assert state["disaggregation_mode"] == role
        assert state["page_size"] == 16
        assert state["max_total_num_tokens"] == 16384
        assert len(state["model_hash"]) == 16
        assert state["kv_bytes_per_token"] > 0
        models = (await client.get(engine, "/v1/models")).json["data"]
        assert [(card["id"], card["max_model_len"]) for card in models] == [("demo", 8192)]
        for path in ("/health", "/ready", "/health_generate", "/metrics", "/model_info"):
            assert (await client.get(engine, path)).status == 200
        load = await client.load(engine)
        assert load["disaggregation"]["mode"] == role
        assert info["max_running_requests"] == load["max_running_requests"] > 0
        metrics = (await client.get(engine, "/metrics")).raw.decode()
        assert 'sglang:num_running_reqs{model_name="demo"} 0.0' in metrics
        assert (await client.post(engine, "/flush_cache", {})).status == 200
        assert (await client.get(engine, "/v1/loads?include=nonsense")).status == 400
        assert set((await client.get(engine, "/v1/loads?include=core")).json["loads"][0]).isdisjoint({"queues", "memory"})


async def test_transferred_bytes_are_counted_on_both_sides(client: Client, trio: Trio) -> None:
    before = [(await client.load(engine))["disaggregation"] for engine in trio[1:]]
    await client.both(trio.prefill, trio.decode, "/generate", greedy(some_prompt(40), 2))
    await client.wait_free(*trio)
    after = [(await client.load(engine))["disaggregation"] for engine in trio[1:]]
    per_token = (await client.get(trio.decode, "/server_info")).json["kv_bytes_per_token"]
    for old, new in zip(before, after, strict=True):
        assert new["kv_transfer_bytes_total"] - old["kv_transfer_bytes_total"] == 3 * 16 * per_token
        assert new["kv_transfer_count_total"] - old["kv_transfer_count_total"] == 1


async def test_tokenize_gives_the_prompt_of_a_chat(client: Client, trio: Trio) -> None:
    found = (await client.post(trio.unified, "/v1/tokenize", {"messages": CHAT["messages"]})).json
    assert found["count"] == len(found["tokens"])
    by_ids = await client.post(trio.unified, "/v1/chat/completions", {**CHAT, "messages": None, "input_ids": found["tokens"]})
    by_text = await client.post(trio.unified, "/v1/chat/completions", CHAT)
    assert by_ids.json["choices"] == by_text.json["choices"]
    several = (await client.post(trio.unified, "/v1/tokenize", {"prompt": ["one", "one two"]})).json
    assert several["count"] == [len(one) for one in several["tokens"]]


@pytest.mark.alone
async def test_a_client_that_leaves_frees_its_pages(client: Client, trio: Trio) -> None:
    await client.faults(trio.unified, "slow:x20")
    try:
        for stream in (True, False):
            async with asyncio.timeout(10):
                body = json.dumps(greedy(some_prompt(50), 4000, stream=stream)).encode()
                request = client.post(trio.unified, "/generate", body)
                async with asyncio.TaskGroup() as tasks:
                    asking = tasks.create_task(request)
                    await client.wait_for(trio.unified, "", "num_running_reqs", 1)
                    asking.cancel()
                began = time.monotonic()
                await client.wait_free(trio.unified)
                assert time.monotonic() - began < 1.0
    finally:
        await client.faults(trio.unified, "none")


async def test_random_aborts_and_disconnects_leave_nothing_behind(client: Client, trio: Trio) -> None:
    """Whatever a client saw of an answer is a beginning of the right one."""
    chance = random.Random(5)
    prompts = [some_prompt(length, 21) for length in (1, 40, 700, 1500)]
    right = [(await client.post(trio.unified, "/generate", greedy(prompt, 16))).ids for prompt in prompts]
    places = asyncio.Semaphore(16)

    async def one(number: int) -> None:
        which, rid = chance.randrange(len(prompts)), f"walk {number}"
        body = {**greedy(prompts[which], 16, rid=rid), **room_at(trio.prefill)}
        end, after_s, leaving = chance.choice(("none", "abort", "leave")), chance.random() / 2, chance.choice((1, 2))
        async with places, asyncio.TaskGroup() as tasks:
            legs = [tasks.create_task(client.post(leg, "/generate", body)) for leg in trio[1:]]
            if end != "none":
                await asyncio.wait(legs, timeout=after_s)
            if end == "abort":
                for leg in trio[1:]:
                    await client.post(leg, "/abort_request", {"rid": rid})
            if end == "leave":
                for task in legs[-leaving:]:
                    task.cancel()
        if legs[1].cancelled() or legs[1].result().status != 200:
            assert end != "none"
            return
        ids = legs[1].result().ids
        assert ids == right[which] if end == "none" else right[which][: len(ids)] == ids

    async with asyncio.TaskGroup() as tasks:
        for number in range(80):
            tasks.create_task(one(number), name=f"walk {number}")
    await client.wait_free(*trio)


async def test_an_api_key_is_demanded_and_never_logged(client: Client) -> None:
    with running_engines(launch_engine("unified", extra_args=("--api-key", "secret-of-the-test"))) as (engine,):
        body = {"prompt": "a prompt that nobody may log", "max_tokens": 2}
        assert (await client.post(engine, "/v1/completions", body)).status == 401
        client.session.headers["Authorization"] = "Bearer wrong"
        assert (await client.post(engine, "/v1/completions", body)).status == 401
        client.session.headers["Authorization"] = "Bearer secret-of-the-test"
        assert (await client.post(engine, "/v1/completions", body)).status == 200
        del client.session.headers["Authorization"]
        assert (await client.get(engine, "/health")).status == 200
        assert (await client.post(engine, "/faults", {"spec": "none"})).status in {401, 404}
        log = engine.log
        assert engine.stop() == 0
    assert "secret-of-the-test" not in log
    assert "nobody may log" not in log


async def test_a_stopping_engine_finishes_what_runs(client: Client) -> None:
    with running_engines(launch_engine("unified", extra_args=("--paced", "1,0;20,0"))) as (engine,):
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.post(engine, "/generate", greedy(some_prompt(5), 30)))
            await client.wait_for(engine, "", "num_running_reqs", 1)
            engine.process.terminate()
        assert len(asking.result().ids) == 30
        assert engine.process.wait(5) == 0
