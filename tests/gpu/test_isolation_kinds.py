"""Whole cards, MPS and time-slices beside one another, on GPUs that need no MIG rights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]

BENCH = Path(__file__).parents[2] / "configs" / "bench"


def gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, encoding="utf-8", check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


@pytest.mark.parametrize(("deployment", "needed"), [("gpu-whole-card", 2), ("gpu-mps", 1), ("gpu-time-slice", 1)])
def test_each_kind_is_served_and_measured(deployment: str, needed: int, tmp_path: Path) -> None:
    if gpus() < needed:
        pytest.skip(f"needs {needed} NVIDIA GPU(s)")
    fields = {
        "kind": "isolation",
        "config": str(BENCH / f"{deployment}.yaml"),
        "duration_seconds": 20,
        "rounds": 2,
        "victim": {"name": "quiet", "model": "chat-a", "prompt_tokens": 200, "output_tokens": 32},
        "aggressors": [{"kind": "prefill_flood", "tenant": "noisy"}],
        "settings": [{"where": "other_slice", "model": "chat-b"}, {"where": "same_slice"}],
    }
    path = tmp_path / "scenario.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()), encoding="utf-8")
    command = [sys.executable, "-m", "gateway.cli", "bench", "isolation", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=3500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    settings = json.loads(done.stdout)["settings"]
    assert settings["alone"]["victim"]["failures"] == {}
    assert settings["prefill_flood_on_other_slice"]["kind"] == deployment.removeprefix("gpu-").replace(
        "whole-card", "gpu"
    )
    together = settings["prefill_flood_on_same_slice"]["ratio_to_alone"]["ttft_seconds"]["p50"]
    assert together > 1.2, "one engine's queue is shared whatever the kind of slice"
