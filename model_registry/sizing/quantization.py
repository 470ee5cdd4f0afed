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


def _grouped_float(group: int) -> float:
    """4-bit floats with an 8-bit scale for each group: 4.5 for NVFP4's 16, 4.25 for MXFP4's 32."""
    return 4 + 8 / group


_FIXED: Mapping[str, float] = {
    **dict.fromkeys(("fbgemm-fp8", "fp8-per-tensor", "fp8-per-channel", "ptpc-fp8", "modelopt-fp8", "online"), 8.0),
    **dict.fromkeys(("experts-int8", "int8-per-channel-weight-only"), 8.0),
    "fp8-per-block": 8.0 + 32 / 128**2,
    **dict.fromkeys(("modelopt-fp4", "nvfp4", "nvfp4-per-token", "modelopt-mixed"), _grouped_float(16)),
    **dict.fromkeys(("mxfp4", "gpt-oss-mxfp4"), _grouped_float(32)),
    **dict.fromkeys(("mxfp8", "modelopt-mxfp8"), 8.25),
}
_INTEGER = ("awq", "awq-marlin", "auto-awq", "gptq", "gptq-marlin", "auto-gptq", "moe-wna16", "inc")
_BLOCKS = ("fp8", "modelopt")
_ONLY_EXPERTS = ("mxfp4", "gpt-oss-mxfp4", "experts-int8")


def _group_bits(group: Mapping[str, Any]) -> float:
    """One group of compressed-tensors, or of ModelOpt, which writes the same shape."""
    weights = group.get("weights") or {}
    width = float(weights.get("num_bits") or 16)
    size = int(weights.get("group_size") or 0)
    if width == 4 and weights.get("type") == "float":
        return _grouped_float(size or 16)
    if weights.get("strategy") == "group" or (width == 4 and size):
        return _grouped(width, size or _GROUP, not weights.get("symmetric", True))
    return width


def _groups(config: Mapping[str, Any]) -> list[tuple[float, list[str]]]:
    """Bits and targets of each group that quantises weights."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        return []
    found = [g for g in groups.values() if isinstance(g, Mapping)]
    return [(_group_bits(g), [str(t) for t in g.get("targets") or ()]) for g in found]


def quantised_bits(config: Mapping[str, Any] | None, method: str | None) -> float | None:
    """Bits per quantised element under `method`, the widest where it mixes; None for no method, or one not known."""
    name, own = (method or "").lower().replace("_", "-"), config or {}
    if name and (groups := _groups(own)):
        return max(bits for bits, _ in groups)
    if name in _INTEGER:
        bits = float(own.get("bits") or own.get("w_bit") or 4)
        symmetric = bool(own.get("sym", "gptq" in name)) and not own.get("zero_point")
        return _grouped(bits, int(own.get("group_size") or own.get("q_group_size") or _GROUP), not symmetric)
    if name == "bitsandbytes":
        return 8.0 if own.get("load_in_8bit") else 4.5
    if name in _BLOCKS:
        block = own.get("weight_block_size")
        return 8.0 + (32 / (block[0] * block[1]) if block else 0.0)
    return _FIXED.get(name)


def stored_bits(config: Mapping[str, Any] | None, method: str | None, compute_bytes: int) -> StoredBits:
    """What each part of a model takes under a quantisation; a method that is not known counts as none.

    Embeddings, router, norms and vision tower stay as they are, the output projection unless it is named.
    """
    plain = compute_bytes * 8.0
    bits = quantised_bits(config, method)
    if bits is None:
        return StoredBits(plain, plain, plain, plain)
    groups = _groups(config or {})
    linear, experts = _widest(groups, "expert", inside=False), _widest(groups, "expert", inside=True)
    output = _widest(groups, "lm_head", inside=True) or (bits if (config or {}).get("lm_head") is True else plain)
    if (method or "").lower().replace("_", "-") in _ONLY_EXPERTS:
        linear = plain
    return StoredBits(linear or bits, experts or bits, plain, output)


def _widest(groups: list[tuple[float, list[str]]], word: str, *, inside: bool) -> float | None:
    """The widest group with a target that has `word` in its name, or with one that has it not; None where there is none."""
    return max((bits for bits, targets in groups if any((word in t) is inside for t in targets)), default=None)
