"""Measures real SGLang engines under disagg, on the CPU: start, memory, handoff, role switch. Started by ``scripts/bench-sglang``."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from tests.cluster.prompts import prompt_ids
from tests.rig.bench import say
from tests.serve.conftest import wait_for
from tests.sglang.conftest import ENGINE, START_LIMIT_S, Cluster

HOSTS = (("u", "unified"), ("p", "prefill"), ("d", "decode"))
SWITCHED = re.compile(r"in ([\d.]+) s and kept its weights")
ROWS = list[tuple[str, str]]


def main() -> int:
    """Prints rows of a table."""
    parser = argparse.ArgumentParser(prog="scripts/bench-sglang", description=__doc__)
    parser.add_argument("--requests", type=int, default=12, help="prompts for each length (default 12)")
    parser.add_argument("--flips", type=int, default=10, help="role switches in each direction (default 10)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="disagg-bench-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start_router()
            rows = start(cluster) + handoff(cluster, chosen.requests) + switches(cluster, chosen.flips)
        finally:
            cluster.close()
    width = max(len(name) for name, _ in rows)
    sys.stdout.writelines(f"{name.ljust(width)}  {value}\n" for name, value in rows)
    return 0


def start(cluster: Cluster) -> ROWS:
    """One engine after the other, each alone on the machine while it starts."""
    rows = []
    for name, role in HOSTS:
        say(f"starting a {role} engine")
        began = time.monotonic()
        cluster.start_host(name, role, *ENGINE)
        cluster.wait_engine(name, "ready", START_LIMIT_S)
        took = time.monotonic() - began
        pid = cluster.record(name).pid
        memory = {command: rss(p) for p, command in family(pid)}
        rows.append((f"start of a {role} engine, s", f"{took:.1f}"))
        rows.append((f"memory of a {role} engine, MB", f"{sum(memory.values()):.0f} (scheduler {max(memory.values()):.0f})"))
    return rows


def family(pid: int) -> list[tuple[int, str]]:
    """An engine's process and its helpers: they share its process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pid:
                found.append((int(stat.parent.name), (stat.parent / "comm").read_text().strip() + stat.parent.name))
        except OSError:
            continue
    return found


def rss(pid: int) -> float:
    """MB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def handoff(cluster: Cluster, requests: int) -> ROWS:
    """Time to the first token over the pair and on the unified engine, for the same prompts; the difference is what the handoff adds."""
    rows = []
    for tokens in (100, 800, 3000):
        say(f"{requests} prompts of {tokens} tokens over the pair, then on the unified engine")
        prompts = [prompt_ids(tokens, 10_000 + tokens + i) for i in range(requests)]
        first = {}
        for name, absent in (("pair", "u"), ("unified", "d")):
            with cluster.without(absent):
                ttft(cluster, prompt_ids(tokens, 1))
                first[name] = [ttft(cluster, prompt) for prompt in prompts]
        medians = {name: statistics.median(times) * 1000 for name, times in first.items()}
        spread = ", ".join(f"{n} {min(t) * 1000:.0f} to {max(t) * 1000:.0f}" for n, t in first.items())
        added = medians["pair"] - medians["unified"]
        text = f"pair {medians['pair']:.0f}, unified {medians['unified']:.0f}, added {added:.0f} ({spread})"
        rows.append((f"first token, {tokens} tokens, ms", text))
    return rows


def ttft(cluster: Cluster, prompt: list[int]) -> float:
    body: dict[str, Any] = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 2}, "stream": True}
    began = time.monotonic()
    with httpx2.stream("POST", cluster.url + "/generate", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        next(answer.iter_bytes())
        return time.monotonic() - began


def switches(cluster: Cluster, flips: int) -> ROWS:
    """The decode engine goes back and forth; the unified engine serves meanwhile."""
    live: dict[str, list[float]] = {"prefill": [], "decode": []}
    whole: dict[str, list[float]] = {"prefill": [], "decode": []}
    for number in range(2 * flips):
        role = ("prefill", "decode")[number % 2]
        change = cluster.order("flip", "d", role=role)["change"]
        wait_for(lambda c=change: cluster.change(c)["phase"] in {"done", "failed"}, limit_s=120.0)  # type: ignore[misc]
        steps = cluster.change(change)["steps"]
        found = next(filter(None, (SWITCHED.search(step["what"]) for step in steps)))
        live[role].append(float(found[1]))
        whole[role].append(steps[-1]["after_s"])
        say(f"flip {number + 1} of {2 * flips}, to {role}: {live[role][-1]:.2f} s, {whole[role][-1]:.2f} s with drain and canaries")
    return [
        (f"{what} to {role}, s", f"median {statistics.median(times[role]):.2f} ({min(times[role]):.2f} to {max(times[role]):.2f})")
        for what, times in (("live switch", live), ("flip with drain and canaries", whole))
        for role in ("prefill", "decode")
    ]


if __name__ == "__main__":
    sys.exit(main())
