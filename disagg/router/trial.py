"""One request before the ledger of those that kill engines: where it may go, when it is proved innocent, when it is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disagg.errors import CrashedError
from disagg.model import EngineId, EngineView
from disagg.policy.blame import Ledger

PATIENCE_S = 0.5
"""For how long suspects and newcomers keep away from each other; suspects from one another always. Each newcomer may pay this much."""


class Trial:
    """What the ledger is told of one request.

    Args:
        ledger: of all requests.
        fingerprint: of the body, keyed.
        clock: monotonic seconds.
        on_room: called when engines are open again that were closed to others.
    """

    __slots__ = ("_began_at", "_clock", "_engines", "_ledger", "_on_room", "_sent_at", "fingerprint")

    def __init__(self, ledger: Ledger, fingerprint: int, clock: Callable[[], float], on_room: Callable[[], None]) -> None:
        self.fingerprint = fingerprint
        self._ledger = ledger
        self._clock = clock
        self._on_room = on_room
        self._began_at = 0.0
        self._sent_at = 0.0
        self._engines: Sequence[EngineId] = ()

    @property
    def is_suspect(self) -> bool:
        """It was there when an engine died."""
        return not self._ledger.is_calm and self._ledger.is_suspect(self.fingerprint, self._clock())

    @property
    def past(self) -> int:
        """It is proved when it has given more tokens than these."""
        return self._ledger.past(self.fingerprint)

    def check(self) -> None:
        """Raises CrashedError: it killed engines."""
        if self._ledger.is_calm:
            return
        left_s = self._ledger.blocked(self.fingerprint, self._clock())
        if left_s:
            sentence = f"engines died while they worked on this very request, so it is not tried again for {left_s:.0f} s"
            raise CrashedError(sentence)

    def begin(self) -> None:
        """It looks for engines from now on."""
        self._began_at = self._clock()

    def shut(self) -> tuple[EngineId, ...] | None:
        """Engines that are closed to it at the moment; None: all, until it is known what becomes of a copy of it.

        Raises:
            CrashedError: all for good, for what a copy of it did meanwhile.
        """
        if self._ledger.is_calm:
            return ()
        self.check()
        now = self._clock()
        return self._ledger.shut(self.fingerprint, now, patient=now - self._began_at < PATIENCE_S)

    def next_change(self, now: float) -> float | None:
        """When its patience ends, monotonic seconds, and more may be open to it; None if it has ended."""
        ends_at = self._began_at + PATIENCE_S
        return ends_at if ends_at > now else None

    def sent(self, engines: Sequence[EngineId]) -> None:
        """It goes to these engines."""
        self._engines = engines
        self._sent_at = self._clock()
        self._ledger.sent(self.fingerprint, engines)

    def prove(self) -> None:
        """It came further than where its engine had died, or to its end."""
        self._settle(self._ledger.proved)

    @property
    def solitude(self) -> tuple[float, float]:
        """For an answer of which no tokens are seen: seconds until it is to be freed, and until it is to be proved."""
        return self._ledger.solitude(self.fingerprint)

    def free(self) -> None:
        """It has been alone for long enough."""
        if self._engines:
            self._ledger.freed(self.fingerprint, self._engines)
            self._on_room()

    def end(self) -> None:
        """It runs there no longer, which proves nothing."""
        self._settle(self._ledger.ended)

    def _settle(self, tell: Callable[[int, Sequence[EngineId]], None]) -> None:
        engines, self._engines = self._engines, ()
        if engines:
            was_calm = self._ledger.is_calm
            tell(self.fingerprint, engines)
            if not was_calm:
                self._on_room()

    def engine_died(self, engine: EngineView, tokens: int) -> None:
        """The process died under it.

        Args:
            engine: as it was chosen.
            tokens: that it had been seen to give.
        """
        self._ledger.died(engine.id, {self.fingerprint: tokens}, self._clock(), sent_at=self._sent_at)
