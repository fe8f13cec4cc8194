"""The bench of the control plane: many simulated hosts, silent ones, dead engines, stalls, floods. Started by ``scripts/bench-control``.

Simulated hosts are real agents over stub engines, in a process of their own (`tests.rig.fleet`); exits, hangs and stopped hosts are those
of `disagg serve` with the embedded engine. The router is a process of its own throughout. Times of detection are read from its log.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx2
import msgspec

from disagg.life import set_limits
from disagg.model import Role
from disagg.security.keys import KeyPair
from tests.quantile import quantile
from tests.rig.bench import pick_cores, say
from tests.rig.binary import RigError, build
from tests.rig.hosts import RouterProcess, end, python_module, wait_for, wall
from tests.rig.processes import BOOTSTRAP_PORT, Fakes, Load, Rig

HOSTS = 64
PARTS = ("steady", "silence", "engines", "calm", "flood")
RECOVERY_LIMIT_S = 60.0
MESSAGES_PER_S = 50_000
CONNECTIONS = 5_000
BUSY_SHARE = 0.8
FLOOD_LOAD = Load(connections=16, stream=True, chunks=8, pace_us=5_000, seconds=8.0, warmup_s=1.0)


class Row(msgspec.Struct, frozen=True):
    """A line of the table. `ok`: the target is reached; None where there is none."""

    what: str
    found: str
    target: str = ""
    ok: bool | None = None


def timing(what: str, values: list[float], target_s: float) -> Row:
    """A row about times of detection."""
    p99 = quantile(values, 0.99)
    spread = f"p50 {quantile(values, 0.5):.2f}  p99 {p99:.2f}  ({min(values):.2f} to {max(values):.2f}, {len(values)} trials)"
    return Row(what, spread, f"p99 {target_s:g} s", p99 <= target_s)


# --- parts that several measurements need


def plan_of(router: RouterProcess, keys: dict[str, KeyPair]) -> bytes:
    """What a fleet is told."""
    members = [{"name": name, "public": key.public, "secret": key.secret} for name, key in keys.items()]
    return msgspec.json.encode({"port": router.control, "router_key": router.key.public, "members": members})


@contextmanager
def fleet(router: RouterProcess, keys: dict[str, KeyPair]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of simulated hosts, which try to join from the start."""
    with python_module("tests.rig.fleet", stdin=plan_of(router, keys)) as process:
        heard(process, b"started")
        yield process


def heard(process: subprocess.Popen[bytes], word: bytes) -> bytes:
    """Waits for a line of a helper's."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if word not in line:
        raise RigError(f"a helper of the bench ended: {line!r}")
    return line


def first_seen(router: RouterProcess, since: float, event: str, who: str, states: set[str]) -> float:
    """When the router first said that somebody is in one of these states, wall clock; infinite when it did not."""
    key, field = ("engine", "now") if event == "engine changed" else ("host", "state")
    found = (line.at for line in router.lines(since) if line.event == event and line.fields[key] == who and line.fields[field] in states)
    return next(found, math.inf)


def downs(router: RouterProcess, since: float) -> dict[str, int]:
    """How often a host or an engine was thought ill of: silent, dead or suspect."""
    found = {"suspect": 0, "silent": 0, "dead": 0}
    for line in router.lines(since):
        state = line.fields.get("now") or line.fields.get("state")
        if state in found:
            found[state] += 1
    return found


class RealHost:
    """`disagg serve --role …` with embedded engines, and a state directory of its own."""

    def __init__(self, router: RouterProcess, role: Role, name: str, engines: int) -> None:
        self.name = name
        self.router = router
        self.engines = [f"{name}-e{i}" for i in range(engines)]
        folder = router.folder / name
        folder.mkdir()
        config = folder / "disagg.toml"
        config.write_text("".join(f'[[engines]]\nname = "e{i}"\n' for i in range(engines)))
        token = router.token(role, ttl_s=600).encode()
        command = [sys.executable, "-m", "disagg", "serve", "--role", role.value, "--name", name, "--config", str(config)]
        command += ["--join", f"127.0.0.1:{router.control}", "--state-dir", str(folder / "state"), "--log-format", "json", "--token", token]
        with (folder / "log").open("wb") as out:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)

    def pids(self) -> dict[str, int]:
        """Of its engines."""
        return {e["id"]: e["pid"] for e in self.router.cluster()["engines"] if e["id"] in self.engines}

    def ready(self) -> bool:
        """All of them."""
        states = self.router.engines()
        return all(states.get(engine) == "ready" for engine in self.engines)

    def wait_ready(self) -> None:
        """Until all of them are."""
        wait_for(self.ready, RECOVERY_LIMIT_S, f"{self.name} does not get ready: {self.router.engines()}")

    def signal_all(self, number: signal.Signals) -> None:
        """As if the machine stood still, or went on."""
        for pid in (self.process.pid, *self.pids().values()):
            with contextlib.suppress(ProcessLookupError):
                send(pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(httpx2.HTTPError):
            self.signal_all(signal.SIGCONT)
        end(self.process)


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that a host of ours started."""
    subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(pid)], check=False, stderr=subprocess.DEVNULL)


class Clients:
    """Asks small questions through the router, again and again, and counts what went wrong."""

    def __init__(self, router: RouterProcess, count: int, max_tokens: int) -> None:
        self.asked = 0
        self.faults: list[str] = []
        self._url = f"http://127.0.0.1:{router.http}/v1/chat/completions"
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(count)]

    def _ask_on(self) -> None:
        body = {"model": "demo", "max_tokens": self._max_tokens, "ignore_eos": True, "messages": [{"role": "user", "content": "Tell me."}]}
        with httpx2.Client(timeout=120) as client:
            while not self._stop.is_set():
                self.asked += 1
                try:
                    answer = client.post(self._url, json=body)
                except httpx2.HTTPError as error:
                    self.faults.append(type(error).__name__)
                else:
                    if answer.status_code != 200:
                        self.faults.append(f"{answer.status_code}: {answer.text[:200]}")
                if self.faults:
                    time.sleep(0.2)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


# --- the measurements


def steady(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """How long 64 hosts take to come back after a router start, and what they cost then."""
    router = RouterProcess(scratch)
    keys = router.enrol(*(f"h{i:02}" for i in range(HOSTS)))
    joins, costs = [], []
    threads: list[dict[str, float]] = []
    with fleet(router, keys) as hosts:
        for _ in range(options.rounds):
            began = router.launch()
            wait_for(lambda since=began: len(joined_at(router, since)) == HOSTS, 30, "not all hosts join")  # the log: asking would slow it
            found = joined_at(router, began)
            joins.append(max(found.values()) - began)
            time.sleep(3)
            before = router.cpu_s()
            time.sleep(options.window)
            threads.append({k: (v - before.get(k, 0.0)) / options.window for k, v in router.cpu_s().items()})
            costs.append(sum(threads[-1].values()))
            router.stop()
        assert hosts.poll() is None
    shares = " and ".join(f"{100 * statistics.median(t[k] for t in threads):.1f} % {k}" for k in threads[0] if threads[0][k] > 0.001)
    cost = statistics.median(costs)
    return [
        Row(f"{HOSTS} hosts, all joined after a router start", spread_s(joins), "2 s", max(joins) <= 2.0),
        Row(
            f"{HOSTS} hosts, CPU of the router",
            f"{100 * cost:.1f} % ({100 * min(costs):.1f} to {100 * max(costs):.1f}): {shares}",
            "5 %",
            cost <= 0.05,
        ),
    ]


def joined_at(router: RouterProcess, since: float) -> dict[str, float]:
    """When the router's log says that hosts came online, by name."""
    lines = router.lines(since)
    return {line.fields["host"]: line.at for line in lines if line.event == "host changed" and line.fields["state"] == "online"}


def spread_s(values: list[float]) -> str:
    """Median and range, s."""
    return f"median {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f}, {len(values)} runs)"


def silence(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Hosts that stand still with their engines."""
    router = RouterProcess(scratch)
    groups = [[f"g{g}-{i}" for i in range(4)] for g in range(8)]
    keys = router.enrol(*(name for group in groups for name in group))
    shut: list[float] = []
    dead: list[float] = []
    with router, ExitStack() as stack:
        fleets = [stack.enter_context(fleet(router, {name: keys[name] for name in group})) for group in groups]
        for trial in range(options.trials):
            wait_for(lambda: list(router.engines().values()).count("ready") == 2 * len(keys), RECOVERY_LIMIT_S, "hosts do not come back")
            time.sleep(random.uniform(0.3, 0.8))
            group, process = groups[trial % len(groups)], fleets[trial % len(groups)]
            began = wall()
            process.send_signal(signal.SIGSTOP)
            time.sleep(3.0)
            process.send_signal(signal.SIGCONT)
            for name in group:
                shut.append(first_seen(router, began, "host changed", name, {"suspect"}) - began)
                dead += [first_seen(router, began, "engine changed", f"{name}-{e}", {"dead"}) - began for e in "pd"]
    return [
        timing("simulated hosts stand still: no new work", shut, 1.0),
        timing("simulated hosts stand still: engines dead", dead, 2.0),
    ]


def engines(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Real hosts and engines: exits, a host that stands still, hangs."""
    router = RouterProcess(scratch)
    rows = []
    with router, RealHost(router, Role.PREFILL, "pre", 1) as prefill, RealHost(router, Role.DECODE, "dec", 4) as decode:
        prefill.wait_ready()
        decode.wait_ready()
        say("real hosts are up")
        rows += [timing("a real host stands still: no new work", stopped_host(options, router, decode, "suspect"), 1.0)]
        rows += [timing("a real host stands still: engines dead", stopped_host(options, router, decode, "dead"), 2.0)]
        rows.append(timing("engine hangs under work: its requests given up", hangs(options, router, decode), 5.0))
        rows.append(timing("engine's process ends", exits(options, router, decode), 0.5))
    return rows


def stopped_host(options: argparse.Namespace, router: RouterProcess, host: RealHost, state: str) -> list[float]:
    """SIGSTOP of agent and engines, and on again."""
    found = []
    for _ in range(options.trials):
        host.wait_ready()
        time.sleep(random.uniform(0.3, 0.8))
        began = wall()
        host.signal_all(signal.SIGSTOP)
        time.sleep(3.0 if state == "dead" else 1.6)
        host.signal_all(signal.SIGCONT)
        found += [first_seen(router, began, "engine changed", engine, {state, "dead"}) - began for engine in host.engines]
    return found


def hangs(options: argparse.Namespace, router: RouterProcess, host: RealHost) -> list[float]:
    """SIGSTOP of engines that are at work."""
    found = []
    with Clients(router, 3 * len(host.engines), 400):
        for _ in range(max(1, options.trials // len(host.engines))):
            host.wait_ready()
            wait_for(lambda: all(load_of(router, e) for e in host.engines), 30, "the engines have no work")
            pids = host.pids()
            began = {}
            for engine, pid in pids.items():
                began[engine] = wall()
                send(pid, signal.SIGSTOP)
                time.sleep(random.uniform(0.05, 0.2))
            seen = hung_at(router, set(began), 8.0)
            for pid in pids.values():
                send(pid, signal.SIGCONT)
            found += [seen.get(engine, math.inf) - at for engine, at in began.items()]
    return found


def hung_at(router: RouterProcess, engines: set[str], limit_s: float) -> dict[str, float]:
    """When the view first says of each that its counters stand still under work, at which moment its requests are given up."""
    found: dict[str, float] = {}
    until = wall() + limit_s
    while found.keys() != engines and wall() < until:
        shown = {e["id"]: e["reason"] for e in router.cluster()["engines"]}
        found = {e: wall() for e in engines if "counters have not moved" in shown[e]} | found
        time.sleep(0.02)
    return found


def load_of(router: RouterProcess, engine: str) -> int:
    """Requests that run on it."""
    shown: dict[str, Any] = next(e for e in router.cluster()["engines"] if e["id"] == engine)
    return int(shown["load"]["running"])


def exits(options: argparse.Namespace, router: RouterProcess, host: RealHost) -> list[float]:
    """kill -9 of engines; each at most four times, for the fifth death within ten minutes holds it."""
    found = []
    for trial in range(min(options.trials, 4 * len(host.engines))):
        host.wait_ready()
        engine = host.engines[trial % len(host.engines)]
        began = wall()
        send(host.pids()[engine], signal.SIGKILL)
        time.sleep(1.0)
        found.append(first_seen(router, began, "engine changed", engine, {"dead"}) - began)
    return found


def calm(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Nobody dies: is anybody declared dead?"""
    router = RouterProcess(scratch)
    keys = router.enrol(*(f"h{i:02}" for i in range(HOSTS - 2)))
    with (
        router,
        fleet(router, keys) as hosts,
        RealHost(router, Role.PREFILL, "pre", 1) as prefill,
        RealHost(router, Role.DECODE, "dec", 1) as decode,
    ):
        prefill.wait_ready()
        decode.wait_ready()
        heard(hosts, b"joined")
        for name in keys:  # stub engines answer no requests
            for engine in (f"{name}-p", f"{name}-d"):
                httpx2.post(f"http://127.0.0.1:{router.admin}/admin/engines/{engine}/drain", json={})
        since = wall()
        with Clients(router, 2, 8) as clients, burners():
            time.sleep(60 * options.minutes)
        rows = [calm_row(f"{options.minutes:g} min at {BUSY_SHARE:.0%} load of both cores", router, since, clients)]
        since = wall()
        with Clients(router, 2, 8) as clients:
            for _ in range(3):
                send(router.pid, signal.SIGSTOP)
                time.sleep(3.0)
                send(router.pid, signal.SIGCONT)
                time.sleep(4.0)
        return [*rows, calm_row("the router stands still for 3 s, three times", router, since, clients)]


def calm_row(what: str, router: RouterProcess, since: float, clients: Clients) -> Row:
    """What was thought and lost."""
    found = downs(router, since)
    faults = f", first: {clients.faults[0]}" if clients.faults else ""
    thought = f"{found['dead']} dead, {found['silent']} silent, {found['suspect']} suspect"
    text = f"{thought}; {len(clients.faults)} of {clients.asked} requests lost{faults}"
    return Row(what, text, "0 dead, 0 lost", not (found["dead"] or clients.faults))


@contextmanager
def burners() -> Iterator[None]:
    """Keeps each core busy for most of the time."""
    busy_s, idle_s = BUSY_SHARE / 10, (1 - BUSY_SHARE) / 10
    code = f"import time\nwhile True:\n e = time.perf_counter() + {busy_s}\n while time.perf_counter() < e: pass\n time.sleep({idle_s})"
    with ExitStack() as stack:
        for core in pick_cores():
            process = subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", code])
            stack.callback(end, process)
        yield


# --- the flood


def flood(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Time to the first token while somebody attacks, against the same attack on somebody else."""
    rig = Rig(build(), *pick_cores())
    attacks: dict[str, Callable[[RouterProcess, KeyPair, str, bool], Any]] = {
        f"{MESSAGES_PER_S:,} messages/s": flooded,
        f"{CONNECTIONS:,} idle connections": crowded,
    }
    rows = []
    for what, attack in attacks.items():
        changes, pairs = [], []
        for pair in range(options.pairs):
            found = {}
            for real in (True, False) if pair % 2 else (False, True):
                folder = Path(tempfile.mkdtemp(dir=scratch))
                found[real] = first_token_p99_us(rig, folder, attack, real, options)
            changes.append(100 * (found[True] / found[False] - 1))
            pairs.append(f"{found[False]:.0f}→{found[True]:.0f}")
            say(f"{what}: pair {pair + 1}: {pairs[-1]} µs, {changes[-1]:+.1f} %")
        median = statistics.median(changes)
        text = f"median {median:+.1f} % ({min(changes):+.1f} to {max(changes):+.1f}); µs: {' '.join(pairs)}"
        rows.append(Row(f"TTFT p99 under {what}", text, "+10 %", median <= 10))
    return rows


def first_token_p99_us(rig: Rig, folder: Path, attack: Any, real: bool, options: argparse.Namespace) -> float:
    """One run: the router on its core, everything else on the other."""
    with ExitStack() as stack:
        fakes = stack.enter_context(Fakes(rig))
        flags = ["--prefill", f"http://127.0.0.1:{fakes.prefill},{BOOTSTRAP_PORT}", "--decode", f"http://127.0.0.1:{fakes.decode}"]
        router = RouterProcess(folder, *flags, core=rig.router_core)
        key = router.enrol("evil")["evil"]
        stack.enter_context(router)
        wait_for(lambda: httpx2.get(f"http://127.0.0.1:{router.http}/readyz").status_code == 200, 20, "the router has no pair")
        stack.enter_context(attack(router, key, str(rig.rig_core), real))
        load = FLOOD_LOAD
        before = router.cpu_s()
        measured = load.run(rig, router.http)
        busy = {name: value - before.get(name, 0.0) for name, value in router.cpu_s().items()}
        shares = ", ".join(f"{name} {100 * value / (load.seconds + load.warmup_s):.0f} %" for name, value in busy.items() if value > 0.05)
        if measured.errors and sum(measured.errors.values()):
            raise RigError(f"the load met errors: {measured.errors}")
        first = measured.first_us
        who = "attack" if real else "control"
        say(f"{who}: TTFT p50 {first.p50:.0f} p99 {first.p99:.0f} µs ({measured.requests} requests), router: {shares}")
        return measured.first_us.p99


@contextmanager
def flooded(router: RouterProcess, key: KeyPair, core: str, real: bool) -> Iterator[None]:
    """A registered host that says far too much: to the router, or to a sink on the other core."""
    with ExitStack() as stack:
        port, router_key = router.control, router.key.public
        if not real:
            sink = stack.enter_context(python_module("tests.rig.attacker", "sink", core=int(core)))
            words = heard(sink, b" ").decode().split()
            port, router_key = int(words[0]), words[1]
        stdin = msgspec.json.encode({"public": key.public, "secret": key.secret, "router": router_key})
        attacker = stack.enter_context(
            python_module("tests.rig.attacker", "flood", str(port), str(MESSAGES_PER_S), core=int(core), stdin=stdin)
        )
        say(heard(attacker, b"attempted").decode().strip())
        yield


@contextmanager
def crowded(router: RouterProcess, key: KeyPair, core: str, real: bool) -> Iterator[None]:
    """Connections that say nothing."""
    with ExitStack() as stack:
        port = router.control
        if not real:
            sink = stack.enter_context(python_module("tests.rig.attacker", "sink", core=int(core)))
            port = int(heard(sink, b" ").split()[0])
        attacker = stack.enter_context(python_module("tests.rig.attacker", "idle", str(port), str(CONNECTIONS), core=int(core)))
        heard(attacker, b"open")
        yield


# --- the command


def table(rows: list[Row]) -> str:
    """For people."""
    words = {True: "reached", False: "MISSED", None: ""}
    lines = [f"| {row.what} | {row.found} | {row.target} | {words[row.ok]} |" for row in rows]
    return "\n".join(["| what | found | target | |", "|---|---|---|---|", *lines]) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-control", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {' '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="how long nobody may be declared dead (default: %(default)s; record: 10)"
    )
    parser.add_argument("--trials", type=int, default=20, help="how often each failure is made (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="attack and control runs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="router starts in `steady` (default: %(default)s)")
    parser.add_argument("--window", type=float, default=10.0, help="seconds over which CPU is measured (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    return options


def main() -> None:
    """Measures and prints a table; 1 when a target is missed."""
    options = parse(sys.argv[1:])
    set_limits()
    measures = {"steady": steady, "silence": silence, "engines": engines, "calm": calm, "flood": flood}
    rows: list[Row] = []
    try:
        for part in options.parts:
            with tempfile.TemporaryDirectory(prefix="disagg-control-") as scratch:
                found = measures[part](options, Path(scratch))
            for row in found:
                say(f"{row.what}: {row.found}")
            rows += found
    except RigError as error:
        say(str(error))
        sys.exit(1)
    sys.stdout.write(table(rows))
    sys.exit(1 if any(row.ok is False for row in rows) else 0)


if __name__ == "__main__":
    main()
