"""GPUs cut anew for demand, with the real processes: a shortage is met, also when the controller is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from placement.table import ReplicaState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

Site = Any  # the fixture's class lives in conftest.py, which cannot be imported
Eventually = Callable[..., Any]

ENGINE = ["{python}", "-m", "placement.fake_engine", "--uds", "{uds}", "--model", "{served_name}"]
SLOW = [*ENGINE, "--itl-seconds", "0.05", "--load-seconds", "0.4"]
HASTY = {
    "look_every": "100ms",
    "window": "1s",
    "scale_up_after": "300ms",
    "scale_down_after": "1s",
    "cool_down": "300ms",
    "repartition": "automatic",
}


def write(site: Site, port: int, **autoscale: str) -> None:
    """One simulated GPU that the plan cuts: `a` follows demand, `b` is always there."""
    content: dict[str, Any] = {
        "version": "v1",
        "state_dir": str(site.paths.root),
        "fleet": {"discover": {"simulate": {"h100-sxm": 1}}, "partition": "planned", "autoscale": HASTY | autoscale},
        "engine": {"command": SLOW, "stop_timeout_seconds": 5, "drain_timeout_seconds": 5},
        "models": [
            {
                "name": "a",
                "source": "simulated",
                "replicas": {"min": 1, "max": 3},
                "profile": "2g.20gb",
                "max_num_seqs": 2,
            },
            {"name": "b", "source": "simulated", "replicas": 1, "profile": "1g.10gb"},
        ],
        "gateway": {"authentication": "none", "listen": f"127.0.0.1:{port}"},
    }
    site.config.write_text(json.dumps(content), encoding="utf-8")


class Users:
    """So many who send one request after the other, until the block ends; `statuses` is what they got."""

    def __init__(self, port: int, number: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._use) for _ in range(number)]
        self.statuses: list[int] = []

    def _use(self) -> None:
        body = json.dumps({"model": "a", "prompt": "hello", "max_tokens": 8}).encode()
        while not self._over.is_set():
            request = urllib.request.Request(self._url, body, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    response.read()
                    self.statuses.append(response.status)
            except urllib.error.HTTPError as error:
                with error:
                    self.statuses.append(error.code)

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def ready(site: Site) -> dict[str, int]:
    """Engine pids by replica of what serves."""
    status = site.status()
    rows = status.replicas if status else ()
    return {r.replica: r.engine_pid for r in rows if r.state is ReplicaState.READY and r.engine_pid}


def serve(site: Site, eventually: Eventually) -> dict[str, int]:
    site.run("up", str(site.config))
    eventually(lambda: "serving" in site.log.read_text(encoding="utf-8"), f"up serves: {site.said()}", seconds=100)
    return ready(site)


def test_a_shortage_is_met_over_a_killed_controller_and_ends_with_the_demand(
    site: Site, eventually: Eventually, port: int
) -> None:
    write(site, port)
    before = serve(site, eventually)
    assert sorted(before) == ["a-0", "b-0"]
    journal = site.paths.root / "transition.json"

    def some_are_done() -> bool:
        try:
            told = json.loads(journal.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        return 0 < len(told["done"]) < len(told["steps"])

    with Users(port, 6) as users:
        eventually(some_are_done, f"GPUs are cut anew: {site.said()}", seconds=60)
        os.kill(site.status().pid, signal.SIGKILL)
        eventually(lambda: len(ready(site)) == 4, f"the next controller goes on: {site.said()}", seconds=90)
        eventually(lambda: not (site.paths.root / "repartition.json").exists(), f"tidied up: {site.said()}", seconds=30)
        told = eventually(lambda: site.status().repartition.events, f"its history: {site.said()}", seconds=30)
    assert told[0].result == "done"
    assert not journal.exists()
    assert set(users.statuses) == {200}
    assert {name: ready(site)[name] for name in before} == before, "who served goes on with the same processes"
    seats = json.loads((site.paths.root / "planned.json").read_text(encoding="utf-8"))
    assert sorted(seats) == ["a-0", "b-0"], "what demand brought may go again"
    eventually(lambda: sorted(ready(site)) == ["a-0", "b-0"], f"and goes: {site.said()}", seconds=60)


def proposed(site: Site) -> Any:
    """What `sliceway plan` shows that would be done for demand; None while the controller sees no shortage."""
    shown = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "plan", str(site.config), "--json"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=site.environment,
        timeout=100,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return json.loads(shown.stdout)["fleet"]["proposal"]


def test_what_is_only_to_be_proposed_is_shown_and_not_done(site: Site, eventually: Eventually, port: int) -> None:
    write(site, port, repartition="propose")
    serve(site, eventually)
    with Users(port, 6):
        eventually(lambda: site.status().scaling["a"].short, f"short of slices: {site.said()}", seconds=60)
        proposal = eventually(lambda: proposed(site), f"a proposal: {site.said()}", seconds=100)
    assert proposal["worthwhile"]
    assert not proposal["automatic"]
    assert {step["action"] for step in proposal["steps"]} == {"create", "start", "check"}
    assert sorted(ready(site)) == ["a-0", "b-0"]
    assert site.status().repartition.counts == {}
