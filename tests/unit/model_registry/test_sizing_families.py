"""Reading architectures: layouts per family, parameters, defaults of what a configuration leaves out, what is not known."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from model_registry.errors import ModelUnreadable
from model_registry.sizing import read_architecture
from model_registry.sizing.architecture import Architecture, AttentionCache, StateCache

CONFIGS = json.loads((Path(__file__).parents[2] / "data" / "sizing" / "startup_runs.json").read_text(encoding="utf-8"))[
    "configs"
]

# Published parameter counts; Gemma 3's leave out a few thousand norms of its vision tower.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-27b-it": 27_227_128_320,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-27b-it": 27_432_406_640,
    "ibm-granite/granite-3.1-2b-instruct": 2_533_531_648,
    "microsoft/phi-2": 2_779_683_840,
}


def kinds(arch: Architecture) -> dict[str, int]:
    return dict(Counter(c.kind for c in arch.caches))


def llama(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
    } | changes


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_by_architecture_are_the_published_ones(name: str) -> None:
    assert read_architecture(CONFIGS[name]).parameters.total == pytest.approx(PARAMETERS[name], rel=0.0005)


def test_a_mixture_activates_only_the_experts_a_token_is_sent_to() -> None:
    arch = read_architecture(CONFIGS["mistralai/Mixtral-8x7B-Instruct-v0.1"])

    assert arch.parameters.active(arch.experts) == pytest.approx(12.75e9, rel=0.01)  # published: 12.9 with embeddings


def test_what_a_configuration_leaves_out_takes_the_familys_default() -> None:
    gemma = read_architecture({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]})

    assert (gemma.head_dim, gemma.vocab_size, gemma.tie_embeddings) == (256, 262_208, True)
    assert kinds(gemma) == {"sliding": 22, "full": 4}
    assert read_architecture(llama()).kv_heads == 32
    assert kinds(read_architecture(llama(model_type="mistral"))) == {"sliding": 4}  # 4,096 tokens unless it says null
    assert kinds(read_architecture(llama(model_type="mistral", sliding_window=None))) == {"full": 4}


def test_a_window_that_is_switched_off_is_no_window() -> None:
    qwen = llama(model_type="qwen3", sliding_window=4096, use_sliding_window=False, max_window_layers=2)

    assert kinds(read_architecture(qwen)) == {"full": 4}
    assert kinds(read_architecture(llama(model_type="phi3", sliding_window=0))) == {"full": 4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama(model_type="gemma2", sliding_window=512), {"sliding": 2, "full": 2}),
        (llama(model_type="gpt_oss"), {"sliding": 2, "full": 2}),
        (llama(model_type="llama4_text", attention_chunk_size=8192), {"chunked": 3, "full": 1}),
        (llama(model_type="qwen3_next"), {"gated_delta": 3, "full": 1}),
        (llama(model_type="jamba", num_hidden_layers=8), {"mamba1": 7, "full": 1}),
        (llama(model_type="nemotron_h", hybrid_override_pattern="ME*M-M"), {"mamba2": 3, "full": 1}),
        (llama(model_type="bamba", attn_layer_indices=[1]), {"mamba2": 3, "full": 1}),
        (llama(model_type="falcon_h1"), {"full": 4, "mamba2": 4}),
        (llama(model_type="lfm2", full_attn_idxs=[3]), {"short_conv": 3, "full": 1}),
        (llama(model_type="deepseek_v3"), {"mla": 4}),
        (llama(model_type="deepseek_v32", index_head_dim=128, index_n_heads=64), {"mla": 8}),
        (llama(model_type="bert"), {}),
        (llama(model_type="xlm-roberta"), {}),
    ],
)
def test_layers_by_family(config: dict[str, Any], expected: dict[str, int]) -> None:
    arch = read_architecture(config)

    assert arch.known
    assert kinds(arch) == expected


def test_layers_that_share_a_cache_have_none_of_their_own() -> None:
    gemma3n = llama(model_type="gemma3n_text", num_hidden_layers=10, num_kv_shared_layers=5)

    assert len(read_architecture(gemma3n).caches) == 5


def test_wide_full_layers_of_gemma_4() -> None:
    config = llama(
        model_type="gemma4_text",
        num_hidden_layers=6,
        num_key_value_heads=8,
        head_dim=256,
        global_head_dim=512,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        sliding_window=1024,
    )
    windowed, full = read_architecture(config).caches[0], read_architecture(config).caches[-1]

    assert windowed == AttentionCache("sliding", 8, 256, 256, 1024)
    assert full == AttentionCache("full", 2, 512, 512)


def test_the_state_of_a_gated_delta_layer_is_the_one_in_the_published_logs() -> None:
    # Qwen3.6-35B-A3B: conv 3 x 8,192 in bfloat16, matrix 32 x 128 x 128 in float32, together 2,146,304 bytes.
    config = llama(
        model_type="qwen3_5_text",
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        mamba_ssm_dtype="float32",
    )
    state = read_architecture(config).states[0]

    assert state == StateCache("gated_delta", 24_576, 524_288, "float32")
    assert state.conv_elements * 2 + state.state_elements * 4 == 2_146_304


def test_an_architecture_that_is_not_known_is_full_attention_and_says_so() -> None:
    arch = read_architecture(llama(model_type="hyperion", architectures=["HyperionForCausalLM"], sliding_window=128))

    assert not arch.known
    assert kinds(arch) == {"full": 4}
    assert any("hyperion" in note and "upper bound" in note for note in arch.notes)


def test_a_qwen_window_in_some_layers_only_is_what_vllm_refuses() -> None:
    config = llama(model_type="qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=2)

    assert "max_window_layers" in str(read_architecture(config).refusal)
    assert read_architecture(config | {"max_window_layers": 4}).refusal is None


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ({"model_type": "llama"} | {"hidden_size": "wide"}, "hidden_size"),
        (llama(model_type="unheard-of") | {"hidden_size": None}, "hidden_size"),
        (llama(model_type="unheard-of", vocab_size=0), "vocab_size"),
        ({}, "model_type"),
    ],
)
def test_a_missing_dimension_is_named(broken: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelUnreadable) as caught:
        read_architecture(broken)

    assert names in caught.value.message
    assert caught.value.remedy


def test_the_language_model_of_a_multimodal_configuration_is_read() -> None:
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": llama(model_type="qwen3_vl_text", dtype="bfloat16"),
        "vision_config": {"hidden_size": 1024, "depth": 24, "patch_size": 16, "spatial_merge_size": 2},
    }
    arch = read_architecture(config)

    assert (arch.layers, arch.dtype, arch.tie_embeddings) == (4, "bfloat16", True)
    assert arch.vision is not None
    assert arch.vision.patches_per_item == 4 * arch.vision.tokens_per_item


@pytest.mark.parametrize(
    ("scaling", "model_type", "expected"),
    [
        (None, "llama", 8192),
        ({"rope_type": "llama3", "factor": 8.0}, "llama", 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, "llama", 8192),
        ({"type": "linear", "factor": 4.0}, "llama", 32_768),
        ({"type": "linear", "factor": 4.0}, "gemma3_text", 8192),
    ],
)
def test_the_longest_context_is_what_vllm_derives(
    scaling: dict[str, Any] | None, model_type: str, expected: int
) -> None:
    config = llama(model_type=model_type, max_position_embeddings=8192, rope_scaling=scaling)

    assert read_architecture(config).max_positions == expected


def test_a_model_without_a_length_takes_any() -> None:
    assert read_architecture({"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}).max_positions is None


def test_falcon_shares_one_key_value_head() -> None:
    old = llama(model_type="falcon", multi_query=True, n_head_kv=None)

    assert read_architecture(old).kv_heads == 1
    assert read_architecture(old | {"new_decoder_architecture": True, "num_kv_heads": 8}).kv_heads == 8
