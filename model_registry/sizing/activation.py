"""The peak of memory that a forward pass needs beside weights and cache, as the engine's profiling run measures it.

The form is a model of what is alive at the worst moment; its constants were fitted to start-up logs of vLLM 0.19.0 on an
H100 (28 configurations; the worst error of a text model is 0.03 GiB). At `max_num_seqs` below about 100 the MLP is the
worst moment, above it the sampler, which holds the logits of all sequences several times over.
"""

from __future__ import annotations

from model_registry.model import EngineLimits, Term
from model_registry.sizing.architecture import Architecture, Vision
from model_registry.sizing.units import GIB, gib
from model_registry.sizing.versions import EngineRules

_SAMPLER_BYTES = 12.6
"""Per sequence and vocabulary entry, beside the logits in the model's dtype: a float32 copy, probabilities, noise, and 0.6."""
_SAMPLER_FLOOR_BYTES = int(0.03 * GIB)
_MLP_FLOOR_BYTES = int(0.14 * GIB)
_UNKNOWN_FACTOR = 1.2
_FUSED_EXPERTS = ("mxfp4", "gpt_oss_mxfp4")
_ENCODER_WIDTHS = 4
"""Tensors of the encoder's width that are alive beside the two of its MLP's width: an upper bound, not measured."""


def activation_terms(
    arch: Architecture, limits: EngineLimits, rules: EngineRules, compute_bytes: int, quantization: str | None
) -> tuple[Term, ...]:
    """The terms of the peak; their sum is charged. Sizes in bytes, per GPU."""
    tokens = limits.max_num_batched_tokens
    mlp = _mlp(arch, tokens, compute_bytes, limits.tensor_parallel_size)
    sampler = 0 if arch.pooling else _sampler(arch, limits, compute_bytes)
    experts = _experts(arch, tokens, compute_bytes, limits.tensor_parallel_size, quantization)
    name = "sampler" if sampler >= mlp else "mlp"
    reason = (
        f"sampling for {min(limits.max_num_seqs, tokens)} sequences over {arch.vocab_size:,} vocabulary entries"
        if name == "sampler"
        else f"the MLP's intermediate results for {tokens:,} tokens"
    )
    terms = [Term(name, max(mlp, sampler), reason)]
    if experts:
        terms.append(Term("expert workspace", experts, f"routing {tokens:,} tokens to their experts"))
    if arch.vision:
        terms = _with_vision(terms, arch, arch.vision, limits, compute_bytes)
    if not arch.known:
        spare = int(sum(t.bytes for t in terms) * (_UNKNOWN_FACTOR - 1))
        terms.append(Term("unknown architecture", spare, "a fifth more, since its layers are not known"))
    return tuple(terms)


def _sampler(arch: Architecture, limits: EngineLimits, compute_bytes: int) -> int:
    sequences = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    hidden = limits.max_num_batched_tokens * arch.hidden_size * compute_bytes
    return int((_SAMPLER_BYTES + compute_bytes) * sequences * arch.vocab_size) + hidden + _SAMPLER_FLOOR_BYTES


def _mlp(arch: Architecture, tokens: int, compute_bytes: int, tp: int) -> int:
    width = arch.intermediate_size
    if arch.experts:
        # Only the layers without experts, and the shared expert, run a dense MLP.
        dense = width if arch.experts.layers < arch.layers else 0
        width = max(dense, arch.experts.shared_intermediate_size)
    return compute_bytes * tokens * (3 * width // tp + 2 * arch.hidden_size) + _MLP_FLOOR_BYTES


def _experts(arch: Architecture, tokens: int, compute_bytes: int, tp: int, quantization: str | None) -> int:
    """The two work buffers of the fused expert kernels; the mxfp4 kernels need none."""
    if not arch.experts or quantization in _FUSED_EXPERTS:
        return 0
    width, hidden = arch.experts.intermediate_size // tp, arch.hidden_size
    return compute_bytes * tokens * arch.experts.per_token * (max(width, hidden) + max(2 * width, hidden))


def _with_vision(
    terms: list[Term], arch: Architecture, vision: Vision, limits: EngineLimits, compute_bytes: int
) -> list[Term]:
    """The engine runs the encoder on as many of the largest items as a step's tokens hold, keeps pixels and results, and
    then profiles the language model: the peak is the larger of the two runs, beside what is kept.
    """
    largest = vision.tokens_per_item * max(1, min(vision.clip_items, limits.max_model_len // vision.tokens_per_item))
    items = max(1, max(limits.max_num_batched_tokens, largest) // largest)
    scale = items * largest / vision.tokens_per_item
    patches = int(scale * vision.patches_per_item)
    kept = compute_bytes * (items * largest * arch.hidden_size + patches * vision.patch_pixels)
    width = 2 * vision.intermediate_size + _ENCODER_WIDTHS * vision.hidden_size
    encoder = compute_bytes * patches * width
    text = sum(t.bytes for t in terms)
    kept_term = Term("vision inputs", kept, f"pixels and results of {items} items of {largest:,} tokens")
    if encoder <= text:
        return [*terms, kept_term]
    return [Term("vision encoder", encoder, f"encoding {patches:,} patches at once"), kept_term]


def describe(terms: tuple[Term, ...]) -> str:
    """`sampler 1.86 GiB + vision encoder 0.20 GiB`."""
    return " + ".join(f"{t.name} {gib(t.bytes)}" for t in terms)
