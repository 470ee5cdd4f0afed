"""`sliceway bench overhead` from end to end: a simulated engine, a gateway process, pairs of requests."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration


def test_a_measurement_with_nothing_but_the_command() -> None:
    command = [sys.executable, "-m", "gateway.cli", "bench", "overhead", "--json"]
    options = ["--pairs", "12", "--rate", "100", "--output-tokens", "3"]
    done = subprocess.run([*command, *options], capture_output=True, encoding="utf-8", timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["errors"] == {}
    assert report["simulated"]
    assert {"api keys", "relay: fast", "metering"} <= set(report["features"])
    for kind, name in (("plain", "e2e"), ("stream", "ttft"), ("stream", "itl")):
        row = report[kind][name]
        assert report[kind]["pairs"] == 12
        for figure in ("added_p50_ms", "added_p99_ms", "paired_median_ms"):
            assert row[figure]["low"] <= row[figure]["high"]
        assert row["direct_ms"]["p50"] <= row["direct_ms"]["p99"]
    assert report["plain"]["gateway_says_ms"]["p50"] >= 0
    assert report["trusted"] == (not report["problems"])
