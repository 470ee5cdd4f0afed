"""GPUs cut anew under a controller: what stays goes on with the same process, what must go is drained first."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from placement.table import ReplicaState
from placement.withheld import release, withheld, withhold

pytestmark = pytest.mark.integration

Site = Any  # the fixture's class lives in conftest.py, which cannot be imported
Eventually = Callable[..., Any]

ENGINE = ["{python}", "-m", "placement.fake_engine", "--uds", "{uds}", "--model", "{served_name}"]


def write(site: Site, layout: list[str], **models: list[str]) -> None:
    """A simulated GPU with `layout`; each model's replicas are pinned to profiles."""
    content: dict[str, Any] = {
        "version": "v1",
        "state_dir": str(site.paths.root),
        "fleet": {"discover": {"simulate": {"h100-sxm": 1}}, "layouts": [{"layout": layout}]},
        "engine": {"command": ENGINE, "stop_timeout_seconds": 5, "drain_timeout_seconds": 5},
        "models": [
            {"name": name, "source": "simulated", "replicas": len(profiles), "profile": profiles[0]}
            for name, profiles in models.items()
        ],
        "gateway": {"authentication": "none"},
    }
    site.config.write_text(json.dumps(content), encoding="utf-8")


def sliceway(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, without the environment of this one's simulators."""
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *words, str(site.config), "--json"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=site.environment,
        timeout=60,
    )


def serving(site: Site, *names: str) -> dict[str, int] | None:
    """Engine pids by replica, once all of `names` are ready."""
    status = site.status()
    pids = {r.replica: r.engine_pid for r in status.replicas if r.state is ReplicaState.READY} if status else {}
    return {n: p for n in names if (p := pids.get(n))} if set(names) <= set(pids) else None


@pytest.mark.timeout(120)
def test_what_stays_serves_on_and_what_goes_is_drained_first(site: Site, eventually: Eventually) -> None:
    write(site, ["1g.10gb@0", "1g.10gb@1", "3g.40gb@4"], small=["1g.10gb"], large=["3g.40gb"])
    applied = sliceway(site, "apply")
    assert applied.returncode == 0, applied.stdout + applied.stderr
    site.controller()
    before = eventually(lambda: serving(site, "small-0", "large-0"), f"both ready: {site.said()}", seconds=40)

    write(site, ["1g.10gb@0", "1g.10gb@1", "2g.20gb@4"], small=["1g.10gb"], large=["2g.20gb"])
    refused = sliceway(site, "apply")
    assert refused.returncode == 1
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "slice_in_use"
    assert f"(pid {before['large-0']}" in error["message"]

    drained = sliceway(site, "apply", "--drain")
    assert drained.returncode == 0, drained.stdout + drained.stderr + site.said()
    assert json.loads(drained.stdout)["gpus"][0]["now"] == ["1g.10gb@0", "1g.10gb@1", "2g.20gb@4"]
    assert not site.paths.withheld.exists()
    after = eventually(lambda: serving(site, "small-0", "large-0"), f"both ready again: {site.said()}", seconds=40)
    assert after["small-0"] == before["small-0"], "the slice stayed, and so did its engine"
    assert after["large-0"] != before["large-0"]
    large = site.replica("large-0")
    assert large is not None
    assert large.slice.profile == "2g.20gb"


def test_a_withheld_file_that_makes_no_sense_takes_nothing_down(site: Site) -> None:
    site.paths.root.mkdir(parents=True)
    for content in ("", "[]", '{"slices": 3}', "{"):
        site.paths.withheld.write_text(content, encoding="utf-8")
        assert withheld(site.paths) == frozenset()
    withhold(site.paths, ["GPU-1/1g.10gb@0"])
    assert withheld(site.paths) == {"GPU-1/1g.10gb@0"}
    release(site.paths)
    assert withheld(site.paths) == frozenset()
