"""What runs on a simulated slice in the place of vLLM: an engine that answers nothing true, as fast as the model would there.

It gets vLLM's own arguments, so what is planned, limited and proven is what would be on a real slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model_registry.catalogue import load_catalogue
from model_registry.errors import RegistryError
from model_registry.model import SliceFit
from model_registry.sizing.footprint import size_model
from model_registry.sizing.speed import SpeedEstimate, estimate_speed, slice_roof
from placement.slices import Slice

if TYPE_CHECKING:
    from placement.launch import SizedModel

# The load that latencies are estimated for.
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128


def simulated_argv(
    python: Path, vllm_arguments: Sequence[str], sized: SizedModel, target: Slice, fit: SliceFit
) -> list[str]:
    """The command of a simulated engine: vLLM's arguments, and the latencies that the roofline gives where it is known."""
    speed = estimated_speed(sized, target, fit)
    timing = ["--output-tokens", str(OUTPUT_TOKENS), "--max-concurrency", str(sized.config.max_num_seqs)]
    if speed is not None:
        timing += ["--ttft-seconds", f"{speed.ttft_seconds:.4g}", "--itl-seconds", f"{speed.itl_seconds:.4g}"]
    return [str(python), "-m", "placement.fake_engine", *vllm_arguments, *timing]


def estimated_speed(sized: SizedModel, target: Slice, fit: SliceFit) -> SpeedEstimate | None:
    """The model's speed on the slice with as many sequences as fit; None where the GPU's peaks are not known."""
    if sized.spec is None or sized.limits is None or target.gpu is None or target.profile is None:
        return None
    try:
        product = load_catalogue().product(target.gpu.product)
        roof = slice_roof(product, product.profile(target.profile))
    except RegistryError:
        return None
    if roof is None:
        return None
    model = size_model(sized.spec, sized.limits)
    return estimate_speed(model, sized.limits, fit, roof, prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
