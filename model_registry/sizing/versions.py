"""What changes from one vLLM version to the next, as far as memory goes.

Each field says what an engine of that version does; `rules_for` picks them. Read from the released wheels of 0.17.1 to
0.33.0; a version outside that range takes the nearest one's rules and says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model_registry.errors import ConfigError
from model_registry.sizing.units import GIB

Version = tuple[int, int, int]
OLDEST: Version = (0, 17, 0)
NEWEST: Version = (0, 33, 99)
_TWO_GPUS_GIB = 2.08
_FOUR_GPUS_GIB = 2.17


@dataclass(frozen=True, slots=True)
class EngineRules:
    """How one version of the engine accounts for memory.

    `in_flight_batches`: batches whose tokens a window must still hold on a GPU; asynchronous scheduling keeps two.
    `prefix_caching_hybrids`: hybrid models get prefix caching unless told otherwise, and then keep two states per sequence;
    `mamba_all_states`: with it the families that can keep one state per block instead.
    `checkpoint_blocks`: kinds of recurrent layers that keep one state more, for a checkpoint inside a prefill.
    `block_within_step`: a hybrid model with prefix caching starts only if one step holds a whole block.
    `pad_pages`: pages that do not divide the largest one are padded; before, such a model did not start.
    `reserve_null_block`: the start-up check leaves out the block that is never handed out. Sizing always does: without it a
    request of full length could never run.
    `graphs_charged`: the estimate for CUDA graphs is taken from the KV pool; before, it came out of the slack.
    `non_torch_gib`: what CUDA's libraries hold beside PyTorch on one GPU.
    """

    version: Version
    default_utilization: float
    in_flight_batches: int
    prefix_caching_hybrids: bool
    mamba_all_states: bool
    checkpoint_blocks: frozenset[str]
    block_within_step: bool
    pad_pages: bool
    reserve_null_block: bool
    graphs_charged: bool
    non_torch_gib: float
    note: str | None = None

    def non_torch_bytes(self, gpus: int) -> int:
        """The same with the communicators of tensor parallelism: 2.06 to 2.11 GiB were logged on two GPUs, 2.13 to 2.21 on four."""
        gib = self.non_torch_gib if gpus == 1 else _TWO_GPUS_GIB if gpus == 2 else _FOUR_GPUS_GIB
        return int(gib * GIB)

    @property
    def label(self) -> str:
        """`0.33.0`."""
        return ".".join(map(str, self.version))


def parse_version(text: str) -> Version:
    """`0.19.0`, `v0.20`, `0.32.0+cpu` as three numbers; ConfigError for anything else."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.(\d+))?([.+\-a-z].*)?", text.strip())
    if not match:
        raise ConfigError(f"{text!r} is no vLLM version", remedy="Write it like 0.33.0.")
    return int(match.group(1)), int(match.group(2)), int(match.group(3) or 0)


def rules_for(text: str) -> EngineRules:
    """The rules of the vLLM version `text`; ConfigError where it is no version."""
    version = parse_version(text)
    note = None
    if not OLDEST <= version <= NEWEST:
        note = f"vLLM {text} was not read; the rules of the nearest version known (0.17 to 0.33) are used."
    known = min(max(version, OLDEST), NEWEST)
    return EngineRules(
        version=version,
        default_utilization=0.92 if known >= (0, 20, 0) else 0.9,
        in_flight_batches=2 if known >= (0, 26, 0) else 1,
        prefix_caching_hybrids=known >= (0, 26, 0),
        mamba_all_states=known < (0, 28, 0),
        checkpoint_blocks=_checkpoint_blocks(known),
        block_within_step=known < (0, 27, 0),
        pad_pages=known >= (0, 24, 0),
        reserve_null_block=known >= (0, 29, 0),
        graphs_charged=known >= (0, 20, 0),
        non_torch_gib=0.25 if known >= (0, 18, 0) else 0.13,
        note=note,
    )


def _checkpoint_blocks(version: Version) -> frozenset[str]:
    if version >= (0, 33, 0):
        return frozenset({"mamba2", "gated_delta"})
    return frozenset({"mamba2"}) if version >= (0, 32, 0) else frozenset()
