"""Does this engine really run on its slice, with its memory and its limits? A comparison of two values.

`Expectation` is what was asked for, `Observation` what was seen from outside (NVML, the kernel) and told by the engine
(its log, its metrics); `placement.evidence` makes observations. Each check ends in one of four verdicts. One refutation
fails the proof. What could not be seen fails nothing on a vLLM version that the plugin was tested with; on any other the
processes and the memory must be proven, because there the proof is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from model_registry.words import counted
from placement.cores import format_cores
from placement.slices import DeviceUse, Slice, SliceKind

GIB = 2**30

# How far the total that CUDA or vLLM tells may lie from the driver's. CUDA keeps a little back (79.19 of 79.65 GiB on an
# H100 80 GB), logs round to 0.01 GiB, and `Slice.memory_bytes` may or may not count what firmware reserves. No two sizes
# that a slice could be mistaken for lie closer, but a GPU and its one full-size instance, where it makes no difference.
TOTAL_TOLERANCE_RATIO = 0.05
LOG_ROUNDING_BYTES = GIB // 200

# Less than any CUDA context takes, more than the driver keeps on an idle slice.
IDLE_BYTES = 64 * 2**20


class Verdict(StrEnum):
    """What a check came to. A WARNING is something to know that says nothing against the placement."""

    PROVEN = "proven"
    REFUTED = "refuted"
    UNSEEN = "unseen"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and where it was read: `max_num_seqs`, 16, "its settled configuration"."""

    name: str
    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """What was asked for.

    `limits` are those passed on the command line, by vLLM's names (`max_num_seqs`). `vllm` is the engine's version, or
    None for another engine; `tested` says whether the plugin was tested with it.
    """

    target: Slice
    limits: Mapping[str, float] = field(default_factory=dict)
    vllm: str | None = None
    tested: bool = True


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen. Empty where nothing was.

    `pids` is the engine's whole process tree. `devices` is None where NVML gave no answer. `host_pids` says whether the
    pids that the driver gives are those of this process's namespace; in a container they need not be. `pinned_to` are the
    UUIDs that the plugin reported. `totals` are device memory sizes in bytes, `parts` bytes that must fit into the slice.
    `limits` are those in force; `logged` are all that the log mentions, the command line's and defaults of other parts
    among them. `iteration_tokens_over` is a number of tokens that at least one engine iteration exceeded. `affinity` maps
    pids to the cores they may run on.
    """

    pids: frozenset[int] = frozenset()
    devices: tuple[DeviceUse, ...] | None = None
    host_pids: bool = True
    pinned_to: tuple[str, ...] = ()
    totals: tuple[Figure, ...] = ()
    parts: tuple[Figure, ...] = ()
    limits: tuple[Figure, ...] = ()
    logged: tuple[Figure, ...] = ()
    iteration_tokens_over: int | None = None
    affinity: Mapping[int, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what had to be, what was."""

    check: str
    verdict: Verdict
    expected: str
    seen: str

    def __str__(self) -> str:
        return f"{self.check} {self.verdict}: expected {self.expected}; saw {self.seen}"


@dataclass(frozen=True, slots=True)
class Proof:
    """The findings about one replica on one slice; `ok` decides whether it may serve."""

    target: Slice
    findings: tuple[Finding, ...]
    ok: bool

    @property
    def reason(self) -> str | None:
        """Why it failed, with the slice's name, for the operator; None if it did not."""
        if self.ok:
            return None
        wrong = [f for f in self.findings if f.verdict is Verdict.REFUTED]
        told = wrong or [f for f in self.findings if f.verdict is Verdict.UNSEEN]
        return f"not proven to run on slice {_name(self.target)}: " + "; ".join(map(str, told))

    def as_public(self) -> dict[str, object]:
        """JSON shape: `slice`, `ok`, `findings` [`check`, `verdict`, `expected`, `seen`]."""
        findings = [
            {"check": f.check, "verdict": f.verdict.value, "expected": f.expected, "seen": f.seen}
            for f in self.findings
        ]
        return {"slice": self.target.id, "ok": self.ok, "findings": findings}


def prove(expected: Expectation, seen: Observation) -> Proof:
    """Compare. The findings come in a fixed order: processes, slice, memory, limits, cores, warnings."""
    findings: list[Finding] = []
    if expected.target.kind is not SliceKind.CPU:
        findings.append(_processes(expected.target, seen))
        if expected.vllm is not None:
            findings.extend(_pinned(expected.target, seen))
            findings.extend(_memory(expected.target, seen))
        findings.extend(_neighbours(expected.target, seen))
    findings.extend(_limits(expected, seen))
    findings.extend(_cores(expected.target, seen))
    findings.sort(key=lambda finding: finding.verdict is Verdict.WARNING)
    return Proof(expected.target, tuple(findings), ok=_decide(expected, findings))


def _decide(expected: Expectation, findings: list[Finding]) -> bool:
    if any(f.verdict is Verdict.REFUTED for f in findings):
        return False
    if expected.tested:
        return True
    return all(f.verdict is Verdict.PROVEN for f in findings if f.check in {"processes", "memory"})


def _processes(target: Slice, seen: Observation) -> Finding:
    """The engine's processes are on the slice, and on no other device."""
    expected = f"the engine's processes on {_name(target)} and nowhere else"

    def finding(verdict: Verdict, what: str) -> Finding:
        return Finding("processes", verdict, expected, what)

    if not seen.pids:
        return finding(Verdict.REFUTED, "no process of the engine left")
    if seen.devices is None:
        return finding(Verdict.UNSEEN, "no answer from NVML")
    own = _device(target, seen)
    if own is None:
        return finding(Verdict.REFUTED, f"no device {target.uuid}; it was removed or made anew")
    elsewhere = [f"{_people(d, seen.pids)} on {d.uuid}" for d in seen.devices if d is not own and _on(d, seen.pids)]
    if elsewhere:
        return finding(Verdict.REFUTED, " and ".join(elsewhere))
    if _on(own, seen.pids):
        return finding(Verdict.PROVEN, _people(own, seen.pids))
    return finding(*_nobody(own, seen))


def _nobody(own: DeviceUse, seen: Observation) -> tuple[Verdict, str]:
    """Whether "none of the engine's pids on the slice" means that they are not there, or that pids do not say."""
    used = f"{_gib(own.used_bytes)} of it in use" if own.used_bytes is not None else "its use untold"
    idle = own.used_bytes is not None and own.used_bytes < IDLE_BYTES
    if own.processes is None and not idle:
        return Verdict.UNSEEN, f"a driver that does not list processes, and {used}"
    if not seen.host_pids and not idle:
        return Verdict.UNSEEN, f"process ids of another namespace than this container's, and {used}"
    return Verdict.REFUTED, f"none of its {counted(len(seen.pids), 'process', 'processes')} there, and {used}"


def _pinned(target: Slice, seen: Observation) -> Iterator[Finding]:
    """The plugin, in every process of the engine, took the slice for its device."""
    if target.kind is not SliceKind.MIG:
        return
    wrong = sorted(set(seen.pinned_to) - {target.uuid})
    if wrong:
        yield Finding("slice", Verdict.REFUTED, f"vLLM pinned to {target.uuid}", ", ".join(wrong))
    elif seen.pinned_to:
        yield Finding(
            "slice", Verdict.PROVEN, f"vLLM pinned to {target.uuid}", f"so in {counted(len(seen.pinned_to), 'report')}"
        )
    else:
        said = "no report from the plugin in its log"
        yield Finding("slice", Verdict.UNSEEN, f"vLLM pinned to {target.uuid}", said)


def _memory(target: Slice, seen: Observation) -> Iterator[Finding]:
    """Every total that the engine told is the slice's own, as the driver gives it, and what the engine took fits in."""
    if target.kind not in {SliceKind.MIG, SliceKind.GPU}:  # the others are shares, which CUDA shows as the whole card
        return
    own = _device(target, seen)
    size = own.total_bytes if own else target.memory_bytes
    expected = f"{_gib(size)} of memory on {_name(target)}"
    allowed = size * TOTAL_TOLERANCE_RATIO + LOG_ROUNDING_BYTES
    wrong = [f for f in seen.totals if abs(f.value - size) > allowed]
    wrong += [f for f in seen.parts if f.value > size + LOG_ROUNDING_BYTES]
    if wrong:
        yield Finding("memory", Verdict.REFUTED, expected, _figures(wrong))
    elif seen.totals:
        yield Finding("memory", Verdict.PROVEN, expected, _figures(seen.totals))
    else:
        yield Finding("memory", Verdict.UNSEEN, expected, _figures(seen.parts) or "no figure in its log")


def _limits(expected: Expectation, seen: Observation) -> Iterator[Finding]:
    """Each limit that was passed is in force; where nothing tells what is in force, the log knows it."""
    for name, value in expected.limits.items():
        told = [f for f in seen.limits if f.name == name] or [f for f in seen.logged if f.name == name]
        source = next((f.source for f in told if f.value == value), None)
        wanted = f"{name}={value:g}"
        if source:
            yield Finding("limits", Verdict.PROVEN, wanted, f"so in {source}")
        elif told:
            others = dict.fromkeys(f"{name}={f.value:g} in {f.source}" for f in told)
            yield Finding("limits", Verdict.REFUTED, wanted, ", ".join(others))
        else:
            yield Finding("limits", Verdict.UNSEEN, wanted, "nothing about it")
    budget, over = expected.limits.get("max_num_batched_tokens"), seen.iteration_tokens_over
    if budget is not None and over is not None and over >= budget:
        wanted = f"no iteration of more than {budget:g} tokens"
        yield Finding("limits", Verdict.REFUTED, wanted, f"one of more than {over} tokens in its metrics")


def _cores(target: Slice, seen: Observation) -> Iterator[Finding]:
    """Every process may run on the slice's cores only. Not checked where no cores are set apart.

    A `cpu` slice is its cores. On a GPU they are for the neighbours' sake, and an engine that takes more of them (vLLM's
    --numa-bind does) is in the right place nevertheless.
    """
    if not target.cores or not seen.affinity:
        return
    expected = f"cores {format_cores(target.cores)} only"
    own = frozenset(target.cores)
    astray = {pid: cores - own for pid, cores in seen.affinity.items() if not cores <= own}
    if astray:
        pid, cores = min(astray.items())
        many = f"{len(astray)} of {len(seen.affinity)} processes"
        verdict = Verdict.REFUTED if target.kind is SliceKind.CPU else Verdict.WARNING
        yield Finding("cores", verdict, expected, f"{many} elsewhere, pid {pid} on {format_cores(cores)} too")
    else:
        yield Finding(
            "cores", Verdict.PROVEN, expected, f"so for {counted(len(seen.affinity), 'process', 'processes')}"
        )


def _neighbours(target: Slice, seen: Observation) -> Iterator[Finding]:
    """Strangers on a slice of its own take memory and time from the engine, wherever they come from."""
    if target.kind not in {SliceKind.MIG, SliceKind.GPU} or not seen.host_pids:
        return
    own = _device(target, seen)
    if own is None:
        return
    strangers = {pid: name for pid, name in (own.processes or {}).items() if pid not in seen.pids}
    if strangers and seen.pids:
        people = ", ".join(f"pid {pid} ({name})" for pid, name in sorted(strangers.items()))
        yield Finding("neighbours", Verdict.WARNING, f"{_name(target)} to itself", people)


def _device(target: Slice, seen: Observation) -> DeviceUse | None:
    return next((d for d in seen.devices or () if d.uuid == target.uuid), None)


def _on(device: DeviceUse, pids: frozenset[int]) -> list[int]:
    return sorted(pids.intersection(device.processes or ()))


def _people(device: DeviceUse, pids: frozenset[int]) -> str:
    return ", ".join(f"pid {pid} ({(device.processes or {})[pid]})" for pid in _on(device, pids))


def _name(target: Slice) -> str:
    return f"{target.id} ({target.uuid})" if target.uuid and target.uuid != target.id else target.id


def _figures(figures: list[Figure] | tuple[Figure, ...]) -> str:
    return ", ".join(dict.fromkeys(f"{_gib(f.value)} ({f.name}, {f.source})" for f in figures))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
