"""How the costs of gateways are compared, and what is said of it."""

from __future__ import annotations

from typing import Any

from gateway.overhead.cost import Samples, compared
from gateway.overhead.neighbours import P99s, Round, median_interval, row
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
        "neighbours": [row("flood", [_round(1.1, 1.0)])],
    }
    text = markdown(report)
    assert "nginx is left out, not installed: apt install nginx-light." in text
    assert "| **sliceway** | 100.0 | 1.00 [1.00, 1.00] |" in text
    assert "| flood | TTFT | 20.00 / 22.00 | 1.10 {1.10, 1.10} | 10.00 / 10.00 | 1.00 {1.00, 1.00} | 1.10 " in text
    assert "20.0 kB per stream; the bound is 200 MB." in text


def _round(ratio: float, control: float) -> Round:
    """A round in which the aggressor made the victim so many times slower, through the gateway and past it."""
    alone, direct = P99s(0.020, 0.012), P99s(0.010, 0.010)
    return Round(alone, P99s(*(ratio * s for s in alone)), direct, P99s(*(control * s for s in direct)))


def test_what_was_not_measured_is_not_told() -> None:
    report = {"host": {"cores": 2, "load_average_before": 0.5}, "features": ["keys"]}
    text = markdown(report | {"neighbours": [row("flood", [_round(1.1, 1.0)])]})
    assert "TTFT" in text
    assert "us CPU" not in text
    assert "streams held" not in text


def test_what_the_machine_does_is_divided_out_round_by_round() -> None:
    figures = row("cancels", [_round(1.3, 1.2), _round(2.4, 2.0), _round(1.1, 1.1)])
    for metric in ("ttft", "itl"):
        assert figures[f"{metric}_ratio"] == 1.3
        assert figures[f"{metric}_direct_ratio"] == 1.2
        assert figures[f"{metric}_over_direct"] == 1.083
        assert figures[f"{metric}_over_direct_range"] == [1.0, 1.2]
        assert figures[f"{metric}_ratio_low"] is None
    assert (figures["ttft_alone_ms"], figures["ttft_direct_alone_ms"]) == (20.0, 10.0)


def test_six_rounds_are_told_with_their_interval() -> None:
    text = markdown(
        {
            "host": {"cores": 2, "load_average_before": 0.5},
            "features": ["keys"],
            "neighbours": [row("flood", [_round(1 + n / 10, 1.0) for n in range(6)])],
        }
    )
    assert "1.25 [1.00, 1.50]" in text


def test_the_interval_of_a_median_is_that_of_the_sign_test() -> None:
    # The k of n = 6, 9, 12 and 20 in tables of the sign test at 5%, two-sided: 0, 1, 2 and 5 may lie outside on a side.
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) is None
    for count, outside in ((6, 0), (9, 1), (12, 2), (20, 5)):
        values = [float(n) for n in range(count)]
        assert median_interval(values[::-1]) == (outside, count - 1 - outside)
