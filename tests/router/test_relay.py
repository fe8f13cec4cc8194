"""The relay over scripted engines: one request, two legs, and everything that can go wrong between them."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import aiohttp
import msgspec
import pytest

from disagg.model import Role
from disagg.router.relay import Job
from tests.fake_engine import HUNG_S, Call, answer_well, chat_chunk, until
from tests.router.conftest import CHAT, Rig, running_rig

STREAM = {**CHAT, "stream": True}
GENERATE = {"text": "say it", "sampling_params": {"max_new_tokens": 3}}


async def forever(call: Call) -> None:
    await asyncio.Event().wait()


async def idle(rig: Rig) -> None:
    """Waits until no engine works for anybody."""
    await until(lambda: not any(e.live for e in rig.engines))


def events_of(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    return [e if e == "data: [DONE]" else msgspec.json.decode(e.removeprefix("data: ")) for e in text.split("\n\n")[:-1]]


# --- the usual way


async def test_a_whole_answer_is_decodes_answer(rig: Rig) -> None:
    async with await rig.post(CHAT, headers={"x-request-id": "mine"}) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["message"]["content"] == "alpha beta gamma"
        headers = response.headers
    assert (headers["x-disagg-prefill"], headers["x-disagg-decode"], headers["x-disagg-attempts"]) == ("prefill-0", "decode-0", "1")
    assert len(headers["x-request-id"]) == 32
    assert headers["x-client-request-id"] == "mine"


async def test_a_stream_is_relayed_to_its_end(rig: Rig) -> None:
    async with await rig.post(STREAM) as response:
        assert response.status == 200
        events = events_of(await response.text())
    assert [e["choices"][0]["delta"]["content"] for e in events[:-1]] == ["alpha", " beta", " gamma", ""]
    assert events[-1] == "data: [DONE]"


async def test_both_legs_get_the_same_body_with_a_fresh_room_each_time(rig: Rig) -> None:
    for _ in range(3):
        async with await rig.post(CHAT) as response:
            await response.read()
    rooms = []
    for prefill, decode in zip(rig.prefill.calls, rig.decode.calls, strict=True):
        assert prefill.raw == decode.raw
        assert prefill.json["bootstrap_host"] == "127.0.0.1"
        assert prefill.json["bootstrap_port"] == 8998
        assert 0 < prefill.json["bootstrap_room"] < 2**63
        assert len(prefill.json["rid"]) == 32
        rooms.append(prefill.json["bootstrap_room"])
    assert len(set(rooms)) == 3


async def test_unknown_fields_reach_the_engine_and_the_clients_own_rooms_do_not(rig: Rig) -> None:
    body = {**CHAT, "top_k": 3, "made_up": {"a": [1, 2.50]}, "rid": "short", "bootstrap_room": 7, "bootstrap_host": "evil"}
    async with await rig.post(body) as response:
        await response.read()
    seen = rig.decode.calls[0].json
    assert seen["top_k"] == 3
    assert seen["made_up"] == {"a": [1, 2.50]}
    assert seen["rid"] != "short"
    assert seen["bootstrap_room"] != 7
    assert seen["bootstrap_host"] == "127.0.0.1"
    assert rig.decode.calls[0].raw.count(b"bootstrap_room") == 1


async def test_a_prompt_list_goes_as_one_request_with_a_list_of_rooms(rig: Rig) -> None:
    async with await rig.post({"model": "fake", "prompt": ["a", "b", "c"]}, "/v1/completions") as response:
        await response.read()
    seen = rig.prefill.calls[0].json
    assert len(set(seen["bootstrap_room"])) == 3
    assert len(set(seen["rid"])) == 3
    assert seen["bootstrap_port"] == [8998] * 3


async def test_a_connection_serves_many_requests(rig: Rig) -> None:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        for body in (CHAT, STREAM, {"model": "nope", "messages": []}, STREAM, CHAT):
            async with session.post(rig.url + "/v1/chat/completions", json=body) as response:
                await response.read()
                assert response.status == (404 if body["model"] == "nope" else 200)
        assert len(connector._conns) == 1


async def test_a_unified_engine_serves_alone() -> None:
    async with running_rig(Role.UNIFIED) as rig:
        async with await rig.post(STREAM) as response:
            assert (await response.text()).endswith("data: [DONE]\n\n")
            assert response.headers["x-disagg-prefill"] == response.headers["x-disagg-decode"] == "unified-0"
        assert "bootstrap_room" not in rig.engine(Role.UNIFIED).calls[0].json


async def test_equal_engines_take_turns() -> None:
    async with running_rig(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE) as rig:
        for _ in range(4):
            async with await rig.post(CHAT) as response:
                await response.read()
        assert [len(e.calls) for e in rig.engines] == [2, 2, 2, 2]


async def test_pools_are_keyed_by_model() -> None:
    roles = (Role.PREFILL, Role.DECODE, Role.PREFILL, Role.DECODE)
    async with running_rig(*roles, models={0: "a", 1: "a", 2: "b", 3: "b"}) as rig:
        for model, index in (("a", 0), ("b", 1), ("b", 1)):
            async with await rig.post({**CHAT, "model": model}) as response:
                assert response.headers["x-disagg-decode"] == f"decode-{index}"
        async with await rig.session.get(rig.url + "/v1/models") as response:
            assert [m["id"] for m in (await response.json())["data"]] == ["a", "b"]


# --- events and chunks


async def test_only_whole_events_are_passed_on(rig: Rig) -> None:
    first_half, gate = asyncio.Event(), asyncio.Event()

    async def halves(call: Call) -> None:
        event = b"data: " + msgspec.json.encode(chat_chunk("alpha")) + b"\n\n"
        await call.write(event + event[:20])
        first_half.set()
        await gate.wait()
        await call.write(event[20:])
        await call.done()

    rig.decode.behave = halves
    async with await rig.post(STREAM) as response:
        await first_half.wait()
        seen = await response.content.readany()
        assert seen.endswith(b"\n\n")
        assert seen.count(b"data:") == 1
        gate.set()
        rest = await response.read()
    assert [e["choices"][0]["delta"]["content"] for e in events_of((seen + rest).decode())[:-1]] == ["alpha", "alpha"]


async def test_an_old_client_gets_a_body_without_chunks(rig: Rig) -> None:
    host, _, port = rig.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = msgspec.json.encode(STREAM)
    writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert events_of(content.decode())[-1] == "data: [DONE]"


async def test_a_client_that_asks_first_is_told_to_go_on(rig: Rig) -> None:
    host, _, port = rig.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = msgspec.json.encode(CHAT)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % len(body))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HUNG_S) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HUNG_S)).startswith(b"HTTP/1.1 200 OK")
    writer.close()


async def test_a_slow_reader_holds_the_engine_back_and_costs_no_memory(rig: Rig) -> None:
    written = 0

    async def flood(call: Call) -> None:
        nonlocal written
        for _ in range(4096):
            await call.event(chat_chunk("x" * 16 * 1024))
            written += 16 * 1024
        await call.done()

    rig.decode.behave = flood
    host, _, port = rig.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    body = msgspec.json.encode(STREAM)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await until(lambda: written > 0)
    seen = -1
    while seen != written:  # wait until nothing moves any more
        seen = written
        await asyncio.sleep(0.2)
    assert written < 32 * 1024 * 1024, "the engine wrote into a router that nobody reads"
    total = 0
    async with asyncio.timeout(20):
        while not (data := await reader.read(1 << 20)).endswith(b"0\r\n\r\n"):
            total += len(data)
    assert total > 64 * 1024 * 1024
    writer.close()


# --- one leg fails


async def test_prefill_refuses_while_decode_waits(rig: Rig) -> None:
    async def refuse(call: Call) -> None:
        await call.json_answer({"object": "error", "message": "the prompt is too long", "type": "BadRequestError", "code": 400}, 400)

    rig.prefill.behave = refuse
    rig.decode.behave = forever
    async with asyncio.timeout(HUNG_S), await rig.post(STREAM) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["message"] == "the prompt is too long"
    assert error["type"] == "invalid_request_error"
    await idle(rig)
    assert rig.decode.aborted[0] == rig.decode.calls[0].rids[0]


async def test_decode_refuses_while_prefill_waits(rig: Rig) -> None:
    async def refuse(call: Call) -> None:
        await call.json_answer({"error": {"message": "no room for this"}}, 503)

    rig.decode.behave = refuse
    rig.prefill.behave = forever
    async with asyncio.timeout(HUNG_S), await rig.post(GENERATE, "/generate") as response:
        assert response.status == 503
        assert (await response.json())["error"]["message"] == "no room for this"
    await idle(rig)
    assert rig.prefill.aborted[0] == rig.prefill.calls[0].rids[0]


@pytest.mark.usefixtures("judged_soon")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_an_engine_that_dies_each_time_before_the_first_token_is_an_error_after_three_attempts(role: Role, stream: bool) -> None:
    async with running_rig(Role.PREFILL, Role.DECODE) as rig:

        async def die(call: Call) -> None:
            call.cut()

        rig.prefill.behave = rig.decode.behave = forever
        rig.engine(role).behave = die
        async with asyncio.timeout(20), await rig.post({**CHAT, "stream": stream}) as response:
            assert response.status == 502
            assert response.headers["x-disagg-attempts"] == "3"
            assert role.value in (await response.json())["error"]["message"]
        await idle(rig)


async def test_prefills_death_after_the_first_token_is_of_no_interest(rig: Rig) -> None:
    started, gate = asyncio.Event(), asyncio.Event()

    async def die_later(call: Call) -> None:
        await started.wait()
        call.cut()

    async def slow(call: Call) -> None:
        await call.event(chat_chunk("alpha"))
        await gate.wait()
        await call.event(chat_chunk(" beta"))
        await call.event(chat_chunk("", finish="stop"))
        await call.done()

    rig.prefill.behave, rig.decode.behave = die_later, slow
    async with await rig.post(STREAM) as response:
        first = await response.content.readuntil(b"\n\n")
        started.set()
        await until(lambda: "PrefillFailed" in happened(rig, response.headers["x-request-id"]))
        gate.set()
        events = events_of((first + await response.read()).decode())
    assert [e["choices"][0]["delta"]["content"] for e in events[:-1]] == ["alpha", " beta", ""]
    assert [len(e.calls) for e in rig.engines] == [1, 1], "nobody is asked again"


def happened(rig: Rig, request_id: str) -> list[str]:
    """What the router has seen of a request so far."""
    story = rig.router._relay.waterfall(request_id)
    return [event["event"] for attempt in story["attempts"] for event in attempt["events"]] if story else []


async def cut_in_the_middle(call: Call) -> None:
    await call.event(chat_chunk("alpha"))
    call.cut()


async def end_early(call: Call) -> None:
    await call.event(chat_chunk("alpha"))
    await call.end()


async def error_in_the_middle(call: Call) -> None:
    await call.event(chat_chunk("alpha"))
    await call.event({"error": {"message": "out of memory", "code": 500}})
    await call.done()


async def garbage_in_the_middle(call: Call) -> None:
    await call.event(chat_chunk("alpha"))
    call.raw_write(b"zz\r\nthis is no chunk\r\n")
    await asyncio.Event().wait()


@pytest.mark.usefixtures("judged_soon")
@pytest.mark.parametrize("behaviour", [cut_in_the_middle, end_early, error_in_the_middle, garbage_in_the_middle])
async def test_a_broken_stream_ends_with_an_error_event_and_never_with_done(rig: Rig, behaviour: Any) -> None:
    rig.decode.behave = behaviour
    async with asyncio.timeout(HUNG_S), await rig.post(STREAM) as response:
        events = events_of(await response.text())
    assert events[0]["choices"][0]["delta"]["content"] == "alpha"
    assert events[1]["error"]["message"]
    assert len(events) == 2
    await idle(rig)


async def test_an_error_as_the_first_event_becomes_a_real_status(rig: Rig) -> None:
    """SGLang's /generate answers 200 at once and puts its errors into the stream."""

    async def refuse(call: Call) -> None:
        await call.event({"error": {"message": "the prompt is too long", "code": 400}})
        await call.done()

    rig.decode.behave = rig.prefill.behave = refuse
    async with asyncio.timeout(HUNG_S), await rig.post({**GENERATE, "stream": True}, "/generate") as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "the prompt is too long"


async def test_an_aborted_native_stream_is_an_error_and_not_an_end(rig: Rig) -> None:
    """SGLang ends a native stream whose request failed with a finish_reason of type abort, and [DONE]."""

    async def abort(call: Call) -> None:
        await call.event({"text": "al", "meta_info": {"finish_reason": None}})
        reason = {"type": "abort", "message": "the KV transfer failed", "status_code": 500}
        await call.event({"text": "al", "meta_info": {"finish_reason": reason}})
        await call.done()

    rig.decode.behave = abort
    async with asyncio.timeout(HUNG_S), await rig.post({**GENERATE, "stream": True}, "/generate") as response:
        events = events_of(await response.text())
    assert len(events) == 2
    assert events[1]["error"]["message"].startswith("the KV transfer failed")


async def test_an_engine_that_ignores_aborts_loses_its_connection(rig: Rig) -> None:
    async def refuse(call: Call) -> None:
        await call.json_answer({"error": {"message": "no"}}, 400)

    rig.prefill.behave, rig.decode.behave = refuse, forever
    rig.decode.abort_ends = False
    async with await rig.post(STREAM) as response:
        assert response.status == 400
    await until(lambda: not rig.decode.live)
    rid = rig.decode.calls[0].rids[0]
    assert rig.decode.aborted.count(rid) >= 3, "an abort that does nothing is repeated"


# --- deadlines


async def test_silence_before_the_first_token_ends_at_the_limit() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, first_token_timeout_s=0.3) as rig:
        rig.prefill.behave = rig.decode.behave = forever
        async with asyncio.timeout(HUNG_S), await rig.post(STREAM) as response:
            assert response.status == 504
        await idle(rig)


async def test_a_whole_answer_has_a_limit_of_its_own() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, first_token_timeout_s=30, whole_answer_timeout_s=0.3) as rig:
        rig.prefill.behave = rig.decode.behave = forever
        async with asyncio.timeout(HUNG_S), await rig.post(CHAT, path="/v1/chat/completions?api-version=1") as response:
            assert response.status == 504
        await idle(rig)


async def test_silence_in_the_middle_of_a_stream_ends_at_the_limit() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, between_tokens_timeout_s=0.3) as rig:

        async def stall(call: Call) -> None:
            await call.event(chat_chunk("alpha"))
            await asyncio.Event().wait()

        rig.decode.behave = stall
        async with asyncio.timeout(HUNG_S), await rig.post(STREAM) as response:
            events = events_of(await response.text())
        assert "0.3 s" in events[-1]["error"]["message"]
        await idle(rig)


async def test_the_clients_own_deadline_counts(rig: Rig) -> None:
    rig.prefill.behave = rig.decode.behave = forever
    async with asyncio.timeout(HUNG_S), await rig.post(CHAT, headers={"x-disagg-deadline-ms": "200"}) as response:
        assert response.status == 504
        assert "deadline" in (await response.json())["error"]["message"]
    await idle(rig)


async def test_a_deadline_is_counted_as_such_and_not_against_an_engine(rig: Rig) -> None:
    rig.prefill.behave = rig.decode.behave = forever
    async with await rig.post(CHAT, headers={"x-disagg-deadline-ms": "100"}) as response:
        assert (await response.json())["error"]["type"] == "deadline_exceeded"
    assert 'outcome="deadline"' in rig.metrics()


# --- a client leaves


async def leave(rig: Rig, body: dict[str, Any]) -> None:
    """A client that leaves as soon as every engine works for it."""
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(rig.post(body))
        await until(lambda: all(e.live for e in rig.engines))
        asking.cancel()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_frees_both_engines(rig: Rig, stream: bool) -> None:
    rig.prefill.behave = rig.decode.behave = forever
    rig.prefill.abort_ends = rig.decode.abort_ends = True
    await leave(rig, {**CHAT, "stream": stream})
    await idle(rig)
    for engine in rig.engines:
        assert engine.aborted[0] == engine.calls[0].rids[0]
    await until(lambda: "disagg_inflight 0.0" in rig.metrics())


async def test_a_client_that_leaves_in_the_middle_frees_decode(rig: Rig) -> None:
    async def endless(call: Call) -> None:
        while True:
            await call.event(chat_chunk("alpha"))
            await asyncio.sleep(0.01)

    rig.decode.behave = endless
    response = await rig.post(STREAM)
    await response.content.readany()
    response.close()
    await idle(rig)
    assert rig.decode.aborted[0] == rig.decode.calls[0].rids[0]


async def test_an_abort_without_an_idle_connection_makes_one(rig: Rig) -> None:
    """With one request the only connection to each engine is busy with it."""
    rig.prefill.behave = rig.decode.behave = forever
    await leave(rig, CHAT)
    await until(lambda: bool(rig.prefill.aborted and rig.decode.aborted))


# --- nothing was lost yet: a second attempt


async def test_a_connection_that_died_idle_is_replaced_with_a_new_room(rig: Rig) -> None:
    async with await rig.post(CHAT) as response:
        await response.read()

    async def die_once(call: Call) -> None:
        rig.decode.behave = answer_well
        call.cut()

    rig.decode.behave = die_once
    async with await rig.post(CHAT) as response:
        assert response.status == 200
        assert response.headers["x-disagg-attempts"] == "2"
    first, second = (c.json for c in rig.decode.calls[1:])
    assert first["bootstrap_room"] != second["bootstrap_room"]
    assert first["rid"] != second["rid"]
    await idle(rig)


async def test_an_engine_that_refuses_connections_is_passed_over() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, Role.DECODE, probe_interval_s=30) as rig:
        await rig.engine(Role.DECODE, 0).stop()
        async with await rig.post(CHAT) as response:
            assert response.status == 200
            assert response.headers["x-disagg-decode"] == "decode-1"
            assert response.headers["x-disagg-attempts"] == "2"
        await until(lambda: rig.state("decode-0") in {"suspect", "dead"})


async def test_an_engine_that_comes_back_is_used_again() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, queue_timeout_s=1.0) as rig:
        port = rig.decode.port
        await rig.decode.stop()
        await until(lambda: rig.state("decode-0") == "dead")
        async with await rig.post(CHAT) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
        await rig.decode.start(port)
        await until(lambda: rig.state("decode-0") == "ready")
        async with await rig.post(CHAT) as response:
            assert response.status == 200


# --- samples and logprobs


async def one_sample(call: Call) -> None:
    assert "n" not in call.json, "a pair must never see n"
    seed = call.json.get("seed")
    if call.engine.role is Role.PREFILL:
        await call.json_answer({})
    elif call.json.get("stream"):
        await call.event(chat_chunk(f"seed {seed}"))
        await call.event({**chat_chunk(""), "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}})
        await call.done()
    else:
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        choice = {"index": 0, "message": {"role": "assistant", "content": f"seed {seed}"}, "finish_reason": "stop"}
        await call.json_answer({"id": "x", "choices": [choice], "usage": usage})


async def test_samples_are_sent_one_by_one_and_merged(rig: Rig) -> None:
    rig.prefill.behave = rig.decode.behave = one_sample
    async with await rig.post({**CHAT, "n": 3, "seed": 5}) as response:
        answer = await response.json()
    assert [(c["index"], c["message"]["content"]) for c in answer["choices"]] == [(0, "seed 5"), (1, "seed 6"), (2, "seed 7")]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert len({c.json["bootstrap_room"] for c in rig.decode.calls}) == 3


async def test_streamed_samples_are_merged(rig: Rig) -> None:
    rig.prefill.behave = rig.decode.behave = one_sample
    async with await rig.post({**STREAM, "n": 2, "seed": 1, "stream_options": {"include_usage": True}}) as response:
        *events, usage, done = events_of(await response.text())
    assert {(e["choices"][0]["index"], e["choices"][0]["delta"]["content"]) for e in events} == {(0, "seed 1"), (1, "seed 2")}
    assert usage["usage"]["completion_tokens"] == 4
    assert done == "data: [DONE]"


async def test_one_failing_sample_ends_them_all(rig: Rig) -> None:
    async def third_fails(call: Call) -> None:
        if call.json["seed"] == 3:
            await call.json_answer({"error": {"message": "no third"}}, 400)
        else:
            await forever(call)

    rig.decode.behave = third_fails
    async with asyncio.timeout(HUNG_S), await rig.post({**CHAT, "n": 3, "seed": 1}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "no third"
    await idle(rig)


async def logprobs(call: Call) -> None:
    prefill = call.engine.role is Role.PREFILL
    meta = {"input_token_logprobs": [[-0.1, 1, None], [-0.2, 2, None]] if prefill else [], "output_token_logprobs": []}
    answer = {"text": "x", "output_ids": [1], "meta_info": meta}
    if call.json.get("stream"):
        await call.event(answer)
        await call.done()
    else:
        await call.json_answer(answer)


@pytest.mark.parametrize("stream", [False, True])
async def test_input_logprobs_of_prefill_stand_in_front(rig: Rig, stream: bool) -> None:
    rig.prefill.behave = rig.decode.behave = logprobs
    async with await rig.post({**GENERATE, "return_logprob": True, "stream": stream}, "/generate") as response:
        answer = events_of(await response.text())[0] if stream else await response.json()
    assert answer["meta_info"]["input_token_logprobs"] == [[-0.1, 1, None], [-0.2, 2, None]]


async def test_input_logprobs_are_waited_for_when_decode_is_faster(rig: Rig) -> None:
    gate = asyncio.Event()

    async def late(call: Call) -> None:
        await gate.wait()
        await logprobs(call)

    rig.prefill.behave, rig.decode.behave = late, logprobs
    asyncio.get_running_loop().call_later(0.2, gate.set)
    async with await rig.post({**GENERATE, "return_logprob": True, "stream": True}, "/generate") as response:
        events = events_of(await response.text())
    assert len(events[0]["meta_info"]["input_token_logprobs"]) == 2


# --- what is kept


def jobs() -> int:
    gc.collect()
    return sum(type(found) is Job for found in gc.get_objects())


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_of_a_request_that_failed_is_kept_but_its_story(rig: Rig, stream: bool) -> None:
    """An error knows its frames, frames know the body: a thousand failed requests would keep a thousand prompts."""

    async def refuse(call: Call) -> None:
        await call.json_answer({"error": {"message": "too long"}}, status=400)

    rig.prefill.behave = rig.decode.behave = refuse
    async with await rig.post({**CHAT, "stream": stream}) as response:
        assert response.status == 400
        request_id = response.headers["x-request-id"]
    await idle(rig)
    await until(lambda: jobs() == 0)
    story = rig.router._relay.waterfall(request_id)
    assert story is not None
    assert [a["state"] for a in story["attempts"]] == ["failed"]
