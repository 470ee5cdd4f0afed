"""Aggressors on the machine itself: their processes, running while a block runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loadtests.aggressors import CpuHog, OnHost, WeightLoading
from loadtests.problems import LoadTestError

HOG = Path(__file__).with_name("hog.py")


@contextmanager
def running(hog: OnHost | None, cores: Sequence[int] | None) -> Iterator[None]:
    """The hog's processes while the block runs; it begins when all of them are at work.

    Raises LoadTestError if one ends by itself, before or meanwhile.
    """
    if hog is None:
        yield
        return
    command, environment = command_of(hog, cores)
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(hog.processes)]
    try:
        for child in children:
            if not _at_work(child):
                raise _ended(hog, child.wait())
        yield
        for child in children:
            if (code := child.poll()) is not None:
                raise _ended(hog, code)
    finally:
        for child in children:
            child.kill()
            child.communicate()


def _at_work(child: subprocess.Popen[bytes]) -> bool:
    """Wait until it says so; False where it ended instead."""
    assert child.stdout is not None
    return child.stdout.readline() != b""


def _ended(hog: OnHost, code: int) -> LoadTestError:
    return LoadTestError(
        f"{hog.label}: a process ended by itself (exit code {code}), so nothing disturbed the victim",
        remedy="It says why above.",
    )


def command_of(hog: OnHost, cores: Sequence[int] | None) -> tuple[list[str], dict[str, str]]:
    """The command and environment of one of its processes."""
    environment = dict(os.environ)
    interpreter = sys.executable
    match hog:
        case CpuHog(memory_mib=memory):
            arguments = ["cpu", "--memory-mib", str(memory)]
        case WeightLoading(path=path, device=device):
            arguments = ["weights", "--path", str(path)]
            if device is not None:
                arguments.append("--cuda")
                environment["CUDA_VISIBLE_DEVICES"] = device
                interpreter = str(hog.interpreter or interpreter)
    if cores is not None:
        arguments += ["--cores", ",".join(map(str, cores))]
    return [interpreter, str(HOG), *arguments], environment
