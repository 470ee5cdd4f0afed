"""`sliceway bench` with scenario files: deployments of simulated engines, reports, before and after, capacity."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.timeout(180)

SLICEWAY = [sys.executable, "-m", "gateway.cli", "bench"]

SCENARIO: dict[str, Any] = {
    "kind": "isolation",
    "deployments": [{"name": "gateway", "fake_engines": {"ttft": "40ms", "itl": "5ms", "max_concurrency": 4}}],
    "duration_seconds": 1.2,
    "warmup_seconds": 0.2,
    "pause_seconds": 0.1,
    "rounds": 1,
    "victim": {
        "name": "quiet",
        "model": "chat",
        "prompt_tokens": 40,
        "output_tokens": 4,
        "arrival": {"kind": "poisson", "requests_per_second": 20},
        "slo": {"ttft": "200ms"},
    },
    "aggressors": [
        {"kind": "decode_flood", "tenant": "noisy", "users": 8, "output_tokens": 30},
        {"kind": "cancel_storm", "tenant": "noisy", "users": 4, "prompt_tokens": 50, "output_tokens": 60},
        {"kind": "cpu_hog"},
    ],
    "settings": [{"where": "same_slice"}, {"where": "machine"}],
    "budget": {"p90_ratio": 1.5, "metrics": ["ttft"], "settings": ["same_slice"]},
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SLICEWAY, *arguments], capture_output=True, encoding="utf-8", timeout=170, check=False)


def written(directory: Path, **fields: Any) -> Path:
    # `kind:` stands in a line of its own, as in any YAML that people write.
    path = directory / "scenario.yaml"
    data = {name: value for name, value in (SCENARIO | fields).items() if value is not None}
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in data.items()), encoding="utf-8")
    return path


def test_a_matrix_ends_in_reports_that_can_be_compared(tmp_path: Path) -> None:
    done = bench("isolation", str(written(tmp_path)), "--report", str(tmp_path / "r"), "--json")
    result = json.loads(done.stdout)
    settings = result["settings"]
    assert list(settings) == [
        "alone",
        "decode_flood_on_same_slice",
        "cancel_storm_on_same_slice",
        "cpu_hog_on_machine",
    ]
    assert result["simulated"] is True
    # Eight long answers on a slice that runs four at once: whoever comes next waits, on any machine.
    flooded = settings["decode_flood_on_same_slice"]
    assert flooded["victim"]["ttft_seconds"]["p50"] > 0.06
    assert flooded["deployment"] == "gateway"
    assert settings["cancel_storm_on_same_slice"]["neighbours"][0]["failures"].keys() == {"left"}
    assert settings["alone"]["victim"]["failures"] == {}
    assert settings["alone"]["prompt_tokens_mean"] == 40
    # A machine that is busy with other tests may be reason enough to refuse; it is never a pass.
    assert done.returncode == {"fail": 1, "refused": 3}[result["verdict"]["status"]]
    files = sorted(path.name for path in (tmp_path / "r").iterdir())
    assert files == ["report.html", "report.json", "report.md"]
    same = bench("compare", str(tmp_path / "r" / "report.json"), str(tmp_path / "r" / "report.json"), "--json")
    assert (same.returncode, json.loads(same.stdout)["worse"]) == (0, 0)
    again = bench("report", str(tmp_path / "r" / "report.json"), "--report", str(tmp_path / "again"))
    assert again.returncode == done.returncode
    assert (tmp_path / "again" / "report.md").read_text(encoding="utf-8") == (tmp_path / "r" / "report.md").read_text(
        encoding="utf-8"
    )


def test_what_a_measurement_has_started_ends_with_it(tmp_path: Path) -> None:
    path = written(tmp_path, duration_seconds=60, budget=None)
    command = [*SLICEWAY, "isolation", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8") as child:
        assert child.stderr is not None
        said = next((line for line in child.stderr if "round 1 of 1" in line), None)
        started = psutil.Process(child.pid).children(recursive=True)
        child.terminate()
        rest = child.stderr.read()
        code = child.wait(60)
    assert said is not None, rest
    assert (code, "Traceback" in rest) == (143, False), rest
    assert len(started) > 3
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"victim": SCENARIO["victim"] | {"slo": {"ttft": 0.2}}}, "has no unit"),
        ({"deployments": None, "config": "config.yaml"}, "there is no tenant 'quiet'"),
    ],
)
def test_a_wrong_scenario_is_told_before_anything_starts(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    (tmp_path / "config.yaml").write_text(
        'version: v1\nmodels: [{name: chat, endpoints: ["http://127.0.0.1:9"]}]\ntenants: [{name: acme}]\n',
        encoding="utf-8",
    )
    done = bench("isolation", str(written(tmp_path, **fields)))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_results_that_are_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    done = bench("compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert done.returncode == 2
    assert "no isolation report" in done.stderr
