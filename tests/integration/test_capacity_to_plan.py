"""What `sliceway bench capacity` measures on a slice is what `sliceway plan` counts replicas with."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.simulated_fleet import ENGINE, SLICEWAY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

METADATA = Path(__file__).parents[2] / "configs" / "examples" / "models" / "Qwen--Qwen3-0.6B.json"
# One at a time and 0.1 s each: far less than the roofline promises of a model as small as that.
BEHAVIOUR = ["--ttft-seconds", "0.1", "--itl-seconds", "0.002", "--max-concurrency", "1", "--output-tokens", "100000"]
SIZES = {"prompt_tokens": 20, "output_tokens": 4}


def configured(directory: Path, listen: str, *, requests_per_second: float, ttft: str) -> str:
    config = {
        "version": "v1",
        "state_dir": str(directory / "state"),
        "fleet": {"discover": {"simulate": {"h100-sxm": 1}}, "partition": "planned"},
        "engine": {"command": ENGINE + BEHAVIOUR, "stop_timeout_seconds": 5, "drain_timeout_seconds": 1},
        "models": [
            {
                "name": "chat",
                "source": "org/chat",
                "metadata": str(METADATA),
                "max_model_len": 2048,
                "profiles": ["1g.10gb"],
                "demand": {"requests_per_second": requests_per_second} | SIZES,
                "slo": {"ttft": ttft, "attainment": 0.5},
            }
        ],
        "tenants": [{"name": "quiet"}],
        "gateway": {"listen": listen, "drain_timeout_seconds": 1},
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def sliceway(*words: str) -> Any:
    done = subprocess.run([*SLICEWAY, *words, "--json"], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def planned(config: str) -> tuple[int, dict[str, Any]]:
    """The replicas of `chat` in the plan, and what it thinks of the slices that the model may have."""
    fleet = sliceway("plan", config)["fleet"]
    replicas = sum(one["model"] == "chat" for gpu in fleet["gpus"] for one in gpu["slices"])
    return replicas, next(one for one in fleet["models"]["chat"] if one["feasible"])


def test_a_measured_capacity_decides_how_many_replicas_are_planned(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    config = configured(tmp_path, listen, requests_per_second=0.001, ttft="30s")
    # The limit is generous, so that what is found depends on the machine and that something is found does not.
    effort = ("--slo", "ttft=30s", "--attainment", "0.5", "--seconds", "0.5", "--requests", "10", "--probes", "2")
    sizes = ("--prompt-tokens", str(SIZES["prompt_tokens"]), "--output-tokens", str(SIZES["output_tokens"]))
    (record,) = sliceway("bench", "capacity", config, *effort, *sizes)["records"]
    assert (record["kind"], record["profile"], record["simulated"]) == ("mig", "1g.10gb", True)
    rate = record["requests_per_second"]
    replicas, place = planned(configured(tmp_path, listen, requests_per_second=2.5 * rate, ttft="30s"))
    assert (place["capacity_source"], place["capacity_requests_per_second"]) == ("measured", pytest.approx(rate))
    assert replicas == 3, "two would bear 2.0 times what was measured"
    _, place = planned(configured(tmp_path, listen, requests_per_second=2.5 * rate, ttft="20s"))
    assert place["capacity_source"] == "estimated", "it was measured within a later SLO"
