from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.engine_metrics import CACHE_SECONDS, EngineMetrics
from gateway.errors import EngineError
from gateway.routes import Routes, build_routes
from gateway.testing import replica_row
from gateway.upstream import EngineResponse
from placement.latency_grid import BUCKETS_SECONDS, histogram_flags
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

NEW = """# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="chat"} 2.0
vllm:num_requests_running{engine="1",model_name="chat"} 1.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:prefix_cache_hits_total{engine="0"} 7.0
vllm:num_preemptions_total{engine="0"} 0.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01"} 3.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf"} 5.0
vllm:inter_token_latency_seconds_sum{engine="0"} 0.5
vllm:inter_token_latency_seconds_count{engine="0"} 5.0
vllm:something_else{engine="0"} 9.0
python_info{version="3"} 1.0
"""
OLD = """vllm:gpu_cache_usage_perc{model_name="chat"} 0.5
vllm:time_per_output_token_seconds_bucket{le="0.05"} 1.0
vllm:time_per_output_token_seconds_bucket{le="+Inf"} 1.0
vllm:time_per_output_token_seconds_sum 0.04
vllm:time_per_output_token_seconds_count 1.0
"""


class Engines:
    """Pages by replica; None for an engine that does not answer."""

    def __init__(self, pages: Mapping[str, str | None]) -> None:
        self.pages = pages
        self.asked: list[str] = []

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        assert path == "/metrics"
        self.asked.append(replica.replica)
        page = self.pages[replica.replica]
        if page is None:
            raise EngineError("no answer", replica=replica.replica)
        return 200, page.encode()

    async def post(
        self, replica: ReplicaRow, path: str, headers: Mapping[str, str], body: bytes, *, method: str = "POST"
    ) -> EngineResponse:
        raise NotImplementedError

    async def retain(self, endpoints: Iterable[str]) -> None: ...

    async def close(self) -> None: ...


def routes(*rows: ReplicaRow) -> Routes:
    return build_routes(RoutingTable(generation=1, models=(ModelRow(name="chat"),), replicas=rows), (), {})


def samples(page: bytes) -> dict[tuple[str, str], list[tuple[dict[str, str], float]]]:
    """By family and replica."""
    found: dict[tuple[str, str], list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found.setdefault((sample.name, sample.labels["replica"]), []).append((sample.labels, sample.value))
    return found


def read(engines: Engines, *rows: ReplicaRow) -> dict[tuple[str, str], list[tuple[dict[str, str], float]]]:
    return samples(asyncio.run(EngineMetrics(lambda: routes(*rows), engines, lambda: 0.0).render()))


def mig(replica: str) -> ReplicaRow:
    one = SliceRow(id="GPU-a/1g.10gb@2", kind="mig", profile="1g.10gb", uuid="MIG-1", gpu="GPU-a")
    return replica_row(replica, "chat", "unix:/a").model_copy(update={"slice": one})


def test_engines_figures_come_under_their_slice() -> None:
    found = read(Engines({"chat-0": NEW}), mig("chat-0"))
    ((labels, running),) = found["vllm:num_requests_running", "chat-0"]
    assert running == 3, "an engine's own parts are added up"
    assert labels == {
        "replica": "chat-0",
        "model": "chat",
        "slice": "GPU-a/1g.10gb@2",
        "UUID": "GPU-a",
        "GPU_I_PROFILE": "1g.10gb",
    }
    assert [value for _, value in found["vllm:prefix_cache_hits_total", "chat-0"]] == [7]
    buckets = found["vllm:inter_token_latency_seconds_bucket", "chat-0"]
    assert [(labels["le"], value) for labels, value in buckets] == [("0.01", 3), ("+Inf", 5)]
    assert not [name for name, _ in found if "something_else" in name or "python" in name]


def test_old_names_come_as_the_new_ones() -> None:
    found = read(
        Engines({"a": NEW, "b": OLD}), replica_row("a", "chat", "unix:/a"), replica_row("b", "chat", "unix:/b")
    )
    usage = {replica: rows[0][1] for (name, replica), rows in found.items() if name == "vllm:kv_cache_usage_perc"}
    assert usage == {"a": 0.25, "b": 0.5}
    assert found["vllm:inter_token_latency_seconds_count", "b"][0][1] == 1


def test_an_engine_that_says_nothing_is_told_of_and_hides_no_other() -> None:
    found = read(
        Engines({"a": None, "b": NEW}), replica_row("a", "chat", "unix:/a"), replica_row("b", "chat", "unix:/b")
    )
    assert {replica: rows[0][1] for (name, replica), rows in found.items() if name == "sliceway_engine_up"} == {
        "a": 0,
        "b": 1,
    }


@pytest.mark.parametrize(
    "page", ["", "nonsense", "vllm:num_requests_running", 'vllm:kv_cache_usage_perc{a="b"} x', "\x00\xff{}"]
)
def test_a_page_that_makes_no_sense_is_an_empty_one(page: str) -> None:
    found = read(Engines({"a": page}), replica_row("a", "chat", "unix:/a"))
    assert [name for name, _ in found] == ["sliceway_engine_up"]


def test_what_is_named_strangely_stays_one_label() -> None:
    strange = replica_row('a"} 1\nb', "chat", "unix:/a")
    found = read(Engines({strange.replica: NEW}), strange)
    assert ("vllm:kv_cache_usage_perc", strange.replica) in found


def test_only_ready_engines_are_asked_and_not_at_every_scrape() -> None:
    engines, now = Engines({"a": NEW, "b": NEW}), [0.0]
    starting = replica_row("b", "chat", "unix:/b", state=ReplicaState.STARTING)
    metrics = EngineMetrics(lambda: routes(replica_row("a", "chat", "unix:/a"), starting), engines, lambda: now[0])

    async def scrape() -> None:
        await asyncio.gather(metrics.render(), metrics.render())
        await metrics.render()
        now[0] += CACHE_SECONDS
        await metrics.render()

    asyncio.run(scrape())
    assert engines.asked == ["a", "a"]


def test_engines_get_the_gateways_own_grid() -> None:
    flags = histogram_flags("0.32.0+cpu")
    assert str(BUCKETS_SECONDS[0]) in flags["--custom-histogram-buckets"]
    assert list(BUCKETS_SECONDS) == sorted(set(BUCKETS_SECONDS))
    assert histogram_flags("0.24.0") == {}
