"""How fast a model runs on a slice: an estimate from the roofline, labelled as one.

A decode step reads the weights and every running sequence's cache once, so it is bound by memory bandwidth, which a slice
gets by its memory slices; a prefill multiplies, so it is bound by the SMs that the profile has. Nothing here was measured
on a slice: the efficiencies are starting points to be calibrated per GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import ceil

from model_registry.catalogue import Product, ProfileInfo
from model_registry.model import EngineLimits, SliceFit
from model_registry.sizing.architecture import Architecture
from model_registry.sizing.dtypes import COMPUTE_BYTES, compute_dtype
from model_registry.sizing.footprint import Sized

MEMORY_EFFICIENCY = 0.75
COMPUTE_EFFICIENCY = 0.5
_LAUNCH_SECONDS = 3e-6
_KERNELS_PER_LAYER = 12
PLANNED_BUSY_RATIO = 0.7
"""How busy a replica may be planned: beyond, queues grow faster than the load."""

ASSUMPTIONS = (
    "An estimate from the roofline, not a measurement: 75% of the bandwidth, 50% of the tensor throughput, 3 us per kernel.",
    "A slice gets bandwidth by its memory slices and compute by its SMs; neighbours and power limits are left out.",
)


@dataclass(frozen=True, slots=True)
class Roof:
    """What a slice can do at best: bytes and floating-point operations per second."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """`ttft_seconds` for one prompt on an idle replica, `itl_seconds` with `batch` sequences running.

    `decode_tokens_per_second` is over all of them; `requests_per_second` what one replica can be planned with.
    """

    batch: int
    prompt_tokens: int
    output_tokens: int
    ttft_seconds: float
    itl_seconds: float
    decode_tokens_per_second: float
    requests_per_second: float
    bound_by: str

    @property
    def queued_ttft_seconds(self) -> float:
        """TTFT where others are served before, at the load that is planned with."""
        return self.ttft_seconds / (1 - PLANNED_BUSY_RATIO)


@dataclass(frozen=True, slots=True)
class Demand:
    """What clients want: requests per second of so many tokens in and out, and the latencies they bear.

    `slo_attainment` is the share of requests that has to be within them; it matters where a measurement tells how many were.
    """

    requests_per_second: float
    prompt_tokens: int
    output_tokens: int
    ttft_slo_seconds: float | None = None
    itl_slo_seconds: float | None = None
    slo_attainment: float = 0.99


@cache
def _peaks() -> dict[str, dict[str, float | None]]:
    raw = json.loads(resources.files("model_registry").joinpath("data/roofline.json").read_text(encoding="utf-8"))
    products: dict[str, dict[str, float | None]] = raw["products"]
    return products


def slice_roof(product: Product, profile: ProfileInfo, *, fp8: bool = False) -> Roof | None:
    """The roof of a slice; None where the product's peaks, or the profile's share of them, are not known."""
    peak = _peaks().get(product.name)
    if not peak or not (profile.memory_slices and product.memory_slices and profile.sm_count and product.sm_count):
        return None
    flops = (peak["fp8_tflops"] if fp8 else None) or peak["bf16_tflops"] or 0.0
    bandwidth = peak["bandwidth_gb_s"] or 0.0
    return Roof(
        bytes_per_second=bandwidth * 1e9 * profile.memory_slices / product.memory_slices,
        flops_per_second=flops * 1e12 * profile.sm_count / product.sm_count,
    )


def card_roof(product: str, *, fp8: bool = False) -> Roof | None:
    """The roof of a whole card by the catalogue's name, MIG off; None where its peaks are not known."""
    peak = _peaks().get(product)
    if not peak:
        return None
    flops = (peak["fp8_tflops"] if fp8 else None) or peak["bf16_tflops"] or 0.0
    return Roof((peak["bandwidth_gb_s"] or 0.0) * 1e9, flops * 1e12)


@dataclass(frozen=True, slots=True)
class _Work:
    """One model's work per token and step."""

    read_bytes: float
    expert_bytes: float
    experts: int
    experts_per_token: int
    kv_bytes_per_token: int
    state_bytes: int
    flops_per_token: float
    attention_flops: float
    overhead_seconds: float

    def step_bytes(self, batch: int, context_tokens: float) -> float:
        """Bytes that one decode step reads: of the experts only those that some sequence is sent to."""
        touched = 1.0
        if self.experts:
            touched = 1 - (1 - self.experts_per_token / self.experts) ** batch
        cache = batch * (context_tokens * self.kv_bytes_per_token + self.state_bytes)
        return self.read_bytes + touched * self.expert_bytes + cache


def _work(sized: Sized, limits: EngineLimits) -> _Work:
    arch = sized.architecture
    parameters = arch.parameters
    share = parameters.experts / parameters.total if parameters.total else 0.0
    gathered = parameters.embedding / parameters.total if parameters.output else 0.0
    weights = sum(t.bytes for t in sized.weights.terms if t.name == "tensors")
    width = COMPUTE_BYTES[compute_dtype(limits.dtype, arch.dtype, pooling=arch.pooling)]
    return _Work(
        read_bytes=weights * (1 - share - gathered),
        expert_bytes=weights * share,
        experts=arch.experts.count if arch.experts else 0,
        experts_per_token=arch.experts.per_token if arch.experts else 0,
        kv_bytes_per_token=sized.plan.bytes_per_token,
        state_bytes=sum((s.conv_elements + s.state_elements) * width for s in arch.states),
        flops_per_token=2.0 * _multiplied(arch),
        attention_flops=2.0 * sum(arch.heads * (a.key_dim + (a.value_dim or a.key_dim)) for a in arch.attention),
        overhead_seconds=arch.layers * _KERNELS_PER_LAYER * _LAUNCH_SECONDS,
    )


def _multiplied(arch: Architecture) -> int:
    """Parameters that multiply one token; a tied embedding table does so as the output projection."""
    return arch.parameters.active(arch.experts) + (arch.parameters.embedding if arch.tie_embeddings else 0)


def ttft_seconds(work: _Work, roof: Roof, prompt_tokens: int) -> float:
    """Time to the first token of one prompt on an idle replica."""
    compute = work.flops_per_token * prompt_tokens + work.attention_flops * prompt_tokens**2 / 2
    return (
        max(
            compute / (COMPUTE_EFFICIENCY * roof.flops_per_second),
            work.step_bytes(1, 0) / (MEMORY_EFFICIENCY * roof.bytes_per_second),
        )
        + work.overhead_seconds
    )


def itl_seconds(work: _Work, roof: Roof, batch: int, context_tokens: float) -> tuple[float, str]:
    """Time of one decode step of `batch` sequences of `context_tokens`, and whether memory or compute bounds it."""
    memory = work.step_bytes(batch, context_tokens) / (MEMORY_EFFICIENCY * roof.bytes_per_second)
    compute = batch * work.flops_per_token / (COMPUTE_EFFICIENCY * roof.flops_per_second)
    return max(memory, compute) + work.overhead_seconds, "memory" if memory >= compute else "compute"


def estimate_speed(
    sized: Sized, limits: EngineLimits, fit: SliceFit, roof: Roof, *, prompt_tokens: int, output_tokens: int
) -> SpeedEstimate:
    """The speed with as many sequences as the slice holds of that length, at most `max_num_seqs`."""
    work = _work(sized, limits)
    batch = largest_batch(sized, limits, fit, prompt_tokens + output_tokens)
    return _at_batch(work, roof, batch, prompt_tokens, output_tokens)


def largest_batch(sized: Sized, limits: EngineLimits, fit: SliceFit, tokens: int) -> int:
    """Sequences of `tokens` that run at once: what the pool holds, within `max_num_seqs`; at least one."""
    per_request = sized.plan.blocks_per_request(min(tokens, limits.max_model_len))
    held = (fit.kv_blocks - 1) // per_request if per_request else limits.max_num_seqs
    return max(1, min(limits.max_num_seqs, held))


def _at_batch(work: _Work, roof: Roof, batch: int, prompt_tokens: int, output_tokens: int) -> SpeedEstimate:
    step, bound = itl_seconds(work, roof, batch, prompt_tokens + output_tokens / 2)
    prefill = ttft_seconds(work, roof, prompt_tokens)
    per_request = prefill + output_tokens * step / batch
    return SpeedEstimate(
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft_seconds=prefill,
        itl_seconds=step,
        decode_tokens_per_second=batch / step,
        requests_per_second=PLANNED_BUSY_RATIO / per_request,
        bound_by=bound,
    )


def best_batch(sized: Sized, limits: EngineLimits, fit: SliceFit, roof: Roof, demand: Demand) -> SpeedEstimate | None:
    """The batch at which one replica serves most within the demand's latencies; None where none does.

    While a replica prefills for others, a running sequence waits: its ITL is the step's time over the share of time that
    is left for decoding. A pooling model only prefills.
    """
    work = _work(sized, limits)
    if sized.architecture.encoder_only or sized.architecture.pooling:
        return _pooled(work, roof, demand)
    most = largest_batch(sized, limits, fit, demand.prompt_tokens + demand.output_tokens)
    for batch in range(most, 0, -1):
        estimate = _at_batch(work, roof, batch, demand.prompt_tokens, demand.output_tokens)
        decoding = 1 - estimate.requests_per_second * estimate.ttft_seconds
        waited = estimate.itl_seconds / max(decoding, 1e-9)
        if demand.itl_slo_seconds is not None and waited > demand.itl_slo_seconds:
            continue
        if demand.ttft_slo_seconds is not None and estimate.queued_ttft_seconds > demand.ttft_slo_seconds:
            return None
        return estimate
    return None


def fastest(sized: Sized, limits: EngineLimits, roof: Roof, demand: Demand) -> SpeedEstimate:
    """One sequence at a time: the best latencies there can be."""
    work = _work(sized, limits)
    if sized.architecture.encoder_only or sized.architecture.pooling:
        return _prefilled(work, roof, demand)
    return _at_batch(work, roof, 1, demand.prompt_tokens, demand.output_tokens)


def _pooled(work: _Work, roof: Roof, demand: Demand) -> SpeedEstimate | None:
    estimate = _prefilled(work, roof, demand)
    late = demand.ttft_slo_seconds is not None and estimate.queued_ttft_seconds > demand.ttft_slo_seconds
    return None if late else estimate


def _prefilled(work: _Work, roof: Roof, demand: Demand) -> SpeedEstimate:
    """One text at a time: its answer is there when it has been read, so TTFT is all there is."""
    seconds = ttft_seconds(work, roof, demand.prompt_tokens)
    return SpeedEstimate(
        batch=1,
        prompt_tokens=demand.prompt_tokens,
        output_tokens=0,
        ttft_seconds=seconds,
        itl_seconds=0.0,
        decode_tokens_per_second=0.0,
        requests_per_second=PLANNED_BUSY_RATIO / seconds,
        bound_by="compute",
    )


def replicas_for(sized: Sized, limits: EngineLimits, fit: SliceFit, roof: Roof, demand: Demand) -> int | None:
    """Replicas that serve `demand` within its latencies, each at most 70% busy; None where no number does."""
    estimate = best_batch(sized, limits, fit, roof, demand)
    return None if estimate is None else max(1, ceil(demand.requests_per_second / estimate.requests_per_second))
