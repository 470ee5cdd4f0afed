"""Why an engine ended, told from how it ended and what it wrote last. Pure.

Out of memory is told apart from everything else, because the remedy is another one: a smaller model, context or batch, or a
larger slice. PyTorch on MIG fails to build its own out-of-memory message and dies of that failure instead
(pytorch#112377, pytorch#197312), so that assertion counts as out of memory.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from placement.replicas.journal import ExitRecord

Cause = Literal["out_of_memory", "exit", "start_timeout", "unresponsive", "misplaced", "not_started", "not_woken"]
"""What ended it. `unresponsive`, `start_timeout` and `misplaced` are ends that the controller made."""

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# `(EngineCore_0 pid=12) ERROR 11-21 03:08:26 [core.py:700] `, `ERROR 11-21 03:08:26 core.py:700] `
_PREFIX = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? (?:\[[^\]]*\]|\S+?\])\s*)?"
)
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failure)\b")
_VLLM_ERROR = re.compile(r"\b(?:ERROR|CRITICAL)\b")
_MESSAGE_CHARACTERS = 600

# What says more about memory than its wording: pattern, what it means.
_MEMORY: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
        "CUDA ran out of memory on the slice (PyTorch could not even say so: it asserts on MIG)",
    ),
    (
        re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory|cudaErrorMemoryAllocation"),
        "CUDA ran out of memory on the slice",
    ),
    (re.compile(r"No available memory for the cache blocks"), "the model leaves no memory for any KV cache"),
    (
        re.compile(r"KV cache is needed, which is larger than the available KV cache memory"),
        "the KV cache is too small for one request of max_model_len",
    ),
    (
        re.compile(r"Free memory on device .* is less than desired GPU memory utilization"),
        "the slice has less free memory than the engine was told to use",
    ),
    (
        re.compile(
            r"Available memory on node .* is less than (?:desired CPU memory utilization|requested memory for kv)"
        ),
        "the machine has less free memory than the engine was told to use",
    ),
    (
        re.compile(
            r"DefaultCPUAllocator: (?:can't|not enough) .*memory|std::bad_alloc|Cannot allocate memory|^MemoryError",
            re.MULTILINE,
        ),
        "the machine has no memory left",
    ),
)
_DEAD = "EngineDeadError"
_INSPECTED = "failed to be inspected"
_VALIDATION = re.compile(r"ValidationError: \d+ validation errors?\b")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an engine ended. `message` is one or two lines for the operator, in the engine's own words where it has any."""

    cause: Cause
    message: str
    remedy: str = ""


def diagnose(
    record: ExitRecord | None,
    log: str,
    *,
    budget_exceeded: tuple[int, int] | None = None,
    ended_by_us: Literal["start_timeout", "unresponsive"] | None = None,
    waited_seconds: float = 0.0,
) -> Diagnosis:
    """Why the engine that wrote `log` ended.

    `record` is None where its shim could not tell. `budget_exceeded` holds bytes used and allowed, where the controller
    ended it for that. `ended_by_us` is why else the controller ended it, after `waited_seconds`.
    """
    text = _ANSI.sub("", log)
    last = last_error(text)
    if budget_exceeded:
        used, allowed = budget_exceeded
        return Diagnosis(
            "out_of_memory", f"it used {_gib(used)} of memory; its slice has {_gib(allowed)}", _MEMORY_REMEDY
        )
    for pattern, meaning in _MEMORY:
        if pattern.search(text):
            return Diagnosis("out_of_memory", _joined(meaning, last), _MEMORY_REMEDY)
    if ended_by_us == "start_timeout":
        return Diagnosis(
            "start_timeout",
            _joined(f"it was not ready after {waited_seconds:.0f} s", last or _last_line(text)),
            _TIMEOUT_REMEDY,
        )
    if ended_by_us == "unresponsive":
        return Diagnosis("unresponsive", _joined(f"it did not serve for {waited_seconds:.0f} s", last))
    if record and record.oom_kills and not record.stop_requested:
        return Diagnosis(
            "out_of_memory", "the kernel killed it, or a part of it, because memory ran out", _MEMORY_REMEDY
        )
    return Diagnosis("exit", _joined(how_it_ended(record), last or _last_line(text)), _translation(text))


_MEMORY_REMEDY = (
    "Lower max_model_len or max_num_seqs, use a smaller model, or a larger slice; `sliceway size` tells what it needs."
)
_TIMEOUT_REMEDY = "Raise engine.start_timeout_seconds if it was still loading."


def how_it_ended(record: ExitRecord | None) -> str:
    """`exit code 1`, `killed by SIGKILL`, or that nobody knows."""
    if record is None:
        return "its process was killed together with its shim"
    if record.signal is None:
        return f"exit code {record.code}"
    try:
        name = signal.Signals(record.signal).name
    except ValueError:
        name = f"signal {record.signal}"
    return f"killed by {name}"


def last_error(log: str) -> str | None:
    """The engine's own last error: the root cause, where it tells one, else its last exception or error line.

    vLLM logs the failure of its engine process first and then that of its server, which only says that the former failed.
    """
    lines = [_PREFIX.sub("", line.rstrip()) for line in _ANSI.sub("", log).splitlines()]
    exceptions = [_with_details(lines, i) for i, line in enumerate(lines) if _EXCEPTION.match(line.strip())]
    telling = [line for line in exceptions if not _says_nothing(line)]
    if telling or exceptions:
        return _cut((telling or exceptions)[-1])
    errors = [
        _PREFIX.sub("", line).strip()
        for line in log.splitlines()
        if _VLLM_ERROR.search(line) or re.match(r"(?i)(?:\S+: )?error:", line)
    ]
    return _cut(next((line for line in reversed(errors) if line), "")) or None


def _with_details(lines: Sequence[str], index: int) -> str:
    """The exception at `index`; pydantic tells what was wrong in the lines below it only."""
    if not _VALIDATION.search(lines[index]):
        return lines[index].strip()
    below = [line.strip() for line in lines[index + 1 : index + 3] if line.startswith(" ")]
    return " ".join([lines[index].strip(), *below])


def _says_nothing(line: str) -> bool:
    """Exceptions that are consequences of another one in the same log."""
    followers: Sequence[str] = (
        "Engine core initialization failed",
        _DEAD,
        "SystemExit",
        "KeyboardInterrupt",
        "CancelledError",
        "BrokenPipeError",
        _INSPECTED,
    )
    return any(word in line for word in followers)


def _translation(log: str) -> str:
    """What vLLM means where its words mislead."""
    if _INSPECTED in log:
        return (
            "vLLM says this whenever a process that looks at the model's code fails, whatever the reason: on MIG slices usually because "
            "it cannot handle the slice's UUID (vLLM before 0.24), otherwise see the lines above it in the log."
        )
    if _DEAD in log and _DEAD in (last_error(log) or ""):
        return "One of the engine's processes ended without a word: it was killed, or it crashed. `dmesg` may tell."
    return ""


def _last_line(log: str) -> str | None:
    lines = [_PREFIX.sub("", line).strip() for line in log.splitlines() if line.strip() and not line.startswith("--- ")]
    return _cut(lines[-1]) if lines else None


def _joined(what: str, detail: str | None) -> str:
    return f"{what}: {detail}" if detail else what


def _cut(text: str) -> str:
    return text if len(text) <= _MESSAGE_CHARACTERS else f"{text[:_MESSAGE_CHARACTERS]}..."


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
