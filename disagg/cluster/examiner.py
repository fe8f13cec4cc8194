"""Has engines answer canaries and tells the machine what they said: the hands of `Canary`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import structlog

from disagg.cluster.canary import (
    PROMPTS,
    Answered,
    Answers,
    Ask,
    Canary,
    Command,
    Event,
    Failed,
    Judged,
    Tick,
    ViewChanged,
    pairing,
    read_answer,
    request,
)
from disagg.errors import DisaggError, EngineError
from disagg.model import Choice, ClusterView, EngineId


class Examiner:
    """Tries pairs.

    Args:
        ask: has a pair answer one ``/generate`` body; raises DisaggError.
        spawn: runs a coroutine as a task that somebody owns.
        new_salt: a fresh word each time.
        on_judged: told that who is quarantined has changed.

    Attributes:
        outcomes: canaries by how they ended: same, differs, failed.
    """

    def __init__(
        self,
        *,
        ask: Callable[[Choice, bytes], Awaitable[bytes]],
        spawn: Callable[[Coroutine[Any, Any, None], str], Any],
        new_salt: Callable[[], str],
        on_judged: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._ask = ask
        self._spawn = spawn
        self._new_salt = new_salt
        self._on_judged = on_judged
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._machine = Canary()
        self._seen: tuple[Any, ...] = ()

    @property
    def quarantined(self) -> Mapping[tuple[EngineId | None, EngineId], str]:
        """Who must not be used, with the reason."""
        return self._machine.quarantined

    def look(self, view: ClusterView, now: float) -> None:
        """Called at each beat: looks whether there are pairs to try."""
        seen = tuple((e.slot, e.address.pid, e.address.role, e.state, e.facts.model) for e in view.engines)
        if seen != self._seen:
            self._seen = seen
            self._feed(ViewChanged(view), now)
        else:
            due = self._machine.next_deadline()
            if due is not None and now >= due:
                self._feed(Tick(), now)

    async def prove(self, choice: Choice) -> str:
        """Has a pair that is not in service yet answer, and compares.

        Returns:
            A sentence about its answers.

        Raises:
            DisaggError: it does not answer, or answers otherwise than the others do.
        """
        began = self._loop.time()
        answers = await self._examine(choice)
        wrong = self._machine.against(choice, answers)
        self.outcomes["differs" if wrong else "same"] += 1
        if wrong:
            raise EngineError(f"{pairing(choice)} answers wrong: {wrong}")
        return f"{pairing(choice)} answered its canaries in {self._loop.time() - began:.2f} s"

    def _feed(self, event: Event, now: float) -> None:
        for command in self._machine.handle(event, now=now):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case Ask():
                self._spawn(self._try(command), f"canary for {command.pairing}")
            case Judged(sentence=sentence):
                self._log.warning("canary", story=sentence)
                self._on_judged()

    async def _try(self, asked: Ask) -> None:
        event: Event
        try:
            event = Answered(asked.pairing, await self._examine(asked.choice))
        except DisaggError as error:
            self.outcomes["failed"] += 1
            self._log.info("a canary was not answered", by=str(asked.pairing), why=str(error))
            event = Failed(asked.pairing, str(error))
        self._feed(event, self._loop.time())
        if isinstance(event, Answered):
            self.outcomes["differs" if asked.pairing.names in self.quarantined else "same"] += 1

    async def _examine(self, choice: Choice) -> Answers:
        return tuple([read_answer(await self._ask(choice, request(prompt, self._new_salt()))) for prompt in PROMPTS])
