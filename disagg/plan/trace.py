"""Recorded loads: when requests came, how long prompts and answers were, what prompts share. Parses text that the caller read. Pure.

Two formats are understood, told apart by their first line:

* **JSONL of Mooncake** (kvcache-ai/Mooncake, FAST'25): ``timestamp`` (milliseconds), ``input_length``, ``output_length`` and
  ``hash_ids``, one name for each block of the prompt, which stands for the block and all before it. Blocks have 512 tokens there and 16 in
  LLMServingSim's files: the size is read off the lines. A block at the end that is not full shares nothing and gets no name here.
* **CSV of Azure** (Azure/AzurePublicDataset, 2023): ``TIMESTAMP,ContextTokens,GeneratedTokens``. Nothing is known of what prompts share.

Mooncake's conversation trace has its times in ticks of about 3 s, ten requests at a time. Taken as they are these would be bursts that
nobody sent. So where most requests share their time with another one, each is moved to a random place within its tick (`Trace.tick_s`).
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import msgspec

from disagg.errors import TraceError

BLOCKS = tuple(2**power for power in range(4, 13))
"""Sizes that a block may have, tokens."""
SHARED = 0.5
"""Of the requests: when so many or fewer times are different ones, the times are ticks."""
TOKENS_LIMIT = 100_000_000
_AZURE_TIME = re.compile(r"(\d{4})-(\d{2})-(\d{2})[ T](\d{2}):(\d{2}):(\d{2})(\.\d{1,9})?(?:Z|\+00:00)?", re.ASCII)
_AZURE_HEAD = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class Arrival(msgspec.Struct, frozen=True):
    """A request of a trace.

    Attributes:
        at: seconds since the beginning of the trace.
        prompt: tokens, at least 1.
        answer: tokens, at least 1.
        names: of the prompt's full blocks, each of which stands for all before it, too.
    """

    at: float
    prompt: int
    answer: int
    names: tuple[int, ...] = ()


class Trace(msgspec.Struct, frozen=True):
    """A recorded load.

    Attributes:
        arrivals: in the order of their times; the first comes at 0 or soon after.
        block: tokens of a named block, 0 where nothing is named.
        tick_s: the ticks out of which arrivals were spread at random, 0 where the times were taken as they are.
    """

    arrivals: tuple[Arrival, ...]
    block: int = 0
    tick_s: float = 0.0

    @property
    def seconds(self) -> float:
        """From 0 to the last arrival."""
        return self.arrivals[-1].at

    def scaled(self, rate: float) -> Trace:
        """The same requests, so many times as fast."""
        return msgspec.structs.replace(
            self, arrivals=tuple(Arrival(a.at / rate, a.prompt, a.answer, a.names) for a in self.arrivals), tick_s=self.tick_s / rate
        )

    def first(self, seconds: float) -> Trace:
        """What came before this moment. Raises TraceError when nothing did."""
        kept = tuple(a for a in self.arrivals if a.at < seconds)
        if not kept:
            raise TraceError(
                f"no request of the trace comes in its first {seconds:g} s: the first one does after {self.arrivals[0].at:.3g} s"
            )
        return msgspec.structs.replace(self, arrivals=kept)


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


_decode = msgspec.json.Decoder(_Line).decode


def parse_trace(text: str, *, file: str, chance: Callable[[], float]) -> Trace:
    """Reads a trace.

    Args:
        text: all of it.
        file: its name, for errors.
        chance: numbers in [0, 1), for the places of arrivals within their ticks; the same numbers make the same trace.

    Raises:
        TraceError: names file, line and what is wrong there.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise TraceError(f"{file} is empty: a trace has one request a line")
    head = lines[0][1].lstrip("\ufeff")
    if head.startswith("{"):
        arrivals, block = _mooncake(lines, file)
    elif head.split(",") == _AZURE_HEAD:
        arrivals, block = _azure(lines[1:], file), 0
    else:
        raise TraceError(
            f"{file}, line {lines[0][0]}: this is neither a JSON object with timestamp, input_length and output_length (Mooncake) "
            f"nor the head {','.join(_AZURE_HEAD)} (Azure), but {head[:60]!r}"
        )
    if not arrivals:
        raise TraceError(f"{file} has a head and no requests")
    arrivals.sort(key=lambda a: a.at)
    began = arrivals[0].at
    arrivals = [Arrival(a.at - began, a.prompt, a.answer, a.names) for a in arrivals]
    arrivals, tick_s = _spread(arrivals, chance)
    return Trace(tuple(arrivals), block, tick_s)


def _mooncake(lines: Sequence[tuple[int, str]], file: str) -> tuple[list[Arrival], int]:
    parsed = []
    sizes = set(BLOCKS)
    for number, line in lines:
        try:
            one = _decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{file}, line {number}: {error}") from error
        _check(one.input_length, "input_length", file, number)
        _check(one.output_length, "output_length", file, number)
        count = len(one.hash_ids)
        if count:
            left = {size for size in sizes if count in {one.input_length // size, -(-one.input_length // size)}}
            if not left:
                said = f"blocks of {' or '.join(map(str, sorted(sizes)))} tokens" if len(sizes) < len(BLOCKS) else "blocks of one size"
                raise TraceError(f"{file}, line {number}: {count} hash_ids do not cut a prompt of {one.input_length} tokens into {said}")
            sizes = left
        parsed.append(one)
    # Where several sizes fit, as for one short prompt, the largest names the fewest full blocks: it claims the least.
    block = max(sizes) if any(one.hash_ids for one in parsed) else 0
    return [
        Arrival(one.timestamp / 1e3, one.input_length, one.output_length, tuple(one.hash_ids[: one.input_length // block if block else 0]))
        for one in parsed
    ], block


def _azure(lines: Sequence[tuple[int, str]], file: str) -> list[Arrival]:
    arrivals = []
    for number, line in lines:
        cells = line.split(",")
        if len(cells) != len(_AZURE_HEAD):
            raise TraceError(f"{file}, line {number}: {len(cells)} cells instead of {len(_AZURE_HEAD)}")
        at = _seconds(cells[0], file, number)
        tokens = []
        for name, cell in zip(_AZURE_HEAD[1:], cells[1:], strict=True):
            if not (cell.isascii() and cell.isdigit()):
                raise TraceError(f"{file}, line {number}: {name} is {cell[:40]!r} and not a number of tokens")
            tokens.append(_check(int(cell), name, file, number))
        arrivals.append(Arrival(at, tokens[0], tokens[1]))
    return arrivals


def _seconds(text: str, file: str, number: int) -> float:
    match = _AZURE_TIME.fullmatch(text)
    fields = [int(field) for field in match.groups()[:6]] if match is not None else [0] * 6
    _, month, day, hour, minute, second = fields
    if match is None or not (1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second <= 60):
        raise TraceError(f"{file}, line {number}: TIMESTAMP is {text[:40]!r} and not like 2023-11-16 18:17:03.97996")
    return calendar.timegm((*fields, 0, 0, 0)) + float(match[7] or 0.0)


def _check(tokens: int, name: str, file: str, number: int) -> int:
    if not 1 <= tokens <= TOKENS_LIMIT:
        raise TraceError(f"{file}, line {number}: {name} is {tokens}, allowed is 1 to {TOKENS_LIMIT:,}")
    return tokens


def _spread(arrivals: list[Arrival], chance: Callable[[], float]) -> tuple[list[Arrival], float]:
    """Each to a random place in its tick, if the times are ticks. A tick ends where the next begins, and is as long as usual at most."""
    times = sorted({a.at for a in arrivals})
    if len(times) < 2 or len(times) > SHARED * len(arrivals):
        return arrivals, 0.0
    gaps = [b - a for a, b in pairwise(times)]
    tick_s = median(gaps)
    length = dict(zip(times, [*(min(gap, tick_s) for gap in gaps), tick_s], strict=True))
    spread = [Arrival(a.at + chance() * length[a.at], a.prompt, a.answer, a.names) for a in arrivals]
    spread.sort(key=lambda a: a.at)
    return spread, tick_s
