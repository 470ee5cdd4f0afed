"""How the costs of gateways are compared, and what is said of it."""

from __future__ import annotations

from typing import Any

from gateway.overhead.cost import Samples, compared
from gateway.overhead.words import markdown


def test_gateways_are_compared_within_each_round() -> None:
    ours = Samples("sliceway", [100e-6, 300e-6, 200e-6], [10e-6, 30e-6, 20e-6])
    other = Samples("other", [200e-6, 600e-6, 400e-6], [5e-6, 15e-6, 10e-6], errors=2)
    rows = {row["name"]: row for row in compared([other, ours])}
    assert rows["other"]["request_us"] == 400.0
    assert (rows["other"]["request_ratio"], rows["other"]["event_ratio"]) == (2.0, 0.5)
    assert (rows["other"]["request_ratio_low"], rows["other"]["request_ratio_high"]) == (2.0, 2.0)
    assert rows["sliceway"]["request_ratio"] == 1.0
    assert rows["other"]["errors"] == 2


def _latency() -> dict[str, Any]:
    added = {"value": 0.1, "low": 0.0, "high": 0.2}
    both = {"p50": 1.0, "p99": 2.0}
    return {"direct_ms": both, "gateway_ms": both, "added_p50_ms": added, "added_p99_ms": added}


def test_the_tables_name_who_is_left_out_and_why() -> None:
    kinds = (("plain", "e2e"), ("stream", "ttft"), ("events", "itl"))
    report = {
        "host": {"cores": 2, "load_average_before": 0.5},
        "features": ["keys"],
        "added": {kind: {metric: _latency(), "errors": {}, "requests_per_second": 500.0} for kind, metric in kinds},
        "held": {
            "streams": 2000,
            "errors": 0,
            "events_per_second": 9000,
            "idle_bytes": 80e6,
            "most_bytes": 120e6,
            "bytes_per_stream": 20e3,
            "bound_bytes": 200e6,
        },
        "cost": {
            "rows": compared([Samples("sliceway", [100e-6], [10e-6])]),
            "left_out": {"nginx": "not installed: apt install nginx-light"},
            "rounds": 1,
            "seconds": 1.0,
        },
        "neighbours": [
            {"aggressor": "flood"}
            | {f"{metric}_{figure}_ms": 1.0 for metric in ("ttft", "itl") for figure in ("alone", "beside")}
            | {f"{metric}_ratio": 1.1 for metric in ("ttft", "itl")}
            | {f"{metric}_ratio_range": [1.0, 1.2] for metric in ("ttft", "itl")}
        ],
    }
    text = markdown(report)
    assert "nginx is left out, not installed: apt install nginx-light." in text
    assert "| **sliceway** | 100.0 | 1.00 [1.00, 1.00] |" in text
    assert "| flood | 1.00 / 1.00 | 1.10 [1.00, 1.20] |" in text
    assert "20.0 kB per stream; the bound is 200 MB." in text
