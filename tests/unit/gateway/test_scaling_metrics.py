"""What the controller makes of demand, as Prometheus sees it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from gateway.admission import Loads
from gateway.digests import LatencyBook
from gateway.metrics import Files, GatewayCollector, MetricsPage
from gateway.routes import Routes
from gateway.stats import Stats
from placement.state import StatePaths
from placement.status import (
    ClusterScaling,
    ControllerStatus,
    ErrorRow,
    RepartitionStatus,
    ScalingRow,
    read_cluster_scaling,
    running_status,
    write_status,
)

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def status() -> ControllerStatus:
    row = ScalingRow(
        replicas=3, placed=2, least=1, most=4, reason="", requests_per_replica=2.5, capacity_source="measured"
    )
    return ControllerStatus(
        pid=1,
        started_at=NOW,
        updated_at=NOW,
        state="running",
        config="c",
        generation=1,
        scaling={"a@acme": row, "b": row.model_copy(update={"requests_per_replica": None})},
        repartition=RepartitionStatus(running=True, counts={"done": 2, "failed": 1}),
    )


def page(told: ControllerStatus | ClusterScaling | None) -> str:
    collector = GatewayCollector(
        Stats(), LatencyBook(), Loads(bound=8), Routes, lambda: Files({}), lambda: 0.0, controller=lambda: told
    )
    return MetricsPage(collector).render().decode()


def test_numbers_capacity_and_attempts_are_told() -> None:
    text = page(status())
    assert 'sliceway_autoscale_replicas{model="a@acme",what="asked"} 3.0' in text
    assert 'sliceway_autoscale_replicas{model="b",what="placed"} 2.0' in text
    assert 'sliceway_autoscale_capacity_requests_per_second{model="a@acme",source="measured"} 2.5' in text
    assert 'requests_per_second{model="b"' not in text
    assert 'sliceway_repartitions_total{result="failed"} 1.0' in text
    assert "sliceway_repartition_running 1.0" in text
    assert "sliceway_repartition_proposed" not in text, "nobody weighs it all the time there"


def test_a_cluster_tells_whether_cutting_anew_is_proposed() -> None:
    proposed = ClusterScaling(repartition=RepartitionStatus(proposed="2 requests/s more", counts={"proposed": 1}))
    assert "sliceway_repartition_proposed 1.0" in page(proposed)
    assert 'sliceway_repartitions_total{result="proposed"} 1.0' in page(proposed)
    assert "sliceway_repartition_proposed 0.0" in page(ClusterScaling())


def test_replicas_without_a_slice_are_counted_by_model() -> None:
    no_room = ErrorRow(code="no_room", message="no slice is large enough", remedy="")
    names = ("chat-0", "chat-1", "a@acme-0")
    text = page(status().model_copy(update={"unplaced": dict.fromkeys(names, no_room)}))
    assert 'sliceway_unplaced_replicas{model="chat"} 2.0' in text
    assert 'sliceway_unplaced_replicas{model="a@acme"} 1.0' in text
    assert "sliceway_unplaced_replicas{" not in page(status())


def test_where_no_controller_runs_nothing_is_told(tmp_path: Path) -> None:
    paths = StatePaths(tmp_path)
    write_status(status(), paths.controller_status)
    assert running_status(paths) is None, "it ended without a word"
    assert "sliceway_autoscale" not in page(None)


def test_a_gateway_of_a_cluster_tells_what_the_head_makes_of_demand(tmp_path: Path) -> None:
    paths = StatePaths(tmp_path)
    assert read_cluster_scaling(paths.cluster_scaling) is None
    told = ClusterScaling(unplaced=("chat-2",), scaling=status().scaling)
    paths.cluster_scaling.write_text(told.model_dump_json())
    text = page(read_cluster_scaling(paths.cluster_scaling))
    assert 'sliceway_autoscale_replicas{model="a@acme",what="asked"} 3.0' in text
    assert 'sliceway_autoscale_capacity_requests_per_second{model="a@acme",source="measured"} 2.5' in text
    assert 'sliceway_unplaced_replicas{model="chat"} 1.0' in text
    paths.cluster_scaling.write_bytes(b"{")
    assert read_cluster_scaling(paths.cluster_scaling) is None
