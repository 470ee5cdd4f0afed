"""Against start-up logs and issues that others published: memory on an H100, and capacities of pools of a known size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_registry.model import EngineLimits, ModelSpec, TensorSummary
from model_registry.sizing import fit, weigh
from model_registry.sizing.units import GIB

FOLDER = Path(__file__).parents[2] / "data" / "sizing"
STARTS = json.loads((FOLDER / "startup_runs.json").read_text(encoding="utf-8"))
POOLS = json.loads((FOLDER / "published_kv.json").read_text(encoding="utf-8"))["rows"]


def start(run: dict[str, Any]) -> tuple[ModelSpec, EngineLimits]:
    weights = run["weights_bytes"]
    spec = ModelSpec(
        run["model"],
        "",
        STARTS["configs"][run["config_of"]],
        "generate",
        0,
        tensors=None if weights is None else TensorSummary(weights),
        quant_config=run["quantization_config"],
    )
    return spec, EngineLimits(vllm_version=run["vllm"], **run["limits"])


def start_ids() -> list[Any]:
    ids = []
    for i, run in enumerate(STARTS["runs"]):
        limits = run["limits"]
        ids.append(pytest.param(run, id=f"{i}-{run['model'].split('/')[-1]}-tp{limits['tensor_parallel_size']}"))
    return ids


@pytest.mark.parametrize("run", start_ids())
def test_weights_and_kv_memory_of_a_published_start(run: dict[str, Any]) -> None:
    spec, limits = start(run)
    measured = run["measured"]
    footprint = weigh(spec, limits)
    got = fit(spec, footprint, limits, memory_bytes=int(measured["total_gib"] * GIB))
    text_only = "vision_config" not in spec.config
    # With tensor parallelism some matrices are kept whole on every GPU, and communicators are charged at one size.
    parallel = limits.tensor_parallel_size > 1
    budget = 0.30 if parallel or not text_only else 0.10
    share = 0.015 if parallel else 0.01

    assert footprint.weights_bytes / GIB == pytest.approx(measured["model_loading_gib"], rel=share, abs=0.01)
    assert got.available_kv_bytes / GIB == pytest.approx(measured["available_kv_gib"], abs=budget)
    assert got.fits


@pytest.mark.parametrize("run", start_ids())
def test_concurrency_once_the_memory_is_given(run: dict[str, Any]) -> None:
    spec, limits = start(run)
    measured = run["measured"]
    printed = int(measured["available_kv_gib"] * GIB)
    got = fit(spec, weigh(spec, limits), replace(limits, kv_cache_memory_bytes=printed), memory_bytes=80 * GIB)
    rounding = 0.005 / measured["available_kv_gib"]

    assert got.max_concurrency == pytest.approx(measured["max_concurrency"], rel=0.001 + rounding, abs=0.0051)


@pytest.mark.parametrize("row", [pytest.param(r, id=r["name"]) for r in POOLS])
def test_the_capacity_of_a_pool_of_known_size(row: dict[str, Any]) -> None:
    limits = EngineLimits(
        vllm_version=row["vllm"],
        kv_cache_memory_bytes=int(row.get("available_kv_gib", 1) * GIB),
        **{"max_num_seqs": 16, "max_num_batched_tokens": 2048} | row["limits"],
    )
    spec = ModelSpec(row["name"], "", row["config"], "generate", 0, tensors=TensorSummary(1))
    footprint = weigh(spec, limits)
    got = fit(spec, footprint, limits, memory_bytes=800 * GIB)
    rounding = 0.006 / row.get("available_kv_gib", 1)

    if "block_tokens" in row:
        assert footprint.kv_block_tokens == row["block_tokens"]
    if "blocks" in row:
        assert got.kv_blocks == row["blocks"]
    if "kv_tokens" in row:
        assert got.max_concurrency * limits.max_model_len == pytest.approx(row["kv_tokens"], rel=rounding)
    if "needed_gib" in row:
        assert footprint.kv_bytes_per_request / GIB == pytest.approx(row["needed_gib"], abs=0.006)
    if row.get("refused"):
        assert not got.fits
    if "longest_context_tokens" in row:
        assert got.longest_context_tokens == row["longest_context_tokens"]
