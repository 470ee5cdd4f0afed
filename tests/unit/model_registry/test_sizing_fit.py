"""Fits: what breaks first, in words; the arguments an engine gets; limits that no memory mends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.errors import ConfigError, ModelUnreadable, UnknownProfile
from model_registry.model import EngineLimits, ModelSpec, TensorSummary
from model_registry.schema import ModelConfig
from model_registry.sizing import default_limits, engine_arguments, fit, weigh
from model_registry.sizing.footprint import CUDA_CONTEXT_BYTES
from model_registry.sizing.report import Workload, size
from model_registry.sizing.survey import smallest, survey
from model_registry.sizing.units import GIB, gib

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
SPEC = ModelSpec("org/llama-8b", "LlamaForCausalLM", LLAMA, "generate", 131_072, tensors=TensorSummary(16_060_522_496))
BERT = ModelSpec("org/bert", "BertModel", {"model_type": "bert", "architectures": ["BertModel"]}, "embed", 512)
LIMITS = EngineLimits(max_model_len=8192, max_num_seqs=16, max_num_batched_tokens=2048)


def fitted(memory_gib: float, limits: EngineLimits = LIMITS, spec: ModelSpec = SPEC, **where: Any) -> Any:
    return fit(spec, weigh(spec, limits), limits, memory_bytes=int(memory_gib * GIB), **where)


@pytest.mark.parametrize(
    ("memory_gib", "term"), [(9.5, "weights"), (16.5, "activation"), (16.7, "non_torch"), (17.2, "kv_cache")]
)
def test_the_first_term_that_breaks_is_named(memory_gib: float, term: str) -> None:
    got = fitted(memory_gib)

    assert not got.fits
    assert got.breaking_term == term
    assert "GiB" in got.reason or "MiB" in got.reason


def test_a_request_that_does_not_fit_is_told_in_gib() -> None:
    got = fitted(17.5)

    assert "one request of 8,192 tokens needs 1.00 GiB" in got.reason
    assert got.head_room_bytes < 0


def test_less_to_spare_than_the_estimate_may_be_off_does_not_fit() -> None:
    footprint = weigh(SPEC, LIMITS)
    hairline = next(
        m
        for m in range(17 * GIB, 20 * GIB, GIB // 100)
        if fit(SPEC, footprint, LIMITS, memory_bytes=m).head_room_bytes >= 0
    )
    got = fit(SPEC, footprint, LIMITS, memory_bytes=hairline)

    assert not got.fits
    assert "may be off" in got.reason
    assert fit(SPEC, footprint, LIMITS, memory_bytes=got.needed_bytes + GIB // 500).fits


def test_the_arguments_are_the_limits_that_were_sized() -> None:
    got = fitted(39.5, replace(LIMITS, kv_cache_dtype="fp8", block_tokens=32, cuda_graphs=False, prefix_caching=False))

    assert got.engine_args == (
        *("--max-model-len", "8192", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048"),
        *("--kv-cache-dtype", "fp8", "--block-size", "32", "--no-enable-prefix-caching"),
        *("--gpu-memory-utilization", "0.92", "--enforce-eager"),
    )


def test_a_cpu_engine_gets_no_gpu_arguments() -> None:
    arguments = engine_arguments(replace(LIMITS, device="cpu", kv_cache_memory_bytes=GIB))

    assert not [a for a in arguments if "gpu" in a or "kv-cache-memory" in a or "eager" in a]


def test_utilization_is_lowered_where_cudas_context_would_not_leave_it() -> None:
    small = ModelSpec("tiny", "", LLAMA | {"hidden_size": 256, "num_hidden_layers": 2}, "generate", 131_072)
    got = fitted(4.75, spec=small)
    share = float(got.engine_args[got.engine_args.index("--gpu-memory-utilization") + 1])

    assert share < 0.92
    assert 4.75 * GIB * share <= 4.75 * GIB - CUDA_CONTEXT_BYTES
    assert any("lowered" in note for note in got.assumptions)


def test_a_pool_that_is_given_must_fit_beside_the_rest() -> None:
    pool = replace(LIMITS, kv_cache_memory_bytes=4 * GIB)

    assert fitted(22, pool).fits
    assert fitted(22, pool).available_kv_bytes == 4 * GIB
    assert ("--kv-cache-memory-bytes", str(4 * GIB)) == fitted(22, pool).engine_args[6:8]
    refused = fitted(19, pool)
    assert refused.breaking_term == "kv_cache"
    assert "does not fit beside" in refused.reason


def test_tensor_parallelism_over_slices_is_refused_with_the_reason() -> None:
    two = replace(LIMITS, tensor_parallel_size=2)

    refused = fitted(39.5, two, profile="3g.40gb")
    assert refused.breaking_term == "tensor_parallel_size"
    assert "peer" in refused.reason
    assert fitted(79.0, two).fits


def test_more_context_than_the_model_was_made_for_is_refused() -> None:
    refused = fitted(79.0, replace(LIMITS, max_model_len=200_000))

    assert refused.breaking_term == "max_model_len"
    assert "131,072" in refused.reason


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        (SPEC, replace(LIMITS, max_num_seqs=4096)),
        (BERT, replace(LIMITS, max_model_len=512, max_num_batched_tokens=256)),
    ],
)
def test_limits_that_the_engine_refuses(spec: ModelSpec, limits: EngineLimits) -> None:
    refused = fitted(79.0, limits, spec)

    assert refused.breaking_term == "limits"
    assert "max_num_batched_tokens" in refused.reason


def test_an_encoder_keeps_no_cache() -> None:
    limits = replace(LIMITS, max_model_len=512)
    got = fitted(4.75, limits, BERT)

    assert got.fits
    assert (got.kv_blocks, got.longest_context_tokens, got.max_concurrency) == (0, 512, 16.0)
    assert not fitted(1.0, limits, BERT).fits


def test_a_footprint_for_another_device_is_weighed_anew() -> None:
    footprint = weigh(SPEC, LIMITS)
    got = fit(SPEC, footprint, LIMITS, memory_bytes=32 * GIB, device="cpu")

    assert got.kv_blocks == got.available_kv_bytes // (131_072 * 128)


def test_memory_of_nothing_is_a_refusal_and_no_error() -> None:
    assert not fitted(0).fits


def test_default_limits_take_what_the_operator_leaves_out_from_the_model() -> None:
    limits = default_limits(ModelConfig(name="m", source="org/m"), SPEC, "0.33.0")
    encoder = default_limits(ModelConfig(name="m", source="org/m"), BERT, "0.33.0")

    assert (limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs) == (131_072, 2048, 16)
    assert (encoder.max_model_len, encoder.max_num_batched_tokens) == (512, 2048)
    assert default_limits(ModelConfig(name="m", source="o/m", max_model_len=4096), SPEC, "0.33.0").max_model_len == 4096


def test_a_prefix_language_model_gets_steps_that_hold_a_whole_clip() -> None:
    gemma = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": {"model_type": "gemma4_text", "use_bidirectional_attention": "vision"},
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "patch_size": 16},
    }
    spec = ModelSpec("g4", "", gemma, "generate", 131_072)

    assert default_limits(ModelConfig(name="m", source="org/m"), spec, "0.33.0").max_num_batched_tokens == 2496
    assert "one step" in str(weigh(spec, LIMITS).refusal)


def test_the_smallest_profile_and_why_the_one_below_does_not_do() -> None:
    product = load_catalogue().product("a100-80gb")
    report = size(SPEC, replace(LIMITS, max_model_len=65_536), products=(product,))

    assert report.chosen.profile == "3g.40gb"
    assert report.verdict.startswith("needs 3g.40gb: on 2g.20gb weights, activations and graphs leave")
    assert "one request of 65,536 tokens needs 8.00 GiB" in report.verdict
    assert [r.fits for r in report.rows if r.profile.is_base] == [False, False, False, True, True, True]


def test_a_model_that_fits_nothing_says_what_the_largest_lacks() -> None:
    large = ModelSpec("big", "", LLAMA, "generate", 131_072, tensors=TensorSummary(200 * GIB))
    report = size(large, LIMITS, products=(load_catalogue().product("a30"),))

    assert not report.chosen.fits
    assert report.verdict.startswith("fits none of them: on 4g.24gb weights")


def test_a_profile_that_several_products_have_is_sized_for_the_smallest() -> None:
    report = size(SPEC, LIMITS, products=load_catalogue().products, profile="1g.10gb")

    assert report.chosen.memory_bytes == 9728 * 2**20
    assert any("products" in note for note in report.assumptions)


def test_a_profile_that_nobody_has_is_an_error() -> None:
    products = load_catalogue().products
    with pytest.raises(UnknownProfile):
        size(SPEC, LIMITS, products=(products[0],), profile="9g.90gb")
    with pytest.raises(ConfigError):
        size(SPEC, LIMITS, products=products, profile="9g.90gb")


def test_profiles_whose_memory_nobody_published_are_shown_as_such() -> None:
    rows = survey(SPEC, weigh(SPEC, LIMITS), LIMITS, (load_catalogue().product("gb200"),))

    assert all(r.fit is None and not r.fits for r in rows)
    assert smallest(rows) is None
    report = size(SPEC, LIMITS, products=(load_catalogue().product("gb200"),))
    assert not report.chosen.fits


def test_a_configuration_that_lacks_a_dimension_is_unreadable() -> None:
    with pytest.raises(ModelUnreadable):
        weigh(ModelSpec("m", "", {"model_type": "nothing"}, "generate", 0), LIMITS)


@pytest.mark.parametrize(("size_bytes", "text"), [(GIB, "1.00 GiB"), (38 * 2**20, "38 MiB"), (-2 * GIB, "-2.00 GiB")])
def test_sizes_in_words(size_bytes: int, text: str) -> None:
    assert gib(size_bytes) == text


def test_a_prefill_heavy_load_is_told_of_the_twin_with_more_sms() -> None:
    product = load_catalogue().product("h100-sxm")
    heavy = size(SPEC, LIMITS, products=(product,), workload=Workload(7000, 20))
    light = size(SPEC, LIMITS, products=(product,), workload=Workload(50, 2000))

    assert heavy.chosen.profile == light.chosen.profile == "1g.20gb"
    assert any(note.startswith("2g.20gb has the same memory") for note in heavy.assumptions)
    assert not any("same memory" in note for note in light.assumptions)
