"""Engines are killed with work on them; their agents start them anew; nothing stays held."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import httpx2

from tests.sglang.conftest import BACK_LIMIT_S, ENGINE, FEW_PLACES, PLAIN_JSON, Cluster, text_of, until

FREE_WITHIN_S = 2.0
ANSWER_LIMIT_S = 240.0
QUARANTINE_S = 30.0
"""SGLang's own: a decode engine keeps the pages that a killed prefill engine may have been writing into."""


class Asking(threading.Thread):
    """A streamed request and what became of it."""

    def __init__(self, cluster: Cluster, tokens: int, answer: int, seed: int) -> None:
        super().__init__()
        self._url = cluster.url + "/generate"
        sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
        self._body = {"input_ids": text_of(tokens, seed), "sampling_params": sampling, "stream": True}
        self.status = 0
        self.text = ""

    def run(self) -> None:
        with httpx2.stream("POST", self._url, json=self._body, timeout=120) as answer:
            self.status = answer.status_code
            for part in answer.iter_text():
                self.text += part

    @property
    def ended_well(self) -> bool:
        return self.status == 200 and self.text.endswith("data: [DONE]\n\n")

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in self.text.splitlines() if line.startswith("data: {")]

    @property
    def last(self) -> dict[str, Any]:
        return self.events()[-1]


class Chatting(Asking):
    """The same over the chat route."""

    def __init__(self, cluster: Cluster, answer: int) -> None:
        super().__init__(cluster, 1, answer, 1)
        self._url = cluster.url + "/v1/chat/completions"
        self._body = {
            "model": "demo",
            "messages": [{"role": "user", "content": "Tell a long story of the sea."}],
            "temperature": 0,
            "max_tokens": answer,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def said(self) -> str:
        whole = self.text[: self.text.rfind("\n\n") + 2]
        events = [json.loads(line[6:]) for line in whole.splitlines() if line.startswith("data: {")]
        return "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])


def kill(cluster: Cluster, engine: str) -> int:
    pid: int = cluster.engine(engine)["pid"]
    os.kill(pid, signal.SIGKILL)
    return pid


def wait_back(cluster: Cluster, engine: str, old_pid: int) -> None:
    def is_back() -> bool:
        found: dict[str, Any] = cluster.engine(engine)
        return bool(found["state"] == "ready" and found["pid"] != old_pid)

    until(is_back, BACK_LIMIT_S)


def works(cluster: Cluster) -> None:
    with cluster.without("u"):
        asking = Asking(cluster, 60, 4, 999)
        asking.run()
        assert asking.ended_well, (asking.status, asking.text[-600:])


def test_decode_is_killed_in_mid_stream(cluster: Cluster) -> None:
    """The answer goes on on another engine, with the very tokens of an uncut run."""
    uncut = Asking(cluster, 60, 400, 500)
    uncut.run()
    with cluster.without("u"):
        asking = Asking(cluster, 60, 400, 500)
        asking.start()
        until(lambda: asking.text.count("data:") > 3, 30.0)
    pid = kill(cluster, "d")
    took = until(lambda: not cluster.held("p"), 10.0)
    asking.join(ANSWER_LIMIT_S)
    assert asking.ended_well, (asking.status, asking.text[-600:])
    assert asking.last["text"] == uncut.last["text"]
    assert asking.last["output_ids"] == uncut.last["output_ids"]
    assert asking.last["meta_info"]["completion_tokens"] == 400
    assert asking.last["meta_info"]["prompt_tokens"] == 60
    assert took <= FREE_WITHIN_S
    wait_back(cluster, "d", pid)
    works(cluster)
    cluster.wait_idle("p", "d", "u", limit_s=FREE_WITHIN_S)


def test_a_chat_goes_on_in_text_where_its_decode_engine_is_killed(cluster: Cluster) -> None:
    """SGLang tells no ids in chat streams: the text so far is tokenized again. Nothing is lost or said twice; the length is right."""
    with cluster.without("u"):
        asking = Chatting(cluster, 400)
        asking.start()
        until(lambda: asking.text.count("data:") > 5, 30.0)
    before = asking.said()
    pid = kill(cluster, "d")
    asking.join(ANSWER_LIMIT_S)
    assert asking.ended_well, (asking.status, asking.text[-600:])
    assert before
    assert asking.said().startswith(before)
    assert len({e["id"] for e in asking.events()}) == 1
    assert sum("role" in c["delta"] and bool(c["delta"]["role"]) for e in asking.events() for c in e["choices"]) == 1
    usage = asking.events()[-1]["usage"]
    assert usage["completion_tokens"] == 400
    wait_back(cluster, "d", pid)
    works(cluster)


def test_prefill_is_killed_in_mid_prefill(cluster: Cluster) -> None:
    """Its request is made anew elsewhere. What decode keeps for a while are pages into which the dead engine might still be writing."""
    with cluster.without("u"):
        asking = Asking(cluster, 3500, 2, 600)
        asking.start()
        until(lambda: bool(cluster.held("d")), 30.0)
    pid = kill(cluster, "p")
    asking.join(ANSWER_LIMIT_S)
    assert asking.ended_well, (asking.status, asking.text[-600:])
    until(lambda: cluster.held("d").keys() <= {"num_used_tokens"}, FREE_WITHIN_S)
    kept = cluster.held("d").get("num_used_tokens", 0)
    if kept:
        until(lambda: cluster.engine("d")["load"]["kv_quarantined_tokens"] == kept, 2.0)
        shown = cluster.run("status").stdout
        assert f"{kept} tokens of its KV pool are kept from use" in shown
    until(lambda: not cluster.held("d"), QUARANTINE_S + 5.0)
    until(lambda: cluster.engine("d")["load"]["kv_quarantined_tokens"] == 0, 2.0)
    wait_back(cluster, "p", pid)
    works(cluster)


def test_an_agent_is_killed_and_its_engine_serves_on(cluster: Cluster) -> None:
    """The next agent finds the process, its key and its KV events again."""
    pid = cluster.engine("d")["pid"]
    with cluster.without("u"):
        asking = Asking(cluster, 60, 60, 800)
        asking.start()
        until(lambda: asking.text.count("data:") > 3, 30.0)
        cluster.hosts["d"].end(signal.SIGKILL)
        asking.join(ANSWER_LIMIT_S)
        assert asking.ended_well, (asking.status, asking.text[-600:])
        cluster.start_host("d", "decode", *ENGINE, *PLAIN_JSON, *FEW_PLACES)
        until(lambda: cluster.host("d")["incarnation"] > 1 and cluster.engine("d")["state"] == "ready", 20.0)
        assert cluster.engine("d")["pid"] == pid
        works_now = Asking(cluster, 60, 4, 801)
        works_now.run()
        assert works_now.ended_well
