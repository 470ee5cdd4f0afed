"""The state that a recurrent layer keeps per sequence, by kind of layer.

Shapes as in vLLM's `MambaStateShapeCalculator` (`model_executor/layers/mamba/mamba_utils.py`): every one is a
convolution's last `kernel - 1` inputs and a recurrent matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from model_registry.sizing.architecture import StateCache, StateKind
from model_registry.sizing.dimensions import Dimensions


def _mamba1(d: Dimensions) -> StateCache:
    """Mamba: `inner` channels, each with `state` numbers."""
    inner = d.count("intermediate_size") if d.model_type in ("mamba", "falcon_mamba") else 0
    inner = inner or _expand(d) * d.size("hidden_size")
    state = d.count("state_size") or d.size("mamba_d_state")
    kernel = d.count("conv_kernel") or d.size("mamba_d_conv")
    return StateCache("mamba1", inner * (kernel - 1), inner * state)


def _expand(d: Dimensions) -> int:
    return d.count("mamba_expand") or d.count("expand") or 2


def _mamba2(d: Dimensions) -> StateCache:
    """Mamba-2: `heads` x `width` channels with `state` numbers each; B and C of every group pass the convolution, too."""
    heads = _first(d, "mamba_num_heads", "mamba_n_heads", "n_mamba_heads", "num_heads")
    state = _first(d, "ssm_state_size", "mamba_d_state", "state_size")
    kernel = _first(d, "conv_kernel", "mamba_d_conv")
    groups = _first(d, "n_groups", "mamba_n_groups", "mamba_ngroups")
    if d.model_type == "nemotron_h":
        inner = heads * d.size("mamba_head_dim")
    else:
        inner = d.count("mamba_d_ssm") or _expand(d) * d.size("hidden_size")
    # Only the pure Mamba-2 model calls the width of its heads `head_dim`; in hybrids that key belongs to attention.
    own = ("head_dim",) if d.model_type == "mamba2" else ("mamba_head_dim", "mamba_d_head", "mamba_headdim")
    width = next((w for key in own if (w := d.count(key))), inner // heads)
    # Nemotron-H stores its state in float32 unless the checkpoint says otherwise; other families follow the model's dtype.
    dtype = str(d.get("mamba_ssm_cache_dtype") or "float32") if d.model_type == "nemotron_h" else "auto"
    return StateCache("mamba2", (inner + 2 * groups * state) * (kernel - 1), heads * width * state, dtype)


def _first(d: Dimensions, *keys: str) -> int:
    """The first of `keys` that is set; ModelUnreadable names the usual one where none is."""
    return next((value for key in keys if (value := d.count(key))), 0) or d.size(keys[0])


def _gated_delta(d: Dimensions) -> StateCache:
    """Gated delta networks: a `value x key` matrix per value head; queries, keys and values pass the convolution."""
    key_heads, value_heads = d.size("linear_num_key_heads"), d.size("linear_num_value_heads")
    key_dim, value_dim = d.size("linear_key_head_dim"), d.size("linear_value_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return StateCache(
        "gated_delta",
        channels * (d.size("linear_conv_kernel_dim") - 1),
        value_heads * value_dim * key_dim,
        str(d.get("mamba_ssm_dtype") or "auto"),
    )


def _kimi_delta(d: Dimensions) -> StateCache:
    """Kimi delta attention: as gated delta, the matrix always in float32."""
    linear = d.get("linear_attn_config") or {}
    heads = int(linear.get("num_heads") or d.heads)
    width = int(linear.get("head_dim") or d.head_dim)
    kernel = int(linear.get("short_conv_kernel_size") or 4)
    return StateCache("kimi_delta", 3 * heads * width * (kernel - 1), heads * width * width, "float32")


def _short_conv(d: Dimensions) -> StateCache:
    """LFM2: nothing but the convolution."""
    channels = d.count("conv_dim") or d.size("hidden_size")
    return StateCache("short_conv", channels * (d.size("conv_L_cache") - 1), 0)


_KINDS: dict[StateKind, Callable[[Dimensions], StateCache]] = {
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "gated_delta": _gated_delta,
    "kimi_delta": _kimi_delta,
    "short_conv": _short_conv,
}


def recurrent_state(kind: StateKind, d: Dimensions) -> StateCache:
    """The state of one layer of `kind`; ModelUnreadable names a dimension that the configuration lacks."""
    return _KINDS[kind](d)
