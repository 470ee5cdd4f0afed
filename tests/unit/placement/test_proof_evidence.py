"""Reading logs, metrics, arguments and processes. The log lines are worded as vLLM's sources word them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from placement.evidence import (
    ReplicaTrace,
    limits_in,
    observe_replica,
    process_tree,
    prove_replica,
    read_log,
    read_metrics,
    read_models,
)
from placement.proof import GIB, Observation, Verdict
from placement.slices import DeviceUse, Slice, SliceKind
from placement.vllm_plugin import report

MIB = 2**20
TARGET = Slice("GPU-a/1g.10gb@1", SliceKind.MIG, "1g.10gb", 9984 * MIB, uuid="MIG-1")

LOG = """\
(APIServer pid=41) INFO 11-21 10:00:00 [api_utils.py:286] non-default args: {'model': '/m', 'max_model_len': 8192, \
'gpu_memory_utilization': 0.85, 'max_num_batched_tokens': 2048, 'max_num_seqs': 16, 'served_model_name': ['chat']}
(APIServer pid=41) INFO 11-21 10:00:01 [scheduler.py:307] Chunked prefill is enabled with max_num_batched_tokens=2048.
(EngineCore pid=42) INFO 11-21 10:00:05 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: \
model='/m', dtype=torch.bfloat16, max_seq_len=8192, download_dir=None
(EngineCore pid=42) DEBUG 11-21 10:00:06 [gpu_worker.py:538] worker init memory snapshot: \
torch_peak=0.0GiB, torch_allocated=0.0GiB, free_memory=9.4GiB, total_memory=9.62GiB, cuda_memory=0.22GiB
\x1b[36m(EngineCore pid=42)\x1b[0;0m INFO 11-21 10:00:09 [gpu_worker.py:759] Available KV cache memory: 6.51 GiB
(EngineCore pid=42) INFO 11-21 10:00:09 [kv_cache_utils.py:2327] GPU KV cache size: 60,864 tokens, \
Maximum concurrency for 8,192 tokens per request: 7.43x
(EngineCore pid=42) INFO 11-21 10:00:20 [gpu_worker.py:1033] Free memory on device (9.4/9.62 GiB) on startup. \
Desired GPU memory utilization is (0.85, 8.18 GiB).
"""

METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
vllm:cache_config_info{block_size="16",engine="0",gpu_memory_utilization="0.85",kv_cache_memory_bytes="None"} 1.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="chat"} 10.0
vllm:iteration_tokens_total_bucket{engine="0",le="512.0",model_name="chat"} 12.0
vllm:iteration_tokens_total_bucket{engine="0",le="1024.0",model_name="chat"} 13.0
vllm:iteration_tokens_total_bucket{engine="0",le="2048.0",model_name="chat"} 13.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="chat"} 13.0
"""


def test_a_vllm_log_gives_totals_parts_and_limits() -> None:
    seen = read_log(LOG)
    assert {(f.name, round(f.value / GIB, 2)) for f in seen.totals} == {
        ("memory snapshot", 9.62),
        ("total at start", 9.62),
    }
    assert {(f.name, round(f.value / GIB, 2)) for f in seen.parts} == {("KV cache", 6.51)}
    assert seen.limits == (), "a log mentions defaults of other parts as well"
    assert {(f.name, f.value) for f in seen.logged} == {
        ("max_model_len", 8192),
        ("gpu_memory_utilization", 0.85),
        ("max_num_batched_tokens", 2048),
        ("max_num_seqs", 16),
    }


@pytest.mark.parametrize(
    ("line", "gib"),
    [
        (
            "ValueError: Free memory on device cuda:0 (9.1/79.19 GiB) on startup is less than desired GPU memory utilization",
            79.19,
        ),
        ("ValueError: Free memory on device (59.32/79.15 GiB) on startup is less than desired", 79.15),
    ],
)
def test_the_refusal_of_a_full_card_tells_its_size_in_both_wordings(line: str, gib: float) -> None:
    assert [round(f.value / GIB, 2) for f in read_log(line).totals] == [gib]


def test_with_a_fixed_pool_the_free_memory_and_the_pool_are_told() -> None:
    line = (
        "Initial free memory 9.4 GiB, reserved 6.0 GiB memory for KV Cache as specified by kv_cache_memory_bytes config"
    )
    assert {(f.name, round(f.value / GIB, 1)) for f in read_log(line).parts} == {
        ("free at start", 9.4),
        ("KV cache", 6.0),
    }


def test_what_the_plugin_writes_is_what_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    report.tell("slice", uuid="MIG-1", memory_bytes=9984 * MIB, tested=True)
    report.tell("limits", max_num_seqs=16, max_model_len=None)
    report.tell("cuda", total_bytes=9.62 * GIB, sm_count=16)
    seen = read_log("(EngineCore pid=4) " + capfd.readouterr().err)
    assert seen.pinned_to == ("MIG-1",)
    assert {(f.name, f.value) for f in seen.totals} == {("platform", 9984 * MIB), ("CUDA", 9.62 * GIB)}
    assert [(f.name, f.value) for f in seen.limits] == [("max_num_seqs", 16)]


def test_a_report_that_two_processes_wrote_into_is_passed_over() -> None:
    assert read_log('sliceway_mig slice {"uuid": "MIG-(Engine pid=3) INFO}').pinned_to == ()


def test_metrics_give_the_cache_limits_and_the_largest_iteration() -> None:
    seen = read_metrics(METRICS)
    assert [(f.name, f.value) for f in seen.limits] == [("gpu_memory_utilization", 0.85)]
    assert seen.iteration_tokens_over == 512


@pytest.mark.parametrize("text", ["", 'vllm:iteration_tokens_total_bucket{le="+Inf"} 0.0\n', "<html>"])
def test_metrics_without_an_iteration_say_nothing(text: str) -> None:
    assert read_metrics(text).iteration_tokens_over is None


def test_limits_come_from_both_spellings_of_a_flag_and_not_from_what_the_engine_works_out() -> None:
    arguments = ["-m", "vllm", "--max-num-seqs", "16", "--max-num-batched-tokens=2048", "--max-model-len", "-1"]
    arguments += ["--gpu-memory-utilization=0.85", "--kv-cache-memory-bytes", "auto", "--max-num-seqs"]
    assert limits_in(arguments[:-1]) == {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.85,
    }
    assert limits_in(arguments)["max_num_seqs"] == 16


# A stand-in engine: a session of its own, a child, and a grandchild whose parent has ended.
ENGINE = """
import os, subprocess, sys, time
os.setsid()
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep)
orphan = subprocess.run([sys.executable, "-c", f"import subprocess; print(subprocess.Popen({sleep!r}, stdout=-3, stderr=-3).pid)"], capture_output=True, text=True).stdout
print(child.pid, orphan.strip(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def engine() -> Iterator[tuple[int, int, int]]:
    with subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout
        child, orphan = map(int, process.stdout.readline().split())
        yield process.pid, child, orphan
        os.killpg(process.pid, 9)


def test_the_tree_is_children_and_those_that_lost_their_parent_with_the_cores_of_each(
    engine: tuple[int, int, int],
) -> None:
    first, *_ = cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(engine[1], {first})
    tree = process_tree(engine[0])
    assert set(tree) == set(engine)
    assert tree[engine[1]] == {first}
    assert tree[engine[2]] == set(cores)


def test_a_process_that_has_ended_has_no_tree() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    assert process_tree(process.pid) == {}


def test_a_process_that_leads_no_session_does_not_bring_its_whole_shell() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert set(process_tree(process.pid)) == {process.pid}
        process.kill()


def devices(pid: int, uuid: str) -> tuple[DeviceUse, ...]:
    names = {name: {pid: "VLLM::EngineCore"} if name == uuid else {} for name in ("MIG-1", "MIG-2")}
    return tuple(DeviceUse(name, who, 8 * GIB if who else 0, 9984 * MIB) for name, who in names.items())


def test_a_replica_is_proven_from_its_process_log_and_metrics(engine: tuple[int, int, int], tmp_path: Path) -> None:
    pid, child, _ = engine
    log = tmp_path / "replica.log"
    earlier = f"{report.MARK}slice {json.dumps({'uuid': 'MIG-of-an-earlier-start', 'memory_bytes': 1})}\n"
    log.write_text(
        earlier + LOG + f"{report.MARK}slice {json.dumps({'uuid': 'MIG-1', 'memory_bytes': 9984 * MIB})}\n",
        encoding="utf-8",
    )
    process = ReplicaTrace(pid, ("--max-num-seqs", "16", "--max-model-len=8192"), log, len(earlier), METRICS)

    proof = prove_replica(TARGET, process, vllm="0.32.0", devices=lambda: devices(child, "MIG-1"))
    assert proof.ok, proof.reason
    assert {f.verdict for f in proof.findings} == {Verdict.PROVEN}

    wrong = prove_replica(TARGET, process, vllm="0.32.0", devices=lambda: devices(child, "MIG-2"))
    assert wrong.reason is not None
    assert f"pid {child} (VLLM::EngineCore) on MIG-2" in wrong.reason


def test_the_version_decides_whether_seeing_nothing_is_enough(engine: tuple[int, int, int]) -> None:
    process = ReplicaTrace(engine[0])
    assert prove_replica(TARGET, process, vllm="0.32.0", devices=lambda: None).ok
    assert not prove_replica(TARGET, process, vllm="99.0", devices=lambda: None).ok
    assert prove_replica(TARGET, process, vllm=None, devices=lambda: None).ok
    whole = Slice("GPU-a", SliceKind.GPU, None, 80 * GIB, uuid="GPU-a")
    assert prove_replica(whole, process, vllm="99.0", devices=lambda: None).ok, "the plugin plays no part there"


def test_on_a_cpu_slice_nvml_is_not_asked(engine: tuple[int, int, int]) -> None:
    cpu = Slice("cpu-0", SliceKind.CPU, None, GIB, cores=tuple(os.sched_getaffinity(0)))

    def asked() -> None:
        raise AssertionError("NVML was asked")

    assert observe_replica(cpu, ReplicaTrace(engine[0]), devices=asked).devices is None


def test_a_log_that_is_gone_is_no_evidence_and_no_error(tmp_path: Path) -> None:
    seen = observe_replica(TARGET, ReplicaTrace(1, log=tmp_path / "missing.log"), devices=lambda: None)
    assert (seen.totals, seen.limits, seen.pinned_to) == ((), (), ())


def test_the_list_of_models_tells_the_context_length() -> None:
    cards = {"data": [{"id": "chat", "max_model_len": 2048}, {"id": "an-adapter", "max_model_len": None}]}
    (figure,) = read_models(json.dumps(cards)).limits
    assert (figure.name, figure.value, figure.source) == ("max_model_len", 2048, "its list of models")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"data": 3}', '{"data": [3]}', '{"data": [{"max_model_len": "long"}]}']
)
def test_a_list_of_models_that_makes_no_sense_tells_nothing(text: str) -> None:
    assert read_models(text) == Observation()


CPU = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=tuple(sorted(os.sched_getaffinity(0))))


@pytest.mark.parametrize(
    ("metrics", "models", "wrong"),
    [
        (METRICS, "", "gpu_memory_utilization=0.85 in its metrics"),
        ("", '{"data": [{"max_model_len": 131072}]}', "max_model_len=131072 in its list of models"),
    ],
)
def test_a_limit_that_is_not_in_force_refutes_the_proof_and_is_named(metrics: str, models: str, wrong: str) -> None:
    arguments = ("python", "--max-model-len", "2048", "--gpu-memory-utilization", "0.9")
    trace = ReplicaTrace(os.getpid(), arguments, metrics=metrics, models=models)
    proof = prove_replica(CPU, trace, vllm="0.32.0")
    assert not proof.ok
    assert wrong in (proof.reason or "")


def test_another_engines_flags_are_its_own_but_its_list_of_models_is_not() -> None:
    arguments = ("engine", "--max-model-len", "2048", "--max-num-seqs", "4")
    trace = ReplicaTrace(os.getpid(), arguments, models='{"data": [{"max_model_len": 2048}]}')
    limits = [f for f in prove_replica(CPU, trace, vllm=None).findings if f.check == "limits"]
    assert [(f.verdict, f.expected) for f in limits] == [(Verdict.PROVEN, "max_model_len=2048")]
    silent = prove_replica(CPU, ReplicaTrace(os.getpid(), arguments), vllm=None)
    assert not [f for f in silent.findings if f.check == "limits"]
