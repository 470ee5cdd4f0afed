"""Weights: conversion while loading, what the engine adds, quantised formats."""

from __future__ import annotations

from typing import Any

import pytest

from model_registry.model import EngineLimits, Footprint, ModelSpec, TensorSummary
from model_registry.sizing import weigh
from model_registry.sizing.quantization import StoredBits, quantised_bits, stored_bits
from model_registry.sizing.units import GIB

LIMITS: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
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
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def weighed(
    config: dict[str, Any],
    tensors: TensorSummary | None = None,
    quant: dict[str, Any] | None = None,
    **limits: Any,
) -> Footprint:
    return weigh(
        ModelSpec("m", "", config, "generate", 0, tensors=tensors, quant_config=quant), EngineLimits(**LIMITS | limits)
    )


def part(footprint: Footprint, name: str) -> int:
    return next((t.bytes for t in footprint.terms if t.name == name), 0)


def test_rotary_tables_are_added_once_per_setting() -> None:
    assert part(weighed(LLAMA), "rotary tables") == 131_072 * 128 * 2
    gemma = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 128,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    assert part(weighed(gemma), "rotary tables") == (131_072 * 8 + 131_072) * 128 * 2


def test_float32_checkpoints_are_halved_and_16_bit_ones_doubled_for_float32() -> None:
    elements = 1_000_000
    stored = TensorSummary(elements * 4, {"F32": elements * 4}, {"F32": elements})

    assert part(weighed(LLAMA, stored), "tensors") == elements * 2
    assert part(weighed(LLAMA, stored, dtype="float32"), "tensors") == elements * 4
    assert part(weighed(LLAMA, TensorSummary(elements * 2), dtype="float32"), "tensors") == elements * 4


def test_scales_of_a_quantised_checkpoint_stay_as_they_are() -> None:
    stored = TensorSummary(5_000_000, {"F8_E4M3": 4_000_000, "F32": 1_000_000}, {"F8_E4M3": 4_000_000, "F32": 250_000})

    assert part(weighed(LLAMA, stored, {"quant_method": "fp8"}), "tensors") == 5_000_000


def test_latent_attention_keeps_its_up_projections_twice() -> None:
    lite = LLAMA | {"model_type": "deepseek_v2", "num_hidden_layers": 27, "num_attention_heads": 16}

    assert (
        part(weighed(lite), "absorbed projections") == 27 * 16 * (128 + 128) * 512 * 2
    )  # 0.105 GiB of DeepSeek-V2-Lite


def test_mxfp4_experts_are_padded_to_the_kernels_tiles() -> None:
    footprint = weighed(GPT_OSS, TensorSummary(int(12.82 * GIB)), MXFP4)

    assert footprint.weights_bytes / GIB == pytest.approx(13.64, rel=0.01)  # logged for gpt-oss-20b
    assert part(weighed(GPT_OSS, TensorSummary(1)), "kernel padding") == 0


def test_the_architecture_alone_gives_the_size_of_an_mxfp4_checkpoint() -> None:
    assert part(weighed(GPT_OSS, None, MXFP4), "tensors") / GIB == pytest.approx(12.82, rel=0.01)


def test_fp8_while_loading_leaves_embeddings_as_they_are() -> None:
    assert weighed(LLAMA, TensorSummary(16_060_522_496), quantization="fp8").weights_bytes / GIB == pytest.approx(
        8.49, rel=0.005
    )


@pytest.mark.parametrize(
    ("method", "config", "bits"),
    [
        ("fp8", {"weight_block_size": [128, 128]}, 8 + 32 / 16_384),
        ("fp8", None, 8.0),
        ("compressed-tensors", {"config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "channel"}}}}, 8.0),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}}},
            4 + 16 / 128,
        ),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}},
            4.5,
        ),
        ("awq", {"bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128),
        ("gptq", {"bits": 4, "group_size": 128, "sym": True}, 4 + 16 / 128),
        ("gptq_marlin", {"bits": 8, "group_size": -1, "sym": True}, 8 + 16 / 4096),
        ("bitsandbytes", None, 4.5),
        ("bitsandbytes", {"load_in_8bit": True}, 8.0),
        ("modelopt_fp4", None, 4.5),
        ("mxfp4", None, 4.25),
        ("mxfp8", None, 8.25),
        (None, None, None),
        ("fp3-of-tomorrow", None, None),
    ],
)
def test_bits_per_quantised_parameter(method: str | None, config: dict[str, Any] | None, bits: float | None) -> None:
    assert quantised_bits(config, method) == bits


def test_a_method_that_is_not_known_is_sized_as_none_and_says_so() -> None:
    strange = weighed(LLAMA, None, {"quant_method": "fp3-of-tomorrow"})

    assert strange.weights_bytes == weighed(LLAMA).weights_bytes
    assert any("fp3-of-tomorrow" in note for note in strange.assumptions)


def test_parts_of_a_mixed_checkpoint_have_their_own_bits() -> None:
    wide = {"weights": {"num_bits": 8, "type": "float"}, "targets": ["model.layers.0.self_attn.q_proj"]}
    narrow = {
        "weights": {"num_bits": 4, "type": "float", "group_size": 16},
        "targets": ["lm_head", "model.layers.0.mlp.experts"],
    }
    bits = stored_bits({"config_groups": {"a": wide, "b": narrow}}, "modelopt", 2)

    assert bits == StoredBits(linear=8.0, experts=4.5, rest=16.0, output=4.5)
    assert stored_bits({"lm_head": True, "bits": 4, "group_size": 128, "sym": True}, "gptq", 2).output == 4.125
    assert stored_bits(None, "mxfp4", 2) == StoredBits(linear=16.0, experts=4.25, rest=16.0, output=16.0)


def test_large_matrices_are_rounded_as_the_allocator_does() -> None:
    # Gemma 2 2B: gate and up 81 MiB in a segment of 82, embeddings 1,125 of 1,126; down 40.5 of 42 gives the rest back.
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "torch_dtype": "bfloat16"}

    assert part(weighed(gemma), "allocator rounding") == 27 * 2**20
    assert part(weighed(gemma, device="cpu"), "allocator rounding") == 0


def test_a_gguf_file_is_sized_as_converted_where_the_engine_reads_none() -> None:
    stored = TensorSummary(600_000, {"Q4_K": 600_000}, {"Q4_K": 1_000_000})
    quant = {"quant_method": "gguf"}

    assert part(weighed(LLAMA, stored, quant), "tensors") == 2_000_000
    assert part(weighed(LLAMA, stored, quant, vllm_version="0.23.0"), "tensors") == 600_000


def test_an_estimate_from_the_architecture_has_a_wider_margin_and_says_so() -> None:
    exact, derived = weighed(LLAMA, TensorSummary(16_060_522_496)), weighed(LLAMA)

    assert exact.weights_exact
    assert not derived.weights_exact
    assert derived.margin_bytes > exact.margin_bytes
    assert any("weights index" in note for note in derived.assumptions)


def test_bitsandbytes_is_refused_where_the_engine_has_lost_it() -> None:
    assert "bitsandbytes" in str(weighed(LLAMA, quantization="bitsandbytes").refusal)
    assert weighed(LLAMA, quantization="bitsandbytes", vllm_version="0.26.0").refusal is None
