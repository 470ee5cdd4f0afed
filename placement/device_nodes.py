"""Which device files an ordinary user needs to run engines on this machine's slices, and which of them are missing or closed.

The driver guards every slice by two capabilities, one of its GPU instance and one of its compute instance; each is a node
in /dev/nvidia-caps whose number stands in /proc. Sources: MIG User Guide, "Device Nodes and Capabilities";
nvidia-modprobe(1).
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from placement.gpus import GpuState

_CAPABILITIES = "/proc/driver/nvidia/capabilities"
_MINORS = "/proc/driver/nvidia-caps/mig-minors"
_CAP_DEVICES = "/dev/nvidia-caps/nvidia-cap"
_MINOR_LINE = re.compile(r"^DeviceFileMinor:\s*(\d+)", re.MULTILINE)


class Tree(Protocol):
    """The files of a machine as the user who asks sees them."""

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""

    def may(self, path: str, *, write: bool) -> bool:
        """Whether this user may open it for reading, and for writing as well if `write`."""

    def owner(self, path: str) -> str:
        """Whose it is and who may what: `root:video 0660`."""

    def read(self, path: str) -> str | None:
        """Its text; None where it may not be read or is not there."""


@dataclass(frozen=True, slots=True)
class HostTree:
    """The files below `root`."""

    root: Path = Path("/")

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return self._at(path).exists()

    def may(self, path: str, *, write: bool) -> bool:
        """By the rights of this process, its groups included."""
        return os.access(self._at(path), os.R_OK | os.W_OK if write else os.R_OK)

    def owner(self, path: str) -> str:
        """`owner:group mode`."""
        at = self._at(path)
        return f"{at.owner()}:{at.group()} {stat.S_IMODE(at.stat().st_mode):04o}"

    def read(self, path: str) -> str | None:
        """Its text."""
        try:
            return self._at(path).read_text(encoding="utf-8")
        except OSError:
            return None

    def _at(self, path: str) -> Path:
        return self.root / path.lstrip("/")


@dataclass(frozen=True, slots=True)
class NodeFinding:
    """What is wrong with one device file, and the commands that mend it. `needed`: no engine runs on `what` without it."""

    path: str
    what: str
    problem: Literal["missing", "closed"]
    message: str
    remedy: str
    needed: bool = True


def examine_nodes(gpus: Sequence[GpuState], tree: Tree, *, cuts: bool = False) -> tuple[NodeFinding, ...]:
    """What keeps this user from running engines on every slice of `gpus`; empty where nothing does.

    With `cuts` also what keeps them from cutting GPUs, which engines do not need (`needed` is False).
    """
    return (
        *_devices(gpus, tree),
        *(finding for gpu in gpus if gpu.mig for finding in _instances(gpu, tree)),
        *(_partitioning(tree) if cuts and any(gpu.mode is not None for gpu in gpus) else ()),
    )


def _devices(gpus: Sequence[GpuState], tree: Tree) -> Iterator[NodeFinding]:
    wanted = [("/dev/nvidiactl", "every GPU", "-c 0"), ("/dev/nvidia-uvm", "CUDA on every GPU", "-c 0 -u")]
    wanted += [(f"/dev/nvidia{g.minor}", g.label, f"-c {g.minor}") for g in gpus if g.minor is not None]
    for path, what, flags in wanted:
        if not tree.exists(path):
            yield _missing(path, what, f"sudo nvidia-modprobe {flags}")
        elif not tree.may(path, write=True):
            remedy = (
                f"sudo chmod a+rw {path}\n"
                f"For good: options nvidia NVreg_DeviceFileMode=0666 in /etc/modprobe.d/nvidia.conf, or {_into_group(tree, path)}"
            )
            yield _closed(path, what, tree, "read and write", remedy)


def _instances(gpu: GpuState, tree: Tree) -> Iterator[NodeFinding]:
    for instance in gpu.instances:
        for compute in instance.compute:
            what = f"{gpu.label} {instance.name}"
            base = f"gi{instance.id}"
            for place in (f"{base}/access", f"{base}/ci{compute.id}/access"):
                yield from _capability(f"gpu{gpu.minor}", place, what, tree)


def _capability(gpu: str, place: str, what: str, tree: Tree) -> Iterator[NodeFinding]:
    """One of a slice's two capabilities. Nothing is said where /proc does not tell its number: an older or another driver."""
    source = f"{_CAPABILITIES}/{gpu}/mig/{place}"
    minor = _minor(source, f"{gpu}/{place}", tree)
    if minor is None:
        return
    path = f"{_CAP_DEVICES}{minor}"
    if not tree.exists(path):
        yield _missing(path, what, f"sudo nvidia-modprobe -f {source}")
    elif not tree.may(path, write=False):
        yield _closed(path, what, tree, "read", _open_capability(path, source))


def _partitioning(tree: Tree) -> Iterator[NodeFinding]:
    """The rights to see and to change instances. Root has them; nobody else needs them to serve."""
    for name, purpose in (("config", "making and removing MIG instances"), ("monitor", "seeing where instances lie")):
        source = f"{_CAPABILITIES}/mig/{name}"
        minor = _minor(source, name, tree)
        if minor is None:
            continue
        path = f"{_CAP_DEVICES}{minor}"
        remedy = f"Cut as root: sudo sliceway apply CONFIG --layouts-only\nOr give this user the right: {_open_capability(path, source)}"
        if not tree.exists(path):
            found = _missing(path, purpose, f"sudo nvidia-modprobe -f {source}")
        elif not tree.may(path, write=False):
            found = _closed(path, purpose, tree, "read", remedy)
        else:
            continue
        yield NodeFinding(found.path, found.what, found.problem, found.message, found.remedy, needed=False)


def _minor(source: str, listed: str, tree: Tree) -> int | None:
    """The number of a capability's node, from its own file or the table of all of them."""
    if match := _MINOR_LINE.search(tree.read(source) or ""):
        return int(match[1])
    for line in (tree.read(_MINORS) or "").splitlines():
        name, _, number = line.partition(" ")
        if name == listed and number.strip().isdigit():
            return int(number)
    return None


def _open_capability(path: str, source: str) -> str:
    """The driver sets the mode again whenever it makes the node, unless it is told not to."""
    return f"sudo chmod a+r {path}; echo 'DeviceFileModify: 0' | sudo tee {source}"


def _missing(path: str, what: str, command: str) -> NodeFinding:
    return NodeFinding(path, what, "missing", f"{path} is missing, which {what} needs", command)


def _closed(path: str, what: str, tree: Tree, right: str, remedy: str) -> NodeFinding:
    message = f"{path} ({tree.owner(path)}) is closed to this user, and {what} needs to {right} it"
    return NodeFinding(path, what, "closed", message, remedy)


def _into_group(tree: Tree, path: str) -> str:
    group = tree.owner(path).partition(":")[2].partition(" ")[0]
    if group in {"", "root"}:
        return "a group of its own (NVreg_DeviceFileGID)"
    return f"sudo usermod -aG {group} {_me()} and log in again"


def _me() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's made-up user
        return str(os.getuid())
