"""vLLM's own platform code on simulated MIG slices: wrong without the plugin, right with it.

The code is that of the engine environment's vLLM (SLICEWAY_ENGINE_PYTHON, or what `sliceway engine install` made); without
one these tests are skipped. SLICEWAY_VLLM_TREES names directories with other versions' `vllm` packages, separated like
PATH, to ask the same of them: that is how a version gets into TESTED_VERSIONS. No engine is started.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import pytest

from placement.engines import find_engine_python
from placement.errors import EngineMissing
from placement.evidence import read_log
from placement.plugin import PLUGIN_NAME, install_plugin
from placement.simulator import MachineOptions, Simulation
from placement.vllm_plugin import is_tested

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

PROBE = Path(__file__).with_name("vllm_platform_probe.py")
TREES = ("", *filter(None, os.environ.get("SLICEWAY_VLLM_TREES", "").split(os.pathsep)))
WITHOUT = {"VLLM_PLUGINS": "none"}
WITH = {"VLLM_PLUGINS": PLUGIN_NAME}
WAYS = {"without": WITHOUT, "with": WITH}
GONE = "MIG-00000000-0000-5000-8000-000000000000"
OFF_MIG = ("an index", "a GPU's UUID", "nothing", "two slices")
GPUS_AND_INDICES = [(gpus, gpu, index) for gpus in (1, 2) for gpu in range(gpus) for index in range(7)]

Answers = Mapping[str, Any]


@dataclass(frozen=True)
class MigTruth:
    """A slice as the driver shows it to who asks right."""

    index: int
    uuid: str
    old_style: str
    memory_bytes: int
    gpu: int
    gpu_uuid: str
    gpu_name: str
    gpu_memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """A simulated machine with as many small slices on each GPU as it holds."""

    simulation: Simulation
    slices: tuple[MigTruth, ...]

    def slice(self, gpu: int, index: int) -> MigTruth:
        return next(s for s in self.slices if (s.gpu, s.index) == (gpu, index))

    def case(self, name: str, environment: Mapping[str, str], **more: object) -> dict[str, object]:
        there = self.simulation.environment(environ={})
        return {"environment": {**there, "CUDA_VISIBLE_DEVICES": name, **environment}, **more}


@dataclass(frozen=True)
class Lab:
    """The machines, and what one vLLM said about all of them."""

    machines: Mapping[str, Machine]
    vllm: str
    answers: Mapping[str, Answers]
    installed: bool

    @property
    def takes_the_name_for_a_number(self) -> bool:
        """Up to 0.23 vLLM reads CUDA_VISIBLE_DEVICES with int()."""
        return tuple(map(int, self.vllm.split(".")[:2])) < (0, 24)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Machine]:
    directory = tmp_path_factory.mktemp("machines")
    fleets = {"1": "h100-sxm:1", "2": "h100-sxm:2", "mixed": "h100-sxm:1,a30:1"}
    return {name: machine_of(fleet, directory / name) for name, fleet in fleets.items()}


@pytest.fixture(scope="module", params=TREES, ids=lambda tree: Path(tree).name or "installed")
def lab(
    request: pytest.FixtureRequest, machines: Mapping[str, Machine], tmp_path_factory: pytest.TempPathFactory
) -> Lab:
    """Everything is asked in one process, because importing vLLM takes most of the time."""
    try:
        python = find_engine_python("cpu")
    except EngineMissing as error:
        pytest.skip(f"no engine environment: {error.message}")
    plugin = install_plugin(tmp_path_factory.mktemp("plugin"))
    installed = installed_sliceway(tmp_path_factory.mktemp("site"))
    run = subprocess.run(
        [python, PROBE],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": request.param,
            **machines["1"].simulation.environment(environ={}),
        },
        input=json.dumps(cases(machines, str(plugin), str(installed))),
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout)
    return Lab(machines, said["vllm"], said["answers"], installed=not request.param)


def cases(machines: Mapping[str, Machine], plugin: str, installed: str) -> dict[str, dict[str, object]]:
    """What is asked, by the label under which the tests look the answer up."""
    path = [plugin]
    asked: dict[str, dict[str, object]] = {}
    for gpus, gpu, index in GPUS_AND_INDICES:
        machine = machines[str(gpus)]
        target = machine.slice(gpu, index)
        for way, environment in WAYS.items():
            asked[f"{gpus} {gpu} {index} {way}"] = machine.case(target.uuid, environment, path=path)
        asked[f"{gpus} {gpu} {index} old style"] = machine.case(target.old_style, WITH, path=path)
    two, mixed = machines["2"], machines["mixed"]
    off_mig = ("0", two.slices[0].gpu_uuid, "", f"{two.slices[0].uuid},{two.slices[1].uuid}")
    for way, environment in WAYS.items():
        asked[f"mixed {way}"] = mixed.case(mixed.slice(0, 1).uuid, environment, path=path)
        asked[f"defaults {way}"] = two.case(two.slice(0, 0).uuid, environment, path=path, defaults=True)
        for label, name in zip(OFF_MIG, off_mig, strict=True):
            asked[f"{label} {way}"] = two.case(name, environment, path=path)
    third = two.slice(0, 3).uuid
    asked["unprivileged"] = two.case(third, WITH | {"SLICEWAY_NVML_PRIVILEGE": "none"}, path=path)
    asked["worker"] = two.case(third, WITH, path=path, worker=True)
    asked["gone"] = two.case(GONE, WITH, path=path)
    asked["as built"] = two.case(third, WITH, path=path, as_built=True)
    asked["no driver"] = two.case(third, WITH | {"SLICEWAY_NVML_STATE": "/nowhere"}, path=path)
    asked["unlisted"] = two.case(third, {"VLLM_PLUGINS": "another"}, path=path)
    asked["both, ours first"] = two.case(third, {}, path=[plugin, installed])
    asked["both, ours last"] = two.case(third, {}, path=[installed, plugin])
    asked["installed alone"] = two.case(third, {}, path=[installed])
    return asked


def installed_sliceway(site: Path) -> Path:
    """A directory in which sliceway is installed, as in an environment of both."""
    info = site / "sliceway-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sliceway\nVersion: 0.1.0\n", encoding="utf-8")
    points = f"[vllm.platform_plugins]\n{PLUGIN_NAME} = placement.vllm_plugin:register\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    (site / "placement").symlink_to(Path(sys.modules["placement"].__path__[0]))
    return site


def machine_of(fleet: str, directory: Path) -> Machine:
    simulation = Simulation.create(directory, fleet, MachineOptions(mig=True))
    with simulation.active():
        pynvml.nvmlInit()
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            for gpu in gpus:
                cut(gpu)
            return Machine(simulation, tuple(s for number, gpu in enumerate(gpus) for s in truth(number, gpu)))
        finally:
            pynvml.nvmlShutdown()


def cut(gpu: object) -> None:
    """As many slices of one compute slice as go on the GPU, each with its whole compute instance."""
    profile = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE, version=2)
    for start in range(profile.instanceCount):
        placement = pynvml.c_nvmlGpuInstancePlacement_t(start, 1)
        instance = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profile.id, ctypes.byref(placement))
        whole = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(
            instance, pynvml.NVML_COMPUTE_INSTANCE_PROFILE_1_SLICE, 0
        )
        pynvml.nvmlGpuInstanceCreateComputeInstance(instance, whole.id)


def truth(number: int, gpu: object) -> Iterator[MigTruth]:
    uuid = pynvml.nvmlDeviceGetUUID(gpu)
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
        except pynvml.NVMLError_NotFound:
            continue
        gi, ci = pynvml.nvmlDeviceGetGpuInstanceId(handle), pynvml.nvmlDeviceGetComputeInstanceId(handle)
        yield MigTruth(
            index=index,
            uuid=pynvml.nvmlDeviceGetUUID(handle),
            old_style=f"MIG-{uuid}/{gi}/{ci}",
            memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            gpu=number,
            gpu_uuid=uuid,
            gpu_name=pynvml.nvmlDeviceGetName(gpu),
            gpu_memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(gpu).total,
            capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(gpu)),
        )


def assert_right(answers: Answers, target: MigTruth) -> None:
    assert answers["class"] == "MigCudaPlatform", answers["stderr"]
    assert answers["name"] == target.gpu_name
    assert answers["uuid"] == target.uuid
    assert answers["memory_bytes"] == target.memory_bytes
    assert answers["capability"] == list(target.capability)
    assert answers["count"] == 1
    assert answers["physical_id"] == target.gpu
    assert answers["numa_nodes"] == [answers["numa_node"]]
    assert (answers["is_ampere_or_later"], answers["has_bfloat16"]) == (True, True)
    assert (answers["is_cuda"], answers["is_out_of_tree"]) == (True, False)
    assert answers.get("visible_id", 0) == 0
    assert answers.get("physical_of_visible", target.gpu) == target.gpu
    assert answers.get("physical_of_name", target.gpu) == target.gpu


@pytest.mark.parametrize(("gpus", "gpu", "index"), GPUS_AND_INDICES)
def test_a_slice_is_right_with_the_plugin_by_either_name(lab: Lab, gpus: int, gpu: int, index: int) -> None:
    target = lab.machines[str(gpus)].slice(gpu, index)
    assert_right(lab.answers[f"{gpus} {gpu} {index} with"], target)
    assert_right(lab.answers[f"{gpus} {gpu} {index} old style"], target)


@pytest.mark.parametrize(("gpus", "gpu", "index"), GPUS_AND_INDICES)
def test_a_slice_is_wrong_without_the_plugin(lab: Lab, gpus: int, gpu: int, index: int) -> None:
    machine = lab.machines[str(gpus)]
    target = machine.slice(gpu, index)
    answers = lab.answers[f"{gpus} {gpu} {index} without"]
    facts = ("name", "uuid", "memory_bytes", "capability", "is_ampere_or_later", "has_bfloat16")
    assert answers["class"] == "NvmlCudaPlatform"
    if lab.takes_the_name_for_a_number:
        assert {answers[fact].split(":")[0] for fact in facts} == {"ValueError"}
    elif index >= gpus:  # the slice's index within its parent, taken for the index of a GPU that is not there
        assert {answers[fact] for fact in facts} == {"NVMLError_InvalidArgument: Invalid Argument"}
    else:  # or for one that is, with the whole card's memory
        assert answers["uuid"] == next(s.gpu_uuid for s in machine.slices if s.gpu == index)
        assert answers["memory_bytes"] == target.gpu_memory_bytes > 8 * target.memory_bytes


def test_on_a_mixed_host_vllm_alone_reads_another_cards_capability(lab: Lab) -> None:
    if not lab.takes_the_name_for_a_number:
        assert lab.answers["mixed without"]["name"] == "NVIDIA A30"
        assert lab.answers["mixed without"]["capability"] == [8, 0]
    assert lab.answers["mixed with"]["capability"] == [9, 0]
    assert_right(lab.answers["mixed with"], lab.machines["mixed"].slice(0, 1))


def test_the_batch_defaults_are_those_of_the_slice(lab: Lab) -> None:
    if not lab.takes_the_name_for_a_number:
        assert lab.answers["defaults without"]["batch_defaults"] == [8192, 1024], (
            "an H100's, on an eighth of its memory"
        )
    assert lab.answers["defaults with"]["batch_defaults"] == [2048, 256]


def test_a_user_without_privileges_gets_the_same_answers(lab: Lab) -> None:
    assert_right(lab.answers["unprivileged"], lab.machines["2"].slice(0, 3))


def test_the_version_in_use_is_among_the_tested_and_says_so(lab: Lab) -> None:
    assert is_tested(lab.vllm), "run this file on it, then add it to placement/vllm_plugin/versions.py"
    assert '"tested": true' in lab.answers["worker"]["stderr"]


def test_the_plugins_reports_are_evidence_for_the_proof(lab: Lab) -> None:
    target = lab.machines["2"].slice(0, 3)
    answers = lab.answers["worker"]
    seen = read_log(answers["stderr"])
    assert answers["worker"] == "vllm.v1.worker.gpu_worker.Worker", "vLLM's own part is done as well"
    assert seen.pinned_to == (target.uuid,)
    assert {(f.name, f.value) for f in seen.totals} == {("platform", target.memory_bytes), ("CUDA", 10**10)}
    assert [(f.name, f.value) for f in seen.limits] == [
        ("max_num_seqs", 16),
        ("max_num_batched_tokens", 2048),
        ("max_model_len", 8192),
        ("gpu_memory_utilization", 0.85),
    ]


@pytest.mark.parametrize("label", OFF_MIG)
def test_off_mig_nothing_is_different(lab: Lab, label: str) -> None:
    without, with_plugin = (lab.answers[f"{label} {way}"] for way in WAYS)
    assert with_plugin["class"] == "NvmlCudaPlatform"
    assert {**with_plugin, "stderr": ""} == {**without, "stderr": ""}


def test_a_slice_that_was_made_anew_is_told_by_its_name(lab: Lab) -> None:
    assert lab.answers["gone"]["class"] == "NvmlCudaPlatform"
    assert f"names the slice {GONE}, and the driver has no such slice" in lab.answers["gone"]["stderr"]


def test_a_machine_without_a_driver_is_left_alone(lab: Lab) -> None:
    assert lab.answers["no driver"]["class"] == "UnspecifiedPlatform"


def test_a_cpu_build_is_left_alone(lab: Lab) -> None:
    if not lab.installed:
        pytest.skip("the metadata that tells a build is not in a bare tree")
    assert lab.answers["as built"]["class"] == "CpuPlatform"


def test_an_allow_list_without_it_keeps_it_out(lab: Lab) -> None:
    assert lab.answers["unlisted"]["class"] == "NvmlCudaPlatform"


@pytest.mark.parametrize("label", ["both, ours first", "both, ours last", "installed alone"])
def test_beside_an_installed_sliceway_one_plugin_is_active(lab: Lab, label: str) -> None:
    assert_right(lab.answers[label], lab.machines["2"].slice(0, 3))
