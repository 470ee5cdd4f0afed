"""What a process that gives way changes, and that it changes nothing for others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.giving_way import AGAIN_SECONDS, TRIES, _tell

ASKS = """
import json, os, sys
from pathlib import Path
from gateway.giving_way import give_way
before, file = os.nice(0), Path(sys.argv[1])
give_way(3, file)
print(json.dumps({"nicer": os.nice(0) - before, "own": os.getsid(0) == os.getpid(), "told": file.read_text() if file.exists() else None}))
"""


def told_by(file: Path, *, leads_a_group: bool = False) -> dict[str, object]:
    options = {"process_group": 0} if leads_a_group else {}
    done = subprocess.run([sys.executable, "-c", ASKS, str(file)], stdout=subprocess.PIPE, check=True, **options)  # type: ignore[call-overload]
    answer: dict[str, object] = json.loads(done.stdout)
    assert answer.pop("nicer") == min(3, 19 - os.nice(0)), "there is nothing nicer than 19"
    return answer


def test_its_session_is_as_nice_as_the_process(tmp_path: Path) -> None:
    assert told_by(tmp_path / "autogroup") == {"own": True, "told": "3"}


def test_who_must_stay_in_the_session_of_others_leaves_that_as_it_is(tmp_path: Path) -> None:
    assert told_by(tmp_path / "autogroup", leads_a_group=True) == {"own": False, "told": None}


def test_a_kernel_without_such_a_thing_is_no_obstacle(tmp_path: Path) -> None:
    assert told_by(tmp_path / "nowhere" / "autogroup") == {"own": True, "told": None}


@pytest.mark.parametrize(("busy", "tries"), [(2, 3), (TRIES, TRIES)])
def test_a_kernel_that_has_just_been_told_by_another_is_told_later_but_not_for_ever(busy: int, tries: int) -> None:
    written: list[bool] = []
    waits: list[float] = []

    def write() -> None:
        written.append(len(written) >= busy)
        if not written[-1]:
            raise BlockingIOError

    _tell(write, waits.append)
    assert len(written) == tries
    assert waits == [AGAIN_SECONDS] * min(busy, TRIES)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not group by session")
def test_the_kernel_takes_it_and_others_stay_as_they_are() -> None:
    ours = Path("/proc/self/autogroup").read_text(encoding="ascii")
    assert str(told_by(Path("/proc/self/autogroup"))["told"]).endswith("nice 3\n")
    assert Path("/proc/self/autogroup").read_text(encoding="ascii") == ours
