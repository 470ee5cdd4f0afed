"""A configuration's simulated GPUs, made real enough for this process and its children.

The machine lies in the state directory, so every command of one configuration sees the same GPUs with the same instances;
each fleet has a machine of its own there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from model_registry.catalogue import load_catalogue
from placement.errors import SimulatorError
from placement.schema import FleetConfig, SimulatedFleet
from placement.simulator import MachineOptions, Simulation, parse_fleet
from placement.simulator.simulation import PRIVILEGE_VARIABLE, STATE_VARIABLE
from placement.slices import Slice


def simulated_fleet(text: str, fleet: FleetConfig | None = None) -> FleetConfig:
    """`fleet` with the GPUs that `--simulate` names (`h100-sxm:8,a30:2`) in place of what would be discovered.

    Raises UnknownProduct or SimulatorError for GPUs that cannot be simulated.
    """
    parse_fleet(load_catalogue(), text)
    counts: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        product, _, count = part.partition(":")
        counts[product] = counts.get(product, 0) + int(count or 1)
    base = fleet or FleetConfig()
    return base.model_copy(update={"discover": SimulatedFleet(simulate=counts), "slices": ()})


def enter(fleet: FleetConfig, state: Path) -> Simulation | None:
    """Where `fleet` is simulated: make its machine if there is none, and have this process and its children see it.

    Before anything loads a driver's NVML. None for a fleet that is not simulated.
    Raises SimulatorError where the machine cannot be made.
    """
    if not isinstance(fleet.discover, SimulatedFleet):
        return None
    directory = machine_directory(fleet.discover, state)
    try:
        machine = Simulation.ensure(directory, fleet.discover.text, MachineOptions(mig=fleet.discover.mig))
    except OSError as error:
        raise SimulatorError(
            f"the simulated machine cannot be kept there: {error.strerror}",
            where=str(directory),
            remedy="Set state_dir in the configuration to a directory you can write to.",
        ) from error
    machine.activate()
    return machine


def machine_directory(simulated: SimulatedFleet, state: Path) -> Path:
    """Where the machine of this fleet lies. Removing it starts over."""
    name = simulated.text.replace(":", "-").replace(",", "+")
    return state / "simulated" / (name if simulated.mig else f"{name}+whole")


def engine_environment(target: Slice, environ: Mapping[str, str]) -> dict[str, str]:
    """What an engine on a simulated slice needs to be seen there by the simulated driver; empty for other slices."""
    if not target.simulated:
        return {}
    return {name: environ[name] for name in (STATE_VARIABLE, PRIVILEGE_VARIABLE, "LD_LIBRARY_PATH") if name in environ}
