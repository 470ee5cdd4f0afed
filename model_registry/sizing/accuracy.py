"""Predicted against measured, as a page: `python -m model_registry.sizing.accuracy`.

Reads the figures that engines printed (`tests/data/sizing/`), sizes the same models under the same limits, and writes
`docs/sizing-accuracy.md` with a plot beside it. The plot needs matplotlib (the extra `load`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_registry.model import EngineLimits, ModelSpec, Task, TensorSummary
from model_registry.sizing.fit import fit
from model_registry.sizing.footprint import weigh
from model_registry.sizing.units import GIB

_ROOT = Path(__file__).parents[2]
_PLOT = "sizing-accuracy.svg"
_KINDS = {
    "full": "FullAttention",
    "mla": "MLAAttention",
    "sliding": "SlidingWindow",
    "chunked": "ChunkedLocalAttention",
    "state": "Mamba",
}


@dataclass(frozen=True, slots=True)
class Start:
    """One published start on a GPU: sizes in GiB, predicted and measured."""

    name: str
    gpus: int
    vision: bool
    weights: tuple[float, float]
    activation: tuple[float, float]
    available: tuple[float, float]
    concurrency: tuple[float, float]

    @property
    def error_gib(self) -> float:
        """Available KV memory, predicted minus measured."""
        return self.available[0] - self.available[1]


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One start of the CPU engine: blocks and concurrency, predicted and logged."""

    name: str
    layout: str
    blocks: tuple[int, int | None]
    concurrency: tuple[float, float | None]
    groups_equal: bool
    refused: str | None
    longest: tuple[int, int | None]

    @property
    def equal(self) -> bool:
        """Whether everything that the engine said is what was predicted."""
        if self.refused:
            return self.longest[1] is None or self.longest[0] == self.longest[1]
        if self.blocks[1] is None or self.concurrency[1] is None:
            return self.groups_equal
        return (
            self.groups_equal
            and self.blocks[0] == self.blocks[1]
            and abs(self.concurrency[0] - self.concurrency[1]) <= 0.0051
        )


def published_starts(data: dict[str, Any]) -> list[Start]:
    """Size every start in `startup_runs.json`."""
    return [_start(run, data["configs"][run["config_of"]]) for run in data["runs"]]


def _start(run: dict[str, Any], config: dict[str, Any]) -> Start:
    measured, weights = run["measured"], run["weights_bytes"]
    spec = ModelSpec(
        run["model"],
        "",
        config,
        "generate",
        0,
        tensors=None if weights is None else TensorSummary(weights),
        quant_config=run["quantization_config"],
    )
    limits = EngineLimits(vllm_version=run["vllm"], **run["limits"])
    footprint = weigh(spec, limits)
    got = fit(spec, footprint, limits, memory_bytes=int(measured["total_gib"] * GIB))
    given = replace(limits, kv_cache_memory_bytes=int(measured["available_kv_gib"] * GIB))
    pool = fit(spec, footprint, given, memory_bytes=2**40)
    flags = [
        f"{k} {v}"
        for k, v in run["limits"].items()
        if k in ("dtype", "kv_cache_dtype", "quantization") and v not in ("auto", None)
    ]
    name = f"{run['model'].split('/')[-1]}, {limits.max_model_len:,} tokens"
    return Start(
        name=", ".join([name, *flags]),
        gpus=limits.tensor_parallel_size,
        vision="vision_config" in config,
        weights=(footprint.weights_bytes / GIB, measured["model_loading_gib"]),
        activation=(footprint.activation_bytes / GIB, measured["torch_peak_gib"]),
        available=(got.available_kv_bytes / GIB, measured["available_kv_gib"]),
        concurrency=(pool.max_concurrency, measured["max_concurrency"]),
    )


def engine_runs(data: dict[str, Any]) -> list[EngineRun]:
    """Size every start in `engine_runs.json`."""
    return [_engine_run(run, data["versions"]["vllm"]) for run in data["runs"]]


def _engine_run(run: dict[str, Any], version: str) -> EngineRun:
    limits = EngineLimits(vllm_version=version, device="cpu", kv_cache_memory_bytes=run["pool_bytes"], **run["limits"])
    task: Task = "embed" if run["pooling"] else "generate"
    spec = ModelSpec(run["name"], "", run["config"], task, 0, tensors=TensorSummary(1))
    footprint = weigh(spec, limits)
    got, measured = fit(spec, footprint, limits, memory_bytes=2**40), run["measured"]
    assert footprint.cache is not None
    groups = [[_KINDS[g.page.kind], g.layers, g.page.block_tokens, g.page.page_bytes] for g in footprint.cache.groups]
    return EngineRun(
        name=run["name"],
        layout=_layout(groups),
        blocks=(got.kv_blocks, measured.get("blocks") if groups else None),
        concurrency=(got.max_concurrency, measured.get("max_concurrency")),
        groups_equal=sorted(groups) == sorted(measured.get("groups", groups)),
        refused=measured.get("refused"),
        longest=(got.longest_context_tokens, measured.get("longest_context_tokens")),
    )


def _layout(groups: Sequence[Sequence[Any]]) -> str:
    counts: dict[str, int] = {}
    for kind, *_ in groups:
        short = {v: k for k, v in _KINDS.items()}[kind]
        counts[short] = counts.get(short, 0) + 1
    return " + ".join(f"{n} {kind}" for kind, n in counts.items()) or "no cache"


def page(starts: Sequence[Start], runs: Sequence[EngineRun], versions: dict[str, str]) -> str:
    """The whole report, in Markdown."""
    text = [s for s in starts if s.gpus == 1 and not s.vision]
    vision = [s for s in starts if s.gpus == 1 and s.vision]
    several = [s for s in starts if s.gpus > 1]
    equal = sum(r.equal for r in runs)
    lines = [
        "# How exact the sizing is",
        "",
        "Written by `python -m model_registry.sizing.accuracy`; do not edit. Figures in GiB (2^30 bytes).",
        "",
        "| what | cases | mean error | worst error | budget |",
        "|---|---|---|---|---|",
        _summary("available KV memory, text models, one GPU", [s.error_gib for s in text], "0.10 GiB"),
        _summary("available KV memory, vision-language models, one GPU", [s.error_gib for s in vision], "0.30 GiB"),
        _summary("available KV memory, several GPUs", [s.error_gib for s in several], "0.30 GiB"),
        _summary("weights, one GPU", [100 * (s.weights[0] / s.weights[1] - 1) for s in (*text, *vision)], "1%", "%"),
        _summary(
            "concurrency, memory given",
            [100 * (s.concurrency[0] / s.concurrency[1] - 1) for s in starts],
            "0.1% and the rounding of the printed memory",
            "%",
        ),
        "",
        f"Blocks, groups and concurrency equal to what the CPU engine logs: **{equal} of {len(runs)}** "
        f"(vLLM {versions['vllm']}).",
        "",
        f"![Predicted against measured]({_PLOT})",
        "",
        "## Published starts on an H100 (vLLM 0.19.0)",
        "",
        "Each cell is predicted / measured. The activation peak is PyTorch's.",
        "",
        "| model | GPUs | weights | activation | available KV | error | concurrency, memory given |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_start_row(s) for s in starts]
    lines += [
        "",
        f"## Starts of the CPU engine (vLLM {versions['vllm']}, dummy weights)",
        "",
        "Small models that keep a family's layout. Where the engine refused to start, its longest possible context is compared.",
        "",
        "| model | groups | blocks | concurrency | equal |",
        "|---|---|---|---|---|",
    ]
    lines += [_run_row(r) for r in runs]
    lines += ["", *_LIMITS_OF_THIS, ""]
    return "\n".join(lines)


_LIMITS_OF_THIS = (
    "## What this does not show",
    "",
    "- No start-up log from a MIG slice is known. Activation peak, non-torch memory and CUDA graphs were fitted to one version "
    "(0.19.0) on one GPU with 8,192 tokens per step and 1,024 sequences; other steps, GPUs and versions are extrapolated.",
    "- The fitted constants come from the same collection of logs as the table above; held-out models in it were within 0.02 GiB.",
    "- CUDA graphs are charged to the KV pool from 0.20 on; their size (0.15 GiB and 0.02 GiB per layer) is within a quarter.",
    "- The peak of vision towers is modelled, and measured only where the sampler hides it.",
    "- 0.21 GiB more outside PyTorch where the vocabulary is odd rests on one log.",
)


def _summary(what: str, errors: Sequence[float], budget: str, unit: str = " GiB") -> str:
    if not errors:
        return f"| {what} | 0 | | | {budget} |"
    mean = sum(map(abs, errors)) / len(errors)
    worst = max(errors, key=abs)
    return f"| {what} | {len(errors)} | {mean:.3f}{unit} | {worst:+.3f}{unit} | {budget} |"


def _start_row(s: Start) -> str:
    cells = [
        s.name,
        str(s.gpus),
        f"{s.weights[0]:.2f} / {s.weights[1]:.2f}",
        f"{s.activation[0]:.2f} / {s.activation[1]:.2f}",
        f"{s.available[0]:.2f} / {s.available[1]:.2f}",
        f"{s.error_gib:+.2f}",
        f"{s.concurrency[0]:.2f} / {s.concurrency[1]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _run_row(r: EngineRun) -> str:
    if r.refused:
        longest = "" if r.longest[1] is None else f"longest context {r.longest[0]:,} / {r.longest[1]:,}"
        cells = [r.name, r.layout, "refused", longest]
    elif r.blocks[1] is None:
        cells = [r.name, r.layout, "none", ""]
    else:
        cells = [
            r.name,
            r.layout,
            f"{r.blocks[0]:,} / {r.blocks[1]:,}",
            f"{r.concurrency[0]:.2f} / {r.concurrency[1]:.2f}",
        ]
    return f"| {' | '.join(cells)} | {'yes' if r.equal else '**no**'} |"


def draw(starts: Sequence[Start], runs: Sequence[EngineRun], path: Path) -> None:
    """Two panels: available KV memory of the published starts, concurrency of the CPU engine's; the diagonal is exact."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sliceway"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.8))
    _scatter(left, [s.available[::-1] for s in starts], "Available KV memory, GiB (H100, vLLM 0.19.0)")
    logged = [(r.concurrency[1], r.concurrency[0]) for r in runs if r.concurrency[1]]
    _scatter(right, logged, "Requests at full length (CPU engine)", log=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _scatter(axes: Any, points: Sequence[tuple[float | None, float]], title: str, *, log: bool = False) -> None:
    measured, predicted = [p[0] for p in points], [p[1] for p in points]
    ends = [min(predicted) * 0.8, max(predicted) * 1.2]
    axes.plot(ends, ends, color="0.7", linewidth=1, zorder=1)
    axes.scatter(measured, predicted, s=18, color="tab:blue", zorder=2)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("measured")
    axes.set_ylabel("predicted")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its plot; with `--check` compare the page with the one there, and exit 1 where they differ."""
    parser = argparse.ArgumentParser(prog="python -m model_registry.sizing.accuracy", description=main.__doc__)
    parser.add_argument("--data", type=Path, default=_ROOT / "tests" / "data" / "sizing", help="the measured figures")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "sizing-accuracy.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    measured = json.loads((options.data / "engine_runs.json").read_text(encoding="utf-8"))
    starts = published_starts(json.loads((options.data / "startup_runs.json").read_text(encoding="utf-8")))
    runs = engine_runs(measured)
    text = page(starts, runs, measured["versions"])
    if options.check:
        return int(not options.out.exists() or options.out.read_text(encoding="utf-8") != text)
    options.out.write_text(text, encoding="utf-8")
    draw(starts, runs, options.out.with_name(_PLOT))
    sys.stdout.write(f"{options.out} and {_PLOT}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
