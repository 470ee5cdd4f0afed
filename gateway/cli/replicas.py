"""`sliceway replica`: single replicas drained, stopped and started again under a running controller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.locate import ConfigOption, config_path
from gateway.cli.output import Json, out, print_json
from gateway.config import Config, load_config
from gateway.errors import UnknownSlice
from placement.cluster.here import node_at_work
from placement.errors import NotCarriedOut, TableUnreadable
from placement.foreman import Foreman
from placement.inventory import observe
from placement.orders import read_orders
from placement.simulate import enter
from placement.state import StatePaths
from placement.table import read

replica = typer.Typer(help="Drain, stop and start single replicas.", no_args_is_help=True)

Names = Annotated[list[str], typer.Argument(metavar="REPLICA...", help="Like chat-0; `sliceway status` lists them.")]


def register(app: typer.Typer) -> None:
    """Add `sliceway replica ...`."""
    app.add_typer(replica, name="replica")


@replica.command()
def drain(names: Names, config: ConfigOption = None, as_json: Json = False) -> None:
    """Send no new requests to these; return when none runs on them. Their engines go on."""
    _do(config, lambda foreman: foreman.drain(names), as_json=as_json)


@replica.command()
def stop(names: Names, config: ConfigOption = None, as_json: Json = False) -> None:
    """Let requests finish, end the engines, and leave their slices free."""
    _do(config, lambda foreman: foreman.stop(names), as_json=as_json)


@replica.command()
def start(
    names: Names,
    on: Annotated[str | None, typer.Option("--on", metavar="SLICE", help="On this slice; for one replica.")] = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Run and serve again what was drained or stopped; return when all are ready."""
    if on is not None and len(names) != 1:
        raise typer.BadParameter("one replica has one slice; name one replica", param_hint="--on")
    if on is not None:
        _refuse_unknown(on, load_config(config_path(config)))
    seats = {names[0]: on} if on is not None else None
    _do(config, lambda foreman: foreman.start(names, on=seats), as_json=as_json)


@replica.command()
def release(config: ConfigOption = None, as_json: Json = False) -> None:
    """Take back all that was asked of replicas here: the configuration alone decides again."""
    _do(config, lambda foreman: foreman.forget(), as_json=as_json)


def _refuse_unknown(slice_id: str, config: Config) -> None:
    """Before anything is asked: an order for a slice that there is not would only take the replica off its own.

    What the controller shows counts as well as what is found here: it may see simulated GPUs, or starts that this user may not.
    Raises UnknownSlice.
    """
    enter(config.fleet, config.state)
    known = {one.id for one in observe(config.fleet).slices}
    with contextlib.suppress(TableUnreadable):
        table = read(StatePaths(config.state).routing_table)
        known |= {row.slice.id for row in table.replicas} | {one.id for one in table.idle}
    if slice_id not in known:
        raise UnknownSlice(
            f"there is no slice {slice_id!r}",
            where="--on",
            remedy=f"Nothing was changed. There are {', '.join(sorted(known)) or 'none'}.",
        )


def _do(config: Path | None, order: Callable[[Foreman], None], *, as_json: bool) -> None:
    loaded = load_config(config_path(config))
    paths = StatePaths(loaded.state)
    if (node := node_at_work(paths.root)) is not None:
        raise NotCarriedOut(
            f"this machine is node {node.name!r} of a cluster, whose head decides which replica is where",
            where=str(paths.root),
            remedy="Change `replicas` in the configuration that leads it, and: sliceway reload; or plan: sliceway plan CONFIG --ray HOST:PORT.",
        )
    order(Foreman(paths, loaded.engine))
    orders = read_orders(paths)
    if as_json:
        print_json(
            {
                "drained": sorted(orders.drained),
                "stopped": sorted(orders.stopped),
                "seats": dict(orders.seats),
                "number": orders.number,
            }
        )
    else:
        held = [f"{name} drained" for name in sorted(orders.drained)] + [f"{n} stopped" for n in sorted(orders.stopped)]
        out.print("; ".join(held) or "every replica is as configured", highlight=False)
