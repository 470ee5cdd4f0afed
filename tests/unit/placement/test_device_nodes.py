"""Device files and capabilities, on made-up trees: what is missing, what is closed, and the command that mends it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from placement.device_nodes import HostTree, examine_nodes
from placement.gpus import ComputeInstance, GpuInstance, GpuState, MigMode

CAPABILITIES = "/proc/driver/nvidia/capabilities"


@dataclass
class FakeTree:
    """Paths with what this user may: `rw`, `r` or nothing. `texts` are files of /proc."""

    nodes: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)

    def exists(self, path: str) -> bool:
        return path in self.nodes

    def may(self, path: str, *, write: bool) -> bool:
        return ("rw" if write else "r") in self.nodes[path]

    def owner(self, path: str) -> str:
        return self.owners.get(path, "root:root 0600")

    def read(self, path: str) -> str | None:
        return self.texts.get(path)


def gpu(minor: int = 0, *, mig: bool = True) -> GpuState:
    instance = GpuInstance(9, "1g.10gb", 1, 3, (ComputeInstance(0, 1, "MIG-1", 2**33),))
    return GpuState(
        uuid="GPU-1",
        index=0,
        name="NVIDIA H100",
        product="H100-80GB-SXM",
        memory_bytes=2**36,
        usable_bytes=2**36,
        driver="610.0",
        minor=minor,
        mode=MigMode(mig, mig),
        instances=(instance,) if mig else (),
    )


OPEN = {"/dev/nvidiactl": "rw", "/dev/nvidia-uvm": "rw", "/dev/nvidia0": "rw"}
SLICE = {
    f"{CAPABILITIES}/gpu0/mig/gi9/access": "DeviceFileMinor: 84\nDeviceFileMode: 292\nDeviceFileModify: 1\n",
    f"{CAPABILITIES}/gpu0/mig/gi9/ci0/access": "DeviceFileMinor: 85\nDeviceFileMode: 292\nDeviceFileModify: 1\n",
}
CAPS = {"/dev/nvidia-caps/nvidia-cap84": "r", "/dev/nvidia-caps/nvidia-cap85": "r"}


def test_a_user_who_may_open_everything_hears_nothing() -> None:
    assert examine_nodes([gpu()], FakeTree(OPEN | CAPS, SLICE)) == ()
    assert examine_nodes([gpu(mig=False)], FakeTree(OPEN)) == (), "without MIG there are no capabilities"


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("/dev/nvidiactl", "sudo nvidia-modprobe -c 0"),
        ("/dev/nvidia-uvm", "sudo nvidia-modprobe -c 0 -u"),
        ("/dev/nvidia0", "sudo nvidia-modprobe -c 0"),
        ("/dev/nvidia-caps/nvidia-cap84", f"sudo nvidia-modprobe -f {CAPABILITIES}/gpu0/mig/gi9/access"),
        ("/dev/nvidia-caps/nvidia-cap85", f"sudo nvidia-modprobe -f {CAPABILITIES}/gpu0/mig/gi9/ci0/access"),
    ],
)
def test_a_missing_node_is_named_with_the_command_that_makes_it(path: str, command: str) -> None:
    nodes = {p: right for p, right in (OPEN | CAPS).items() if p != path}
    (found,) = examine_nodes([gpu()], FakeTree(nodes, SLICE))
    assert (found.path, found.problem, found.remedy, found.needed) == (path, "missing", command, True)
    assert path in found.message


def test_a_closed_node_tells_whose_it_is_and_how_it_is_opened() -> None:
    owners = {"/dev/nvidia0": "root:video 0660"}
    (device,) = examine_nodes([gpu()], FakeTree(OPEN | CAPS | {"/dev/nvidia0": "r"}, SLICE, owners))
    assert "(root:video 0660) is closed to this user" in device.message
    assert "usermod -aG video" in device.remedy
    (capability,) = examine_nodes([gpu()], FakeTree(OPEN | CAPS | {"/dev/nvidia-caps/nvidia-cap85": ""}, SLICE))
    assert "H100-80GB-SXM) 1g.10gb@3 needs to read it" in capability.message
    assert "DeviceFileModify: 0" in capability.remedy, "else the driver closes it again"


def test_the_table_of_all_capabilities_stands_in_for_their_own_files() -> None:
    table = {"/proc/driver/nvidia-caps/mig-minors": "config 1\nmonitor 2\ngpu0/gi9/access 84\ngpu0/gi9/ci0/access 85\n"}
    assert examine_nodes([gpu()], FakeTree(OPEN | CAPS, table)) == ()
    (found,) = examine_nodes([gpu()], FakeTree(OPEN | {"/dev/nvidia-caps/nvidia-cap84": "r"}, table))
    assert found.path.endswith("nvidia-cap85")
    assert examine_nodes([gpu()], FakeTree(OPEN)) == (), "nothing is claimed of what /proc does not tell"


def test_the_right_to_cut_is_looked_at_only_where_layouts_are_configured_and_stops_no_engine() -> None:
    texts = {
        f"{CAPABILITIES}/mig/config": "DeviceFileMinor: 1\n",
        f"{CAPABILITIES}/mig/monitor": "DeviceFileMinor: 2\n",
    }
    tree = FakeTree(OPEN | CAPS | {"/dev/nvidia-caps/nvidia-cap1": ""}, SLICE | texts)
    assert examine_nodes([gpu()], tree) == ()
    closed, missing = examine_nodes([gpu()], tree, cuts=True)
    assert (closed.needed, missing.needed) == (False, False)
    assert "sudo sliceway apply CONFIG --layouts-only" in closed.remedy
    assert missing.remedy == f"sudo nvidia-modprobe -f {CAPABILITIES}/mig/monitor"


def test_the_tree_of_a_real_machine(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    node = tmp_path / "dev" / "nvidia0"
    node.write_text("x", encoding="utf-8")
    node.chmod(0o640)
    tree = HostTree(tmp_path)
    assert tree.exists("/dev/nvidia0")
    assert not tree.exists("/dev/nvidia1")
    assert tree.may("/dev/nvidia0", write=True)
    assert tree.owner("/dev/nvidia0").endswith(" 0640")
    assert tree.read("/dev/nvidia0") == "x"
    assert tree.read("/dev/nvidia1") is None
    if os.getuid():
        node.chmod(0o000)
        assert not tree.may("/dev/nvidia0", write=False)
