"""An open-loop load of questions whose one right answer is known: greedy answers, asked for once while nothing is broken."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.chaos.answers import Said, stream, whole
from tests.chaos.judge import Entry, Heard, outcome_of
from tests.cluster.prompts import prompt_ids

ROUTES = ("/v1/chat/completions", "/v1/completions", "/generate")
PROMPTS = 8
"""Of each route."""
LIMIT_S = 60.0
"""After that a request is stuck."""
TOKENS = (20, 60)
SLOW_READ_BYTES = 256
SLOW_PAUSE_S = 0.1
LEAVE_WITHIN_S = 2.0
AT_ONCE = 6  # questions under way while the right answers are asked for


@dataclass(frozen=True)
class Question:
    """One question and its right answer."""

    route: str
    body: dict[str, Any]
    right: Said = field(default=Said(), compare=False)

    def streamed(self) -> dict[str, Any]:
        options = {} if self.route == "/generate" else {"stream_options": {"include_usage": True}}
        return {**self.body, "stream": True, **options}


def questions(chance: random.Random) -> list[Question]:
    """Short and long prompts, for each route."""
    found = []
    for number in range(PROMPTS):
        tokens, length = chance.randint(*TOKENS), chance.choice((12, 60, 200, 600))
        words = " ".join(chance.choice(WORDS) for _ in range(length // 2))
        common = {"model": "demo", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        found += [
            Question(ROUTES[0], {**common, "messages": [{"role": "user", "content": f"{number}: {words}"}]}),
            Question(ROUTES[1], {**common, "prompt": f"{number} {words}"}),
            Question(
                ROUTES[2],
                {
                    "input_ids": prompt_ids(length, number),
                    "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
                },
            ),
        ]
    return found


WORDS = ("lantern", "fox", "river", "small", "told", "night", "the", "and", "house", "went", "bright", "tree", "said", "old", "water")


class LoadError(Exception):
    """The right answers cannot be had."""


@dataclass
class Load:
    """Asks, and keeps the log of it.

    Attributes:
        rate: questions a second; may be changed at any time.
        leaving: the share of clients that leave before the end.
        slow: the share of streams that are read slowly.
    """

    url: str
    clock: Callable[[], float]
    chance: random.Random
    rate: float
    burst: float = 1.0
    leaving: float = 0.0
    slow: float = 0.0
    entries: list[Entry] = field(default_factory=list)
    live: int = 0
    _questions: list[Question] = field(default_factory=list)

    async def learn(self) -> None:
        """Asks for every right answer, whole and as a stream, which must be the same.

        Raises:
            LoadError: the quiet cluster does not give one right answer.
        """
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(question: Question) -> Question:
            async with gate, self._session() as session:
                told = await self._ask(session, question, streamed=False)
                again = await self._ask(session, question, streamed=True)
            if told.status != 200 or again.status != 200:
                raise LoadError(f"a quiet cluster answers {question.route} with {told.status} and {again.status}: {told.raw[:200]!r}")
            right, flowed = whole(question.route, told.raw), stream(question.route, again.raw)
            # The native route's stream has an end of its own beside the finish reason.
            if right != flowed or not right.text or not right.finish:
                raise LoadError(f"a quiet cluster gives two answers on {question.route}: {right} and {flowed}")
            return Question(question.route, question.body, right)

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(one(q), name="learn") for q in questions(self.chance)]
        self._questions = [task.result() for task in asked]

    async def run(self, enough: asyncio.Event) -> None:
        """Asks until it is enough, then waits for what is under way."""
        async with asyncio.TaskGroup() as group:
            while not enough.is_set():
                group.create_task(self._one(self.chance.choice(self._questions)), name="a question")
                pause = self.chance.expovariate(self.rate * self.burst)
                with suppress(TimeoutError):
                    await asyncio.wait_for(enough.wait(), pause)

    async def _one(self, question: Question) -> None:
        streamed = self.chance.random() < 0.6
        leave_s = self.chance.uniform(0, LEAVE_WITHIN_S) if self.chance.random() < self.leaving else None
        slow = streamed and self.chance.random() < self.slow
        told = _Told()
        began = self.clock()
        self.live += 1
        try:
            async with self._session(slow=slow) as session:
                heard = await self._ask(session, question, streamed=streamed, slow=slow, leave_s=leave_s, told=told)
        finally:
            self.live -= 1
        outcome, detail = outcome_of(question.route, streamed, heard, question.right)
        first_s = told.first_at - began if streamed and told.first_at is not None else None
        self.entries.append(Entry(began, self.clock(), question.route, streamed, outcome, detail, first_s, told.attempts, told.request_id))

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        question: Question,
        *,
        streamed: bool,
        slow: bool = False,
        leave_s: float | None = None,
        told: _Told | None = None,
    ) -> Heard:
        told = told or _Told()
        body = question.streamed() if streamed else question.body
        try:
            async with asyncio.timeout(LIMIT_S if leave_s is None else leave_s):
                async with session.post(self.url + question.route, json=body) as answer:
                    told.begins(answer)
                    while data := await answer.content.read(SLOW_READ_BYTES if slow else -1 if not streamed else 65536):
                        told.hears(data, self.clock())
                        if slow:
                            await asyncio.sleep(SLOW_PAUSE_S)
        except TimeoutError:
            return told.heard("stuck" if leave_s is None else "left")
        except (aiohttp.ClientError, OSError) as error:
            return told.heard(f"{type(error).__name__}: {error}")
        return told.heard("end")

    def _session(self, *, slow: bool = False) -> aiohttp.ClientSession:
        """A connection of its own for each client, so that nobody trips over another one's."""
        connector = aiohttp.TCPConnector(force_close=True, socket_factory=_narrow if slow else None)
        return aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=SLOW_READ_BYTES if slow else 65536
        )


def _narrow(address: Any) -> socket.socket:
    """A socket that takes little ahead of its reader."""
    made = socket.socket(address[0], address[1], address[2])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.setblocking(False)
    return made


@dataclass
class _Told:
    """What a client has of its answer so far."""

    status: int = 0
    raw: bytearray = field(default_factory=bytearray)
    first_at: float | None = None
    attempts: int = 1
    request_id: str = ""

    def begins(self, answer: aiohttp.ClientResponse) -> None:
        self.status = answer.status
        self.request_id = answer.headers.get("x-request-id", "")
        self.attempts = int(answer.headers.get("x-disagg-attempts", "1"))

    def hears(self, data: bytes, now: float) -> None:
        self.raw += data
        self.first_at = now if self.first_at is None else self.first_at

    def heard(self, end: str) -> Heard:
        return Heard(self.status, bytes(self.raw), end)
