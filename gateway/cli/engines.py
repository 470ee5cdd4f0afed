"""`sliceway engine`: the environments that engines run in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gateway.cli.output import Json, err, out, print_json
from placement.engines import (
    EngineEnvironment,
    EngineKind,
    InstallProgress,
    describe_engine,
    engine_home,
    find_engine_python,
    install_engine,
    is_current,
)
from placement.errors import EngineMissing

engine = typer.Typer(help="The environments that engines run in.", no_args_is_help=True)

_STAGES = {
    "environment": "making the environment",
    "pytorch": "PyTorch",
    "packages": "packages",
    "writing": "unpacking and writing (the longest part)",
    "checking": "checking",
}

Kind = Annotated[EngineKind, typer.Option("--kind", help="cpu, or cuda for NVIDIA GPUs.")]


def register(app: typer.Typer) -> None:
    """Add `sliceway engine ...`."""
    app.add_typer(engine, name="engine")


@engine.command()
def install(
    kind: Kind = "cpu",
    into: Annotated[Path | None, typer.Option(help="Another directory than the usual one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again even if it is complete.")] = False,
    as_json: Json = False,
) -> None:
    """Install vLLM into an environment of its own. Nothing happens if it is there and complete."""
    if not force and is_current(kind, home=into):
        python = (into or engine_home(kind)) / "bin" / "python"
    else:
        python = _install_with_progress(kind, into, force=force)
    _show(describe_engine(python), as_json=as_json)


@engine.command()
def show(kind: Kind = "cpu", as_json: Json = False) -> None:
    """Which interpreter engines are started with, and what it holds."""
    environment = describe_engine(find_engine_python(kind))
    if environment.kind is None:
        raise EngineMissing(
            "this interpreter has no vLLM",
            where=str(environment.python),
            remedy=f"sliceway engine install --kind {kind}",
        )
    _show(environment, as_json=as_json)


def _install_with_progress(kind: EngineKind, into: Path | None, *, force: bool) -> Path:
    """A bar on a terminal; elsewhere a line for every stage and every twenty packages, so that a log shows life."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(f"vLLM ({kind})", total=None, detail="")
        seen: set[tuple[str, int]] = set()

        def report(progress: InstallProgress) -> None:
            bar.update(
                task,
                description=_STAGES[progress.stage],
                completed=progress.done,
                total=progress.total or None,
                detail=progress.detail[:50],
            )
            mark = (progress.stage, progress.done // 20)
            if not err.is_terminal and mark not in seen:
                seen.add(mark)
                count = f" {progress.done}/{progress.total}" if progress.total else ""
                err.print(f"engine: {_STAGES[progress.stage]}{count}", highlight=False)

        return install_engine(kind, report=report, home=into, force=force)


def _show(environment: EngineEnvironment, *, as_json: bool) -> None:
    if as_json:
        fields = ("kind", "vllm", "torch", "transformers")
        print_json({"python": str(environment.python)} | {name: getattr(environment, name) for name in fields})
        return
    out.print(
        f"vLLM {environment.vllm} ({environment.kind}), PyTorch {environment.torch}, transformers {environment.transformers}"
    )
    out.print(f"[dim]{environment.python}[/]")
