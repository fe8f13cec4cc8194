"""A process full of simulated hosts, for benches: a plan comes on standard input, what happens goes to standard output.

It can be stopped with SIGSTOP, and then both its hosts and their engines are silent, as those of a machine that stands still.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec
import uvloop

from disagg.life import set_limits
from disagg.model import Role
from disagg.security.keys import KeyPair
from tests.rig.hosts import StubKeeper, running, simulated_agent, stub_engine_server


class Member(msgspec.Struct, frozen=True):
    """One host."""

    name: str
    public: str
    secret: str


class Plan(msgspec.Struct, frozen=True):
    """What the process plays. `port`: of the router's control listener."""

    port: int
    router_key: str
    members: list[Member]


def say(line: str) -> None:
    """To whoever started us."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def play(plan: Plan) -> None:
    """Until cancelled or ended by a signal."""
    async with stub_engine_server() as engines:
        agents = [
            simulated_agent(
                member.name,
                port=plan.port,
                router_key=plan.router_key,
                key=KeyPair(member.public, member.secret),
                keepers=[StubKeeper(f"{member.name}-p", Role.PREFILL, engines), StubKeeper(f"{member.name}-d", Role.DECODE, engines)],
            )
            for member in plan.members
        ]
        async with running(*agents):
            say("started")
            for agent in agents:
                await agent.joined.wait()
            say("joined")
            await asyncio.Event().wait()


def main() -> None:
    """Reads the plan and plays it."""
    set_limits()
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(play(plan))


if __name__ == "__main__":
    main()
