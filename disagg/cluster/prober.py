"""Looks at an engine over HTTP: what it is, how it fares, whether it gets on. Used by the router and by the agent of its host."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from disagg.cluster.detector import Answered, Refused, TimedOut
from disagg.engines.progress import WAIT_FOR_PEER, read_progress
from disagg.model import EngineAddress, EngineFacts, EngineLoad

LOADS = "/v1/loads?include=core,disagg,queues,memory"
COUNT_LIMIT = 1 << 63
Seen = Answered | Refused | TimedOut


class Prober:
    """Asks engines.

    Args:
        patience_s: how long an engine may take to answer.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes its connections."""
        if self._session is not None:
            await self._session.close()

    async def look(self, address: EngineAddress, known: EngineFacts | None = None, patience_s: float | None = None) -> Seen:
        """Asks an engine how it is. Never raises for what an engine does.

        Args:
            address: where it is.
            known: what it is, if that need not be asked again.
            patience_s: None for the usual.
        """
        try:
            async with asyncio.timeout(patience_s or self._patience_s):
                facts, mode = (known, "") if known is not None else await self._facts(address)
                loads = await self.get(address, LOADS)
                counter, working = read_progress(loads)
                return Answered(facts, read_load(loads), mode, counter % COUNT_LIMIT, working)
        except aiohttp.ClientConnectorError as error:
            # Only the engine's own machine can refuse. A route that is gone, or no descriptor left here, says nothing about the engine.
            refused = isinstance(error.os_error, ConnectionRefusedError)
            return Refused() if refused else TimedOut(f"it cannot be reached: {error.os_error.strerror or error.os_error}")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return TimedOut(f"its probe failed: {type(error).__name__}")
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            return TimedOut(f"its answer to a probe makes no sense: {type(error).__name__}")

    async def _facts(self, address: EngineAddress) -> tuple[EngineFacts, str]:
        return read_facts(await self.get(address, "/v1/models"), await self.get(address, "/server_info"))

    async def get(self, address: EngineAddress, path: str) -> dict[str, Any]:
        """The JSON object at a path.

        Raises:
            aiohttp.ClientError, OSError: it cannot be had.
            ValueError: it is no JSON object.
        """
        async with self._open().get(address.url + path, headers=_headers(address)) as response:
            response.raise_for_status()
            return msgspec.json.decode(await response.read(), type=dict[str, Any])

    async def is_ready(self, address: EngineAddress, patience_s: float) -> bool:
        """Whether an engine says that it has started: ``/ready``, or ``/health`` where a release has none (SGLang before 0.5.20)."""
        for path in ("/ready", "/health"):
            try:
                async with asyncio.timeout(patience_s):
                    await self.touch(address, path)
            except aiohttp.ClientResponseError as error:
                if error.status == 404:
                    continue
                return False
            except (TimeoutError, aiohttp.ClientError, OSError):
                return False
            return True
        return True  # it answers, and knows neither: there is nothing to ask

    async def touch(self, address: EngineAddress, path: str) -> None:
        """Asks for a path and wants nothing but success. Raises as `get`."""
        async with self._open().get(address.url + path, headers=_headers(address)) as response:
            response.raise_for_status()

    async def post(self, address: EngineAddress, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Posts JSON; returns the status and the answer's object, empty where it is none. Raises as `get`, but not for a status."""
        headers = {**_headers(address), "Content-Type": "application/json"}
        async with self._open().post(address.url + path, data=msgspec.json.encode(body), headers=headers) as response:
            text = await response.read()
        try:
            return response.status, msgspec.json.decode(text, type=dict[str, Any])
        except (ValueError, RecursionError):
            return response.status, {}

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # here and not in the constructor, which may run before there is a loop
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        return self._session


def _headers(address: EngineAddress) -> dict[str, str]:
    return {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}


def read_facts(models: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[EngineFacts, str]:
    """Reads what SGLang's ``/v1/models`` and ``/server_info`` say; the embedded engine adds its model hash and KV size.

    Returns:
        The facts, and the live mode, empty where it is not said.
    """
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
        dtype=_precision(info),
        tp_size=_whole(info.get("tp_size")),
        stream_token_ids=info.get("stream_token_ids") is True,
        max_running=_max_running(info),
    )
    return facts, str(mode)


def _max_running(info: Mapping[str, Any]) -> int:
    """What SGLang's schedulers came to, rank by rank; its ``max_running_requests`` is the flag, null where it was not given."""
    ranks = [r for r in info.get("internal_states") or [] if isinstance(r, dict)]
    found = sum(_whole(r.get("effective_max_running_requests_per_dp")) for r in ranks)
    return min(found, COUNT_LIMIT - 1) or _whole(info.get("max_running_requests"))


def read_bootstrap_port(info: Mapping[str, Any]) -> int:
    """Where decode engines meet an engine, as its ``/server_info`` says; 0 where it does not."""
    port = info.get("disaggregation_bootstrap_port")
    return port if type(port) is int and 0 < port < 65536 else 0


def _precision(info: Mapping[str, Any]) -> str:
    """What the KV cache is kept in: SGLang's ``kv_cache_dtype``, which is ``auto`` where it follows the model's."""
    kept = str(info.get("kv_cache_dtype") or "auto")
    precision = kept if kept != "auto" else str(info.get("dtype") or "")
    return "" if precision == "auto" else precision


def read_load(answer: Mapping[str, Any]) -> EngineLoad:
    """Sums SGLang's ``/v1/loads`` over its data-parallel ranks."""
    ranks = [r for r in answer.get("loads") or [answer] if isinstance(r, dict)]

    def total(*names: str) -> int:
        return sum(next((_whole(r[n]) for n in names if r.get(n) is not None), 0) for r in ranks)

    used, busy = total("num_used_tokens"), total("num_running_reqs") + total("num_waiting_reqs") + sum(map(_queued, ranks))
    moved = sum(_whole((r.get("disaggregation") or {}).get("kv_transfer_bytes_total")) for r in ranks)
    return EngineLoad(
        running=total("num_running_reqs"),
        waiting=total("num_waiting_reqs"),
        kv_used_tokens=used,
        kv_total_tokens=total("max_total_num_tokens", "num_total_tokens"),
        kv_transfer_bytes=moved,
        kv_quarantined_tokens=0 if busy else used,
        requests=sum(map(_requests, ranks)),
    )


def _requests(rank: Mapping[str, Any]) -> int:
    """All that a rank has.

    SGLang counts those that wait for a peer among the waiting ones, but not a prefill's that is being handed over; the embedded engine
    counts none of them. What both leave out is added, and of what one counts and the other does not the greater number is right for both.
    """
    queues = rank.get("disaggregation")
    queues = queues if isinstance(queues, dict) else {}
    for_peer = sum(_whole(queues.get(name)) for name in WAIT_FOR_PEER)
    handing_over = _whole(queues.get("prefill_inflight_queue_reqs"))
    return _whole(rank.get("num_running_reqs")) + max(_whole(rank.get("num_waiting_reqs")), for_peer) + handing_over


def _queued(rank: Mapping[str, Any]) -> int:
    """Requests that wait for a peer."""
    queues = rank.get("disaggregation")
    return sum(_whole(v) for k, v in queues.items() if k.endswith("_reqs")) if isinstance(queues, dict) else 0


def _whole(value: object) -> int:
    """A count as the wire can carry it; what is none counts as nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < COUNT_LIMIT:
        return 0
    return int(value)
