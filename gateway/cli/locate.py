"""Which configuration a command means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateway.config import Config, load_config
from gateway.doctor import default_config_path
from model_registry.errors import ConfigError

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="Configuration; sliceway.yaml here if unset.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="PATH", help="Configuration; sliceway.yaml here if unset.")
]


def required_config(*candidates: Path | None) -> Config:
    """The first configuration named, or sliceway.yaml in the working directory.

    Raises ConfigError where there is none, or where it is wrong.
    """
    return load_config(config_path(*candidates))


def config_path(*candidates: Path | None) -> Path:
    """Where that configuration lies. Raises ConfigError where none is named and there is none."""
    path = next((one for one in candidates if one is not None), None) or default_config_path()
    if path is None:
        raise ConfigError(
            "no configuration was named and there is no sliceway.yaml here",
            remedy="Name one, or write one: sliceway init",
        )
    return path
