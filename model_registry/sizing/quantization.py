"""Bits per parameter in each part of a model, by quantisation method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_registry.sizing.architecture import Parameters

_GROUP = 128


@dataclass(frozen=True, slots=True)
class StoredBits:
    """Bits per element: of quantised matrices, of experts, and of what stays as it was."""

    linear: float
    experts: float
    rest: float
    output: float

    def bytes_of(self, parameters: Parameters) -> int:
        """The bytes of a whole model."""
        p = parameters
        rest = p.embedding + p.router + p.other + p.vision
        return int((p.linear * self.linear + p.experts * self.experts + p.output * self.output + rest * self.rest) / 8)


def _grouped(bits: float, group: int, zero_points: bool) -> float:
    """Bits of integer formats: the value, a 16-bit scale for each group, and its zero point."""
    size = group if group > 0 else 4096
    return bits + 16 / size + (bits / size if zero_points else 0)


def _compressed(config: Mapping[str, Any]) -> float:
    """compressed-tensors: the widest of its groups' weight formats."""
    bits = [_compressed_group(g) for g in (config.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    return max(bits, default=16.0)


def _compressed_group(group: Mapping[str, Any]) -> float:
    weights = group.get("weights") or {}
    width = float(weights.get("num_bits") or 16)
    if width == 4 and weights.get("type") == "float":
        return _grouped_float(int(weights.get("group_size") or 16))
    strategy = weights.get("strategy")
    if strategy == "group":
        return _grouped(width, int(weights.get("group_size") or _GROUP), not weights.get("symmetric", True))
    return width


def _grouped_float(group: int) -> float:
    """4-bit floats with an 8-bit scale for each group: 4.5 for NVFP4's 16, 4.25 for MXFP4's 32."""
    return 4 + 8 / group


def quantised_bits(config: Mapping[str, Any] | None, method: str | None) -> float | None:
    """Bits per quantised element under `method`; None where nothing is quantised or the method is not known."""
    name = (method or "").lower().replace("_", "-")
    own = config or {}
    if name in ("compressed-tensors", "compressed-tensors-w4a16"):
        return _compressed(own)
    if name in ("awq", "awq-marlin", "auto-awq", "gptq", "gptq-marlin", "auto-gptq", "moe-wna16", "inc"):
        bits = float(own.get("bits") or own.get("w_bit") or 4)
        symmetric = bool(own.get("sym", name.startswith("gptq") or name == "auto-gptq")) and not own.get("zero_point")
        return _grouped(bits, int(own.get("group_size") or own.get("q_group_size") or _GROUP), not symmetric)
    if name == "bitsandbytes":
        return 8.0 if own.get("load_in_8bit") else 4.5
    if name in (
        "fp8",
        "fbgemm-fp8",
        "fp8-per-tensor",
        "fp8-per-channel",
        "ptpc-fp8",
        "modelopt",
        "modelopt-fp8",
        "online",
    ):
        block = own.get("weight_block_size")
        return 8.0 + (32 / (block[0] * block[1]) if block else 0.0)
    if name in ("fp8-per-block",):
        return 8.0 + 32 / 128**2
    if name in ("experts-int8", "int8-per-channel-weight-only"):
        return 8.0
    if name in ("modelopt-fp4", "nvfp4", "nvfp4-per-token", "modelopt-mixed"):
        return _grouped_float(16)
    if name in ("mxfp4", "gpt-oss-mxfp4"):
        return _grouped_float(32)
    if name in ("mxfp8", "modelopt-mxfp8"):
        return 8.25
    return None


def stored_bits(config: Mapping[str, Any] | None, method: str | None, compute_bytes: int) -> StoredBits:
    """What each part of a model takes under a quantisation; a method that is not known counts as none."""
    plain = compute_bytes * 8.0
    bits = quantised_bits(config, method)
    if bits is None:
        return StoredBits(plain, plain, plain, plain)
    only_experts = (method or "").lower() in ("mxfp4", "gpt_oss_mxfp4", "experts_int8")
    output = bits if (config or {}).get("lm_head") is True else plain
    return StoredBits(plain if only_experts else bits, bits, plain, output)
