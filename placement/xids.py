"""XIDs in the kernel's log: which errors GPUs have had, and what helps against those that do not pass by themselves.

The driver tells XIDs only while they happen; afterwards they are lines in the kernel's log. Many concern an application
alone and are over with it; they are left out. Source of the actions: NVIDIA's XID catalogue ("Analyzing Xid Errors with
the Xid Catalog"), immediate action for Ampere and later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Recovery = Literal["reset", "reboot", "watch"]

_RECORD_BYTES = 8192
_LINE = re.compile(r"NVRM: Xid \(PCI:(?P<bus>[0-9a-fA-F:.]+)\): (?P<xid>\d+)(?:, (?P<rest>.*))?$")

# XIDs that outlast what caused them, and the first thing to do. All others concern one application, or inform.
_ACTIONS: Mapping[int, tuple[str, Recovery]] = {
    46: ("the GPU stopped processing", "reset"),
    48: ("a double-bit memory error", "reset"),
    62: ("the GPU's controller halted", "reset"),
    63: ("a row of memory is marked for remapping", "watch"),
    64: ("a row of memory could not be remapped", "reset"),
    74: ("an NVLink error", "reset"),
    79: ("the GPU has fallen off the bus", "reboot"),
    92: ("many single-bit memory errors", "watch"),
    95: ("an uncontained memory error", "reset"),
    109: ("a context switch timed out", "reset"),
    119: ("the GPU's system processor does not answer", "reset"),
    120: ("the GPU's system processor failed", "reset"),
    140: ("an unrecovered memory error", "reset"),
}
_COMMANDS: Mapping[Recovery, str] = {
    "reset": "Drain it (sliceway replica stop REPLICA...), then: sudo nvidia-smi --gpu-reset -i {gpu}; cut it again: sliceway apply",
    "reboot": "Reboot the machine; if it comes back, check the card's seat, power and temperature.",
    "watch": "Nothing at once; the remapping takes effect at the next reset: sudo nvidia-smi --gpu-reset -i {gpu} when it is idle.",
}


@dataclass(frozen=True, slots=True)
class Xid:
    """The last of one kind of error on one GPU, and how often it is in the log."""

    bus: str
    number: int
    count: int
    text: str

    @property
    def meaning(self) -> str:
        """What happened."""
        return _ACTIONS[self.number][0]

    @property
    def urgent(self) -> bool:
        """Whether the GPU is not to be used until something is done."""
        return _ACTIONS[self.number][1] != "watch"

    def remedy(self, gpu: str) -> str:
        """What to do; `gpu` is what nvidia-smi's -i takes."""
        return _COMMANDS[_ACTIONS[self.number][1]].format(gpu=gpu)


def xids_in(lines: Iterable[str]) -> tuple[Xid, ...]:
    """XIDs that ask for something to be done, one for each GPU and number, in the order in which they first appear."""
    found: dict[tuple[str, int], Xid] = {}
    for bus, number, text in _parsed(lines):
        before = found.get((bus, number))
        found[bus, number] = Xid(bus, number, before.count + 1 if before else 1, text)
    return tuple(found.values())


def same_bus(one: str, other: str) -> bool:
    """Whether two PCI addresses mean one device: with a domain of four or eight digits, with or without function."""
    return _bus_key(one) == _bus_key(other)


def kernel_log(
    ring: Path = Path("/dev/kmsg"), file: Path = Path("/var/log/kern.log"), *, limit_bytes: int = 4 * 2**20
) -> tuple[str, ...] | None:
    """The kernel's log since boot, or the end of the file that it is kept in; None where this user may read neither."""
    try:
        return tuple(_ring(ring))
    except OSError:
        pass
    try:
        with file.open("rb") as kept:
            kept.seek(max(0, kept.seek(0, os.SEEK_END) - limit_bytes))
            return tuple(kept.read().decode(errors="replace").splitlines())
    except OSError:
        return None


def _ring(path: Path) -> Iterator[str]:
    """One record at a time, up to the newest (Documentation/ABI/testing/dev-kmsg)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                record = os.read(descriptor, _RECORD_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten while it was read; the next read goes on after the gap
                continue
            if not record:
                return
            yield from record.decode(errors="replace").splitlines()
    finally:
        os.close(descriptor)


def _parsed(lines: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    for line in lines:
        match = _LINE.search(line.rstrip())
        if match and int(match["xid"]) in _ACTIONS:
            yield match["bus"], int(match["xid"]), match["rest"] or ""


def _bus_key(text: str) -> tuple[int, ...]:
    parts = re.split(r"[:.]", text)[:3]
    try:
        return tuple(int(part, 16) for part in parts)
    except ValueError:
        return ()
