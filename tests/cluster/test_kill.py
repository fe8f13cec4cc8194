"""kill -9 of an engine in any phase: the client hears what it would have heard without, and the survivor holds nothing soon after."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from tests.cluster.conftest import Cluster, holds_nothing, load_of, running_cluster
from tests.cluster.prompts import prompt_ids

pytestmark = pytest.mark.slow

BOUND_S = 2.0
ANSWER_LIMIT_S = 30.0
RESTART_LIMIT_S = 30.0
TOKENS = 24
# Steps that last as long as a big model's, so that each phase can be met: 30 ms a step, and 0.2 ms a prompt token.
PACED = ("--engine-arg=--paced", "--engine-arg=30,0.2;30,0")
PROMPT = 3000
_SEEDS = itertools.count(1)


async def until(condition: Any, limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await condition():  # noqa: ASYNC110  # what is waited for happens in other processes
            await asyncio.sleep(0.01)


async def ask(session: aiohttp.ClientSession, cluster: Cluster, *, stream: bool, seed: int) -> tuple[int, Mapping[str, str], bytes]:
    body = {
        "input_ids": prompt_ids(PROMPT, seed),
        "sampling_params": {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True},
        "stream": stream,
    }
    async with session.post(cluster.url + "/generate", json=body) as response:
        return response.status, response.headers, await response.read()


def told(body: bytes, *, stream: bool) -> dict[str, Any]:
    """What a native answer says in the end; times, ids and what was cached differ from run to run and are left out."""
    if stream:
        *events, done = body.decode().removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]", done
        body = events[-1].removeprefix("data: ").encode()
    answer = msgspec.json.decode(body)
    assert "error" not in answer, answer
    info = answer["meta_info"]
    same = {key: info[key] for key in ("finish_reason", "prompt_tokens", "completion_tokens")}
    return {"text": answer["text"], "ids": answer["output_ids"], **same}


# --- engines that are killed


@pytest.fixture(scope="module")
def six() -> Iterator[Cluster]:
    """Three prefill and three decode engines, which take turns: one that died five times in a short time would not be started again."""
    with running_cluster(*PACED, "--prefill", "3", "--decode", "3", "--log-level", "error") as cluster:
        yield cluster


async def all_idle(session: aiohttp.ClientSession, cluster: Cluster) -> None:
    """Every engine serves, and none works for anybody."""

    async def settled() -> bool:
        engines = await asyncio.to_thread(cluster.engines)
        if any(e["state"] != "ready" for e in engines):
            return False
        try:
            return all([holds_nothing(await load_of(session, e)) for e in engines])
        except aiohttp.ClientError:
            return False  # it was shown as ready, but it is the one that was killed

    await until(settled, RESTART_LIMIT_S)
    await asyncio.to_thread(cluster.wait_proved)
    await until(settled, RESTART_LIMIT_S)


def is_in(phase: str, prefill: Mapping[str, Any] | None, decode: Mapping[str, Any] | None) -> bool:
    """Whether the one request there is is in this phase, by what its engines say; None for one that does nothing."""
    if phase == "decode":
        return decode is not None and bool(decode["num_running_reqs"])
    if prefill is None or decode is None:
        return False
    if phase == "transfer":  # the first pages are computed and on their way while others are still being computed
        return bool(decode["decode_transfer_queue_reqs"] and prefill["prefilled"])
    return bool(prefill["num_running_reqs"] or prefill["num_used_tokens"])


class Watched:
    """Engines that were idle when the watch began."""

    def __init__(
        self, session: aiohttp.ClientSession, cluster: Cluster, engines: list[dict[str, Any]], before: list[dict[str, Any]]
    ) -> None:
        self._session = session
        self._cluster = cluster
        self._engines = engines
        self._before = before

    @classmethod
    async def idle(cls, session: aiohttp.ClientSession, cluster: Cluster) -> Watched:
        await all_idle(session, cluster)
        engines = await asyncio.to_thread(cluster.engines)
        return cls(session, cluster, engines, [await load_of(session, e) for e in engines])

    async def _of_the_request(self) -> set[str]:
        """The engines that the router says are at work for it. A canary may be under way on others: its prompt is small."""
        async with self._session.get(self._cluster.admin + "/admin/kv") as response:
            return {hold["engine"] for hold in (await response.json())["holds"] if hold["tokens"] >= PROMPT}

    async def until_in(self, phase: str) -> dict[str, dict[str, Any]]:
        """Waits until the one request there is is in this phase. Returns its two engines by role."""
        pair: dict[str, dict[str, Any]] = {}
        async with asyncio.timeout(10):
            while True:
                loads = {}
                its_own = await self._of_the_request()
                now = await asyncio.gather(*(load_of(self._session, e) for e in self._engines))
                for engine, load, idle in zip(self._engines, now, self._before, strict=True):
                    load["prefilled"] = load["total_prefill_uncached_tokens"] - idle["total_prefill_uncached_tokens"]
                    queued = load["decode_prealloc_queue_reqs"] + load["decode_transfer_queue_reqs"] + load["prefill_inflight_queue_reqs"]
                    if engine["id"] in its_own and (queued or not holds_nothing(load)):
                        loads[engine["role"]] = load
                        pair[engine["role"]] = engine
                if len(pair) == 2 and is_in(phase, loads.get("prefill"), loads.get("decode")):
                    return pair
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "transfer", "decode"])
@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_kill(session: aiohttp.ClientSession, six: Cluster, victim: str, phase: str, stream: bool) -> None:
    watched = await Watched.idle(session, six)
    seed = next(_SEEDS)  # a prompt of its own: nothing of it is cached, so its prefill lasts
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(ask(session, six, stream=stream, seed=seed))
        pair = await watched.until_in(phase)
        assert not asking.done()
        os.kill(pair[victim]["pid"], signal.SIGKILL)
        harmless = victim == "prefill" and phase == "decode"
        async with asyncio.timeout(ANSWER_LIMIT_S):
            status, headers, body = await asking
    assert status == 200, body
    if not stream and not harmless:
        assert headers["x-disagg-attempts"] != "1"
    _, _, uncut = await ask(session, six, stream=stream, seed=seed)
    assert told(body, stream=stream) == told(uncut, stream=stream)
    assert len(told(body, stream=stream)["ids"]) == TOKENS


# --- the official client

STORY: list[Any] = [{"role": "user", "content": "Tell a story about a fox and a lantern."}]


def story(client: openai.OpenAI, on_text: Any = None, **more: Any) -> tuple[str, list[str], Any, Any]:
    """A chat stream: its text, its roles, its finish reason, its usage."""
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=STORY, stream=True, stream_options={"include_usage": True}, **more
    )
    text, roles, finish, usage = "", [], None, None
    for chunk in raw.parse():
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finish = choice.finish_reason or finish
            if on_text is not None:
                on_text(text, raw.headers)
    assert usage is not None
    return text, roles, finish, (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)


@pytest.mark.parametrize(
    "more",
    [{"temperature": 0}, {"temperature": 1, "seed": 7, "max_tokens": 40, "extra_body": {"ignore_eos": True}}],
    ids=["greedy", "seeded"],
)
async def test_the_official_client_hears_the_same_story_though_its_engine_is_killed(
    session: aiohttp.ClientSession, six: Cluster, more: dict[str, Any]
) -> None:
    await all_idle(session, six)
    pids = {e["id"]: e["pid"] for e in await asyncio.to_thread(six.engines)}
    killed: list[str] = []

    def kill(text: str, headers: Any) -> None:
        if len(text) > 24 and not killed:
            killed.append(headers["x-disagg-decode"])
            os.kill(pids[killed[0]], signal.SIGKILL)

    with openai.OpenAI(base_url=six.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        uncut = await asyncio.to_thread(story, client, **more)
        told_through = await asyncio.to_thread(story, client, kill, **more)
    assert killed
    assert told_through == uncut
    assert told_through[1] == ["assistant"]


# --- clients that leave


@pytest.fixture(scope="module")
def paced_pair() -> Iterator[Cluster]:
    """One prefill and one decode engine; nobody may harm it."""
    with running_cluster(*PACED, "--log-level", "error") as cluster:
        yield cluster


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_frees_both_engines_within_a_second(
    session: aiohttp.ClientSession, paced_pair: Cluster, phase: str, stream: bool
) -> None:
    watched = await Watched.idle(session, paced_pair)
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(ask(session, paced_pair, stream=stream, seed=next(_SEEDS)))
        pair = await watched.until_in(phase)
        asking.cancel()

    async def free() -> bool:
        return all([holds_nothing(await load_of(session, e)) for e in pair.values()])

    await until(free, 1.0)
