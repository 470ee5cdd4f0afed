"""What the controller is doing, for people: `up` and `status` show it, nothing depends on it.

Written without waiting for the disk: after a crash of the machine it is out of date anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from placement.locks import holder
from placement.state import StatePaths
from placement.table import ReplicaState, SliceRow


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ErrorRow(_Row):
    """An error of sliceway, as data."""

    code: str
    message: str
    where: str | None = None
    remedy: str | None = None


class ReplicaStatus(_Row):
    """One replica. `stage` is what a starting engine is doing; `reason` why it is not ready."""

    replica: str
    model: str
    slice: SliceRow
    cores: str = ""
    memory_bytes: int
    memory_used_bytes: int | None = Field(
        default=None, description="Resident memory of all its processes; CPU slices only."
    )
    state: ReplicaState
    stage: str | None = None
    reason: str | None = None
    remedy: str | None = None
    since: datetime
    retry_at: datetime | None = None
    restarts: int = 0
    engine_pid: int | None = None
    adopted: bool = False
    outdated: bool = Field(default=False, description="Runs by an earlier configuration until its turn comes.")
    endpoint: str | None = None
    engine_version: str | None = Field(default=None, description="Of the vLLM that it starts; unset for other engines.")
    log: str
    placement: dict[str, Any] | None = Field(
        default=None, description="What was found out about where it runs, when it became ready; see placement.proof."
    )


class Refusal(_Row):
    """A configuration that was not taken over; what ran before goes on."""

    at: datetime
    error: ErrorRow


class ScalingRow(_Row):
    """One model whose replicas follow demand: how many are asked for, how many have a slice, and why."""

    replicas: int
    placed: int
    least: int
    most: int
    reason: str
    arrivals_per_second: float = Field(default=0.0, description="With what waits, made up for within the window.")
    running: int = Field(default=0, description="Requests that its engines have.")
    requests_per_replica: float | None = Field(
        default=None, description="Requests per second that one replica is counted with; unset where nobody knows."
    )
    capacity_source: Literal["measured", "estimated", "unknown"] = "unknown"
    capacity_reason: str = ""
    sleep: str | None = Field(default=None, description="How it sleeps while no request comes, and why so.")
    ignored: tuple[str, ...] = Field(default=(), description="Measurements that do not count, and why.")

    @property
    def short(self) -> int:
        """Replicas that no free slice could be found for."""
        return max(0, self.replicas - self.placed)


class RepartitionEvent(_Row):
    """How one attempt to cut GPUs anew for demand ended; `steps` are those that were done."""

    at: datetime
    result: Literal["done", "unchanged", "proposed", "busy", "failed"]
    reason: str
    steps: tuple[str, ...] = ()


class RepartitionStatus(_Row):
    """Cutting GPUs anew for demand: what is done at the moment, when it is tried again, and how it ended before."""

    mode: Literal["propose", "automatic"] = "propose"
    running: bool = False
    step: str | None = None
    proposed: str | None = Field(
        default=None,
        description="What cutting anew would gain, where the configuration only has it proposed; on a cluster.",
    )
    next_in_seconds: float | None = Field(default=None, description="Until then nothing is tried.")
    counts: dict[str, int] = Field(default_factory=dict, description="Attempts by result, since the controller began.")
    events: tuple[RepartitionEvent, ...] = ()


class ControllerStatus(_Row):
    """Everything the controller tells about itself."""

    version: Literal[1] = 1
    pid: int
    started_at: datetime
    updated_at: datetime
    state: Literal["starting", "running", "stopping"]
    config: str
    generation: int
    replicas: tuple[ReplicaStatus, ...] = ()
    unplaced: dict[str, ErrorRow] = Field(
        default_factory=dict, description="Replicas that no slice could be found for."
    )
    refused: Refusal | None = None
    orders: int = Field(default=0, description="Number of the last orders that were taken over; see placement.orders.")
    notes: tuple[str, ...] = ()
    scaling: dict[str, ScalingRow] = Field(default_factory=dict, description="Models whose replicas follow demand.")
    repartition: RepartitionStatus = RepartitionStatus()

    @property
    def settled(self) -> bool:
        """Whether nothing is about to change by itself: every replica is ready or has failed, and none waits for its turn."""
        stopped = {r.model for r in self.replicas if r.state is ReplicaState.FAILED}
        return self.state == "running" and all(
            r.state in (ReplicaState.READY, ReplicaState.FAILED, ReplicaState.ASLEEP)
            and (not r.outdated or r.model in stopped)
            for r in self.replicas
        )


class ClusterScaling(_Row):
    """What a cluster's head makes of demand, for the gateways of its nodes: `unplaced` are replicas that have no slice."""

    unplaced: tuple[str, ...] = ()
    scaling: dict[str, ScalingRow] = Field(default_factory=dict, description="By pool.")
    repartition: RepartitionStatus = RepartitionStatus()


class LeaderStatus(_Row):
    """What the process that leads a cluster plans for it, and what came of it, for people."""

    repartition: RepartitionStatus = RepartitionStatus()
    planned: tuple[str, ...] = Field(default=(), description="What came of `fleet.partition: planned`, a line each.")

    def same_as(self, told: Mapping[str, Any] | None) -> bool:
        """Whether the head tells this already; that time passes until the next attempt is nothing new."""
        try:
            known = LeaderStatus.model_validate(told) if told is not None else None
        except ValidationError:
            return False
        return known is not None and self._lasting() == known._lasting()

    def _lasting(self) -> LeaderStatus:
        left = self.repartition.model_copy(update={"next_in_seconds": None})
        return self.model_copy(update={"repartition": left})


def read_cluster_scaling(path: Path) -> ClusterScaling | None:
    """What is at `path`; None if there is nothing that makes sense."""
    try:
        return ClusterScaling.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def read_status(path: Path) -> ControllerStatus | None:
    """The status at `path`; None if there is none that makes sense."""
    try:
        return ControllerStatus.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def running_status(paths: StatePaths) -> ControllerStatus | None:
    """What the controller of this state directory tells; None if none runs."""
    pid, status = holder(paths.controller_lock), read_status(paths.controller_status)
    return status if status is not None and status.pid == pid else None


def write_status(status: ControllerStatus, path: Path) -> None:
    """Replace the file at `path`."""
    draft = path.with_name(f".{path.name}.{status.pid}")
    draft.write_text(status.model_dump_json(indent=1) + "\n", encoding="utf-8")
    draft.chmod(0o600)
    draft.replace(path)
