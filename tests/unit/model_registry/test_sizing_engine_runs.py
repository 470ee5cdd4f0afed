"""Against what the real CPU engine said for 65 small models that keep a family's layout (recorded; see kv_engine_probe.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_registry.model import EngineLimits, Footprint, ModelSpec, SliceFit, TensorSummary
from model_registry.sizing import fit, weigh

DATA = json.loads((Path(__file__).parents[2] / "data" / "sizing" / "engine_runs.json").read_text(encoding="utf-8"))
KINDS = {
    "full": "FullAttention",
    "mla": "MLAAttention",
    "sliding": "SlidingWindow",
    "chunked": "ChunkedLocalAttention",
    "state": "Mamba",
}


def sized(run: dict[str, Any]) -> tuple[Footprint, SliceFit]:
    limits = EngineLimits(
        vllm_version=DATA["versions"]["vllm"], device="cpu", kv_cache_memory_bytes=run["pool_bytes"], **run["limits"]
    )
    task = "embed" if run["pooling"] else "generate"
    spec = ModelSpec(run["name"], "", run["config"], task, 0, tensors=TensorSummary(1))
    footprint = weigh(spec, limits)
    return footprint, fit(spec, footprint, limits, memory_bytes=2**40)


def runs(*, started: bool) -> list[Any]:
    return [pytest.param(r, id=r["name"]) for r in DATA["runs"] if ("refused" not in r["measured"]) == started]


@pytest.mark.parametrize("run", runs(started=True))
def test_blocks_groups_and_concurrency_are_the_engines_own(run: dict[str, Any]) -> None:
    footprint, got = sized(run)
    measured = run["measured"]
    assert footprint.cache is not None
    groups = [[KINDS[g.page.kind], g.layers, g.page.block_tokens, g.page.page_bytes] for g in footprint.cache.groups]

    assert got.fits
    assert sorted(groups) == sorted(measured["groups"])
    if not groups:  # an encoder's pool is the one block that is never handed out
        return
    assert got.kv_blocks == measured["blocks"]
    assert round(got.max_concurrency, 2) == pytest.approx(measured["max_concurrency"], abs=0.0051)
    assert int(got.max_concurrency * run["limits"]["max_model_len"]) == pytest.approx(measured["kv_tokens"], abs=1)


@pytest.mark.parametrize("run", runs(started=False))
def test_what_the_engine_refused_does_not_fit_and_its_longest_context_is_known(run: dict[str, Any]) -> None:
    _, got = sized(run)

    assert not got.fits
    assert got.breaking_term == run["measured"]["refused"]
    if "longest_context_tokens" in run["measured"]:
        assert got.longest_context_tokens == run["measured"]["longest_context_tokens"]


def test_the_recording_covers_every_kind_of_layout() -> None:
    seen = {g[0] for r in DATA["runs"] for g in r["measured"].get("groups", ())}

    assert seen == set(KINDS.values())
    assert len(runs(started=True)) >= 50
    assert len(runs(started=False)) >= 5
