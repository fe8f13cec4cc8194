"""Engines that are killed, one after the other, under whole answers and streams: none may be lost or wrong while another engine is there.

Started by ``scripts/kills``. Three prefill and three decode engines, embedded, paced and without arithmetic, of which one is killed every
two seconds and started anew on its ports; one router, to which they were given by address.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec

from tests.engines import EngineProcess, launch_engine
from tests.ports import free_port

ROLES = ("prefill", "decode") * 3
CLIENTS = 24
QUESTIONS = 50
TOKENS = 8
EVERY_S = 2.0
PACE = ("--paced", "10,0.05;10,0.2", "--paced-compute", "off")
READY_LIMIT_S = 30.0
WENT_ON = ('disagg_resumes_total{outcome="resumed"}', 'disagg_resumes_total{outcome="completed"}')


@dataclass
class Tally:
    """What became of the answers.

    Attributes:
        attempts: how many needed so many attempts before their client heard anything.
        went_on: streams that were cut when their client had heard something, by the router's count.
    """

    kills: int = 0
    right: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    longest_s: float = 0.0
    went_on: int = 0

    def __str__(self) -> str:
        again = sum(count for attempts, count in self.attempts.items() if attempts > 1)
        bad = f"{self.bad.total()} lost or wrong{f' {dict(self.bad)}' if self.bad else ''}"
        return (
            f"{self.kills} kills, {self.right} answers right, {again} of them after another attempt, {self.went_on} streams went on "
            f"elsewhere, {bad}; the longest took {self.longest_s:.2f} s"
        )


class Town:
    """The engines and their router."""

    def __init__(self) -> None:
        self.engines: list[EngineProcess] = []
        self.url = f"http://127.0.0.1:{free_port()}"
        self.admin = f"http://127.0.0.1:{free_port()}"

    @contextmanager
    def running(self) -> Iterator[Town]:
        """Until the block ends."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-"))
            self.engines = [launch_engine(role, extra_args=PACE) for role in ROLES]
            stack.callback(lambda: [engine.stop() for engine in self.engines])
            for engine in self.engines:
                engine.wait_ready()
            given = [word for engine in self.engines for word in (f"--{engine.role}", _address(engine))]
            places = ["--http", self.url.removeprefix("http://"), "--admin", self.admin.removeprefix("http://"), "--control", "127.0.0.1:0"]
            command = [sys.executable, "-m", "disagg", "serve", "--role", "router", *places, *given, "--log-level", "error"]
            with (Path(folder) / "log").open("wb") as log:
                router = subprocess.Popen(
                    [*command, "--state-dir", str(Path(folder) / "state")], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
                )
            stack.callback(router.wait)
            stack.callback(router.terminate)
            yield self

    def kill(self, number: int) -> None:
        """One of them dies, and another is started in its place, with its ports."""
        old = self.engines[number]
        old.kill()
        ports = ("--port", old.url.rpartition(":")[2], "--disaggregation-bootstrap-port", str(old.bootstrap_port))
        self.engines[number] = launch_engine(old.role, extra_args=(*PACE, *ports))
        old.stop()


def _address(engine: EngineProcess) -> str:
    return f"{engine.url},{engine.bootstrap_port}" if engine.role == "prefill" else engine.url


class Clients:
    """They know what is right, and ask."""

    def __init__(self, session: aiohttp.ClientSession, town: Town, tally: Tally) -> None:
        self._session = session
        self._url = f"{town.url}/v1/completions"
        self._metrics = f"{town.admin}/metrics"
        self._tally = tally
        self._right: list[str] = []
        self.over = False

    async def ask(self, question: int, *, stream: bool = False) -> tuple[int, str, int]:
        """Status, text (or what was wrong), attempts."""
        body = {
            "prompt": f"Question {question}: " + "why? " * question,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        async with self._session.post(self._url, json=body) as response:
            raw = await response.text()
            if response.status != 200:
                return response.status, raw, 0
            text = _streamed(raw) if stream else msgspec.json.decode(raw)["choices"][0]["text"]
            return 200, text, int(response.headers["x-disagg-attempts"])

    async def count(self) -> None:
        """Asks the router how many streams went on."""
        async with self._session.get(self._metrics) as response:
            lines = (await response.text()).splitlines()
        self._tally.went_on = sum(int(float(line.split()[-1])) for line in lines if line.startswith(WENT_ON))

    async def learn(self) -> None:
        """What is right, while nothing is killed."""
        async with asyncio.timeout(READY_LIMIT_S):
            while (await self._try(0))[0] != 200:  # noqa: ASYNC110  # HTTP has no event
                await asyncio.sleep(0.1)
        answers = [await self.ask(question) for question in range(QUESTIONS)]
        assert all(status == 200 for status, _, _ in answers), answers
        self._right = [text for _, text, _ in answers]
        assert len(set(self._right)) > QUESTIONS // 2, "answers that are all the same prove nothing"

    async def _try(self, question: int, *, stream: bool = False) -> tuple[int, str, int]:
        try:
            return await self.ask(question, stream=stream)
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, type(error).__name__, 0

    async def client(self, number: int) -> None:
        """Asks one question after the other, until it is over."""
        question, tally, stream = number, self._tally, bool(number % 2)
        while not self.over:
            question = (question + 1) % QUESTIONS
            began = time.monotonic()
            status, text, attempts = await self._try(question, stream=stream)
            tally.longest_s = max(tally.longest_s, time.monotonic() - began)
            if status == 200 and text == self._right[question]:
                tally.right += 1
                tally.attempts[attempts] += 1
            else:
                tally.bad["wrong text" if status == 200 else f"{status} {text[:120]}"] += 1


def _streamed(raw: str) -> str:
    """What a stream said; with its error in it where it did not come to its end."""
    *events, done = [event.removeprefix("data: ") for event in raw.split("\n\n") if event]
    told = [msgspec.json.decode(event) for event in events]
    text = "".join(event["choices"][0]["text"] if "choices" in event else f"[{event}]" for event in told)
    return text if done == "[DONE]" else f"{text}[{done}]"


async def run(kills: int, answers: int, seed: int, every_s: float = EVERY_S, *, show: bool = True) -> Tally:
    """Kills so many engines, and goes on until there are so many answers."""
    tally, chance = Tally(), random.Random(seed)
    with Town().running() as town:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(60), cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            clients = Clients(session, town, tally)
            await clients.learn()
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(clients.client(number))
                while tally.kills < kills or tally.right < answers:
                    await asyncio.sleep(every_s)
                    if tally.kills < kills:
                        victim = chance.randrange(len(ROLES))
                        await asyncio.to_thread(town.kill, victim)
                        tally.kills += 1
                        await asyncio.to_thread(town.engines[victim].wait_ready)  # so that another engine of its role is always there
                    if show and tally.kills % 10 == 0:
                        await clients.count()
                        sys.stderr.write(f"kills: {tally}\n")
                clients.over = True
            await clients.count()
    return tally


def main() -> None:
    """Kills and prints what became of the answers; 1 if any was lost or wrong."""
    parser = argparse.ArgumentParser(prog="scripts/kills", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("kills", type=int, nargs="?", default=200, help="how many engines are killed (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=20_000, help="how many answers at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of who is killed (default: %(default)s)")
    options = parser.parse_args()
    tally = asyncio.run(run(options.kills, options.answers, options.seed))
    sys.stdout.write(f"{tally}\n")
    sys.exit(1 if tally.bad else 0)


if __name__ == "__main__":
    main()
