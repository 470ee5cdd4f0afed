"""The comparison itself: every way in which an engine can be somewhere else, and what is then said."""

from dataclasses import replace

import pytest

from placement.proof import GIB, Expectation, Figure, Observation, Proof, Verdict, prove
from placement.slices import DeviceUse, Gpu, Slice, SliceKind

MIB = 2**20
GPU = Gpu("GPU-a", 0, "h100-sxm", 81559 * MIB)
TARGET = Slice("GPU-a/1g.10gb@1", SliceKind.MIG, "1g.10gb", 9984 * MIB, uuid="MIG-1", gpu=GPU, cores=(2, 3))
ENGINE = frozenset({100, 101})
LIMITS = {"max_num_seqs": 16.0, "max_num_batched_tokens": 2048.0}


def device(uuid: str, *pids: int, used: int = 8000 * MIB, total: int = 9984 * MIB) -> DeviceUse:
    return DeviceUse(uuid, {pid: f"proc{pid}" for pid in pids}, used if pids else 0, total)


GOOD = Observation(
    pids=ENGINE,
    devices=(device("MIG-0", 7), device("MIG-1", 101), device("GPU-b", total=81559 * MIB)),
    pinned_to=("MIG-1", "MIG-1"),
    totals=(Figure("platform", 9984 * MIB, "the plugin's report"), Figure("CUDA", 9.62 * GIB, "the plugin's report")),
    parts=(Figure("KV cache", 6.5 * GIB, "its log"),),
    limits=(Figure("max_num_seqs", 16, "its settled configuration"), Figure("max_num_batched_tokens", 2048, "its log")),
    iteration_tokens_over=1024,
    affinity={100: frozenset({2, 3}), 101: frozenset({3})},
)
TESTED = Expectation(TARGET, LIMITS, vllm="0.32.0")


def verdicts(proof: Proof) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in proof.findings}


def refusal(seen: Observation, expected: Expectation = TESTED) -> str:
    proof = prove(expected, seen)
    assert not proof.ok
    assert proof.reason is not None
    assert TARGET.id in proof.reason
    assert "MIG-1" in proof.reason
    return proof.reason


def test_an_engine_in_its_place_is_proven_in_every_respect() -> None:
    proof = prove(TESTED, GOOD)
    assert proof.ok
    assert proof.reason is None
    assert {finding.check for finding in proof.findings} == {"processes", "slice", "memory", "limits", "cores"}
    assert {finding.verdict for finding in proof.findings} == {Verdict.PROVEN}


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ((device("MIG-1"), device("MIG-0", 101)), "pid 101 (proc101) on MIG-0"),
        ((device("MIG-1", 100), device("GPU-b", 101)), "pid 101 (proc101) on GPU-b"),
        ((device("MIG-1"), device("MIG-0", 7)), "none of its 2 processes there, and 0.00 GiB of it in use"),
        ((device("MIG-0", 7),), "no device MIG-1"),
    ],
    ids=["on a neighbour", "on another GPU as well", "on no device", "the slice is gone"],
)
def test_an_engine_elsewhere_is_refused_and_told_where(devices: tuple[DeviceUse, ...], said: str) -> None:
    reason = refusal(replace(GOOD, devices=devices))
    assert said in reason
    assert "the engine's processes on GPU-a/1g.10gb@1 (MIG-1) and nowhere else" in reason


def test_an_engine_that_is_gone_is_refused() -> None:
    assert "no process of the engine left" in refusal(replace(GOOD, pids=frozenset()))


@pytest.mark.parametrize(
    "seen",
    [
        replace(GOOD, devices=None),
        replace(GOOD, devices=(replace(device("MIG-1"), processes=None, used_bytes=8000 * MIB),)),
        replace(GOOD, devices=(replace(device("MIG-1"), used_bytes=8000 * MIB),), host_pids=False),
        replace(GOOD, devices=(device("MIG-1", 4_000_000),), host_pids=False),
    ],
    ids=["no NVML", "processes not listed", "a container that sees none", "a container that sees the host's"],
)
def test_what_cannot_be_seen_is_held_against_the_engine_on_untested_versions_only(seen: Observation) -> None:
    proof = prove(TESTED, seen)
    assert proof.ok
    assert verdicts(proof)["processes"] is Verdict.UNSEEN
    assert "processes unseen" in refusal(seen, replace(TESTED, vllm="9.0.0", tested=False))


def test_an_idle_slice_refutes_even_where_process_ids_are_hidden() -> None:
    refusal(replace(GOOD, devices=(device("MIG-1"),), host_pids=False))
    refusal(replace(GOOD, devices=(replace(device("MIG-1"), processes=None),)))


def test_an_untested_version_serves_once_processes_and_memory_are_proven() -> None:
    unknown = replace(TESTED, vllm="9.0.0", tested=False)
    assert prove(unknown, GOOD).ok
    assert prove(unknown, replace(GOOD, pinned_to=(), limits=(), logged=())).ok
    assert "memory unseen" in refusal(replace(GOOD, totals=()), unknown)


def test_a_plugin_that_took_another_slice_is_refused_by_its_name() -> None:
    assert "slice refuted: expected vLLM pinned to MIG-1; saw MIG-9" in refusal(
        replace(GOOD, pinned_to=("MIG-1", "MIG-9"))
    )


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (
            replace(GOOD, totals=(Figure("total at start", 79.19 * GIB, "its log"),)),
            "79.19 GiB (total at start, its log)",
        ),
        (replace(GOOD, totals=(*GOOD.totals, Figure("CUDA", 19.5 * GIB, "x"))), "19.50 GiB (CUDA, x)"),
        (replace(GOOD, parts=(Figure("KV cache", 61.2 * GIB, "its log"),)), "61.20 GiB (KV cache, its log)"),
    ],
    ids=["the parent's memory", "one process sees another slice", "more KV cache than the slice holds"],
)
def test_memory_that_is_not_the_slices_is_refused_with_both_sizes(seen: Observation, said: str) -> None:
    reason = refusal(seen)
    assert said in reason
    assert "expected 9.75 GiB of memory on GPU-a/1g.10gb@1" in reason


def test_what_cuda_and_the_log_keep_back_or_round_away_is_allowed() -> None:
    totals = (Figure("CUDA", 9.75 * GIB * 0.994, "x"), Figure("total at start", 9.75 * GIB, "y"))
    assert verdicts(prove(TESTED, replace(GOOD, totals=totals)))["memory"] is Verdict.PROVEN


def test_the_drivers_size_counts_where_an_operator_capped_the_slice() -> None:
    capped = replace(TESTED, target=replace(TARGET, memory_bytes=5 * GIB))
    assert prove(capped, GOOD).ok


def test_a_limit_in_force_counts_before_the_one_that_was_passed() -> None:
    seen = replace(
        GOOD,
        limits=(Figure("max_num_seqs", 1024, "its settled configuration"),),
        logged=(Figure("max_num_seqs", 16, "its arguments"), Figure("max_num_batched_tokens", 2048, "its arguments")),
    )
    reason = refusal(seen)
    assert "expected max_num_seqs=16; saw max_num_seqs=1024 in its settled configuration" in reason
    assert "max_num_batched_tokens" not in reason


def test_an_iteration_beyond_the_token_budget_refutes_it() -> None:
    assert prove(TESTED, replace(GOOD, iteration_tokens_over=2047)).ok
    assert "more than 2048 tokens" in refusal(replace(GOOD, iteration_tokens_over=2048))


def test_a_limit_that_nothing_tells_of_is_unseen() -> None:
    proof = prove(TESTED, replace(GOOD, limits=()))
    assert proof.ok
    assert verdicts(proof)["limits"] is Verdict.UNSEEN


def test_cores_of_others_are_named_and_refused_where_cores_are_the_slice() -> None:
    seen = replace(GOOD, affinity={100: frozenset({2, 3}), 101: frozenset({3, 4, 5})})
    on_gpu = prove(TESTED, seen)
    assert on_gpu.ok
    assert verdicts(on_gpu)["cores"] is Verdict.WARNING
    cpu = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(2, 3))
    on_cores = prove(Expectation(cpu), seen)
    words = "expected cores 2-3 only; saw 1 of 2 processes elsewhere, pid 101 on 4-5 too"
    assert words in str(on_gpu.findings[-1])
    assert words in (on_cores.reason or "")


def test_a_stranger_on_the_slice_is_told_and_does_not_stop_the_engine() -> None:
    proof = prove(TESTED, replace(GOOD, devices=(device("MIG-1", 101, 555),)))
    assert proof.ok
    assert proof.findings[-1].verdict is Verdict.WARNING
    assert "pid 555 (proc555)" in proof.findings[-1].seen


def test_another_engine_is_judged_by_its_processes_and_cores_alone() -> None:
    other = Expectation(TARGET, {}, vllm=None)
    proof = prove(other, replace(GOOD, pinned_to=(), totals=(), parts=(), limits=(), iteration_tokens_over=None))
    assert proof.ok
    assert set(verdicts(proof)) == {"processes", "cores"}
    refusal(replace(GOOD, devices=(device("MIG-1"), device("MIG-0", 101))), other)


def test_a_cpu_slice_is_judged_by_cores_and_limits() -> None:
    cpu = Slice("cpu-0", SliceKind.CPU, None, GIB, cores=(2, 3))
    proof = prove(Expectation(cpu, LIMITS, vllm="0.32.0"), GOOD)
    assert proof.ok
    assert set(verdicts(proof)) == {"limits", "cores"}


def test_a_share_of_a_card_is_not_measured_by_the_cards_memory() -> None:
    share = Slice("GPU-b/mps-0", SliceKind.MPS, None, 40 * GIB, uuid="GPU-b")
    seen = replace(GOOD, devices=(device("GPU-b", 101, 7, total=81559 * MIB),))
    proof = prove(Expectation(share, {}, vllm="0.32.0"), seen)
    assert proof.ok
    assert set(verdicts(proof)) == {"processes"}, "and its neighbours are there on purpose"


def test_the_public_form_names_slice_verdict_and_both_sides() -> None:
    public = prove(TESTED, replace(GOOD, pinned_to=("MIG-9",))).as_public()
    assert public["slice"] == TARGET.id
    assert public["ok"] is False
    findings = public["findings"]
    assert isinstance(findings, list)
    assert {"check": "slice", "verdict": "refuted", "expected": "vLLM pinned to MIG-1", "seen": "MIG-9"} in findings
