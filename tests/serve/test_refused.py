"""Hosts that the router does not want, routers that stop, agents that come back: what serves goes on."""

from __future__ import annotations

import shutil
import signal

import httpx2
import pytest

from tests.ports import free_port
from tests.serve.conftest import Process, Site, is_engine, wait_for

pytestmark = pytest.mark.slow

SLOW = ("--engine-arg=--paced", "--engine-arg=1,0;60,0")
LONG = {
    "model": "demo",
    "stream": True,
    "max_tokens": 60,
    "ignore_eos": True,
    "temperature": 0,
    "messages": [{"role": "user", "content": "go on"}],
}


def data_lines(stream: httpx2.Response) -> list[str]:
    return [line for line in stream.iter_lines() if line.startswith("data: ")]


def test_an_agent_that_is_refused_for_good_leaves_its_engine_and_its_streams_alone(site: Site) -> None:
    site.start_host("u", "unified", *SLOW)
    pid = site.wait_engine("u", "ready")["pid"]
    site.hosts["u"].end(signal.SIGKILL)
    site.start_host("u", "unified", *SLOW)  # its second incarnation
    wait_for(lambda: site.host("u").get("incarnation") == 2)
    site.wait_engine("u", "ready")
    with httpx2.stream("POST", site.url + "/v1/chat/completions", json=LONG, timeout=30) as stream:
        assert stream.status_code == 200
        site.hosts["u"].end(signal.SIGKILL)
        (site.folder / "u" / "hosts" / "u" / "incarnation").write_bytes(b"0")
        wait_for(lambda: site.host("u")["state"] == "suspect")
        stale = site.start_host("u", "unified", *SLOW)
        assert stale.process.wait(15) == 1
        lines = data_lines(stream)
    assert "incarnation" in stale.said()
    assert is_engine(pid)
    assert lines[-1] == "data: [DONE]"


def test_an_agent_that_loses_its_seat_for_good_ends_no_engine(site: Site) -> None:
    """It was joined, and stood still until a later incarnation had its place: whether its engine still serves is not its to say."""
    first = site.start_host("u", "unified")
    pid = site.wait_engine("u", "ready")["pid"]
    shutil.copytree(site.folder / "u", site.folder / "copy")
    first.process.send_signal(signal.SIGSTOP)
    command = ["serve", "--role", "unified", "--name", "u", "--join", f"127.0.0.1:{site.control}", "--state-dir", str(site.folder / "copy")]
    later = Process("later", site.folder, [*command, "--log-format", "json"])
    try:
        wait_for(lambda: site.host("u").get("incarnation") == 2, later.said, 20)
        first.process.send_signal(signal.SIGCONT)
        assert first.process.wait(15) == 1
        assert "incarnation" in first.said()
        site.engine_pids.add(pid)
        assert is_engine(pid)
    finally:
        later.end()


def test_a_copied_state_directory_harms_nobody(site: Site) -> None:
    site.start_host("u", "unified")
    engine = site.wait_engine("u", "ready")
    shutil.copytree(site.folder / "u", site.folder / "copy")
    command = ["serve", "--role", "unified", "--name", "u", "--join", f"127.0.0.1:{site.control}", "--state-dir", str(site.folder / "copy")]
    clone = Process("clone", site.folder, [*command, "--log-format", "json"])
    try:
        wait_for(lambda: "a clone" in clone.said() or "still alive" in clone.said(), clone.said)
        wait_for(lambda: "was refused" in site.run("hosts", "ls").stdout, lambda: site.run("hosts", "ls").stdout)
        assert "the engine that it names belongs to that one" in clone.said()
    finally:
        clone.end()
    after = site.engine("u")
    assert (after["state"], after["pid"]) == ("ready", engine["pid"])
    assert site.ask().status_code == 200


def test_a_host_without_a_good_token_starts_no_engine(site: Site) -> None:
    token = site.token("unified")
    site.start_host("u", "unified", token=token)
    site.wait_engine("u", "ready")
    second = site.start_host("v", "unified", token=token)
    assert second.process.wait(15) == 1
    assert not (site.folder / "v" / "engines").exists()
    assert "refused the token" in second.said()


def test_a_drain_outlives_a_restart_of_agent_and_router(site: Site) -> None:
    site.start_host("u", "unified")
    site.wait_engine("u", "ready")
    site.run("drain", "u", "--cause", "a bad GPU")
    wait_for(lambda: b"a bad GPU" in (site.folder / "u" / "engines" / "u" / "record.json").read_bytes())
    site.hosts["u"].end(signal.SIGKILL)
    assert site.router is not None
    site.router.end(signal.SIGKILL)
    site.start_router()
    site.start_host("u", "unified")
    assert "a bad GPU" in site.wait_engine("u", "draining")["reason"]
    assert "back in service; it is ready" in site.run("undrain", "u").stdout


def test_an_adopted_engine_with_older_settings_says_so(site: Site) -> None:
    site.start_host("u", "unified")
    pid = site.wait_engine("u", "ready")["pid"]
    site.hosts["u"].end(signal.SIGKILL)
    site.start_host("u", "unified", "--kv-pool-tokens", "8192")
    wait_for(lambda: "older settings" in site.run("status").stdout, lambda: site.run("status").stdout)
    assert site.engine("u")["pid"] == pid
    assert site.ask().status_code == 200
    assert site.run("restart", "u").returncode == 0
    assert "older settings" not in site.run("status").stdout
    assert site.engine("u")["load"]["kv_total_tokens"] == 8192


def test_a_router_that_cannot_wait_any_longer_says_so_to_every_stream(site: Site) -> None:
    site.start_host("u", "unified", *SLOW)
    site.wait_engine("u", "ready")
    assert site.router is not None
    site.router.end()
    site.start_router("--drain-timeout-s", "0.5")
    site.wait_engine("u", "ready")
    with httpx2.stream("POST", site.url + "/v1/chat/completions", json=LONG, timeout=30) as stream:
        assert stream.status_code == 200
        site.router.process.send_signal(signal.SIGTERM)
        lines = data_lines(stream)
    assert "shutting down" in lines[-1]
    assert "[DONE]" not in lines[-1]
    assert site.router.process.wait(10) == 0


def test_two_routers_never_share_a_state_directory(site: Site) -> None:
    places = ["--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--control", "127.0.0.1:0", "--state-dir", str(site.folder / "router")]
    second = Process("second", site.folder, ["serve", "--role", "router", *places])
    assert second.process.wait(15) == 1
    assert "another router runs with the state directory" in second.said()


def test_a_second_router_for_engines_given_by_url_serves_all_the_same(site: Site) -> None:
    """Without a control plane, which it does not need for them: its default port, or its state, is another router's."""
    http, admin = free_port(), free_port()
    places = ["--http", f"127.0.0.1:{http}", "--admin", f"127.0.0.1:{admin}", "--state-dir", str(site.folder / "router")]
    command = ["serve", "--role", "router", *places, "--unified", f"http://127.0.0.1:{free_port()}"]
    second = Process("second", site.folder, command)
    try:
        wait_for(lambda: "Started in" in second.said(), second.said)
        assert httpx2.get(f"http://127.0.0.1:{http}/healthz").status_code == 200
        assert "no host can join this router" in second.said()
    finally:
        assert second.end() == 0
