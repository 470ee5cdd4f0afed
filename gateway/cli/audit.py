"""`sliceway audit`: who changed what, and whether the record of it is whole. `sliceway reload`: the configuration, read again."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gateway.audit import Head
from gateway.cli.locate import ConfigArgument, ConfigOption, required_config
from gateway.cli.operate import actor, operations
from gateway.cli.output import Json, err, out, print_json
from model_registry.words import counted

audit = typer.Typer(help="The record of every change.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `sliceway audit` and `sliceway reload`."""
    app.add_typer(audit, name="audit")
    app.command()(reload)


@audit.command()
def show(
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    last: Annotated[int, typer.Option("--last", "-n", min=1, max=100_000, help="How many entries.")] = 20,
    as_json: Json = False,
) -> None:
    """Show the last changes, oldest first."""
    entries = operations(required_config(config_option, config)).audit().tail(last)
    if as_json:
        print_json({"entries": [entry.as_public() for entry in entries]})
        return
    if not entries:
        out.print("Nothing was changed yet.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("#", "when", "who", "what", "of", "details"):
        table.add_column(column)
    for entry in entries:
        details = ", ".join(f"{name}={value}" for name, value in entry.detail.items() if value not in (None, ""))
        table.add_row(
            str(entry.seq), entry.at, escape(entry.actor), entry.action, escape(entry.target), escape(details)
        )
    out.print(table)


@audit.command()
def verify(
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="SEQ:MAC", help="A head that `verify` printed earlier, which must still be there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every entry against the one before; exits with 1 if anything was changed, dropped or put in."""
    verdict = operations(required_config(config_option, config)).audit().verify(_head(head) if head else None)
    shown = f"{verdict.head.seq}:{verdict.head.mac}"
    if as_json:
        found = {
            "intact": verdict.intact,
            "entries": verdict.entries,
            "head": shown,
            "problems": list(verdict.problems),
        }
        print_json(found)
    elif verdict.intact:
        out.print(
            f"{counted(verdict.entries, 'entry', 'entries')}, all as written. The last one is\n{shown}", highlight=False
        )
    else:
        for problem in verdict.problems:
            err.print(f"[bold red]error[/] {escape(problem)}")
    if not verdict.intact:
        raise typer.Exit(1)


def reload(config: ConfigArgument = None, config_option: ConfigOption = None, as_json: Json = False) -> None:
    """Have gateways and the controller read the configuration again; a wrong one changes nothing."""
    loaded = operations(required_config(config_option, config)).reload(actor=actor())
    if as_json:
        print_json({"models": len(loaded.models), "tenants": len(loaded.tenants)})
    else:
        models, tenants = counted(len(loaded.models), "model"), counted(len(loaded.tenants), "tenant")
        out.print(f"The configuration is read again: {models}, {tenants}.")


def _head(text: str) -> Head:
    match = re.fullmatch(r"(\d{1,15}):([0-9a-f]{64})", text)
    if match is None:
        raise typer.BadParameter("it is not of the form SEQ:MAC, as `sliceway audit verify` prints it")
    return Head(int(match.group(1)), match.group(2))
