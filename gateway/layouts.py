"""What `plan`, `apply`, `assert` and `export` work with: a machine (real or simulated), its GPUs, and what runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gateway.config import Config
from gateway.tenant_pools import tenant_pools
from model_registry.errors import SlicewayError
from placement.assign import stem_of, wanted_replicas
from placement.demanded import model_of
from placement.errors import PartitionError, SimulatorError
from placement.goals import PlacementConfig
from placement.gpus import GpuState
from placement.locks import exclusive
from placement.nvml.partition import NvmlPartitioner
from placement.partition import Drain, Tools
from placement.partition.host import holders, reset
from placement.planned_seats import SEATS_FILE, PlannedSeats
from placement.renewals import RENEWALS_FILE, RenewalsFile
from placement.simulate import enter, simulated_fleet
from placement.simulator import Simulation
from placement.state import StatePaths
from placement.status import ControllerStatus, running_status
from placement.table import ReplicaState

_LOCKS = Path("/run/lock")


@dataclass(frozen=True, slots=True)
class Machine:
    """Whose GPUs are meant. `simulation` is None on real ones."""

    driver: NvmlPartitioner
    simulation: Simulation | None

    @property
    def simulated(self) -> bool:
        """Whether every number of it is made up."""
        return self.simulation is not None

    def tools(self, drain: Drain | None = None) -> Tools:
        """What applying may call on this machine."""
        if self.simulation is None:
            return Tools(drain=drain, reset=reset, clients=holders)
        return Tools(drain=drain, reset=partial(_reset_simulated, self.simulation), clients=holders)


def _reset_simulated(simulation: Simulation, gpu: GpuState) -> None:
    try:
        simulation.reset(gpu.index)
    except SimulatorError as error:
        raise PartitionError(f"the GPU could not be reset: {error.message}", where=gpu.label) from error


def with_simulation(config: Config, fleet: str | None) -> Config:
    """`config` on the GPUs that `--simulate` names; as it is without."""
    if fleet is None:
        return config
    try:
        return config.model_copy(update={"fleet": simulated_fleet(fleet, config.fleet)})
    except SlicewayError as error:
        error.where = error.where or "--simulate"
        raise


def machine_of(config: Config) -> Machine:
    """The machine that `config` is for; a simulated one is entered by this process."""
    simulation = enter(config.fleet, config.state)
    return Machine(NvmlPartitioner(), simulation)


@contextlib.contextmanager
def one_at_a_time(config: Config, machine: Machine) -> Iterator[None]:
    """Keep a second `apply` off this machine. Raises StateLocked if one is at work."""
    base = (
        machine.simulation.directory if machine.simulation else _LOCKS if os.access(_LOCKS, os.W_OK) else config.state
    )
    path = base / "sliceway-apply.lock"
    with contextlib.ExitStack() as held:
        # Another user's file may be closed to this one. The driver still refuses what collides, and that is found.
        with contextlib.suppress(PermissionError):
            held.enter_context(exclusive(path, what="change of layouts", remedy="Wait until it is done (pid {pid})."))
            with contextlib.suppress(OSError):
                path.chmod(0o666)
        yield


def plans_fleet(config: Config) -> bool:
    """Whether the configuration asks for more than layouts and fixed numbers of replicas."""
    return config.planned


def placement_config(config: Config) -> PlacementConfig:
    """The part of the configuration that the controller acts on, with who has which seat by the last plan."""
    planned = seats(config).read() if plans_fleet(config) else None
    return PlacementConfig(
        fleet=config.fleet, engine=config.engine, models=config.models, seats=planned, pools=tenant_pools(config)
    )


def seats(config: Config) -> PlannedSeats:
    """Who has which slice, by the last plan that was carried out."""
    return PlannedSeats(config.state / SEATS_FILE)


@dataclass(frozen=True, slots=True)
class ReplicaDifference:
    """Replicas that the configuration asks for against those that the controller runs."""

    controller: bool
    missing: tuple[str, ...] = ()
    superfluous: tuple[str, ...] = ()
    not_ready: tuple[tuple[str, str], ...] = ()

    @property
    def same(self) -> bool:
        """Whether all that is wanted is ready and nothing else runs."""
        return not (self.missing or self.superfluous or self.not_ready)

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "controller": self.controller,
            "same": self.same,
            "missing": list(self.missing),
            "superfluous": list(self.superfluous),
            "not_ready": dict(self.not_ready),
        }


def replica_difference(config: Config, planned: Collection[str] | None = None) -> ReplicaDifference:
    """By name and state only, from what the controller last wrote: cheap, and it reads no model. Replicas that demand has
    brought are no difference.

    `planned` are the replicas of the fleet's plan, where one was made: those that the next controller starts, if none runs.
    """
    status = running_controller(config)
    wanted = set(planned) if planned is not None and status is None else _asked_for(config)
    there = {r.replica: r.state for r in status.replicas} if status else {}
    demanded = set(status.scaling) if status else set()
    return ReplicaDifference(
        controller=status is not None,
        missing=tuple(sorted(wanted - set(there))),
        superfluous=tuple(sorted(name for name in set(there) - wanted if stem_of(name) not in demanded)),
        not_ready=tuple(
            (name, state.value)
            for name, state in sorted(there.items())
            if name in wanted and state is not ReplicaState.READY
        ),
    )


def _asked_for(config: Config) -> set[str]:
    """Replicas with a seat by the last plan, of models that are still configured; without one, those that the configuration names."""
    seated = seats(config).read() if plans_fleet(config) else None
    if seated is None:
        return {w.replica for w in wanted_replicas(config.models, tenant_pools(config), _names(config))}
    models = {m.name for m in config.models}
    return {replica for replica in seated if model_of(replica) in models}


def _names(config: Config) -> tuple[str, ...]:
    """What replicas are called that have taken another one's place."""
    return RenewalsFile(config.state / RENEWALS_FILE).read().names


def running_controller(config: Config) -> ControllerStatus | None:
    """What the controller of this state directory tells; None if none runs."""
    return running_status(StatePaths(config.state))


def controller_is_behind(config: Config) -> bool:
    """Whether a controller runs that goes by other models, engines or slices than `config` asks for."""
    if running_controller(config) is None:
        return False
    try:
        accepted = json.loads(StatePaths(config.state).accepted_config.read_bytes())
    except (OSError, ValueError):
        return True
    asked = config.model_dump(mode="json", include={"fleet", "engine", "models"})
    return {key: accepted.get(key) for key in asked} != asked


def tell_controller(config: Config, path: Path) -> bool:
    """Have a controller that runs this very configuration look at the slices again. Whether there is one."""
    status = running_controller(config)
    if status is None or status.config != str(path.absolute()):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(status.pid, signal.SIGHUP)
        return True
    return False
