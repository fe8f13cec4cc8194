"""What must be true of every run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from tests.sim import words

if TYPE_CHECKING:
    from tests.sim.client import Ask
    from tests.sim.world import World

LIMIT_S = 90.0
"""A request is over within this: two attempts with all their deadlines, and the time that a router may stand still."""
EXPECT_LOST: int | None = 0
"""How many accepted requests may end in a clean error; None for any number. A 503 that says when to come again is none."""


class Found(msgspec.Struct, frozen=True):
    """A broken promise: which one, and how."""

    clause: str
    story: str


def judge(world: World) -> list[Found]:
    """Looks at a world whose load stopped ten seconds ago."""
    return [*_requests(world), *_engines(world), *_router(world), *_logs(world)]


def _requests(world: World) -> list[Found]:
    found = []
    for ask in world.asks:
        if not ask.outcome:
            found.append(Found("ended", f"request {ask.number} ({ask.route}) has no end"))
        elif ask.outcome == "wrong":
            found.append(Found("right", f"request {ask.number} ({ask.route}, stream={ask.stream}): {ask.why}"))
        elif ask.ended_at - ask.sent_at > LIMIT_S:
            found.append(Found("in time", f"request {ask.number} took {ask.ended_at - ask.sent_at:.1f} s"))
        elif ask.outcome in {"cut", "unconnected"} and not _router_was_down(world, ask):
            found.append(Found("ended", f"request {ask.number} ({ask.route}): its connection was {ask.outcome} while the router lived"))
        elif ask.outcome == "refused":
            found.append(Found("right", f"request {ask.number} ({ask.route}) is a good one and was refused"))
    lost = [ask.number for ask in world.asks if ask.outcome == "lost"]
    if EXPECT_LOST is not None and len(lost) > EXPECT_LOST:
        found.append(Found("lost", f"requests {lost} ended in errors"))
    return found


def _router_was_down(world: World, ask: Ask) -> bool:
    return any(ask.sent_at <= up + 0.1 and down <= ask.ended_at for down, up in world.router_down)


def _engines(world: World) -> list[Found]:
    found = []
    for engine in world.engines():
        if engine.held():
            found.append(Found("engines empty", engine.held()))
        if engine.late_writes:
            found.append(Found("late writes", f"{engine.name} had {engine.late_writes}"))
        if tasks := world.loop.of(engine.process):
            found.append(Found("tasks", f"{engine.name} runs {[task.get_name() for task in tasks]}"))
    found += [Found("orphans", f"{orphan} runs for a client who left") for orphan in world.orphans[:5]]
    return found


def _router(world: World) -> list[Found]:
    found = []
    router = world.router
    assert router is not None
    if router._relay.live:
        found.append(Found("attempts", f"{router._relay.live} attempts live: {list(router._relay._live)}"))
    books = router._relay.admission.books
    if not books.is_empty:
        found.append(Found("books", f"{books}"))
    if any(books.in_flight.now):
        found.append(Found("in flight", f"{books.in_flight.now}"))
    if router.metrics.inflight:
        found.append(Found("in flight", f"{router.metrics.inflight} requests"))
    tasks, ends = world.residue()
    if extra := Counter(tasks) - Counter(world.baseline[0]):
        found.append(Found("tasks", f"the router still runs {sorted(extra.elements())}"))
    if ends > world.baseline[1]:
        found.append(Found("connections", f"the router holds {ends} connections, {world.baseline[1]} before"))
    found += [Found("faults", fault) for fault in world.loop.faults]
    found += [Found("faults", error) for error in world.errors]
    return found


def _logs(world: World) -> list[Found]:
    secrets = {words.text_of(ask.prompt).strip() for ask in world.asks if len(ask.prompt) >= 5}
    secrets |= {ask.right()[0].strip()[:60] for ask in world.asks if ask.limit >= 8 and ask.right()[2] >= 8}
    text = "\n".join(world.logs)
    return [Found("logs", "a prompt or an answer stands in a log")] if any(secret in text for secret in secrets) else []
