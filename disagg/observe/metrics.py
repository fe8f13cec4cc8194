"""The router's counters, and their Prometheus form.

The hot path adds to plain integers; only a scrape builds Prometheus objects. Names are those of the contract; units are seconds, bytes and
tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg.model import ClusterView
from disagg.policy.holds import Hold
from disagg.policy.prefix import PrefixIndex

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)


class Histogram:
    """Counts per bucket; upper bounds in seconds, the last bucket is open."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value_s: float, times: int = 1) -> None:
        """Adds a value, seen `times` times."""
        self._counts[bisect_left(self._bounds, value_s)] += times
        self._sum += value_s * times

    @property
    def count(self) -> int:
        """How many values were seen."""
        return sum(self._counts)

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """Its Prometheus form."""
        buckets, total = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


class ControlCounts(Protocol):
    """What the control plane counts."""

    def control_messages(self) -> Mapping[str, int]:
        """Messages by kind, and what was refused, by why."""

    def flips(self) -> Mapping[tuple[str, str, str], int]:
        """Flips that ended, by roles and outcome."""


class RouterMetrics(Collector):
    """What the router counts.

    Args:
        view: returns the current view of the cluster, for engine states and transferred bytes.
    """

    def __init__(self, view: Callable[[], ClusterView]) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.handoffs: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self.resumes: Counter[str] = Counter()
        self.shed: Counter[str] = Counter()
        self.inflight = 0
        self.ttft = Histogram(_LATENCY_S)
        self.queue = Histogram(_LATENCY_S)
        self.itl = Histogram(_STEP_S)
        self.loop_lag = Histogram(_STEP_S)
        self.control: ControlCounts | None = None
        self.prefixes: PrefixIndex | None = None
        self.hits: Callable[[], tuple[int, int]] | None = None
        self.canaries: Mapping[str, int] = {}
        self.benchmarks: Mapping[str, int] = {}
        self.orphans: Mapping[str, int] = {}
        self.holds: Callable[[], Sequence[Hold]] = tuple
        self.ejections: Mapping[str, int] = {}
        self.refused: Mapping[str, int] = {}
        self.log_dropped: Callable[[], int] = int
        self.waiting: Callable[[], int] = int
        self._view = view
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client at each scrape."""
        yield _counter("disagg_requests", "Requests by route and outcome.", ["route", "outcome"], self.requests.items())
        yield GaugeMetricFamily("disagg_inflight", "Requests being handled.", value=self.inflight)
        yield GaugeMetricFamily(
            "disagg_waiting", "Of these, those that wait: for engines with room, or for their turn after a failure.", value=self.waiting()
        )
        yield self.ttft.family("disagg_ttft_seconds", "Time from a streaming request's arrival to the first bytes of its answer.")
        yield self.queue.family("disagg_queue_seconds", "Time that requests waited for engines with room, those included that did not.")
        yield self.itl.family("disagg_itl_seconds", "Time between two events of a stream.")
        yield _counter("disagg_handoffs", "Attempts by how they ended.", ["outcome"], _by_one(self.handoffs))
        yield _counter("disagg_replays", "Attempts made again, by reason.", ["reason"], _by_one(self.replays))
        yield _counter("disagg_resumes", "Broken streams, by whether they went on elsewhere.", ["outcome"], _by_one(self.resumes))
        yield _counter("disagg_benchmarks", "Measurements of idle engines, by how they ended.", ["outcome"], _by_one(self.benchmarks))
        yield _counter("disagg_canaries", "Tries of pairs with fixed prompts, by how they ended.", ["outcome"], _by_one(self.canaries))
        bad = len(self._view().quarantined)
        yield GaugeMetricFamily("disagg_quarantined_pairs", "Pairs that are not used, because they answer wrong.", value=bad)
        yield self._of_holds()
        yield _counter("disagg_kv_orphans", "Work that no entry explains: what was seen of it and done.", ["action"], _by_one(self.orphans))
        cut = len(self._view().cut)
        yield GaugeMetricFamily("disagg_cut_pairs", "Pairs that are not used for a while, because their handoffs fail.", value=cut)
        text = "Engines that got no new work for a while, by reason, and pairs that were cut."
        yield _counter("disagg_ejections", text, ["reason"], _by_one(self.ejections))
        yield _counter("disagg_shed", "Requests refused for want of capacity, by reason.", ["reason"], _by_one(self.shed))
        yield _counter(
            "disagg_connections_refused", "Connections refused, by what there was too much of.", ["reason"], _by_one(self.refused)
        )
        yield CounterMetricFamily("disagg_log_dropped", "Lines of the log that nobody took in time.", value=self.log_dropped())
        yield self.loop_lag.family("disagg_loop_lag_seconds", "How late the router's own timer was.")
        yield from self._of_engines()
        if self.control is not None:
            messages, flips = self.control.control_messages(), self.control.flips()
            yield _counter("disagg_control_messages", "Messages of the control plane, by kind.", ["kind"], _by_one(messages))
            yield _counter("disagg_flips", "Role flips that ended.", ["from", "to", "outcome"], flips.items())

        if self.hits is not None:
            hit, asked = self.hits()
            yield CounterMetricFamily("disagg_prefix_hit_tokens", "Prompt tokens that engines were expected to hold already.", value=hit)
            yield CounterMetricFamily("disagg_prefix_asked_tokens", "Prompt tokens of which that was looked up.", value=asked)
        if self.prefixes is not None:
            yield from _of_prefixes(self.prefixes)

    def _of_holds(self) -> Metric:
        counts = Counter((hold.leg.value, hold.phase) for hold in self.holds())
        family = GaugeMetricFamily("disagg_kv_holds", "Legs that hold KV pages, by part and phase.", labels=["leg", "phase"])
        for labels, count in sorted(counts.items()):
            family.add_metric(list(labels), count)
        return family

    def _of_engines(self) -> Iterator[Metric]:
        view = self._view()
        states = Counter((e.address.role.value, e.state.value) for e in view.engines)
        engines = GaugeMetricFamily("disagg_engines", "Engines by role and state.", labels=["role", "state"])
        for labels, count in sorted(states.items()):
            engines.add_metric(list(labels), count)
        yield engines
        moved = CounterMetricFamily("disagg_kv_transfer_bytes", "KV cache bytes received by the decode engines that say so.")
        moved.add_metric([], sum(e.load.kv_transfer_bytes for e in view.engines if e.address.role == "decode"))
        yield moved

    def text(self) -> bytes:
        """The body of ``GET /metrics``."""
        return generate_latest(self._registry)


def _of_prefixes(prefixes: PrefixIndex) -> Iterator[Metric]:
    blocks = GaugeMetricFamily("disagg_prefix_blocks", "Blocks in the prefix caches of the engines where that is known.", labels=["engine"])
    for engine, standing in prefixes.engines().items():
        if standing.known:
            blocks.add_metric([engine], standing.blocks)
    yield blocks
    texts = {
        "gaps": "Times that something a host said of a prefix cache was missed.",
        "resyncs": "Snapshots of prefix caches that were asked for.",
        "refused": "Prefix caches that were too large to be kept.",
    }
    for name, text in texts.items():
        yield CounterMetricFamily(f"disagg_prefix_{name}", text, value=prefixes.counts[name])


def _by_one(counter: Mapping[str, int]) -> Iterable[tuple[tuple[str, ...], int]]:
    return (((key,), count) for key, count in counter.items())


def _counter(name: str, text: str, labels: Sequence[str], items: Iterable[tuple[tuple[str, ...], int]]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in sorted(items):
        family.add_metric(list(values), count)
    return family
