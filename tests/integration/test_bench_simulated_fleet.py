"""Every aggressor in every setting of the isolation lab, on simulated GPUs. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loadtests.lab.report import read_report
from tests.integration.simulated_fleet import SLICEWAY, Fleet, simulated_fleet

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]

BY_REQUEST: dict[str, dict[str, Any]] = {
    "flood": {"users": 4},
    "prefill_flood": {"users": 4, "prompt_tokens": 200},
    "decode_flood": {"users": 4, "output_tokens": 20},
    "long_context": {"users": 2, "prompt_tokens": 500, "output_tokens": 20},
    "cancel_storm": {"users": 4, "prompt_tokens": 50, "output_tokens": 500, "after": "50ms"},
    "slow_readers": {"users": 4, "output_tokens": 500, "hold": "100ms"},
    "connection_flood": {"users": 10, "hold": "100ms"},
}
ON_HOST: dict[str, dict[str, Any]] = {"cpu_hog": {"memory_mib": 1}, "weight_loading": {}}
ENDS = {"cancel_storm": "left", "slow_readers": "left", "connection_flood": "held"}
"""What becomes of the requests of who never wants an answer."""
MODELS = {"same_slice": "chat", "other_slice": "near", "other_gpu": "far"}
# One request every 50 ms, due at the latest 10 ms before the end: as many as that, however late the machine is.
PER_SECOND, WARMUP_SECONDS, DURATION_SECONDS, DUE = 20, 0.06, 0.2, 4


def scenario(fleet: Fleet, core: int) -> Path:
    weights = fleet.directory / "weights.bin"
    weights.write_bytes(bytes(2**20))
    fields: dict[str, Any] = {
        "kind": "isolation",
        "config": str(fleet.config),
        "warmup_seconds": WARMUP_SECONDS,
        "duration_seconds": DURATION_SECONDS,
        "pause_seconds": 0,
        "rounds": 1,
        "victim": {
            "name": "quiet",
            "model": "chat",
            "output_tokens": 3,
            "arrival": {"kind": "constant", "requests_per_second": PER_SECOND},
            "slo": {"ttft": "30s"},
        },
        "aggressors": [{"kind": kind, "tenant": "noisy"} | more for kind, more in BY_REQUEST.items()]
        + [{"kind": "cpu_hog"} | ON_HOST["cpu_hog"], {"kind": "weight_loading", "path": str(weights)}],
        "settings": [{"where": where} for where in (*MODELS, "machine")]
        + [{"where": where, "cores": str(core)} for where in ("same_cores", "other_cores")],
        "budget": {"p50_ratio": 1000, "metrics": ["ttft"]},
    }
    path = fleet.directory / "scenario.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()), encoding="utf-8")
    return path


def test_every_aggressor_is_measured_in_every_setting(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with simulated_fleet(tmp_path) as fleet:
        done = subprocess.run(
            [*SLICEWAY, "bench", "isolation", str(scenario(fleet, core)), "--report", str(tmp_path / "report")],
            capture_output=True,
            encoding="utf-8",
            timeout=400,
            check=False,
        )
    assert (tmp_path / "report" / "report.json").exists(), done.stderr
    report = read_report(tmp_path / "report" / "report.json")
    assert report.simulated
    assert (done.returncode, report.verdict.status) in {(0, "pass"), (1, "fail"), (3, "refused"), (3, "undecided")}
    assert {check.setting for check in report.verdict.checks} == {
        key for key, setting in report.settings.items() if setting.where in ("other_slice", "other_gpu", "other_cores")
    }
    assert set(report.settings) == {
        "alone",
        *(f"{kind}_on_{where}" for kind in BY_REQUEST for where in MODELS),
        *(f"{kind}_on_{where}" for kind in ON_HOST for where in ("same_cores", "other_cores", "machine")),
    }
    for key, setting in report.settings.items():
        assert (setting.victim.requests, setting.victim.succeeded, setting.victim.failures) == (DUE, DUE, {}), key
        assert setting.victim.ttft_seconds.count == setting.victim.e2e_seconds.count == DUE, key
        assert setting.service.tokens_per_second["quiet"] == pytest.approx(3 * DUE / DURATION_SECONDS), key
    for kind in BY_REQUEST:
        for where, model in MODELS.items():
            setting = report.settings[f"{kind}_on_{where}"]
            assert (setting.kind, setting.load is not None and setting.load["model"]) == ("mig", model)
            for row in setting.neighbours:
                assert (row.tenant, row.model) == ("noisy", model)
                assert row.requests == row.succeeded + sum(row.failures.values())
                assert set(row.failures) <= {ENDS.get(kind)}, "errors, which are no answers, are counted by kind"
                assert row.succeeded == 0 or kind not in ENDS
    for kind in ON_HOST:
        loads = {
            where: report.settings[f"{kind}_on_{where}"].load for where in ("same_cores", "other_cores", "machine")
        }
        assert {where: load and load["cores"] for where, load in loads.items()} == {
            "same_cores": [core],
            "other_cores": [core],
            "machine": [],
        }
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "The engines are simulated" in text
