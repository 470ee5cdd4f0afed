"""A simulated fleet under load: an engine killed, a replica drained, two GPUs cut anew, and no request lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

DRILL = Path(__file__).parents[3] / "scripts" / "fleet_drill.py"


@pytest.mark.timeout(420)
def test_two_gpus_are_cut_anew_under_load_and_only_a_killed_engine_may_lose_what_it_held(
    marked: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, str(DRILL), "--gpus", "2", "--clients", "4", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env=marked,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["replicas"] == report["pinned"] == report["proven"] == report["replicas_used"] == 14
    assert report["failed"] == report["failed_on_killed"]
    assert report["requests_while_drained"] == 0
    assert report["kept_engines"] >= 4, "the first four slices of either GPU stay"
    assert report["kept_engines_replaced"] == 0
    assert report["replicas_after"] == 10
