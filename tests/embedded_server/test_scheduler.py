"""The scheduler against a fake model that remembers which token lies where: every step reads exactly its own prefix."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import pytest

from disagg.engines.embedded.pages import PagePool, PrefixCache, pages_for
from disagg.engines.embedded.scheduler import Finish, Finished, Job, Leg, Made, Phase, Row, Scheduler

PAGE = 4


class Token(NamedTuple):
    token: int


class World:
    """A scheduler, the fake memory, and the outside: decode engines that greet, prefill engines that write."""

    def __init__(self, pages: int, *, cached: bool = True, **limits: Any) -> None:
        self.pool = PagePool(pages, (1, 2, PAGE, 1, 1))
        cache = PrefixCache(self.pool, PAGE) if cached else None
        self.scheduler: Scheduler[Token] = Scheduler(self.pool, cache, page_size=PAGE, **limits)
        self.memory = np.full((pages, PAGE), -1)
        self.rows: tuple[Row, ...] = ()
        self.now = 0.0
        self.serial = 0
        self.jobs: list[Job] = []
        self.made: dict[str, list[int]] = {}
        self.finished: list[Job] = []

    def add(self, prompt: list[int], new: int, leg: Leg = Leg.LOCAL, **more: Any) -> Job:
        self.serial += 1
        limit = 1 if leg is Leg.PREFILL else new
        job = Job(f"job {self.serial}", np.array(prompt, np.int32), limit, leg=leg, **more)
        self.scheduler.add(job, now=self.now)
        self.jobs.append(job)
        return job

    def begin(self) -> None:
        self.scheduler.admit(now=self.now)
        self.rows = self.scheduler.plan(now=self.now)
        for row in self.rows:
            job = row.job
            here = self.memory[job.pages].reshape(-1)
            assert (here[: row.start] == job.tokens[: row.start]).all(), "another job's tokens are in these pages"
            self._write(job, row.start, row.end)

    def end(self) -> None:
        chosen = [Token(int(row.job.tokens[: row.end].sum()) % 5) if row.sample else None for row in self.rows]
        for row in self.rows:
            if row.job.phase is Phase.DONE:
                continue
            assert (self.memory[row.job.pages].reshape(-1)[: row.end] == row.job.tokens[: row.end]).all()
        self.rows = ()
        self.digest(self.scheduler.apply(chosen, now=self.now))

    def step(self) -> None:
        self.begin()
        self.end()

    def arrive(self, job: Job) -> None:
        self._write(job, 0, len(job.prompt))
        self.digest(self.scheduler.arrived(job.rid, Token(int(job.prompt.sum()) % 5), now=self.now))
        self.scheduler.writer_done(job.rid)

    def digest(self, events: Any) -> None:
        for event in events:
            if isinstance(event, Made):
                self.made.setdefault(event.job.rid, []).append(event.sampled.token)
            elif isinstance(event, Finished):
                self.finished.append(event.job)

    def phase(self, *phases: Phase) -> list[Job]:
        return [job for job in self.jobs if job.phase in phases]

    def _write(self, job: Job, start: int, end: int) -> None:
        for at in range(start, end):
            self.memory[job.pages[at // PAGE], at % PAGE] = job.tokens[at]


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % 5)
    return tokens[len(prompt) :]


def run_until_done(world: World, limit: int = 500) -> None:
    for _ in range(limit):
        if not world.scheduler.jobs:
            return
        world.step()
        world.scheduler.check()
    raise AssertionError(f"no end: {world.scheduler!r}")


def test_a_job_lives_from_prompt_to_length() -> None:
    world = World(16, chunk_tokens=4)
    job = world.add([1, 2, 3, 4, 5, 6], 3)
    run_until_done(world)
    assert world.made[job.rid] == expected([1, 2, 3, 4, 5, 6], 3)
    assert job.finish == Finish("length")
    assert [what for _, what in world.scheduler.story(job.rid)] == [
        "WAITING → WAITING",
        "WAITING → PREFILLING",
        "PREFILLING → DECODING",
        "DECODING → DONE",
    ]
    assert world.pool.free == 16


def test_stop_token_and_stop_check_end_a_job() -> None:
    world = World(16)
    prompt = [1, 2, 3]
    first = expected(prompt, 1)[0]
    by_token = world.add(prompt, 9, stop_ids=frozenset({first}))
    by_text = world.add(prompt, 9, accept=lambda token: "x" if token == first else None)
    run_until_done(world)
    assert by_token.finish == Finish("stop", matched=first)
    assert by_text.finish == Finish("stop", matched="x")


def test_a_leak_keeps_the_pages_of_every_job_that_ends_while_it_is_on() -> None:
    leaks = [True]
    world = World(32, cached=False, leaks=lambda: leaks[0])
    world.add([1, 2, 3], 2)
    run_until_done(world)
    assert world.pool.held == 2
    cut = world.add([1, 2, 3], 6)
    world.begin()
    world.scheduler.abort(cut.rid, Finish("abort"), now=0)  # a step still uses its pages
    world.end()
    assert world.pool.held == 2 + 3
    world.scheduler.check()
    receiving = world.add([1, 2, 3], 2, Leg.DECODE)
    world.scheduler.admit(now=0)
    world.scheduler.abort(receiving.rid, Finish("abort"), now=0)
    world.scheduler.writer_done(receiving.rid)
    assert world.pool.quarantined == 2
    leaks[0] = False
    world.add([1, 2, 3], 2)
    run_until_done(world)
    assert (world.pool.held, world.pool.quarantined, world.pool.free) == (5, 2, 25)


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    world = World(64, chunk_tokens=8)
    short = world.add([1], 50)
    world.step()
    long = world.add([2] * 80, 1)
    before = short.made
    while long.phase is not Phase.DONE:
        world.step()
    assert short.made - before == 10  # one token for each of the ten chunks


def test_the_second_of_two_equal_prompts_comes_from_the_cache() -> None:
    world = World(16)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    first = world.add(prompt, 1)
    run_until_done(world)
    second = world.add(prompt, 1)
    run_until_done(world)
    assert (first.cached, second.cached) == (0, 4)
    assert world.made[first.rid] == world.made[second.rid]


def test_wanted_prompt_logprobs_are_not_taken_from_the_cache() -> None:
    world = World(16)
    prompt = list(range(12))
    world.add(prompt, 1)
    run_until_done(world)
    for start, cached in ((0, 0), (4, 0), (5, 4), (11, 8)):
        job = world.add(prompt, 1, logprobs_from=start)
        world.begin()
        assert job.cached == cached
        assert world.rows[0].all_logits
        world.end()


def test_prefill_waits_for_decode_and_keeps_its_pages_until_they_are_acknowledged() -> None:
    world = World(8)
    job = world.add([1, 2, 3, 4, 5], 9, Leg.PREFILL)
    world.step()
    assert world.phase(Phase.BOOTSTRAP) == [job]
    world.scheduler.bootstrapped(job.rid, now=0)
    world.step()
    assert world.phase(Phase.HANDING_OVER) == [job]
    assert world.pool.held == 2
    world.digest(world.scheduler.handed_over(job.rid, now=0))
    assert world.pool.free == 8
    assert job.finish == Finish("length")


def test_an_aborted_receiver_leaves_its_pages_in_quarantine() -> None:
    world = World(4, cached=False)
    job = world.add([1] * 8, 8, Leg.DECODE)
    waiting = world.add([1] * 8, 8, Leg.DECODE)
    world.step()
    assert job.phase is Phase.RECEIVING
    world.digest(world.scheduler.abort(job.rid, Finish("abort"), now=0))
    world.step()
    assert (world.pool.quarantined, waiting.phase) == (4, Phase.WAITING)
    world.scheduler.writer_done(job.rid)
    world.step()
    assert waiting.phase is Phase.RECEIVING
    world.scheduler.check()


def test_an_abort_during_a_step_frees_the_pages_after_it() -> None:
    world = World(8)
    job = world.add([1, 2, 3], 9)
    world.begin()
    world.digest(world.scheduler.abort(job.rid, Finish("abort"), now=0))
    assert world.finished == [job]
    assert world.pool.free < 8
    world.end()
    assert world.pool.free == 8
    assert world.made == {}


def test_the_youngest_is_retracted_and_its_answer_is_the_same() -> None:
    world = World(8, cached=False, reserve_tokens=1)
    prompts = [[1, 2, 3], [4, 5], [6]]
    jobs = [world.add(prompt, 20) for prompt in prompts]
    run_until_done(world)
    assert world.scheduler.retractions > 0
    assert jobs[0].retractions == 0
    for job, prompt in zip(jobs, prompts, strict=True):
        assert world.made[job.rid] == expected(prompt, 20)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cached", [True, False])
def test_random_walk(seed: int, cached: bool) -> None:
    chance = random.Random(seed)
    world = World(24, cached=cached, max_running=5, chunk_tokens=7, reserve_tokens=3)
    prompts: dict[str, list[int]] = {}
    draining: list[str] = []

    def pick(*phases: Phase) -> Job | None:
        found = world.phase(*phases)
        return chance.choice(found) if found else None

    def add() -> None:
        prompt = [chance.randrange(3) for _ in range(chance.randrange(1, 40))]
        leg = chance.choice(list(Leg))
        if not (cached and leg is Leg.DECODE):
            job = world.add(prompt, chance.randrange(1, 30), leg, stop_ids=frozenset({4}))
            prompts[job.rid] = prompt

    def abort() -> None:
        job = pick(*set(Phase) - {Phase.DONE})
        if job is not None and chance.random() < 0.4:
            if job.phase is Phase.RECEIVING:
                draining.append(job.rid)
            world.digest(world.scheduler.abort(job.rid, Finish("abort"), now=world.now))

    def others() -> None:
        if job := pick(Phase.BOOTSTRAP):
            world.scheduler.bootstrapped(job.rid, now=world.now)
        if job := pick(Phase.RECEIVING):
            world.arrive(job)
        if job := pick(Phase.HANDING_OVER):
            world.digest(world.scheduler.handed_over(job.rid, now=world.now))

    def writer_done() -> None:
        if draining:
            world.scheduler.writer_done(draining.pop(chance.randrange(len(draining))))

    def turn() -> None:
        world.end() if world.rows else world.begin()

    moves = [add, add, others, abort, writer_done, turn, turn, turn, turn]
    for step in range(1_500):
        world.now = float(step)
        chance.choice(moves)()
        world.scheduler.check()
    for _ in range(3_000):
        if not world.scheduler.jobs and not world.rows:
            break
        if world.rows:
            world.end()
        for job in world.phase(Phase.BOOTSTRAP):
            world.scheduler.bootstrapped(job.rid, now=0)
        for job in world.phase(Phase.RECEIVING):
            world.arrive(job)
        for job in world.phase(Phase.HANDING_OVER):
            world.digest(world.scheduler.handed_over(job.rid, now=0))
        for rid in draining:
            world.scheduler.writer_done(rid)
        draining.clear()
        world.begin()
        world.scheduler.check()
    for rid in draining:
        world.scheduler.writer_done(rid)
    assert not world.scheduler.jobs, f"not everything came to an end: {world.scheduler!r}"
    assert world.pool.free == 24
    for job in world.finished:
        made = world.made.get(job.rid, [])
        assert made == expected(prompts[job.rid], len(made))


def test_sizes_that_never_fit_are_known_beforehand() -> None:
    world = World(4)
    assert world.scheduler.fits(10, 6)
    assert not world.scheduler.fits(10, 7)
    assert pages_for(16, PAGE) == 4
    with pytest.raises(AssertionError):
        world.add([1] * 10, 7)
