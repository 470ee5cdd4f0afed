"""A planned fleet under a controller: what is planned runs, changes are carried out with requests going on, kills cost nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from placement.table import ReplicaState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

Site = Any  # the fixture's class lives in conftest.py, which cannot be imported
Eventually = Callable[..., Any]

ENGINE = ["{python}", "-m", "placement.fake_engine", "--uds", "{uds}", "--model", "{served_name}"]


def write(site: Site, **replicas: tuple[int, str]) -> None:
    """Two simulated GPUs that the plan cuts; each model has so many replicas of one profile."""
    content: dict[str, Any] = {
        "version": "v1",
        "state_dir": str(site.paths.root),
        "fleet": {"discover": {"simulate": {"h100-sxm": 2}}, "partition": "planned"},
        "engine": {"command": ENGINE, "stop_timeout_seconds": 5, "drain_timeout_seconds": 5},
        "models": [
            {"name": name, "source": "simulated", "replicas": number, "profile": profile}
            for name, (number, profile) in replicas.items()
        ],
        "gateway": {"authentication": "none", "watch_config": True},
    }
    site.config.write_text(json.dumps(content), encoding="utf-8")


def command(site: Site, *words: str) -> list[str]:
    return [sys.executable, "-m", "gateway.cli", *words, str(site.config), "--json"]


def sliceway(site: Site, *words: str) -> Any:
    done = subprocess.run(
        command(site, *words), capture_output=True, encoding="utf-8", check=False, env=site.environment, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr + site.said()
    return json.loads(done.stdout)


def ready(site: Site) -> dict[str, str]:
    """Profiles by replica of what serves."""
    status = site.status()
    rows = status.replicas if status else ()
    return {r.replica: str(r.slice.profile) for r in rows if r.state is ReplicaState.READY}


def steps_left(site: Site) -> int | None:
    """Steps that a transition under way has not done; None if none is under way."""
    try:
        journal = json.loads((site.paths.root / "transition.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return len(journal["steps"]) - len(journal["done"])


def test_a_plan_is_carried_out_and_then_there_is_nothing_to_do(site: Site, eventually: Eventually) -> None:
    write(site, small=(2, "1g.10gb"), large=(1, "3g.40gb"))
    assert sliceway(site, "apply")["fleet"]["ok"]
    site.controller()
    wanted = {"small-0": "1g.10gb", "small-1": "1g.10gb", "large-0": "3g.40gb"}
    eventually(lambda: ready(site) == wanted, f"all serve: {site.said()}", seconds=60)
    assert sliceway(site, "apply")["fleet"]["done"] == []
    assert sliceway(site, "plan")["fleet"]["transition"]["steps"] == []
    before = {r.replica: r.engine_pid for r in site.status().replicas}

    write(site, small=(1, "1g.10gb"), large=(1, "3g.40gb"), extra=(1, "2g.20gb"))
    applied = sliceway(site, "apply")["fleet"]
    assert {s["action"] for s in applied["done"]} == {"create", "start", "check", "drain", "stop"}
    after = ready(site)
    assert after["extra-0"] == "2g.20gb"
    assert len(after) == 3
    pids = {r.replica: r.engine_pid for r in site.status().replicas}
    assert all(pids[name] == before[name] for name in set(pids) & set(before)), "who stays is not disturbed"


def test_an_apply_that_is_killed_is_finished_by_the_next_one(site: Site, eventually: Eventually) -> None:
    write(site, small=(3, "1g.10gb"))
    sliceway(site, "apply")
    site.controller()
    eventually(lambda: len(ready(site)) == 3, f"all serve: {site.said()}", seconds=60)

    write(site, small=(3, "1g.10gb"), large=(2, "3g.40gb"))
    process = subprocess.Popen(
        command(site, "apply"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=site.environment
    )
    try:
        eventually(
            lambda: (steps_left(site) or 99) < 6 or process.poll() is not None, "some steps are done", seconds=60
        )
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sum(profile == "1g.10gb" for profile in ready(site).values()) == 3, "what serves goes on serving"
    assert sliceway(site, "apply")["fleet"]["ok"]
    assert steps_left(site) is None
    assert sorted(ready(site).values()) == ["1g.10gb"] * 3 + ["3g.40gb"] * 2
    assert sliceway(site, "apply")["fleet"]["done"] == []


class Client(threading.Thread):
    """Sends one request after the other until it is told to stop, and keeps what went wrong."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._request = (port, json.dumps({"model": "small", "prompt": "hello", "max_tokens": 3}).encode())
        self._stop_asked = threading.Event()
        self.served = 0
        self.failed: list[str] = []
        self.generations: list[int] = []

    def run(self) -> None:
        port, body = self._request
        while not self._stop_asked.is_set():
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    assert json.load(response)["choices"]
                    self.generations.append(int(response.headers["x-sliceway-generation"]))
                self.served += 1
            except Exception as error:  # noqa: BLE001  (whatever it is, it is what the test is about)
                self.failed.append(repr(error))

    def end(self) -> None:
        self._stop_asked.set()
        self.join()


def generation(port: int) -> int:
    """Of the configuration that the gateway serves."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=30) as response:
        return int(json.load(response)["config_generation"])


def test_requests_go_on_while_every_replica_moves_and_a_wrong_file_changes_nothing(
    site: Site, eventually: Eventually, port: int
) -> None:
    write(site, small=(2, "1g.10gb"))
    site.run("up", str(site.config), "--listen", f"127.0.0.1:{port}")
    eventually(lambda: "serving" in site.log.read_text(encoding="utf-8"), "up serves", seconds=100)
    clients = [Client(port) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        write(site, small=(2, "2g.20gb"))
        applied = sliceway(site, "apply")["fleet"]
        eventually(lambda: generation(port) == 2, "the gateway has it, whoever told it", seconds=60)
        site.config.write_text('{"version": "v1", "modles": []}', encoding="utf-8")
        eventually(
            lambda: (s := site.status()) and s.refused, "nobody but the watch tells of the wrong file", seconds=60
        )
        refused = subprocess.run(command(site, "apply"), capture_output=True, check=False, env=site.environment)
        assert (refused.returncode, generation(port)) == (2, 2)
        write(site, small=(1, "3g.40gb"))
        again = sliceway(site, "apply")["fleet"]
        eventually(lambda: generation(port) == 3, "the gateway has that one too", seconds=60)
        served = sum(c.served for c in clients)
        eventually(lambda: sum(c.served for c in clients) > served + 5, "and still serves", seconds=30)
    finally:
        for client in clients:
            client.end()
    assert applied["ok"]
    assert again["ok"]
    assert [failure for client in clients for failure in client.failed] == []
    assert list(ready(site).values()) == ["3g.40gb"]
    assert all(client.generations == sorted(client.generations) for client in clients)
    assert max(client.generations[-1] for client in clients) == 3
    assert {number for client in clients for number in client.generations} <= {1, 2, 3}
    kinds = [s["action"] for s in applied["done"]]
    assert kinds.index("check") < kinds.index("drain"), "the new one serves before the old one goes"


def test_a_changed_setting_finds_room_beside_what_serves_and_gives_it_back(site: Site, eventually: Eventually) -> None:
    write(site, small=(1, "1g.10gb"))
    assert sliceway(site, "apply")["fleet"]["ok"]
    controller = site.controller()
    eventually(lambda: ready(site) == {"small-0": "1g.10gb"}, f"it serves: {site.said()}")
    (before,) = [r.slice.id for r in site.status().replicas]
    content = json.loads(site.config.read_text(encoding="utf-8"))
    content["models"][0]["engine_args"] = ["--ttft-seconds", "0.01"]
    site.config.write_text(json.dumps(content), encoding="utf-8")
    told = sliceway(site, "plan")["engines"]
    (row,) = told["replacements"]
    assert (row["replica"], row["how"], row["makes_slice"], row["for_a_while"]) == ("small-0", "beside", True, False)
    assert (row["start_source"], row["dip_seconds"], told["models"][0]["guarantee_kept"]) == ("measured", 0.0, True)
    controller.send_signal(signal.SIGHUP)
    tables = []

    def over() -> bool:
        tables.append(site.table())
        return [r.replica for r in tables[-1].replicas] == ["small-1"] and tables[-1].idle == ()

    eventually(over, f"the other one has the place, and the room is given back: {site.said()}")
    assert all(table.ready("small") for table in tables)
    assert tables[-1].replicas[0].slice.id == row["slice"] != before
    after = sliceway(site, "plan")
    assert (after["engines"]["replacements"], after["fleet"]["transition"]["steps"]) == ([], [])
    assert sliceway(site, "apply")["fleet"]["done"] == []
    assert ready(site) == {"small-1": "1g.10gb"}


def test_a_changed_setting_without_room_is_refused_until_the_dip_is_allowed(site: Site, eventually: Eventually) -> None:
    write(site, large=(2, "7g.80gb"))
    assert sliceway(site, "apply")["fleet"]["ok"]
    site.controller()
    eventually(lambda: len(ready(site)) == 2, f"both serve: {site.said()}", seconds=60)
    before = {r.replica: r.engine_pid for r in site.status().replicas}
    content = json.loads(site.config.read_text(encoding="utf-8"))
    content["models"][0]["engine_args"] = ["--ttft-seconds", "0.01"]
    site.config.write_text(json.dumps(content), encoding="utf-8")
    told = sliceway(site, "plan")["engines"]
    assert [(m["lowest"], m["guaranteed"], m["guarantee_kept"]) for m in told["models"]] == [(1.0, 2.0, False)]
    refused = subprocess.run(
        command(site, "apply"), capture_output=True, check=False, env=site.environment, encoding="utf-8"
    )
    error = json.loads(refused.stdout)["error"]
    assert (refused.returncode, error["code"]) == (1, "transition_blocked")
    assert "large would serve 1 of the 2 it is guaranteed" in error["message"]
    asserted = subprocess.run(
        command(site, "assert"), capture_output=True, check=False, env=site.environment, encoding="utf-8"
    )
    differing = json.loads(asserted.stdout)
    assert (asserted.returncode, differing["same"], len(differing["engines"]["replacements"])) == (1, False, 2)
    assert {r.replica: r.engine_pid for r in site.status().replicas} == before, "nothing has happened"
    subprocess.run(
        [*command(site, "apply"), "--allow-dip"], capture_output=True, check=True, env=site.environment, timeout=100
    )
    eventually(
        lambda: (
            len(ready(site)) == 2
            and not {r.engine_pid for r in site.status().replicas} & set(before.values())
            and not any(r.outdated for r in site.status().replicas)
        ),
        f"both are replaced in their places: {site.said()}",
        seconds=100,
    )
