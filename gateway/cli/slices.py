"""`sliceway slices`: what there is to put engines on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.cli.output import Json, out, print_json
from gateway.cli.simulate import Simulate
from gateway.config import Config, load_config
from gateway.doctor import default_config_path
from gateway.layouts import with_simulation
from placement.cores import format_cores
from placement.inventory import observe
from placement.simulate import enter
from placement.slices import Inventory, Slice

_WIDEST = 400


def register(app: typer.Typer) -> None:
    """Add `sliceway slices`."""
    app.command()(slices)


def slices(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration whose `fleet` to use; sliceway.yaml here, or none.")
    ] = None,
    simulate: Simulate = None,
    as_json: Json = False,
) -> None:
    """List the slices of this machine, and why some are missing."""
    path = config or default_config_path()
    loaded = with_simulation(load_config(path) if path else Config(version="v1"), simulate)
    enter(loaded.fleet, loaded.state)
    inventory = observe(loaded.fleet)
    if as_json:
        print_json(
            {
                "slices": [_row(one, inventory) for one in inventory.slices],
                "gpus": [gpu.as_public() for gpu in inventory.gpus],
                "driver": inventory.driver,
                "notes": list(inventory.notes),
            }
        )
        return
    table = _table(inventory)
    # Ids are for copying, so a narrow terminal wraps lines instead of cutting them.
    Console(width=max(out.width, out.measure(table, options=out.options.update_width(_WIDEST)).maximum)).print(table)
    for note in inventory.notes:
        out.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def _row(one: Slice, inventory: Inventory) -> dict[str, object]:
    return one.as_public() | {
        "memory_bytes": one.memory_bytes,
        "cores": list(one.cores),
        "cores_shared": one.shared_cores,
        "numa_node": one.gpu.numa_node if one.gpu else None,
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
            format_cores(one.cores) + (" (shared)" if one.shared_cores else ""),
            escape(one.gpu.product) if one.gpu else "",
            one.kind.isolation,
            escape(users),
        )
    return table
