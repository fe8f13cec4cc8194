"""Work on engines that no entry of the router's explains: found, aborted, and an engine that does not let go of it is started anew.

Each defence is also left out once, to see that the engine would keep such work for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from disagg.cluster import orphans
from disagg.cluster.controller import Controller
from disagg.cluster.reaper import Entries, Reaper
from disagg.config import ClusterSection, Config, ObserveSection, RouterSection
from disagg.observe.log import make_logger
from disagg.server import Router, router_running
from tests import canaries
from tests.serve.conftest import Site, is_engine, wait_for

pytestmark = pytest.mark.slow

SLOW = ("--engine-arg=--paced", "--engine-arg=1,0;60,0")
DEAF = "--engine-arg=--faults=ignore-abort"
CLINGING = "--engine-arg=--faults=ignore-gone"
"""As SGLang's whole answers do for seconds: what it works for is not ended by a closed connection."""
GONE_S = 5.0
"""Of F08, from the moment that the new router is ready."""
ENOUGH = 900
"""Tokens that take a slow engine the best part of a minute."""


class Direct:
    """An engine, asked behind the router's back."""

    def __init__(self, site: Site, name: str) -> None:
        launch = json.loads((site.folder / name / "engines" / name / "launch.json").read_bytes())
        self.url = site.engine(name)["url"]
        self.headers = {"Authorization": f"Bearer {launch['api_key']}"}

    def load(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx2.get(self.url + "/v1/loads", headers=self.headers).json()["loads"][0]
        return found

    def at_work(self) -> int:
        load = self.load()
        return int(load["num_running_reqs"] + load["num_waiting_reqs"])

    def generate(self, tokens: int) -> httpx2.Response:
        body = {"text": "nobody sent this", "rid": "f" * 32, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
        return httpx2.post(self.url + "/generate", json=body, headers=self.headers, timeout=120)


@contextlib.contextmanager
def stranger(engine: Direct) -> Iterator[Callable[[], httpx2.Response]]:
    """Has an engine work for somebody whom the router does not know; yields how to wait for the answer."""
    with ThreadPoolExecutor(1) as pool:
        before = engine.at_work()
        asked = pool.submit(engine.generate, ENOUGH)
        wait_for(lambda: engine.at_work() > before or asked.done(), "the engine does not take it")
        yield lambda: asked.result(60.0)
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.post(engine.url + "/abort_request", json={"abort_all": True}, headers=engine.headers)
            asked.result(60.0)


def one_unified(site: Site, *faults: str) -> Direct:
    site.start_host("u", "unified", *SLOW, *faults)
    site.wait_engine("u", "ready")
    wait_for(lambda: canaries.are_over(site.admin), "canaries are not over")
    return Direct(site, "u")


def kv(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(site.run("kv", "ls", "--json").stdout)
    return found


def test_a_strangers_work_is_aborted_and_told_of(site: Site) -> None:
    engine = one_unified(site)
    pid = site.engine("u")["pid"]
    with stranger(engine) as answer:
        took_s = wait_for(lambda: engine.at_work() == 0, lambda: json.dumps(kv(site)))
        assert answer().json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert took_s < 10.0, "five seconds without an entry, and a busy machine"
    wait_for(lambda: kv(site)["reaped"] == 1, lambda: json.dumps(kv(site)))
    assert site.engine("u")["pid"] == pid
    assert site.ask().status_code == 200
    assert site.router is not None
    lines = [json.loads(line) for line in site.router.said().splitlines() if '"orphans"' in line]
    assert [(line["engine"], line["requests"]) for line in lines] == [("u", 1)]
    assert lines[0]["tokens"] > 0
    assert b'disagg_kv_orphans_total{action="abort_all"} 1.0' in httpx2.get(site.admin + "/metrics").content


def test_a_person_need_not_wait_and_our_own_work_is_left_alone(site: Site) -> None:
    engine = one_unified(site)
    assert "nothing: an entry explains every request" in site.run("kv", "reap").stdout
    fields = {"stream": True, "max_tokens": 60, "ignore_eos": True, "temperature": 0, "messages": [{"role": "user", "content": "go on"}]}
    with httpx2.stream("POST", site.url + "/v1/chat/completions", json={"model": "demo", **fields}, timeout=60) as stream:
        wait_for(lambda: len(kv(site)["holds"]) == 1, lambda: json.dumps(kv(site)))
        (hold,) = kv(site)["holds"]
        assert (hold["request"], hold["engine"], hold["leg"]) == (stream.headers["x-request-id"], "u", "unified")
        assert (hold["phase"], hold["age_s"] > 0, len(hold["rids"])) == ("decoding", True, 1)
        with stranger(engine) as answer:
            assert "aborted" not in site.run("kv", "reap", "u").stdout
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
            assert lines[-1] == "data: [DONE]", "ours was not ended with the stranger's"
            assert len(lines) > 60
            wait_for(lambda: "everything on u is aborted" in site.run("kv", "reap", "u").stdout, "the reap does nothing")
            assert answer().json()["meta_info"]["finish_reason"]["type"] == "abort"
    table = site.run("kv", "ls").stdout
    assert "ENGINE  CAPACITY  USED" in table
    assert "Holds: 0." in table
    done = site.run("kv", "reap", "nobody")
    assert (done.returncode, "there is no engine 'nobody'; there is u" in done.stderr) == (1, True)


def crash_under_load(site: Site) -> list[Direct]:
    """Kills the router under streams and whole answers on engines that do not notice; returns the decode engines, at work."""
    site.start_host("p", "prefill")
    site.start_host("d", "decode", *SLOW, CLINGING)
    for name in ("p", "d"):
        site.wait_engine(name, "ready")
    wait_for(lambda: canaries.are_over(site.admin), "canaries are not over")
    engines = [Direct(site, name) for name in ("p", "d")]
    threads = [threading.Thread(target=ask_in_vain, args=(site, number % 2 == 0)) for number in range(12)]
    for thread in threads:
        thread.start()
    wait_for(lambda: engines[1].load()["num_running_reqs"] == len(threads), lambda: json.dumps(engines[1].load()))
    assert site.router is not None
    site.router.end(signal.SIGKILL)
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()
    assert engines[1].at_work() == len(threads), "the engine goes on for nobody: without that this would prove nothing"
    return engines


def ask_in_vain(site: Site, stream: bool) -> None:
    with contextlib.suppress(httpx2.TransportError):
        site.ask(max_tokens=ENOUGH, ignore_eos=True, stream=stream)


def test_f08_what_a_killed_router_left_behind_is_gone_soon_after_the_next_one_is_ready(site: Site) -> None:
    prefill, decode = crash_under_load(site)
    pids = set(site.engine_pids)
    site.start_router()
    wait_for(lambda: site.answers("/readyz"), lambda: json.dumps(site.cluster()))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(site.ask, max_tokens=150, ignore_eos=True)  # nine seconds: the engine is not quiet again within the bound
        took_s = wait_for(lambda: prefill.at_work() + decode.at_work() <= 1, lambda: json.dumps(kv(site)))
        assert not first.done()
        assert took_s <= GONE_S
        assert first.result(60.0).json()["choices"][0]["finish_reason"] == "length", "who comes at once is not swept away with them"
    wait_for(lambda: prefill.at_work() + decode.at_work() == 0, lambda: json.dumps(kv(site)))
    assert decode.load()["num_used_tokens"] == prefill.load()["num_used_tokens"] == 0
    assert site.ask().status_code == 200
    assert {e["pid"] for e in site.cluster()["engines"]} == pids, "engines keep their processes"


@contextlib.asynccontextmanager
async def router_here(site: Site) -> AsyncIterator[Router]:
    """The site's router in this process, where a test can leave out a part of it; hosts join it as any other."""
    section = RouterSection(http=f"127.0.0.1:{site.http}", admin=f"127.0.0.1:{site.admin_port}", control=f"127.0.0.1:{site.control}")
    config = Config(router=section, cluster=ClusterSection(drain_timeout_s=1.0), observe=ObserveSection(log_level="error"))
    log = make_logger("error", "text")
    async with router_running(config, [], log, root=site.folder / "router", say=lambda _: None) as router:
        yield router
        await asyncio.to_thread(site.cluster)  # remember the pids


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Site]:
    """A place for a router in this process."""
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.close()


async def test_without_the_reaper_they_are_still_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_away(self: Controller, entries: Entries) -> Reaper:
        return Reaper(table=self, entries=entries, prober=self._prober, spawn=self._spawn)

    _, decode = await asyncio.to_thread(crash_under_load, site)
    monkeypatch.setattr(Controller, "watch_for_orphans", look_away)
    async with router_here(site) as router:
        async with asyncio.timeout(30):
            await router.controller.wait_ready()
        await asyncio.sleep(GONE_S)
        assert await asyncio.to_thread(decode.at_work) >= 12
    httpx2.post(decode.url + "/abort_request", json={"abort_all": True}, headers=decode.headers)


async def two_unified(site: Site, *names: str) -> Direct:
    """The first one of them does not hear aborts."""
    for name in names:
        faults = (DEAF,) if name == names[0] else ()
        await asyncio.to_thread(site.start_host, name, "unified", *SLOW, *faults)
    for name in names:
        await asyncio.to_thread(site.wait_engine, name, "ready")
    await asyncio.to_thread(wait_for, lambda: canaries.are_over(site.admin), "canaries are not over")
    return await asyncio.to_thread(Direct, site, names[0])


async def test_an_engine_that_no_abort_helps_is_drained_and_started_anew(empty: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "STAYS_S", 1.0)
    site = empty
    async with router_here(site) as router:
        engine = await two_unified(site, "u", "u2")
        pid = (await asyncio.to_thread(site.engine, "u"))["pid"]
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(engine.generate, ENOUGH)
            await asyncio.to_thread(wait_for, lambda: not is_engine(pid), lambda: json.dumps(kv(site)), 60.0)
            assert isinstance(asked.exception(20.0), httpx2.TransportError), "it ended with its engine"
        await asyncio.to_thread(wait_for, lambda: kv(site)["reaped"] == 1, lambda: json.dumps(kv(site)))
        after = await asyncio.to_thread(site.wait_engine, "u", "ready")
        assert after["pid"] not in {pid, None}
        (change,) = router.controller.changes.values()
        steps = [what for _, what in change.steps]
        assert steps[0].startswith("draining: it holds KV pages for 1 requests that nobody sent")
        assert steps[-1] == "it serves again as unified"
        assert (await asyncio.to_thread(site.ask)).status_code == 200


async def test_the_last_engine_of_a_pool_goes_on_and_says_why(empty: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "STAYS_S", 1.0)
    monkeypatch.setattr(orphans, "RETRY_S", 1.0)
    site = empty
    async with router_here(site) as router:
        engine = await two_unified(site, "u")
        pid = (await asyncio.to_thread(site.engine, "u"))["pid"]
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(engine.generate, 400)
            reaper = router.controller.reaper
            assert reaper is not None
            await asyncio.to_thread(wait_for, lambda: reaper.actions["restart_refused"] >= 2, lambda: repr(reaper.actions))
            (account,) = (await asyncio.to_thread(kv, site))["engines"]
            assert account["orphan_tokens"] > 0
            assert "but it is the last unified engine of its pool that serves" in account["note"]
            assert "it is the last unified engine" in (await asyncio.to_thread(site.run, "kv", "ls")).stdout
            assert (await asyncio.to_thread(site.ask)).status_code == 200, "it goes on serving"
            assert not router.controller.changes
            assert asked.result(60.0).status_code == 200
        assert (await asyncio.to_thread(site.engine, "u"))["pid"] == pid
