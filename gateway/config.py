"""The whole configuration: the sections of every package, composed and checked against one another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from model_registry.loader import load_yaml
from model_registry.schema import ModelConfig, Name, Section, Size
from placement.schema import EngineConfig, FleetConfig

Listen = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s/]+):\d{1,5}$")]


class TenantConfig(Section):
    """Someone who sends requests. Keys are made by `sliceway keys create TENANT`."""

    name: Name
    models: tuple[Name, ...] | Literal["all"] = Field(default="all", description="Models this tenant may use.")


class GatewayConfig(Section):
    """The HTTP side."""

    listen: Listen = "127.0.0.1:8080"
    authentication: Literal["keys", "none"] = Field(default="keys", description="`none` makes everyone the tenant `anonymous`.")
    max_body: Size = Field(default=32 * 2**20, description="Larger request bodies are refused with 413.")
    max_header: Size = Field(default=64 * 2**10, description="Larger request heads are refused.")
    connect_timeout_seconds: float = Field(default=5.0, gt=0)
    first_byte_timeout_seconds: float = Field(default=600.0, gt=0, description="How long an engine may take to its first byte.")
    body_timeout_seconds: float = Field(default=60.0, gt=0, description="How long a client may take to send its body.")
    drain_timeout_seconds: float = Field(default=30.0, ge=0, description="How long streams may go on after a stop was asked for.")


class Config(Section):
    """One configuration file, everything in it."""

    version: Literal["v1"]
    state_dir: Path | None = Field(default=None, description="Keys, routing table, logs, journal; under XDG_STATE_HOME if unset.")
    fleet: FleetConfig = FleetConfig()
    engine: EngineConfig = EngineConfig()
    models: tuple[ModelConfig, ...] = ()
    tenants: tuple[TenantConfig, ...] = ()
    gateway: GatewayConfig = GatewayConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for section, names in (("models", [m.name for m in self.models]), ("tenants", [t.name for t in self.tenants])):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{section}: {', '.join(map(repr, twice))} stands there more than once")
        known = {m.name for m in self.models}
        for tenant in self.tenants:
            unknown = sorted(set(tenant.models) - known) if tenant.models != "all" else []
            if unknown:
                raise ValueError(
                    f"tenant {tenant.name!r} names unknown models {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, sorted(known))) or 'none'}"
                )
        pinned = [s for m in self.models for s in m.slices]
        if shared := sorted({s for s in pinned if pinned.count(s) > 1}):
            raise ValueError(f"slice {shared[0]!r} is named for two replicas; a slice holds one engine")
        return self

    @property
    def state(self) -> Path:
        """The state directory, absolute."""
        if self.state_dir is not None:
            return self.state_dir.expanduser().absolute()
        base = os.environ.get("XDG_STATE_HOME")
        return (Path(base) if base else Path.home() / ".local" / "state") / "sliceway"


def load_config(path: Path) -> Config:
    """Read, include, validate.

    Relative paths in the file (`state_dir`, `source`, `chat_template`) mean relative to the file that names them.
    Raises ConfigError with file, line, field and the nearest valid key for every problem found.
    """
    return load_yaml(path, Config)
