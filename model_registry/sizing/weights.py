"""What the weights take once they are loaded: the checkpoint's tensors, and what the engine adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_registry.model import EngineLimits, ModelSpec, TensorSummary, Term
from model_registry.sizing.allocation import rounding_bytes
from model_registry.sizing.architecture import Architecture
from model_registry.sizing.dtypes import COMPUTE_BYTES
from model_registry.sizing.quantization import quantised_bits, stored_bits
from model_registry.sizing.units import round_up
from model_registry.sizing.versions import EngineRules

_MXFP4_BITS = 4.25
_MXFP4_INTERMEDIATE_STEP = 128
_MXFP4_HIDDEN_STEP = 256
_MXFP4 = ("mxfp4", "gpt_oss_mxfp4")
_WITHOUT_GGUF = (0, 24, 0)


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes on one GPU, in their parts. `exact`: read from the files, not derived from the architecture."""

    terms: tuple[Term, ...]
    exact: bool
    assumptions: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """The sum of the parts."""
        return sum(t.bytes for t in self.terms)


def weigh_weights(
    spec: ModelSpec, arch: Architecture, limits: EngineLimits, rules: EngineRules, compute_bytes: int
) -> Weights:
    """The weights of `spec` as the engine of `limits` holds them on one GPU."""
    method = quantization_method(spec, limits)
    tensors, exact, assumptions = _tensors(spec, arch, limits, rules, compute_bytes, method)
    tp = limits.tensor_parallel_size
    terms = [Term("tensors", tensors // tp, "tensors of the checkpoint" if exact else "parameters of the architecture")]
    if rope := sum(t.positions * t.rotary_dim for t in arch.rope) * compute_bytes:
        terms.append(Term("rotary tables", rope, "cosines and sines for every position"))
    if absorbed := _absorbed(arch, compute_bytes) // tp:
        terms.append(Term("absorbed projections", absorbed, "latent attention's up-projections, kept a second time"))
    if limits.device == "cuda":
        terms += _rounding(spec, arch, limits, compute_bytes, method)
    if padding := _mxfp4_padding(arch, method) // tp:
        terms.append(Term("kernel padding", padding, "mxfp4 expert matrices rounded up to the kernels' tiles"))
    return Weights(tuple(terms), exact, assumptions)


def _rounding(
    spec: ModelSpec, arch: Architecture, limits: EngineLimits, compute_bytes: int, method: str | None
) -> list[Term]:
    bits = stored_bits(spec.quant_config, method, compute_bytes)
    by_part = {"linear": bits.linear, "experts": bits.experts, "output": bits.output, "rest": bits.rest}
    lost = rounding_bytes(arch.matrices, bits=by_part, tp=limits.tensor_parallel_size)
    return [Term("allocator rounding", lost, "large matrices, rounded up to the allocator's steps")] if lost else []


def quantization_method(spec: ModelSpec, limits: EngineLimits) -> str | None:
    """The quantisation in force: the checkpoint's own, else the one applied while loading."""
    own = str((spec.quant_config or {}).get("quant_method") or "")
    return own or limits.quantization


def _tensors(
    spec: ModelSpec,
    arch: Architecture,
    limits: EngineLimits,
    rules: EngineRules,
    compute_bytes: int,
    method: str | None,
) -> tuple[int, bool, tuple[str, ...]]:
    if spec.tensors is None:
        bits = stored_bits(spec.quant_config, method, compute_bytes)
        derived = ["No weights index: weights are derived from the architecture."]
        if method and quantised_bits(spec.quant_config, method) is None:
            derived.append(f"The quantisation {method!r} is not known; weights are sized as not quantised.")
        return bits.bytes_of(arch.parameters), False, tuple(derived)
    notes: tuple[str, ...] = ()
    if method == "gguf" and rules.version >= _WITHOUT_GGUF:
        converted = sum(spec.tensors.elements_by_dtype.values()) * compute_bytes
        return (
            converted,
            True,
            ("vLLM reads no GGUF since 0.24: the file is sized as converted to the computation's dtype.",),
        )
    stored = _loaded(spec.tensors, spec.quant_config, arch, compute_bytes)
    if limits.quantization and not spec.quant_config:
        plain = stored_bits(None, None, compute_bytes)
        bits = stored_bits(None, limits.quantization, compute_bytes)
        share = bits.bytes_of(arch.parameters) / plain.bytes_of(arch.parameters)
        stored = int(stored * share)
        notes = (
            f"{limits.quantization} is applied while loading; the share of quantised weights is the architecture's.",
        )
    return stored, spec.tensors.exact, notes


def _loaded(
    tensors: TensorSummary, quant_config: Mapping[str, Any] | None, arch: Architecture, compute_bytes: int
) -> int:
    """Checkpoint bytes as they lie on the device: floats in the dtype of the computation, everything else as stored.

    Quantised checkpoints keep their scales in float32, so nothing of theirs is converted. A summary that knows no dtypes
    is taken to be in the checkpoint's own throughout.
    """
    if quant_config:
        return tensors.total_bytes
    if not tensors.elements_by_dtype:
        return tensors.total_bytes * compute_bytes // COMPUTE_BYTES.get(arch.dtype, compute_bytes)
    total = tensors.total_bytes
    for dtype, width in (("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2)):
        total += tensors.elements_by_dtype.get(dtype, 0) * (compute_bytes - width)
    return total


def _absorbed(arch: Architecture, compute_bytes: int) -> int:
    latent = arch.latent
    if latent is None:
        return 0
    return (
        arch.layers * arch.heads * (latent.qk_nope_head_dim + latent.v_head_dim) * latent.kv_lora_rank * compute_bytes
    )


def _mxfp4_padding(arch: Architecture, method: str | None) -> int:
    """Source: vLLM `fused_moe/oracle/mxfp4.py`: intermediate sizes up to 128, hidden sizes up to 256."""
    if method not in _MXFP4 or arch.experts is None:
        return 0
    width, hidden = arch.experts.intermediate_size, arch.hidden_size
    padded = round_up(width, _MXFP4_INTERMEDIATE_STEP) * round_up(hidden, _MXFP4_HIDDEN_STEP)
    return int(arch.parameters.experts * (padded / (width * hidden) - 1) * _MXFP4_BITS / 8)
