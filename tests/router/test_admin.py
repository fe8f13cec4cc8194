"""What the admin listener shows."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.fake_engine import until
from tests.router.conftest import CHAT, Rig


async def test_the_cluster_is_shown_as_the_contract_says(rig: Rig) -> None:
    async with await rig.session.get(rig.admin + "/admin/cluster") as response:
        cluster = await response.json()
    engines = {e["id"]: e for e in cluster["engines"]}
    assert set(engines) == {"prefill-0", "decode-0"}
    engine = engines["decode-0"]
    assert set(engine) == {"id", "host", "role", "state", "model", "url", "pid", "load", "reason"}
    assert (engine["role"], engine["state"], engine["model"]) == ("decode", "ready", "fake")
    assert set(engine["load"]) == {"running", "waiting", "kv_used_tokens", "kv_total_tokens", "kv_quarantined_tokens"}
    assert engine["load"]["kv_total_tokens"] == 16384


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
