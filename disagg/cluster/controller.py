"""The router's eyes: probes each engine, feeds its detector, publishes a frozen view."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
import structlog

from disagg.cluster.detector import Answered, EngineDetector, Event, Exited, Probe, Refused, Tick, TimedOut
from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState

FACTS_FOR_S = 10.0  # an engine that was restarted between two probes may serve another model: it is asked again now and then


class Controller:
    """Watches a fixed set of engines.

    Args:
        addresses: the engines; their order gives the slots.
        probe_interval_s: how often a ready engine is looked at.
        probe_timeout_s: how long it may take to answer.

    Attributes:
        view: the current view; replaced whole, never changed.
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        *,
        probe_interval_s: float,
        probe_timeout_s: float,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = aiohttp.ClientTimeout(total=probe_timeout_s)
        self._log = log
        now = self._loop.time()
        self._detectors = {
            a.id: EngineDetector(a, slot=slot, probe_interval_s=probe_interval_s, now=now) for slot, a in enumerate(addresses)
        }
        self._pokes = {a.id: asyncio.Event() for a in addresses}
        self._changed = asyncio.Condition()
        self._facts_until: dict[EngineId, float] = {}
        self.view = ClusterView.of(d.view for d in self._detectors.values())

    async def run(self) -> None:
        """Watches until cancelled."""
        async with aiohttp.ClientSession(timeout=self._timeout) as session, asyncio.TaskGroup() as group:
            for detector in self._detectors.values():
                group.create_task(self._watch(detector, session), name=f"watch {detector.view.id}")

    async def wait_ready(self) -> None:
        """Returns when a request can be served."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.view.why_not_ready())

    async def wait_settled(self) -> None:
        """Returns when no engine is starting any more."""
        async with self._changed:
            await self._changed.wait_for(lambda: all(e.state is not EngineState.STARTING for e in self.view.engines))

    def refused(self, engine: EngineId) -> None:
        """The data path was refused a connection: look at that engine at once."""
        self._detectors[engine].look_soon(self._loop.time())
        self._pokes[engine].set()

    async def exited(self, engine: EngineId, code: int) -> None:
        """The process of an engine ended."""
        await self._feed(self._detectors[engine], Exited(code))
        self._pokes[engine].set()

    async def _watch(self, detector: EngineDetector, session: aiohttp.ClientSession) -> None:
        poke = self._pokes[detector.view.id]
        while True:
            due = detector.next_deadline()
            assert due is not None
            try:
                async with asyncio.timeout_at(due):
                    await poke.wait()
            except TimeoutError:
                pass
            poke.clear()
            for command in detector.handle(Tick(), now=self._loop.time()):
                if isinstance(command, Probe):
                    await self._look(detector, session)

    async def _look(self, detector: EngineDetector, session: aiohttp.ClientSession) -> None:
        before = detector.view.state
        event = await self._probe(detector.view.address, session)
        if detector.view.state is EngineState.DEAD and before is not EngineState.DEAD:
            return  # its process ended while the probe was under way: what it said is the past
        await self._feed(detector, event)

    async def _feed(self, detector: EngineDetector, event: Event) -> None:
        before = detector.view
        detector.handle(event, now=self._loop.time())
        view = detector.view
        if view == before:
            return
        if view.state is not before.state:
            self._log.info("engine changed", engine=view.id, was=before.state.value, now=view.state.value, reason=view.reason)
        self.view = ClusterView.of(d.view for d in self._detectors.values())
        async with self._changed:
            self._changed.notify_all()

    async def _probe(self, address: EngineAddress, session: aiohttp.ClientSession) -> Event:
        try:
            known = self._detectors[address.id].view
            fresh = known.state is EngineState.READY and self._loop.time() < self._facts_until.get(address.id, 0.0)
            facts, mode = (known.facts, "") if fresh else await self._facts(address, session)
            loads = await self._get(address, session, "/v1/loads?include=core,disagg,queues,memory")
            return Answered(facts, _load(loads), mode)
        except aiohttp.ClientConnectorError:
            return Refused()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return TimedOut(f"its probe failed: {type(error).__name__}")
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            return TimedOut(f"its answer to a probe makes no sense: {type(error).__name__}")

    async def _facts(self, address: EngineAddress, session: aiohttp.ClientSession) -> tuple[EngineFacts, str]:
        models = await self._get(address, session, "/v1/models")
        info = await self._get(address, session, "/server_info")
        self._facts_until[address.id] = self._loop.time() + FACTS_FOR_S
        return _facts(models, info)

    async def _get(self, address: EngineAddress, session: aiohttp.ClientSession, path: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}
        async with session.get(address.url + path, headers=headers) as response:
            response.raise_for_status()
            return msgspec.json.decode(await response.read(), type=dict[str, Any])


def _facts(models: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[EngineFacts, str]:
    """Reads what SGLang's ``/v1/models`` and ``/server_info`` say; the embedded engine adds its model hash and KV size."""
    listed = models.get("data") or [{}]
    internal = (info.get("internal_states") or [{}])[0]
    mode = internal.get("disaggregation_mode") or info.get("disaggregation_mode") or ""
    facts = EngineFacts(
        model=str(listed[0].get("id") or ""),
        model_hash=str(info.get("model_hash") or ""),
        page_size=_whole(info.get("page_size")),
        context_tokens=_whole(listed[0].get("max_model_len") or info.get("context_length")),
        kv_bytes_per_token=_whole(info.get("kv_bytes_per_token")),
        version=str(info.get("version") or ""),
    )
    return facts, str(mode)


def _load(answer: Mapping[str, Any]) -> EngineLoad:
    """Sums SGLang's ``/v1/loads`` over its data-parallel ranks."""
    ranks = [r for r in answer.get("loads") or [answer] if isinstance(r, dict)]

    def total(*names: str) -> int:
        return sum(next((_whole(r[n]) for n in names if r.get(n) is not None), 0) for r in ranks)

    moved = sum(_whole((r.get("disaggregation") or {}).get("kv_transfer_bytes_total")) for r in ranks)
    return EngineLoad(
        running=total("num_running_reqs"),
        waiting=total("num_waiting_reqs"),
        kv_used_tokens=total("num_used_tokens"),
        kv_total_tokens=total("max_total_num_tokens", "num_total_tokens"),
        kv_transfer_bytes=moved,
    )


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0
