"""Transitions on a machine: what the driver and whoever runs engines are asked, and what is written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_registry.geometry import Placement
from placement.assign import seated
from placement.errors import ModeChangeNeeded, NotCarriedOut, PlacementError
from placement.gpus import GpuProcess, GpuState
from placement.nvml.partition import NvmlPartitioner
from placement.partition import plan as plan_layouts
from placement.planned_seats import PlannedSeats
from placement.planner.types import WHOLE, FleetGpu
from placement.policy import PlanningConfig
from placement.reservations import Reservations
from placement.transition import Place, Step
from placement.transition.execute import EngineState
from placement.transition.local import LocalFleet, NoEngines
from placement.workload import Occupancy, Running, observed_fleet

Nvml = Callable[..., Any]


class Engines:
    """Remembers what it was asked, and can refuse to start."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.states_by_replica: dict[str, EngineState] = {}
        self.refusal: PlacementError | None = None

    async def states(self) -> dict[str, EngineState] | None:
        return self.states_by_replica

    async def drain(self, replica: str) -> None:
        self.asked.append(("drain", replica))

    async def vacated(self, slice_id: str) -> None:
        self.asked.append(("vacated", slice_id))

    async def gone(self, replica: str) -> None:
        self.asked.append(("gone", replica))
        self.states_by_replica.pop(replica, None)

    async def ready(self, replica: str, slice_id: str) -> None:
        self.asked.append(("ready", slice_id))
        if self.refusal is not None:
            raise self.refusal
        self.states_by_replica[replica] = "serving"

    async def check(self, replica: str) -> None:
        self.asked.append(("check", replica))

    async def resume(self, replica: str) -> None:
        self.asked.append(("resume", replica))


class Machine:
    """One simulated GPU, with everything a `LocalFleet` needs."""

    def __init__(self, nvml: Nvml, folder: Path, *, mig: bool = True, allow_mode_change: bool = False) -> None:
        self.driver = NvmlPartitioner(nvml("h100-sxm:1", mig=mig))
        self.seats = PlannedSeats(folder / "planned.json")
        self.seats.begin({})
        self.reservations = Reservations(folder / "reservations.json")
        self.engines = Engines()
        self.fleet = LocalFleet(
            self.driver,
            self.planned,
            self.engines,
            self.seats,
            self.reservations,
            allow_mode_change=allow_mode_change,
        )
        self.gpu = self.driver.observe()[0].uuid

    def planned(self, gpus: Sequence[GpuState]) -> Sequence[FleetGpu]:
        running = {s: Running(r, r.rpartition("-")[0]) for r, s in (self.seats.read() or {}).items()}
        return observed_fleet(plan_layouts(gpus, ()), PlanningConfig(), Occupancy(running, self.reservations.read()))

    def step(self, kind: Any, placement: str, replica: str | None = None, reserved: str | None = None) -> Step:
        place = WHOLE if placement == "gpu" else Placement.parse(placement)
        return Step(0, kind, Place(self.gpu, place), replica, replica and replica.rpartition("-")[0], reserved)

    @property
    def held(self) -> list[str]:
        return [i.name for i in self.driver.observe()[0].instances]


@pytest.fixture
def machine(nvml: Nvml, tmp_path: Path) -> Machine:
    return Machine(nvml, tmp_path)


async def test_processes_of_replicas_that_no_plan_seated_are_told_by_their_names(machine: Machine) -> None:
    """Either way the slice is left alone."""
    await machine.fleet.create(machine.step("create", "3g.40gb@4"))
    (gpu,) = machine.driver.observe()
    (made,) = gpu.instances
    busy = replace(made.compute[0], processes=(GpuProcess(7, "python"),))
    plans = plan_layouts([replace(gpu, instances=(replace(made, compute=(busy,)),))], ())
    for known, told in (({}, "in use by python"), ({f"{gpu.uuid}/3g.40gb@4": "chat-1"}, "chat-1, there for demand")):
        (seen,) = observed_fleet(plans, PlanningConfig(), Occupancy(for_demand=known))
        (there,) = seen.instances
        assert told in str(there.reserved)


async def test_an_engine_comes_and_goes_with_its_slice_and_its_seat(machine: Machine) -> None:
    slice_id = f"{machine.gpu}/3g.40gb@4"
    await machine.fleet.create(machine.step("create", "3g.40gb@4"))
    assert machine.held == ["3g.40gb@4"]
    await machine.fleet.start(machine.step("start", "3g.40gb@4", "chat-0"))
    await machine.fleet.check(machine.step("check", "3g.40gb@4", "chat-0"))
    assert machine.seats.read() == {"chat-0": slice_id}
    there = await machine.fleet.observe()
    assert there.engines == {Place.parse(slice_id): ("chat-0", "serving")}
    assert Place.parse(slice_id) in there.instances
    await machine.fleet.drain(machine.step("drain", "3g.40gb@4", "chat-0"))
    await machine.fleet.stop(machine.step("stop", "3g.40gb@4", "chat-0"))
    await machine.fleet.destroy(machine.step("destroy", "3g.40gb@4"))
    assert machine.seats.read() == {}
    assert machine.held == []
    assert machine.engines.asked == [
        ("ready", slice_id),
        ("check", "chat-0"),
        ("drain", "chat-0"),
        ("gone", "chat-0"),
        ("vacated", slice_id),
    ]


async def test_the_fingerprint_follows_instances_and_seats(machine: Machine) -> None:
    first = (await machine.fleet.observe()).fingerprint
    await machine.fleet.create(machine.step("create", "1g.10gb@0"))
    second = (await machine.fleet.observe()).fingerprint
    machine.seats.put("chat-0", f"{machine.gpu}/1g.10gb@0")
    third = (await machine.fleet.observe()).fingerprint
    assert len({first, second, third}) == 3
    assert third == (await machine.fleet.observe()).fingerprint


async def test_a_reservation_is_remembered_and_forgotten_with_its_slice(machine: Machine) -> None:
    await machine.fleet.create(machine.step("create", "4g.40gb@0", reserved="fine-tuning"))
    slice_id = f"{machine.gpu}/4g.40gb@0"
    assert machine.reservations.read() == {slice_id: "fine-tuning"}
    machine.reservations.keep([slice_id])
    assert machine.reservations.read() == {slice_id: "fine-tuning"}
    machine.reservations.keep([])
    assert machine.reservations.read() == {}


async def test_an_instance_without_its_compute_instance_is_completed_before_an_engine_starts(machine: Machine) -> None:
    await machine.fleet.create(machine.step("create", "1g.10gb@0"))
    instance = machine.driver.observe()[0].instances[0]
    machine.driver.complete(machine.gpu, instance.id)
    await machine.fleet.start(machine.step("start", "1g.10gb@0", "chat-0"))
    assert machine.driver.observe()[0].instances[0].complete


async def test_destroying_what_is_gone_is_no_error(machine: Machine) -> None:
    await machine.fleet.destroy(machine.step("destroy", "1g.10gb@0"))
    assert machine.held == []


async def test_what_never_came_up_is_given_up_with_its_seat(machine: Machine) -> None:
    await machine.fleet.create(machine.step("create", "1g.10gb@0"))
    machine.engines.refusal = NotCarriedOut("it failed")
    start = machine.step("start", "1g.10gb@0", "chat-1")
    with pytest.raises(NotCarriedOut):
        await machine.fleet.start(start)
    assert machine.seats.read() == {"chat-1": f"{machine.gpu}/1g.10gb@0"}
    machine.seats.put("chat-0", f"{machine.gpu}/3g.40gb@4")
    await machine.fleet.abandon([start, machine.step("stop", "3g.40gb@4", "chat-0")])
    assert machine.seats.read() == {"chat-0": f"{machine.gpu}/3g.40gb@4"}
    assert ("resume", "chat-0") in machine.engines.asked, "it was drained, and stays after all"


async def test_the_mode_is_switched_only_where_that_is_allowed(nvml: Nvml, tmp_path: Path) -> None:
    careful = Machine(nvml, tmp_path, mig=False)
    with pytest.raises(ModeChangeNeeded, match="MIG has to be switched on"):
        await careful.fleet.create(careful.step("create", "1g.10gb@0"))
    bold = LocalFleet(
        careful.driver, careful.planned, NoEngines(), careful.seats, careful.reservations, allow_mode_change=True
    )
    await bold.create(careful.step("create", "1g.10gb@0"))
    assert careful.held == ["1g.10gb@0"]
    await bold.destroy(careful.step("destroy", "1g.10gb@0"))
    await bold.create(careful.step("create", "gpu"))
    assert not careful.driver.observe()[0].mig
    assert Place(careful.gpu, WHOLE) in (await bold.observe()).instances


async def test_without_a_controller_seats_count_as_engines(machine: Machine) -> None:
    fleet = LocalFleet(machine.driver, machine.planned, NoEngines(), machine.seats, machine.reservations)
    await fleet.create(machine.step("create", "1g.10gb@0"))
    await fleet.start(machine.step("start", "1g.10gb@0", "chat-0"))
    there = await fleet.observe()
    assert list(there.engines.values()) == [("chat-0", "serving")]


@pytest.mark.parametrize("content", ["", "[]", '{"chat-0": 3}', '{"nonumber": "x"}'])
def test_seats_that_make_no_sense_are_not_guessed(tmp_path: Path, content: str) -> None:
    seats = PlannedSeats(tmp_path / "planned.json")
    assert seats.read() is None
    seats.path.write_text(content, encoding="utf-8")
    with pytest.raises(PlacementError, match="cannot be read"):
        seats.read()


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}'])
def test_reservations_that_make_no_sense_are_not_guessed(tmp_path: Path, content: str) -> None:
    reservations = Reservations(tmp_path / "reservations.json")
    assert reservations.read() == {}
    reservations.path.write_text(content, encoding="utf-8")
    with pytest.raises(PlacementError, match="cannot be read"):
        reservations.read()


def test_a_seat_begins_with_what_runs_and_only_once(tmp_path: Path) -> None:
    seats = PlannedSeats(tmp_path / "planned.json")
    seats.begin({"chat-0": "G/1g.10gb@0"})
    seats.begin({})
    assert seats.read() == {"chat-0": "G/1g.10gb@0"}
    seats.remove("chat-0", "G/elsewhere")
    assert seats.read() == {"chat-0": "G/1g.10gb@0"}


def test_a_tenants_own_replica_is_one_of_the_model() -> None:
    (wanted,) = seated({"chat@acme-3": "G/1g.10gb@0"})
    assert (wanted.model, wanted.ordinal, wanted.pin) == ("chat", 3, "G/1g.10gb@0")
