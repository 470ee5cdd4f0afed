"""The KV cache: what a block is, how many blocks one request takes, how many there are.

vLLM keeps one pool of equal blocks for all layers. Layers with the same cache form groups of equal size, each group has
its own table of blocks, and a block holds one page of each layer of its group; so layers of unlike page size are brought to
one size first. The rules are those of `v1/core/kv_cache_utils.py` (`kv_cache_planning.py` from 0.33),
`v1/kv_cache_interface.py` and `platforms/interface.py`; `versions` says where versions differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Literal

from model_registry.model import EngineLimits
from model_registry.sizing.architecture import Architecture, AttentionCache, LayerCache, StateCache
from model_registry.sizing.dtypes import COMPUTE_BYTES, STATE_BYTES, kv_head_bytes
from model_registry.sizing.units import ceil_div
from model_registry.sizing.versions import EngineRules

Device = Literal["cuda", "cpu"]
GroupKind = Literal["full", "sliding", "chunked", "mla", "state"]

_GPU_BLOCK = 16
_GPU_MLA_BLOCK = 64
_CPU_BLOCK = 128
_CPU_MLA_BLOCK = 16
_HYBRID_MLA_ALIGNMENT = 128
_PADDING_BOUND = 1.5
_DEFAULT_MAMBA_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Page:
    """One layer's share of a block. Layers with equal pages can share a group."""

    kind: GroupKind
    block_tokens: int
    page_bytes: int
    window: int | None = None
    state_blocks: int = 0
    shape: tuple[int, ...] = ()

    def blocks(self, tokens: int, in_flight_tokens: int) -> int:
        """Blocks that one sequence of `tokens` holds at most.

        `in_flight_tokens` is what the engine may have scheduled beyond the window before it frees what has left it.
        """
        if self.kind == "state":
            return self.state_blocks or ceil_div(tokens, self.block_tokens)
        if self.kind == "sliding":
            assert self.window is not None
            # One more, because a window need not start where a block does.
            return ceil_div(min(self.window - 1 + in_flight_tokens, tokens), self.block_tokens) + 1
        if self.kind == "chunked":
            assert self.window is not None
            return ceil_div(min(self.window + in_flight_tokens, tokens), self.block_tokens)
        return ceil_div(tokens, self.block_tokens)


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share one block table; `page_bytes` is the sum over them."""

    page: Page
    layers: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How a model's cache is cut into blocks. `refusal` is the engine's reason not to start, if it has one."""

    groups: tuple[CacheGroup, ...]
    block_tokens: int
    block_bytes: int
    in_flight_tokens: int
    bytes_per_token: int
    notes: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def keeps_states(self) -> bool:
        """Whether recurrent states are kept at block boundaries, for prefix caching."""
        return any(g.page.kind == "state" and g.page.state_blocks != 1 for g in self.groups)

    def blocks_per_request(self, tokens: int) -> int:
        """Blocks that one sequence of `tokens` takes, summed over the groups, which all draw from one pool."""
        return sum(g.page.blocks(tokens, self.in_flight_tokens) for g in self.groups)

    def pool_blocks(self, pool_bytes: int) -> int:
        """Blocks in a pool of that size; 0 for a model without cache."""
        return max(0, pool_bytes) // self.block_bytes if self.block_bytes else 0

    def holds(self, blocks: int, tokens: int) -> bool:
        """Whether one sequence of `tokens` can run. Block 0 is never handed out, so it takes one block more."""
        return not self.groups or blocks > self.blocks_per_request(tokens)

    def longest(self, blocks: int, limit: int) -> int:
        """The longest sequence, up to `limit` tokens, that a pool of `blocks` holds; 0 where not even one token fits."""
        if self.holds(blocks, limit):
            return limit
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.holds(blocks, middle) else (low, middle)
        return low


def cache_plan(arch: Architecture, limits: EngineLimits, rules: EngineRules, kv_dtype: str, compute: str) -> CachePlan:
    """The blocks of `arch` under `limits`; ConfigError for a KV dtype that is not known.

    `kv_dtype` and `compute` are resolved (`dtypes`): `auto` stands for the dtype of the computation.
    """
    in_flight = limits.max_num_batched_tokens * (rules.in_flight_batches if limits.device == "cuda" else 1)
    layers, notes = _pages(arch, limits, rules, kv_dtype, COMPUTE_BYTES[compute])
    if not layers:
        return CachePlan((), 0, 0, in_flight, 0, notes)
    groups, refusal = _groups(layers, rules)
    refusal = refusal or _dtype_refusal(arch, kv_dtype)
    per_token = sum(p.page_bytes // p.block_tokens for p in layers if p.kind in ("full", "mla"))
    main = next((g for g in groups if g.page.kind in ("full", "mla")), groups[0])
    return CachePlan(
        groups=groups,
        block_tokens=main.page.block_tokens,
        block_bytes=max(g.page_bytes for g in groups),
        in_flight_tokens=in_flight,
        bytes_per_token=per_token,
        notes=notes,
        refusal=refusal,
    )


def _dtype_refusal(arch: Architecture, kv_dtype: str) -> str | None:
    """KV dtypes that the engine refuses for latent attention, and those that only latent attention has."""
    latent = any(a.kind == "mla" for a in arch.attention)
    only_latent = kv_dtype.endswith("_ds_mla")
    if latent and not only_latent and kv_dtype.startswith(("nvfp4", "int", "fp8_per")):
        return f"vLLM has no KV cache in {kv_dtype} for multi-head latent attention"
    if only_latent and not latent:
        return f"a KV cache in {kv_dtype} is for multi-head latent attention, which the model does not have"
    return None


def _pages(
    arch: Architecture, limits: EngineLimits, rules: EngineRules, kv_dtype: str, compute_bytes: int
) -> tuple[list[Page], tuple[str, ...]]:
    """One page per cached layer, in layer order, before pages are brought to one size."""
    tp = limits.tensor_parallel_size
    tokens = base_block_tokens(arch, limits)
    state_bytes = max((_state_bytes(s, limits, compute_bytes, tp) for s in arch.states), default=0)
    padded = 0
    notes: tuple[str, ...] = ()
    if arch.hybrid:
        widest = max(
            (_token_bytes(a, kv_dtype, compute_bytes, tp) for a in arch.attention if a.kind != "sliding"), default=0
        )
        per_token = widest or max(_token_bytes(a, kv_dtype, compute_bytes, tp) for a in arch.attention)
        aligned = _aligned_block(arch, limits, rules, tokens, state_bytes, per_token)
        if aligned > tokens:
            notes = (f"A block has {aligned} tokens, so that an attention page holds one recurrent state.",)
        tokens = max(tokens, aligned)
        padded = tokens * per_token

    def page(layer: LayerCache) -> Page:
        if isinstance(layer, StateCache):
            own = _state_bytes(layer, limits, compute_bytes, tp)
            return _state_page(layer, arch, limits, rules, tokens, max(own, padded))
        size = tokens * _token_bytes(layer, kv_dtype, compute_bytes, tp)
        return Page(layer.kind, tokens, size, layer.window, shape=(layer.kv_heads, layer.key_dim, layer.value_dim))

    return [page(c) for c in arch.caches], notes


def base_block_tokens(arch: Architecture, limits: EngineLimits) -> int:
    """Tokens per block before hybrid alignment: asked for, or the usual default of the device's attention backends."""
    latent = any(a.kind == "mla" for a in arch.attention)
    if limits.device == "cpu" and latent:
        # The reference MLA kernel is compiled for one block size and overrides what was asked.
        return _CPU_MLA_BLOCK
    if limits.block_tokens:
        return limits.block_tokens
    if limits.device == "cpu":
        return _CPU_BLOCK
    return _GPU_MLA_BLOCK if latent else _GPU_BLOCK


def _token_bytes(layer: AttentionCache, kv_dtype: str, compute_bytes: int, tp: int) -> int:
    """Bytes of one token in one layer on one GPU. The latent of MLA is not split over GPUs."""
    if layer.element_bytes:
        return layer.kv_heads * (layer.key_dim + layer.value_dim) * layer.element_bytes
    heads = layer.kv_heads if layer.kind == "mla" else max(1, layer.kv_heads // tp)
    return heads * kv_head_bytes(kv_dtype, layer.key_dim, layer.value_dim, compute_bytes)


def _state_bytes(layer: StateCache, limits: EngineLimits, compute_bytes: int, tp: int) -> int:
    # CPU kernels with AVX-512 BF16 keep every recurrent state in float32, whatever the model says.
    dtype = "float32" if limits.device == "cpu" else layer.state_dtype
    width = STATE_BYTES.get(dtype, compute_bytes)
    return layer.conv_elements // tp * compute_bytes + layer.state_elements // tp * width


def _keeps_prefixes(arch: Architecture, limits: EngineLimits, rules: EngineRules) -> bool:
    """Whether prefix caching is on: as asked, or as the engine decides for this kind of model."""
    if limits.prefix_caching is not None:
        return limits.prefix_caching
    if not arch.attention:
        return False
    return not arch.states or (rules.prefix_caching_hybrids and not arch.pooling)


def _all_states(layer: StateCache, rules: EngineRules) -> bool:
    """Whether the engine keeps a state at every block boundary: older versions, in the families that support it."""
    return rules.mamba_all_states and layer.kind in ("mamba1", "mamba2")


def _state_page(
    layer: StateCache, arch: Architecture, limits: EngineLimits, rules: EngineRules, tokens: int, size: int
) -> Page:
    shape = (layer.conv_elements, layer.state_elements)
    if not _keeps_prefixes(arch, limits, rules):
        return Page("state", limits.max_model_len, size, state_blocks=1, shape=shape)
    if _all_states(layer, rules):
        return Page("state", tokens, size, state_blocks=0, shape=shape)
    checkpoint = int(layer.kind in rules.checkpoint_blocks and (limits.device == "cuda" or layer.kind == "mamba2"))
    return Page("state", tokens, size, state_blocks=2 + checkpoint, shape=shape)


def _aligned_block(
    arch: Architecture, limits: EngineLimits, rules: EngineRules, tokens: int, state_bytes: int, per_token: int
) -> int:
    """The smallest block whose attention page holds one recurrent state, in steps that the attention kernels can cut up."""
    step = tokens
    if any(a.kind == "mla" for a in arch.attention):
        step = max(step, _HYBRID_MLA_ALIGNMENT)
    first = arch.states[0]
    if _keeps_prefixes(arch, limits, rules) and _all_states(first, rules):
        step = lcm(arch.mamba_chunk or _DEFAULT_MAMBA_CHUNK, step)
        return step * ceil_div(ceil_div(state_bytes, per_token), step)
    return step * ceil_div(state_bytes, step * per_token)


def _groups(pages: Sequence[Page], rules: EngineRules) -> tuple[tuple[CacheGroup, ...], str | None]:
    if len(set(pages)) == 1:
        return (CacheGroup(pages[0], len(pages), pages[0].page_bytes * len(pages)),), None
    if _same_type(pages):
        # Pages of different size that always need the same blocks: one group, its block the sum of them.
        return (CacheGroup(pages[0], len(pages), sum(p.page_bytes for p in pages)),), None
    unified, refusal = _unify(pages, rules)
    buckets = Counter(unified)
    size = _group_size(list(buckets.values()))
    groups = []
    for page, count in buckets.items():
        parts = ceil_div(count, size)
        groups += [CacheGroup(page, len(range(i, count, parts)), 0) for i in range(parts)]
    return tuple(replace(g, page_bytes=g.page.page_bytes * g.layers) for g in groups), refusal


def _same_type(pages: Sequence[Page]) -> bool:
    """All layers take the same blocks for any sequence: all full attention, or all windows of one size."""
    if len({p.block_tokens for p in pages}) > 1:
        return False
    kinds = {"full" if p.kind == "mla" else p.kind for p in pages}
    if len(kinds) > 1:
        return False
    return kinds == {"full"} or (kinds == {"sliding"} and len({p.window for p in pages}) == 1)


def _unify(pages: Sequence[Page], rules: EngineRules) -> tuple[list[Page], str | None]:
    """Bring all pages to the size of the largest: more tokens where that divides, padding where it does not."""
    largest = max(p.page_bytes for p in pages)
    refusal = None
    unified = []
    for page in pages:
        ratio, rest = divmod(largest, page.page_bytes)
        if page.page_bytes == largest:
            unified.append(page)
        elif page.kind == "state" or (rest and rules.pad_pages and page.kind != "mla"):
            unified.append(replace(page, page_bytes=largest))
        elif not rest:
            unified.append(replace(page, block_tokens=page.block_tokens * ratio, page_bytes=largest))
        else:
            refusal = f"vLLM {rules.label} cannot bring its layers' KV pages of {page.page_bytes} and {largest} bytes to one size"
            unified.append(replace(page, page_bytes=largest))
    return unified, refusal


def _group_size(counts: Sequence[int]) -> int:
    """Layers per group: as few as the smallest kind has, or as many as the largest where that pads less."""
    fewest, most = min(counts), max(counts)
    return most if most < fewest * _PADDING_BOUND else fewest
