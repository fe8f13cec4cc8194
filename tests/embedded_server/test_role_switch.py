"""POST /pd_role_switch: engines that change their role alive, and the refusals of those that may not now."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from disagg.engines.embedded.links import leads_to
from disagg.engines.embedded.switch import Situation, SwitchBody, flips, judge
from tests.embedded_server.conftest import LIMITS, Answer, Client, Trio, greedy, room_at, some_prompt
from tests.engines import EngineProcess, launch_engine, running_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.slow

SWITCH = ("--enable-pd-role-switch", *LIMITS)
SMALL_POOL = 1024
PROMPTS = [some_prompt(length, 31) for length in (1, 17, 600)]


class Pair(NamedTuple):
    """Two engines that can switch; the names are their first roles."""

    prefill: EngineProcess
    decode: EngineProcess


@pytest.fixture(scope="module")
def both() -> Iterator[Pair]:
    args = (*SWITCH, "--max-total-tokens", str(SMALL_POOL))
    with running_engines(*[launch_engine(role, faults="none", extra_args=args) for role in ("prefill", "decode")]) as (prefill, decode):
        yield Pair(prefill, decode)
        for engine in (prefill, decode):
            assert "Traceback" not in engine.log


@pytest.fixture
async def pair(client: Client, both: Pair) -> AsyncIterator[Pair]:
    """In their first roles; nothing may be held after a test."""
    yield both
    for engine in both:
        await client.faults(engine, "none")
    await client.wait_free(*both)
    for engine in both:
        assert (await switch(client, engine, engine.role)).status == 200


async def switch(client: Client, engine: EngineProcess, role: str, **more: Any) -> Answer:
    return await client.post(engine, "/pd_role_switch", {"new_role": role, "decode_cuda_graph_memory_gb": 0, **more})


async def swap(client: Client, pair: Pair) -> None:
    for engine, role in zip(pair, ("decode", "prefill"), strict=True):
        answer = await switch(client, engine, role)
        old = engine.role
        assert (answer.status, answer.json["success"]) == (200, True), answer.raw
        assert (answer.json["old_role"], answer.json["new_role"]) == (old, role)


async def role_of(client: Client, engine: EngineProcess) -> str:
    """As three places say it."""
    info = (await client.get(engine, "/server_info")).json
    roles = {
        info["disaggregation_mode"],
        info["internal_states"][0]["disaggregation_mode"],
        (await client.load(engine))["disaggregation"]["mode"],
    }
    assert len(roles) == 1
    return str(roles.pop())


async def refused(client: Client, engine: EngineProcess, role: str, sentence: str, **more: Any) -> dict[str, Any]:
    before = await role_of(client, engine)
    answer = await switch(client, engine, role, **more)
    assert answer.status == 400, answer.raw
    body: dict[str, Any] = answer.json
    assert set(body) == {"success", "message", "old_role", "new_role", "safe_to_restore"}
    assert (body["success"], body["old_role"], body["new_role"]) == (False, before, role)
    assert sentence in body["message"]
    assert await role_of(client, engine) == before
    return body


async def handed_over(client: Client, prefill: EngineProcess, decode: EngineProcess, prompt: list[int], new: int = 12) -> Answer:
    first, answer = await client.both(prefill, decode, "/generate", greedy(prompt, new))
    assert (first.status, answer.status) == (200, 200), (first.raw, answer.raw)
    return answer


# --- the switch ---


async def test_a_pair_with_swapped_roles_gives_the_same_tokens(client: Client, trio: Trio, pair: Pair) -> None:
    alone = [(await client.post(trio.unified, "/generate", greedy(prompt, 12))).ids for prompt in PROMPTS]
    straight = [(await handed_over(client, pair.prefill, pair.decode, prompt)).ids for prompt in PROMPTS]
    await client.wait_free(*pair)
    await swap(client, pair)
    assert [await role_of(client, engine) for engine in pair] == ["decode", "prefill"]
    before = (await client.load(pair.decode))["disaggregation"]["kv_transfer_count_total"]
    swapped = [(await handed_over(client, pair.decode, pair.prefill, prompt)).ids for prompt in PROMPTS]
    assert straight == swapped == alone
    after = (await client.load(pair.decode))["disaggregation"]["kv_transfer_count_total"]
    assert after - before == len(PROMPTS)


async def test_every_engine_that_can_switch_listens_on_a_bootstrap_port_of_its_own(client: Client, trio: Trio, pair: Pair) -> None:
    assert len({pair.prefill.bootstrap_port, pair.decode.bootstrap_port, 0}) == 3
    for engine in pair:
        info = (await client.get(engine, "/server_info")).json
        assert info["disaggregation_bootstrap_port"] == engine.bootstrap_port
        assert info["enable_pd_role_switch"] is True
        assert (info["dtype"], info["tp_size"], info["dp_size"]) == ("float32", 1, 1)
        _, writer = await asyncio.open_connection("127.0.0.1", engine.bootstrap_port)
        writer.close()
    assert trio.decode.bootstrap_port == 0
    assert (await client.get(trio.decode, "/server_info")).json["enable_pd_role_switch"] is False
    with running_engines(launch_engine("unified", extra_args=SWITCH)) as (alone,):
        assert alone.bootstrap_port == 0


async def test_five_flips_back_and_forth_lose_no_page(client: Client, trio: Trio, pair: Pair) -> None:
    prompt = some_prompt(200, 32)
    expected = (await client.post(trio.unified, "/generate", greedy(prompt, 12))).ids
    largest = some_prompt(SMALL_POOL - 24, 33)
    prefill, decode = pair
    for _ in range(5):
        for engine, role in ((prefill, "decode"), (decode, "prefill")):
            assert (await switch(client, engine, role)).status == 200
        prefill, decode = decode, prefill
        assert (await handed_over(client, prefill, decode, prompt)).ids == expected
        await client.wait_free(prefill, decode)
        for engine in pair:
            load = await client.load(engine)
            assert (load["num_used_tokens"], load["max_total_num_tokens"]) == (0, SMALL_POOL)
        await handed_over(client, prefill, decode, largest)  # needs every page but one
        await client.wait_free(prefill, decode)


async def test_the_prefix_cache_is_dropped(client: Client, pair: Pair) -> None:
    async def cached() -> int:
        answer = await handed_over(client, pair.prefill, pair.decode, some_prompt(200, 34))
        await client.wait_free(*pair)
        return int(answer.json["meta_info"]["cached_tokens"])

    assert [await cached(), await cached()] == [0, 192]
    assert (await client.load(pair.prefill))["cache_hit_rate"] > 0
    for role in ("decode", "prefill"):
        assert (await switch(client, pair.prefill, role)).status == 200
        assert (await client.load(pair.prefill))["cache_hit_rate"] == 0
    assert [await cached(), await cached()] == [0, 192]


@pytest.mark.parametrize("flag", [True, False])
async def test_a_former_decode_engine_has_a_prefix_cache_with_the_flag_only(client: Client, trio: Trio, flag: bool) -> None:
    args = (*SWITCH, *(["--disaggregation-decode-enable-radix-cache"] if flag else []))
    prompt = some_prompt(200, 35)
    expected = (await client.post(trio.unified, "/generate", greedy(prompt, 6))).ids
    with running_engines(launch_engine("decode", extra_args=args)) as (engine,):
        for _ in range(2):  # with the flag, the second time decode receives what it has cached
            assert (await handed_over(client, trio.prefill, engine, prompt, 6)).ids == expected
        await client.wait_free(engine)
        assert (await switch(client, engine, "prefill")).status == 200
        answers = [await handed_over(client, engine, trio.decode, prompt, 6) for _ in range(2)]
        assert [answer.ids for answer in answers] == [expected] * 2
        assert [answer.json["meta_info"]["cached_tokens"] for answer in answers] == [0, 192 if flag else 0]


# --- refusals ---


async def test_a_switch_is_refused_while_a_request_runs_and_does_not_harm_it(client: Client, trio: Trio, pair: Pair) -> None:
    body = greedy(some_prompt(500, 36), 40)
    expected = (await client.post(trio.unified, "/generate", body)).ids
    await client.faults(pair.prefill, "slow:x20")
    await client.faults(pair.decode, "slow:x5")
    async with asyncio.TaskGroup() as tasks:
        legs = tasks.create_task(client.both(pair.prefill, pair.decode, "/generate", body))
        await client.wait_for(pair.prefill, "", "num_running_reqs", 1)
        for engine, role in ((pair.prefill, "decode"), (pair.decode, "prefill")):
            assert (await refused(client, engine, role, "not idle (1 samples"))["safe_to_restore"] is True
        assert not legs.done()
        await client.wait_for(pair.decode, "", "num_running_reqs", 1)
        await refused(client, pair.decode, "prefill", "not idle (1 samples")
        assert not legs.done()
    first, answer = legs.result()
    assert first.status == 200
    assert answer.ids == expected
    await client.wait_free(*pair)
    assert (await switch(client, pair.prefill, "decode")).status == 200


async def test_a_leg_that_only_waits_is_work(client: Client, pair: Pair) -> None:
    body = {**greedy(some_prompt(9), 4, rid="waiting"), **room_at(pair.prefill)}
    async with asyncio.TaskGroup() as tasks:
        leg = tasks.create_task(client.post(pair.prefill, "/generate", body))
        await client.wait_for(pair.prefill, "disaggregation", "prefill_bootstrap_queue_reqs", 1)
        await refused(client, pair.prefill, "decode", "not idle (1 samples)")
        await client.post(pair.prefill, "/abort_request", {"rid": "waiting"})
    assert leg.result().status == 200


async def test_quarantined_pages_are_work(client: Client, pair: Pair) -> None:
    await client.faults(pair.prefill, "slow:x20")
    body = {**greedy(some_prompt(900, 37), 4, rid="half"), **room_at(pair.prefill)}
    async with asyncio.TaskGroup() as tasks:
        legs = [tasks.create_task(client.post(engine, "/generate", body)) for engine in pair]
        await client.wait_for(pair.prefill, "", "num_running_reqs", 1)
        pair.prefill.process.send_signal(signal.SIGSTOP)
        try:
            await client.post(pair.decode, "/abort_request", {"rid": "half"})
            await legs[1]
            await refused(client, pair.decode, "prefill", "not idle (1 transfers in, 57 pages in quarantine)")
        finally:
            pair.prefill.process.send_signal(signal.SIGCONT)
    await client.wait_free(*pair)
    assert (await switch(client, pair.decode, "prefill")).status == 200


async def test_engines_that_cannot_switch_say_why(client: Client, trio: Trio) -> None:
    assert (await refused(client, trio.prefill, "decode", "--enable-pd-role-switch"))["safe_to_restore"] is True
    await refused(client, trio.unified, "prefill", "--enable-pd-role-switch")
    with running_engines(launch_engine("unified", extra_args=SWITCH)) as (alone,):
        await refused(client, alone, "prefill", "unified")


async def test_the_first_flip_to_decode_demands_the_graph_memory(client: Client, pair: Pair) -> None:
    with running_engines(launch_engine("prefill", extra_args=SWITCH)) as (fresh,):
        assert (await client.post(fresh, "/pd_role_switch", {"new_role": "decode"})).status == 400
        await refused(client, fresh, "decode", "decode_cuda_graph_memory_gb is required", decode_cuda_graph_memory_gb=None)
        await refused(client, fresh, "decode", "non-negative", decode_cuda_graph_memory_gb=-1)
        assert (await switch(client, fresh, "decode", decode_cuda_graph_bs=[1, 2])).status == 200
        for role in ("prefill", "decode"):
            assert (await client.post(fresh, "/pd_role_switch", {"new_role": role})).status == 200
        assert await role_of(client, fresh) == "decode"
    for role in ("prefill", "decode"):  # started as decode: it has its graphs
        assert (await client.post(pair.decode, "/pd_role_switch", {"new_role": role})).status == 200


async def test_odd_roles_and_preparations_change_nothing(client: Client, pair: Pair) -> None:
    for role in ("", "null", "both", "Decode"):
        await refused(client, pair.prefill, role, "allowed are prefill and decode")
    same = await switch(client, pair.prefill, "prefill")
    assert (same.status, same.json["success"], same.json["old_role"]) == (200, True, "prefill")
    ready = await switch(client, pair.prefill, "decode", prepare_only=True)
    expected = {"success": True, "message": "ready", "old_role": "prefill", "new_role": "decode", "safe_to_restore": True}
    assert (ready.status, ready.json) == (200, expected)
    assert await role_of(client, pair.prefill) == "prefill"
    for body in (b"", b"[]", {"new_role": 5}, {"new_role": "decode", "decode_cuda_graph_memory_gb": "much"}):
        assert (await client.post(pair.prefill, "/pd_role_switch", body)).status == 400
    assert await role_of(client, pair.prefill) == "prefill"


# --- stragglers of the old role ---


@pytest.mark.parametrize("host", ["127.0.0.1", "2@127.0.0.1", "localhost"])
async def test_a_prefill_leg_that_comes_after_the_flip_to_decode_is_a_400(client: Client, pair: Pair, host: str) -> None:
    assert (await switch(client, pair.prefill, "decode")).status == 200
    body = {**greedy(some_prompt(40), 4), **room_at(pair.prefill), "bootstrap_host": host}
    answer = await client.post(pair.prefill, "/generate", body)
    assert answer.status == 400, answer.raw
    assert "is a decode engine now" in answer.json["error"]["message"]
    streamed = await client.post(pair.prefill, "/generate", {**body, **room_at(pair.prefill), "stream": True})
    assert streamed.status == 400  # seen before the head of the stream goes out, as the address is written in numbers
    await client.wait_free(pair.prefill)


async def test_a_decode_engine_that_comes_after_the_flip_is_told_at_once(client: Client, pair: Pair) -> None:
    assert (await switch(client, pair.prefill, "decode")).status == 200
    answer = await client.post(pair.decode, "/generate", {**greedy(some_prompt(40), 4), **room_at(pair.prefill)})
    assert answer.status == 500
    assert "is a decode engine now" in answer.json["error"]["message"]


async def test_a_decode_engine_that_waits_is_told_at_the_flip(client: Client, pair: Pair) -> None:
    """A connection without a request is no work of this engine; it may not wait for one that can never come either."""
    room = room_at(pair.prefill)
    async with asyncio.TaskGroup() as tasks:
        leg = tasks.create_task(client.post(pair.decode, "/generate", {**greedy(some_prompt(40), 4), **room}))
        await client.wait_for(pair.decode, "disaggregation", "decode_transfer_queue_reqs", 1)
        assert (await switch(client, pair.prefill, "decode")).status == 200
    answer = leg.result()
    assert answer.status == 500
    assert "becomes a decode engine" in answer.json["error"]["message"] or "is a decode engine now" in answer.json["error"]["message"]


# --- faults ---


async def test_a_switch_that_breaks_on_purpose(client: Client, pair: Pair) -> None:
    await client.faults(pair.prefill, "refuse-switch")
    for role in ("decode", "prefill"):
        assert (await refused(client, pair.prefill, role, "restart required"))["safe_to_restore"] is False
    await client.faults(pair.prefill, "none")
    assert (await switch(client, pair.prefill, "decode")).status == 200


async def test_an_engine_that_hangs_does_not_answer_and_keeps_its_role(client: Client) -> None:
    with running_engines(launch_engine("prefill", faults="hang@accept", extra_args=SWITCH)) as (engine,):
        body = json.dumps({**greedy(some_prompt(9), 4, rid="x"), **room_at(engine)}).encode()
        async with asyncio.TaskGroup() as tasks:
            leg = tasks.create_task(client.post(engine, "/generate", body))
            await client.wait_for(engine, "disaggregation", "prefill_bootstrap_queue_reqs", 1)
            asking = tasks.create_task(switch(client, engine, "decode"))
            done, _ = await asyncio.wait([asking], timeout=0.3)
            assert not done
            assert await role_of(client, engine) == "prefill"
            asking.cancel()
            leg.cancel()
        engine.kill()


# --- the decision alone ---


@pytest.mark.parametrize(
    ("body", "situation", "sentence", "safe"),
    [
        (SwitchBody("decode", 0), Situation(enabled=False, role="prefill"), "--enable-pd-role-switch", True),
        (SwitchBody("prefill"), Situation(enabled=True, role="null"), "unified", True),
        (SwitchBody("prefill"), Situation(enabled=True, role="decode", busy="2 samples"), "(2 samples)", True),
        (SwitchBody("decode"), Situation(enabled=True, role="prefill", busy="2 samples"), "(2 samples)", True),
        (SwitchBody("decode"), Situation(enabled=True, role="prefill"), "decode_cuda_graph_memory_gb", True),
        (SwitchBody("decode", prepare_only=True), Situation(enabled=True, role="prefill"), "decode_cuda_graph_memory_gb", True),
        (SwitchBody("decode", 0), Situation(enabled=True, role="prefill", broken=True), "restart required", False),
        (SwitchBody("x" * 9999), Situation(enabled=True, role="prefill"), "x" * 32 + "'", True),
    ],
)
def test_refusals_in_sglangs_order(body: SwitchBody, situation: Situation, sentence: str, safe: bool) -> None:
    answer = judge(body, situation)
    assert (answer.success, answer.safe_to_restore) == (False, safe)
    assert sentence in answer.message
    assert not flips(body, answer)


@pytest.mark.parametrize(
    ("body", "situation", "does"),
    [
        (SwitchBody("decode", 0), Situation(enabled=True, role="prefill"), True),
        (SwitchBody("decode"), Situation(enabled=True, role="prefill", decoded_before=True), True),
        (SwitchBody("prefill"), Situation(enabled=True, role="decode", decoded_before=True), True),
        (SwitchBody("decode"), Situation(enabled=True, role="decode", busy="2 samples"), False),
        (SwitchBody("decode", 0, prepare_only=True), Situation(enabled=True, role="prefill"), False),
    ],
)
def test_what_is_done(body: SwitchBody, situation: Situation, does: bool) -> None:
    answer = judge(body, situation)
    assert answer.success
    assert flips(body, answer) is does


@pytest.mark.parametrize(
    ("host", "bound", "here"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("[::1]", "::1", True),
        ("127.0.0.2", "127.0.0.1", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("192.0.2.1", "0.0.0.0", False),
        ("localhost", "127.0.0.1", False),
    ],
)
def test_whose_address_it_is(host: str, bound: str, here: bool) -> None:
    assert leads_to(host, bound) is here
