"""CUDA graphs: how many a start-up captures, and what they hold."""

from __future__ import annotations

from model_registry.model import EngineLimits
from model_registry.sizing.architecture import Architecture
from model_registry.sizing.units import GIB

_BASE_GIB = 0.15
_LAYER_GIB = 0.02
_REFERENCE_GRAPHS = 102
"""The constants were fitted to start-up logs with 51 piecewise and 51 full graphs (vLLM 0.19.0, H100)."""
_EXPERT_FACTOR = 1.6
_USUAL_LIMIT = 512
_GPT_OSS_LIMIT = 1024


def capture_sizes(max_num_seqs: int, max_num_batched_tokens: int, limit: int = _USUAL_LIMIT) -> tuple[int, ...]:
    """The batch sizes that are captured, ascending: 1, 2, 4, by 8 below 256, by 16 from there, up to twice `max_num_seqs`."""
    largest = min(2 * max_num_seqs, limit, max_num_batched_tokens)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return tuple(s for s in sizes if s <= largest)


def graph_count(arch: Architecture, limits: EngineLimits) -> int:
    """Piecewise graphs of every size, and full decode graphs of the sizes up to `max_num_seqs`."""
    limit = _GPT_OSS_LIMIT if arch.model_type == "gpt_oss" else _USUAL_LIMIT
    sizes = capture_sizes(limits.max_num_seqs, limits.max_num_batched_tokens, limit)
    return len(sizes) + sum(s <= limits.max_num_seqs for s in sizes)


def graph_bytes(arch: Architecture, limits: EngineLimits) -> int:
    """What the graphs are estimated to hold; 0 without graphs, on a CPU, and for models that only pool.

    0.15 GiB + 0.02 GiB per layer for 102 graphs, in proportion to the graphs captured; mixtures of experts and latent
    attention 1.6 times that. The engine's own estimate is within a quarter of what it then takes.
    """
    if not limits.cuda_graphs or limits.device == "cpu" or arch.encoder_only:
        return 0
    full = _BASE_GIB + _LAYER_GIB * arch.layers
    if arch.experts or arch.latent:
        full *= _EXPERT_FACTOR
    share = graph_count(arch, limits) / _REFERENCE_GRAPHS
    return int((_BASE_GIB * min(1.0, share) + (full - _BASE_GIB) * share) * GIB)
