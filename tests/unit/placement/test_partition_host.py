"""Who holds a GPU's device file, resets by nvidia-smi, and slices that are asked back, on files made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.errors import PartitionError
from placement.gpus import GpuState
from placement.partition.host import holders, reset
from placement.slices import Gpu, Inventory, Slice, SliceKind
from placement.withheld import without

GPU = GpuState("GPU-0", 0, "NVIDIA A30", "A30-24GB", 2**34, 2**34, "610.43.02", minor=3)


def process(proc: Path, pid: int, name: str, *files: str) -> None:
    fds = proc / str(pid) / "fd"
    fds.mkdir(parents=True)
    (proc / str(pid) / "comm").write_text(f"{name}\n", encoding="utf-8")
    for number, file in enumerate(files):
        (fds / str(number)).symlink_to(file)


def test_holders_of_this_gpu_are_found_and_known_daemons_named(tmp_path: Path) -> None:
    process(tmp_path, 30, "nv-hostengine", "/dev/null", "/dev/nvidia3")
    process(tmp_path, 20, "python3", "/dev/nvidia3", "/dev/nvidia3")
    process(tmp_path, 40, "python3", "/dev/nvidia30", "/dev/nvidiactl")
    process(tmp_path, 50, "bash")
    (tmp_path / "60").mkdir()  # another user's: its descriptors cannot be read
    (tmp_path / "self").mkdir()
    found = holders(GPU, tmp_path)
    assert [(p.pid, p.name, p.how) for p in found] == [(20, "python3", "open"), (30, "nv-hostengine [DCGM]", "open")]


def test_a_gpu_without_device_file_has_no_holders(tmp_path: Path) -> None:
    assert holders(GpuState("GPU-0", 0, "x", "x", 1, 1, "1", minor=3, simulated=True), tmp_path) == ()
    assert holders(GpuState("GPU-0", 0, "x", "x", 1, 1, "1"), tmp_path) == ()


def script(tmp_path: Path, body: str) -> str:
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_reset_is_of_one_gpu_by_its_uuid(tmp_path: Path) -> None:
    reset(GPU, script(tmp_path, f'echo "$@" > {tmp_path}/said'))
    assert (tmp_path / "said").read_text(encoding="utf-8") == "--gpu-reset -i GPU-0\n"


def test_a_refused_reset_is_told_in_its_own_words(tmp_path: Path) -> None:
    program = script(tmp_path, "echo 'GPU 0 is currently in use'; exit 1")
    with pytest.raises(PartitionError, match="GPU 0 is currently in use") as refused:
        reset(GPU, program)
    assert "NVLink" in str(refused.value.remedy)
    with pytest.raises(PartitionError, match="could not be reset"):
        reset(GPU, str(tmp_path / "no-such-program"))


def test_slices_that_are_asked_back_are_left_out() -> None:
    card = Gpu("GPU-a", 0, "x", 2**34)
    one = Slice("GPU-a/1g.10gb@0", SliceKind.MIG, "1g.10gb", 2**33, uuid="MIG-1", gpu=card)
    two = Slice("GPU-a/1g.10gb@1", SliceKind.MIG, "1g.10gb", 2**33, uuid="MIG-2", gpu=card)
    three = Slice("GPU-b", SliceKind.GPU, None, 2**33, uuid="GPU-b", gpu=Gpu("GPU-b", 1, "x", 2**34))
    inventory = Inventory((one, two, three))
    assert without(inventory, ()) is inventory
    assert [s.id for s in without(inventory, {one.id}).slices] == [two.id, three.id]
    assert [s.id for s in without(inventory, {"GPU-a"}).slices] == [three.id], "a whole GPU"
    assert "apply --drain" in without(inventory, {one.id}).notes[0]
    assert without(inventory, {"GPU-z"}).notes == ()


def test_a_holder_whose_name_is_no_utf_8_is_found_all_the_same(tmp_path: Path) -> None:
    process(tmp_path, 20, "x", "/dev/nvidia3")
    (tmp_path / "20" / "comm").write_bytes("café\n".encode("latin-1"))
    assert [p.pid for p in holders(GPU, tmp_path)] == [20]
