"""What PyTorch's allocator adds to large matrices: segments come in steps of 2 MiB, and a short rest is not given back.

Source: PyTorch `c10/cuda/CUDACachingAllocator.cpp`: requests above 10 MiB get a segment rounded up to 2 MiB
(`kRoundLarge`), and a block is split only if more than 1 MiB would be left (`kSmallSize`). Start-up logs show it: Qwen2.5-7B
loads 0.055 GiB more than its tensors, Gemma 2 27B, whose matrices are whole multiples, none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from model_registry.sizing.architecture import AttentionCache, Experts, LayerCache, Matrix
from model_registry.sizing.dimensions import Dimensions
from model_registry.sizing.units import MIB

_ROUND = 2 * MIB
_OWN_SEGMENT = 10 * MIB
_SPLIT_ABOVE = MIB


def rounding_bytes(matrices: Mapping[Matrix, int], *, bits: Mapping[str, float], tp: int) -> int:
    """The sum over all matrices; `bits` are those of an element of each part, `tp` GPUs share every matrix."""
    return sum(count * _rest(int(m.elements * bits[m.part] / 8) // tp) for m, count in matrices.items())


def _rest(size: int) -> int:
    rest = -size % _ROUND
    return rest if size > _OWN_SEGMENT and rest <= _SPLIT_ABOVE else 0


def fused_matrices(
    d: Dimensions, caches: tuple[LayerCache, ...], experts: Experts | None, *, gated: bool, tied: bool
) -> Mapping[Matrix, int]:
    """The large matrices as vLLM keeps them: queries, keys and values in one, gate and up in one, experts of a layer in one."""
    hidden, found = d.size("hidden_size"), Counter[Matrix]()
    found[Matrix("rest", d.size("vocab_size") * hidden)] += 1
    if not tied:
        found[Matrix("output", d.size("vocab_size") * hidden)] += 1
    for cache in caches:
        if isinstance(cache, AttentionCache) and cache.kind != "mla":
            found[
                Matrix(
                    "linear", hidden * (d.heads * cache.key_dim + cache.kv_heads * (cache.key_dim + cache.value_dim))
                )
            ] += 1
            found[Matrix("linear", d.heads * cache.value_dim * hidden)] += 1
    up = 2 if gated else 1
    dense = d.layers - (experts.layers if experts else 0)
    if width := d.count("intermediate_size_mlp") or d.count("intermediate_size"):
        found[Matrix("linear", up * width * hidden)] += dense
        found[Matrix("linear", width * hidden)] += dense
    if experts:
        found[Matrix("experts", experts.count * up * experts.intermediate_size * hidden)] += experts.layers
        found[Matrix("experts", experts.count * experts.intermediate_size * hidden)] += experts.layers
    return dict(found)
