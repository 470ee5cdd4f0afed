"""Activation peak, graphs, vision towers and speed: which term rules when, and how they grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.errors import ModelUnreadable
from model_registry.model import EngineLimits, Footprint, ModelSpec, TensorSummary
from model_registry.sizing import fit, weigh
from model_registry.sizing.dimensions import Dimensions
from model_registry.sizing.footprint import size_model
from model_registry.sizing.graphs import capture_sizes
from model_registry.sizing.speed import Demand, best_batch, estimate_speed, replicas_for, slice_roof
from model_registry.sizing.units import GIB

LLAMA: dict[str, Any] = {
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
LIMITS = EngineLimits(max_model_len=8192, max_num_seqs=1024, max_num_batched_tokens=8192)


def spec(config: dict[str, Any], task: Any = "generate") -> ModelSpec:
    return ModelSpec("m", "", config, task, 0, tensors=TensorSummary(16_060_522_496))


def weighed(config: dict[str, Any], task: Any = "generate", **limits: Any) -> Footprint:
    return weigh(spec(config, task), replace(LIMITS, **limits))


def names(footprint: Footprint) -> set[str]:
    return {t.name for t in footprint.terms}


def test_the_sampler_rules_with_many_sequences_and_the_mlp_with_few() -> None:
    assert "sampler" in names(weighed(LLAMA))
    few = weighed(LLAMA, max_num_seqs=16, max_num_batched_tokens=2048)
    assert "mlp" in names(few)
    assert few.activation_bytes / GIB == pytest.approx(0.34, abs=0.02)


def test_pooling_models_sample_nothing() -> None:
    assert "sampler" not in names(weighed(LLAMA, "embed"))
    assert weighed(LLAMA, "embed").activation_bytes < weighed(LLAMA).activation_bytes


def test_experts_take_a_workspace_but_for_the_mxfp4_kernels() -> None:
    mixtral = LLAMA | {"model_type": "mixtral"}
    gpt_oss = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}

    assert "expert workspace" in names(weighed(mixtral))
    packed = ModelSpec("g", "", gpt_oss, "generate", 0, quant_config={"quant_method": "mxfp4"})
    assert "expert workspace" not in names(weigh(packed, LIMITS))


def test_an_unknown_architecture_is_charged_more() -> None:
    strange = LLAMA | {"model_type": "hyperion"}

    assert "unknown architecture" in names(weighed(strange))
    assert weighed(strange).activation_bytes > weighed(LLAMA).activation_bytes
    assert weighed(strange).margin_bytes > weighed(LLAMA).margin_bytes


def test_before_018_less_lies_outside_pytorch() -> None:
    assert weighed(LLAMA, vllm_version="0.17.1").non_torch_bytes < weighed(LLAMA).non_torch_bytes
    assert weighed(LLAMA, tensor_parallel_size=2).non_torch_bytes > 2 * GIB
    assert weighed(LLAMA, device="cpu").non_torch_bytes == 0


@pytest.mark.parametrize(
    ("seqs", "tokens", "count", "largest"),
    [(1024, 8192, 51, 512), (16, 2048, 7, 32), (1, 2048, 2, 2), (256, 100, 15, 96)],
)
def test_batch_sizes_that_are_captured(seqs: int, tokens: int, count: int, largest: int) -> None:
    sizes = capture_sizes(seqs, tokens)

    assert (len(sizes), sizes[-1]) == (count, largest)


def test_graphs_are_charged_to_the_pool_from_020_on() -> None:
    both = [weighed(LLAMA, vllm_version=v) for v in ("0.19.0", "0.20.2")]

    assert both[0].cuda_graph_bytes == both[1].cuda_graph_bytes > 0
    assert both[1].charged_bytes - both[0].charged_bytes == both[1].cuda_graph_bytes
    assert weighed(LLAMA, cuda_graphs=False).cuda_graph_bytes == 0


def vision(tower: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"architectures": ["X"], "text_config": LLAMA, "vision_config": tower, "torch_dtype": "bfloat16"} | top


def test_a_tower_with_few_sequences_rules_the_peak() -> None:
    qwen = vision(
        {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "patch_size": 14, "spatial_merge_size": 2},
        model_type="qwen2_5_vl",
        text_config=LLAMA | {"model_type": "qwen2_5_vl_text"},
    )
    short = weighed(qwen, max_num_seqs=16, max_num_batched_tokens=2048)
    long = weighed(qwen, max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=65_536)

    assert {"vision encoder", "vision inputs"} <= names(short)
    assert long.activation_bytes > 3 * short.activation_bytes  # a clip costs as many images as the context holds
    assert short.margin_bytes > weighed(LLAMA).margin_bytes


def test_a_tower_with_many_sequences_only_adds_what_is_kept() -> None:
    gemma = vision(
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14},
        model_type="gemma3",
        mm_tokens_per_image=256,
        text_config=LLAMA | {"model_type": "gemma3_text", "vocab_size": 262_208},
    )

    assert {"sampler", "vision inputs"} <= names(weighed(gemma))
    assert "vision encoder" not in names(weighed(gemma))


def test_tiles_and_pinpoints_count_as_pictures() -> None:
    tower = {"hidden_size": 1152, "num_hidden_layers": 27, "image_size": 384, "patch_size": 14}
    tiled = vision(tower, model_type="llava_next", image_grid_pinpoints=[[384, 768], [1536, 1536]])
    arch = size_model(spec(tiled), LIMITS).architecture
    assert arch.vision is not None

    assert arch.vision.patches_per_item == 27**2 * 17


PRODUCTS = load_catalogue()


def speed_on(product: str, profile: str, **workload: int) -> Any:
    limits = EngineLimits(max_model_len=8192, max_num_seqs=16, max_num_batched_tokens=2048)
    sized = size_model(spec(LLAMA), limits)
    chip = PRODUCTS.product(product)
    part = chip.profile(profile)
    assert part.memory_bytes is not None
    got = fit(spec(LLAMA), sized.footprint, limits, memory_bytes=part.memory_bytes, profile=profile)
    roof = slice_roof(chip, part)
    assert roof is not None
    return sized, limits, got, roof


def test_decode_goes_by_memory_slices_and_prefill_by_sms() -> None:
    double = estimate_speed(*speed_on("h100-sxm", "1g.20gb"), prompt_tokens=2000, output_tokens=100)
    two = estimate_speed(*speed_on("h100-sxm", "2g.20gb"), prompt_tokens=2000, output_tokens=100)

    assert double.bound_by == "memory"
    assert double.itl_seconds == pytest.approx(two.itl_seconds)  # 2 of 8 memory slices each
    assert double.ttft_seconds > two.ttft_seconds  # 26 SMs against 32
    assert two.ttft_seconds == pytest.approx(double.ttft_seconds * 26 / 32, rel=0.05)


def test_peaks_that_nobody_published_give_no_estimate() -> None:
    chip = PRODUCTS.product("b300")

    assert slice_roof(chip, chip.profiles[0]) is None


def test_fp8_doubles_the_compute_where_there_are_fp8_tensor_cores() -> None:
    chip = PRODUCTS.product("h100-sxm")
    plain, packed = slice_roof(chip, chip.profiles[0]), slice_roof(chip, chip.profiles[0], fp8=True)
    assert plain is not None
    assert packed is not None

    assert packed.flops_per_second == 2 * plain.flops_per_second


def test_replicas_follow_from_a_demand_and_its_latencies() -> None:
    where = speed_on("h100-sxm", "3g.40gb")
    one = replicas_for(*where, Demand(1.0, 800, 200))
    many = replicas_for(*where, Demand(20.0, 800, 200))
    assert one is not None
    assert many is not None

    assert one < many
    assert many == pytest.approx(
        20 / (1 / 1), abs=20
    )  # at least linear in the demand, never more replicas than requests
    strict = replicas_for(*where, Demand(20.0, 800, 200, itl_slo_seconds=0.02))
    assert strict is not None
    assert strict >= many
    assert replicas_for(*where, Demand(20.0, 800, 200, itl_slo_seconds=0.001)) is None
    assert replicas_for(*where, Demand(20.0, 8000, 100, ttft_slo_seconds=0.01)) is None


def test_the_batch_shrinks_until_the_latency_holds() -> None:
    where = speed_on("h100-sxm", "3g.40gb")
    free = best_batch(*where, Demand(1.0, 800, 200))
    held = best_batch(*where, Demand(1.0, 800, 200, itl_slo_seconds=0.016))
    assert free is not None
    assert held is not None

    assert held.batch < free.batch
    assert held.itl_seconds < 0.016


def test_a_count_of_layers_that_no_model_has_is_refused() -> None:
    with pytest.raises(ModelUnreadable, match="4,000,000,000 layers"):
        _ = Dimensions({"model_type": "llama", "num_hidden_layers": 4_000_000_000}).layers
