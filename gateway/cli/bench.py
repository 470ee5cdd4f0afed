"""`sliceway bench`: the load tests, on a configuration's own tenants and models. One module per command."""

from __future__ import annotations

import typer

from gateway.cli import bench_capacity, bench_compare, bench_isolation, bench_overhead

COMMANDS = (bench_isolation, bench_capacity, bench_compare, bench_overhead)
"""Modules with a `register(app)` each."""


def register(app: typer.Typer) -> None:
    """Add `sliceway bench ...`."""
    bench = typer.Typer(help="Measure what slices do for tenants.", no_args_is_help=True)

    @bench.callback()
    def group() -> None:
        """Measure what slices do for tenants."""

    for module in COMMANDS:
        module.register(bench)
    app.add_typer(bench, name="bench")
