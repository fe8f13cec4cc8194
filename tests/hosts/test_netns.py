"""What breaks between and on five hosts, how fast the router notices, what clients see, and that all is well again afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.hosts.conftest import Cluster
from tests.hosts.net import CONTROL_PORT
from tests.hosts.rig import HOSTS, Answer, Load

pytestmark = pytest.mark.slow

NO_NEW_WORK_S = 1.0
DEAD_S = 2.0
EXIT_S = 0.5
CONNECT_S = 2.0
"""How long the router waits for a connection, `router.connect_timeout_s`."""
HANG_S = 5.0
HANDOVER_S = 5.0
"""The least that a handoff gets, and what it gets as soon as it is known how long they take here."""
ENOUGH = 16
LINK_BACK_S = 10.0
"""Until a pair is used again, after its link is there again."""
READY_AGAIN_S = 3.0
ORPHANS_GONE_S = 5.0
NOTICED_S = 0.75
"""A counter that stands still is first seen as such by the agent's next look, then in its next heartbeat, and judged with a later one."""
MARGIN_S = 0.3
"""For looking every 20 ms, on a machine with two cores and six processes."""
EVERY_S = 0.15


def needs_cuts(cluster: Cluster) -> None:
    if cluster.rig.network.why_uncut:
        pytest.skip(cluster.rig.network.why_uncut)


async def until(at: float) -> None:
    await asyncio.sleep(max(0.0, at - time.monotonic()))


def flowing_on(answers: list[Answer], engine: str) -> list[Answer]:
    return [a for a in answers if a.flows and engine in {a.prefill, a.decode}]


async def streams_on(load: Load, engine: str) -> list[Answer]:
    """Waits for streams through an engine that will last for seconds."""
    await load.until(lambda answers: len(flowing_on(answers, engine)) > 2, f"streams through {engine}")
    return flowing_on(load.answers, engine)


async def test_requests_flow_over_all_hosts(cluster: Cluster) -> None:
    load = cluster.load()
    async with load.running(EVERY_S):
        await load.until(lambda answers: len(answers) == 12, "twelve requests")
    assert all(cluster.is_whole(a) for a in load.answers)
    assert {a.prefill for a in load.answers} | {a.decode for a in load.answers} == set(HOSTS)
    assert {a.attempts for a in load.answers} == {1}
    await cluster.healed()


# --- a host that cannot be reached


async def unreachable(cluster: Cluster, victim: str, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """A host is lost for some seconds under load, and comes back."""
    load, watch = cluster.load(), cluster.watch
    async with load.running(EVERY_S):
        await streams_on(load, victim)
        at = time.monotonic()
        begin()
        try:
            struck = flowing_on(load.answers, victim)
            await watch.until(lambda g: g.state(victim) == "dead", f"{victim} is dead", 2 * DEAD_S)
            await until(at + DEAD_S + 2 * MARGIN_S)
            load.stop()
        finally:
            end()
        await watch.until(lambda g: g.all_ready, f"{victim} is back", READY_AGAIN_S)
    assert watch.first(at, lambda g: g.state(victim) != "ready") <= NO_NEW_WORK_S + MARGIN_S, watch.story(victim, at)
    assert watch.first(at, lambda g: g.state(victim) == "dead") <= DEAD_S + MARGIN_S, watch.story(victim, at)
    sent = [a for a in await load.attempts() if victim in a.engines]
    assert max(a.began_at for a in sent) - at <= NO_NEW_WORK_S + MARGIN_S
    assert max(a.ended_at for a in sent if a.began_at > at) - at <= NO_NEW_WORK_S + CONNECT_S + MARGIN_S
    assert struck
    assert [a for a in load.answers if not cluster.is_whole(a)] == []  # what was begun goes on elsewhere
    await cluster.healed()


@pytest.mark.parametrize("victim", ["d1", "p1"])
async def test_a_link_goes_down_and_comes_up(cluster: Cluster, victim: str) -> None:
    needs_cuts(cluster)
    network = cluster.rig.network
    await unreachable(cluster, victim, lambda: network.unplug(victim), lambda: network.plug(victim))


@pytest.mark.parametrize(("source", "target"), [("router", "d2"), ("d2", "router")])
async def test_one_direction_is_cut(cluster: Cluster, source: str, target: str) -> None:
    needs_cuts(cluster)
    network = cluster.rig.network
    await unreachable(cluster, "d2", lambda: network.cut(source, target), lambda: network.mend(source, target))


async def test_a_whole_host_stands_still(cluster: Cluster) -> None:
    rig = cluster.rig
    await unreachable(cluster, "d1", lambda: rig.signal_all("d1", signal.SIGSTOP), lambda: rig.signal_all("d1", signal.SIGCONT))


async def pairs_cut(cluster: Cluster) -> set[tuple[str, str]]:
    async with cluster.rig.session() as session, session.get(f"{cluster.rig.admin}/admin/cluster") as response:
        return {(cut["prefill"], cut["decode"]) for cut in (await response.json())["cut"]}


async def until_cut(cluster: Cluster, wanted: set[tuple[str, str]], limit_s: float) -> None:
    """Waits until the router leaves exactly these pairs out."""
    try:
        async with asyncio.timeout(limit_s):
            while await pairs_cut(cluster) != wanted:  # noqa: ASYNC110  HTTP has no event
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {limit_s:g} s: {wanted or 'no pair'} cut; instead {await pairs_cut(cluster)}") from None


async def test_two_hosts_that_cannot_reach_each_other_work_on_with_others(cluster: Cluster) -> None:
    """Nothing is wrong with either, as far as the router sees them: only handoffs between the two fail."""
    needs_cuts(cluster)
    network, watch, load = cluster.rig.network, cluster.watch, cluster.load()
    async with load.running(EVERY_S):
        await load.until(
            lambda answers: sum(a.flows for a in answers) >= ENOUGH, "so many streams that it is known how long a handoff takes"
        )
        answer = next(a for a in load.answers if a.flows)
        prefill, decode = answer.prefill, answer.decode
        at = time.monotonic()
        network.cut(prefill, decode)
        network.cut(decode, prefill)
        try:
            await until_cut(cluster, {(prefill, decode)}, 3 * HANDOVER_S)  # once a request goes this way
            cut_at = time.monotonic()
            await until(cut_at + 2.0)  # what comes now goes by other ways
            load.stop()
        finally:
            network.mend(prefill, decode)
            network.mend(decode, prefill)
        await until_cut(cluster, set(), LINK_BACK_S)
    assert watch.first(at, lambda g: not g.all_ready) == float("inf")
    attempts = await load.attempts()
    first = next(a for a in attempts if a.began_at > at and a.engines == {prefill, decode})
    assert first.ended_at - first.began_at <= HANDOVER_S + MARGIN_S
    assert cut_at - first.ended_at <= MARGIN_S
    assert [a for a in attempts if a.began_at > cut_at + MARGIN_S and a.engines == {prefill, decode}] == []
    assert [a for a in load.answers if not cluster.is_whole(a)] == []
    await cluster.healed()


# --- a process that ends


async def test_streams_do_not_notice_that_an_agent_was_killed(cluster: Cluster) -> None:
    rig, watch, load = cluster.rig, cluster.watch, cluster.load()
    engine = rig.record("d1")
    async with load.running(EVERY_S):
        struck = await streams_on(load, "d1")
        at = time.monotonic()
        rig.kill("d1")
        await until(at + DEAD_S + 2 * MARGIN_S)  # long enough for the router to ask the engine itself
        load.stop()
        assert all(a.flows or a.done for a in struck)
        started_at = time.monotonic()
        rig.start_host("d1")
        await watch.until(lambda g: g.state("d1") == "ready", "d1 is adopted", 2 * READY_AGAIN_S)
    assert watch.first(started_at, lambda g: g.state("d1") == "ready") <= READY_AGAIN_S
    assert watch.first(at, lambda g: g.state("d1") == "dead") == float("inf")
    assert max(a.began_at for a in await load.attempts() if "d1" in a.engines) - at <= NO_NEW_WORK_S + MARGIN_S
    assert [a for a in load.answers if not cluster.is_whole(a)] == []
    assert {a.attempts for a in load.answers} == {1}
    adopted = rig.record("d1")
    assert (adopted.pid, adopted.start_ticks) == (engine.pid, engine.start_ticks)
    await cluster.healed()


@pytest.mark.parametrize("victim", ["d2", "p2"])
async def test_an_engine_is_killed(cluster: Cluster, victim: str) -> None:
    rig, watch, load = cluster.rig, cluster.watch, cluster.load()
    pid = rig.record(victim).pid
    async with load.running(EVERY_S):
        await streams_on(load, victim)
        at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        struck = flowing_on(load.answers, victim)
        await watch.until(lambda g: g.state(victim) == "dead", f"{victim} is dead", 4 * EXIT_S)
        load.stop()
        await watch.until(lambda g: g.all_ready, f"{victim} was started again", 10)
    assert watch.first(at, lambda g: g.state(victim) == "dead") <= EXIT_S + MARGIN_S
    dead_at = at + watch.first(at, lambda g: g.state(victim) == "dead")
    again_at = dead_at + watch.first(dead_at, lambda g: g.state(victim) == "ready")
    sent = [a.began_at for a in await load.attempts() if victim in a.engines]
    assert [began for began in sent if at + EXIT_S + MARGIN_S < began < again_at - MARGIN_S] == []
    assert struck
    assert [a for a in load.answers if not cluster.is_whole(a)] == []
    assert rig.record(victim).pid != pid
    await cluster.healed()


async def test_the_router_is_killed_under_streams(cluster: Cluster) -> None:
    rig, watch, load = cluster.rig, cluster.watch, cluster.load()
    engines = {name: rig.record(name).pid for name in HOSTS}
    async with load.running(EVERY_S):
        await streams_on(load, "d1")
        await streams_on(load, "d2")
        load.stop()
        at = time.monotonic()
        rig.kill("router")
        started_at = time.monotonic()
        rig.start_router()
        await watch.until(lambda g: g.all_ready, "all engines are back", 4 * READY_AGAIN_S)
        await cluster.free(ORPHANS_GONE_S)
        free_at = time.monotonic()
    assert watch.first(started_at, lambda g: g.all_ready) <= READY_AGAIN_S
    assert free_at - at <= ORPHANS_GONE_S
    assert {name: rig.record(name).pid for name in HOSTS} == engines
    assert all(a.error and not a.done for a in load.answers)
    await cluster.healed()


# --- what answers and does nothing; what is silent and works


@pytest.mark.parametrize(("victim", "fault"), [("d1", "hang@token:1"), ("p1", "hang@prefill:1%")])
async def test_an_engine_hangs_while_it_answers(cluster: Cluster, victim: str, fault: str) -> None:
    rig, watch, load = cluster.rig, cluster.watch, cluster.load()
    pid = rig.record(victim).pid
    async with load.running(EVERY_S):
        struck = await streams_on(load, victim)
        await rig.set_faults(victim, fault)
        at = time.monotonic()
        await watch.until(lambda g: g.state(victim) != "ready", f"{victim} is found out", 2 * HANG_S)
        await until(at + HANG_S + 2 * NOTICED_S)
        load.stop()
        await watch.until(lambda g: g.all_ready, f"{victim} was started again", 30)
    sent = [a for a in await load.attempts() if victim in a.engines]
    slack_s = MARGIN_S
    if HOSTS[victim] == "prefill":  # it hangs when it comes to the next prompt, some time after that was sent
        at = min(a.began_at for a in sent if a.ended_at - a.began_at > HANG_S / 2)
        slack_s += NOTICED_S
    assert watch.first(at, lambda g: g.state(victim) != "ready") <= HANG_S + slack_s
    assert max(a.began_at for a in sent) - at <= HANG_S + slack_s
    assert max(a.ended_at for a in sent) - at <= HANG_S + slack_s
    assert struck
    assert [a for a in load.answers if not cluster.is_whole(a)] == []
    assert rig.record(victim).pid != pid
    await cluster.healed()


async def test_a_control_connection_that_is_reset_again_and_again_ends_no_stream(cluster: Cluster) -> None:
    rig, watch, load = cluster.rig, cluster.watch, cluster.load()
    resets, why = 0, ""
    async with load.running(EVERY_S):
        await streams_on(load, "d1")
        at = time.monotonic()
        while time.monotonic() < at + 2.5:
            why = rig.network.reset("d1", CONTROL_PORT)
            resets += not why
            await asyncio.sleep(0.3)
    if not resets:
        pytest.skip(why)
    assert [a for a in load.answers if not cluster.is_whole(a)] == []
    assert watch.first(at, lambda g: g.state("d1") == "dead") == float("inf")
    await cluster.healed()


async def test_a_control_port_that_is_cut_off_ends_no_stream(cluster: Cluster) -> None:
    needs_cuts(cluster)
    rig, watch, load = cluster.rig, cluster.watch, cluster.load()
    async with load.running(EVERY_S):
        struck = await streams_on(load, "d1")
        at = time.monotonic()
        rig.network.cut("d1", "router", CONTROL_PORT)
        try:
            await until(at + DEAD_S + 2 * MARGIN_S)
        finally:
            rig.network.mend("d1", "router", CONTROL_PORT)
        load.stop()
        assert all(a.flows or a.done for a in struck)
        await watch.until(lambda g: g.all_ready, "d1 is back", 2 * READY_AGAIN_S)
    assert watch.first(at, lambda g: g.state("d1") == "dead") == float("inf")
    assert watch.first(at, lambda g: g.state("d1") == "suspect") <= NO_NEW_WORK_S + MARGIN_S
    assert [a for a in load.answers if not cluster.is_whole(a)] == []
    await cluster.healed()
