"""How many parameters a model has, and in which of its parts, from the architecture alone.

The split matters because quantisation leaves some parts in 16 bits: embeddings, output projection, router, norms and the
vision tower. Where a weights index is at hand its bytes are used; then only the shares come from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model_registry.sizing.architecture import (
    AttentionCache,
    Experts,
    LatentAttention,
    LayerCache,
    Parameters,
    StateCache,
)
from model_registry.sizing.dimensions import Dimensions

_PLAIN_MLP = frozenset(
    [
        "phi",
        "gpt2",
        "gptj",
        "gpt_neox",
        "opt",
        "bloom",
        "falcon",
        "starcoder2",
        "nemotron",
        "nemotron_h",
        "bert",
        "roberta",
        "xlm-roberta",
        "electra",
        "camembert",
    ]
)
"""Families whose MLP has two matrices; the others gate it with a third."""
_QKV_BIAS = frozenset(["qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_vl", "qwen2_5_vl"])
_ALL_BIAS = frozenset(
    [
        "phi",
        "gpt2",
        "gptj",
        "gpt_neox",
        "opt",
        "bloom",
        "starcoder2",
        "bert",
        "roberta",
        "xlm-roberta",
        "electra",
        "camembert",
    ]
)
_ENCODER_POOLER = frozenset(["bert", "roberta", "xlm-roberta", "camembert"])


def count_parameters(
    d: Dimensions, caches: Sequence[LayerCache], experts: Experts | None, *, tied: bool, encoder: bool
) -> Parameters:
    """The parameters of the model that `d` describes, whose layers keep `caches`."""
    hidden, vocab = d.size("hidden_size"), d.size("vocab_size")
    matrices = mlp_matrices(d)
    linear = _attention(d, caches, encoder=encoder) + _states(d, caches) + _dense_mlp(d, experts)
    if experts:
        linear += experts.layers * matrices * hidden * experts.shared_intermediate_size
    if encoder and d.model_type in _ENCODER_POOLER:
        linear += hidden * hidden
    expert_total = experts.layers * experts.count * matrices * hidden * experts.intermediate_size if experts else 0
    return Parameters(
        embedding=vocab * hidden + _extra_embeddings(d, encoder=encoder),
        output=0 if tied or encoder else vocab * hidden,
        linear=linear,
        experts=expert_total,
        router=experts.layers * experts.count * hidden if experts else 0,
        other=_norms_and_biases(d, experts),
        vision=_vision(d.whole.get("vision_config"), hidden),
        drafter=_drafter(d, linear + expert_total),
    )


def mlp_matrices(d: Dimensions) -> int:
    """Three where the MLP is gated, else two."""
    return 2 if d.model_type in _PLAIN_MLP else 3


def _attention(d: Dimensions, caches: Sequence[LayerCache], *, encoder: bool) -> int:
    """Query, key, value and output projections of every attention layer, cache or none."""
    hidden = d.size("hidden_size")
    latent = d.latent
    if latent:
        layers = sum(isinstance(c, AttentionCache) and not c.element_bytes for c in caches)
        return layers * (_latent_projections(latent, hidden, d.heads) + _indexer(d))
    if encoder:
        return d.layers * 4 * hidden * hidden
    gate = 2 if d.get("attn_output_gate") or d.model_type.startswith("qwen3_next") else 1
    own = [c for c in caches if isinstance(c, AttentionCache)]
    total = sum(_projections(c, hidden, d.heads, gate) for c in own)
    # Layers that read an earlier layer's cache keep their query and output projections (vLLM's Gemma 3n keeps all four).
    shared = d.count("num_kv_shared_layers")
    return (
        total
        + shared * hidden * d.head_dim * 2 * d.heads
        + (shared * 2 * hidden * d.kv_heads * d.head_dim if "gemma3n" in d.model_type else 0)
    )


def _projections(cache: AttentionCache, hidden: int, heads: int, gate: int) -> int:
    query = hidden * heads * cache.key_dim * gate
    return query + hidden * cache.kv_heads * (cache.key_dim + cache.value_dim) + heads * cache.value_dim * hidden


def _latent_projections(latent: LatentAttention, hidden: int, heads: int) -> int:
    width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    rank = latent.q_lora_rank
    query = hidden * rank + rank * heads * width if rank else hidden * heads * width
    down = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim)
    up = latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return query + down + up + heads * latent.v_head_dim * hidden


def _indexer(d: Dimensions) -> int:
    """The sparse-attention indexer of DeepSeek-V3.2."""
    width, heads = d.count("index_head_dim"), d.count("index_n_heads")
    return width * heads * d.count("q_lora_rank") + d.size("hidden_size") * (width + heads) if width else 0


def _dense_mlp(d: Dimensions, experts: Experts | None) -> int:
    """The MLPs of the layers that have no experts (Gemma 4 has a dense MLP beside them)."""
    hidden, matrices = d.size("hidden_size"), mlp_matrices(d)
    widths = d.get("intermediate_size")
    if isinstance(widths, list):
        return sum(matrices * hidden * int(w) for w in widths[: d.layers])
    pattern = d.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return pattern.count("-") * matrices * hidden * d.count("intermediate_size")
    if types := d.get("layers_block_type"):
        return sum(str(t) == "mlp" for t in types) * matrices * hidden * d.count("intermediate_size")
    width = d.count("intermediate_size_mlp") or d.count("intermediate_size") or (4 * hidden if d.heads else 0)
    if d.model_type in ("mamba", "mamba2", "falcon_mamba") or (d.model_type == "granitemoehybrid" and experts):
        return 0
    layers = d.layers if d.model_type.startswith("gemma4") or not experts else d.layers - experts.layers
    shared = d.count("num_kv_shared_layers") if d.get("use_double_wide_mlp") else 0
    return (layers + shared) * matrices * hidden * width


def _states(d: Dimensions, caches: Sequence[LayerCache]) -> int:
    return sum(_state(d, c) for c in caches if isinstance(c, StateCache))


def _state(d: Dimensions, cache: StateCache) -> int:
    """Projections, convolution and recurrent parameters of one recurrent layer."""
    hidden = d.size("hidden_size")
    if cache.kind == "mamba1":
        return _mamba1(d, hidden)
    if cache.kind == "mamba2":
        return _mamba2(d, cache, hidden)
    if cache.kind == "gated_delta":
        values = d.size("linear_num_value_heads") * d.size("linear_value_head_dim")
        keys = d.size("linear_num_key_heads") * d.size("linear_key_head_dim")
        kernel = d.size("linear_conv_kernel_dim")
        projections = hidden * (2 * keys + 2 * values + 2 * d.size("linear_num_value_heads")) + values * hidden
        return projections + (2 * keys + values) * kernel
    if cache.kind == "short_conv":
        return 4 * hidden * hidden + hidden * d.size("conv_L_cache")
    # Kimi delta attention: queries, keys, values and output, and two low-rank gates.
    width = cache.conv_elements // 9
    return 4 * hidden * width + 2 * (hidden * 128 + 128 * width)


def _mamba1(d: Dimensions, hidden: int) -> int:
    inner = d.count("intermediate_size") if d.model_type in ("mamba", "falcon_mamba") else 0
    inner = inner or (d.count("mamba_expand") or d.count("expand") or 2) * hidden
    state = d.count("state_size") or d.count("mamba_d_state")
    rank = d.count("time_step_rank") or d.count("mamba_dt_rank") or -(-hidden // 16)
    kernel = d.count("conv_kernel") or d.count("mamba_d_conv")
    return hidden * 2 * inner + inner * (kernel + rank + 2 * state + rank + state + 3) + inner * hidden


def _mamba2(d: Dimensions, cache: StateCache, hidden: int) -> int:
    kernel = d.count("conv_kernel") or d.count("mamba_d_conv") or 4
    state = d.count("ssm_state_size") or d.count("mamba_d_state") or d.count("state_size")
    channels = cache.conv_elements // max(kernel - 1, 1)
    inner = cache.state_elements // state
    heads = d.count("mamba_num_heads") or d.count("mamba_n_heads") or d.count("num_heads") or d.count("n_mamba_heads")
    return hidden * (inner + channels + heads) + channels * (kernel + 1) + inner * hidden + 3 * heads + inner


def _extra_embeddings(d: Dimensions, *, encoder: bool) -> int:
    """Learned positions and token types of encoders, and Gemma's per-layer tables with their projections."""
    hidden = d.size("hidden_size")
    extra = 0
    if encoder or d.model_type in ("gpt2", "opt"):
        rotary = d.model_type in ("modernbert", "nomic_bert", "new", "gte")
        extra += 0 if rotary else (d.count("max_position_embeddings") + d.count("type_vocab_size")) * hidden
    if width := d.count("hidden_size_per_layer_input"):
        extra += d.count("vocab_size_per_layer_input") * d.layers * width
        extra += hidden * d.layers * width + 2 * d.layers * hidden * width
    if rank := d.count("laurel_rank"):
        extra += d.layers * 2 * hidden * rank + 6 * hidden * hidden
    return extra


def _norms_and_biases(d: Dimensions, experts: Experts | None) -> int:
    hidden, layers = d.size("hidden_size"), d.layers
    norms = (4 if d.model_type.startswith(("gemma2", "gemma3", "gemma4")) else 2) * layers * hidden + hidden
    query, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    if d.model_type in _ALL_BIAS:
        width = d.count("intermediate_size") or 4 * hidden
        return norms * 2 + layers * (query + 2 * keys + 2 * hidden + width)
    if d.model_type in _QKV_BIAS or d.get("attention_bias"):
        norms += layers * (query + 2 * keys)
    if d.get("attention_bias") and d.model_type == "gpt_oss":
        norms += layers * (hidden + d.heads)
        norms += experts.layers * experts.count * (2 * experts.intermediate_size + hidden) if experts else 0
    return norms


def _vision(vision: Any, text_hidden: int) -> int:
    """An encoder of that depth and width, its patch embedding, and two layers into the language model."""
    if not isinstance(vision, Mapping):
        return 0
    hidden = int(vision.get("hidden_size") or vision.get("embed_dim") or vision.get("width") or 1024)
    inner = int(vision.get("intermediate_size") or 4 * hidden)
    layers = int(vision.get("num_hidden_layers") or vision.get("depth") or 24)
    patch = int(vision.get("patch_size") or 14)
    merge = int(vision.get("spatial_merge_size") or 1)
    gated = vision.get("hidden_act") == "silu"
    merged = hidden * merge**2
    into_text = merged * merged + merged * text_hidden if merge > 1 else hidden * text_hidden
    positions = int(vision.get("num_position_embeddings") or 0) or (int(vision.get("image_size") or 0) // patch) ** 2
    mergers = 1 + len(vision.get("deepstack_visual_indexes") or ())
    return (
        layers * (4 * hidden * hidden + (3 if gated else 2) * hidden * inner + 4 * hidden)
        + 3 * patch * patch * hidden * int(vision.get("temporal_patch_size") or 1)
        + positions * hidden
        + mergers * into_text
    )


def _drafter(d: Dimensions, blocks: int) -> int:
    """Layers for multi-token prediction that a checkpoint carries and the engine leaves on disk, at an average layer's size."""
    drafted = d.count("num_nextn_predict_layers") or d.count("mtp_num_hidden_layers")
    return blocks // d.layers * drafted
