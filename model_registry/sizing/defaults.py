"""The limits an engine gets where the operator names none."""

from __future__ import annotations

from typing import Literal

from model_registry.model import EngineLimits, ModelSpec
from model_registry.schema import ModelConfig
from model_registry.sizing.architecture import Architecture
from model_registry.sizing.reader import read_architecture

BATCHED_TOKENS = 2048
"""Tokens per step: vLLM's own value for small devices, which it does not find on a slice by itself."""


_UNKNOWN_LENGTH = 2048


def default_length(spec: ModelSpec, arch: Architecture) -> int:
    """The model's own length; 2,048 where its configuration names none, as vLLM has it."""
    return spec.max_context_tokens or arch.max_positions or _UNKNOWN_LENGTH


def step_tokens(arch: Architecture, max_model_len: int, max_num_seqs: int) -> int:
    """`max_num_batched_tokens` where nobody names it: 2,048, or as much as the model must take in one step.

    An encoder takes a whole text, a prefix language model a whole image or clip, every model a token per sequence.
    """
    text = max_model_len if arch.encoder_only else 0
    item = arch.vision.tokens_per_item if arch.vision and arch.vision.whole_items else 0
    return max(BATCHED_TOKENS, max_num_seqs, text, item)


def default_limits(
    model: ModelConfig, spec: ModelSpec, vllm_version: str, *, device: Literal["cuda", "cpu"] = "cuda"
) -> EngineLimits:
    """The limits of `model` with what it leaves out filled in from `spec`.

    `max_model_len` is the model's own limit, `max_num_batched_tokens` that of `step_tokens`.
    """
    arch = read_architecture(spec.config)
    length = model.max_model_len or default_length(spec, arch)
    tokens = model.max_num_batched_tokens or step_tokens(arch, length, model.max_num_seqs)
    return EngineLimits(
        max_model_len=length,
        max_num_seqs=model.max_num_seqs,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=model.gpu_memory_utilization,
        kv_cache_dtype=model.kv_cache_dtype,
        dtype=model.dtype,
        quantization=model.quantization,
        kv_cache_memory_bytes=model.kv_cache_memory,
        vllm_version=vllm_version,
        device=device,
    )
