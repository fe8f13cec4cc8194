"""What cannot work is said in one sentence, is held after a few starts, and costs nobody else anything."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disagg.engines.folder import model_hash
from disagg.launches import DEMO_MODEL
from tests.ports import free_port
from tests.serve.conftest import Process, wait_for
from tests.sglang.conftest import ENGINE, Cluster

HELD_WITHIN_S = 180.0
REST_S = 60.0
CONFIG = """
[engine]
engine = "sglang"
device = "cpu"

[[engines]]
name = "flag"
engine_args = ["--no-such-flag", "3"]

[[engines]]
name = "gpu"
engine_args = ["--device", "cuda"]

[[engines]]
name = "port"
ports = [{taken}, {free}]
"""


def other_weights(folder: Path, *, hidden: bool) -> Path:
    """The demo model, but for some of its weights. The hash of a model samples its files, so that weights can differ unseen by it."""
    shutil.copytree(DEMO_MODEL, folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    where = len(content) - 4096 if hidden else len(content) // 2
    content[where : where + 4096] = bytes(4096)
    path.write_bytes(content)
    assert (model_hash(folder) == model_hash(DEMO_MODEL)) is hidden
    return folder


@pytest.fixture(scope="module")
def broken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """Hosts that somebody has set up wrong."""
    folder = tmp_path_factory.mktemp("broken")
    taken = int(cluster.record("p").launch.url.rpartition(":")[2])
    config = folder / "disagg.toml"
    config.write_text(CONFIG.format(taken=taken, free=free_port()))
    hosts = {
        "bad": cluster.start_host("bad", "prefill", "--config", str(config)),
        "nomodel": cluster.start_host("nomodel", "decode", *ENGINE, "--model", str(folder / "no-such-model")),
    }
    for name, hidden in (("other", False), ("odd", True)):
        model = other_weights(folder / name, hidden=hidden)
        hosts[name] = cluster.start_host(name, "decode", *ENGINE, "--model", str(model), "--served-name", "demo")
    yield hosts
    for name, host in hosts.items():
        host.end()
        del cluster.hosts[name]
        assert cluster.run("hosts", "revoke", name).returncode == 0


HELD = {
    "bad-flag": "it does not know the arguments --no-such-flag 3",
    "bad-gpu": "it finds no usable GPU on this host",
    "bad-port": "is taken by another program",
    "nomodel": "is not there: give a Hugging Face folder with --model",
}


@pytest.mark.parametrize("engine", HELD)
def test_it_is_held_and_says_why(cluster: Cluster, broken: Any, engine: str) -> None:
    found = cluster.wait_engine(engine, "held", HELD_WITHIN_S)
    assert HELD[engine] in found["reason"]
    assert "\n" not in found["reason"]
    assert HELD[engine] in cluster.run("status").stdout
    said = cluster.hosts["bad" if engine.startswith("bad") else engine].said()
    assert any(HELD[engine] in str(json.loads(line)) for line in said.splitlines() if line.startswith("{"))


def test_engines_with_other_weights_are_never_paired(cluster: Cluster, broken: Any) -> None:
    cluster.wait_engine("other", "ready", HELD_WITHIN_S)
    wait_for(lambda: "is never paired with p: model hash" in cluster.engine("other")["reason"], lambda: str(cluster.engine("other")))


def test_a_pair_that_answers_wrong_is_quarantined_and_named(cluster: Cluster, broken: Any) -> None:
    """Its weights differ where the hash does not look: only what it answers shows it."""
    cluster.wait_engine("odd", "ready", HELD_WITHIN_S)
    wait_for(lambda: bool(cluster.cluster()["quarantined"]), lambda: str(cluster.cluster()))
    (bad,) = cluster.cluster()["quarantined"]
    assert (bad["prefill"], bad["decode"]) == ("p", "odd")
    assert "token" in bad["reason"]
    assert "instead of" in bad["reason"]
    assert "p with odd" in cluster.run("status").stdout


def test_the_rest_of_the_cluster_serves_on(cluster: Cluster, broken: Any) -> None:
    with cluster.without("d"):
        answer = cluster.ask()
        assert answer.status_code == 200
        assert answer.headers["x-disagg-decode"] == "u"


def test_no_key_stands_in_a_log_or_in_a_list_of_processes(cluster: Cluster) -> None:
    keys = [cluster.record(name).launch.api_key for name in ("p", "d", "u")]
    logs = [cluster.log_of(name) for name in ("p", "d", "u")] + [host.said() for host in cluster.hosts.values()]
    assert all(len(key) >= 32 for key in keys)
    assert not any(key in log for key in keys for log in logs)
    assert all("'api_key': '****" in cluster.log_of(name) for name in ("p", "d", "u"))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(key.encode() in command for key in keys for command in commands)


def test_no_leak_is_reported_after_a_minute_of_rest(cluster: Cluster, broken: Any) -> None:
    """SGLang looks for lost pages when it is idle, and ends itself when it finds some."""
    assert cluster.rested_since is not None, "this looks at what tests/sglang/test_flip.py has left behind: run both"
    rest_until = cluster.rested_since + REST_S
    wait_for(lambda: time.monotonic() >= rest_until, limit_s=REST_S + 1.0)
    for name, pid in cluster.rested_pids.items():
        found = cluster.engine(name)
        assert (found["pid"], found["state"]) == (pid, "ready")
        assert "memory leak" not in cluster.log_of(name)
    assert ("p", "d") not in {(bad["prefill"], bad["decode"]) for bad in cluster.cluster()["quarantined"]}
