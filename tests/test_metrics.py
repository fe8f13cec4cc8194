"""What `GET /metrics` says, read as Prometheus reads it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from disagg.model import ClusterView, EngineAddress, EngineFacts, EngineId, EngineLoad, EngineState, EngineView, Role
from disagg.observe.metrics import Histogram, RouterMetrics
from disagg.policy.prefix import PrefixIndex, pack
from disagg.wire.messages import KvDelta, KvSnapshot

# The names of CONTRACT that exist so far, with their types and labels.
NAMES = {
    "disagg_requests": ("counter", {"route", "outcome"}),
    "disagg_inflight": ("gauge", set()),
    "disagg_waiting": ("gauge", set()),
    "disagg_ttft_seconds": ("histogram", set()),
    "disagg_itl_seconds": ("histogram", set()),
    "disagg_handoffs": ("counter", {"outcome"}),
    "disagg_replays": ("counter", {"reason"}),
    "disagg_resumes": ("counter", {"outcome"}),
    "disagg_benchmarks": ("counter", {"outcome"}),
    "disagg_canaries": ("counter", {"outcome"}),
    "disagg_quarantined_pairs": ("gauge", set()),
    "disagg_cut_pairs": ("gauge", set()),
    "disagg_queue_seconds": ("histogram", set()),
    "disagg_kv_holds": ("gauge", {"leg", "phase"}),
    "disagg_kv_orphans": ("counter", {"action"}),
    "disagg_ejections": ("counter", {"reason"}),
    "disagg_shed": ("counter", {"reason"}),
    "disagg_connections_refused": ("counter", {"reason"}),
    "disagg_log_dropped": ("counter", set()),
    "disagg_loop_lag_seconds": ("histogram", set()),
    "disagg_engines": ("gauge", {"role", "state"}),
    "disagg_kv_transfer_bytes": ("counter", set()),
}


def engine(role: Role, state: EngineState, moved: int = 0, slot: int = 0) -> EngineView:
    address = EngineAddress(EngineId(f"{role}-{slot}"), role, "h", 1)
    return EngineView(address, slot, state, EngineFacts(model="m"), EngineLoad(kv_transfer_bytes=moved))


def families(metrics: RouterMetrics) -> dict[str, Metric]:
    return {f.name: f for f in text_string_to_metric_families(metrics.text().decode())}


def value(family: Metric, name: str, **labels: str) -> float:
    found = [s.value for s in family.samples if s.name == name and s.labels == labels]
    assert len(found) == 1, family.samples
    return float(found[0])


def busy() -> RouterMetrics:
    engines = [
        engine(Role.PREFILL, EngineState.READY, 99),
        engine(Role.DECODE, EngineState.READY, 1000, 1),
        engine(Role.DECODE, EngineState.READY, 24, 2),
        engine(Role.DECODE, EngineState.DEAD, 0, 3),
    ]
    metrics = RouterMetrics(lambda: ClusterView.of(engines))
    metrics.requests["/v1/chat/completions", "ok"] += 3
    metrics.requests["/generate", 'od"d\\\n'] += 1
    metrics.handoffs["done"] += 2
    metrics.replays["never_reached_engine"] += 1
    metrics.resumes["resumed"] += 1
    metrics.shed["no_engine"] += 4
    metrics.canaries = {"same": 3, "differs": 1}
    metrics.benchmarks = {"done": 2}
    metrics.ejections = {"faults": 2, "cut": 1}
    metrics.inflight = 5
    metrics.ttft.observe(0.3)
    return metrics


def test_every_name_is_there_with_its_type_and_labels_and_no_other() -> None:
    found = families(busy())
    assert found.keys() == NAMES.keys()
    for name, (kind, labels) in NAMES.items():
        assert found[name].type == kind
        assert found[name].documentation.endswith(".")
        for sample in found[name].samples:
            assert set(sample.labels) - {"le"} == labels


def test_a_router_that_did_nothing_yet_shows_zeros() -> None:
    found = families(RouterMetrics(ClusterView))
    assert found.keys() == NAMES.keys()
    assert value(found["disagg_inflight"], "disagg_inflight") == 0
    assert value(found["disagg_ttft_seconds"], "disagg_ttft_seconds_count") == 0
    assert value(found["disagg_kv_transfer_bytes"], "disagg_kv_transfer_bytes_total") == 0


def test_counters_end_with_total_and_labels_survive_odd_values() -> None:
    found = families(busy())
    requests = found["disagg_requests"]
    assert value(requests, "disagg_requests_total", route="/v1/chat/completions", outcome="ok") == 3
    assert value(requests, "disagg_requests_total", route="/generate", outcome='od"d\\\n') == 1
    assert value(found["disagg_handoffs"], "disagg_handoffs_total", outcome="done") == 2
    assert value(found["disagg_replays"], "disagg_replays_total", reason="never_reached_engine") == 1
    assert value(found["disagg_shed"], "disagg_shed_total", reason="no_engine") == 4
    assert value(found["disagg_ejections"], "disagg_ejections_total", reason="faults") == 2
    assert value(found["disagg_inflight"], "disagg_inflight") == 5


def test_engines_are_counted_by_role_and_state_and_bytes_by_those_who_receive() -> None:
    found = families(busy())
    engines = found["disagg_engines"]
    assert value(engines, "disagg_engines", role="decode", state="ready") == 2
    assert value(engines, "disagg_engines", role="decode", state="dead") == 1
    assert value(engines, "disagg_engines", role="prefill", state="ready") == 1
    assert value(found["disagg_kv_transfer_bytes"], "disagg_kv_transfer_bytes_total") == 1024


def test_each_scrape_sees_the_present() -> None:
    views = [ClusterView.of([engine(Role.UNIFIED, EngineState.STARTING)]), ClusterView.of([engine(Role.UNIFIED, EngineState.READY)])]
    metrics = RouterMetrics(lambda: views[0])
    assert value(families(metrics)["disagg_engines"], "disagg_engines", role="unified", state="starting") == 1
    views.pop(0)
    assert value(families(metrics)["disagg_engines"], "disagg_engines", role="unified", state="ready") == 1


def test_prefix_caches_are_counted_where_they_are_known() -> None:
    metrics = RouterMetrics(ClusterView)
    metrics.prefixes = PrefixIndex()
    metrics.prefixes.take_snapshot(KvSnapshot(1, "n", EngineId("p"), 1, 1, block_size=16, blocks=pack([1, 2, 3])))
    metrics.prefixes.take_snapshot(KvSnapshot(1, "n", EngineId("q"), 1, 1, known=False, reason="its events are gone"))
    metrics.prefixes.take_delta(KvDelta(1, "n", EngineId("q"), 1, 3), now=0.0)
    found = families(metrics)
    assert found.keys() == NAMES.keys() | {"disagg_prefix_blocks", "disagg_prefix_gaps", "disagg_prefix_resyncs", "disagg_prefix_refused"}
    assert [(s.labels, s.value) for s in found["disagg_prefix_blocks"].samples] == [({"engine": "p"}, 3.0)]
    assert value(found["disagg_prefix_gaps"], "disagg_prefix_gaps_total") == 1
    assert value(found["disagg_prefix_resyncs"], "disagg_prefix_resyncs_total") == 1
    assert value(found["disagg_prefix_refused"], "disagg_prefix_refused_total") == 0


# --- histograms


@pytest.mark.parametrize(("seen", "bucket"), [(0.0, "1.0"), (1.0, "1.0"), (1.0000001, "2.5"), (2.5, "2.5"), (2.6, "+Inf"), (1e9, "+Inf")])
def test_a_bound_belongs_to_its_bucket(seen: float, bucket: str) -> None:
    made = Histogram((1.0, 2.5))
    made.observe(seen)
    cumulative = {s.labels["le"]: s.value for s in made.family("h", "text").samples if s.name == "h_bucket"}
    assert next(le for le, count in cumulative.items() if count) == bucket


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5)), max_size=50))
@settings(deadline=None, max_examples=60)
def test_a_histogram_counts_what_it_was_told(seen: list[tuple[float, int]]) -> None:
    bounds = (0.001, 0.5, 10.0)
    made = Histogram(bounds)
    for seconds, times in seen:
        made.observe(seconds, times)
    samples = {(s.name, s.labels.get("le")): s.value for s in made.family("h", "text").samples}
    for bound in bounds:
        assert samples["h_bucket", str(bound)] == sum(times for seconds, times in seen if seconds <= bound)
    assert samples["h_bucket", "+Inf"] == samples["h_count", None] == made.count == sum(times for _, times in seen)
    assert samples["h_sum", None] == pytest.approx(sum(seconds * times for seconds, times in seen))
