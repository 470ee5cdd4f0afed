"""A node that is told to cut one of its GPUs: done once, refused where an engine is, and reported at once."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from model_registry.geometry import Placement
from placement.cluster.cutting import CutOrder, cut
from placement.cluster.members import Owner, Versions
from placement.cluster.node import NodeAgent, NodePaths, NodeSettings
from placement.cluster.seats import SeatRow, SeatsFile, write_seats
from placement.cluster.testing import FakeDriver, made_gpu
from placement.errors import CannotBeCut, ModeChangeNeeded, PartitionError, SliceInUse, StalePlan
from placement.gpu_slices import slices_of
from placement.slices import Inventory

VERSIONS = Versions(sliceway="1", python="3.11", ray="2.60.0")
CREATE = CutOrder(gpu="GPU-0", slice="1g.10gb@0", there=True)
DESTROY = CutOrder(gpu="GPU-0", slice="1g.10gb@0", there=False)


class NoProcesses:
    """Nothing is started beside this agent."""

    def ensure_controller(self, config: Path, seats: Path) -> None: ...

    def reload_controller(self) -> None: ...

    def ensure_gateway(self, config: Path) -> None: ...

    def reload_gateway(self) -> None: ...


def node(directory: Path, driver: FakeDriver | None) -> NodeAgent:
    def observe() -> Inventory:
        gpus = driver.observe() if driver is not None else ()
        return Inventory(tuple(s for gpu in gpus for s in slices_of(gpu)), gpus=gpus)

    settings = NodeSettings(name="a", address="10.0.0.1", paths=NodePaths(directory), versions=VERSIONS, fleet={})
    return NodeAgent(settings, NoProcesses(), observe, driver=driver)


async def test_what_was_cut_is_in_the_next_report_and_the_same_order_twice_is_one(tmp_path: Path) -> None:
    agent = node(tmp_path, FakeDriver((made_gpu(0),)))
    assert (await agent.report()).slices == ()
    for _ in range(2):
        await agent.cut(CREATE)
        assert [s.id for s in (await agent.report()).slices] == ["GPU-0/1g.10gb@0"]
    assert [i.name for gpu in (await agent.gpus()).gpus for i in gpu.instances] == ["1g.10gb@0"]
    for _ in range(2):
        await agent.cut(DESTROY)
        assert (await agent.report()).slices == ()


async def test_a_slice_with_a_seat_is_not_taken_away(tmp_path: Path) -> None:
    agent = node(tmp_path, FakeDriver((made_gpu(0, holds=("1g.10gb@0",)),)))
    owner = Owner(pid=os.getpid(), start_ticks=1, boot_id="b")
    write_seats(
        NodePaths(tmp_path).seats, SeatsFile(seats={"chat-0": SeatRow(slice_id="GPU-0/1g.10gb@0", owner=owner)})
    )
    with pytest.raises(SliceInUse, match="an engine is on it"):
        await agent.cut(DESTROY)
    assert [s.id for s in (await agent.report()).slices] == ["GPU-0/1g.10gb@0"]


async def test_a_node_without_a_driver_says_so(tmp_path: Path) -> None:
    with pytest.raises(CannotBeCut, match="no driver"):
        await node(tmp_path, None).cut(CREATE)


async def test_mig_is_switched_only_where_that_is_allowed(tmp_path: Path) -> None:
    driver = FakeDriver((made_gpu(0),))
    off = CutOrder(gpu="GPU-0", slice="gpu@0", there=True)
    with pytest.raises(ModeChangeNeeded, match="switched off"):
        await cut(driver, off, (), tmp_path)
    await cut(driver, off.model_copy(update={"allow_mode_change": True}), (), tmp_path)
    assert not driver.gpus[0].mig
    with pytest.raises(SliceInUse):
        await cut(driver, off.model_copy(update={"there": False}), ("GPU-0",), tmp_path)
    on = CutOrder(gpu="GPU-0", slice="gpu@0", there=False, allow_mode_change=True)
    await cut(driver, on, (), tmp_path)
    assert driver.gpus[0].mig


async def test_the_slices_that_a_node_is_at_are_in_its_report(tmp_path: Path) -> None:
    class Slow(FakeDriver):
        begun, go_on = threading.Event(), threading.Event()

        def create(self, gpu: str, placement: Placement) -> None:
            self.begun.set()
            assert self.go_on.wait(60)
            super().create(gpu, placement)

    agent = node(tmp_path, driver := Slow((made_gpu(0),)))
    await agent.report()
    cutting = asyncio.create_task(agent.cut(CREATE))
    waiting = asyncio.create_task(agent.cut(DESTROY.model_copy(update={"slice": "1g.10gb@6"})))
    assert await asyncio.to_thread(driver.begun.wait, 60)
    assert (await agent.report()).cutting == (CREATE.step.place.slice_id, "GPU-0/1g.10gb@6")
    driver.go_on.set()
    await asyncio.gather(cutting, waiting)
    assert (await agent.report()).cutting == ()


async def test_a_card_that_still_holds_something_stays_cut(tmp_path: Path) -> None:
    driver = FakeDriver((made_gpu(0, holds=("1g.10gb@0",)),))
    off = CutOrder(gpu="GPU-0", slice="gpu@0", there=True, allow_mode_change=True)
    with pytest.raises(StalePlan, match="still holds"):
        await cut(driver, off, (), tmp_path)


async def test_what_the_driver_refuses_and_a_gpu_that_is_gone_are_told(tmp_path: Path) -> None:
    driver = FakeDriver((made_gpu(0, holds=("2g.20gb@0",)),))
    with pytest.raises(PartitionError, match="both need memory slice"):
        await cut(driver, CREATE, (), tmp_path)
    with pytest.raises(StalePlan, match="does not answer any more"):
        await cut(driver, CREATE.model_copy(update={"gpu": "GPU-7"}), (), tmp_path)
