"""What a vision tower adds: the largest picture or clip it takes, in tokens and in patches.

Source: the processing classes of vLLM's models (`get_mm_max_tokens_per_item`, 0.33.0). The engine profiles as many items of the
largest size as the token budget holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_registry.sizing.architecture import Vision

_QWEN_TOKENS = 16_384
"""Tokens of the largest image of Qwen's processors (12,845,056 pixels at 28 x 28 to a token)."""
_QWEN_CLIP_IMAGES = 7
"""A clip of Qwen 2 has up to 14 frames of that size, two to a token."""
_GEMMA4_CLIP_TOKENS = 32 * (70 + 2 + 6)
"""32 frames of 70 soft tokens, with begin, end and time tokens."""
_GEMMA4_POOLING = 9
_LLAMA4_TILES = 17
_FALLBACK_TOKENS = 4096
_PREFIX_LM = ("gemma3", "gemma4", "paligemma")


def read_vision(config: Mapping[str, Any]) -> Vision | None:
    """The vision tower of a multimodal configuration; None for text models."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return None
    kind = str(config.get("model_type") or "")
    hidden = _number(vision, "hidden_size", "embed_dim", "width") or 1024
    tokens, patches = _largest(kind, config, vision)
    text = config.get("text_config")
    return Vision(
        hidden_size=hidden,
        intermediate_size=_number(vision, "intermediate_size") or 4 * hidden,
        layers=_number(vision, "num_hidden_layers", "depth") or 24,
        tokens_per_item=tokens,
        patches_per_item=patches,
        patch_pixels=(_number(vision, "patch_size") or 14) ** 2 * 3 * (_number(vision, "temporal_patch_size") or 1),
        clip_items=_QWEN_CLIP_IMAGES if kind.startswith(("qwen2_vl", "qwen2_5_vl")) else 1,
        whole_items=kind in _PREFIX_LM
        and (
            not kind.startswith("gemma4")
            or (isinstance(text, Mapping) and text.get("use_bidirectional_attention") == "vision")
        ),
    )


def _number(section: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = section.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _largest(kind: str, config: Mapping[str, Any], vision: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens and encoder patches of the largest item."""
    merge = (_number(vision, "spatial_merge_size", "merge_kernel_size") or 1) ** 2
    if kind.startswith("qwen"):
        return _QWEN_TOKENS, _QWEN_TOKENS * merge
    if kind.startswith("gemma4"):
        return _GEMMA4_CLIP_TOKENS, _GEMMA4_CLIP_TOKENS * _GEMMA4_POOLING
    size, patch = _number(vision, "image_size"), _number(vision, "patch_size")
    patches = (size // patch) ** 2 if size and patch else _FALLBACK_TOKENS * merge
    tiles = _tiles(kind, config, size)
    soft = _number(config, "mm_tokens_per_image", "image_seq_length")
    shuffle = float(vision.get("pixel_shuffle_ratio") or 1.0) ** 2
    return (soft or int(patches * shuffle) // merge) * tiles, patches * tiles


def _tiles(kind: str, config: Mapping[str, Any], size: int) -> int:
    """Pictures that one image is cut into: of the largest layout, and the whole as a thumbnail."""
    if kind.startswith("llama4"):
        return _LLAMA4_TILES
    layouts = config.get("image_grid_pinpoints")
    if isinstance(layouts, list) and size:
        return 1 + max((int(w) // size) * (int(h) // size) for w, h in layouts)
    return 1
