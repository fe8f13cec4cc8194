"""Measures what one decision costs: names of a prompt's blocks, who holds them, what it would meet where, the choice, and the books.

Started by ``scripts/bench-decisions``. It is all in one process and on one core: the pure parts, called as the router calls them. Half of
the prompts begin like one that was sent before, as the next turn of a conversation does. The engines have some prompts to read and a
batch to write, and their lines have been fitted. Refits are done beside the decisions, as in the router, and not counted. It is the time of
the CPU, so that what else the machine does takes no turns in it.

With ``--ids`` prompts are token ids, read already, and the prefill engines publish what they hold, in pages of 16 tokens.
"""

from __future__ import annotations

import argparse
import random
import sys
from array import array
from collections import deque
from statistics import median
from time import thread_time_ns

from disagg.model import Choice, ClusterView, EngineAddress, EngineFacts, EngineId, EngineState, EngineView, Pool, Role
from disagg.policy.books import Books, Prompt
from disagg.policy.forecast import Forecast, Outlook, Reading
from disagg.policy.history import BLOCK, PrefixHistory, names_of
from disagg.policy.prefix import Ids, PrefixIndex, hashes, pack
from disagg.policy.route import InFlight, choose
from disagg.wire.messages import KvDelta, KvSnapshot

KIB = 1024
BYTES_PER_TOKEN = 4
READING = 3
"""Prompts that each prefill engine has to read."""
PAGE = 16
WRITING = 24
"""Answers that each decode engine writes."""


class Router:
    """What a router keeps, and what it does for one request.

    Args:
        prefill, decode: how many engines of each kind.
        blocks: that the prefill engines are known to hold, all together.
    """

    def __init__(self, prefill: int, decode: int, blocks: int, chance: random.Random) -> None:
        self.chance = chance
        self.now = 1000.0
        self.prefills, self.decodes = range(prefill), range(prefill, prefill + decode)
        self.pool = _pool(prefill, decode)
        self.in_flight = InFlight()
        self.in_flight.grow(prefill + decode)
        self.kv = [0] * (prefill + decode)
        self.forecast = Forecast()
        self.forecast.grow(prefill + decode)
        self.history = PrefixHistory()
        self.history.grow(prefill + decode)
        for slot in self.prefills:
            self.history.resize(slot, blocks // prefill)
            while self.history.blocks(slot) < blocks // prefill:
                self.history.sent(slot, [chance.getrandbits(62) for _ in range(16)])
        self.reading: deque[tuple[Reading, int]] = deque()
        self.writing: deque[tuple[int, int]] = deque()

    def read(self, body: bytes) -> bytes | list[int]:
        """A prompt as `decide` takes it; not measured."""
        return body

    def decide(self, prompt: bytes | list[int]) -> Choice:
        """What is measured."""
        assert isinstance(prompt, bytes)
        names = names_of(prompt)
        tokens = len(prompt) // BYTES_PER_TOKEN
        held = {slot: count * BLOCK // BYTES_PER_TOKEN for slot, count in self.history.leading(names).items()}
        outlook = Outlook(self.forecast, tokens=tokens, cached=held, batches=self.in_flight.now, kv=self.kv, now=self.now)
        choice = choose(self.pool, self.in_flight, outlook=outlook)
        assert choice.prefill is not None
        slot = choice.prefill.slot
        self.history.sent(slot, names)
        cached = outlook.cached(slot)
        self.reading.append((self.forecast.sent(slot, tokens - cached, cached, now=self.now), choice.decode.slot))
        if len(self.reading) > READING * len(self.prefills):
            reading, decode = self.reading.popleft()
            self.forecast.read(reading, decode, now=self.now)
        return choice

    def go_on(self, choice: Choice, tokens: int) -> None:
        """What happens beside it: answers begin, step and end, time passes, a line is fitted anew."""
        assert choice.prefill is not None
        self.in_flight.start(choice.prefill.slot)
        self.in_flight.end(choice.prefill.slot)
        slot = choice.decode.slot
        self.in_flight.start(slot)
        self.kv[slot] += tokens
        self.forecast.began(slot, tokens)
        self.writing.append((slot, tokens))
        if len(self.writing) > WRITING * len(self.decodes):
            slot, tokens = self.writing.popleft()
            self.in_flight.end(slot)
            self.kv[slot] -= tokens
            self.forecast.ended(slot, tokens)
        self.forecast.stepped(slot, self.chance.uniform(0.015, 0.02), now=self.now)
        self.now += self.chance.expovariate(4.0 * len(self.prefills))
        if self.chance.random() < 0.2:
            self.forecast.tick(self.now)


class ToldRouter(Router):
    """The same where prefill engines publish their caches and prompts are token ids."""

    def __init__(self, prefill: int, decode: int, blocks: int, chance: random.Random) -> None:
        super().__init__(prefill, decode, 0, chance)
        self.index = PrefixIndex()
        self.books = Books(prefixes=self.index)
        self.books.grow(prefill + decode)
        self.books.in_flight, self.books.forecast = self.in_flight, self.forecast
        for view in self.pool.prefill:
            names = pack(chance.getrandbits(64) for _ in range(blocks // prefill))
            self.index.take_snapshot(KvSnapshot(1, "n", view.id, 1, 1, 0, 1, PAGE, names, known=True))
            self.books.holds(view, now=self.now)
        self.seqs = {view.id: 1 for view in self.pool.prefill}

    def read(self, body: bytes) -> list[int]:
        return array("I", body).tolist()

    def decide(self, prompt: bytes | list[int]) -> Choice:
        assert isinstance(prompt, list)
        asked = Prompt(len(prompt), ids=Ids(prompt))
        choice = choose(self.pool, self.in_flight, outlook=self.books.outlook(asked, now=self.now))
        assert choice.prefill is not None
        self.reading.append((self.books.sent(choice, asked, now=self.now), choice.decode.slot))
        if len(self.reading) > READING * len(self.prefills):
            reading, decode = self.reading.popleft()
            self.forecast.read(reading, decode, now=self.now)
        return choice

    def tell(self, engine: EngineId, prompt: list[int]) -> None:
        """The engine says that it holds this now; not measured."""
        self.seqs[engine] += 1
        assert not self.index.take_delta(KvDelta(1, "n", engine, 1, self.seqs[engine], pack(hashes(prompt, PAGE))), now=self.now)


def _pool(prefill: int, decode: int) -> Pool:
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
    return ClusterView.of(
        EngineView(EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1), slot, EngineState.READY, EngineFacts(model="m"))
        for slot, role in enumerate(roles)
    ).pools["m"]


def measure(router: Router, size: int, decisions: int) -> list[float]:
    """Microseconds of CPU of each decision, in order of length."""
    chance = router.chance
    known: deque[bytes] = deque(maxlen=200)
    took = []
    for number in range(decisions + decisions // 4):
        if known and chance.random() < 0.5:
            begin = chance.choice(known)
            keep = len(begin) // BLOCK * 3 // 4 * BLOCK
            prompt = begin[:keep] + chance.randbytes(size - keep)
        else:
            prompt = chance.randbytes(size)
        known.append(prompt)
        asked = router.read(prompt)
        start = thread_time_ns()
        choice = router.decide(asked)
        seconds = thread_time_ns() - start
        if number >= decisions // 4:  # before that lines are still guesses, and caches cold
            took.append(seconds / 1e3)
        router.go_on(choice, size // BYTES_PER_TOKEN)
        if isinstance(router, ToldRouter) and isinstance(asked, list) and choice.prefill is not None:
            router.tell(choice.prefill.id, asked)
    return sorted(took)


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="scripts/bench-decisions", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="each with its own seed (default 5)")
    parser.add_argument("--decisions", type=int, default=4000, help="of each round (default 4000)")
    parser.add_argument("--blocks", type=int, default=100_000, help="that engines are known to hold (default 100000)")
    parser.add_argument("--ids", action="store_true", help="prompts of token ids, engines that publish what they hold")
    chosen = parser.parse_args()
    kind = ToldRouter if chosen.ids else Router
    write = sys.stdout.write
    write("| engines | prompt | p50 µs | p99 µs |\n|---|---|---|---|\n")
    for prefill, decode in ((8, 8), (2, 2)):
        for size in (KIB, 4 * KIB, 32 * KIB):
            chances = [random.Random(seed) for seed in range(chosen.rounds)]
            rounds = [measure(kind(prefill, decode, chosen.blocks, chance), size, chosen.decisions) for chance in chances]
            middles, tails = ([took[int(share * len(took))] for took in rounds] for share in (0.5, 0.99))
            cells = [f"{median(some):.1f} ({min(some):.1f} to {max(some):.1f})" for some in (middles, tails)]
            write(f"| {prefill}P+{decode}D | {size // KIB} KiB | {' | '.join(cells)} |\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
