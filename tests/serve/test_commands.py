"""The commands of an operator, against real hosts: what they do and what they say."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import httpx2
import pytest

from tests import canaries
from tests.serve.conftest import Site, is_engine, wait_for

pytestmark = pytest.mark.slow


def is_gone(pid: int) -> bool:
    return not is_engine(pid)


def test_a_router_starts_with_no_host_and_says_how_to_join(site: Site) -> None:
    answer = httpx2.get(site.url + "/readyz")
    assert answer.status_code == 503
    assert "disagg serve --role prefill --join" in answer.json()["error"]["message"]
    assert site.ask().status_code == 503
    assert "No request can be served" in site.run("status").stdout


def test_hosts_join_serve_and_are_shown(pair: Site) -> None:
    answer = pair.ask()
    assert answer.status_code == 200
    assert (answer.headers["x-disagg-prefill"], answer.headers["x-disagg-decode"]) == ("p", "d")
    status = pair.run("status")
    assert status.returncode == 0
    assert "Requests can be served." in status.stdout
    shown = json.loads(pair.run("status", "--json").stdout)
    assert {(e["id"], e["host"], e["role"], e["state"]) for e in shown["engines"]} == {
        ("p", "p", "prefill", "ready"),
        ("d", "d", "decode", "ready"),
    }
    assert {h["id"] for h in shown["hosts"]} == {"p", "d"}
    hosts = pair.run("hosts", "ls")
    assert "p     prefill  online" in hosts.stdout
    for name in ("p", "d"):
        assert httpx2.get(pair.engine(name)["url"] + "/v1/models").status_code == 401, "an engine demands its key"


def test_a_flip_says_what_it_does_and_the_engine_keeps_its_process(pair: Site) -> None:
    pair.start_host("d2", "decode")
    before = pair.wait_engine("d2", "ready")
    done = pair.run("flip", "d2", "prefill", "--cause", "more prompts than answers")
    assert done.returncode == 0, done.stderr
    for word in ("more prompts than answers", "switched from decode to prefill", "canaries", "back in service as prefill"):
        assert word in done.stdout
    after = pair.wait_engine("d2", "ready")
    assert (after["role"], after["pid"]) == ("prefill", before["pid"])
    record = json.loads((pair.folder / "d2" / "engines" / "d2" / "record.json").read_text())
    assert (record["role"], record["switches"]) == ("prefill", 1)  # the next agent goes on counting
    used = {pair.ask().headers["x-disagg-prefill"] for _ in range(4)}
    assert used == {"p", "d2"}
    assert b'disagg_flips_total{from="decode",outcome="done",to="prefill"} 1.0' in httpx2.get(pair.admin + "/metrics").content


def test_a_flip_of_an_engine_that_refuses_starts_it_anew_in_the_new_role(pair: Site) -> None:
    pair.start_host("d2", "decode", "--engine-arg=--faults=refuse-switch")
    before = pair.wait_engine("d2", "ready")
    done = pair.run("flip", "d2", "prefill")
    assert done.returncode == 0, done.stderr
    assert "refused to switch" in done.stdout
    assert "starting it anew as prefill" in done.stdout
    after = pair.wait_engine("d2", "ready")
    assert after["role"] == "prefill"
    assert after["pid"] != before["pid"]
    assert {pair.ask().headers["x-disagg-prefill"] for _ in range(4)} == {"p", "d2"}


def test_a_drained_engine_gets_nothing_new_and_finishes_what_runs(site: Site) -> None:
    slow = ("--engine-arg=--paced", "--engine-arg=1,0;60,0")
    site.start_host("p", "prefill")
    site.start_host("d", "decode", *slow)
    site.start_host("d2", "decode", *slow)
    for name in ("p", "d", "d2"):
        site.wait_engine(name, "ready")
    wait_for(lambda: canaries.are_over(site.admin), "canaries are not over")
    fields = {"stream": True, "max_tokens": 40, "ignore_eos": True, "temperature": 0, "messages": [{"role": "user", "content": "go on"}]}
    with httpx2.stream("POST", site.url + "/v1/chat/completions", json={"model": "demo", **fields}, timeout=30) as stream:
        used = stream.headers["x-disagg-decode"]
        other = {"d": "d2", "d2": "d"}[used]
        said = site.run("drain", used).stdout
        assert "takes no new work; 1 running request may finish" in said
        assert site.engine(used)["state"] == "draining"
        assert {site.ask(max_tokens=1).headers["x-disagg-decode"] for _ in range(3)} == {other}
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 40
    assert "back in service" in site.run("undrain", used).stdout
    assert used in {site.ask(max_tokens=1).headers["x-disagg-decode"] for _ in range(4)}


def test_a_drain_outlives_a_restart_of_the_router(pair: Site) -> None:
    pair.run("drain", "d")
    assert pair.router is not None
    pair.router.end(signal.SIGKILL)
    pair.start_router()
    assert "drained" in pair.wait_engine("d", "draining")["reason"]
    pair.run("undrain", "d")
    pair.wait_engine("d", "ready")


def test_a_restart_gives_a_new_process(pair: Site) -> None:
    before = pair.engine("d")
    done = pair.run("restart", "d")
    assert done.returncode == 0, done.stderr
    assert "serves again as decode" in done.stdout
    after = pair.wait_engine("d", "ready")
    assert after["pid"] != before["pid"]
    assert not is_engine(before["pid"])
    assert pair.ask().status_code == 200


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("drain", "nobody"), "there is no engine 'nobody'; there is d, p"),
        (("flip", "d", "decode"), "d is a decode engine already"),
        (("flip", "d", "unified"), "only prefill and decode change places"),
        (("hosts", "revoke", "nobody"), "no host is registered as 'nobody'; there is d, p"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_1(pair: Site, command: tuple[str, ...], sentence: str) -> None:
    done = pair.run(*command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert sentence in line


def test_a_command_without_a_router_names_the_address(site: Site) -> None:
    done = site.run("status", "--admin", "127.0.0.1:1", admin=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "127.0.0.1:1" in line
    assert "--admin" in line


def test_sigterm_to_a_host_drains_it_and_ends_its_engine(site: Site) -> None:
    slow = ("--engine-arg=--paced", "--engine-arg=1,0;40,0")
    site.start_host("p", "prefill")
    site.start_host("d", "decode", *slow)
    for name in ("p", "d"):
        site.wait_engine(name, "ready")
    pid = site.engine("d")["pid"]
    fields = {"stream": True, "max_tokens": 40, "ignore_eos": True, "temperature": 0, "messages": [{"role": "user", "content": "go on"}]}
    with httpx2.stream("POST", site.url + "/v1/chat/completions", json={"model": "demo", **fields}, timeout=30) as stream:
        assert stream.status_code == 200
        site.hosts["d"].process.send_signal(signal.SIGTERM)
        site.wait_engine("d", "draining", 2.0)
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", "what ran was finished"
    assert site.hosts["d"].process.wait(15) == 0
    assert not is_engine(pid)
    assert site.host("d")["state"] == "left"
    assert "took its engines down" in site.engine("d")["reason"] or "stop" in site.engine("d")["reason"]


def test_a_second_signal_ends_a_host_at_once(site: Site) -> None:
    site.start_host("u", "unified", "--engine-arg=--paced", "--engine-arg=1,0;1000,0")
    pid = site.wait_engine("u", "ready")["pid"]
    body = b'{"model":"demo","messages":[{"role":"user","content":"hi"}],"max_tokens":500,"ignore_eos":true,"stream":true}'
    with socket.create_connection(("127.0.0.1", site.http)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        host = site.hosts["u"]
        host.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "once more" in host.said())
        host.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert host.process.wait(15) == 0
        assert time.monotonic() - began < 2.5, "F35: at most 2 s"
    assert not is_engine(pid)


def test_an_attached_engine_is_watched_and_left_alone(site: Site) -> None:
    site.start_host("p", "prefill")
    given = site.wait_engine("p", "ready")
    key = json.loads((site.folder / "p" / "engines" / "p" / "launch.json").read_bytes())["api_key"]
    site.hosts["p"].end(signal.SIGKILL)  # its engine goes on, and somebody else looks after it now
    site.run("hosts", "revoke", "p")
    site.start_host("a", "prefill", "--attach", given["url"], env={"DISAGG_ENGINE_API_KEY": key})
    site.start_host("d", "decode")
    site.wait_engine("a", "ready")
    site.wait_engine("d", "ready")
    answer = site.ask()
    assert (answer.status_code, answer.headers["x-disagg-prefill"]) == (200, "a"), answer.text
    done = site.run("restart", "a")
    assert done.returncode == 1
    assert "attached" in done.stderr
    site.wait_engine("a", "ready")
    site.hosts["a"].end()
    assert is_engine(given["pid"]), "whoever attached it does not end it"
    site.engine_pids.add(given["pid"])


def test_two_agents_of_one_name_on_a_machine_are_told_apart(pair: Site) -> None:
    first = pair.hosts["d"]
    second = pair.start_host("d", "decode")
    pair.hosts["d"] = first
    assert second.process.wait(15) == 1
    assert "another agent runs on this machine under the name d" in second.said()
    assert pair.host("d")["state"] == "online"


def test_several_engines_of_one_host(site: Site) -> None:
    (site.folder / "disagg.toml").write_text('[[engines]]\nname = "a"\nrole = "prefill"\n[[engines]]\nname = "b"\n')
    site.start_host("box", "decode", "--config", str(site.folder / "disagg.toml"), token=site.token("prefill", "decode"))
    for name, role in (("box-a", "prefill"), ("box-b", "decode")):
        assert site.wait_engine(name, "ready")["role"] == role
    answer = site.ask()
    assert (answer.headers["x-disagg-prefill"], answer.headers["x-disagg-decode"]) == ("box-a", "box-b")


def test_an_engine_that_dies_again_and_again_is_held_until_a_person_asks(site: Site) -> None:
    site.start_host("u", "unified")
    site.wait_engine("u", "ready")
    deaths = 0
    limit = time.monotonic() + 60
    while site.engine("u")["state"] != "held":
        assert time.monotonic() < limit
        found = site.engine("u")
        if found["state"] == "ready" and is_engine(found["pid"]):
            os.kill(found["pid"], signal.SIGKILL)
            deaths += 1
            wait_for(partial(is_gone, found["pid"]))
        time.sleep(0.05)
    assert deaths == 5
    assert "5 deaths" in site.engine("u")["reason"]
    assert "it is held after 5 deaths within 600 s" in site.run("status").stdout, "F18: a person who looks sees why"
    done = site.run("restart", "u")
    assert done.returncode == 0, done.stderr
    site.wait_engine("u", "ready")


def test_engines_that_do_not_fit_are_never_paired_and_status_says_why(site: Site) -> None:
    site.start_host("p", "prefill", "--page-size", "16")
    site.start_host("d", "decode", "--page-size", "32")
    for name in ("p", "d"):
        site.wait_engine(name, "ready")
    answer = site.ask()
    assert answer.status_code == 503
    assert "page size" in answer.json()["error"]["message"]
    status = site.run("status").stdout
    assert "never paired with p: page size 32 against 16" in status
    assert "No request can be served" in status
    site.start_host("d2", "decode", "--page-size", "16")
    site.wait_engine("d2", "ready")
    assert {site.ask().headers["x-disagg-decode"] for _ in range(4)} == {"d2"}
    assert "page size 32 against 16" in site.engine("d")["reason"]


def test_several_models_behind_one_router(site: Site) -> None:
    site.start_host("a", "unified", "--served-name", "one")
    site.start_host("b", "unified", "--served-name", "two")
    for name in ("a", "b"):
        site.wait_engine(name, "ready")
    assert {m["id"] for m in httpx2.get(site.url + "/v1/models").json()["data"]} == {"one", "two"}
    assert site.ask(model="one").headers["x-disagg-decode"] == "a"
    assert site.ask(model="two").headers["x-disagg-decode"] == "b"
    assert site.ask(model="three").status_code == 404


def test_keys_may_be_kept_apart_from_the_state(tmp_path: Path) -> None:
    """As systemd's credentials are: the router's and a host's key come from files, tokens still fit."""
    site = Site(tmp_path)
    try:
        for name in ("r", "h"):
            assert site.run("keygen", "--state-dir", str(tmp_path / f"keys-{name}"), admin=False).returncode == 0
        site.start_router("--key-file", str(tmp_path / "keys-r" / "router" / "key"))
        site.start_host("u", "unified", "--key-file", str(tmp_path / "keys-h" / "router" / "key"))
        site.wait_engine("u", "ready")
        assert site.ask().status_code == 200
        assert not (tmp_path / "router" / "router" / "key").exists()
        assert not (tmp_path / "u" / "hosts" / "u" / "key").exists()
    finally:
        site.close()
