"""Random changes of a simulated fleet under load, with kills: a short run of `scripts/transition_drill.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

DRILL = Path(__file__).parents[3] / "scripts" / "transition_drill.py"


@pytest.mark.timeout(420)
def test_no_promise_is_broken_while_a_fleet_changes_under_load_and_processes_are_killed(
    marked: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, str(DRILL), "--rounds", "2", "--seed", "10", "--clients", "2", "--kill", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env=marked,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["applied"] + report["blocked"] == report["rounds"] == 2
    assert report["steps"] > 0
    assert report["requests"] > 0
    assert report["without_generation"] == 0
    assert (report["failures"], report["undercut"], report["wrong"]) == ([], [], [])
