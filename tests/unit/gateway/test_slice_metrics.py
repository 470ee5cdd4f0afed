"""The driver's figures under the table's names; a driver that fails or hangs takes nothing else with it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import slice_metrics
from gateway.metrics import Family, exposition
from gateway.routes import Routes, build_routes
from gateway.slice_metrics import SliceMetrics, families
from gateway.testing import replica_row
from placement.nvml import SliceActivity
from placement.table import ModelRow, RoutingTable, SliceRow

HERE = SliceRow(id="GPU-a/1g.10gb@2", kind="mig", profile="1g.10gb", uuid="MIG-1", gpu="GPU-a")
FREE = SliceRow(id="GPU-a/3g.40gb@4", kind="mig", profile="3g.40gb", uuid="MIG-2", gpu="GPU-a")
BUSY = SliceActivity("MIG-1", "GPU-a", 9, 5, 10, {"sm": 0.5, "dram": 0.25})


def routes() -> Routes:
    row = replica_row("chat-0", "chat", "unix:/a").model_copy(update={"slice": HERE})
    table = RoutingTable(generation=1, models=(ModelRow(name="chat"),), replicas=(row,), idle=(FREE,))
    return build_routes(table, (), {})


def found(activity: list[SliceActivity]) -> dict[tuple[str, str], dict[str, str]]:
    """Labels by sample and value, as Prometheus reads the page."""
    read = text_string_to_metric_families(exposition(families(routes(), activity)).decode())
    return {(s.name, f"{s.value:g}"): dict(s.labels) for family in read for s in family.samples}


def test_figures_stand_under_the_tables_names() -> None:
    seen = found([BUSY, SliceActivity("MIG-2", "GPU-a", 1, 0, 40)])
    common = {"UUID": "GPU-a", "model": "chat", "replica": "chat-0", "slice": HERE.id}
    assert seen["sliceway_slice_memory_used_bytes", "5"] == common | {"GPU_I_ID": "9", "GPU_I_PROFILE": "1g.10gb"}
    assert seen["sliceway_slice_busy_ratio", "0.25"]["part"] == "dram"
    free = seen["sliceway_slice_memory_bytes", "40"]
    assert (free["model"], free["replica"], free["GPU_I_ID"]) == ("", "", "1")


def test_slices_that_the_table_does_not_have_are_not_shown() -> None:
    assert list(families(routes(), [SliceActivity("MIG-9", "GPU-b", 1, 0, 40)])) == []
    assert list(families(routes(), [])) == []


def test_a_driver_that_hangs_costs_its_figures_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_metrics, "TIMEOUT_SECONDS", 0.01)
    answer, calls = threading.Event(), []

    def read() -> tuple[SliceActivity, ...]:
        calls.append(1)
        answer.wait(30)
        return (BUSY,)

    async def scrape() -> tuple[tuple[Family, ...], ...]:
        metrics = SliceMetrics(routes, read)
        first, second = await metrics.families(), await metrics.families()
        answer.set()
        monkeypatch.setattr(slice_metrics, "TIMEOUT_SECONDS", 30)
        return first, second, await metrics.families()

    first, second, last = asyncio.run(scrape())
    assert (first, second, len(calls)) == ((), (), 1)
    assert "sliceway_slice_busy_ratio" in {family.name for family in last}
