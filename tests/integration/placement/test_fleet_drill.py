"""A simulated fleet under load: an engine killed, a replica drained, two GPUs cut anew, and no request lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.integration


@pytest.mark.timeout(420)
def test_two_gpus_are_cut_anew_under_load_and_only_a_killed_engine_may_lose_what_it_held(
    drill: Callable[..., Any],
) -> None:
    report = drill("fleet_drill.py", "--gpus", "2", "--clients", "4")
    assert report["replicas"] == report["pinned"] == report["proven"] == report["replicas_used"] == 14
    assert report["failed"] == report["failed_on_killed"]
    assert report["requests_while_drained"] == 0
    assert report["kept_engines"] >= 4, "the first four slices of either GPU stay"
    assert report["kept_engines_replaced"] == 0
    assert report["replicas_after"] == 10
