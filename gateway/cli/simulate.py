"""The option that puts simulated GPUs in the place of what a machine has."""

from __future__ import annotations

from typing import Annotated

import typer

Simulate = Annotated[
    str | None,
    typer.Option(
        "--simulate", metavar="FLEET", help="On GPUs that are not there, like h100-sxm:8 or h100-sxm:4,a30:2."
    ),
]
