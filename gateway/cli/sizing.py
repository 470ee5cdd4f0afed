"""`sliceway size`: what a model needs, which profiles hold it, and why the others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gateway.cli.output import Json, out, print_json
from gateway.config import Config
from model_registry.catalogue import Product, load_catalogue
from model_registry.errors import ConfigError
from model_registry.model import EngineLimits, ModelSpec, SliceFit
from model_registry.sizing.calibration import CALIBRATION_FILE, CalibrationStore
from model_registry.sizing.defaults import default_length, step_tokens
from model_registry.sizing.footprint import CUDA_CONTEXT_BYTES
from model_registry.sizing.reader import read_architecture
from model_registry.sizing.report import SizeReport, Workload, size, with_weights
from model_registry.sizing.survey import Row
from model_registry.sizing.units import GIB, gib
from model_registry.sizing.versions import rules_for
from model_registry.source import resolve_source

_SEQUENCES = 16
_BAR_WIDTH = 64
_COLOURS = {
    "weights": "blue",
    "activations": "magenta",
    "CUDA context and libraries": "yellow",
    "CUDA graphs": "cyan",
    "engine processes": "yellow",
    "KV cache": "green",
    "not used": "bright_black",
}


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("size")(size_command)


def size_command(
    source: Annotated[str, typer.Argument(help="Hub id, directory, GGUF file, or a lone config.json.")],
    gpu: Annotated[str | None, typer.Option(help="Only this product: h100-sxm, an NVML name, a PCI id.")] = None,
    profile: Annotated[str | None, typer.Option(help="The slice the figures are for: 1g.10gb.")] = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.01, help="A whole GPU or slice of this size instead of a profile.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer together.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = _SEQUENCES,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per engine step.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of the memory that the engine may plan with.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, fp8, nvfp4, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="A quantisation applied while loading: fp8, ...")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    weights_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of the checkpoint, where it is not at hand.")
    ] = None,
    kv_cache_memory_gib: Annotated[
        float | None,
        typer.Option(min=0.001, help="The KV pool itself; alone it means a CPU, as VLLM_CPU_KVCACHE_SPACE."),
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens per KV block.")] = None,
    vllm_version: Annotated[
        str, typer.Option(help="The engine's version; memory is accounted for differently in each.")
    ] = "0.33.0",
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="Capture CUDA graphs.")] = True,
    prefix_caching: Annotated[
        bool | None, typer.Option("--prefix-caching/--no-prefix-caching", help="As the engine decides, if unset.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length that speed is estimated for.")] = 800,
    output_tokens: Annotated[int, typer.Option(min=1, help="Answer length that speed is estimated for.")] = 200,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A calibration file, whose measured figures replace estimated ones; the state directory's if unset."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a model needs, on which slices it runs, and with which engine arguments."""
    spec = resolve_source(source, revision=revision)
    if weights_bytes is not None:
        spec = with_weights(spec, weights_bytes)
    where = _device(device, gpu, profile, memory_gib, kv_cache_memory_gib)
    limits = _limits(
        spec,
        device=where,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_dtype=kv_cache_dtype,
        dtype=dtype,
        quantization=quantization,
        tensor_parallel_size=tensor_parallel_size,
        block_tokens=block_size,
        kv_cache_memory_bytes=None if kv_cache_memory_gib is None else int(kv_cache_memory_gib * GIB),
        vllm_version=vllm_version,
        cuda_graphs=cuda_graphs,
        prefix_caching=prefix_caching,
    )
    report = size(
        spec,
        limits,
        products=_products(gpu),
        profile=profile,
        memory_bytes=None if memory_gib is None else int(memory_gib * GIB),
        workload=Workload(prompt_tokens, output_tokens),
        calibrations=CalibrationStore(calibration or Config(version="v1").state / CALIBRATION_FILE),
    )
    if as_json:
        print_json(report.as_public())
        return
    _show(report, gpu is not None)


def _device(
    asked: str, gpu: str | None, profile: str | None, memory_gib: float | None, pool_gib: float | None
) -> Literal["cuda", "cpu"]:
    """A GPU, unless a CPU is asked for or nothing but a KV pool is named, which is how a CPU engine is sized."""
    if asked == "cuda" or asked == "cpu":
        return "cuda" if asked == "cuda" else "cpu"
    if asked != "auto":
        raise ConfigError(f"{asked!r} is no device", where="--device", remedy="One of auto, cuda, cpu.")
    return "cpu" if pool_gib is not None and (gpu, profile, memory_gib) == (None, None, None) else "cuda"


def _limits(
    spec: ModelSpec,
    *,
    device: Literal["cuda", "cpu"],
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int | None,
    gpu_memory_utilization: float | None,
    kv_cache_dtype: str,
    dtype: str,
    quantization: str | None,
    tensor_parallel_size: int,
    block_tokens: int | None,
    kv_cache_memory_bytes: int | None,
    vllm_version: str,
    cuda_graphs: bool,
    prefix_caching: bool | None,
) -> EngineLimits:
    """What was asked for, and the model's own values for the rest."""
    arch = read_architecture(spec.config)
    length = max_model_len or default_length(spec, arch)
    return EngineLimits(
        max_model_len=length,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens or step_tokens(arch, length, max_num_seqs),
        gpu_memory_utilization=gpu_memory_utilization or rules_for(vllm_version).default_utilization,
        kv_cache_dtype=kv_cache_dtype,
        dtype=dtype,
        quantization=quantization,
        block_tokens=block_tokens,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        tensor_parallel_size=tensor_parallel_size,
        cuda_graphs=cuda_graphs,
        vllm_version=vllm_version,
        device=device,
        prefix_caching=prefix_caching,
    )


def _products(gpu: str | None) -> tuple[Product, ...]:
    catalogue = load_catalogue()
    return catalogue.products if gpu is None else (catalogue.product(gpu),)


def _show(report: SizeReport, one_product: bool) -> None:
    chosen = report.chosen
    place = " ".join(filter(None, (chosen.product, chosen.profile))) or report.limits.device.upper()
    out.print(
        f"[bold]{escape(report.spec.source)}[/]  {escape(report.spec.architecture)}, vLLM {report.limits.vllm_version}"
    )
    out.print(f"\n{place}, {gib(chosen.memory_bytes)}")
    _show_bar(report)
    if report.rows:
        out.print()
        out.print(_table(report, one_product))
    if speed := report.speed:
        out.print(
            f"\nEstimated speed with {speed.batch} sequences of {speed.prompt_tokens} + {speed.output_tokens} tokens: "
            f"TTFT {speed.ttft_seconds * 1e3:.0f} ms, ITL {speed.itl_seconds * 1e3:.1f} ms ({speed.bound_by}-bound), "
            f"{speed.decode_tokens_per_second:.0f} tokens/s"
        )
    for note in report.assumptions:
        out.print(f"[dim]· {escape(note)}[/]", highlight=False)
    out.print(f"\n[bold {'green' if chosen.fits else 'red'}]{escape(_capitalised(report.verdict))}[/]", highlight=False)
    if chosen.fits:
        out.print(f"[dim]vllm serve ... {escape(' '.join(chosen.engine_args))}[/]", highlight=False)


def _capitalised(sentence: str) -> str:
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _parts(report: SizeReport) -> list[tuple[str, int]]:
    """The slice's memory cut into its parts, in the order in which the engine meets them."""
    footprint, chosen = report.footprint, report.chosen
    cuda = report.limits.device == "cuda"
    surroundings = footprint.non_torch_bytes + (CUDA_CONTEXT_BYTES if cuda else footprint.host_bytes)
    parts = [
        ("weights", footprint.weights_bytes),
        ("activations", footprint.activation_bytes),
        ("CUDA context and libraries" if cuda else "engine processes", surroundings),
        ("CUDA graphs", footprint.cuda_graph_bytes),
        ("KV cache", max(0, chosen.available_kv_bytes)),
    ]
    parts.append(("not used", max(0, chosen.memory_bytes - sum(part for _, part in parts))))
    return [(name, part) for name, part in parts if part]


def _show_bar(report: SizeReport) -> None:
    parts = _parts(report)
    total = sum(part for _, part in parts)
    bar, legend = Text(), Text()
    for name, part in parts:
        bar.append("█" * max(1, round(_BAR_WIDTH * part / total)), style=_COLOURS[name])
        legend.append("█ ", style=_COLOURS[name])
        legend.append(f"{name} {gib(part)}   ")
    out.print(bar)
    out.print(legend)


def _table(report: SizeReport, one_product: bool) -> Table:
    """One row per profile without variants; the product's name only where there are several."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "profile") if one_product else ("", "product", "profile"):
        table.add_column(title, no_wrap=True)
    for title in ("memory", "KV cache", "at once", "longest", "ITL"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why not", style="dim")
    previous = ""
    for row in (r for r in report.rows if r.profile.is_base and (r.fit is not None or one_product)):
        mark, *cells = _cells(report, row)
        name = "" if row.product.name == previous else row.product.name
        table.add_row(mark, *([] if one_product else [name]), *cells)
        previous = row.product.name
    return table


def _cells(report: SizeReport, row: Row) -> list[str]:
    fit = row.fit
    if fit is None:
        return ["[dim]?[/]", row.profile.name, "", "", "", "", "", "size unpublished"]
    if not fit.fits:
        return ["[red]no[/]", row.profile.name, gib(fit.memory_bytes), "", "", "", "", _short(fit)]
    speed = report.speed_on(row)
    chosen = (row.product.name, row.profile.name) == (report.chosen.product, report.chosen.profile)
    return [
        "[green]yes[/]",
        f"[bold]{row.profile.name}[/]" if chosen else row.profile.name,
        gib(fit.memory_bytes),
        gib(fit.available_kv_bytes),
        f"{fit.max_concurrency:.1f}",
        f"{fit.longest_context_tokens:,}",
        f"~{speed.itl_seconds * 1e3:.1f} ms" if speed else "",
        "",
    ]


def _short(fit: SliceFit) -> str:
    """The first term that does not fit, and what is missing, for a column of the table."""
    if fit.breaking_term != "kv_cache":
        return (fit.breaking_term or "").replace("_", " ")
    return f"KV -{gib(-fit.head_room_bytes)}" if fit.head_room_bytes < 0 else "KV in margin"
