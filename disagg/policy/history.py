"""Which engine was given which prompt: the router's own guess at what prefix caches hold, for engines that do not publish it. Pure.

Theory of operation. A prompt is cut into blocks of `BLOCK` bytes, as its client wrote them; a block is named by its bytes and by all that
comes before it, so that two prompts share names as far as they begin alike. The next turn of a conversation repeats the bytes of the one
before, and so does every request with the same system prompt. (SGLang's own router keeps a radix tree of text per worker for the same end;
names in one dict cost less per decision, and no text is kept.)

An engine holds what it was sent, and gives up what was used least recently, the end of a prompt before its beginning, when it holds more
than it has room for: so do radix caches (SGLang, RadixAttention, 2023). The guess is wrong by what else an engine does. What an
engine publishes of its cache counts for more, see `disagg.policy.books`.

All engines stand in one table: name to a bit for each slot that holds it. A decision walks along the prompt once, however many there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 1024
"""Bytes: some 250 tokens."""
BLOCKS_NAMED = 1024
"""Of one prompt: what comes behind a quarter of a million tokens decides nothing, and naming a block takes a microsecond."""


def names_of(prompt: bytes | memoryview, salt: int = 0) -> list[int]:
    """The names of a prompt's blocks, the first one first; an incomplete block at the end has none.

    Names are Python's keyed hashes, 64 bits: nobody who does not know this process's key can make two of them meet, and none is worth
    anything outside of it.

    Args:
        prompt: as the client wrote it, shape (n,).
        salt: sets prompts apart that must not share a cache: of the model, an adapter, a cache salt.

    Returns:
        n // `BLOCK` names, at most `BLOCKS_NAMED`.
    """
    found = []
    name = salt
    for start in range(0, min(len(prompt), BLOCKS_NAMED * BLOCK) - BLOCK + 1, BLOCK):
        name = hash((name, bytes(prompt[start : start + BLOCK])))
        found.append(name)
    return found


class PrefixHistory:
    """The table. Engines are slots, small numbers; one that was never grown holds nothing."""

    __slots__ = ("_held", "_holders", "_limits")

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # name: bits of slots
        # By slot, the least recently used first. Not dicts: the first key of one is found by walking past all that were deleted before it.
        self._held: list[OrderedDict[int, None]] = []
        self._limits: list[int] = []

    def grow(self, slots: int) -> None:
        """Makes room for engines up to this many slots."""
        for _ in range(slots - len(self._held)):
            self._held.append(OrderedDict())
            self._limits.append(0)

    def resize(self, slot: int, blocks: int) -> None:
        """The engine has room for so many blocks: its KV tokens, by what a token takes of a body."""
        self._limits[slot] = max(0, blocks)
        self._evict(slot)

    def sent(self, slot: int, names: Sequence[int]) -> None:
        """The engine reads this prompt now, and holds it then."""
        held, holders, bit = self._held[slot], self._holders, 1 << slot
        for name in reversed(names):  # the beginning is used last: it is given up after its end
            if name in held:
                held.move_to_end(name)
            else:
                holders[name] = holders.get(name, 0) | bit
                held[name] = None
        self._evict(slot)

    def forget(self, slot: int) -> None:
        """The engine is another process, or its cache was flushed."""
        if slot < len(self._held):
            for name in self._held[slot]:
                self._let_go(name, slot)
            self._held[slot] = OrderedDict()

    def _evict(self, slot: int) -> None:
        held, limit = self._held[slot], self._limits[slot]
        while len(held) > limit:
            self._let_go(held.popitem(last=False)[0], slot)

    def _let_go(self, name: int, slot: int) -> None:
        left = self._holders[name] & ~(1 << slot)
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]

    def leading(self, names: Sequence[int]) -> dict[int, int]:
        """How many leading blocks of a prompt each engine holds, by slot; engines that hold none are left out."""
        found: dict[int, int] = {}
        holders = self._holders
        mask = -1
        for count, name in enumerate(names):
            here = holders.get(name, 0) & mask
            if here != mask:
                if count:
                    _note(found, mask & ~here, count)
                mask = here
                if not mask:
                    return found
        if mask > 0:
            _note(found, mask, len(names))
        return found

    def blocks(self, slot: int) -> int:
        """How many the engine holds."""
        return len(self._held[slot]) if slot < len(self._held) else 0

    def check(self) -> None:
        """Asserts what is always true."""
        bits: dict[int, int] = {}
        for slot, held in enumerate(self._held):
            assert len(held) <= self._limits[slot]
            for name in held:
                bits[name] = bits.get(name, 0) | 1 << slot
        assert bits == self._holders

    def __repr__(self) -> str:
        return f"<PrefixHistory engines={len(self._held)} blocks={len(self._holders)}>"


def _note(found: dict[int, int], bits: int, count: int) -> None:
    while bits:
        low = bits & -bits
        found[low.bit_length() - 1] = count
        bits ^= low
