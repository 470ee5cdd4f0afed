"""What can be seen of a running engine, gathered into an `Observation` for `placement.proof`.

The readers of text (`read_log`, `read_metrics`, `limits_in`) are functions of that text. Log wordings are those of vLLM
0.20 to 0.33 (`vllm/v1/worker/gpu_worker.py`, `vllm/v1/worker/utils.py`, `vllm/v1/core/kv_cache_utils.py`,
`vllm/config/scheduler.py`, `vllm/utils/mem_utils.py`); a line that a release drops or rewords is a figure less, never an
error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from placement.nvml import read_use
from placement.proof import GIB, Expectation, Figure, Observation, Proof, prove
from placement.replicas.procfs import sessions
from placement.slices import DeviceUse, Slice, SliceKind
from placement.vllm_plugin import is_tested
from placement.vllm_plugin.report import MARK

LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes")
LOG_START_BYTES = 4 * 2**20  # all of this is told before the first request
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PLUGIN = re.compile(rf"{re.escape(MARK)}(slice|limits|cuda) (\{{.*\}})")
_TOTALS = {
    re.compile(r"Free memory on device (?:\S+ )?\([\d.]+/([\d.]+) GiB\) on startup"): "total at start",
    re.compile(r"\btotal_memory=([\d.]+)GiB"): "memory snapshot",
}
_PARTS = {
    re.compile(r"Available KV cache memory: ([\d.]+) GiB"): "KV cache",
    re.compile(r"Initial free memory:? ([\d.]+) GiB"): "free at start",
    re.compile(r"reserved ([\d.]+) GiB memory for KV Cache"): "KV cache",
}
_LIMITS = {
    re.compile(r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)"): "max_num_batched_tokens",
    re.compile(r"Maximum concurrency for ([\d,]+) tokens per request"): "max_model_len",
    re.compile(r"Initializing a V\d LLM engine .*\bmax_seq_len=(\d+)"): "max_model_len",
}
_ARGUMENTS = re.compile(r"non-default args: (\{.*\})")
_ARGUMENT = re.compile(rf"'({'|'.join(LIMITS)})': ([\d.]+)")
_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_ITERATIONS = re.compile(r'^vllm:iteration_tokens_total_bucket\{(.*?)le="([^"]+)"(.*?)\} (\S+)', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ReplicaTrace:
    """Where to look for one start of a replica.

    `pid` is the process that leads its session (the shim). `arguments` is the engine's command line. `log_offset` is where
    this start begins in the log, in bytes. `metrics` and `models` are the texts of the engine's `/metrics` and `/v1/models`.
    """

    pid: int
    arguments: tuple[str, ...] = ()
    log: Path | None = None
    log_offset: int = 0
    metrics: str = ""
    models: str = ""


def prove_replica(
    target: Slice,
    trace: ReplicaTrace,
    *,
    vllm: str | None,
    devices: Callable[[], tuple[DeviceUse, ...] | None] = read_use,
) -> Proof:
    """Look at a replica that has just answered its first request, and judge.

    `vllm` is the version in the engine's environment (`EngineEnvironment.vllm`), None for another engine: then only what
    needs no cooperation is checked. Blocks for some milliseconds (NVML, /proc); call it in a thread.
    """
    limits = limits_in(trace.arguments)
    if vllm is None and not target.simulated:  # other engines' flags are theirs; the list of models is everybody's
        limits = {name: value for name, value in limits.items() if name == "max_model_len" and trace.models}
    # The plugin takes part on MIG only; elsewhere every version does what it always did.
    tested = vllm is None or target.kind is not SliceKind.MIG or is_tested(vllm)
    expectation = Expectation(target, limits, vllm, tested)
    return prove(expectation, observe_replica(target, trace, devices=devices))


def observe_replica(
    target: Slice, trace: ReplicaTrace, *, devices: Callable[[], tuple[DeviceUse, ...] | None] = read_use
) -> Observation:
    """Everything that can be seen of a replica. Nothing is raised for a process, log or driver that is gone."""
    before = process_tree(trace.pid)
    in_use = devices() if target.kind is not SliceKind.CPU else None
    affinity = before | process_tree(trace.pid)  # one that started in between is the engine's as well
    told = _merge(read_log(_start_of(trace.log, trace.log_offset)), read_metrics(trace.metrics))
    told = _merge(told, read_models(trace.models))
    return replace(
        told,
        pids=frozenset(affinity),
        devices=in_use,
        host_pids=in_initial_pid_namespace(),
        affinity=affinity,
    )


def process_tree(pid: int) -> dict[int, frozenset[int]]:
    """The engine's processes, each with the cores it may run on: those below `pid`, and its session, which keeps the ones
    whose parent has ended. Zombies are left out; empty if `pid` has ended.
    """
    try:
        below = [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return {}
    tree: dict[int, frozenset[int]] = {}
    for member in {pid, *below, *sessions([pid])[pid]}:
        try:
            if psutil.Process(member).status() != psutil.STATUS_ZOMBIE:
                tree[member] = frozenset(os.sched_getaffinity(member))
        except (psutil.Error, OSError):  # it ended while we looked
            continue
    return tree


def in_initial_pid_namespace() -> bool:
    """Whether the driver's process ids are ours. In a container the driver gives the host's, its own, or none."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return True


def limits_in(arguments: Sequence[str]) -> dict[str, float]:
    """The limits among command-line `arguments`, by vLLM's names. Values that vLLM works out itself are left out."""
    limits: dict[str, float] = {}
    for flag, value in _flags(arguments):
        name = flag.removeprefix("--").replace("-", "_")
        if name in LIMITS and (number := _number(value)) is not None and number >= 0:
            limits[name] = number
    return limits


def read_log(text: str) -> Observation:
    """What a vLLM log tells: the plugin's reports and vLLM's own lines. Colours are ignored."""
    seen = Observation()
    for line in _ANSI.sub("", text).splitlines():
        if match := _PLUGIN.search(line):
            seen = _merge(seen, _plugin_report(match[1], match[2]))
        else:
            seen = _merge(seen, _own_line(line))
    return seen


def read_metrics(text: str) -> Observation:
    """What a vLLM's `/metrics` tells about limits."""
    limits = [
        Figure(name, number, "its metrics")
        for labels in _CACHE_INFO.findall(text)
        for name, value in re.findall(r'(\w+)="([^"]*)"', labels)
        if name in LIMITS and (number := _number(value)) is not None
    ]
    return Observation(limits=tuple(limits), iteration_tokens_over=_largest_iteration(text))


def read_models(text: str) -> Observation:
    """What the answer of `/v1/models` tells about limits. Adapters are listed beside their model, with its length."""
    try:
        cards = json.loads(text)["data"] if text else []
        lengths = {float(card["max_model_len"]) for card in cards if card.get("max_model_len")}
    except (ValueError, TypeError, KeyError, AttributeError):
        return Observation()
    return Observation(limits=tuple(Figure("max_model_len", n, "its list of models") for n in sorted(lengths)))


def _plugin_report(event: str, payload: str) -> Observation:
    try:
        facts = json.loads(payload)
    except ValueError:  # two processes wrote at once
        return Observation()
    source = "the plugin's report"
    if event == "slice":
        total = Figure("platform", float(facts.get("memory_bytes") or 0), source)
        return Observation(pinned_to=(str(facts.get("uuid")),), totals=(total,))
    if event == "cuda":
        return Observation(totals=(Figure("CUDA", float(facts.get("total_bytes") or 0), source),))
    limits = (Figure(name, float(facts[name]), source) for name in LIMITS if facts.get(name) is not None)
    return Observation(limits=tuple(limits))


def _own_line(line: str) -> Observation:
    source = "its log"
    if match := _ARGUMENTS.search(line):
        return Observation(
            logged=tuple(Figure(n, float(v), "the arguments in its log") for n, v in _ARGUMENT.findall(match[1]))
        )
    return Observation(
        totals=tuple(Figure(n, float(m[1]) * GIB, source) for p, n in _TOTALS.items() if (m := p.search(line))),
        parts=tuple(Figure(n, float(m[1]) * GIB, source) for p, n in _PARTS.items() if (m := p.search(line))),
        logged=tuple(
            Figure(n, float(m[1].replace(",", "")), source) for p, n in _LIMITS.items() if (m := p.search(line))
        ),
    )


def _largest_iteration(text: str) -> int | None:
    """The lower edge of the highest bucket that is not empty: some iteration had more tokens than this."""
    series: dict[str, list[tuple[float, float]]] = {}
    for before, edge, after, count in _ITERATIONS.findall(text):
        series.setdefault(before + after, []).append((float(edge), float(count)))
    edges = []
    for buckets in series.values():
        total = max(count for _, count in buckets)
        edges += [edge for edge, count in buckets if count < total]
    return int(max(edges)) if edges else None


def _merge(one: Observation, other: Observation) -> Observation:
    return replace(
        one,
        pinned_to=one.pinned_to + other.pinned_to,
        totals=one.totals + other.totals,
        parts=one.parts + other.parts,
        limits=one.limits + other.limits,
        logged=one.logged + other.logged,
        iteration_tokens_over=one.iteration_tokens_over
        if other.iteration_tokens_over is None
        else other.iteration_tokens_over,
    )


def _start_of(log: Path | None, offset: int) -> str:
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            return file.read(LOG_START_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            continue
        yield flag, value if equals else next(iter(arguments[position + 1 : position + 2]), "")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
