"""Plans learn from starts: figures from an engine's log, kept in the state directory, change the next fit."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from model_registry.schema import ModelConfig
from model_registry.sizing.calibration import CalibrationStore
from model_registry.sizing.units import GIB
from placement.calibration import CalibratedRegistry
from placement.clock import SystemClock
from placement.goals import Workshop
from placement.registry import ModelRegistry
from placement.replicas.journal import Journal, JournalEntry
from placement.replicas.parts import Goal
from placement.replicas.process import LocalLauncher
from placement.schema import EngineConfig
from placement.slices import Gpu, Slice, SliceKind
from placement.state import StatePaths
from placement.workbench import Workbench

CARD = Gpu("GPU-a", 0, "A100-80GB", 80 * GIB)
MIG = Slice("GPU-a/1g.10gb@0", SliceKind.MIG, "1g.10gb", 9728 * 2**20, uuid="MIG-1", gpu=CARD)
OTHER = Slice("GPU-a/2g.20gb@2", SliceKind.MIG, "2g.20gb", 19_968 * 2**20, uuid="MIG-2", gpu=CARD)
CPU = Slice("cpu-0", SliceKind.CPU, None, 16 * GIB, cores=(0,))
LOG = """\
Initializing a V1 LLM engine (v0.33.0) with config
Model loading took 0.02 GiB memory and 1.5 seconds
Available KV cache memory: 6.25 GiB
"""


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelConfig(name="m", source=str(folder))


def registry(path: Path, *, device: str = "cuda") -> CalibratedRegistry:
    inner = ModelRegistry(EngineConfig(), vllm_version="0.33.0", device=device)  # type: ignore[arg-type]
    return CalibratedRegistry(inner, CalibrationStore(path))


def test_the_next_plan_uses_what_the_engine_measured(model: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    first = registry(path)
    sized = first.describe(model)
    estimated = first.fit(sized, MIG)
    record = first.learn("m", MIG, LOG)

    assert record is not None
    assert (record.product, record.profile) == ("A100-80GB", "1g.10gb")
    again = registry(path)  # another controller, later
    measured = again.fit(again.describe(model), MIG)
    assert measured.fits
    assert measured.available_kv_bytes / GIB == pytest.approx(6.25, abs=0.01)
    assert measured.available_kv_bytes != estimated.available_kv_bytes
    assert first.fit(sized, MIG).available_kv_bytes == measured.available_kv_bytes


def test_a_slice_of_another_size_is_still_estimated(model: ModelConfig, tmp_path: Path) -> None:
    calibrated = registry(tmp_path / "calibration.json")
    sized = calibrated.describe(model)
    before = calibrated.fit(sized, OTHER)
    calibrated.learn("m", MIG, LOG)

    assert calibrated.fit(sized, OTHER) == before


def test_nothing_is_learnt_on_a_cpu_of_an_unknown_model_or_from_silence(model: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrated = registry(path)
    calibrated.describe(model)

    assert calibrated.learn("m", CPU, LOG) is None
    assert calibrated.learn("another", MIG, LOG) is None
    assert calibrated.learn("m", MIG, "Traceback (most recent call last):") is None
    assert not path.exists()


def test_a_damaged_store_keeps_nothing_from_serving(
    model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text("{", encoding="utf-8")
    calibrated = registry(path)
    sized = calibrated.describe(model)

    assert calibrated.fit(sized, MIG).fits
    assert calibrated.learn("m", MIG, LOG) is not None
    assert "estimates alone" in caplog.text
    assert "not kept" in caplog.text
    assert path.read_text(encoding="utf-8") == "{"


def test_the_same_start_is_written_once(model: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrated = registry(path)
    calibrated.describe(model)
    calibrated.learn("m", MIG, LOG)
    path.unlink()
    calibrated.learn("m", MIG, LOG)

    assert not path.exists()


async def test_a_controller_keeps_what_its_engine_said_when_it_came_up(model: ModelConfig, tmp_path: Path) -> None:
    """Of this start, and not of an earlier one in the same log; looked at when the replica is proven, before it serves."""
    path, paths = tmp_path / "calibration.json", StatePaths(tmp_path / "state")
    launcher = LocalLauncher(paths, Journal(paths), {})
    bench = Workbench(Workshop(paths, {}), launcher, SystemClock(), lambda: 0.0, lambda: None)
    bench.registry = registry(path)
    estimated = bench.registry.fit(bench.registry.describe(model), MIG)
    earlier = LOG.replace("6.25", "1.00")
    log = paths.log("m-0")
    log.parent.mkdir(parents=True)
    log.write_text(earlier + LOG, encoding="utf-8")
    entry = JournalEntry(
        replica="m-0",
        model="m",
        task="generate",
        slice_id=MIG.id,
        spec_hash="",
        endpoint=f"unix:{tmp_path}/nobody",
        log_offset=len(earlier),
        started_at=datetime.now(UTC),
    )
    await bench.hands().prove(Goal("m-0", "m", "generate", MIG, 1, None), entry)

    again = registry(path)
    measured = again.fit(again.describe(model), MIG)
    assert measured.available_kv_bytes / GIB == pytest.approx(6.25, abs=0.01)
    assert measured.available_kv_bytes != estimated.available_kv_bytes
