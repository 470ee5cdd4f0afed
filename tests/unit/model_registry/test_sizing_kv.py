"""Blocks: how versions and devices differ, dtypes, grouping by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model_registry.errors import ConfigError
from model_registry.model import EngineLimits, Footprint, ModelSpec
from model_registry.sizing import weigh
from model_registry.sizing.dtypes import compute_dtype, kv_head_bytes, resolved_kv_dtype
from model_registry.sizing.kv import CachePlan

LIMITS = EngineLimits(max_model_len=8192, max_num_seqs=16, max_num_batched_tokens=2048)


def small(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 32_000,
        "max_position_embeddings": 131_072,
        "torch_dtype": "bfloat16",
    } | changes


HYBRID = small(model_type="nemotron_h", hybrid_override_pattern="MMM*MMM*", n_groups=2)
DELTA = small(model_type="qwen3_next")


def weighed(config: dict[str, Any], limits: EngineLimits = LIMITS, **changes: Any) -> Footprint:
    return weigh(ModelSpec("m", "", config, "generate", 0), replace(limits, **changes))


def plan(config: dict[str, Any], **changes: Any) -> CachePlan:
    found = weighed(config, **changes).cache
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("version", "device", "batches"),
    [("0.25.1", "cuda", 1), ("0.26.0", "cuda", 2), ("0.33.0", "cuda", 2), ("0.32.0", "cpu", 1)],
)
def test_a_window_holds_what_is_in_flight(version: str, device: str, batches: int) -> None:
    windowed = small(model_type="mistral", sliding_window=1024)
    footprint = weighed(windowed, vllm_version=version, device=device, block_tokens=16)

    assert footprint.kv_blocks_per_request == -(-(1023 + batches * 2048) // 16) + 1


def test_a_window_saves_nothing_where_a_step_is_as_long_as_the_context() -> None:
    windowed = small(model_type="mistral", sliding_window=1024)

    assert weighed(windowed, max_num_batched_tokens=8192).kv_blocks_per_request == 8192 // 16 + 1


@pytest.mark.parametrize(
    ("version", "prefix", "state_blocks"),
    [
        ("0.19.0", None, 1),  # hybrids had no prefix caching by default
        ("0.24.0", True, 0),  # one state for every block
        ("0.26.0", None, 0),
        ("0.28.0", None, 2),
        ("0.31.0", None, 2),
        ("0.32.0", None, 3),  # and one for a checkpoint inside a prefill
        ("0.33.0", False, 1),
    ],
)
def test_states_that_a_mamba2_hybrid_keeps(version: str, prefix: bool | None, state_blocks: int) -> None:
    found = plan(HYBRID, vllm_version=version, prefix_caching=prefix, max_num_batched_tokens=8192)
    pages = [g.page for g in found.groups if g.page.kind == "state"]

    assert {p.state_blocks for p in pages} == {state_blocks}


def test_gated_delta_never_keeps_every_state() -> None:
    pages = [g.page for g in plan(DELTA, vllm_version="0.27.0").groups if g.page.kind == "state"]

    assert {p.state_blocks for p in pages} == {2}


def test_a_hybrids_block_is_long_enough_for_one_state_and_its_pages_are_equal() -> None:
    found = plan(HYBRID)

    assert found.block_tokens % 16 == 0
    assert len({g.page.page_bytes for g in found.groups}) == 1
    assert found.notes


def test_older_engines_want_a_step_that_holds_a_block() -> None:
    refused = weighed(HYBRID, vllm_version="0.25.0", prefix_caching=True, max_num_batched_tokens=64)

    assert refused.refusal is not None
    assert "prefix caching off" in refused.refusal
    assert weighed(HYBRID, vllm_version="0.27.0", max_num_batched_tokens=64).refusal is None


def test_pages_that_do_not_divide_are_padded_where_the_engine_can() -> None:
    mixed = small(model_type="gemma4_text", head_dim=96, global_head_dim=128, sliding_window=512, num_hidden_layers=6)

    assert "one size" in str(weighed(mixed, vllm_version="0.23.0").refusal)
    padded = plan(mixed, vllm_version="0.24.0")
    assert padded.refusal is None
    assert {g.page.page_bytes for g in padded.groups} == {16 * 8 * 256 * 2}
    assert {g.page.block_tokens for g in padded.groups} == {16}


def test_pages_that_divide_get_longer_blocks() -> None:
    wide = small(model_type="gemma4_text", head_dim=128, global_head_dim=256, sliding_window=512, num_hidden_layers=6)
    tokens = {g.page.kind: g.page.block_tokens for g in plan(wide).groups}

    assert tokens == {"sliding": 32, "full": 16}


def test_an_indexer_lies_in_the_same_block_as_its_layer() -> None:
    sparse = small(model_type="deepseek_v32", index_head_dim=128, index_n_heads=64)
    found = plan(sparse, block_tokens=64)

    assert len(found.groups) == 1
    assert found.block_bytes == 12 * 64 * (576 * 2 + 132)
    assert plan(sparse, block_tokens=64, kv_cache_dtype="fp8_ds_mla").block_bytes == 12 * 64 * (656 + 132)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", 512),
        ("bfloat16", 512),
        ("fp8", 256),
        ("fp8_per_token_head", 264),
        ("int8_per_token_head", 264),
        ("int4_per_token_head", 136),
        ("nvfp4", 144),
    ],
)
def test_bytes_of_one_head_and_token(dtype: str, expected: int) -> None:
    assert kv_head_bytes(dtype, 128, 128, 2) == expected


def test_a_kv_dtype_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError) as caught:
        weighed(small(), kv_cache_dtype="fp7")

    assert "fp8_e4m3" in str(caught.value.remedy)


def test_the_cache_of_latent_attention_is_neither_split_nor_packed() -> None:
    latent = small(model_type="deepseek_v3")

    assert plan(latent, tensor_parallel_size=4).bytes_per_token == plan(latent).bytes_per_token == 12 * 576 * 2
    assert "latent" in str(weighed(latent, kv_cache_dtype="nvfp4").refusal)
    assert "latent" in str(weighed(small(), kv_cache_dtype="fp8_ds_mla").refusal)
    assert weighed(latent, device="cpu", block_tokens=128).kv_block_tokens == 16


def test_tensor_parallelism_splits_heads_but_never_below_one() -> None:
    assert plan(small(), tensor_parallel_size=4).bytes_per_token == plan(small()).bytes_per_token // 4
    assert plan(small(num_key_value_heads=2), tensor_parallel_size=8).bytes_per_token == 12 * 1 * 256 * 2


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        (None, "auto"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}, "fp8"),
        ({"quant_method": "modelopt_fp4", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "nvfp4"),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "dynamic": False, "type": "float"}}, "fp8"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "INT3"}, "auto"),
        ({"quant_method": "gptq", "kv_cache_quant_algo": "FP8"}, "auto"),
    ],
)
def test_a_checkpoint_may_bring_its_kv_dtype(quant: dict[str, Any] | None, expected: str) -> None:
    assert resolved_kv_dtype("auto", quant) == expected
    assert resolved_kv_dtype("bfloat16", quant) == "bfloat16"


def test_float32_checkpoints_come_down_to_16_bits() -> None:
    assert compute_dtype("auto", "float32") == "bfloat16"
    assert compute_dtype("auto", "float32", pooling=True) == "float16"
    assert compute_dtype("float32", "bfloat16") == "float32"
    assert compute_dtype("half", "bfloat16") == "float16"
    with pytest.raises(ConfigError):
        compute_dtype("int8", "bfloat16")
