"""`sliceway doctor`: what is wrong here, and the command that mends it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gateway.cli.output import Json, out, print_json
from gateway.cli.simulate import Simulate
from gateway.config import Config, load_config
from gateway.doctor import Finding, default_config_path, examine
from gateway.layouts import with_simulation
from model_registry.words import counted

_SIGNS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "problem": "[bold red]problem[/]"}


def register(app: typer.Typer) -> None:
    """Add `sliceway doctor`."""
    app.command()(doctor)


def doctor(
    config: Annotated[Path | None, typer.Argument(help="Configuration to check; sliceway.yaml here, or none.")] = None,
    simulate: Simulate = None,
    as_json: Json = False,
) -> None:
    """Look for what would go wrong on this machine. Exits 1 if there is a problem."""
    path = config or default_config_path()
    findings = examine(with_simulation(load_config(path) if path else Config(version="v1"), simulate))
    problems = sum(f.verdict == "problem" for f in findings)
    if as_json:
        print_json({"config": path, "problems": problems, "findings": [asdict(f) for f in findings]})
    else:
        _show(findings, path, problems)
    raise typer.Exit(1 if problems else 0)


def _show(findings: tuple[Finding, ...], path: Path | None, problems: int) -> None:
    out.print(f"[dim]{escape(str(path)) if path else 'no configuration named: looking at the machine alone'}[/]")
    for finding in findings:
        out.print(f"{_SIGNS[finding.verdict]} {finding.check:8} {escape(finding.message)}", highlight=False)
        for line in finding.remedy.splitlines():
            out.print(f"                 [dim]→ {escape(line)}[/]", highlight=False)
    out.print(f"[bold red]{counted(problems, 'problem')}[/]" if problems else "[green]nothing stands in the way[/]")
