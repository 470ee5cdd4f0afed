"""What the registry says about a model: values only, no files read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from model_registry.sizing.kv import CachePlan

Task = Literal["generate", "embed"]

MOST_LAYERS = 4096  # some things are listed per layer: a wrong count must not take the machine's memory


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """What lies in a checkpoint: bytes and elements by dtype (`BF16`, `F8_E4M3`, `Q4_K` ...), from headers, no weights loaded."""

    total_bytes: int
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)
    elements_by_dtype: Mapping[str, int] = field(default_factory=dict)
    exact: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model, as its files describe it.

    `config` is the parsed `config.json` (or its equivalent built from a GGUF header). `tensors` is None where no weights
    index is at hand: then weights are sized from the architecture and said to be an estimate.
    `path` is the local directory or file; None for a model known by its metadata only.
    `task` `embed` stands for every pooling model. `has_remote_code` says that Python
    comes with it (`auto_map`), which an engine without a class of its own for the architecture would have to run.
    """

    source: str
    architecture: str
    config: Mapping[str, Any]
    task: Task
    max_context_tokens: int
    tensors: TensorSummary | None = None
    path: Path | None = None
    has_chat_template: bool = True
    quant_config: Mapping[str, Any] | None = None
    has_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The limits that an engine is started with. All of them are always passed on: vLLM's defaults are wrong on slices."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float = 0.92
    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    block_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    tensor_parallel_size: int = 1
    cuda_graphs: bool = True
    vllm_version: str = "0.33.0"
    device: Literal["cuda", "cpu"] = "cuda"
    prefix_caching: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}")


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a footprint: bytes, and in words where they come from."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes on a device before any KV cache, and what its KV cache takes.

    `kv_bytes_per_token` counts layers whose cache grows with every token; `kv_block_bytes` is one pool block over all
    layers of a group; `kv_blocks_per_request` is for one sequence of `max_model_len` tokens. `cuda_graph_bytes` are taken
    from the KV pool only where `graphs_charged` (vLLM 0.20 and later); before, they come out of what utilization leaves.
    `margin_bytes` is how far the estimate may be off; `refusal` is a reason not to start whatever the memory.
    """

    weights_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    cuda_graph_bytes: int
    kv_block_tokens: int
    kv_block_bytes: int
    kv_blocks_per_request: int
    kv_bytes_per_token: int
    terms: tuple[Term, ...] = ()
    assumptions: tuple[str, ...] = ()
    device: Literal["cuda", "cpu"] = "cuda"
    host_bytes: int = 0
    margin_bytes: int = 0
    graphs_charged: bool = True
    context_limit: int = 0
    weights_exact: bool = True
    measured: bool = False
    refusal: str | None = None
    cache: CachePlan | None = None

    @property
    def static_bytes(self) -> int:
        """Everything but the KV pool."""
        return (
            self.weights_bytes + self.activation_bytes + self.non_torch_bytes + self.cuda_graph_bytes + self.host_bytes
        )

    @property
    def charged_bytes(self) -> int:
        """What the engine takes off its budget before it sizes the pool."""
        graphs = self.cuda_graph_bytes if self.graphs_charged else 0
        return self.weights_bytes + self.activation_bytes + self.non_torch_bytes + self.host_bytes + graphs

    @property
    def kv_bytes_per_request(self) -> int:
        """KV bytes of one sequence of `max_model_len` tokens."""
        return self.kv_block_bytes * self.kv_blocks_per_request

    def kv_pool_bytes(self, sequences: int) -> int:
        """The smallest pool that holds `sequences` of `max_model_len` tokens: their blocks, and the one never handed out."""
        return self.kv_block_bytes * (self.kv_blocks_per_request * sequences + 1) if self.kv_block_bytes else 0


@dataclass(frozen=True, slots=True)
class SliceFit:
    """Whether a model fits a slice, why not, and what it gets there.

    `engine_args` are vLLM's arguments for exactly these limits. `breaking_term` names the first term that does not fit.
    `head_room_bytes` is what the KV pool has beyond one request of the asked length; negative where that much is missing.
    `needed_bytes` is the whole of the memory, context and pool for one request included, below which it would not fit.
    """

    fits: bool
    reason: str
    memory_bytes: int
    available_kv_bytes: int
    kv_blocks: int
    max_concurrency: float
    longest_context_tokens: int
    head_room_bytes: int
    engine_args: tuple[str, ...] = ()
    breaking_term: str | None = None
    product: str | None = None
    profile: str | None = None
    needed_bytes: int = 0
    assumptions: tuple[str, ...] = ()
