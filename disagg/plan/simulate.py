"""A trace through the live policies in virtual time: engines that take as long as their lines say, and the router between them. Pure.

Events in the order of their times, those of one moment in the order in which they were made: arrivals, ends of passes, first tokens, ends
of steps in which a batch changes, switches, and the router's own beats (upkeep and the engines' reports every `TICK_S`, a decision about
flips every `Pace.interval_s`). A run is a function of its arguments: the same ones give the same bytes.

Router and network take no time, but for the handoff of KV. Nobody gives up waiting. After the last arrival all is served to the end.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import accumulate

import msgspec

from disagg.errors import NoCapacityError
from disagg.model import Role
from disagg.plan.dispatch import Dispatch, Place, Placement
from disagg.plan.flips import Flip, Flips, Plan
from disagg.plan.hardware import PAUSE_CLASSES, Hardware, Reader, Work, Writer
from disagg.plan.trace import Trace
from disagg.policy.balance import Balance, Pace
from disagg.policy.books import Slo

TICK_S = 2.0
SAMPLE_S = 10.0
PERCENTILES = (50, 90, 95, 99)


class Cluster(msgspec.Struct, frozen=True):
    """What is simulated.

    Attributes:
        prefill, decode, unified: engines of each role at the beginning.
        hardware: all of them are alike.
        slo: what requests are to get.
        placement: how engines are chosen.
        refuse: who would come too late is refused at once, as the live router does.
        flips: engines are moved between the pools as the live balance says.
        pace: of the balance.
    """

    prefill: int
    decode: int
    unified: int = 0
    hardware: Hardware = Hardware()
    slo: Slo = Slo()
    placement: Placement = Placement.CACHE
    refuse: bool = True
    flips: bool = False
    pace: Pace = Pace()


class Spread(msgspec.Struct, frozen=True):
    """Seconds: their mean and percentiles (nearest rank). 0 where there was nothing to measure."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


class Sample(msgspec.Struct, frozen=True):
    """A moment.

    Attributes:
        at: when.
        prefill, decode: engines of the role, those that leave it not included.
        queued: prompts of which no pass has begun, with those for which there is no room.
        writing: answers.
    """

    at: float
    prefill: int
    decode: int
    queued: int
    writing: int


class Outcome(msgspec.Struct, frozen=True):
    """What became of a load.

    Attributes:
        requests, refused: how many came, and how many of them were refused.
        good: how many met both objectives.
        goodput: those a second, over `seconds`.
        seconds: from the beginning to the last arrival.
        ended_s: to the last token.
        ttft, itl: first tokens by request; pauses by token.
        hits: of the prompts' tokens, the share that was found in a cache.
        believed: the share that the router took to be there when it chose.
        prefill_busy, decode_busy: of the engine-seconds of a role until the last arrival, those in passes and in steps.
        waits: requests that found no room and waited for it.
        flips: engines that were moved.
        samples: every `SAMPLE_S`.
        good_at: when each good request came, seconds.
    """

    requests: int
    refused: int
    good: int
    goodput: float
    seconds: float
    ended_s: float
    ttft: Spread
    itl: Spread
    hits: float
    believed: float
    prefill_busy: float
    decode_busy: float
    waits: int
    flips: tuple[Flip, ...]
    samples: tuple[Sample, ...]
    good_at: tuple[float, ...] = ()


def replay(
    trace: Trace,
    cluster: Cluster,
    *,
    chance: Callable[[], float],
    progress: Callable[[float], None] | None = None,
    plan: Plan | None = None,
) -> Outcome:
    """Replays a trace.

    Args:
        trace: what comes, and when.
        cluster: what it comes to.
        chance: numbers in [0, 1), for what is chosen at random.
        progress: told the share of the trace that is over, every virtual `TICK_S`.
        plan: engines that are to read prompts, by time: a balance that knows the future.
    """
    return _Run(trace, cluster, chance, progress, plan).run()


Event = Callable[[float], None]


class _Run:
    """One run."""

    def __init__(
        self,
        trace: Trace,
        cluster: Cluster,
        chance: Callable[[], float],
        progress: Callable[[float], None] | None,
        plan: Plan | None,
    ) -> None:
        roles = [Role.PREFILL] * cluster.prefill + [Role.DECODE] * cluster.decode + [Role.UNIFIED] * cluster.unified
        hardware = cluster.hardware
        self.trace = trace
        self.cluster = cluster
        self.hardware = hardware
        self.progress = progress
        self.readers = [Reader(hardware, trace.block) for _ in roles]
        self.writers = [Writer(hardware) for _ in roles]
        self.wakes: list[int] = [0] * len(roles)  # numbers of the events that are still meant
        self.steps: list[int] = [0] * len(roles)  # that end with them
        self.works = [Work(number, a.at, a.prompt, a.answer, a.names) for number, a in enumerate(trace.arrivals)]
        self.places: list[Place | None] = [None] * len(self.works)
        self.dispatch = Dispatch(
            roles,
            hardware,
            trace.block,
            cluster.slo,
            cluster.placement,
            refuse=cluster.refuse,
            chance=chance,
            foreseen=self.foreseen,
            pace=cluster.pace,
        )
        balance = Balance(cluster.pace) if cluster.flips and plan is None else None
        self.flips = Flips(self.dispatch, hardware.switch_s, balance, plan)
        self.events: list[tuple[float, int, Event]] = []
        self.made = 0
        self.left = len(self.works)
        self.refused = self.waits = 0
        self.samples: list[Sample] = []
        self.busy = (0.0, 0.0)  # of prefill and decode, when the last request came

    def run(self) -> Outcome:
        works, events = self.works, self.events
        self.at(TICK_S, self.tick)
        self.at(0.0, self.sample)
        if self.flips.on:
            self.at(self.cluster.pace.interval_s, self.decide)
        arrivals = iter(works)
        coming = next(arrivals, None)
        now = 0.0
        while self.left:
            if coming is not None and (not events or coming.at <= events[0][0]):
                now = coming.at
                self.arrived(coming, now)
                coming = next(arrivals, None)
                if coming is None:
                    self.busy = (sum(reader.busy_s for reader in self.readers), sum(writer.busy_s for writer in self.writers))
            else:
                now, _, event = heappop(events)
                event(now)
        return self.outcome(now)

    def at(self, when: float, event: Event) -> None:
        """To be done then."""
        self.made += 1
        heappush(self.events, (when, self.made, event))

    # --- requests

    def foreseen(self, work: Work) -> dict[int, int]:
        """What each engine would find in its cache."""
        pool = self.dispatch.pool
        return {view.slot: self.readers[view.slot].foreseen(work) for view in (*pool.prefill, *pool.unified)}

    def arrived(self, work: Work, now: float) -> None:
        """A request."""
        try:
            place = self.dispatch.arrived(work, now)
        except NoCapacityError:
            self.refused += 1
            self.left -= 1
            return
        if place is None:
            self.waits += 1
        else:
            self.send(place, now)

    def send(self, place: Place, now: float) -> None:
        """It has its engines."""
        self.places[place.work.number] = place
        self.readers[place.prefill].add(place.work)
        if place.is_pair:
            self.read(place.prefill, now)
        else:
            self.wake_at(place.decode, now)

    def pump(self, now: float) -> None:
        """Something was released."""
        while self.dispatch.waiting:
            try:
                place = self.dispatch.next(now)
            except NoCapacityError:
                self.dispatch.waiting.popleft()
                self.refused += 1
                self.left -= 1
                continue
            if place is None:
                return
            self.send(place, now)

    # --- prefill

    def read(self, slot: int, now: float) -> None:
        """An engine may have something to read."""
        reader = self.readers[slot]
        if reader.reading or not reader.queue:
            return
        seconds = reader.start(now)
        self.at(now + seconds, lambda then: self.was_read(slot, then))

    def was_read(self, slot: int, now: float) -> None:
        """A pass is over."""
        reader = self.readers[slot]
        for work in reader.done():
            self.at(reader.delivered_at(work, now), lambda then, work=work: self.first_token(work, then))  # type: ignore[misc]
        self.read(slot, now)

    def first_token(self, work: Work, now: float) -> None:
        """The KV is there."""
        place = self.place(work)
        work.first_at = now
        self.dispatch.first_token(place, now)
        if work.answer == 1:
            self.ended(work, now)
        else:
            writer = self.writers[place.decode]
            writer.joining.append(work)
            self.wake_for_join(place.decode, now)
        self.drained(now)
        self.pump(now)

    def place(self, work: Work) -> Place:
        """Where it was sent."""
        place = self.places[work.number]
        assert place is not None
        return place

    # --- decode

    def wake_at(self, slot: int, now: float) -> None:
        """A unified engine has something to read: it begins at the end of the step that is under way."""
        writer = self.writers[slot]
        if writer.batch:
            self.wake_for_join(slot, now)
        elif not self.wakes[slot]:
            self.wake(slot, 0, now)

    def wake_for_join(self, slot: int, now: float) -> None:
        """Something can join at the end of the step that is under way."""
        writer = self.writers[slot]
        if self.wakes[slot] and self.steps[slot] < 0:  # a unified engine reads
            return
        steps = writer.steps_until(now) if writer.batch else 0
        if not self.wakes[slot] or steps < self.steps[slot]:
            self.wake(slot, steps, max(now, writer.at + writer.steps_s(steps)) if writer.batch else now)

    def wake(self, slot: int, steps: int, when: float) -> None:
        """The batch changes then, after so many steps; fewer than 0 for those of a stretch in which a unified engine reads."""
        self.made += 1
        number = self.made
        self.wakes[slot], self.steps[slot] = number, steps
        heappush(self.events, (when, number, lambda now: self.woke(slot, number, now)))

    def woke(self, slot: int, number: int, now: float) -> None:
        """The batch changes."""
        if self.wakes[slot] != number:
            return  # another change came before
        writer, steps = self.writers[slot], self.steps[slot]
        self.wakes[slot] = 0
        if steps < 0:
            seconds = (now - writer.at) / -steps
            ended = self.read_mixed(slot, -steps, now)
        else:
            seconds = writer.step_s  # of the first of them
            ended = writer.advance(steps)
        if steps and writer.batch + len(ended):
            self.dispatch.stepped(slot, seconds, now)
        for work in ended:
            self.ended(work, now)
        writer.admit(now)
        self.next_wake(slot, now)
        if ended:
            self.drained(now)
            self.pump(now)

    def next_wake(self, slot: int, now: float) -> None:
        """When the batch of this engine changes next."""
        writer, reader = self.writers[slot], self.readers[slot]
        if reader.queue and self.dispatch.views[slot].address.role is Role.UNIFIED:
            self.begin_mixed(slot, now)
        elif writer.batch:
            steps = writer.to_first_end()
            self.wake(slot, steps, max(now, writer.at + writer.steps_s(steps)))

    def ended(self, work: Work, now: float) -> None:
        """An answer is complete."""
        work.end_at = now
        self.left -= 1
        self.dispatch.ended(self.place(work))

    # --- unified

    def begin_mixed(self, slot: int, now: float) -> None:
        """A unified engine reads one prompt, and its answers go on."""
        writer, reader, hardware = self.writers[slot], self.readers[slot], self.hardware
        new, squares = reader.take(now, most=1)
        steps = -(-new // hardware.chunk)
        a, b, c = hardware.read
        seconds = b * new + c * squares
        if writer.batch:
            seconds += writer.steps_s(steps) + steps * max(0.0, a - hardware.step[0])  # one constant for each step, the greater one
        else:
            seconds += steps * a
        reader.busy_s += seconds
        writer.at = now
        self.wake(slot, -steps, now + seconds)

    def read_mixed(self, slot: int, steps: int, now: float) -> list[Work]:
        """It was read: the answers that are complete."""
        writer, reader = self.writers[slot], self.readers[slot]
        ended = writer.advance(steps, now - writer.at)
        for work in reader.done():
            work.first_at = now
            self.dispatch.first_token(self.place(work), now)
            if work.answer == 1:
                ended.append(work)
            else:
                writer.joining.append(work)
        return ended

    # --- beats

    def tick(self, now: float) -> None:
        """Upkeep."""
        self.dispatch.books.forecast.tick(now)
        for view in self.dispatch.views:
            if view.address.role is not Role.PREFILL:
                self.dispatch.reported(view.slot, self.writers[view.slot].kv_at(now))
        self.pump(now)
        if self.progress is not None:
            self.progress(min(1.0, now / max(self.trace.seconds, 1e-9)))
        self.at(now + TICK_S, self.tick)

    def sample(self, now: float) -> None:
        """For the record."""
        if now <= self.trace.seconds:
            prefill, decode = (self.flips.count(role) for role in (Role.PREFILL, Role.DECODE))
            queued = sum(len(reader.queue) for reader in self.readers) + len(self.dispatch.waiting)
            self.samples.append(Sample(now, prefill, decode, queued, sum(writer.batch for writer in self.writers)))
            self.at(now + SAMPLE_S, self.sample)

    def decide(self, now: float) -> None:
        """Flips."""
        self.flips.decide(now)
        self.drained(now)
        self.at(now + self.cluster.pace.interval_s, self.decide)

    def drained(self, now: float) -> None:
        """Engines that are to be moved may have nothing left to do."""
        for slot in self.flips.draining:
            self.flips.switching(slot)
            self.at(now + self.hardware.switch_s, lambda then, slot=slot: self.switched(slot, then))  # type: ignore[misc]

    def switched(self, slot: int, now: float) -> None:
        """An engine has its new role."""
        self.readers[slot].empty()
        self.flips.switched(slot, now)
        self.pump(now)

    # --- the end

    def outcome(self, now: float) -> Outcome:
        """What became of it."""
        slo = self.cluster.slo
        served = [work for work in self.works if not math.isnan(work.end_at)]
        good = [work.at for work in served if _is_good(work, slo)]
        seconds = self.trace.seconds
        tokens = sum(work.prompt for work in served) or 1
        there = [sum(counts) / len(counts) for counts in zip(*((s.prefill, s.decode) for s in self.samples), strict=True)]
        busy = [
            work / (seconds * (count + self.cluster.unified)) if seconds > 0.0 and count + self.cluster.unified else 0.0
            for work, count in zip(self.busy, there, strict=True)
        ]
        pauses: dict[int, int] = {}
        for writer in self.writers:
            for key, count in writer.pauses.items():
                pauses[key] = pauses.get(key, 0) + count
        return Outcome(
            len(self.works),
            self.refused,
            len(good),
            len(good) / seconds if seconds > 0.0 else 0.0,
            seconds,
            now,
            _spread([(work.first_at - work.at, 1) for work in served]),
            _spread([(math.exp(key / PAUSE_CLASSES), count) for key, count in pauses.items()]),
            sum(work.hit for work in served) / tokens,
            sum(place.held for place in self.places if place is not None) / tokens,
            busy[0],
            busy[1],
            self.waits,
            tuple(self.flips.all()),
            tuple(self.samples),
            tuple(good),
        )


def _is_good(work: Work, slo: Slo) -> bool:
    """Whether it met both objectives."""
    pause_s = (work.end_at - work.first_at) / (work.answer - 1) if work.answer > 1 else 0.0
    return work.first_at - work.at <= slo.ttft_s and pause_s <= slo.itl_s


def _spread(weighted: Sequence[tuple[float, int]]) -> Spread:
    """Mean and percentiles of values that occur so many times."""
    if not weighted:
        return Spread(0.0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(weighted)
    sums = list(accumulate(count for _, count in ordered))
    mean = sum(value * count for value, count in ordered) / sums[-1]
    return Spread(mean, *(ordered[bisect_left(sums, sums[-1] * percent / 100)][0] for percent in PERCENTILES))
