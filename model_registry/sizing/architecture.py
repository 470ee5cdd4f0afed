"""What a model's architecture keeps in memory: plain values, read from `config.json` by `families`.

Dimensions carry the names of Hugging Face configurations. Everything here is per model, before any split over GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["full", "sliding", "chunked", "mla"]
StateKind = Literal["mamba1", "mamba2", "gated_delta", "kimi_delta", "short_conv", "linear"]


@dataclass(frozen=True, slots=True)
class AttentionCache:
    """The KV cache of one attention layer.

    `kv_heads` x (`key_dim` + `value_dim`) elements per token; MLA has one head whose latent serves as key and value
    (`value_dim` 0). `window` is the sliding window, or the chunk of chunked attention, in tokens. `element_bytes` is set
    where the layer stores its elements in a width of its own, whatever the KV dtype.
    """

    kind: AttentionKind
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    element_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StateCache:
    """The state of one recurrent layer: a fixed number of elements per sequence, whatever its length.

    `conv_elements` are kept in the model's dtype, `state_elements` in `state_dtype` (`auto`: the model's).
    """

    kind: StateKind
    conv_elements: int
    state_elements: int
    state_dtype: str = "auto"


LayerCache = AttentionCache | StateCache


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: `layers` of the model's layers have `count` experts of width `intermediate_size`."""

    count: int
    per_token: int
    intermediate_size: int
    layers: int
    shared_intermediate_size: int = 0


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The ranks and widths of multi-head latent attention (DeepSeek-V2, section 2.1)."""

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class RopeTable:
    """One cosine and sine table: `positions` rows of `rotary_dim` elements."""

    positions: int
    rotary_dim: int


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower, as far as memory goes.

    `tokens_per_item` and `patches_per_item` are those of the largest image, or of the largest clip where that is more;
    `clip_items` is how many of the former a clip may cost, if the context is long enough. `patch_pixels` are the numbers of
    one patch. `whole_items`: an item may not be split over steps, so one step must hold it.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    tokens_per_item: int
    patches_per_item: int
    patch_pixels: int
    clip_items: int = 1
    whole_items: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """One large matrix by its number of elements, and the part of the model that its quantisation goes by."""

    part: Literal["linear", "experts", "output", "rest"]
    elements: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements by part. `linear` are the dense matrices that quantisation touches, `experts` those of the experts."""

    embedding: int
    output: int
    linear: int
    experts: int
    router: int
    other: int
    vision: int
    drafter: int = 0

    @property
    def total(self) -> int:
        """What the engine loads; `drafter` layers (multi-token prediction) stay on disk unless speculation is on."""
        return self.embedding + self.output + self.linear + self.experts + self.router + self.other + self.vision

    @property
    def quantised(self) -> int:
        """What a quantised checkpoint stores in fewer bits."""
        return self.linear + self.experts

    def active(self, experts: Experts | None) -> int:
        """Elements that one token passes through: all but the embedding rows and the experts it is not sent to."""
        routed = self.experts * experts.per_token // experts.count if experts else self.experts
        return self.output + self.linear + routed + self.router + self.other


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model's shape.

    `caches` has one entry per layer that keeps something between tokens, in layer order; layers that share another
    layer's cache, and the layers of encoders, have none. `mamba_chunk` is the tokens that a Mamba-2 kernel takes at once.
    `max_positions` is None where the configuration names no length: then any will do.
    `refusal` says why vLLM runs no such model, whatever the memory.
    `known` is False where the architecture is not in the table of
    families: the sizes are then an upper bound, and `notes` says so.
    """

    name: str
    model_type: str
    known: bool
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    dtype: str
    tie_embeddings: bool
    caches: tuple[LayerCache, ...]
    parameters: Parameters
    matrices: Mapping[Matrix, int]
    pooling: bool = False
    encoder_only: bool = False
    experts: Experts | None = None
    latent: LatentAttention | None = None
    rope: tuple[RopeTable, ...] = ()
    vision: Vision | None = None
    mamba_chunk: int | None = None
    notes: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def attention(self) -> tuple[AttentionCache, ...]:
        """The layers with a KV cache."""
        return tuple(c for c in self.caches if isinstance(c, AttentionCache))

    @property
    def states(self) -> tuple[StateCache, ...]:
        """The layers with a recurrent state."""
        return tuple(c for c in self.caches if isinstance(c, StateCache))

    @property
    def hybrid(self) -> bool:
        """Attention and recurrent layers together."""
        return bool(self.attention) and bool(self.states)
