"""What a vision tower adds: the tokens of its largest image, and the patches its encoder works on at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_registry.sizing.architecture import Vision

_DYNAMIC_TOKENS = 16_384
"""Tokens of the largest image that Qwen's image processors accept (12,845,056 pixels of 28 x 28)."""


def _fixed_tokens(config: Mapping[str, Any], vision: Mapping[str, Any]) -> int | None:
    """Tokens of one image where the model resizes every image to one size."""
    for section, key in (
        (config, "mm_tokens_per_image"),
        (config, "vision_soft_tokens_per_image"),
        (vision, "default_output_length"),
    ):
        value = section.get(key)
        if isinstance(value, int) and value > 0:
            return value
    size, patch = vision.get("image_size"), vision.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int) and patch > 0:
        return (size // patch) ** 2
    return None


def read_vision(config: Mapping[str, Any]) -> Vision | None:
    """The vision tower of a multimodal configuration; None for text models."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return None
    hidden = int(vision.get("hidden_size") or vision.get("embed_dim") or vision.get("width") or 1024)
    merge = int(vision.get("spatial_merge_size") or (vision.get("merge_kernel_size") or [1])[0] or 1)
    tokens = _fixed_tokens(config, vision) or _DYNAMIC_TOKENS
    size, patch = vision.get("image_size"), vision.get("patch_size")
    patches = (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) and patch else tokens * merge**2
    return Vision(
        hidden_size=hidden,
        intermediate_size=int(vision.get("intermediate_size") or 4 * hidden),
        layers=int(vision.get("num_hidden_layers") or vision.get("depth") or 24),
        tokens_per_image=tokens,
        patches_per_image=patches,
    )
