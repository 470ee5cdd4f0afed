"""Does a footprint fit a slice, what breaks first, and what does the engine get there?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from model_registry.model import EngineLimits, Footprint, ModelSpec, SliceFit
from model_registry.sizing.footprint import CUDA_CONTEXT_BYTES, weigh
from model_registry.sizing.units import gib

_NO_TENSOR_PARALLELISM = (
    "tensor parallelism needs GPUs that reach each other's memory; MIG slices do not (no peer access, and NCCL takes one "
    "rank per GPU), so a model runs on one slice or on whole GPUs"
)
_CONTEXT_SPARE = 0.002


@dataclass(frozen=True, slots=True)
class _Budget:
    """What the engine plans with: the share of memory it asks for, and the part that is left for the pool."""

    requested_bytes: int
    utilization: float
    available_bytes: int
    notes: tuple[str, ...] = ()


def fit(
    spec: ModelSpec,
    footprint: Footprint,
    limits: EngineLimits,
    *,
    memory_bytes: int,
    device: Literal["cuda", "cpu"] | None = None,
    product: str | None = None,
    profile: str | None = None,
) -> SliceFit:
    """How `spec` fits `memory_bytes` of device memory: the whole of the slice, CUDA's context included.

    Pure. `product` and `profile` are carried into the result; a `profile` means a MIG slice, where tensor parallelism is
    refused. `device` overrides that of `limits`; a footprint weighed for another device is weighed anew. Never `fits`
    where the engine would refuse to start, as far as the footprint is right to within its `margin_bytes`.
    """
    if device is not None and device != limits.device:
        limits = replace(limits, device=device)
    if footprint.device != limits.device or footprint.cache is None:
        footprint = weigh(spec, limits)
    budget = _budget(footprint, limits, memory_bytes)
    pool = limits.kv_cache_memory_bytes if limits.kv_cache_memory_bytes is not None else budget.available_bytes
    refusal = _refused(footprint, limits, profile) or _memory_refusal(footprint, limits, budget, pool, memory_bytes)
    plan = footprint.cache
    assert plan is not None
    blocks = plan.pool_blocks(pool)
    per_request = footprint.kv_blocks_per_request
    term, reason = refusal or (None, _verdict(footprint, limits, pool, blocks))
    return SliceFit(
        fits=refusal is None,
        reason=reason,
        memory_bytes=memory_bytes,
        available_kv_bytes=pool,
        kv_blocks=blocks,
        max_concurrency=blocks / per_request if per_request else float(limits.max_num_seqs),
        longest_context_tokens=_longest(footprint, blocks),
        head_room_bytes=pool - footprint.kv_pool_bytes(1),
        engine_args=engine_arguments(limits, utilization=budget.utilization),
        breaking_term=term,
        product=product,
        profile=profile,
        needed_bytes=_needed(footprint, limits),
        assumptions=budget.notes,
    )


def _budget(footprint: Footprint, limits: EngineLimits, memory_bytes: int) -> _Budget:
    if limits.device == "cpu":
        return _Budget(memory_bytes, 1.0, memory_bytes - footprint.static_bytes)
    utilization = limits.gpu_memory_utilization
    notes: tuple[str, ...] = ()
    most = 1 - CUDA_CONTEXT_BYTES / memory_bytes - _CONTEXT_SPARE if memory_bytes else 0.0
    if 0 < most < utilization:
        # The engine refuses to start where less is free than it asks for, and CUDA's context is never free.
        rounded = int(most * 1000) / 1000
        notes = (f"gpu_memory_utilization {utilization:g} is lowered to {rounded:g}: CUDA's context lies outside it.",)
        utilization = max(rounded, 0.001)
    requested = ceil(memory_bytes * utilization)
    return _Budget(requested, utilization, requested - footprint.charged_bytes, notes)


def _needed(footprint: Footprint, limits: EngineLimits) -> int:
    """The memory below which the model would not fit, in bytes of the whole slice."""
    inside = (
        footprint.static_bytes
        + max(footprint.kv_pool_bytes(1), limits.kv_cache_memory_bytes or 0)
        + footprint.margin_bytes
    )
    if limits.device == "cpu":
        return inside
    return max(inside + CUDA_CONTEXT_BYTES, ceil(inside / limits.gpu_memory_utilization))


def _refused(footprint: Footprint, limits: EngineLimits, profile: str | None) -> tuple[str, str] | None:
    """Reasons that no amount of memory mends."""
    if limits.tensor_parallel_size > 1 and profile is not None:
        return "tensor_parallel_size", _NO_TENSOR_PARALLELISM
    if limits.max_model_len > footprint.context_limit:
        return "max_model_len", (
            f"max_model_len {limits.max_model_len:,} is more than the {footprint.context_limit:,} tokens the model was made for"
        )
    return ("limits", footprint.refusal) if footprint.refusal else None


def _memory_refusal(
    footprint: Footprint, limits: EngineLimits, budget: _Budget, pool: int, memory_bytes: int
) -> tuple[str, str] | None:
    """The first term that does not fit, and why in a sentence."""
    given = limits.kv_cache_memory_bytes is not None
    margin = footprint.margin_bytes
    left = memory_bytes - _context(limits) if given else budget.requested_bytes
    before = "the engine may use"
    for term, label, size in _charges(footprint, everything=given):
        if size >= left:
            return term, f"{label} of {gib(size)} exceed the {gib(left)} that {before}"
        left -= size
        before = f"the {label} leave"
    if not footprint.kv_block_bytes:
        spare = ("weights", f"only {gib(left)} would be free, less than the {gib(margin)} the estimate may be off")
        return spare if left < margin else None
    if given and pool + margin > left:
        return "kv_cache", f"the KV pool of {gib(pool)} does not fit beside the rest: {gib(left)} is left"
    return _pool_refusal(footprint, limits, pool, 0 if given else margin)


def _context(limits: EngineLimits) -> int:
    return CUDA_CONTEXT_BYTES if limits.device == "cuda" else 0


def _charges(footprint: Footprint, *, everything: bool) -> list[tuple[str, str, int]]:
    """Terms in the order in which the engine meets them: name, in words, bytes."""
    charges = [
        ("host", "engine processes", footprint.host_bytes),
        ("weights", "weights", footprint.weights_bytes),
        ("activation", "activations", footprint.activation_bytes),
        ("non_torch", "CUDA libraries", footprint.non_torch_bytes),
    ]
    if everything or footprint.graphs_charged:
        charges.append(("cuda_graphs", "CUDA graphs", footprint.cuda_graph_bytes))
    return [charge for charge in charges if charge[2]]


def _pool_refusal(footprint: Footprint, limits: EngineLimits, pool: int, margin: int) -> tuple[str, str] | None:
    needed = footprint.kv_pool_bytes(1)
    request = footprint.kv_bytes_per_request
    what = f"one request of {limits.max_model_len:,} tokens needs {gib(request)}"
    if pool < needed:
        return "kv_cache", f"the rest leaves {gib(max(pool, 0))} for the KV cache, {what}"
    if pool - margin < needed:
        return "kv_cache", (
            f"the rest leaves {gib(pool)} for the KV cache, {what}: less to spare than the {gib(margin)} the estimate may be off"
        )
    return None


def _verdict(footprint: Footprint, limits: EngineLimits, pool: int, blocks: int) -> str:
    if not footprint.kv_block_bytes:
        return "fits; the model keeps no KV cache"
    at_once = blocks / footprint.kv_blocks_per_request
    return f"fits with a KV cache of {gib(pool)}: {at_once:.2f} requests of {limits.max_model_len:,} tokens at once"


def _longest(footprint: Footprint, blocks: int) -> int:
    plan = footprint.cache
    assert plan is not None
    return plan.longest(blocks, footprint.context_limit) if plan.groups else footprint.context_limit


def engine_arguments(limits: EngineLimits, *, utilization: float | None = None) -> tuple[str, ...]:
    """vLLM's arguments for exactly these limits. On a CPU the pool is set by the environment, so no GPU flag is given."""
    arguments = [
        "--max-model-len", str(limits.max_model_len),
        "--max-num-seqs", str(limits.max_num_seqs),
        "--max-num-batched-tokens", str(limits.max_num_batched_tokens),
    ]  # fmt: skip
    if limits.dtype != "auto":
        arguments += ["--dtype", limits.dtype]
    if limits.quantization:
        arguments += ["--quantization", limits.quantization]
    if limits.kv_cache_dtype != "auto":
        arguments += ["--kv-cache-dtype", limits.kv_cache_dtype]
    if limits.block_tokens:
        arguments += ["--block-size", str(limits.block_tokens)]
    if limits.prefix_caching is not None:
        arguments.append("--enable-prefix-caching" if limits.prefix_caching else "--no-enable-prefix-caching")
    if limits.device == "cpu":
        return tuple(arguments)
    if limits.kv_cache_memory_bytes is not None:
        arguments += ["--kv-cache-memory-bytes", str(limits.kv_cache_memory_bytes)]
    share = limits.gpu_memory_utilization if utilization is None else utilization
    arguments += ["--gpu-memory-utilization", f"{share:g}"]
    if limits.tensor_parallel_size > 1:
        arguments += ["--tensor-parallel-size", str(limits.tensor_parallel_size)]
    if not limits.cuda_graphs:
        arguments.append("--enforce-eager")
    return tuple(arguments)
