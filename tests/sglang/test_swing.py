"""Real engines follow a load that swings from long answers to long prompts: the router moves them by itself, nothing is lost, and each
answer is the one that the unified engine gives."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import httpx2
import msgspec
import pytest

from tests.serve.conftest import wait_for
from tests.sglang.conftest import BACK_LIMIT_S, ENGINE, FEW_PLACES, PLACES, PLAIN_JSON, START_LIMIT_S, Cluster, text_of

SPEED = 10.0
FLAGS = ("--measure-at-start", "--flips", "auto", "--policy-speed", f"{SPEED:g}", "--ttft-s", "30", "--queue-timeout-s", "30")
"""Clients wait for their answer before they ask again, so nobody need be sent away."""
PHASE_LIMIT_S = 180.0
ASKED_LIMIT = 600
AFTERWARDS = 24
"""Answers that must come when the engine has moved, and from it."""
RETRIES = 3
AT_ONCE = PLACES


class Phase(NamedTuple):
    """A load, and the ready engines of each kind with which it is over.

    Attributes:
        prompt, answer: tokens.
        clients: who ask at the same time, each one request after the other.
        ratio: prefill and decode engines that it should come to.
    """

    name: str
    prompt: int
    answer: int
    clients: int
    ratio: tuple[int, int]


PHASES = (Phase("long answers", 40, 192, PLACES + 4, (1, 2)), Phase("long prompts", 600, 2, 6, (2, 1)))
"""The engines share the cores: where decode keeps these busy a prompt takes several times as long. So answers must be long enough that one
prefill engine is plenty all the same."""


@dataclass
class Seen:
    """What clients and the router's status said.

    Attributes:
        answers: token ids, by phase and number.
        lost: any outcome that is no answer.
        shed: 503s that said when to come again; their clients did.
        served: answers by phase and decode engine.
        moved_s: how long each phase went on until its ratio was reached; None where it was not.
        said: what the router said of its moves, in order.
    """

    answers: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    shed: int = 0
    served: Counter[tuple[int, str]] = field(default_factory=Counter)
    moved_s: list[float | None] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def body(which: int, number: int, *, stream: bool) -> dict[str, Any]:
    """Of no two requests are the prompts the same: what a cache holds helps nobody."""
    phase = PHASES[which]
    sampling = {"temperature": 0, "max_new_tokens": phase.answer, "ignore_eos": True}
    return {"input_ids": text_of(phase.prompt, 1_000_000 * (which + 1) + number), "sampling_params": sampling, "stream": stream}


async def ask(session: aiohttp.ClientSession, url: str, which: int, number: int, seen: Seen) -> None:
    """One stream. Comes again when it is told to, as the official client does."""
    for _ in range(RETRIES):
        try:
            async with session.post(url + "/generate", json=body(which, number, stream=True)) as response:
                text = await response.text()
                status, retry = response.status, response.headers.get("Retry-After")
                decode = response.headers.get("x-disagg-decode", "")
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.lost.append(f"{which}, {number}: {error!r}")
            return
        if status != 503 or retry is None:
            break
        seen.shed += 1
        await asyncio.sleep(float(retry))
    if status != 200 or not text.endswith("data: [DONE]\n\n"):
        seen.lost.append(f"{which}, {number}: {status} {text[-300:]}")
        return
    last = text.split("\n\n")[-3]
    seen.answers[which, number] = msgspec.json.decode(last.removeprefix("data: ")).get("output_ids")
    seen.served[which, decode] += 1


async def run_phase(session: aiohttp.ClientSession, cluster: Cluster, which: int, seen: Seen) -> None:
    """Clients ask, each one request after the other, until the ratio is what it should be and has served, or it has taken too long."""
    began, over, numbers = time.monotonic(), asyncio.Event(), iter(range(ASKED_LIMIT))
    moved_s: float | None = None

    async def client() -> None:
        for number in numbers:
            await ask(session, cluster.url, which, number, seen)
            if over.is_set():
                return

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client()) for _ in range(PHASES[which].clients)]
        enough = ASKED_LIMIT
        while time.monotonic() - began < PHASE_LIMIT_S and not all(c.done() for c in clients):
            ratio = await look(session, cluster.admin, seen)
            answered = sum(n for (phase, _), n in seen.served.items() if phase == which)
            if moved_s is None and ratio == PHASES[which].ratio:
                moved_s, enough = time.monotonic() - began, answered + AFTERWARDS
            if answered >= enough:
                break
            await asyncio.sleep(0.25)
        over.set()
    seen.moved_s.append(moved_s)


async def look(session: aiohttp.ClientSession, admin: str, seen: Seen) -> tuple[int, int]:
    """Notes what the router says of its moves; returns the prefill and decode engines that are ready."""
    async with session.get(admin + "/admin/cluster") as response:
        found = await response.json()
    seen.said += [what for row in found["ratio"] for _, what in reversed(row["history"]) if what not in seen.said]
    roles = Counter(e["role"] for e in found["engines"] if e["state"] == "ready")
    return roles["prefill"], roles["decode"]


async def swing(cluster: Cluster) -> Seen:
    seen = Seen()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        for which in range(len(PHASES)):
            await run_phase(session, cluster, which, seen)
    return seen


async def answers_of_unified(cluster: Cluster, asked: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """What the unified engine says to the same requests."""
    turns = asyncio.Semaphore(AT_ONCE)
    found: dict[tuple[int, int], list[int]] = {}

    async def one(which: int, number: int) -> None:
        async with turns, session.post(cluster.url + "/generate", json=body(which, number, stream=False)) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-disagg-decode"] == "u"
            found[which, number] = (await response.json())["output_ids"]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session, asyncio.TaskGroup() as group:
        for which, number in asked:
            group.create_task(one(which, number))
    return found


def restart_router(cluster: Cluster, *flags: str) -> None:
    """The engines stay; what the router has learnt of them is forgotten."""
    assert cluster.router is not None
    assert cluster.router.end() == 0
    cluster.start_router(*flags)
    for name in cluster.hosts:
        cluster.wait_engine(name, "ready", BACK_LIMIT_S)


def changes_of(cluster: Cluster) -> list[dict[str, Any]]:
    """All that this router was ordered or has decided, when they are over."""

    def look() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while (answer := httpx2.get(f"{cluster.admin}/admin/changes/{len(found) + 1}", timeout=10)).status_code == 200:
            found.append(answer.json())
        return found

    wait_for(lambda: all(c["phase"] in {"done", "failed"} for c in look()), lambda: str(look()), limit_s=BACK_LIMIT_S)
    return look()


def wait_measured(cluster: Cluster, engines: int) -> None:
    """The router has had so many engines read or write, because it knew nothing of them."""

    def known() -> int:
        rows = [e for e in httpx2.get(cluster.admin + "/admin/cluster", timeout=10).json()["engines"] if e["role"] != "unified"]
        if any(row.get("measuring") for row in rows):
            return 0
        return sum(row["forecast"][{"prefill": "reads", "decode": "steps"}[row["role"]]]["samples"] > 0 for row in rows)

    wait_for(lambda: known() >= engines, lambda: f"{known()} of {engines} engines were measured", limit_s=BACK_LIMIT_S)


def give_back(cluster: Cluster) -> None:
    """The roles of before, and no third engine."""
    restart_router(cluster)
    for name, role in (("d", "decode"), ("p", "prefill")):
        if cluster.engine(name)["role"] != role:
            number = cluster.order("flip", name, role=role)["change"]
            wait_for(lambda n=number: cluster.change(n)["phase"] in {"done", "failed"}, limit_s=BACK_LIMIT_S)  # type: ignore[misc]
    cluster.hosts.pop("q").end()
    assert cluster.run("hosts", "revoke", "q").returncode == 0


@pytest.fixture(scope="module")
def swung(cluster: Cluster) -> tuple[Seen, list[dict[str, Any]]]:
    """One more prefill engine, a router in a hurry, and the load."""
    cluster.start_host("q", "prefill", *ENGINE, *PLAIN_JSON, *FEW_PLACES)
    cluster.wait_engine("q", "ready", START_LIMIT_S)
    restart_router(cluster, *FLAGS)
    try:
        with cluster.without("u"):
            wait_measured(cluster, 3)
            seen = asyncio.run(swing(cluster))
        changes = changes_of(cluster)
    finally:
        give_back(cluster)
    return seen, changes


def test_engines_are_moved_there_and_back(cluster: Cluster, swung: Any) -> None:
    seen, changes = swung
    assert cluster.router is not None
    ratio = [line for line in cluster.router.said().splitlines() if '"ratio"' in line]
    assert None not in seen.moved_s, "\n".join([*seen.said, *ratio[-20:]])
    assert len(changes) >= 2
    assert {c["role"] for c in changes} == {"prefill", "decode"}
    assert all(c["phase"] == "done" and "the load wants it: " in c["steps"][0]["what"] for c in changes), changes
    print(f"\nmoved after {seen.moved_s} s of their phase; {seen.said}")  # noqa: T201


def test_no_request_is_lost(swung: Any) -> None:
    seen, _ = swung
    assert seen.lost == []
    print(f"\n{len(seen.answers)} answers, {dict(seen.served)}, {seen.shed} sent away for a while")  # noqa: T201


def test_the_engine_that_was_moved_has_served(swung: Any) -> None:
    seen, changes = swung
    moved = next(c["engine"] for c in changes if c["role"] == "decode")
    assert seen.served[0, moved] > 0


def test_each_answer_is_that_of_the_unified_engine(cluster: Cluster, swung: Any) -> None:
    seen, _ = swung
    with cluster.without("p", "d"):
        right = asyncio.run(answers_of_unified(cluster, sorted(seen.answers)))
    wrong = {which: (ids, right[which]) for which, ids in seen.answers.items() if ids != right[which]}
    assert not wrong, f"{len(wrong)} of {len(right)}: {dict(list(wrong.items())[:3])}"
    assert len({tuple(ids) for ids in right.values()}) > len(right) / 4
