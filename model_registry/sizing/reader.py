"""`config.json` -> `Architecture`."""

from __future__ import annotations

from model_registry.errors import ModelUnreadable
from model_registry.sizing.allocation import fused_matrices
from model_registry.sizing.architecture import Architecture, Experts
from model_registry.sizing.dimensions import Config, Dimensions
from model_registry.sizing.families import ENCODERS, LAYOUTS, full, refusal
from model_registry.sizing.parameters import count_parameters, mlp_matrices
from model_registry.sizing.rope import context_limit, rope_tables
from model_registry.sizing.vision import read_vision


def read_architecture(config: Config) -> Architecture:
    """Everything sizing needs to know of a model, from its parsed `config.json`.

    Raises ModelUnreadable where a dimension is missing that no family default supplies. An architecture that is not in
    the table of families is read as full attention in every layer, `known` is False and `notes` says so.
    """
    d = Dimensions(config)
    if not d.model_type and not config.get("architectures"):
        raise ModelUnreadable(
            "config.json names neither a model_type nor an architecture",
            remedy="Point at the config.json of a transformers model, or at a GGUF file.",
        )
    layout = LAYOUTS.get(d.model_type)
    notes = () if layout else (_unknown_note(d),)
    encoder = d.model_type in ENCODERS
    names = config.get("architectures") or ()
    caches, experts, tied = (layout or full)(d), _experts(d), _tied(d)
    return Architecture(
        name=str(names[0]) if names else d.model_type,
        model_type=d.model_type,
        known=layout is not None,
        hidden_size=d.size("hidden_size"),
        layers=d.layers,
        heads=d.heads,
        kv_heads=d.kv_heads,
        head_dim=d.head_dim,
        intermediate_size=_intermediate_size(d),
        vocab_size=d.size("vocab_size"),
        max_positions=context_limit(d),
        dtype=_dtype(d),
        tie_embeddings=tied,
        caches=caches,
        parameters=count_parameters(d, caches, experts, tied=tied, encoder=encoder),
        matrices=fused_matrices(d, caches, experts, gated=mlp_matrices(d) > 2, tied=tied or encoder),
        pooling=encoder,
        encoder_only=encoder,
        experts=experts,
        latent=d.latent,
        rope=rope_tables(d),
        vision=read_vision(config),
        mamba_chunk=d.count("mamba_chunk_size") or d.count("chunk_size") or None,
        notes=notes,
        refusal=refusal(d),
    )


def _unknown_note(d: Dimensions) -> str:
    return (
        f"The architecture {d.model_type or d.whole.get('architectures')!r} is not in the table of families: every layer "
        "is taken for full attention and a fifth is added to the activation peak, an upper bound."
    )


def _dtype(d: Dimensions) -> str:
    """The checkpoint's dtype as the configuration names it; float32 where it is silent, as vLLM reads it."""
    vision = d.whole.get("vision_config")
    for section in (d.whole, d.text, vision if isinstance(vision, dict) else {}):
        value = section.get("dtype") or section.get("torch_dtype")
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return "float32"


def _tied(d: Dimensions) -> bool:
    """Whether the output projection is the embedding table; the outer value counts in multimodal models."""
    value = d.whole.get("tie_word_embeddings", d.get("tie_word_embeddings"))
    return bool(value) if value is not None else False


def _intermediate_size(d: Dimensions) -> int:
    """The dense MLP's width: four times the hidden size where the configuration is silent (GPT-2, OPT, Bloom), 0 in Mamba."""
    if width := d.count("intermediate_size_mlp") or d.count("intermediate_size"):
        return width
    if d.count("num_experts") or not d.heads:
        return 0
    return 4 * d.size("hidden_size")


def _experts(d: Dimensions) -> Experts | None:
    """The mixture of experts, under the names that the families use for it."""
    count = (
        d.count("num_experts")
        or d.count("n_routed_experts")
        or d.count("num_local_experts")
        or d.count("moe_num_experts")
    )
    layers = moe_layers(d)
    if not count or not layers or (d.model_type.startswith("gemma4") and not d.get("enable_moe_block")):
        return None
    width = d.count("moe_intermediate_size") or d.count("intermediate_size")
    per_token = (
        d.count("num_experts_per_tok")
        or d.count("experts_per_token")
        or d.count("top_k_experts")
        or d.count("moe_top_k")
        or 1
    )
    return Experts(count, per_token, width, layers, _shared_width(d, width))


def _shared_width(d: Dimensions, width: int) -> int:
    """The width of the experts that every token passes."""
    for key in ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"):
        if shared := d.count(key):
            return shared
    if d.model_type.startswith("llama4"):
        return width
    return d.count("n_shared_experts") * width


def moe_layers(d: Dimensions) -> int:
    """How many layers hold experts."""
    if pattern := d.get("hybrid_override_pattern"):
        return str(pattern).count("E")
    if types := d.get("layers_block_type"):
        return sum(t == "moe" for t in types)
    frequency = d.get("moe_layer_freq")
    if isinstance(frequency, list):
        return sum(bool(f) for f in frequency)
    if period := d.count("expert_layer_period"):
        return sum(i % period == d.count("expert_layer_offset") for i in range(d.layers))
    if d.model_type.startswith("llama4"):
        listed = d.get("moe_layers")
        return len(listed) if listed else d.layers // (d.count("interleave_moe_layer_step") or 1)
    step, dense = d.count("decoder_sparse_step") or 1, set(d.get("mlp_only_layers") or ())
    first = d.count("first_k_dense_replace")
    return sum(i >= first and i not in dense and (i + 1) % step == 0 for i in range(d.layers))
