"""Aggressors on the machine itself: their processes, running while a block runs."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loadtests.aggressors import CpuHog, OnHost, WeightLoading
from loadtests.problems import LoadTestError

HOG = Path(__file__).with_name("hog.py")


AT_WORK_SECONDS = 120.0
"""How long a process may take to begin: PyTorch is imported and the first piece of the weights read in it."""
GONE_SECONDS = 10.0


@contextmanager
def running(
    hog: OnHost | None, cores: Sequence[int] | None, *, at_work_seconds: float = AT_WORK_SECONDS
) -> Iterator[None]:
    """The hog's processes while the block runs; it begins when all of them are at work.

    Raises LoadTestError if one ends by itself, before or meanwhile, or is not at work within `at_work_seconds`.
    """
    if hog is None:
        yield
        return
    command, environment = command_of(hog, cores)
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(hog.processes)]
    try:
        for child in children:
            if not _at_work(hog, child, at_work_seconds):
                raise _ended(hog, child.wait())
        yield
        for child in children:
            if (code := child.poll()) is not None:
                raise _ended(hog, code)
    finally:
        for child in children:
            child.kill()
        for child in children:
            # One that waits for a file system that does not answer ends when that does: nobody waits for it here.
            with suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=GONE_SECONDS)


def _at_work(hog: OnHost, child: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait until it says so; False where it ended instead. Raises LoadTestError where it does neither in time."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as waiting:
        waiting.register(child.stdout, selectors.EVENT_READ)
        if not waiting.select(seconds):
            raise LoadTestError(
                f"{hog.label}: a process was not at work within {seconds:g} s",
                remedy="What it reads does not answer: is it a named pipe, or on a network file system that hangs?",
            )
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
