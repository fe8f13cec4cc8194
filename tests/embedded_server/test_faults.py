"""Every fault does what its name says, and neither side holds a page afterwards."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.embedded_server.conftest import LIMITS, Answer, Client, Trio, greedy, room_at, some_prompt
from tests.engines import EngineProcess, launch_engine, running_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SURVIVOR_ANSWERS_WITHIN_S = 2.0
ABORT_FREES_WITHIN_S = 1.0


@pytest.fixture(autouse=True)
async def healthy_afterwards(client: Client, trio: Trio) -> AsyncIterator[None]:
    yield
    for engine in trio:
        await client.faults(engine, "none")
    await client.wait_free(*trio)


async def died_at(engine: EngineProcess) -> float:
    await asyncio.to_thread(engine.process.wait)
    return time.monotonic()


async def answered(request: Any) -> tuple[Answer | None, float]:
    """The answer, or None if the connection broke, and when."""
    try:
        return await request, time.monotonic()
    except aiohttp.ClientError:
        return None, time.monotonic()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("role", "fault"),
    [
        ("prefill", "die@accept"),
        ("prefill", "die@prefill:50%"),
        ("prefill", "die@transfer:65536"),
        ("decode", "die@accept"),
        ("decode", "die@transfer:65536"),
        ("decode", "die@token:3"),
    ],
)
async def test_when_one_side_dies_the_other_answers_and_frees(client: Client, trio: Trio, role: str, fault: str) -> None:
    with running_engines(launch_engine(role, faults=fault, extra_args=LIMITS)) as (victim,):
        legs = (victim, trio.decode) if role == "prefill" else (trio.prefill, victim)
        survivor = trio.decode if role == "prefill" else trio.prefill
        body = {**greedy(some_prompt(2000), 20), **room_at(legs[0])}
        async with asyncio.TaskGroup() as tasks:
            death = tasks.create_task(died_at(victim))
            lost = tasks.create_task(answered(client.post(victim, "/generate", body)))
            kept = tasks.create_task(answered(client.post(survivor, "/generate", body)))
        answer, when = kept.result()
        assert lost.result()[0] is None
        assert victim.process.returncode == -9
        assert answer is not None
        if fault == "die@token:3":
            assert answer.status == 200  # prefill had done its part
        elif fault != "die@accept" or role == "prefill":
            assert answer.status == 500
            assert "KV transfer failed" in answer.json["error"]["message"]
            assert when - death.result() < SURVIVOR_ANSWERS_WITHIN_S
        else:
            assert "did not connect" in answer.json["error"]["message"]  # nobody can know before the limit
        await client.wait_free(survivor)


async def test_decode_goes_on_when_prefill_dies_after_the_handoff(client: Client, trio: Trio) -> None:
    await client.faults(trio.decode, "slow:x5")
    with running_engines(launch_engine("prefill")) as (prefill,):
        body = {**greedy(some_prompt(30), 40), **room_at(prefill)}
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(client.post(prefill, "/generate", body))
            answer = tasks.create_task(client.post(trio.decode, "/generate", body))
            await first
            prefill.kill()
    assert len(answer.result().ids) == 40
    assert (await client.get(trio.decode, "/health")).status == 200


async def test_a_stalled_transfer_ends_at_its_limit(client: Client, trio: Trio) -> None:
    await client.faults(trio.prefill, "stall@transfer:65536")
    first, answer = await client.both(trio.prefill, trio.decode, "/generate", greedy(some_prompt(2000), 5))
    assert (first.status, answer.status) == (500, 500)
    # Both sides notice at about the same time; the first one tells the other.
    sentence = answer.json["error"]["message"]
    assert "silent for too long" in sentence or "did not take the next KV page in time" in sentence


async def test_a_damaged_page_is_an_error_and_never_an_answer(client: Client, trio: Trio) -> None:
    await client.faults(trio.prefill, "corrupt@transfer:0")
    first, answer = await client.both(trio.prefill, trio.decode, "/v1/completions", {"prompt": "one two three", "max_tokens": 5})
    assert (first.status, answer.status) == (500, 500)
    for leg in (first, answer):
        assert "the checksum of KV page 0 is wrong" in leg.json["message"]
    streamed = await client.both(trio.prefill, trio.decode, "/generate", greedy(some_prompt(40), 5, stream=True))
    assert streamed[1].status == 200
    assert "checksum" in streamed[1].events[0]["error"]["message"]


async def test_late_writes_land_in_quarantine(client: Client, trio: Trio) -> None:
    before = (await client.load(trio.decode))["disaggregation"]["late_writes_total"]
    computed = (await client.load(trio.prefill))["total_prefill_uncached_tokens"]
    await client.faults(trio.prefill, "late-write,slow:x4")
    body = {**greedy(some_prompt(3000, 11), 5, rid="late"), **room_at(trio.prefill)}
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(client.post(trio.prefill, "/generate", body))
        answer = tasks.create_task(client.post(trio.decode, "/generate", body))
        await client.wait_for(trio.decode, "disaggregation", "decode_transfer_queue_reqs", 1)
        await client.wait_for(trio.prefill, "", "total_prefill_uncached_tokens", computed + 1)
        await client.post(trio.decode, "/abort_request", {"rid": "late"})
        await client.wait_for(trio.decode, "disaggregation", "kv_quarantined_pages", 1)
    assert answer.result().json["meta_info"]["finish_reason"]["type"] == "abort"
    assert first.result().status == 500
    await client.wait_free(trio.decode)
    load = (await client.load(trio.decode))["disaggregation"]
    assert load["kv_quarantined_pages"] == 0
    assert load["late_writes_total"] > before


async def abort_both(client: Client, trio: Trio, rid: str) -> None:
    for engine in trio:
        assert (await client.post(engine, "/abort_request", {"rid": rid})).status == 200


@pytest.mark.alone
@pytest.mark.parametrize("phase", ["bootstrap", "receiving", "prefilling", "transferring", "decoding", "unified"])
async def test_an_abort_by_rid_frees_in_every_phase(client: Client, trio: Trio, phase: str) -> None:
    faults = {"prefilling": "slow:x4", "transferring": "stall@transfer:0"}.get(phase, "none")
    await client.faults(trio.prefill, faults)
    await client.faults(trio.decode, "slow:x4")
    await client.faults(trio.unified, "slow:x4")
    reached = {
        "bootstrap": (trio.prefill, "disaggregation", "prefill_bootstrap_queue_reqs"),
        "receiving": (trio.decode, "disaggregation", "decode_transfer_queue_reqs"),
        "prefilling": (trio.prefill, "", "num_running_reqs"),
        "transferring": (trio.prefill, "disaggregation", "prefill_inflight_queue_reqs"),
        "decoding": (trio.decode, "", "num_running_reqs"),
        "unified": (trio.unified, "", "num_running_reqs"),
    }[phase]
    legs = {"bootstrap": trio[1:2], "receiving": trio[2:], "unified": trio[:1]}.get(phase, trio[1:])
    prompt = some_prompt(3000 if phase == "prefilling" else 40, hash(phase))
    body = {**greedy(prompt, 2000, rid=f"abort {phase}"), **room_at(trio.prefill)}
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(client.post(leg, "/generate", body)) for leg in legs]
        await client.wait_for(reached[0], reached[1], reached[2], 1)
        await abort_both(client, trio, "abort")  # only the exact id counts
        assert not any(task.done() for task in asked[-1:])
        await abort_both(client, trio, f"abort {phase}")
        await client.wait_free(*trio, within_s=ABORT_FREES_WITHIN_S)
    last = asked[-1].result()
    assert last.status in {200, 500}
    if last.status == 200:
        assert last.json["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.alone
async def test_an_abort_of_all_ends_every_running_request(client: Client, trio: Trio) -> None:
    for engine in trio:
        await client.faults(engine, "slow:x4")
    bodies = [greedy(some_prompt(20 + number), 2000, rid=f"many {number}") for number in range(3)]
    async with asyncio.TaskGroup() as tasks:
        alone = [tasks.create_task(client.post(trio.unified, "/generate", body)) for body in bodies]
        pairs = [tasks.create_task(client.both(*trio[1:], "/generate", body)) for body in bodies]
        for engine in (trio.unified, trio.decode):
            await client.wait_for(engine, "", "num_running_reqs", len(bodies))
            assert (await client.post(engine, "/abort_request", {"rid": ""})).status == 200  # nobody's id
            await client.wait_for(engine, "", "num_running_reqs", len(bodies))
            assert (await client.post(engine, "/abort_request", {"rid": "", "abort_all": True})).status == 200
        await client.wait_free(*trio, within_s=ABORT_FREES_WITHIN_S)
    for answer in [*(task.result() for task in alone), *(task.result()[1] for task in pairs)]:
        assert answer.status == 200
        assert answer.json["meta_info"]["finish_reason"]["type"] == "abort"


async def test_an_ignored_abort_changes_nothing(client: Client, trio: Trio) -> None:
    await client.faults(trio.unified, "ignore-abort,slow:x4")
    async with asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(client.post(trio.unified, "/generate", greedy(some_prompt(9), 30, rid="deaf")))
        await client.wait_for(trio.unified, "", "num_running_reqs", 1)
        await client.post(trio.unified, "/abort_request", {"rid": "deaf"})
    assert len(asked.result().ids) == 30


async def test_a_refused_request_has_the_status_that_was_set(client: Client, trio: Trio) -> None:
    await client.faults(trio.unified, "refuse:429")
    for path in ("/generate", "/v1/chat/completions"):
        assert (await client.post(trio.unified, path, {})).status == 429


async def test_garbage_and_early_ends(client: Client, trio: Trio) -> None:
    await client.faults(trio.unified, "garbage@token:3")
    body = greedy(some_prompt(9), 8)
    streamed = (await client.post(trio.unified, "/generate", {**body, "stream": True})).raw.split(b"\n\n")
    assert b'"completion_tokens":3' in streamed[2]
    assert b"\xff" in streamed[3]
    with pytest.raises(ValueError, match="utf-8"):
        _ = (await client.post(trio.unified, "/generate", body)).json
    await client.faults(trio.unified, "early-end@token:3")
    streamed = (await client.post(trio.unified, "/generate", {**body, "stream": True})).raw.split(b"\n\n")
    assert b'"completion_tokens":3' in streamed[-2]
    assert streamed[-1] == b""
    with pytest.raises(aiohttp.ClientError):
        await client.post(trio.unified, "/generate", body)


async def read_until(response: aiohttp.ClientResponse, enough: Callable[[bytes], bool]) -> bytes:
    seen = b""
    while not enough(seen):
        seen += await response.content.readany()
        assert not response.content.at_eof(), seen
    return seen


async def nothing_more_comes(response: aiohttp.ClientResponse) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await response.content.readany()


async def test_an_answer_that_stalls_keeps_its_connection_and_others_go_on(client: Client, trio: Trio) -> None:
    await client.faults(trio.unified, "stall@token:3,slow:x4")
    body = greedy(some_prompt(9), 8, stream=True)
    async with client.session.post(trio.unified.url + "/generate", json=body) as response:
        await read_until(response, lambda seen: b'"completion_tokens":3' in seen)
        short = await client.post(trio.unified, "/generate", greedy(some_prompt(5), 3))
        assert len(short.ids) == 3  # it never gets so far as to stall
        assert (await client.get(trio.unified, "/health")).status == 200
        await client.wait_free(trio.unified)  # the whole answer is made; it is only not sent
        await nothing_more_comes(response)


async def test_a_whole_answer_stalls_too(client: Client, trio: Trio) -> None:
    await client.faults(trio.unified, "stall@token:3")
    before = (await client.load(trio.unified))["total_steps"]
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(client.post(trio.unified, "/generate", greedy(some_prompt(9), 8)))
        await client.wait_for(trio.unified, "", "total_steps", before + 8)
        await client.wait_free(trio.unified)
        assert not asking.done()
        asking.cancel()


@pytest.mark.parametrize(("path", "stream"), [("/generate", True), ("/v1/chat/completions", True), ("/v1/chat/completions", False)])
async def test_an_answer_stalls_behind_its_head(client: Client, trio: Trio, path: str, stream: bool) -> None:
    await client.faults(trio.unified, "stall@head")
    body = {**greedy(some_prompt(9), 8), "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "stream": stream}
    async with client.session.post(trio.unified.url + path, json=body) as response:
        assert response.status == 200
        assert response.content_type == ("text/event-stream" if stream else "application/json")
        await client.faults(trio.unified, "none")
        assert len((await client.post(trio.unified, "/generate", greedy(some_prompt(5), 3))).ids) == 3
        await client.wait_free(trio.unified)
        await nothing_more_comes(response)


async def test_leaked_pages_stay_used_after_their_request(client: Client, trio: Trio) -> None:
    async def used_after(prompt: list[int]) -> int:
        assert len((await client.both(trio.prefill, engine, "/generate", greedy(prompt, 20)))[1].ids) == 20
        load = await client.load(engine)
        assert load["num_running_reqs"] == 0
        used: int = load["num_used_tokens"]
        return used

    with running_engines(launch_engine("decode", faults="leak", extra_args=LIMITS)) as (engine,):
        first = await used_after(some_prompt(40, 1))
        second = await used_after(some_prompt(40, 2))
        await client.faults(engine, "none")
        third = await used_after(some_prompt(40, 3))
    assert first >= 60
    assert second == 2 * first
    assert third == second, "what ends without the fault is free"


async def test_slow_stretches_every_step(client: Client, trio: Trio) -> None:
    body = greedy(some_prompt(9), 30)
    quick = (await client.post(trio.unified, "/generate", body)).json["meta_info"]["e2e_latency"]
    await client.faults(trio.unified, "slow:x20")
    slow = (await client.post(trio.unified, "/generate", body)).json["meta_info"]["e2e_latency"]
    assert slow > 3 * quick


async def test_a_hanging_engine_answers_http_and_nothing_else(client: Client, trio: Trio) -> None:
    with running_engines(launch_engine("unified", faults="hang@token:3")) as (engine,):
        body = greedy(some_prompt(9), 20, stream=True, rid="hanging")
        async with client.session.post(engine.url + "/generate", json=body) as response:
            seen = b""
            while seen.count(b"data: ") < 3:
                seen += await response.content.readany()
            steps = (await client.load(engine))["total_steps"]
            await client.post(engine, "/abort_request", {"rid": "hanging"})
            load = await client.load(engine)
            assert load["num_running_reqs"] == 1
            assert load["total_steps"] == steps
            while (await client.get(engine, "/health")).status == 200:  # noqa: ASYNC110  HTTP has no event
                await asyncio.sleep(0.05)
            await client.faults(engine, "lie-health")
            for path in ("/health", "/ready", "/health_generate"):
                assert (await client.get(engine, path)).status == 200
            assert seen.count(b"data: ") == 3
        engine.kill()


async def test_without_the_flag_faults_cannot_be_set(client: Client) -> None:
    with running_engines(launch_engine("unified")) as (engine,):
        assert (await client.post(engine, "/faults", {"spec": "none"})).status == 404


async def test_wrong_faults_are_a_400_at_run_time_and_an_exit_at_the_start(client: Client, trio: Trio) -> None:
    answer = await client.post(trio.unified, "/faults", {"spec": "dye@token:1"})
    assert answer.status == 400
    assert "die@accept" in answer.json["message"]
    with pytest.raises(RuntimeError, match="exit 78"):
        launch_engine("unified", faults="dye@token:1").wait_ready()


async def test_a_port_in_use_is_one_line_that_names_it(client: Client, trio: Trio) -> None:
    port = trio.unified.url.rpartition(":")[2]
    with pytest.raises(RuntimeError, match=port) as caught:
        launch_engine("unified", extra_args=("--port", port)).wait_ready()
    assert "Traceback" not in str(caught.value)


async def test_paced_engines_take_their_time_and_need_no_cpu(client: Client) -> None:
    args = ("--paced", "30,0;10,0", "--paced-compute", "off")
    with running_engines(*[launch_engine(role, extra_args=args) for role in ("unified", "prefill", "decode")]) as trio:
        unified, prefill, decode = trio
        body = greedy(some_prompt(40), 20)
        alone = (await client.post(unified, "/generate", body)).json
        assert alone["meta_info"]["e2e_latency"] > 0.03 + 19 * 0.01
        _, answer = await client.both(prefill, decode, "/generate", body)
        assert answer.ids == alone["output_ids"]
        rest = greedy(body["input_ids"] + alone["output_ids"][:7], 13)
        assert (await client.post(unified, "/generate", rest)).ids == alone["output_ids"][7:]
        await client.wait_free(*trio)
