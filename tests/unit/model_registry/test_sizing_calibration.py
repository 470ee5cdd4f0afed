"""Calibration: reading what an engine printed, keeping it, and planning with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model_registry.errors import ModelUnreadable
from model_registry.model import EngineLimits, ModelSpec, TensorSummary
from model_registry.sizing import fit, weigh
from model_registry.sizing.calibration import (
    CalibrationKey,
    CalibrationStore,
    EngineReport,
    calibrate,
    calibrated,
    read_engine_log,
)
from model_registry.sizing.report import size
from model_registry.sizing.units import GIB

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}
SPEC = ModelSpec("org/llama", "LlamaForCausalLM", LLAMA, "generate", 131_072, tensors=TensorSummary(16_060_522_496))
LIMITS = EngineLimits(max_model_len=8192, max_num_seqs=16, max_num_batched_tokens=2048)
MEMORY = 20_096 * 2**20

# The wording of vLLM 0.33.0 (0.19.0 below), figures made up for a 20 GB slice.
LOG = """\
INFO 11-21 04:25:53 [core.py:133] Initializing a V1 LLM engine (v0.33.0) with config: model='org/llama'
INFO 11-21 04:26:10 [model_runner.py:429] Model loading took 15.03 GiB memory and 12.345678 seconds
DEBUG 11-21 04:26:20 [gpu_worker.py:770] Memory profiling takes 9.87 seconds. Total non KV cache memory: 15.62GiB; torch peak memory increase: 0.36GiB; total consumed (from mem_get_info): 15.3GiB; weights memory: 15.03GiB.
INFO 11-21 04:26:21 [gpu_worker.py:773] Available KV cache memory: 2.31 GiB
INFO 11-21 04:26:21 [kv_cache_utils.py:1327] GPU KV cache size: 18,912 tokens, Maximum concurrency for 8,192 tokens per request: 2.31x
INFO 11-21 04:26:25 [gpu_model_runner.py:6517] Graph capturing finished in 3 secs, took 0.11 GiB
INFO 11-21 04:26:25 [mm_encoder_model_runner.py:95] Encoder graph capturing finished in 3 secs, took 0.99 GiB (4 graphs)
"""
OLD_LOG = """\
Model loading took 14.99 GiB memory and 5.1 seconds
Memory profiling takes 5.1 seconds. Total non KV cache memory: 17.13GiB; torch peak memory increase: 1.89GiB; non-torch forward increase memory: 0.25GiB; weights memory: 14.99GiB.
Available KV cache memory: 58.11 GiB
GPU KV cache size: 476,016 tokens
Maximum concurrency for 8,192 tokens per request: 58.11x
"""


def report() -> EngineReport:
    return read_engine_log(LOG.splitlines())


def test_figures_are_read_from_the_log() -> None:
    assert report() == EngineReport(
        version="0.33.0",
        weights_gib=15.03,
        available_kv_gib=2.31,
        graph_gib=0.11,
        activation_gib=0.36,
        kv_tokens=18_912,
        max_concurrency=2.31,
        max_model_len=8192,
    )
    old = read_engine_log(OLD_LOG.splitlines())
    assert (old.non_torch_gib, old.kv_tokens, old.max_concurrency) == (0.25, 476_016, 58.11)


def test_a_log_of_something_else_says_nothing() -> None:
    assert read_engine_log(["Traceback (most recent call last):", "ValueError: no"]) == EngineReport()


def test_the_number_of_blocks_follows_exactly_from_the_printed_tokens() -> None:
    footprint = weigh(SPEC, LIMITS)
    record = calibrate(CalibrationKey.of("org/llama", MEMORY, LIMITS), LIMITS, footprint, report())
    assert record is not None

    assert record.kv_blocks == 18_912 // 16
    assert record.available_kv_bytes == record.kv_blocks * footprint.kv_block_bytes


def test_a_log_without_memory_gives_no_record() -> None:
    key = CalibrationKey.of("org/llama", MEMORY, LIMITS)

    assert calibrate(key, LIMITS, weigh(SPEC, LIMITS), EngineReport(kv_tokens=55_356)) is None


def test_the_next_plan_uses_what_was_measured() -> None:
    footprint = weigh(SPEC, LIMITS)
    record = calibrate(CalibrationKey.of("org/llama", MEMORY, LIMITS), LIMITS, footprint, report())
    assert record is not None
    measured = calibrated(footprint, record)
    got = fit(SPEC, measured, LIMITS, memory_bytes=MEMORY)

    assert measured.measured
    assert measured.margin_bytes < footprint.margin_bytes
    assert measured.weights_bytes / GIB == pytest.approx(15.03)
    assert got.available_kv_bytes == pytest.approx(record.available_kv_bytes, abs=2)
    # Another length and utilization on the same slice: the same charge, another pool.
    less = replace(LIMITS, max_model_len=4096, gpu_memory_utilization=0.9)
    other = fit(SPEC, calibrated(weigh(SPEC, less), record), less, memory_bytes=MEMORY)
    assert got.available_kv_bytes - other.available_kv_bytes == pytest.approx(0.02 * MEMORY, abs=2)


def test_records_survive_and_replace_their_own_kind(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    key = CalibrationKey.of("org/llama", MEMORY, LIMITS)
    assert store.find(key) is None
    for weights in (15.03, 15.05):
        record = calibrate(key, LIMITS, weigh(SPEC, LIMITS), replace(report(), weights_gib=weights), profile="1g.20gb")
        assert record is not None
        store.put(record)

    assert len(store.all()) == 1
    found = CalibrationStore(tmp_path / "calibration.json").find(key)
    assert found == record
    assert store.find(CalibrationKey.of("org/llama", MEMORY, replace(LIMITS, max_num_seqs=32))) is None
    assert store.find(CalibrationKey.of("org/llama", MEMORY, replace(LIMITS, max_model_len=99))) == record


@pytest.mark.parametrize("content", ["", "{", '{"records": [{"key": 3}]}', "[]"])
def test_a_damaged_file_is_told_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(ModelUnreadable) as caught:
        CalibrationStore(path).all()
    assert str(path) in str(caught.value)


def test_a_report_shows_predicted_beside_measured(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    record = calibrate(CalibrationKey.of("org/llama", MEMORY, LIMITS), LIMITS, weigh(SPEC, LIMITS), report())
    assert record is not None
    store.put(record)
    public = size(SPEC, LIMITS, memory_bytes=MEMORY, calibrations=store).as_public()

    measured = public["measured"]
    assert isinstance(measured, dict)
    assert measured["weights_bytes"] == int(15.03 * GIB)
    assert measured["predicted"]["weights_bytes"] == weigh(SPEC, LIMITS).weights_bytes
    assert public["weights_bytes"] == measured["weights_bytes"]
    assert public["kv_blocks"] == 18_912 // 16
