"""`/slices` and `/metrics` from known samples."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.admission import Loads
from gateway.digests import METRICS, WINDOWS, LatencyBook
from gateway.metrics import Files, GatewayCollector, MetricsPage
from gateway.routes import Routes, build_routes
from gateway.slices_view import SlicesView
from gateway.stats import Stats
from gateway.testing import FakeClock, replica_row
from placement.table import ModelRow, ReplicaState, RoutingTable, SliceRow

ROUTES = build_routes(
    RoutingTable(
        generation=3,
        models=(ModelRow(name="m"),),
        replicas=(replica_row("m-0", "m", "unix:/0"), replica_row("m-1", "m", "unix:/1", state=ReplicaState.FAILED)),
        idle=(SliceRow(id="MIG-x", kind="mig", profile="1g.10gb", uuid="MIG-x", gpu="GPU-0", product="H100-80GB-SXM"),),
    ),
    (),
    {},
)


def filled(clock: FakeClock) -> LatencyBook:
    book = LatencyBook()
    for tenant, values in (("acme", [0.1] * 99 + [1.0]), ("beta", [0.2] * 100)):
        series = book.series("slice-of-m-0", tenant, clock())
        for value in values:
            series.ttft_seconds.add(value, clock())
    return book


async def test_what_batches_took_is_shown_apart_from_what_people_waited_for() -> None:
    clock, batches = FakeClock(), LatencyBook()
    batches.series("slice-of-m-0", "acme", clock()).e2e_seconds.add(600.0, clock())
    first, second, *_ = await SlicesView(lambda: ROUTES, filled(clock), clock, None, batches).rows()
    assert first["batches"]["windows"]["1m"]["e2e_seconds"]["count"] == 1
    assert first["windows"]["1m"]["e2e_seconds"]["count"] == 0
    assert second["batches"] is None


async def test_every_slice_is_there_with_its_tenants_and_windows() -> None:
    clock = FakeClock()
    rows = await SlicesView(lambda: ROUTES, filled(clock), clock).rows()
    assert [(r["slice"]["id"], r["replica"], r["state"]) for r in rows] == [
        ("slice-of-m-0", "m-0", "ready"),
        ("slice-of-m-1", "m-1", "failed"),
        ("MIG-x", None, "idle"),
    ]
    mine = {
        "id": "MIG-x",
        "kind": "mig",
        "profile": "1g.10gb",
        "uuid": "MIG-x",
        "gpu": "GPU-0",
        "product": "H100-80GB-SXM",
    }
    assert rows[2]["slice"] == mine
    assert all(set(r) == {"slice", "model", "replica", "state", "queue", "windows", "tenants", "batches"} for r in rows)
    whole = rows[0]["windows"]["5m"]["ttft_seconds"]
    assert whole["count"] == 200
    assert whole["p50"] == pytest.approx(0.2, rel=0.01)
    acme = rows[0]["tenants"]["acme"]["windows"]["5m"]["ttft_seconds"]
    assert (acme["count"], acme["p50"], acme["p99"]) == (
        100,
        pytest.approx(0.1, rel=0.01),
        pytest.approx(0.1, rel=0.01),
    )
    for window in WINDOWS:
        assert set(rows[1]["windows"][window]) == set(METRICS)
        assert rows[1]["windows"][window]["itl_seconds"] == {"p50": None, "p99": None, "count": 0}


async def test_what_the_gateway_took_and_what_the_engine_took_are_told_apart_for_each_model() -> None:
    """By `/slices`, whose rows name their model; and by `/metrics`, where the slice leads from the times to the model."""
    clock, book = FakeClock(), LatencyBook()
    rows = (replica_row("m-0", "m", "unix:/0"), replica_row("k-0", "k", "unix:/1"))
    routes = build_routes(
        RoutingTable(generation=1, models=(ModelRow(name="m"), ModelRow(name="k")), replicas=rows), (), {}
    )
    took = {"m": (0.002, 0.4), "k": (0.001, 3.0)}
    for row in rows:
        series = book.series(row.slice.id, "acme", clock())
        series.gateway_seconds.add(took[row.model][0], clock())
        series.engine_seconds.add(took[row.model][1], clock())
    shown = {row["model"]: row["windows"]["1m"] for row in await SlicesView(lambda: routes, book, clock).rows()}
    for model, (gateway, engine) in took.items():
        assert shown[model]["gateway_seconds"]["p50"] == pytest.approx(gateway, rel=0.01)
        assert shown[model]["engine_seconds"]["p50"] == pytest.approx(engine, rel=0.01)
    files = Files({})
    text = MetricsPage(GatewayCollector(Stats(), book, Loads(bound=1), lambda: routes, lambda: files, clock)).render()
    for row in rows:
        sums = [f'sliceway_{stage}_seconds_sum{{slice="{row.slice.id}"' for stage in ("gateway", "engine")]
        leads = f'sliceway_in_flight_requests{{model="{row.model}",replica="{row.replica}",slice="{row.slice.id}"}}'
        assert all(text.decode().count(part) == 1 for part in (*sums, leads))


async def test_windows_forget_in_their_own_time() -> None:
    clock = FakeClock()
    view = SlicesView(lambda: ROUTES, filled(clock), clock)

    async def counts() -> list[Any]:
        return [(await view.rows())[0]["windows"][window]["ttft_seconds"]["count"] for window in WINDOWS]

    seen = [await counts()]
    for seconds in (71, 300, 3900):
        clock.turn(seconds)
        seen.append(await counts())
    assert seen == [[200, 200, 200], [0, 200, 200], [0, 0, 200], [0, 0, 0]]


async def test_readers_share_an_answer_for_a_second() -> None:
    clock, calls = FakeClock(), []

    def routes() -> Routes:
        calls.append(clock())
        return ROUTES

    view = SlicesView(routes, LatencyBook(), clock)
    first = await view.rows()
    assert await view.rows() is first
    clock.turn(1.1)
    assert await view.rows() is not first
    assert len(calls) == 2


def test_gone_slices_are_forgotten_once_their_hour_is_over() -> None:
    clock = FakeClock()
    book = filled(clock)
    book.forget(frozenset(), clock())
    assert set(book.tenants("slice-of-m-0")) == {"acme", "beta"}
    clock.turn(4800)
    book.forget(frozenset({"slice-of-m-0"}), clock())
    assert set(book.tenants("slice-of-m-0")) == {"acme", "beta"}
    book.forget(frozenset(), clock())
    assert book.tenants("slice-of-m-0") == {}


def page(stats: Stats, book: LatencyBook, loads: Loads, clock: FakeClock) -> str:
    collector = GatewayCollector(
        stats, book, loads, lambda: ROUTES, lambda: Files({"routing_table": False, "keystore": True}), clock
    )
    return MetricsPage(collector).render().decode()


def test_metrics_are_the_counters_the_digests_and_the_state() -> None:
    clock, stats, loads = FakeClock(), Stats(), Loads(bound=10)
    stats.requests["m", "acme", 200] += 2
    stats.errors["engine_died"] += 1
    loads.of(ROUTES.models["m"].ready[0]).take(1, 100)
    text = page(stats, filled(clock), loads, clock)
    for line in (
        'sliceway_requests_total{model="m",status="200",tenant="acme"} 2.0',
        'sliceway_errors_total{code="engine_died"} 1.0',
        'sliceway_in_flight_requests{model="m",replica="m-0",slice="slice-of-m-0"} 1.0',
        'sliceway_in_flight_requests{model="m",replica="m-1",slice="slice-of-m-1"} 0.0',
        'sliceway_replicas{model="m",state="failed"} 1.0',
        "sliceway_routing_table_generation 3.0",
        'sliceway_file_readable{file="routing_table"} 0.0',
        'sliceway_ttft_seconds_bucket{le="0.075",slice="slice-of-m-0",tenant="acme"} 0.0',
        'sliceway_ttft_seconds_bucket{le="0.1",slice="slice-of-m-0",tenant="acme"} 99.0',
        'sliceway_ttft_seconds_bucket{le="1.0",slice="slice-of-m-0",tenant="acme"} 100.0',
        'sliceway_ttft_seconds_bucket{le="+Inf",slice="slice-of-m-0",tenant="beta"} 100.0',
        'sliceway_ttft_seconds_count{slice="slice-of-m-0",tenant="beta"} 100.0',
    ):
        assert line in text.splitlines(), line


def test_totals_outlive_the_windows() -> None:
    clock = FakeClock()
    book = filled(clock)
    clock.turn(10_000)
    assert 'sliceway_ttft_seconds_count{slice="slice-of-m-0",tenant="beta"} 100.0' in page(
        Stats(), book, Loads(bound=10), clock
    )
