"""Steps that fail on the real processes: the fleet goes on serving, and what is done and what is not is told exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from placement.schema import SimulatedFleet
from placement.simulate import machine_directory
from placement.simulator import Simulation
from placement.table import ReplicaState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

Site = Any  # the fixture's class lives in conftest.py, which cannot be imported
Eventually = Callable[..., Any]

ENGINE = ["{python}", "-m", "placement.fake_engine", "--uds", "{uds}", "--model", "{served_name}"]
GPUS = {"simulate": {"h100-sxm": 2}}
# More than the list of seats takes, less than the journal of a transition.
SMALL_FILES_KIB = 1


def write(site: Site, **models: dict[str, Any]) -> None:
    """Two simulated GPUs that the plan cuts. Engines that end at once are given up at once."""
    restart = {"first_delay_seconds": 0.1, "max_delay_seconds": 0.1, "max_fast_failures": 1}
    content: dict[str, Any] = {
        "version": "v1",
        "state_dir": str(site.paths.root),
        "fleet": {"discover": GPUS, "partition": "planned"},
        "engine": {"command": ENGINE, "stop_timeout_seconds": 5, "drain_timeout_seconds": 5, "restart": restart},
        "models": [{"name": name, "source": "simulated", **model} for name, model in models.items()],
        "gateway": {"authentication": "none"},
    }
    site.config.write_text(json.dumps(content), encoding="utf-8")


def sliceway(site: Site, *words: str, largest_file_kib: int | None = None) -> tuple[int, Any]:
    """Exit status, and what was printed: JSON, or the error's text."""
    command = [sys.executable, "-m", "gateway.cli", *words, str(site.config), "--json"]
    if largest_file_kib is not None:
        command = ["bash", "-c", f'ulimit -f {largest_file_kib}; exec "$@"', "bash", *command]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, env=site.environment, timeout=120
    )
    try:
        return done.returncode, json.loads(done.stdout)
    except ValueError:
        return done.returncode, done.stdout + done.stderr


def ready(site: Site) -> dict[str, int | None]:
    """Engines by replica, of those that serve."""
    status = site.status()
    rows = status.replicas if status else ()
    return {r.replica: r.engine_pid for r in rows if r.state is ReplicaState.READY}


def instances(site: Site) -> set[str]:
    """Slices that the driver shows."""
    code, told = sliceway(site, "slices")
    assert code == 0, told
    return {one["id"].partition("/")[2] for one in told["slices"]}


@pytest.fixture
def serving(site: Site, eventually: Eventually) -> dict[str, int | None]:
    """Two replicas of a small model that serve on one GPU, and their engines."""
    write(site, small=SMALL)
    code, told = sliceway(site, "apply")
    assert code == 0, told
    site.controller()
    eventually(lambda: len(ready(site)) == 2, f"both serve: {site.said()}", seconds=60)
    return ready(site)


SMALL: dict[str, Any] = {"replicas": 2, "profile": "1g.10gb"}
LARGE: dict[str, Any] = {"replicas": 1, "profile": "3g.40gb"}


def test_a_step_that_fails_leaves_the_fleet_serving_and_says_what_is_done(
    site: Site, serving: dict[str, int | None], eventually: Eventually
) -> None:
    held = instances(site)

    # No room to write the journal: nothing is begun.
    write(site, small=SMALL, large=LARGE)
    code, told = sliceway(site, "apply", largest_file_kib=SMALL_FILES_KIB)
    assert code != 0
    assert "how far the transition came cannot be written down" in json.dumps(told)
    assert (ready(site), instances(site)) == (serving, held)

    # The driver refuses to make an instance: what was to come after it is not done.
    simulation = Simulation.open(machine_directory(SimulatedFleet.model_validate(GPUS), site.paths.root))
    simulation.inject("nvmlDeviceCreateGpuInstance*", pynvml.NVML_ERROR_UNKNOWN, times=0)
    code, told = sliceway(site, "apply")
    outcome = told["fleet"]
    assert (code, outcome["ok"], outcome["failed"]["action"]) == (1, False, "create")
    assert outcome["done"] == []
    assert [s["action"] for s in outcome["not_done"]] == ["create", "start", "check"]
    assert outcome["error"]["remedy"]
    assert (ready(site), instances(site)) == (serving, held)
    simulation.clear_faults()

    # An engine that does not start: its instance is made, and its log is named.
    write(site, small=SMALL, large=LARGE | {"engine_args": ["--fail-at-start", "the weights are damaged"]})
    code, told = sliceway(site, "apply")
    outcome = told["fleet"]
    assert (code, outcome["failed"]["action"], outcome["failed"]["model"]) == (1, "start", "large")
    assert [s["action"] for s in outcome["done"]] == ["create"]
    assert [s["action"] for s in outcome["not_done"]] == ["start", "check"]
    assert "EngineCore failed to start" in outcome["error"]["message"]
    assert "the weights are damaged" in Path(outcome["error"]["where"]).read_text(encoding="utf-8"), (
        "it names the log that says why"
    )
    assert ready(site) == serving
    assert "3g.40gb@4" in instances(site) or "3g.40gb@0" in instances(site)

    # Mended, the next run starts from what there is.
    write(site, small=SMALL, large=LARGE)
    code, told = sliceway(site, "apply")
    assert (code, told["fleet"]["ok"]) == (0, True), told
    assert "create" not in {s["action"] for s in told["fleet"]["done"]}, "the instance is there already"
    after = ready(site)
    assert set(after) == {*serving, "large-0"}
    assert {name: after[name] for name in serving} == serving, "nobody else was touched"
    assert not (site.paths.root / "transition.json").exists()
    assert sliceway(site, "plan")[1]["fleet"]["transition"]["steps"] == []


def test_a_transition_whose_gpu_is_gone_is_not_carried_on(
    site: Site, serving: dict[str, int | None], eventually: Eventually
) -> None:
    """Killed on its way, it is stale when the GPU that it was for has vanished: what is left is planned anew, and told."""
    write(site, small=SMALL, large={"replicas": 3, "profile": "3g.40gb"})
    simulation = Simulation.open(machine_directory(SimulatedFleet.model_validate(GPUS), site.paths.root))
    status = site.status()
    (used,) = {r.slice.gpu for r in status.replicas}
    looked_at = site.paths.root / "looked_at.json"
    looked_at.write_text(json.dumps(sliceway(site, "plan")[1]), encoding="utf-8")
    simulation.kill_caller("nvmlDeviceCreateGpuInstance*", nth=2)
    code, _ = sliceway(site, "apply")
    assert code == -9
    journal = json.loads((site.paths.root / "transition.json").read_text(encoding="utf-8"))
    gpus = gpus_of(site)
    other = next(n for n, gpu in enumerate(gpus) if gpu != used)
    assert gpus[other] in {s["gpu"] for s in journal["steps"]}, "the plan is for the other GPU as well"
    simulation.lose(other)
    held = instances(site)
    code, told = sliceway(site, "apply", "--plan", str(looked_at))
    assert (code, told["error"]["code"]) == (1, "stale_plan")
    assert f"GPU {gpus[other]} is gone" in told["error"]["message"]
    assert instances(site) == held, "nothing was touched"
    code, told = sliceway(site, "apply")
    outcome = told["fleet"]
    assert code == 1, "three do not fit on what is left"
    assert {s["gpu"] for s in outcome["done"]} <= {used}
    assert [u["model"] for u in outcome["unmet"]] == ["large"]
    assert {name: pid for name, pid in ready(site).items() if name in serving} == serving
    assert not (site.paths.root / "transition.json").exists()


def gpus_of(site: Site) -> list[str]:
    """UUIDs by index."""
    _, told = sliceway(site, "slices")
    return [gpu["uuid"] for gpu in sorted(told["gpus"], key=lambda g: g["index"])]
