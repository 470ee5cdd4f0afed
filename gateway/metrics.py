"""Prometheus' view of the gateway. The only module that knows `prometheus_client`.

Nothing is updated while requests run: a scrape reads the counters and digests that are kept anyway. Latency buckets come from the
same samples as the quantiles of `/slices`.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gateway.admission import Admission, Loads
from gateway.admission.sharing import Sharing
from gateway.admission.view import limits
from gateway.digests import METRICS, LatencyBook
from gateway.digests import Metric as Latency
from gateway.exchange import Clock
from gateway.routes import Routes
from gateway.stats import Stats
from placement.assign import stem_of
from placement.latency_grid import BUCKETS_SECONDS
from placement.status import ClusterScaling, ControllerStatus

_HELP = {
    "ttft_seconds": "From the whole request to the first content of its stream.",
    "itl_seconds": "Between two arrivals of content in a stream.",
    "e2e_seconds": "From the whole request to the last byte of a good answer.",
    "queue_seconds": "From the whole request to its dispatch to an engine.",
    "gateway_seconds": "What of queue_seconds the gateway took itself, without the wait for a place.",
    "engine_seconds": "From the dispatch to the first content of a stream, or to the end of an answer that is none.",
    "streaming_seconds": "From the first content of a stream to its last byte.",
}


_OF_BATCHES: tuple[Latency, ...] = ("e2e_seconds", "queue_seconds")  # nothing in a batch is streamed


@dataclass(frozen=True, slots=True)
class Files:
    """Whether the files that the gateway follows can be read: name -> good."""

    readable: Mapping[str, bool]


@dataclass(frozen=True, slots=True, eq=False)  # a registry keeps collectors in a dictionary
class GatewayCollector:
    """Reads everything when it is scraped."""

    stats: Stats
    book: LatencyBook
    loads: Loads
    routes: Callable[[], Routes]
    files: Callable[[], Files]
    clock: Clock
    admission: Admission | None = None
    sharing: Callable[[], Sharing | None] = lambda: None
    batch_book: LatencyBook | None = None
    controller: Callable[[], ControllerStatus | ClusterScaling | None] = lambda: None

    def collect(self) -> Iterator[Metric]:
        """Every metric family."""
        stats = self.stats
        yield _counter(
            "requests",
            "Requests by their outcome; 499 is a client that left.",
            ("model", "tenant", "status"),
            stats.requests,
        )
        yield _counter("errors", "Errors told to clients.", ("code",), stats.errors)
        yield _counter("tokens", "Tokens as the engines counted them.", ("model", "tenant", "kind"), stats.tokens)
        yield _counter("stream_events", "Relayed events with content.", ("model",), stats.stream_events)
        yield _counter(
            "client_disconnects", "Clients that left before their answer was complete.", ("model",), stats.disconnects
        )
        yield _counter(
            "engine_connect_failures",
            "Connections that an engine did not accept.",
            ("replica",),
            stats.connect_failures,
        )
        yield _counter(
            "answers_without_usage", "Good answers in which the engine told no usage.", ("model",), stats.without_usage
        )
        yield _counter("config_reloads", "Configurations read again, by result.", ("result",), stats.config_reloads)
        yield from self._latencies(self.book, METRICS, "sliceway_")
        if self.batch_book is not None:
            yield from self._latencies(self.batch_book, _OF_BATCHES, "sliceway_batch_")
        yield from self._state()
        yield from _scaling(self.controller())
        if self.admission is not None:
            yield from _admission(self.admission)
            yield from _sharing(self.sharing())

    def _latencies(self, book: LatencyBook, metrics: Iterable[Latency], prefix: str) -> Iterator[Metric]:
        now = self.clock()
        for metric in metrics:
            family = HistogramMetricFamily(f"{prefix}{metric}", _HELP[metric], labels=("slice", "tenant"))
            for slice_id, tenant, series in book.items():
                digest = series.digest(metric)
                digest.advance(now)
                family.add_metric(
                    (slice_id, tenant), buckets=_cumulative(digest.bucket_counts), sum_value=digest.sum_seconds
                )
            yield family

    def _state(self) -> Iterator[Metric]:
        routes = self.routes()
        in_flight = GaugeMetricFamily(
            "sliceway_in_flight_requests",
            "Requests a replica has from this gateway.",
            labels=("replica", "model", "slice"),
        )
        states: Counts[tuple[str, str]] = Counts()
        for replica in routes.replicas():
            in_flight.add_metric((replica.replica, replica.model, replica.slice.id), self.loads.count(replica.replica))
            states[replica.model, replica.state.value] += 1
        yield in_flight
        by_state = GaugeMetricFamily("sliceway_replicas", "Replicas by state.", labels=("model", "state"))
        for labels, count in states.items():
            by_state.add_metric(labels, count)
        yield by_state
        yield GaugeMetricFamily(
            "sliceway_routing_table_generation",
            "Of the table in use; -1 before the first.",
            value=-1 if routes.generation is None else routes.generation,
        )
        files = GaugeMetricFamily(
            "sliceway_file_readable",
            "1 while a followed file can be read; 0 means that its last good content is in use.",
            labels=("file",),
        )
        for name, good in self.files().readable.items():
            files.add_metric((name,), float(good))
        yield files


def _scaling(status: ControllerStatus | ClusterScaling | None) -> Iterator[Metric]:
    """What the controller makes of demand, or the cluster's head, and what has no slice; nothing where there is neither."""
    if status is None:
        return
    unplaced = GaugeMetricFamily(
        "sliceway_unplaced_replicas",
        "Replicas that have no slice. `model` is model@tenant for a dedicated tenant's.",
        labels=("model",),
    )
    for name, count in sorted(Counts(stem_of(replica) for replica in status.unplaced).items()):
        unplaced.add_metric((name,), count)
    yield unplaced
    asked = GaugeMetricFamily(
        "sliceway_autoscale_replicas",
        "Replicas that demand asks for, and those that have a slice. `model` is model@tenant for a dedicated tenant's.",
        labels=("model", "what"),
    )
    capacity = GaugeMetricFamily(
        "sliceway_autoscale_capacity_requests_per_second",
        "What one replica is counted with.",
        labels=("model", "source"),
    )
    for name, row in status.scaling.items():
        asked.add_metric((name, "asked"), row.replicas)
        asked.add_metric((name, "placed"), row.placed)
        if row.requests_per_replica is not None:
            capacity.add_metric((name, row.capacity_source), row.requests_per_replica)
    yield asked
    yield capacity
    attempts = CounterMetricFamily(
        "sliceway_repartitions",
        "Attempts to cut GPUs anew for demand, since the controller began, or the process that leads the cluster.",
        labels=("result",),
    )
    for result, count in sorted(status.repartition.counts.items()):
        attempts.add_metric((result,), count)
    yield attempts
    yield GaugeMetricFamily(
        "sliceway_repartition_running", "1 while GPUs are cut anew for demand.", value=float(status.repartition.running)
    )
    if isinstance(status, ClusterScaling):  # on one machine `sliceway plan` weighs what is only proposed
        yield GaugeMetricFamily(
            "sliceway_repartition_proposed",
            "1 while cutting GPUs anew would be worth it for demand, and the configuration only has it proposed.",
            value=float(status.repartition.proposed is not None),
        )


def _admission(admission: Admission) -> Iterator[Metric]:
    waiting = GaugeMetricFamily(
        "sliceway_queue_requests", "Requests that wait for a replica.", labels=("model", "dedicated_to", "tenant")
    )
    tokens = GaugeMetricFamily(
        "sliceway_queue_tokens",
        "Tokens that waiting requests may need, prompts and answers.",
        labels=("model", "dedicated_to"),
    )
    expected = GaugeMetricFamily(
        "sliceway_queue_expected_wait_seconds", "How long a new request would wait.", labels=("model", "dedicated_to")
    )
    refused = CounterMetricFamily(
        "sliceway_queue_refusals", "Requests that a queue took no more.", labels=("model", "dedicated_to")
    )
    now = admission.now()
    for pool in admission.pools():
        labels = (pool.model, pool.tenant or "")
        for tenant, requests in pool.waiting_by_tenant().items():
            waiting.add_metric((*labels, tenant), requests)
        tokens.add_metric(labels, pool.waiting_tokens)
        expected.add_metric(labels, pool.expected_wait_seconds("", now) if pool.waiting else 0.0)
        refused.add_metric(labels, pool.counts.refused + pool.counts.too_late)
    yield from (waiting, tokens, expected, refused)
    yield _counter(
        "throttled_requests",
        "Requests refused by a limit of their tenant.",
        ("tenant", "model", "limit"),
        admission.limits.refused,
    )
    used = GaugeMetricFamily(
        "sliceway_limit_used_ratio",
        "Used part of what this process holds of a limit.",
        labels=("tenant", "model", "limit"),
    )
    for row in limits(admission):
        used.add_metric((row["tenant"], row["model"] or "", row["limit"]), row["used"] / max(1, row["share"]))
    yield used


def _sharing(sharing: Sharing | None) -> Iterator[Metric]:
    if sharing is not None:
        yield GaugeMetricFamily(
            "sliceway_limit_store_available",
            "1 while the store of shared limits answers; 0 means that this gateway goes on with its part of them.",
            value=float(sharing.away_since is None),
        )
        yield GaugeMetricFamily("sliceway_limit_peers", "Gateways that share the limits.", value=sharing.peers)


class MetricsPage:
    """The text of `/metrics`."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, collector: GatewayCollector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """All metrics at this moment."""
        return generate_latest(self._registry)


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of a family. `part` is what a histogram's sample has after the family's name: `_bucket`, `_sum`, `_count`."""

    labels: Mapping[str, str]
    value: float
    part: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric that somebody else counts, and the gateway passes on; `name` is a counter's with its `_total`."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    text: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    families: Iterable[Family]

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            metric = Metric(family.name.removesuffix("_total"), family.text, family.kind)
            for sample in family.samples:
                metric.add_sample(family.name + sample.part, dict(sample.labels), sample.value)
            yield metric


def exposition(families: Iterable[Family]) -> bytes:
    """Prometheus' text of `families`, whatever their labels hold."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Told(families))
    return generate_latest(registry)


def _counter(name: str, text: str, labels: tuple[str, ...], counts: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(f"sliceway_{name}", text, labels=labels)
    for key, count in counts.items():
        values: Iterable[object] = key if isinstance(key, tuple) else (key,)
        family.add_metric([str(value) for value in values], count)
    return family


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets: each with everything up to its bound."""
    buckets, total = [], 0
    for bound, count in zip((*map(str, BUCKETS_SECONDS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
