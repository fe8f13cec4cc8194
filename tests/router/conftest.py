from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
import structlog

from disagg.config import Config, ObserveSection, PolicySection, RouterSection, SloSection
from disagg.model import Role
from disagg.observe.log import make_logger
from disagg.server import Router, router_running
from tests.fake_engine import HUNG_S, Behaviour, FakeEngine, fake_engine
from tests.ports import free_port


@pytest.fixture
def log() -> structlog.typing.FilteringBoundLogger:
    return make_logger("error", "text")


@pytest.fixture
def judged_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which connections break and no engine dies: nobody waits half a second each time to hear of a death.

    And where there is no other engine, the same one is asked again soon.
    """
    monkeypatch.setattr("disagg.router.owner.FATE_S", 0.05)
    monkeypatch.setattr("disagg.policy.replay.SAME_AGAIN_S", 0.1)


class Rig:
    """A router in this process over fake engines, on real sockets."""

    def __init__(self, router: Router, engines: list[FakeEngine], session: aiohttp.ClientSession) -> None:
        self.router = router
        self.engines = engines
        self.session = session
        self.url = f"http://{router.config.router.http}"
        self.admin = f"http://{router.config.router.admin}"

    def engine(self, role: Role, number: int = 0) -> FakeEngine:
        return next(e for e in self.engines if e.role is role and e.number == number)

    @property
    def prefill(self) -> FakeEngine:
        return self.engine(Role.PREFILL)

    @property
    def decode(self) -> FakeEngine:
        return self.engine(Role.DECODE)

    def metrics(self) -> str:
        return self.router.metrics.text().decode()

    def state(self, engine: str) -> str:
        return next(e.state.value for e in self.router.controller.view.engines if e.id == engine)

    async def post(self, body: Any, path: str = "/v1/chat/completions", **kwargs: Any) -> aiohttp.ClientResponse:
        if isinstance(body, bytes):
            return await self.session.post(self.url + path, data=body, **kwargs)
        return await self.session.post(self.url + path, json=body, **kwargs)


CHAT = {"model": "fake", "messages": [{"role": "user", "content": "say it"}]}


@asynccontextmanager
async def running_rig(
    *roles: Role,
    wait: bool = True,
    models: dict[int, str] | None = None,
    canaries: bool = False,
    behave: Behaviour | None = None,
    places: int = 0,
    log: structlog.typing.FilteringBoundLogger | None = None,
    slo: SloSection | None = None,
    policy: PolicySection | None = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    log = log or make_logger("error", "text")
    async with AsyncExitStack() as stack:
        engines = []
        for i, role in enumerate(roles):
            number = sum(r is role for r in roles[:i])
            engines.append(await stack.enter_async_context(fake_engine(role, number, (models or {}).get(i, "fake"))))
            engines[-1].behave = behave or engines[-1].behave
            engines[-1].places = places
        section = RouterSection(http=f"127.0.0.1:{free_port()}", admin=f"127.0.0.1:{free_port()}", **{"probe_interval_s": 0.2, **settings})
        observe = ObserveSection(log_level="error")
        config = Config(router=section, slo=slo or SloSection(), policy=policy or PolicySection(measure_at_start=False), observe=observe)
        router = await stack.enter_async_context(router_running(config, [e.address for e in engines], log, canaries=canaries))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        if wait:
            async with asyncio.timeout(HUNG_S):
                await router.controller.wait_settled()
                await router.controller.wait_ready()
        yield Rig(router, engines, session)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """One prefill and one decode engine."""
    async with running_rig(Role.PREFILL, Role.DECODE) as made:
        yield made
