"""Random changes of a simulated fleet under load, with kills: a short run of `scripts/transition_drill.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.integration


@pytest.mark.timeout(420)
def test_no_promise_is_broken_while_a_fleet_changes_under_load_and_processes_are_killed(
    drill: Callable[..., Any],
) -> None:
    report = drill("transition_drill.py", "--rounds", "2", "--seed", "10", "--clients", "2", "--kill")
    assert report["applied"] + report["blocked"] == report["rounds"] == 2
    assert report["steps"] > 0
    assert report["requests"] > 0
    assert report["without_generation"] == 0
    assert (report["failures"], report["undercut"], report["wrong"]) == ([], [], [])
