"""Asking the controller for slices, with a controller that is only a lock and a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.config import Config
from gateway.drain import ControllerDrain
from placement.errors import PlacementError
from placement.locks import exclusive
from placement.slices import Slice, SliceKind
from placement.state import StatePaths
from placement.status import ControllerStatus, ReplicaStatus, write_status
from placement.table import ReplicaState, SliceRow
from placement.withheld import is_among, withheld

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(version="v1", state_dir=tmp_path)


@pytest.fixture
def hups() -> Iterator[list[int]]:
    """SIGHUPs that this process gets: it plays the controller."""
    seen: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGHUP, before)


def tell(paths: StatePaths, *slices: str) -> None:
    replicas = tuple(
        ReplicaStatus(
            replica=f"r-{i}",
            model="r",
            slice=SliceRow(id=s, kind="mig", uuid=f"MIG-{i}", gpu=s.split("/")[0]),
            memory_bytes=1,
            state=ReplicaState.READY,
            since=NOW,
            log="",
        )
        for i, s in enumerate(slices)
    )
    status = ControllerStatus(
        pid=os.getpid(), started_at=NOW, updated_at=NOW, state="running", config="", generation=1, replicas=replicas
    )
    write_status(status, paths.controller_status)


def test_it_waits_until_no_replica_is_there_and_gives_back(config: Config, hups: list[int]) -> None:
    paths = StatePaths(config.state)
    tell(paths, "GPU-a/1g.10gb@0", "GPU-a/1g.10gb@1")
    asked: list[frozenset[str]] = []

    def leave(_: float) -> None:
        asked.append(withheld(paths))
        tell(paths, "GPU-a/1g.10gb@1")

    with exclusive(paths.controller_lock, what="controller", remedy=""):
        with ControllerDrain(config, sleep=leave) as drain:
            drain(["GPU-a/1g.10gb@0"])
            assert hups == [signal.SIGHUP]
        assert hups == [signal.SIGHUP, signal.SIGHUP]
    assert asked == [frozenset({"GPU-a/1g.10gb@0"})]
    assert not paths.withheld.exists()


def test_a_whole_gpu_is_all_of_its_slices_and_patience_ends(config: Config, hups: list[int]) -> None:
    paths = StatePaths(config.state)
    tell(paths, "GPU-a/1g.10gb@0")
    clock = iter(range(0, 10_000, 50))
    with (
        exclusive(paths.controller_lock, what="controller", remedy=""),
        ControllerDrain(config, monotonic=lambda: next(clock), sleep=lambda _: None) as drain,
        pytest.raises(PlacementError, match="did not take r-0 off"),
    ):
        drain(["GPU-a"])
    assert not paths.withheld.exists(), "given back all the same"


def test_without_a_controller_there_is_nobody_to_ask(config: Config, hups: list[int]) -> None:
    with ControllerDrain(config) as drain:
        drain(["GPU-a"])
    assert hups == []
    assert not StatePaths(config.state).withheld.exists()


def test_what_a_killed_apply_left_is_given_back(config: Config, hups: list[int]) -> None:
    paths = StatePaths(config.state)
    paths.withheld.parent.mkdir(parents=True, exist_ok=True)
    paths.withheld.write_text('{"slices": ["GPU-a"]}', encoding="utf-8")
    with ControllerDrain(config):
        pass
    assert not paths.withheld.exists()


def test_what_root_calls_by_its_start_an_ordinary_controller_knows_by_its_uuid(config: Config, hups: list[int]) -> None:
    paths = StatePaths(config.state)
    tell(paths, "GPU-a/1g.10gb#gi9")
    looks: list[float] = []

    def leave(seconds: float) -> None:
        looks.append(seconds)
        tell(paths)

    with exclusive(paths.controller_lock, what="controller", remedy=""), ControllerDrain(config, sleep=leave) as drain:
        drain(["GPU-a/1g.10gb@3", "MIG-0"])
        unseen = Slice("GPU-a/1g.10gb#gi9", SliceKind.MIG, "1g.10gb", 1, uuid="MIG-0")
        assert is_among(unseen, withheld(paths))
    assert len(looks) == 1, "it waited for the replica there"
