"""What engines say of themselves, under the gateway's labels: `/metrics/engines`.

Engines listen on sockets that no Prometheus reaches, and know nothing of slices. Of each ready replica's page the families in `FAMILIES`
are passed on, old names as the new ones, with the replica, its model and its slice as labels. Engines are asked when somebody
scrapes, all at once, and at most every few seconds.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.errors import EngineError
from gateway.exchange import Clock
from gateway.metrics import Family, Sample, exposition
from gateway.routes import Routes
from gateway.slice_metrics import slice_labels
from gateway.upstream import Engines
from placement.table import ReplicaRow, ReplicaState

CACHE_SECONDS = 2.0
TIMEOUT_SECONDS = 2.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["gauge", "counter", "histogram"]

# Name here -> type, and the names it has in vLLM, the newest first (0.33.0 back to 0.8; the same sheet as docs/http.md's).
FAMILIES: Mapping[str, tuple[Kind, tuple[str, ...]]] = {
    "vllm:num_requests_running": ("gauge", ("vllm:num_requests_running",)),
    "vllm:num_requests_waiting": ("gauge", ("vllm:num_requests_waiting",)),
    "vllm:kv_cache_usage_perc": ("gauge", ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")),
    "vllm:num_preemptions_total": ("counter", ("vllm:num_preemptions_total", "vllm:num_preemptions")),
    "vllm:prefix_cache_queries_total": (
        "counter",
        ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries_total"),
    ),
    "vllm:prefix_cache_hits_total": (
        "counter",
        ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits_total"),
    ),
    "vllm:prompt_tokens_total": ("counter", ("vllm:prompt_tokens_total",)),
    "vllm:generation_tokens_total": ("counter", ("vllm:generation_tokens_total",)),
    "vllm:time_to_first_token_seconds": ("histogram", ("vllm:time_to_first_token_seconds",)),
    "vllm:inter_token_latency_seconds": (
        "histogram",
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    ),
    "vllm:e2e_request_latency_seconds": ("histogram", ("vllm:e2e_request_latency_seconds",)),
    "vllm:request_queue_time_seconds": ("histogram", ("vllm:request_queue_time_seconds",)),
}
_HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")
_LINE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$")
_LE = re.compile(r'(?:^|,)le="([^"]*)"')


@dataclass(frozen=True, slots=True)
class _Page:
    """What one engine said; None where it said nothing in time."""

    replica: ReplicaRow
    text: str | None


class EngineMetrics:
    """The page, for any number of scrapes."""

    def __init__(
        self,
        routes: Callable[[], Routes],
        engines: Engines,
        clock: Clock,
        slices: Callable[[], Awaitable[Iterable[Family]]] | None = None,
    ) -> None:
        self._routes = routes
        self._engines = engines
        self._clock = clock
        self._slices = slices
        self._lock = asyncio.Lock()
        self._page = b""
        self._taken_at = float("-inf")

    async def render(self) -> bytes:
        """Every engine's figures, and what `slices` tells of their slices; at most CACHE_SECONDS old."""
        async with self._lock:
            if self._clock() - self._taken_at >= CACHE_SECONDS:
                ready = [r for r in self._routes().replicas() if r.state is ReplicaState.READY]
                of_slices = asyncio.ensure_future(self._slices()) if self._slices else None
                pages = await asyncio.gather(*(self._ask(replica) for replica in ready))
                self._page = exposition([*families(pages), *(await of_slices if of_slices else ())])
                self._taken_at = self._clock()
            return self._page

    async def _ask(self, replica: ReplicaRow) -> _Page:
        try:
            status, body = await self._engines.get(replica, "/metrics", timeout_seconds=TIMEOUT_SECONDS)
        except EngineError:
            return _Page(replica, None)
        return _Page(replica, body.decode("utf-8", "replace") if status == 200 else None)


def families(pages: Sequence[_Page]) -> Iterator[Family]:
    """Every family once, with the samples of all engines."""
    up = tuple(Sample(_labels(page.replica), page.text is not None) for page in pages)
    yield Family("sliceway_engine_up", "gauge", "1 where a ready engine told its metrics, 0 where it did not.", up)
    found = [(_labels(page.replica), _samples(page.text)) for page in pages if page.text is not None]
    for name, (kind, names) in FAMILIES.items():
        told = tuple(sample for labels, samples in found for sample in _told(kind, names, labels, samples))
        if told:
            yield Family(name, kind, "The engine's own figure, under the names of its slice.", told)


Samples = Mapping[str, Mapping[str, float]]
"""Sample name -> `le` (empty where there is none) -> the sum over all other labels."""


def _samples(text: str) -> Samples:
    """An engine's page; what it splits by labels of its own (the engine's index, the model's name) is added up."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or not line.startswith("vllm:"):
            continue
        name, labels, value = match.groups()
        bound = _LE.search(labels or "")
        try:
            number = float(value)
        except ValueError:
            continue
        by_bound = found.setdefault(name, {})
        key = bound.group(1) if bound else ""
        by_bound[key] = by_bound.get(key, 0.0) + number
    return found


def _told(kind: Kind, names: Iterable[str], labels: Mapping[str, str], samples: Samples) -> Iterator[Sample]:
    """What one engine says of a family that it knows by one of `names`."""
    if kind != "histogram":
        known = next((samples[n] for n in names if n in samples), None)
        if known is not None:
            yield Sample(labels, known.get("", 0.0))
        return
    known_as = next((n for n in names if f"{n}_bucket" in samples), None)
    if known_as is None:
        return
    for part in _HISTOGRAM_PARTS:
        for bound, value in samples.get(known_as + part, {}).items():
            yield Sample({**labels, "le": bound} if bound else labels, value, part)


def _labels(replica: ReplicaRow) -> Mapping[str, str]:
    return slice_labels(replica.slice, replica.replica, replica.model)
