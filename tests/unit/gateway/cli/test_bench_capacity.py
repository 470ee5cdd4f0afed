from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app, bench_capacity, bench_isolation, bench_serving
from gateway.cli.bench_capacity import _slo, measured_on, public, share_of_card, whole_card
from model_registry.errors import ConfigError
from model_registry.sizing.throughput import Throughput, ThroughputKey
from placement.slices import Gpu, Slice, SliceKind

GIB = 2**30
H100 = Gpu("GPU-0", 0, "h100-sxm", 80 * GIB)


def cpu(name: str, *cores: int) -> Slice:
    return Slice(name, SliceKind.CPU, None, GIB, cores=cores)


def test_a_slice_costs_its_share_of_the_card() -> None:
    mig = Slice("a", SliceKind.MIG, "3g.40gb", 40 * GIB, uuid="MIG-1", gpu=H100)
    small = Slice("b", SliceKind.MIG, "1g.10gb", 10 * GIB, uuid="MIG-2", gpu=H100)
    whole = Slice("c", SliceKind.GPU, None, 80 * GIB, uuid="GPU-0", gpu=H100)
    shared = replace(whole, kind=SliceKind.MPS, sharers=4)
    assert share_of_card(mig, [mig]) == pytest.approx(4 / 8)
    assert share_of_card(small, [small]) == pytest.approx(1 / 8)
    assert share_of_card(whole, [whole]) == 1
    assert share_of_card(shared, [shared]) == 0.25
    unknown = replace(mig, gpu=replace(H100, product="a card nobody knows"))
    assert share_of_card(unknown, [unknown]) == pytest.approx(0.5)


def test_a_core_set_costs_its_share_of_the_cores() -> None:
    assert share_of_card(cpu("a", 0), [cpu("a", 0), cpu("b", 1, 2, 3)]) == 0.25


def record(model: str, kind: str, tokens_per_second: float, **key: Any) -> Throughput:
    profile = "1g.10gb" if kind == "mig" else None
    where = ThroughputKey(f"org/{model}", kind, profile, "h100-sxm", None, 256, 64, {"ttft_seconds": 0.5})
    return Throughput(
        replace(where, **key),
        model,
        tokens_per_second / 64,
        None,
        tokens_per_second,
        4 * tokens_per_second,
        0.99,
        0.4,
        0.03,
        "2026-01-01T00:00:00+00:00",
    )


def test_a_slice_is_set_beside_the_same_model_on_a_whole_card() -> None:
    small, whole = record("chat", "mig", 128.0), record("chat", "gpu", 1024.0)
    shown = public(small, whole_card(small, [small, whole]))
    assert shown["slice"] == "h100-sxm 1g.10gb"
    assert shown["share_of_whole_card"] == 0.125
    assert shown["whole_card"]["output_tokens_per_second"] == 1024.0
    assert public(whole, whole_card(whole, [small, whole]))["share_of_whole_card"] == 1.0
    assert public(small, None)["share_of_whole_card"] is None


@pytest.mark.parametrize(
    "other",
    [
        record("larger", "gpu", 2048.0),
        record("chat", "gpu", 2048.0, product="h200"),
        record("chat", "gpu", 2048.0, prompt_tokens=8),
        record("chat", "gpu", 2048.0, slo={"ttft_seconds": 5.0}),
        replace(record("chat", "gpu", 2048.0), simulated=True),
        record("chat", "mps", 2048.0),
    ],
    ids=["model", "product", "length", "slo", "simulated", "shared"],
)
def test_what_was_measured_otherwise_is_no_whole_card_of_it(other: Throughput) -> None:
    small = record("chat", "mig", 128.0)
    assert whole_card(small, [other, small]) is None


def test_the_newest_measurement_of_the_whole_card_counts() -> None:
    old, new = record("chat", "gpu", 1024.0), record("chat", "gpu", 900.0, engine_version="0.33.0")
    new = replace(new, measured_at="2026-02-01T00:00:00+00:00")
    assert whole_card(record("chat", "mig", 128.0), [new, old]) is new


def test_limits_of_an_slo_are_read_with_their_units() -> None:
    assert _slo(["ttft=500ms", "e2e=3s"]) == {"ttft": "500ms", "e2e": "3s"}
    for wrong in (["ttft"], ["speed=3s"], ["ttft=3"], []):
        with pytest.raises(ConfigError):
            _slo(wrong)


def written(directory: Path) -> Path:
    config = directory / "sliceway.yaml"
    models = [
        {"name": name, "task": "embed" if name == "embed" else "generate", "endpoints": ["http://127.0.0.1:9"]}
        for name in ("chat", "other", "embed")
    ]
    tenants = [{"name": "acme", "models": ["chat", "embed"]}, {"name": "globex"}]
    data = {"version": "v1", "state_dir": str(directory), "models": models, "tenants": tenants}
    config.write_text(json.dumps(data), encoding="utf-8")
    return config


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The scenarios that the load tests were asked about; they refuse each. Nothing may be served in a test that has it."""
    made: list[dict[str, Any]] = []

    def refuse(words: list[str], scenario: dict[str, Any]) -> tuple[int, None]:
        assert words == ["check", "-"]
        made.append(scenario)
        return 2, None

    def serve(*_: object) -> None:
        raise AssertionError("engines are started for a load that is none")

    monkeypatch.setattr(bench_serving, "asked", refuse)
    for module in (bench_capacity, bench_isolation):
        monkeypatch.setattr(module, "require_locust", lambda: None)
        monkeypatch.setattr(module, "serving", serve)
    return made


def test_what_the_load_tests_refuse_is_told_before_anything_is_served(
    tmp_path: Path, checked: list[dict[str, Any]]
) -> None:
    config = written(tmp_path)
    result = CliRunner().invoke(app, ["bench", "capacity", str(config), "--slo", "ttft=3q", "--model", "embed"])
    assert result.exit_code == 2, result.exception
    assert [made["load"]["slo"] for made in checked] == [{"ttft": "3q", "attainment": 0.99}]
    assert checked[0]["load"]["task"] == "embedding"
    result = CliRunner().invoke(app, ["bench", "isolation", str(config), "--aggressor", "prefil_flood"])
    assert result.exit_code == 2, result.exception
    assert checked[1]["aggressors"] == [{"kind": "prefil_flood", "tenant": "globex"}]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["capacity", "--slo", "ttft=1s", "--model", "chta"], "there is no model 'chta'"),
        (["capacity", "--slo", "ttft=1s", "--tenant", "nobody"], "there is no tenant 'nobody'"),
        (["capacity", "--slo", "ttft=1s", "--tenant", "acme", "--model", "other"], "'acme' may not use 'other'"),
        (["isolation", "--victim", "nobody"], "there is no tenant 'nobody'"),
        (["isolation", "--victim", "acme=other"], "tenant 'acme' cannot use a model 'other'"),
        (["isolation", "--aggressor", "cpu_hog"], "cpu_hog works on the machine and has no tenant"),
    ],
)
def test_who_is_not_there_is_told_before_anything_is_served(
    tmp_path: Path, checked: list[dict[str, Any]], words: list[str], said: str
) -> None:
    command, *options = words
    result = CliRunner().invoke(app, ["bench", command, str(written(tmp_path)), *options])
    assert isinstance(result.exception, ConfigError)
    assert said in result.exception.message
    assert checked == []


def test_the_slice_that_was_measured_is_known_by_its_name_in_a_cluster_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    slices = [Slice(f"cpu-{i}", SliceKind.CPU, None, 2**30, cores=(i,)) for i in range(2)]
    assert measured_on(slices, ["cpu-1"]) == slices[1]
    assert measured_on(slices, ["n0/cpu-0", "n1/cpu-1"]) == slices[1]
    assert measured_on(slices, ["n0/cpu-0"]) is None
