"""What the engine says about itself: /v1/loads and /metrics, with SGLang's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from disagg.engines.embedded.scheduler import Leg, Phase
from disagg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from disagg.engines.embedded.engine import Engine

SECTIONS = {"memory": "memory", "disagg": "disaggregation", "queues": "queues"}
_KNOWN = {"core", "all", "spec", "lora", *SECTIONS}


def load(engine: Engine, include: str | None, *, now: float) -> dict[str, Any]:
    """The single entry of /v1/loads: engines here have one rank.

    Args:
        engine: of whom.
        include: comma-separated sections, or None for all.
        now: monotonic seconds.

    Raises:
        RequestError: an unknown section.
    """
    wanted = {name.strip() for name in include.split(",")} if include else {"all"}
    if not wanted <= _KNOWN:
        raise RequestError(f"include: {', '.join(sorted(wanted - _KNOWN))} is not known; allowed: {sorted(_KNOWN)}")
    entry = _core(engine, now)
    for name, key in SECTIONS.items():
        if wanted & {"all", name}:
            entry[key] = _SECTION_OF[key](engine)
    return entry


def _core(engine: Engine, now: float) -> dict[str, Any]:
    scheduler, pool, totals, size = engine.scheduler, engine.pool, engine.totals, engine.settings.page_size
    used = (pool.held + pool.quarantined) * size
    running = scheduler.count(Phase.PREFILLING, Phase.DECODING)
    return {
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": scheduler.count(Phase.WAITING),
        "num_waiting_uncached_tokens": scheduler.waiting_tokens,
        "num_used_tokens": used,
        "num_total_tokens": used + scheduler.waiting_tokens,
        "num_active_tokens": sum(job.length for job in scheduler.jobs.values() if job.pages),
        "num_prealloc_ready_tokens": sum(job.length for job in scheduler.jobs.values() if job.phase is Phase.RECEIVING),
        "max_total_num_tokens": pool.size * size,
        "max_running_requests": engine.settings.max_running_requests,
        "token_usage": used / max(1, pool.size * size),
        "gen_throughput": totals.throughput(now),
        "cache_hit_rate": scheduler.cache.stats.rate if scheduler.cache is not None else 0.0,
        "utilization": running / engine.settings.max_running_requests,
        "total_prefill_uncached_tokens": totals.prefill_tokens,
        "total_prefill_busy_us": int(totals.prefill_s * 1e6),
        "decode_moments": {
            "steps": totals.decode_steps,
            "requests": totals.decode_rows,
            "busy_us": int(totals.decode_s * 1e6),
        },
        "total_steps": totals.steps,
        "total_generated_tokens": totals.generated_tokens,
        "num_retractions_total": scheduler.retractions,
    }


def _memory(engine: Engine) -> dict[str, Any]:
    return {
        "weight_gb": 0.0,
        "kv_cache_gb": engine.pool.kv.nbytes / 1e9,
        "graph_gb": 0.0,
        "token_capacity": engine.pool.size * engine.settings.page_size,
    }


def _disaggregation(engine: Engine) -> dict[str, Any]:
    totals = engine.totals
    waiting = [job.leg for job in engine.scheduler.jobs.values() if job.phase is Phase.WAITING]
    return {
        "mode": engine.role,
        "prefill_bootstrap_queue_reqs": engine.scheduler.count(Phase.BOOTSTRAP),
        "prefill_inflight_queue_reqs": engine.scheduler.count(Phase.HANDING_OVER),
        "decode_prealloc_queue_reqs": waiting.count(Leg.DECODE),
        "decode_transfer_queue_reqs": engine.scheduler.count(Phase.RECEIVING),
        "decode_retracted_queue_reqs": engine.scheduler.retracted,
        "kv_transfer_speed_gb_s": totals.kv_last_bytes / max(totals.kv_last_s, 1e-6) / 1e9,
        "kv_transfer_latency_ms": totals.kv_last_s * 1e3,
        "kv_transfer_bytes_total": totals.kv_bytes,
        "kv_transfer_count_total": totals.kv_count,
        "kv_transfer_failed_total": totals.kv_failed,
        "kv_quarantined_pages": engine.pool.quarantined,
        "late_writes_total": totals.late_writes,
    }


def _queues(engine: Engine) -> dict[str, Any]:
    return {
        "waiting": engine.scheduler.count(Phase.WAITING),
        "grammar": 0,
        "paused": 0,
        "retracted": engine.scheduler.retracted,
    }


_SECTION_OF = {"memory": _memory, "disaggregation": _disaggregation, "queues": _queues}


class _Collector(Collector):
    """Reads the engine when it is scraped, so that serving pays nothing for it."""

    def __init__(self, engine: Engine, model: str, now: float) -> None:
        self._engine = engine
        self._model = model
        self._now = now

    def collect(self) -> Iterator[Metric]:
        core = _core(self._engine, self._now)
        disagg = _disaggregation(self._engine)
        totals = self._engine.totals
        gauges = {
            **{name: core[name] for name in ("num_running_reqs", "num_used_tokens", "max_total_num_tokens")},
            **{name: core[name] for name in ("token_usage", "gen_throughput", "cache_hit_rate", "utilization")},
            "num_queue_reqs": core["num_waiting_reqs"],
            **{f"num_{name}": value for name, value in disagg.items() if name.endswith("_queue_reqs")},
            **{name: disagg[name] for name in ("kv_transfer_speed_gb_s", "kv_transfer_latency_ms")},
            "kv_quarantined_pages": disagg["kv_quarantined_pages"],
        }
        counters = {
            "prompt_tokens": totals.prompt_tokens,
            "generation_tokens": totals.generated_tokens,
            "num_requests": totals.requests,
            "num_aborted_requests": totals.aborted,
            "num_retractions": self._engine.scheduler.retractions,
            "kv_transfer_bytes": totals.kv_bytes,
            "kv_transfers": totals.kv_count,
            "kv_transfers_failed": totals.kv_failed,
            "late_writes": totals.late_writes,
        }
        for name, value in gauges.items():
            gauge = GaugeMetricFamily(f"sglang:{name}", name.replace("_", " "), labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, value in counters.items():
            counter = CounterMetricFamily(f"sglang:{name}", name.replace("_", " "), labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter


def metrics(engine: Engine, model: str, *, now: float) -> bytes:
    """The Prometheus text of /metrics."""
    registry = CollectorRegistry()
    registry.register(_Collector(engine, model, now))
    return generate_latest(registry)
