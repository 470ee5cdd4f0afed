"""The demo on two Ray nodes, each with a real engine: one is killed and comes back, and the other model's tenants notice nothing.

A missing engine or model is a failure, never a skip. What it does step by step is in the script, which loses a whole node as well
(docs/cluster.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(1200)]

DRILL = Path(__file__).parents[2] / "scripts" / "cluster_engines.py"


def test_a_killed_engine_of_two_nodes_is_refused_for_and_replaced_and_the_other_one_serves_on() -> None:
    done = subprocess.run(
        [sys.executable, str(DRILL), "--json", "--steps", "engine"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    loss = report["engine"]
    assert loss["failed"] == 0, report["failures"]
    assert loss["refused"] > 0, "a model without a replica is refused, with a time to come back"
    assert loss["in_hand"] <= 2, "each gateway had one request of it under way"
    assert loss["answered_beside"] > 0, "the other model was served all the while"
    assert report["left"] == [], "nothing outlives the cluster"
