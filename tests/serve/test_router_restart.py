"""F09 and F08: a router that is restarted on purpose, behind a socket that somebody else holds open; and one that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from disagg.model import Role
from tests import canaries
from tests.fake_engine import Call, FakeEngine, chat_answer, fake_engine
from tests.ports import free_port
from tests.serve.conftest import Site, is_engine, wait_for
from tests.serve.streams import Answer

pytestmark = pytest.mark.slow

RESTARTS = int(os.environ.get("DISAGG_TEST_RESTARTS", "3"))
"""FAILURES.md wants 20, which scripts/drains makes."""
CLIENTS = 4
LIMIT_S = 30.0
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "say it"}], "max_tokens": 4}
SYSTEMD = """
import os, sys
if sys.argv[1] != "-1":
    os.dup2(int(sys.argv[1]), 3)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}
os.execv(sys.executable, [sys.executable, "-m", "disagg", *sys.argv[2:]])
"""
"""What systemd does between fork and exec for a service with a socket unit; without a descriptor, for one without."""


class Service:
    """A router and, like a socket unit, its listening socket."""

    def __init__(self, folder: Path, engines: Sequence[FakeEngine], *, held: bool) -> None:
        self._starts = 0
        self.log = folder / "log"
        self.socket = socket.create_server(("127.0.0.1", 0 if held else free_port()), backlog=512)
        self.url = "http://{}:{}".format(*self.socket.getsockname())
        places = ["--http", self.url[7:], "--admin", f"127.0.0.1:{free_port()}", "--control", "127.0.0.1:0"]
        given = [word for e in engines for word in (f"--{e.role}", e.address.url)]
        self._arguments = ["serve", "--role", "router", *places, *given, "--state-dir", str(folder / "s"), "--log-format", "json"]
        self._held = held
        self._process: asyncio.subprocess.Process | None = None
        if not held:
            self.socket.close()

    async def start(self) -> None:
        number = self.socket.fileno() if self._held else -1
        with self.log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", SYSTEMD, str(number), *self._arguments),
                pass_fds=[number] if self._held else [],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        async with asyncio.timeout(LIMIT_S):
            while self.log.read_text().count("Started in") < self._starts + 1:  # another process writes it
                assert self._process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.02)
        self._starts += 1

    async def stop(self) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
        async with asyncio.timeout(LIMIT_S):
            return await self._process.wait()

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self.socket.close()


class Load:
    """Clients that ask one short question after the other: half of them anew each time, half on a connection that they keep."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.going = True
        self._url = url

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(keeps=number % 2 == 0))

    async def _client(self, *, keeps: bool) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=not keeps, limit=1)) as session:
            while self.going:
                self.outcomes[await self._ask(session)] += 1
                await asyncio.sleep(0.005)

    async def _ask(self, session: aiohttp.ClientSession) -> str:
        try:
            async with session.post(self._url + "/v1/chat/completions", json=CHAT) as response:
                body = await response.json()
                return "answered" if response.status == 200 and body == chat_answer("alpha beta gamma") else f"{response.status} {body}"
        except (aiohttp.ClientError, OSError) as error:
            return f"{type(error).__name__}: {error}"


async def a_little_later(call: Call) -> None:
    await asyncio.sleep(0.05)
    await call.json_answer(chat_answer("alpha beta gamma"))


@asynccontextmanager
async def under_load(folder: Path, *, held: bool) -> AsyncIterator[tuple[Service, Load]]:
    async with fake_engine(Role.UNIFIED, 0, "fake") as engine:
        engine.behave = a_little_later
        service = Service(folder, [engine], held=held)
        try:
            await service.start()
            load = Load(service.url)
            async with asyncio.TaskGroup() as group:
                group.create_task(load.run())
                yield service, load
                load.going = False
        finally:
            await service.close()


async def restarted(folder: Path, times: int, *, held: bool) -> Counter[str]:
    """What clients were told while the router was restarted so many times."""
    async with under_load(folder, held=held) as (service, load):
        for _ in range(times):
            seen = load.outcomes.total()
            async with asyncio.timeout(LIMIT_S):
                while load.outcomes.total() < seen + 2 * CLIENTS:  # noqa: ASYNC110  # whoever waited is served, and some more
                    await asyncio.sleep(0.01)
            assert await service.stop() == 0
            await service.start()
    return load.outcomes


async def test_a_restart_behind_a_held_socket_refuses_and_loses_nobody(tmp_path: Path) -> None:
    outcomes = await restarted(tmp_path, RESTARTS, held=True)
    assert outcomes.keys() == {"answered"}, outcomes
    assert outcomes["answered"] >= 2 * CLIENTS * RESTARTS


async def test_without_it_clients_are_refused(tmp_path: Path) -> None:
    """The defence off: a router that listens for itself, as one that a person starts by hand."""
    outcomes = await restarted(tmp_path, 1, held=False)
    assert any("Cannot connect" in outcome for outcome in outcomes), outcomes


async def test_who_has_connected_and_says_nothing_does_not_hold_up_the_restart(tmp_path: Path) -> None:
    async with fake_engine(Role.UNIFIED, 0, "fake") as engine:
        service = Service(tmp_path, [engine], held=True)
        try:
            await service.start()
            reader, writer = await asyncio.open_connection(*service.socket.getsockname())
            await asyncio.sleep(0)
            assert await service.stop() == 0
            assert await reader.read() == b""
            writer.close()
        finally:
            await service.close()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("udp", "does not listen for TCP"),
        ("unix", "does not listen for TCP"),
        ("file", "is no socket"),
        ("deaf", "does not listen for TCP"),
    ],
)
async def test_what_cannot_be_listened_on_is_one_sentence(what: str, sentence: str, tmp_path: Path) -> None:
    made: dict[str, socket.socket] = {
        "udp": socket.socket(type=socket.SOCK_DGRAM),
        "unix": socket.socket(socket.AF_UNIX),
        "deaf": socket.socket(),
    }
    with (tmp_path / "file").open("wb") as file:
        number = made[what].fileno() if what in made else file.fileno()
        command = (sys.executable, "-c", SYSTEMD, str(number), "serve", "--role", "router", "--state-dir", str(tmp_path / "s"))
        process = await asyncio.create_subprocess_exec(
            *command, pass_fds=[number], stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, cwd=tmp_path
        )
        async with asyncio.timeout(LIMIT_S):
            _, err = await process.communicate()
    for each in made.values():
        each.close()
    assert process.returncode == 1
    (line,) = err.decode().splitlines()
    assert sentence in line


# --- F08: killed

READY_S = 3.0


def seconds_to_import() -> float:
    """What Python takes on this machine at this moment to load the router: no part of the bound, where others want the processor too."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import disagg.server"], check=True, timeout=LIMIT_S)
    return time.monotonic() - began


def test_a_killed_router_is_back_within_three_seconds_and_its_engines_never_notice(site: Site) -> None:
    """Agents register again, engines are the same processes; who had a stream hears of it at once, from the kernel."""
    site.start_host("p", "prefill")
    site.start_host("d", "decode", "--engine-arg=--paced", "--engine-arg=1,0;20,0")
    before = {name: site.wait_engine(name, "ready")["pid"] for name in ("p", "d")}
    wait_for(lambda: canaries.are_over(site.admin), "canaries are not over")
    back_s: list[float] = []
    while not back_s or (min(back_s) > READY_S and len(back_s) < 3):  # a busy machine may take longer now and then
        python_s = seconds_to_import()
        answers = [Answer(site.url, "go on", 1000) for _ in range(8)]
        wait_for(lambda a=answers: all(each.text for each in a), lambda a=answers: str([each.error for each in a]))  # type: ignore[misc]
        assert site.router is not None
        site.router.end(signal.SIGKILL)
        killed_at = time.monotonic()
        for answer in answers:
            answer.join(5)
            assert not answer.is_alive()
            assert not answer.done
            assert "Error" in answer.error, "the connection broke"
        site.start_router()
        wait_for(lambda: site.answers("/readyz"), lambda: json.dumps(site.cluster()))
        back_s.append(time.monotonic() - killed_at - python_s)
    assert min(back_s) <= READY_S, back_s
    assert {name: site.wait_engine(name, "ready")["pid"] for name in ("p", "d")} == before
    assert all(is_engine(pid) for pid in before.values())
    assert site.ask().status_code == 200
