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
from disagg.errors import DeadlineError, DisaggError, EngineError, EngineTimeoutError, NoCapacityError
from disagg.model import Choice, ClusterView, EngineId


class TakenOutError(EngineError):
    """Somebody wants an engine for something else: that is nobody's fault."""


class Examiner:
    """Tries pairs.

    Args:
        view: returns the current view of the cluster.
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
        view: Callable[[], ClusterView],
        ask: Callable[[Choice, bytes], Awaitable[bytes]],
        spawn: Callable[[Coroutine[Any, Any, None], str], Any],
        new_salt: Callable[[], str],
        on_judged: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._view = view
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

    def rests(self, now: float) -> bool:
        """All pairs have answered, or are to be asked again later only."""
        return self._machine.rests(now)

    def look(self, now: float) -> None:
        """Called at each beat: looks whether there are pairs to try."""
        view = self._view()
        seen = tuple((e.slot, e.address.pid, e.address.role, e.state, e.facts.model) for e in view.engines)
        if seen != self._seen:
            self._seen = seen
            self._feed(ViewChanged(view), now)
        else:
            due = self._machine.next_deadline()
            if due is not None and now >= due:
                self._feed(Tick(), now)

    async def prove(self, choice: Choice) -> str:
        """Has a pair of which one engine is not in service yet answer, and compares.

        Returns:
            A sentence about its answers.

        Raises:
            DisaggError: it does not answer, or answers otherwise than the others do.
        """
        began = self._loop.time()
        try:
            answers = await self._examine(choice, in_service=1)
        except (TakenOutError, EngineTimeoutError, DeadlineError, NoCapacityError) as error:
            return f"it was not proved yet: {error}"  # a partner with a long queue is no reason to load a model anew
        wrong = self._machine.against(choice, answers)
        self.outcomes["differs" if wrong else "same"] += 1
        if wrong:
            raise EngineError(f"{pairing(choice)} answers wrong: {wrong}")
        return f"{pairing(choice)} answered its canaries in {self._loop.time() - began:.2f} s"

    async def reach(self, choice: Choice) -> None:
        """Has a pair answer one short prompt; what it answers is no matter here.

        Raises:
            DisaggError: it does not.
        """
        read_answer(await self._ask(choice, request(PROMPTS[0], self._new_salt())))

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
            event = Answered(asked.pairing, await self._examine(asked.choice, in_service=2))
        except DisaggError as error:
            self.outcomes["failed"] += not isinstance(error, TakenOutError)
            self._log.info("a canary was not answered", by=str(asked.pairing), why=str(error))
            event = Failed(asked.pairing, str(error))
        except Exception:  # noqa: BLE001  # a fault of ours must not end all canaries
            self.outcomes["failed"] += 1
            self._log.exception("a canary failed", by=str(asked.pairing))
            event = Failed(asked.pairing, "a fault of the router's")
        self._feed(event, self._loop.time())
        if isinstance(event, Answered):
            self.outcomes["differs" if asked.pairing.names in self.quarantined else "same"] += 1

    async def _examine(self, choice: Choice, *, in_service: int) -> Answers:
        answers = []
        for prompt in PROMPTS:
            self._refuse_taken_out(choice, in_service)
            answers.append(read_answer(await self._ask(choice, request(prompt, self._new_salt()))))
        return tuple(answers)

    def _refuse_taken_out(self, choice: Choice, in_service: int) -> None:
        """Between two prompts an engine is idle, so a switch may have begun: asked now, a prompt would wait there for nobody.

        Raises:
            TakenOutError: fewer of the pair are in service than there should be.
        """
        engines = {e.id: e for e in self._view().engines}
        pair = [e for e in (choice.prefill, choice.decode) if e is not None]
        ready = [e for e in pair if e.id in engines and engines[e.id].serves_as(e)]
        if len(ready) < min(in_service, len(pair)):
            gone = next(e.id for e in pair if e not in ready)
            raise TakenOutError(f"{gone} was taken out of service before it had answered its canaries")
