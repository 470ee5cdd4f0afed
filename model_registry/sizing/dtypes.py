"""Bytes per element: of weights as their checkpoint names them, of computations, and of KV caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from model_registry.errors import ConfigError

COMPUTE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "half": 2, "float": 4, "float32": 4}
"""vLLM's `--dtype` values but `auto`."""

STATE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""vLLM's `--mamba-ssm-cache-dtype` values but `auto`."""


def compute_dtype(asked: str, checkpoint: str, *, pooling: bool = False) -> str:
    """The dtype a model runs in. `auto` follows the checkpoint, and takes a float32 checkpoint down to 16 bits.

    Pooling models come down to float16, others to bfloat16 (vLLM `config/model.py`, `_resolve_auto_dtype`).
    """
    if asked == "auto":
        if checkpoint in ("bfloat16", "float16"):
            return checkpoint
        return "float16" if pooling else "bfloat16"
    if asked not in COMPUTE_BYTES:
        raise ConfigError(f"{asked!r} is no dtype", remedy=f"One of auto, {', '.join(sorted(COMPUTE_BYTES))}.")
    return {"half": "float16", "float": "float32"}.get(asked, asked)


def _per_head(width: Callable[[int], int]) -> Callable[[int, int, int], int]:
    return lambda key, value, _: width(key) + width(value)


def _nvfp4(dim: int) -> int:
    """Two elements to a byte, and an fp8 scale for each 16."""
    return dim // 2 + dim // 16


_HEAD_BYTES: Mapping[str, Callable[[int, int, int], int]] = {
    "auto": lambda key, value, compute: (key + value) * compute,
    "float16": lambda key, value, _: (key + value) * 2,
    "bfloat16": lambda key, value, _: (key + value) * 2,
    "fp8": lambda key, value, _: key + value,
    "fp8_e4m3": lambda key, value, _: key + value,
    "fp8_e5m2": lambda key, value, _: key + value,
    "fp8_inc": lambda key, value, _: key + value,
    # Keys and values of a head each carry one float32 scale per token.
    "fp8_per_token_head": lambda key, value, _: key + value + 8,
    "int8_per_token_head": lambda key, value, _: key + value + 8,
    "int4_per_token_head": lambda key, value, _: key // 2 + value // 2 + 8,
    "nvfp4": _per_head(_nvfp4),
    "nvfp4_4over6": _per_head(_nvfp4),
    # Opaque records of sparse MLA: latent, scales and rotary part of one token.
    "fp8_ds_mla": lambda *_: 656,
    "nvfp4_ds_mla": lambda *_: 352,
}
KV_DTYPES = tuple(_HEAD_BYTES)
"""The `--kv-cache-dtype` values whose layout is known."""

QUANTISED_KV = tuple(name for name in KV_DTYPES if name not in ("auto", "float16", "bfloat16"))


def kv_head_bytes(kv_dtype: str, key_dim: int, value_dim: int, compute_bytes: int) -> int:
    """Bytes of one head and one token, keys and values with their scales. ConfigError names the dtypes that are known.

    Source: vLLM's `customize_spec` of each attention backend (0.32.0).
    """
    if kv_dtype not in _HEAD_BYTES:
        raise ConfigError(
            f"{kv_dtype!r} is no KV cache dtype that sizing knows", remedy=f"One of {', '.join(KV_DTYPES)}."
        )
    return _HEAD_BYTES[kv_dtype](key_dim, value_dim, compute_bytes)


def resolved_kv_dtype(asked: str, quant_config: Mapping[str, Any] | None) -> str:
    """What `auto` means for a checkpoint: one made with ModelOpt for an fp8 or nvfp4 cache gets that cache."""
    if asked != "auto" or not quant_config:
        return asked
    inner = quant_config.get("quantization")
    section = inner if isinstance(inner, Mapping) else quant_config
    if "modelopt" not in str(
        quant_config.get("quant_method") or (quant_config.get("producer") or {}).get("name") or ""
    ):
        return asked
    scheme = section.get("kv_cache_scheme") or quant_config.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        bits = scheme.get("num_bits")
        return "fp8" if bits == 8 and scheme.get("dynamic") is False else "nvfp4" if bits == 4 else asked
    algorithm = str(section.get("kv_cache_quant_algo") or quant_config.get("kv_cache_quant_algo") or "").lower()
    return {"fp8": "fp8", "nvfp4": "nvfp4"}.get(algorithm, asked)
