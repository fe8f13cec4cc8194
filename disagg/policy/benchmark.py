"""What an idle engine of which nothing was measured yet is asked to do, so that the first clients meet a router that knows it. Pure.

Prompts of a few lengths, each several times, tell what a pass takes; short answers to them what a step takes with one answer, and several
at once what it takes with more. All of that is a second or two on a GPU. It is done once for each process and role, when its canaries are
over, and only until somebody needs the engine: clients' requests teach the same. What comes of it is a prior (`disagg.policy.cost`): the
line through the middle one of each kind of round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import msgspec

from disagg.model import Choice, ClusterView, EngineView, Pool, Role
from disagg.policy.cost import ENOUGH, Features, Prior, robust_line, square

LENGTHS = (64, 256, 2048)
TIMES = 3
ANSWER = 8
AT_ONCE = (4, 16)
LONG_ANSWER = 24
CONTEXT_SHARE = 0.5
ROOM_SHARE = 0.25
"""Prompts take up no more than this of an engine's context, and of its KV."""
LONG_S = 1.0
"""Of a length that took longer there is one round only, and shorter ones take the place of the others, but of the shortest."""
HARD_S = 3.0
"""Nor is anything asked for that should take longer than this, by its tokens: an engine whose pass takes long looks like one that hangs."""
_LEAST_S = 1e-6
AGAIN_S = 30.0
TRIES = 5
"""So often an engine is tried, the second time after so many seconds, then after twice as many."""
LIMIT_S = 10.0
MOST_S = 20.0
"""Nothing is begun after so long; the second where so little was seen until then that it would not be trusted."""

IDS = 200
FIRST_ID = 16
"""Every vocabulary has tokens of these ids, and few have special ones among them."""

Known = Callable[[int], tuple[bool, bool]]


class Round(msgspec.Struct, frozen=True):
    """Some requests that are sent together.

    Attributes:
        prompt: tokens that each engine must compute.
        answer: tokens.
        at_once: requests.
    """

    prompt: int
    answer: int
    at_once: int = 1


def request(one: Round, salt: str) -> bytes:
    """The body of one request of a round for ``POST /generate``.

    Args:
        one: the round.
        salt: a new word each time: no prompt is like another one, so that a prefix cache does not answer in place of the engine.
    """
    seed = int.from_bytes(salt.encode()[-8:], "big")
    ids = [FIRST_ID + (seed + n * (n + seed % 97)) % IDS for n in range(one.prompt)]
    sampling = {"max_new_tokens": one.answer, "temperature": 0, "ignore_eos": True}
    return msgspec.json.encode({"input_ids": ids, "sampling_params": sampling, "stream": True, "extra_key": salt})


class Plan:
    """The rounds for one choice of engines; it is told what came of each.

    Args:
        choice: the engines.
    """

    def __init__(self, choice: Choice) -> None:
        self._engines = [e for e in (choice.prefill, choice.decode) if e is not None]
        self._limit = _longest(self._engines)
        lengths = [n for n in LENGTHS if n <= self._limit]
        # In turn, so that there is something of each kind when a client ends it.
        writes = [Round(n, LONG_ANSWER, many) for n in lengths[:1] for many in self._at_once(n)]
        self._rounds = [*(Round(n, ANSWER) for n in lengths), *writes] * TIMES
        self._passed_s = 0.0
        self._reads: dict[Features, list[float]] = {}
        self._steps: dict[Features, list[float]] = {}

    def _at_once(self, prompt: int) -> list[int]:
        most = [e.facts.max_running for e in self._engines if e.facts.max_running]
        rooms = [int(e.load.kv_total_tokens * ROOM_SHARE) // (prompt + LONG_ANSWER) for e in self._engines if e.load.kv_total_tokens]
        return sorted({max(1, min([many, *most, *rooms])) for many in AT_ONCE})

    def next(self) -> Round | None:
        """What to ask for; None where there is nothing more to learn, or it has taken long enough."""
        counts = [sum(map(len, seen.values())) for seen in (self._reads, self._steps)]
        if not self._rounds or self._passed_s >= (LIMIT_S if min(counts) >= ENOUGH else MOST_S):
            return None
        one, most = self._rounds.pop(0), max(LENGTHS[0], int(HARD_S / self._token_s))
        if one.at_once > 1:
            return msgspec.structs.replace(one, at_once=max(1, min(one.at_once, most // one.prompt)))
        # What is left out a shorter one takes the place of: as many are to be trusted.
        return msgspec.structs.replace(one, prompt=max(n for n in LENGTHS if n <= min(one.prompt, self._limit, most)))

    @property
    def _token_s(self) -> float:
        """What a token of a prompt seems to take at most; more than it does, as long as only short ones were measured."""
        return min((max(_LEAST_S, min(seconds) / features[0]) for features, seconds in self._reads.items()), default=HARD_S / LENGTHS[0])

    def took(self, one: Round, seconds: float, times: Sequence[Sequence[float]]) -> None:
        """A round is over.

        Args:
            one: the round.
            seconds: that it took.
            times: when the tokens of each answer came, seconds since it began, in order.
        """
        self._passed_s += seconds
        if one.at_once == 1:
            if seconds > LONG_S and one.prompt > LENGTHS[0]:
                self._limit = min(self._limit, one.prompt - 1)
            if times[0] and times[0][0] > 0.0:
                self._reads.setdefault((float(one.prompt), float(square(0, one.prompt))), []).append(times[0][0])
        # Where events hold several tokens, steps are not seen.
        step_s = overlap_step_s(times) if min(map(len, times)) >= one.answer - 1 else None
        if step_s is not None:
            kv_tokens = one.at_once * (one.prompt + one.answer // 2)
            self._steps.setdefault((float(one.at_once), float(kv_tokens)), []).append(step_s)

    @property
    def reads(self) -> Prior | None:
        """What passes take; None where too little was measured to say."""
        return _prior(self._reads)

    @property
    def steps(self) -> Prior | None:
        """What steps take; None where too little was measured to say."""
        return _prior(self._steps)


class Benchmark:
    """Which engines are to be measured. A process is chosen again, in the same role, after a while, where nothing came of it."""

    def __init__(self) -> None:
        self._tries: dict[tuple[object, ...], tuple[int, float]] = {}  # how often, and when it may be the next time

    def next(self, view: ClusterView, *, known: Known, is_idle: Callable[[EngineView], bool], now: float) -> Choice | None:
        """Engines of which something is to be learnt, or None.

        Args:
            view: of the cluster.
            known: whether passes and steps of the engine in a slot were measured.
            is_idle: nothing runs on an engine.
            now: monotonic seconds.
        """
        there = {_key(engine) for engine in view.engines}
        self._tries = {key: tries for key, tries in self._tries.items() if key in there}
        for pool in view.pools.values():
            for part in pool.islands or (pool,):
                choice = self._of(part, known, is_idle, now)
                if choice is not None:
                    for engine in (choice.prefill, choice.decode):
                        if engine is not None:
                            count = self._tries.get(_key(engine), (0, 0.0))[0] + 1
                            self._tries[_key(engine)] = count, now + AGAIN_S * 2 ** (count - 1)
                    return choice
        return None

    def _of(self, pool: Pool, known: Known, is_idle: Callable[[EngineView], bool], now: float) -> Choice | None:
        def sorted_by_need(engines: Sequence[EngineView]) -> list[EngineView]:
            idle = [engine for engine in engines if is_idle(engine)]
            return sorted(idle, key=lambda engine: not self._needs(engine, known, now))  # the first of equals

        alone = next((engine for engine in sorted_by_need(pool.unified) if self._needs(engine, known, now)), None)
        if alone is not None:
            return Choice(None, alone, "nothing was measured of it yet")
        readers, writers = sorted_by_need(pool.prefill), sorted_by_need(pool.decode)
        if readers and writers and any(self._needs(engine, known, now) for engine in (readers[0], writers[0])):
            return Choice(readers[0], writers[0], "nothing was measured of one of them yet")
        return None

    def _needs(self, engine: EngineView, known: Known, now: float) -> bool:
        reads, steps = known(engine.slot)
        role = engine.address.role
        is_known = (reads or role is Role.DECODE) and (steps or role is Role.PREFILL)
        count, due_at = self._tries.get(_key(engine), (0, now))
        return not is_known and count < TRIES and now >= due_at


def overlap_step_s(times: Sequence[Sequence[float]]) -> float | None:
    """How long a step took while all of some answers were written.

    Args:
        times: when the tokens of each answer came, seconds, in order.

    Returns:
        Seconds; None where they were not written at the same time for at least two steps.
    """
    if not times or not all(times):
        return None
    began, ended = max(each[0] for each in times), min(each[-1] for each in times)
    steps = [sum(began < at <= ended for at in each) for each in times]
    if min(steps) < 2:
        return None
    return (ended - began) * len(steps) / sum(steps)


def _prior(measured: Mapping[Features, Sequence[float]]) -> Prior | None:
    """The line through the middle one of each kind; of one kind alone there is none."""
    if len(measured) < 2:
        return None
    rows = [(1.0, *features) for features in measured]
    line = robust_line(rows, [median(seconds) for seconds in measured.values()], [float(len(seconds)) for seconds in measured.values()])
    return Prior(line, tuple(measured), "a measurement when it came", own=True, samples=sum(map(len, measured.values())))


def _longest(engines: Sequence[EngineView]) -> int:
    """Tokens of a prompt that all of these have plenty of room for."""
    contexts = [int(e.facts.context_tokens * CONTEXT_SHARE) for e in engines if e.facts.context_tokens]
    rooms = [int(e.load.kv_total_tokens * ROOM_SHARE) for e in engines if e.load.kv_total_tokens]
    return min([LENGTHS[-1], *contexts, *rooms])


def _key(engine: EngineView) -> tuple[object, ...]:
    return engine.id, engine.address.pid, engine.address.role
