"""`sliceway slices`: what there is to put engines on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gateway.cli.output import Json, out, print_json
from gateway.config import load_config
from gateway.doctor import default_config_path
from placement.cores import format_cores
from placement.inventory import observe
from placement.schema import FleetConfig
from placement.slices import Inventory, Slice


def register(app: typer.Typer) -> None:
    """Add `sliceway slices`."""
    app.command()(slices)


def slices(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration whose `fleet` to use; sliceway.yaml here, or none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the slices of this machine, and why some are missing."""
    path = config or default_config_path()
    inventory = observe(load_config(path).fleet if path else FleetConfig())
    if as_json:
        print_json({"slices": [_row(one, inventory) for one in inventory.slices], "notes": list(inventory.notes)})
        return
    out.print(_table(inventory))
    for note in inventory.notes:
        out.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def _row(one: Slice, inventory: Inventory) -> dict[str, object]:
    return one.as_public() | {
        "memory_bytes": one.memory_bytes,
        "cores": list(one.cores),
        "product": one.gpu.product if one.gpu else None,
        "isolation": one.kind.isolation,
        "simulated": one.simulated,
        "users": [
            {"pid": u.pid, "name": u.name, "memory_bytes": u.memory_bytes}
            for u in inventory.users
            if u.slice_id == one.id
        ],
    }


def _table(inventory: Inventory) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("slice", "kind", "profile", "memory", "cores", "on", "isolation", "in use by"):
        table.add_column(name, justify="right" if name == "memory" else "left")
    for one in inventory.slices:
        users = ", ".join(f"{u.name} ({u.pid})" for u in inventory.users if u.slice_id == one.id)
        table.add_row(
            escape(one.id),
            one.kind.value + (" (simulated)" if one.simulated else ""),
            one.profile or "",
            f"{one.memory_bytes / 2**30:.1f} GiB",
            format_cores(one.cores),
            escape(one.gpu.product) if one.gpu else "",
            one.kind.isolation,
            escape(users),
        )
    return table
