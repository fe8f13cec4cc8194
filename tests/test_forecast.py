"""How long engines will take: a model of an engine is driven in virtual time, and what was foretold is compared with what it then does."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator
from itertools import count
from statistics import median

import pytest

from disagg.policy.cost import ENOUGH, Line, at, square
from disagg.policy.forecast import ANSWER_TOKENS, BATCH_LIMIT, LINK_S, READS, STEPS, Forecast, Outlook, Reading

GPU: Line = (0.02, 6e-5, 1e-9)
"""Seconds of a pass: some other GPU than that of the prior."""
CPU: Line = (0.01, 3.8e-4, 1e-8)
"""0.2 s for 500 tokens: the embedded engine, several times slower."""
TICK_S = 0.1


class Prompt:
    """One prompt, and what became of it."""

    def __init__(self, reading: Reading, decode: int | None, at: float, foretold_s: float) -> None:
        self.reading = reading
        self.decode = decode
        self.at = at
        self.foretold_s = foretold_s
        self.took_s: float | None = None
        self.gone = False

    @property
    def error(self) -> float:
        assert self.took_s is not None
        return abs(self.foretold_s - self.took_s) / self.took_s


class Engine:
    """Reads prompts in passes, `together` of them at most in one; `slow` times as slow as its line says, and hangs where that is 0."""

    def __init__(self, line: Line, together: int = 1) -> None:
        self.line = line
        self.together = together
        self.slow = 1.0
        self.queue: list[Prompt] = []
        self.busy = False


class World:
    """Engines, the links between them, and one forecast that sees what a router sees.

    Args:
        engines: those that read; the slots after them write.
        links: seconds for each token from one slot to another.
        rtts: seconds for each prompt, in the same way.
        noise: of the length of a pass, relative.
    """

    def __init__(self, *engines: Engine, links: dict[tuple[int, int], float] | None = None, seed: int = 0, noise: float = 0.03) -> None:
        self.engines = engines
        self.links = links or {}
        self.rtts: dict[tuple[int, int], float] = {}
        self.chance = random.Random(seed)
        self.noise = noise
        self.now = 0.0
        self.prompts: list[Prompt] = []
        self.forecast = Forecast()
        self.forecast.grow(len(engines) + 2)
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tick()

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, act = heapq.heappop(self._events)
            act()
            self.forecast.check()
        self.now = end

    def _tick(self) -> None:
        self.forecast.tick(self.now)
        self.after(TICK_S, self._tick)

    def foretold_s(self, slot: int, new: int, cached: int = 0, decode: int | None = None) -> float:
        link_s = 0.0 if decode is None else self.forecast.link_s(slot, decode, new + cached)
        return self.forecast.first_token_s(slot, new, cached, now=self.now) + link_s

    def send(self, slot: int, new: int, cached: int = 0, decode: int | None = None, *, patience_s: float = math.inf) -> Prompt:
        foretold_s = self.foretold_s(slot, new, cached, decode)
        prompt = Prompt(self.forecast.sent(slot, new, cached, now=self.now), decode, self.now, foretold_s)
        self.prompts.append(prompt)
        self.engines[slot].queue.append(prompt)
        if patience_s < math.inf:
            self.after(patience_s, lambda: self._abort(prompt))
        self._begin(slot)
        return prompt

    def _abort(self, prompt: Prompt) -> None:
        if prompt.took_s is None:
            prompt.gone = True
            self.forecast.left(prompt.reading, now=self.now)
            queue = self.engines[prompt.reading.slot].queue
            if prompt in queue:
                queue.remove(prompt)

    def _begin(self, slot: int) -> None:
        engine = self.engines[slot]
        if engine.busy or not engine.queue or not engine.slow:
            return
        engine.busy = True
        some, engine.queue = engine.queue[: engine.together], engine.queue[engine.together :]
        work = (float(sum(p.reading.new for p in some)), float(sum(square(p.reading.cached, p.reading.new) for p in some)))
        seconds = at(engine.line, work) * engine.slow * self.chance.lognormvariate(0.0, self.noise)
        self.after(seconds, lambda: self._end(slot, some))

    def _end(self, slot: int, some: list[Prompt]) -> None:
        for prompt in some:
            reading = prompt.reading
            over = (slot, -1 if prompt.decode is None else prompt.decode)
            way = self.rtts.get(over, 0.0) + self.links.get(over, 0.0) * (reading.new + reading.cached)
            self.after(way + self.chance.uniform(0.0, 0.001), lambda prompt=prompt: self._arrive(prompt))  # type: ignore[misc]
        self.engines[slot].busy = False
        self._begin(slot)

    def _arrive(self, prompt: Prompt) -> None:
        if not prompt.gone:
            prompt.took_s = self.now - prompt.at
            self.forecast.read(prompt.reading, prompt.decode, now=self.now)

    # --- load

    def traffic(self, slot: int, share: float, seconds: float, *, least: int = 100, most: int = 4000, aborted: float = 0.0) -> list[Prompt]:
        """Prompts of all sizes at random times, of which the engine is busy for this share of its time. Returns those that were read."""
        sizes = [self._size(least, most) for _ in range(200)]
        line = self.engines[slot].line
        gap_s = sum(at(line, (float(n), float(square(0, n)))) for n in sizes) / len(sizes) / share
        before, end = len(self.prompts), self.now + seconds

        def one() -> None:
            if self.now < end:
                patience_s = self.chance.expovariate(1 / gap_s) if self.chance.random() < aborted else math.inf
                self.send(slot, self._size(least, most), patience_s=patience_s)
                self.after(self.chance.expovariate(1 / gap_s), one)

        one()
        self.run(seconds)
        return [prompt for prompt in self.prompts[before:] if prompt.took_s is not None]

    def _size(self, least: int, most: int) -> int:
        return int(math.exp(self.chance.uniform(math.log(least), math.log(most))))

    def pass_error(self, slot: int, sizes: tuple[int, ...] = (200, 1000, 3000)) -> float:
        """The largest relative error of the line, over these sizes."""
        line = self.engines[slot].line
        real = {n: at(line, (float(n), float(square(0, n)))) * self.engines[slot].slow for n in sizes}
        return max(abs(self.forecast.pass_s(slot, n) / real[n] - 1) for n in sizes)


# --- what a pass takes


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8, 1.1], ids=["idle", "30 %", "80 %", "more than it can do"])
@pytest.mark.parametrize("line", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_line_is_learnt_whether_prompts_wait_or_not_and_however_many_share_a_pass(line: Line, share: float, together: int) -> None:
    world = World(Engine(line, together))
    world.traffic(0, share, 300 * line[0] / GPU[0] if line is GPU else 300)
    assert world.pass_error(0) < 0.08


def test_first_tokens_of_one_pass_that_were_taken_for_several_would_bend_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.policy.forecast.TOGETHER_S", 0.0)
    monkeypatch.setattr("disagg.policy.forecast.TOGETHER_SHARE", 0.0)
    monkeypatch.setattr("disagg.policy.forecast.TOO_SOON", 0.0)
    with pytest.raises(AssertionError):
        test_the_line_is_learnt_whether_prompts_wait_or_not_and_however_many_share_a_pass(GPU, 1.1, 4)


def test_passes_of_a_few_milliseconds_are_not_taken_for_one() -> None:
    """In a queue their first tokens follow each other as quickly as those of one pass would come."""
    world = World(Engine((0.002, 1e-6, 0.0)), noise=0.0)
    for _ in range(50):
        for _ in range(20):
            world.send(0, world.chance.randint(50, 1000))
        world.run(1.0)
    assert world.pass_error(0, (500,)) < 0.3


def test_short_prompts_behind_a_long_one_are_not_taken_for_part_of_its_pass() -> None:
    world = World(Engine(GPU))
    for _ in range(20):
        world.send(0, 30_000)
        for _ in range(10):
            world.send(0, 100)
        world.run(10.0)
    assert world.pass_error(0, (100, 30_000)) < 0.05


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("share", [0.3, 0.8, 1.2])
def test_aborted_prompts_do_not_bend_the_line(share: float, together: int) -> None:
    world = World(Engine(GPU, together), seed=1)
    read = world.traffic(0, share, 100.0, aborted=0.5)
    assert len(read) < 0.9 * len(world.prompts), "many were aborted"
    assert world.pass_error(0) < 0.06


def test_a_prompt_that_is_aborted_in_the_queue_takes_nothing_from_the_one_before_it() -> None:
    forecast = Forecast()
    forecast.grow(1)
    first, second = forecast.sent(0, 1000, now=0.0), forecast.sent(0, 1000, now=0.01)
    before = forecast.wait_s(0, now=0.05)
    forecast.left(second, now=0.05)
    assert forecast.wait_s(0, now=0.05) == pytest.approx(before - second.busy_s), "what has passed of the first one is not forgotten"
    forecast.read(first, now=0.3)
    forecast.tick(1.0)
    assert forecast.known(0, now=1.0).reads_trust.samples == 1


def test_the_time_in_which_the_first_prompt_was_aborted_is_no_sample() -> None:
    forecast = Forecast()
    forecast.grow(1)
    first, second = forecast.sent(0, 4000, now=0.0), forecast.sent(0, 100, now=0.1)
    forecast.left(first, now=0.2)  # the engine goes on with it all the same
    forecast.read(second, now=0.5)
    third = forecast.sent(0, 100, now=1.0)
    forecast.tick(2.0)
    assert forecast.known(0, now=2.0).reads_trust.samples == 0
    forecast.read(third, now=2.0)
    forecast.tick(3.0)
    assert forecast.known(0, now=3.0).reads_trust.samples == 1


def test_a_prompt_that_is_sent_right_after_an_aborted_one_may_wait_for_what_is_left_of_it() -> None:
    forecast = Forecast()
    forecast.grow(1)
    forecast.left(forecast.sent(0, 4000, now=0.0), now=0.1)
    forecast.read(forecast.sent(0, 100, now=0.11), now=0.5)
    forecast.tick(1.0)
    assert forecast.known(0, now=1.0).reads_trust.samples == 0


@pytest.mark.parametrize("times", [50.0, 20.0, 10.0, 5.0, 2.0, 0.5, 0.2, 0.1])
def test_an_engine_of_quite_another_speed_is_foretold_after_ten_prompts(times: float) -> None:
    line = tuple(c * times for c in READS)
    for seed in range(5):
        world = World(Engine(line), seed=seed)
        for _ in range(10):
            world.send(0, world._size(100, 2000))
            world.run(max(0.2, 2 * at(line, (2000.0, 4e6))))
        assert world.pass_error(0, (200, 500, 1000)) < 0.3


@pytest.mark.parametrize(
    "line",
    [CPU, (0.2, 0.0, 0.0), (0.15, 1e-4, 0.0), (0.001, 1e-3, 0.0), (0.005, 1e-5, 0.0)],
    ids=["cpu", "flat", "nearly flat", "steep", "fast"],
)
@pytest.mark.parametrize("sizes", [(500, 500), (100, 2000)], ids=["alike", "mixed"])
def test_an_engine_with_a_line_of_another_shape_is_foretold_after_ten_prompts(line: Line, sizes: tuple[int, int]) -> None:
    for seed in range(5):
        world = World(Engine(line), seed=seed)
        for _ in range(10):
            world.send(0, world._size(*sizes) if sizes[0] < sizes[1] else sizes[0])
            world.run(5.0)
        assert world.pass_error(0, (500,) if sizes[0] == sizes[1] else (200, 500, 1000)) < 0.3


def test_one_slow_first_prompt_does_not_make_the_engine_slow() -> None:
    """It is compiled, or its kernels are loaded, while the first prompt waits."""
    world = World(Engine(READS))
    world.engines[0].slow = 30.0
    world.send(0, 1000)
    world.run(10.0)
    world.engines[0].slow = 1.0
    assert world.pass_error(0) < 2.0
    for _ in range(5):
        world.send(0, 1000)
        world.run(1.0)
    assert world.pass_error(0) < 0.15


def test_long_prompts_are_remembered_over_an_idle_night_though_the_prior_says_otherwise() -> None:
    world = World(Engine((0.001, 4e-4, 0.0)))  # no squares: at 16,000 tokens the prior's shape is off by a third
    world.traffic(0, 0.5, 600.0, least=100, most=16_000)
    before = world.forecast.pass_s(0, 16_000)
    morning = world.now + 12 * 3600.0
    for number in range(3):
        start = morning + 30.0 * number
        world.forecast.read(world.forecast.sent(0, 200, now=start), now=start + at(world.engines[0].line, (200.0, 4e4)))
        world.forecast.tick(start + 1.0)
        world.forecast.tick(start + 20.0)
    assert world.forecast.pass_s(0, 16_000) == pytest.approx(before, rel=0.05)


# --- what a prompt waits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("together", "share", "bound"), [(1, 0.3, 0.05), (1, 0.8, 0.05), (4, 0.3, 0.08), (4, 0.8, 0.2)])
def test_the_first_token_comes_when_it_was_foretold(together: int, share: float, bound: float, seed: int) -> None:
    """Several prompts in a pass share what each pass costs by itself: the wait is then taken to be a little longer than it is."""
    world = World(Engine(GPU, together), seed=seed)
    world.traffic(0, share, 60.0)
    read = world.traffic(0, share, 200.0)
    waited = [prompt for prompt in read if prompt.foretold_s > 1.2 * prompt.reading.seconds]
    assert len(waited) > 0.1 * len(read)
    assert median(prompt.error for prompt in read) < bound
    assert median(prompt.error for prompt in waited) < 2 * bound


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_an_engine_that_became_five_times_slower_is_believed_within_ten_seconds(share: float, seed: int) -> None:
    world = World(Engine(GPU), seed=seed)
    world.traffic(0, share, 200.0)
    world.engines[0].slow = 5.0
    world.traffic(0, share, 10.0)
    assert world.pass_error(0) < 0.15
    world.run(60.0)
    world.engines[0].slow = 1.0
    world.traffic(0, share, 10.0)
    assert world.pass_error(0) < 0.15


def test_one_that_reads_the_same_prompt_all_the_time_is_believed_too() -> None:
    """All that is remembered of it is of one size: what it did since it changed must not be scaled with what it did before."""
    world = World(Engine(GPU), noise=0.0)
    for slow in (1.0, 5.0, 1.0, 5.0):
        world.engines[0].slow = slow
        for number in range(20):
            world.send(0, 500)
            world.run(0.5)
            if number >= 7:
                assert world.pass_error(0, (500,)) < 0.1


def test_an_engine_that_hangs_loses_its_attraction_before_it_has_finished_anything() -> None:
    world = World(Engine(GPU), Engine(GPU))
    for slot in (0, 1):
        world.traffic(slot, 0.3, 60.0)
        world.run(5.0)
    world.engines[0].slow = 0.0
    world.send(0, 100)
    waits = []
    for _ in range(50):
        world.run(0.1)
        waits.append(world.foretold_s(0, 1000))
    assert waits[-1] > 4.0
    assert waits[10:] == sorted(waits[10:]), "more and more"
    assert world.foretold_s(1, 1000) < 0.2


# --- links


def paired(
    links: dict[tuple[int, int], float],
    share: float,
    seed: int = 0,
    seconds: float = 120.0,
    *,
    rtts: dict[tuple[int, int], float] | None = None,
    most: int = 4000,
) -> World:
    """One engine that reads for two that write, in slots 1 and 2."""
    world = World(Engine(GPU), links=links, seed=seed)
    world.rtts = rtts or {}
    gap_s = 0.12 / share

    def one() -> None:
        if world.now < seconds:
            world.send(0, world._size(100, most), decode=world.chance.choice((1, 2)))
            world.after(world.chance.expovariate(1 / gap_s), one)

    one()
    world.run(seconds + 10.0)
    return world


@pytest.mark.parametrize("slow", [2e-5, 2e-4, 1e-3], ids=["a little", "as slow as the pass", "many times slower"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8], ids=["idle", "30 %", "80 %"])
def test_a_slow_link_is_told_apart_from_its_engine(share: float, slow: float) -> None:
    world = paired({(0, 2): slow}, share)
    assert world.pass_error(0) < 0.08, "the engine is not blamed"
    assert world.forecast.link_s(0, 1, 1000) == 0.0
    assert world.forecast.link_s(0, 2, 1000) == pytest.approx(1000 * slow, rel=0.3)
    late = world.prompts[len(world.prompts) // 2 :]
    assert median(prompt.error for prompt in late) < 0.1
    outlook = Outlook(world.forecast, tokens=1000, cached={0: 500}, batches=(0, 0, 0), kv=(0, 0, 0), now=world.now)
    assert outlook.link_s(0, 2) == world.forecast.link_s(0, 2, 1000), "the KV of what was cached has the same way to go"


@pytest.mark.parametrize("seed", range(4))
def test_a_long_way_costs_long_prompts_no_more_than_short_ones(seed: int) -> None:
    """As over a tunnel: what every prompt waits for is not what every token waits for."""
    world = paired({}, 0.3, seed, rtts={(0, 2): 0.08}, most=2000)
    assert world.forecast.link_s(0, 2, 200) == pytest.approx(0.08, abs=0.02)
    assert world.forecast.link_s(0, 2, 8000) < 0.16, "were it the tokens', it would be most of a second"
    assert world.forecast.links(0)[1] == (0.0, 0.0)


def test_without_its_links_the_engine_would_be_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forecast, "_note", lambda *_: None)
    with pytest.raises(AssertionError):
        test_a_slow_link_is_told_apart_from_its_engine(0.05, 2e-4)


def test_an_only_link_is_part_of_what_its_engine_takes() -> None:
    world = World(Engine(GPU), links={(0, 1): 1e-4})
    for _ in range(40):
        world.send(0, world._size(100, 4000), decode=1)
        world.run(2.0)
    assert world.forecast.link_s(0, 1, 1000) == 0.0
    assert world.forecast.pass_s(0, 1000) == pytest.approx(at(GPU, (1000.0, 1e6)) + 0.1, rel=0.1)


def test_a_batch_says_nothing_of_the_links_that_it_went_over() -> None:
    """Its pass took longer than the one prompt of it whose first token came first would have taken."""
    world = World(Engine(GPU, together=8))
    for _ in range(60):
        world.send(0, 1000, decode=1)
        world.run(1.0)
        for _ in range(9):
            world.send(0, 1000, decode=2)
        world.run(2.0)
    assert world.forecast.link_s(0, 2, 1000) < 0.01


def test_nor_does_one_whose_first_prompt_had_found_the_engine_idle() -> None:
    forecast = Forecast()
    forecast.grow(3)
    for number in range(10):
        now = 10.0 * number
        forecast.read(forecast.sent(0, 1000, now=now), 1, now=now + 0.1)
        both = [forecast.sent(0, 1000, now=now + 5.0 + late) for late in (0.0, 0.001)]
        for late, reading in enumerate(both):
            forecast.read(reading, 2, now=now + 5.2 + 0.001 * late)
        forecast.tick(now + 9.0)
    assert forecast.link_s(0, 2, 1000) == 0.0


def test_an_engine_that_became_slower_has_no_slow_links_for_it() -> None:
    """What was seen of the one that is not used any more was seen before, and would seem to be the fast one."""
    world = World(Engine(GPU))
    for number in range(60):
        world.engines[0].slow = 1.0 if number < 40 else 5.0
        world.send(0, 1000, decode=1 + number % 2 if number < 40 else 1)
        world.run(3.0)
    assert world.forecast.link_s(0, 1, 1000) < 0.05
    assert world.pass_error(0, (1000,)) < 0.1


def test_short_prompts_that_came_late_make_no_slow_link() -> None:
    """Some milliseconds for ten tokens would be seconds for some thousands."""
    world = World(Engine(GPU))
    for number in range(60):
        world.send(0, 10 if number % 2 else 2000, decode=1 + number // 2 % 2)
        world.run(1.0)
    for number in range(4):  # the last that is seen of one of them
        reading = world.forecast.sent(0, 10, now=world.now + number)
        world.forecast.read(reading, 1, now=world.now + number + 0.06)
        world.forecast.tick(world.now + number + 0.5)
    assert world.forecast.link_s(0, 1, 4000) < 0.05


def test_a_link_that_was_not_used_for_long_may_have_been_mended() -> None:
    world = paired({(0, 2): 2e-4}, 0.3)
    assert world.forecast.link_s(0, 2, 1000) > 0.1
    world.run(LINK_S + 1.0)
    assert world.forecast.link_s(0, 2, 1000) == 0.0


def test_one_absurd_time_is_no_link() -> None:
    world = paired({}, 0.3)
    reading = world.forecast.sent(0, 1000, now=world.now)
    world.forecast.read(reading, 2, now=world.now + 1e9)
    later = world.now + 1e9 + 1.0
    world.forecast.tick(later)
    world.forecast.read(world.forecast.sent(0, 1000, now=later), 1, now=later + at(GPU, (1000.0, 1e6)))
    world.forecast.tick(later + 1.0)
    assert world.forecast.link_s(0, 2, 1000) < 0.02
    assert world.pass_error(0) < 0.08


def test_a_prompt_whose_kv_is_still_on_its_way_is_not_waited_for() -> None:
    forecast = Forecast()
    forecast.grow(3)
    late = forecast.sent(0, 1000, now=0.0)
    other = forecast.sent(0, 1000, now=0.1)
    forecast.read(other, 1, now=0.3)
    forecast.tick(0.5)
    assert late.overtaken
    assert forecast.wait_s(0, now=0.5) == 0.0
    forecast.read(late, 2, now=9.0)
    forecast.tick(10.0)
    forecast.check()
    assert forecast.known(0, now=10.0).reads_trust.samples == 0, "neither says what a pass takes"


# --- engines that come and go


def test_a_new_engine_starts_from_the_peer_that_is_known_best() -> None:
    world = World(Engine(CPU), Engine(GPU))
    world.traffic(0, 0.5, 100.0)
    for _ in range(ENOUGH - 1):
        world.send(1, 500)
        world.run(1.0)
    forecast = world.forecast
    slots = len(world.engines) + 2
    forecast.grow(slots + 1)
    assert forecast.pass_s(slots, 1000) == forecast.pass_s(0, 1000)
    assert forecast.doubt(slots) == "0 samples so far; taken from what another engine does"
    assert forecast.pass_s(2, 1000) == pytest.approx(forecast.pass_s(0, 1000), rel=0.1), "so does one that was there but never measured"
    assert forecast.pass_s(1, 1000) == forecast.pass_s(0, 1000), "a few samples are not enough to prefer it"
    for _ in range(2):
        world.send(1, 500)
        world.run(1.0)
    assert forecast.pass_s(1, 1000) < 0.5 * forecast.pass_s(0, 1000), "these are"


def test_what_is_forgotten_is_this_engine_and_its_links() -> None:
    world = paired({(0, 2): 2e-4}, 0.3)
    forecast = world.forecast
    reading = forecast.sent(0, 1000, now=world.now)
    forecast.forget(1)
    forecast.tick(world.now)
    assert forecast.known(0, now=world.now).reads_trust.samples > 0
    assert forecast.link_s(0, 2, 1000) == 0.0, "with nothing to compare it with"
    forecast.forget(0)
    assert forecast.known(0, now=world.now).reads_trust.samples == 0
    assert forecast.wait_s(0, now=world.now) == pytest.approx(reading.busy_s), "what is in flight is still to be ended"
    forecast.left(reading, now=world.now)
    assert forecast.wait_s(0, now=world.now) == 0.0
    forecast.forget(99)
    forecast.check()


def test_a_pass_of_the_process_before_says_nothing_of_this_one() -> None:
    forecast = Forecast()
    forecast.grow(1)
    forecast.read(forecast.sent(0, 1000, now=0.0), now=3.0)
    forecast.forget(0)
    forecast.tick(4.0)
    assert forecast.known(0, now=4.0).reads_trust.samples == 0


def test_before_any_measurement_there_is_something_to_go_by() -> None:
    forecast = Forecast()
    forecast.grow(2)
    assert forecast.pass_s(0, 1000) == pytest.approx(at(READS, (1000.0, 1e6)))
    assert forecast.pass_s(0, 500, 500) == pytest.approx(at(READS, (500.0, float(square(500, 500)))))
    assert forecast.step_s(0, 8, 16_000) == pytest.approx(at(STEPS, (8.0, 16_000.0)))
    assert (forecast.answer_tokens, forecast.prompt_tokens) == (ANSWER_TOKENS, 0.0)
    assert forecast.first_token_s(0, 1000, now=5.0) == forecast.pass_s(0, 1000)
    for _ in range(3):
        forecast.sent(0, 1000, now=5.0)
    assert forecast.wait_s(0, now=5.0) == pytest.approx(3 * forecast.pass_s(0, 1000))
    assert forecast.wait_s(1, now=5.0) == 0.0
    assert "another machine" in forecast.doubt(0)
    forecast.check()


# --- answers


def stepping(line: Line, *, prompt: int = 1000, answers: int = 200) -> Forecast:
    """A forecast that has seen steps of this line, prompts and answers."""
    chance = random.Random(3)
    forecast = Forecast()
    forecast.grow(1)
    now = 0.0
    forecast.left(forecast.sent(0, prompt, now=now), now=now)
    writing: list[int] = []
    for _ in range(600):
        now += 0.2
        if chance.random() < 0.6 and len(writing) < 64:
            writing.append(chance.randint(100, 4000))
            forecast.began(0, writing[-1])
        elif writing:
            forecast.ended(0, writing.pop(chance.randrange(len(writing))))
        if writing:
            forecast.stepped(0, at(line, (float(len(writing)), float(sum(writing)))), now=now)
        forecast.tick(now)
    for kv in writing:
        forecast.ended(0, kv)
    for _ in range(500):
        forecast.answered(answers)
    forecast.check()
    return forecast


def test_steps_are_learnt_from_pauses() -> None:
    line = (0.03, 5e-4, 1e-7)
    forecast = stepping(line)
    for batch, kv in ((1, 500), (16, 16_000), (60, 120_000)):
        assert forecast.step_s(0, batch, kv) == pytest.approx(at(line, (float(batch), float(kv))), rel=0.05)


def test_the_best_batch_is_the_one_whose_step_just_takes_what_it_may() -> None:
    """Before a prompt came, contexts are half an answer: a step takes 0.012 s, and 1e-4 + 2e-8 * 100 = 1.02e-4 s for each answer."""
    forecast = Forecast()
    forecast.grow(1)
    assert forecast.best_batch(0, limit_s=0.05) == 372  # 0.038 / 1.02e-4 = 372.5
    assert forecast.best_batch(0, limit_s=0.05, most=128) == 128
    assert forecast.best_batch(0, limit_s=0.05, kv_tokens=10_000) == 50  # 200 tokens each at their end
    assert forecast.best_batch(0, limit_s=0.001) == 60, "it cannot keep that: half as long again as one alone takes, 0.0182 s, counts"
    assert forecast.best_batch(0, limit_s=1e6) == BATCH_LIMIT
    assert forecast.write_s(0, limit_s=0.05, most=100) == pytest.approx(200 * (0.012 + 100 * 1e-4 + 10_000 * 2e-8) / 100)
    forecast.left(forecast.sent(0, 900, now=0.0), now=0.0)
    assert forecast.best_batch(0, limit_s=0.05) == 316  # contexts of 1000: 0.038 / 1.2e-4 = 316.7
    assert forecast.best_batch(0, limit_s=0.05, kv_tokens=11_000) == 10
    assert forecast.write_s(0, limit_s=0.05, kv_tokens=11_000) == pytest.approx(200 * (0.012 + 10 * 1e-4 + 10_000 * 2e-8) / 10)


def test_lengths_follow_what_comes() -> None:
    forecast = stepping(STEPS, prompt=300, answers=50)
    assert forecast.prompt_tokens == 300
    assert forecast.answer_tokens == pytest.approx(50, abs=1)


def test_what_an_answer_costs_those_that_it_joins() -> None:
    forecast = Forecast()
    forecast.grow(2)
    outlook = Outlook(forecast, tokens=1000, cached={}, batches=(0, 10), kv=(0, 10_000), now=0.0)
    alone = 200 * (0.012 + 1e-4 + 1000 * 2e-8)
    assert outlook.answer_s(0) == pytest.approx(alone)
    assert outlook.answer_s(1) == pytest.approx(200 * (0.012 + 11e-4 + 11_000 * 2e-8 + 10 * (1e-4 + 1000 * 2e-8)))


def test_the_last_token_is_always_read() -> None:
    forecast = Forecast()
    forecast.grow(3)
    outlook = Outlook(forecast, tokens=1000, cached={0: 1000, 1: 400}, batches=(0, 0, 0), kv=(0, 0, 0), now=0.0)
    assert [outlook.cached(slot) for slot in (0, 1, 2)] == [999, 400, 0]
    assert outlook.first_token_s(0) < outlook.first_token_s(1) < outlook.first_token_s(2)
    nothing = Outlook(forecast, tokens=0, cached={0: 5}, batches=(0, 0, 0), kv=(0, 0, 0), now=0.0)
    assert nothing.cached(0) == 0


def test_reading_pauses_those_that_are_written() -> None:
    forecast = Forecast()
    forecast.grow(1)
    for _ in range(3):
        forecast.began(0, 1000)
    outlook = Outlook(forecast, tokens=1000, cached={}, batches=(3,), kv=(3000,), now=0.0)
    assert outlook.pause_s(0) == pytest.approx(3 * forecast.pass_s(0, 1000))


# --- what must harm nothing


@pytest.mark.parametrize("jump", [-1e6, 1e6, -3.0])
def test_a_clock_that_jumps_harms_nothing(jump: float) -> None:
    world = World(Engine(GPU), Engine(GPU))
    world.traffic(0, 0.5, 60.0)
    waiting = [world.send(0, 1000) for _ in range(3)]
    forecast, now = world.forecast, world.now + jump
    forecast.stepped(0, 0.5, now=world.now)
    assert jump > 0 or forecast.wait_s(0, now=now) <= sum(prompt.reading.busy_s for prompt in waiting) + 1e-9
    for number, prompt in enumerate(waiting):
        forecast.read(prompt.reading, now=now + 0.1 * number)
        forecast.check()
    assert forecast.wait_s(0, now=now + 1.0) == 0.0
    slower = tuple(2 * c for c in GPU)
    samples = forecast.known(0, now=now).reads_trust.samples
    steps = []
    for number in range(40):  # it learns on, by the clock as it is now
        then = now + 1.0 + number
        forecast.read(forecast.sent(0, 1000, now=then), now=then + at(slower, (1000.0, 1e6)))
        forecast.stepped(0, 0.5, now=then)
        forecast.tick(then + 0.9)
        steps.append(forecast.known(0, now=then).steps_trust.samples)
        forecast.check()
    assert forecast.known(0, now=now).reads_trust.samples >= samples + 39
    assert steps[-1] >= 39
    assert forecast.pass_s(0, 1000) == pytest.approx(at(slower, (1000.0, 1e6)), rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e9, 1e-9])
def test_an_absurd_measurement_harms_nothing(seconds: float) -> None:
    forecast = stepping(STEPS)
    before = forecast.step_s(0, 16, 16_000)
    for number in range(3):
        forecast.began(0, 1000)
        forecast.stepped(0, seconds, now=1000.0 + number)
        forecast.tick(2000.0 + number)
        forecast.ended(0, 1000)
        forecast.check()
    assert forecast.step_s(0, 16, 16_000) == pytest.approx(before, rel=0.1)

    world = World(Engine(GPU))
    world.traffic(0, 0.5, 60.0)
    for number in range(3):
        start = world.now + 10.0 * number
        world.forecast.read(world.forecast.sent(0, 1000, now=start), 1, now=start + seconds)
        world.forecast.tick(start + 5.0)
        world.forecast.check()
    assert world.pass_error(0) < 0.1


def test_a_prompt_without_tokens_harms_nothing() -> None:
    forecast = Forecast()
    forecast.grow(2)
    for number in range(20):
        forecast.read(forecast.sent(0, 0, now=float(number)), 1, now=number + 0.02)
        forecast.tick(number + 0.5)
        forecast.check()
    assert forecast.first_token_s(0, 0, now=30.0) < 0.1
    assert forecast.link_s(0, 1, 1000) == 0.0


def events(chance: random.Random, forecast: Forecast) -> Iterator[None]:
    """Whatever a router may say, in any order, at any time."""
    now, slots = 0.0, 0
    readings: list[Reading] = []
    writing: list[tuple[int, int]] = []
    while True:
        now += chance.choice((0.0, 1e-4, 0.01, chance.expovariate(1.0), 0.0 if chance.random() < 0.999 else chance.choice((-100.0, 1e4))))
        event = chance.random()
        if slots == 0 or (event < 0.001 and slots < 12):
            slots += 1
            forecast.grow(slots)
        slot = chance.randrange(slots)
        if event < 0.25:
            new = chance.choice((0, 1, 100, 4000, 10**6))
            readings.append(forecast.sent(slot, new, chance.choice((0, 0, 10_000)), now=now))
        elif event < 0.45 and readings:
            place = 0 if chance.random() < 0.7 else chance.randrange(len(readings))
            forecast.read(readings.pop(place), chance.choice((None, slot)), now=now)
        elif event < 0.55 and readings:
            forecast.left(readings.pop(chance.randrange(len(readings))), now=now)
        elif event < 0.65:
            writing.append((slot, chance.randrange(10_000)))
            forecast.began(*writing[-1])
        elif event < 0.75 and writing:
            forecast.ended(*writing.pop(chance.randrange(len(writing))))
            forecast.answered(chance.randrange(2000))
        elif event < 0.85:
            forecast.stepped(slot, chance.choice((0.0, 0.02, chance.expovariate(10.0), 1e9, math.nan)), now=now)
        elif event < 0.855:
            forecast.forget(slot)
        elif event < 0.9:
            forecast.tick(now)
        else:
            said = [
                forecast.first_token_s(slot, 1000, now=now),
                forecast.wait_s(slot, now=now),
                forecast.link_s(slot, chance.randrange(slots), 1000),
                forecast.step_s(slot, 8, 8000),
                forecast.write_s(slot, limit_s=0.05),
            ]
            assert all(math.isfinite(s) and s >= 0.0 for s in said)
        yield


def test_a_random_walk_keeps_its_books() -> None:
    forecast = Forecast()
    walk = events(random.Random(7), forecast)
    for _ in range(20_000):
        next(walk)
        forecast.check()
    assert "engines=" in repr(forecast)


# --- what keeps an engine busy


def test_what_travels_keeps_no_engine_busy() -> None:
    """Half of the time of a short prompt is its way: an engine can do twice as many as their first tokens let think."""
    line, way_s, new = (0.010, 1.0e-4, 0.0), 0.020, 100
    forecast, chance = Forecast(), random.Random(3)
    forecast.grow(1)
    free_at = now = 0.0
    events: list[tuple[float, Reading]] = []
    for number in range(1000):
        now += chance.expovariate(20.0)
        while events and events[0][0] <= now:
            at_, reading = events.pop(0)
            forecast.read(reading, 1, now=at_)
        if number % 10 == 0:
            forecast.tick(now)
        free_at = max(free_at, now) + line[0] + line[1] * new
        events.append((free_at + way_s, forecast.sent(0, new, now=now)))
    assert forecast.busy_s(0, new) == pytest.approx(0.020, rel=0.1)
    assert forecast.pass_s(0, new) > 1.2 * forecast.busy_s(0, new)


def test_without_spans_from_a_queue_an_engine_is_taken_to_be_busy_until_the_first_token() -> None:
    forecast = Forecast()
    forecast.grow(1)
    for number in range(20):
        reading = forecast.sent(0, 100, now=float(number))
        forecast.read(reading, 1, now=number + 0.05)
        forecast.tick(number + 0.5)
    assert forecast.busy_s(0, 100) == forecast.pass_s(0, 100) == pytest.approx(0.05, rel=0.05)


def test_the_first_answers_say_at_once_how_long_answers_are() -> None:
    forecast = Forecast()
    for _ in range(5):
        forecast.answered(8)
    assert forecast.answer_tokens == pytest.approx(8)
    for _ in range(100):
        forecast.answered(80)
    assert 60 < forecast.answer_tokens < 80
