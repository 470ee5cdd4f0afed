"""XIDs in the kernel's log: those that somebody has to act on, and none of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from placement.xids import kernel_log, same_bus, xids_in

LOG = """\
6,1203,88112,-;NVRM: Xid (PCI:0000:4f:00): 31, pid=4711, name=python, MMU Fault
4,1204,88113,-;NVRM: Xid (PCI:0000:4f:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 12.5] NVRM: Xid (PCI:0000:0a:00): 63, pid=9, Row Remapper: New row marked for remapping, reset gpu to activate.
Nov 21 10:00:00 host kernel: NVRM: Xid (PCI:0000:0a:00): 63, pid=9, Row Remapper: another row
4,1205,88114,-;NVRM: Xid (PCI:0000:4f:00): 43, pid=12, Ch 00000010
something else entirely: 79
"""


def test_errors_of_applications_are_left_out_and_the_rest_is_counted_by_gpu() -> None:
    lost, remapped = xids_in(LOG.splitlines())
    assert (lost.bus, lost.number, lost.count, lost.urgent) == ("0000:4f:00", 79, 1, True)
    assert "Reboot" in lost.remedy("3")
    assert (remapped.number, remapped.count, remapped.urgent) == (63, 2, False)
    assert remapped.text.endswith("another row")
    assert "--gpu-reset -i 1" in remapped.remedy("1")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0000:4f:00", "00000000:4F:00.0", True),
        ("0001:4f:00", "00000000:4F:00.0", False),
        ("0000:4f:00", "0000:0a:00", False),
    ],
)
def test_addresses_are_compared_by_what_they_mean(one: str, other: str, same: bool) -> None:
    assert same_bus(one, other) is same


def test_a_log_that_may_not_be_read_is_none_and_a_ring_is_read_to_its_end(tmp_path: Path) -> None:
    assert kernel_log(tmp_path / "none", tmp_path / "none") is None
    kept = tmp_path / "kern.log"
    kept.write_text("one\ntwo\n", encoding="utf-8")
    assert kernel_log(tmp_path / "none", kept) == ("one", "two")
    ring = tmp_path / "kmsg"
    os.mkfifo(ring)
    writer = os.open(ring, os.O_RDWR)
    try:
        os.write(writer, LOG.encode())
        assert kernel_log(ring, kept) == tuple(LOG.splitlines())
    finally:
        os.close(writer)
