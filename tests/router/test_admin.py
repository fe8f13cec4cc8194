"""What the admin listener shows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from disagg.cluster import orphans
from tests.fake_engine import Call, answer_well, until
from tests.router.conftest import CHAT, Rig, running_rig
from tests.router.test_lost import relay_of


async def test_the_cluster_is_shown_as_the_contract_says(rig: Rig) -> None:
    async with await rig.session.get(rig.admin + "/admin/cluster") as response:
        cluster = await response.json()
    engines = {e["id"]: e for e in cluster["engines"]}
    assert set(engines) == {"prefill-0", "decode-0"}
    engine = engines["decode-0"]
    assert set(engine) == {"id", "host", "role", "state", "model", "url", "pid", "load", "reason", "forecast"}
    assert (engine["role"], engine["state"], engine["model"]) == ("decode", "ready", "fake")
    assert set(engine["load"]) == {"running", "waiting", "kv_used_tokens", "kv_total_tokens", "kv_quarantined_tokens"}
    assert engine["load"]["kv_total_tokens"] == 16384


async def test_an_engine_that_reads_has_its_line_and_its_links_told(rig: Rig) -> None:
    async with await rig.post({**CHAT, "stream": True}) as response:
        await response.read()
    forecast = relay_of(rig).admission.books.forecast
    forecast.tick(relay_of(rig).clock() + 0.5)  # the pass is over, and its link judged
    async with await rig.session.get(rig.admin + "/admin/cluster") as response:
        told = {e["id"]: e["forecast"] for e in (await response.json())["engines"]}
    assert set(told["prefill-0"]) == {"backlog_s", "reads", "links"}
    assert told["prefill-0"]["reads"]["samples"] == 1
    assert "another machine" in told["prefill-0"]["reads"]["doubt"]
    assert told["prefill-0"]["links"] == {"decode-0": {"rtt_s": 0.0, "token_s": 0.0}}, "the only one is the fastest"
    assert set(told["decode-0"]) == {"backlog_s", "steps"}


async def test_an_engine_that_says_it_does_nothing_while_it_writes_is_distrusted_for_all_to_see(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg.policy.reports.SILENT_S", 0.0)

    async def distrusted() -> bool:
        async with await rig.session.get(rig.admin + "/admin/cluster") as response:
            rows = {e["id"]: e.get("distrusted") for e in (await response.json())["engines"]}
        return rows == {
            "prefill-0": None,
            "decode-0": ["its load reports contradict what was sent there: it writes answers and says that it has nothing to do"],
        }

    assert not await distrusted()
    relay_of(rig).admission.books.forecast.began(1, 100)
    async with asyncio.timeout(20.0):
        while not await distrusted():  # noqa: ASYNC110  # the router looks a few times a second
            await asyncio.sleep(0.02)


async def test_who_is_sent_away_is_counted_and_told_in_one_line_for_many() -> None:
    told = structlog.testing.CapturingLogger()
    async with running_rig(
        wait=False, queue_timeout_s=0.05, log=structlog.wrap_logger(told, processors=[lambda _, __, event: ((), event)])
    ) as rig:
        for _ in range(3):
            async with await rig.post(CHAT) as response:
                assert response.status == 503
        async with await rig.session.get(rig.admin + "/admin/cluster") as response:
            cluster = await response.json()
    assert cluster["requests"] == {"inflight": 0, "waiting": 0, "sent_away": 3}
    assert cluster["ready"] is False
    lines = [call for call in told.calls if call.kwargs.get("event") == "requests were sent away"]
    assert [line.kwargs["since_the_last_line"] for line in lines] == [1], "the next line comes after some seconds, and counts all"


async def test_a_router_that_is_shutting_down_says_so(rig: Rig) -> None:
    rig.router.listener.draining = True
    async with await rig.session.get(rig.admin + "/admin/cluster") as response:
        cluster = await response.json()
    assert (cluster["ready"], cluster["reason"]) == (False, "this router is shutting down")


async def test_metrics_count_requests_by_route_and_outcome(rig: Rig) -> None:
    for body in (CHAT, {**CHAT, "stream": True}, {**CHAT, "model": "nope"}):
        async with await rig.post(body) as response:
            await response.read()
    async with await rig.session.get(rig.admin + "/metrics") as response:
        families = {f.name: f for f in text_string_to_metric_families(await response.text())}
    counts = {(s.labels["route"], s.labels["outcome"]): s.value for s in families["disagg_requests"].samples if s.name.endswith("_total")}
    assert counts == {("/v1/chat/completions", "ok"): 2, ("/v1/chat/completions", "client_error"): 1}
    ttft = {s.name: s.value for s in families["disagg_ttft_seconds"].samples}
    assert ttft["disagg_ttft_seconds_count"] == 1
    assert 0 < ttft["disagg_ttft_seconds_sum"] < 5
    itl = {s.name: s.value for s in families["disagg_itl_seconds"].samples}
    assert itl["disagg_itl_seconds_count"] >= 3
    engines = {(s.labels["role"], s.labels["state"]): s.value for s in families["disagg_engines"].samples}
    assert engines == {("prefill", "ready"): 1, ("decode", "ready"): 1}


async def test_a_request_tells_its_story(rig: Rig) -> None:
    async with await rig.post({**CHAT, "messages": [{"role": "user", "content": "a secret"}]}) as response:
        request_id = response.headers["x-request-id"]
        await response.read()
    await until(lambda: "disagg_inflight 0.0" in rig.metrics())
    async with await rig.session.get(f"{rig.admin}/admin/requests/{request_id}") as response:
        text = await response.text()
        story = await response.json()
    assert "secret" not in text
    assert story["outcome"] == "ok"
    (attempt,) = story["attempts"]
    assert (attempt["prefill"], attempt["decode"], attempt["state"]) == ("prefill-0", "decode-0", "done")
    assert "in flight" in attempt["reason"]
    names = [e["event"] for e in attempt["events"]]
    assert names[:2] == ["Dispatched", "LegsSent"]
    assert {"PrefillFinished", "FirstTokenSeen", "DecodeFinished"} <= set(names)
    assert [e["at_s"] for e in attempt["events"]] == sorted(e["at_s"] for e in attempt["events"])
    async with await rig.session.get(rig.admin + "/admin/requests") as response:
        assert [r["id"] for r in (await response.json())["requests"]] == [request_id]
    async with await rig.session.get(rig.admin + "/admin/requests/nope") as response:
        assert response.status == 404


async def test_what_is_held_on_engines_is_shown_while_it_is(rig: Rig) -> None:
    gate = asyncio.Event()

    async def wait(call: Call) -> None:
        await gate.wait()
        await answer_well(call)

    rig.prefill.behave = rig.decode.behave = wait

    async def kv() -> dict[str, Any]:
        async with rig.session.get(rig.admin + "/admin/kv") as response:
            found: dict[str, Any] = await response.json()
            return found

    assert await kv() == {"holds": [], "engines": [account("prefill-0"), account("decode-0")], "reaped": 0}
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(rig.post({"model": "fake", "prompt": ["a", "b"]}, "/v1/completions"))
        await until(lambda: len(rig.decode.calls) == 1)
        holds = {h["engine"]: h for h in (await kv())["holds"]}
        metrics = rig.metrics()
        gate.set()
    async with asked.result() as response:
        request_id = response.headers["x-request-id"]
        await response.read()
    assert set(holds) == {"prefill-0", "decode-0"}
    for engine, leg in (("prefill-0", "prefill"), ("decode-0", "decode")):
        hold = holds[engine]
        assert (hold["request"], hold["leg"], hold["phase"], hold["requests"]) == (request_id, leg, "prefilling", 2)
        assert hold["rids"] == rig.decode.calls[0].rids
        assert hold["age_s"] > 0
    assert 'disagg_kv_holds{leg="decode",phase="prefilling"} 1.0' in metrics
    await until(lambda: "disagg_kv_holds{" not in rig.metrics())
    assert (await kv())["holds"] == []


def account(engine: str) -> dict[str, Any]:
    tokens = ("used_tokens", "explained_tokens", "drift_tokens", "orphan_tokens", "quarantined_tokens")
    return {"id": engine, "capacity_tokens": 16384, **dict.fromkeys(tokens, 0), "orphan_for_s": 0.0, "note": ""}


async def test_engines_given_by_url_may_have_other_clients_whose_work_is_left_alone(rig: Rig) -> None:
    async with rig.session.post(rig.admin + "/admin/kv/reap?engine=decode-0", json={"cause": "why not"}) as response:
        assert await response.json() == {"will": "nothing: an entry explains every request on every engine asked about", "why": "why not"}
    async with rig.session.post(rig.admin + "/admin/kv/reap?engine=nobody") as response:
        assert response.status == 404


async def test_what_failed_is_remembered_until_its_engine_is_known_to_be_free_of_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode engine goes on although its connection is closed: it is told again by rid, and never to end all it has."""
    monkeypatch.setattr(orphans, "GRACE_S", 0.2)
    monkeypatch.setattr(orphans, "LATE_S", 0.2)
    busy = asyncio.Event()

    async def refuse(call: Call) -> None:
        call.cut()

    rig.decode.behave = refuse
    monkeypatch.setattr(rig.decode, "live", rig.decode.live | {busy})  # one that no connection belongs to
    async with await rig.post(CHAT) as response:
        assert response.status >= 500
    rids = {rid for call in rig.decode.calls for rid in call.rids}
    await until(lambda: rids <= set(rig.decode.aborted), 10.0)
    assert "" not in rig.decode.aborted, "all of it is aborted only where nobody else may be"


async def test_a_web_page_gives_no_orders(rig: Rig) -> None:
    page = {"Origin": "http://somewhere.example", "Content-Type": "text/plain"}
    async with rig.session.post(rig.admin + "/admin/kv/reap", data="{}", headers=page) as response:
        assert response.status == 403
        assert "web pages" in (await response.json())["error"]["message"]
    async with rig.session.get(rig.admin + "/admin/kv", headers=page) as response:
        assert response.status == 200
