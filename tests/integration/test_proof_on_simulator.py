"""The proof of placement on simulated GPUs: real processes, the real binding, and engines that are where they should not be."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pynvml
import pytest

from placement.evidence import ReplicaTrace, prove_replica
from placement.nvml import read_nvidia
from placement.proof import Proof, Verdict
from placement.simulator import MachineOptions, Simulation
from placement.slices import Slice
from placement.vllm_plugin.report import MARK

pytestmark = pytest.mark.integration

ARGUMENTS = ("python", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048")
LIMITS = {"max_num_seqs": 16, "max_num_batched_tokens": 2048}
# A session with a child, as an engine under its shim is.
ENGINE = """
import os, subprocess, sys
os.setsid()
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
input()
"""


@dataclass(frozen=True)
class Stage:
    """Two simulated GPUs with slices, one process tree, and its log."""

    simulation: Simulation
    slices: tuple[Slice, ...]
    session: int
    child: int
    log: Path

    def prove(self, target: Slice, *, vllm: str | None = "0.32.0") -> Proof:
        """Judge the engine with a log as vLLM would have written it on `target`."""
        slice_report = json.dumps({"uuid": target.uuid, "memory_bytes": target.memory_bytes})
        self.log.write_text(f"{MARK}slice {slice_report}\n{MARK}limits {json.dumps(LIMITS)}\n", encoding="utf-8")
        return prove_replica(target, ReplicaTrace(self.session, ARGUMENTS, self.log), vllm=vllm)

    def put(self, pid: int, where: Slice) -> None:
        self.simulation.attach(pid, str(where.uuid), memory_bytes=2**32, name="VLLM::EngineCore")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    simulation = Simulation.create(tmp_path / "machine", "h100-sxm:2", MachineOptions(mig=True))
    with (
        simulation.active(),
        subprocess.Popen([sys.executable, "-c", ENGINE], stdin=-1, stdout=-1, encoding="utf-8") as engine,
    ):
        assert engine.stdout
        child = int(engine.stdout.readline())
        cut()
        try:
            yield Stage(simulation, read_nvidia().slices, engine.pid, child, tmp_path / "log")
        finally:
            os.kill(child, 9)
            engine.kill()


def cut() -> None:
    pynvml.nvmlInit()
    for index in range(2):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        profile = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE, version=2)
        for start in range(3):
            place = ctypes.byref(pynvml.c_nvmlGpuInstancePlacement_t(start, 1))
            instance = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profile.id, place)
            whole = pynvml.NVML_COMPUTE_INSTANCE_PROFILE_1_SLICE
            compute = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, whole, 0)
            pynvml.nvmlGpuInstanceCreateComputeInstance(instance, compute.id)
    pynvml.nvmlShutdown()


def test_an_engine_whose_child_computes_on_its_slice_is_proven(stage: Stage) -> None:
    target = stage.slices[1]
    stage.put(stage.child, target)
    proof = stage.prove(target)
    assert proof.ok, proof.reason
    assert {f.verdict for f in proof.findings} == {Verdict.PROVEN}
    assert [f.check for f in proof.findings] == ["processes", "slice", "memory", "limits", "limits"]


@pytest.mark.parametrize("other", [0, 5], ids=["a neighbour on its GPU", "another GPU's slice"])
def test_an_engine_on_another_slice_is_refused_by_its_process_though_its_log_says_otherwise(
    stage: Stage, other: int
) -> None:
    target, elsewhere = stage.slices[1], stage.slices[other]
    stage.put(stage.session, target)
    stage.put(stage.child, elsewhere)
    reason = stage.prove(target).reason
    assert reason is not None
    assert f"pid {stage.child} (VLLM::EngineCore) on {elsewhere.uuid}" in reason
    assert target.id in reason


def test_an_engine_that_computes_nowhere_is_refused(stage: Stage) -> None:
    reason = stage.prove(stage.slices[1]).reason
    assert reason is not None
    assert "none of its 2 processes there, and 0.0" in reason


def test_another_engine_is_judged_by_its_processes(stage: Stage) -> None:
    target = stage.slices[2]
    assert not stage.prove(target, vllm=None).ok
    stage.put(stage.child, target)
    assert stage.prove(target, vllm=None).ok


def test_a_stranger_on_the_slice_is_pointed_out(stage: Stage) -> None:
    target = stage.slices[1]
    stage.put(stage.child, target)
    stage.simulation.attach(os.getpid(), str(target.uuid), memory_bytes=2**30, name="somebody")
    proof = stage.prove(target)
    assert proof.ok
    assert (proof.findings[-1].verdict, proof.findings[-1].seen) == (
        Verdict.WARNING,
        f"pid {os.getpid()} (somebody)",
    )


def test_a_slice_that_went_away_is_told(stage: Stage) -> None:
    target = stage.slices[1]
    stage.simulation.reboot()
    reason = stage.prove(target).reason
    assert reason is not None
    assert f"no device {target.uuid}; it was removed or made anew" in reason


def test_a_driver_that_hides_processes_decides_nothing_on_a_tested_version(stage: Stage) -> None:
    target = stage.slices[1]
    stage.put(stage.child, target)
    stage.simulation.inject("nvmlDeviceGetComputeRunningProcesses*", pynvml.NVML_ERROR_NO_PERMISSION, times=0)
    assert stage.prove(target).ok
    reason = stage.prove(target, vllm="99.0").reason
    assert reason is not None
    assert "processes unseen" in reason
