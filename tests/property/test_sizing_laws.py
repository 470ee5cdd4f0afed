"""What must hold for the sizing of any model, whatever its family and dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.catalogue import load_catalogue
from model_registry.model import EngineLimits, ModelSpec
from model_registry.sizing import fit, read_architecture, weigh
from model_registry.sizing.footprint import CUDA_CONTEXT_BYTES
from model_registry.sizing.units import GIB

CONTEXT = 32_768
VERSIONS = ("0.17.1", "0.19.0", "0.20.2", "0.24.0", "0.26.0", "0.28.0", "0.32.0", "0.33.0")
FAMILIES = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v2",
    "nemotron_h",
    "qwen3_next",
    "jamba",
    "mamba2",
    "bert",
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from(FAMILIES))
    heads = draw(st.sampled_from([4, 8, 16]))
    config: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family,
        "hidden_size": heads * draw(st.sampled_from([64, 128])),
        "intermediate_size": draw(st.sampled_from([1024, 4096])),
        "num_hidden_layers": draw(st.integers(1, 40)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, heads])),
        "vocab_size": draw(st.integers(1000, 260_000)),
        "max_position_embeddings": CONTEXT,
        "torch_dtype": draw(st.sampled_from(["bfloat16", "float32"])),
        "sliding_window": draw(st.sampled_from([128, 1000, 4096])),
    }
    if family == "nemotron_h":
        pattern = "*" + draw(st.text(alphabet="M*-E", min_size=2, max_size=40)) + "M"
        config |= {
            "hybrid_override_pattern": pattern,
            "n_routed_experts": 8,
            "moe_intermediate_size": 256,
            "n_groups": 2,
        }
    return config


@st.composite
def limit_sets(draw: st.DrawFn) -> EngineLimits:
    seqs = draw(st.integers(1, 1024))
    return EngineLimits(
        max_model_len=draw(st.integers(1, CONTEXT)),
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(seqs, 16_384)),
        gpu_memory_utilization=draw(st.floats(0.5, 0.99)),
        vllm_version=draw(st.sampled_from(VERSIONS)),
        device=draw(st.sampled_from(["cuda", "cpu"])),
        block_tokens=draw(st.sampled_from([None, 16, 64, 128])),
        cuda_graphs=draw(st.booleans()),
        prefix_caching=draw(st.sampled_from([None, True, False])),
    )


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return ModelSpec("any", "", config, "generate", 0)


@given(configs(), limit_sets(), st.integers(1, CONTEXT))
def test_more_context_never_needs_less(config: dict[str, Any], limits: EngineLimits, more: int) -> None:
    longer = replace(limits, max_model_len=min(CONTEXT, limits.max_model_len + more))
    spec = spec_of(config)
    short, long = weigh(spec, limits), weigh(spec, longer)

    assert long.kv_blocks_per_request >= short.kv_blocks_per_request
    needed = [fit(spec, f, x, memory_bytes=GIB).needed_bytes for f, x in ((short, limits), (long, longer))]
    assert needed[0] <= needed[1]


@given(configs(), limit_sets(), st.integers(0, 40 * GIB))
def test_a_smaller_kv_dtype_never_gives_fewer_blocks(config: dict[str, Any], limits: EngineLimits, pool: int) -> None:
    spec = spec_of(config)
    blocks = []
    for dtype in ("auto", "fp8"):
        asked = replace(limits, kv_cache_dtype=dtype, kv_cache_memory_bytes=pool)
        blocks.append(fit(spec, weigh(spec, asked), asked, memory_bytes=80 * GIB).kv_blocks)

    assert blocks[0] <= blocks[1]


@given(configs(), limit_sets(), st.integers(1, 80 * GIB), st.integers(0, 80 * GIB))
def test_a_larger_slice_never_fits_less(config: dict[str, Any], limits: EngineLimits, memory: int, more: int) -> None:
    spec = spec_of(config)
    footprint = weigh(spec, limits)
    small = fit(spec, footprint, limits, memory_bytes=memory)
    large = fit(spec, footprint, limits, memory_bytes=memory + more)

    assert large.fits or not small.fits
    assert large.kv_blocks >= small.kv_blocks
    assert large.longest_context_tokens >= small.longest_context_tokens


@given(configs(), limit_sets(), st.integers(1, 80 * GIB))
def test_what_fits_has_room_for_every_part(config: dict[str, Any], limits: EngineLimits, memory: int) -> None:
    spec = spec_of(config)
    footprint = weigh(spec, limits)
    got = fit(spec, footprint, limits, memory_bytes=memory)
    if not got.fits:
        assert got.breaking_term
        return
    context = CUDA_CONTEXT_BYTES if limits.device == "cuda" else 0

    assert got.breaking_term is None
    assert footprint.charged_bytes + got.available_kv_bytes + context <= memory
    if footprint.kv_block_bytes:
        assert got.kv_blocks > footprint.kv_blocks_per_request
        assert got.longest_context_tokens >= limits.max_model_len
    assert got.needed_bytes <= memory + 1


@given(configs(), limit_sets(), st.integers(1, 80 * GIB))
def test_the_longest_context_fits_and_one_token_more_does_not(
    config: dict[str, Any], limits: EngineLimits, pool: int
) -> None:
    spec = spec_of(config)
    footprint = weigh(spec, limits)
    plan = footprint.cache
    assert plan is not None
    if not plan.groups:
        return
    blocks = plan.pool_blocks(pool)
    longest = plan.longest(blocks, CONTEXT)

    assert longest == 0 or plan.holds(blocks, longest)
    assert longest == CONTEXT or not plan.holds(blocks, longest + 1)


@given(configs(), limit_sets())
def test_every_cached_layer_is_in_one_group_and_every_block_holds_a_group(
    config: dict[str, Any], limits: EngineLimits
) -> None:
    footprint = weigh(spec_of(config), limits)
    assert footprint.cache is not None

    assert sum(g.layers for g in footprint.cache.groups) == len(read_architecture(config).caches)
    assert all(g.page_bytes <= footprint.kv_block_bytes for g in footprint.cache.groups)
    assert footprint.weights_bytes == sum(t.bytes for t in footprint.terms if t.name in WEIGHT_TERMS)


WEIGHT_TERMS = ("tensors", "rotary tables", "absorbed projections", "kernel padding", "allocator rounding")


@settings(max_examples=20)
@given(configs(), limit_sets())
def test_profiles_that_are_larger_in_every_respect_never_fit_less(config: dict[str, Any], limits: EngineLimits) -> None:
    spec = spec_of(config)
    cuda = replace(limits, device="cuda")
    footprint = weigh(spec, cuda)
    for product in load_catalogue().products:
        known = sorted((p for p in product.profiles if p.memory_bytes), key=lambda p: p.memory_bytes or 0)
        fits = [fit(spec, footprint, cuda, memory_bytes=p.memory_bytes or 0, profile=p.name).fits for p in known]
        assert fits == sorted(fits)
