"""The routing table: what the controller publishes and the gateway reads.

A JSON file, replaced atomically, with a generation that only grows. Readers keep the last good table when the file is
missing, damaged or of a version they do not know; a reader never writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_registry.atomic import write_atomically
from placement.errors import TableUnreadable


class ReplicaState(StrEnum):
    """Where a replica is in its life. Only READY takes new requests; DRAINING finishes those it has; ASLEEP keeps process
    and slice with the GPU's memory freed.
    """

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPED = "stopped"
    ASLEEP = "asleep"


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class SliceRow(_Row):
    """A slice as the outside sees it; the same fields as in `/slices`. `product` is the card's, by the catalogue's name."""

    id: str
    kind: str
    profile: str | None = None
    uuid: str | None = None
    gpu: str | None = None
    product: str | None = None


class ReplicaRow(_Row):
    """One replica. `endpoint` is `unix:/path/to.sock`, `http://host:port`, or `https://host:port` for `engine.tls`."""

    replica: str
    model: str
    engine_model: str = Field(
        description="The name the engine knows the model by; the gateway may have to write it into bodies."
    )
    endpoint: str
    slice: SliceRow
    state: ReplicaState
    reason: str | None = Field(
        default=None, description="Why it is not ready, in the engine's own words where it has any."
    )
    max_num_seqs: int | None = Field(default=None, ge=1, description="Sequences the engine runs at once.")
    kv_cache_tokens: int | None = Field(default=None, ge=1, description="Tokens that fit into the engine's KV pool.")
    secret: str | None = Field(
        default=None, repr=False, description="What the engine wants to be shown, where others could reach it as well."
    )


class ModelRow(_Row):
    """A model that clients may name, with or without a replica that is ready."""

    name: str
    task: Literal["generate", "embed", "unknown"] = "unknown"
    max_model_len: int | None = None
    created: int = 0
    unplaced: Mapping[str, str] = Field(default_factory=dict, description="Why replicas have no slice, by replica.")


class RoutingTable(_Row):
    """Everything the gateway needs to route."""

    version: Literal[1] = 1
    generation: int = Field(ge=0)
    models: tuple[ModelRow, ...] = ()
    replicas: tuple[ReplicaRow, ...] = ()
    idle: tuple[SliceRow, ...] = Field(default=(), description="Slices that no replica has, for `/slices` to show.")

    def ready(self, model: str) -> tuple[ReplicaRow, ...]:
        """Replicas of `model` that take new requests."""
        return tuple(r for r in self.replicas if r.model == model and r.state is ReplicaState.READY)


def publish(table: RoutingTable, path: Path) -> None:
    """Replace the file at `path` by `table`, atomically and durably."""
    write_atomically(path, table.model_dump_json(indent=1).encode() + b"\n", mode=0o600)


def read(path: Path) -> RoutingTable:
    """The table at `path`.

    Raises TableUnreadable if the file is missing, damaged or of another version.
    """
    try:
        return RoutingTable.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise TableUnreadable(
            "there is no routing table yet", where=str(path), remedy="Start the controller: sliceway up CONFIG"
        ) from error
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise TableUnreadable(
            f"the routing table cannot be read: {first}",
            where=str(path),
            remedy="The last good table stays in use; the controller writes a new one at its next change.",
        ) from error
