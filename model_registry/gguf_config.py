"""What a `config.json` would say, out of a GGUF header."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from model_registry.errors import ModelUnreadable
from model_registry.gguf_header import GgufHeader, Skipped
from model_registry.model import MOST_LAYERS

_ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "bert": ("bert", "BertModel"),
    "cohere2": ("cohere2", "Cohere2ForCausalLM"),
    "command-r": ("cohere", "CohereForCausalLM"),
    "deepseek2": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "falcon": ("falcon", "FalconForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gemma4": ("gemma4_text", "Gemma4ForCausalLM"),
    "glm4": ("glm4", "Glm4ForCausalLM"),
    "glm4moe": ("glm4_moe", "Glm4MoeForCausalLM"),
    "gpt-oss": ("gpt_oss", "GptOssForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "granite": ("granite", "GraniteForCausalLM"),
    "granitemoe": ("granitemoe", "GraniteMoeForCausalLM"),
    "lfm2": ("lfm2", "Lfm2ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "mamba": ("mamba", "MambaForCausalLM"),
    "minimax-m2": ("minimax_m2", "MiniMaxM2ForCausalLM"),
    "mistral3": ("mistral", "MistralForCausalLM"),
    "nemotron": ("nemotron", "NemotronForCausalLM"),
    "nomic-bert": ("nomic_bert", "NomicBertModel"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "phi2": ("phi", "PhiForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "stablelm": ("stablelm", "StableLmForCausalLM"),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM"),
}
"""llama.cpp's name of an architecture -> (`model_type`, the class that transformers and vLLM know it by)."""

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.inner_size": "intermediate_size",
    "ssm.time_step_rank": "time_step_rank",
    "shortconv.l_cache": "conv_L_cache",
}
_EXPERT_COUNT_KEYS = {
    "deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts", "glm4_moe": "n_routed_experts",
    "qwen2_moe": "num_experts", "qwen3_moe": "num_experts",
}  # fmt: skip
_FULL_ATTENTION_EVERY = {"gemma2": 2, "gemma3_text": 6, "gemma4_text": 6, "gpt_oss": 2, "cohere2": 4}
"""In these, every so-manieth layer attends to everything, the others within a sliding window."""

_SCALED = ("linear", "yarn", "longrope", "llama3")
_SIGMOID_GATE = 2  # `expert_gating_func`: what tells DeepSeek-V3 from V2, which share llama.cpp's name


def config_from(header: GgufHeader) -> dict[str, Any]:
    """The model's configuration under the keys of a `config.json`, as far as a GGUF header has them.

    Raises ModelUnreadable for an architecture that is not known, and for headers of what is no language model.
    """
    if header.metadata.get("general.type", "model") != "model" or not header.architecture:
        raise ModelUnreadable("this GGUF file holds no language model", where=str(header.path))
    model_type, architecture = _identity(header)
    config: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
    _check_layers(header)
    for key, name in _KEYS.items():
        value = header.get(key)
        if value is not None and not isinstance(value, Skipped):
            config[name] = value
    if experts := header.get("expert_count"):
        config[_EXPERT_COUNT_KEYS.get(model_type, "num_local_experts")] = experts
    config["vocab_size"] = _vocabulary(header)
    config["tie_word_embeddings"] = not header.has_tensor("output.weight")
    for adjust in _ADJUSTMENTS:
        adjust(config, header)
    _collapse_lists(config)
    return config


def _check_layers(header: GgufHeader) -> None:
    """A damaged count would have us list billions of layers."""
    layers = header.get("block_count")
    if layers is not None and not (isinstance(layers, int) and 0 <= layers <= MOST_LAYERS):
        raise ModelUnreadable(
            f"this GGUF file says that it has {layers!r} layers; no model has more than {MOST_LAYERS}",
            where=str(header.path),
            remedy="The file is damaged: fetch it again.",
        )


def _identity(header: GgufHeader) -> tuple[str, str]:
    name = header.architecture
    if name not in _ARCHITECTURES:
        raise ModelUnreadable(
            f"the GGUF architecture {name!r} is not known here",
            where=str(header.path),
            remedy="Name the original model's hub id or directory instead.",
        )
    if name == "llama" and header.get("expert_count"):
        return "mixtral", "MixtralForCausalLM"
    if name == "deepseek2" and header.get("expert_gating_func") == _SIGMOID_GATE:
        return "deepseek_v3", "DeepseekV3ForCausalLM"
    return _ARCHITECTURES[name]


def _vocabulary(header: GgufHeader) -> int:
    """The rows of the embedding table, which padding may make more than there are tokens."""
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and tensor.dimensions:
            return tensor.dimensions[-1]
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    return tokens.length if isinstance(tokens, Skipped) else len(tokens)


def _window(config: dict[str, Any], header: GgufHeader) -> None:
    every = _FULL_ATTENTION_EVERY.get(config["model_type"])
    layers = config.get("num_hidden_layers")
    pattern = header.get("attention.sliding_window_pattern")
    if not config.get("sliding_window"):
        config.pop("sliding_window", None)
    elif isinstance(pattern, list) and len(pattern) == layers:
        config["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    elif every and isinstance(layers, int):
        every = pattern if isinstance(pattern, int) and pattern > 0 else every
        config["layer_types"] = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def _rope(config: dict[str, Any], header: GgufHeader) -> None:
    kind = header.get("rope.scaling.type")
    if kind not in _SCALED:
        return
    original = header.get("rope.scaling.original_context_length")
    config["rope_scaling"] = {"rope_type": kind, "factor": header.get("rope.scaling.factor") or 1.0} | (
        {"original_max_position_embeddings": original} if original else {}
    )


def _latent_attention(config: dict[str, Any], header: GgufHeader) -> None:
    rank = header.get("attention.kv_lora_rank")
    if not rank:
        return
    rope = header.get("rope.dimension_count") or 0
    whole = header.get("attention.key_length_mla") or header.get("attention.key_length") or 0
    config.pop("head_dim", None)
    config.update(
        kv_lora_rank=rank,
        q_lora_rank=header.get("attention.q_lora_rank"),
        qk_rope_head_dim=rope,
        qk_nope_head_dim=whole - rope,
        v_head_dim=header.get("attention.value_length_mla") or header.get("attention.value_length"),
        num_key_value_heads=config.get("num_attention_heads"),
    )


_ADJUSTMENTS: tuple[Callable[[dict[str, Any], GgufHeader], None], ...] = (_window, _rope, _latent_attention)


def _collapse_lists(config: dict[str, Any]) -> None:
    """Values given per layer: the largest, which is what memory has to be there for; layers without one say 0."""
    for key, value in config.items():
        if isinstance(value, list) and key not in ("architectures", "layer_types"):
            config[key] = max((v for v in value if isinstance(v, (int, float))), default=0)
