"""What an engine said about its own memory when it started, kept so that later plans use the measured figures.

An engine prints its sizes to a hundredth of a GiB and its capacity exactly; `read_engine_log` takes both from its log, and
`calibrated` puts them in place of the estimate. Records are kept per model, memory of the slice, engine version and the flags that weights,
activations and graphs depend on; the KV pool follows from these at any context length and utilization.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from pathlib import Path

from model_registry.atomic import write_atomically
from model_registry.errors import ModelUnreadable
from model_registry.model import EngineLimits, Footprint, Term
from model_registry.sizing.units import GIB

CALIBRATION_FILE = "calibration.json"
"""Its name in the state directory."""

_PRINTED_STEP = 0.01 * GIB
"""Sizes are printed to two decimals of a GiB."""

_NUMBER = r"([\d,.]+)"
_LINES: dict[str, str] = {
    "weights_gib": rf"[Mm]odel loading took {_NUMBER} GiB",
    "available_kv_gib": r"Available KV cache memory: (-?[\d.]+) GiB",
    "graph_gib": rf"(?<!Encoder )[Gg]raph capturing finished in [\d.]+ secs, took {_NUMBER} GiB",
    "graph_estimate_gib": rf"CUDA graph pool memory: [\d.]+ GiB \(actual\), {_NUMBER} GiB \(estimated\)",
    "activation_gib": rf"torch peak memory increase: {_NUMBER} ?GiB",
    "non_torch_gib": rf"non-torch forward increase memory: {_NUMBER} ?GiB",
    "kv_tokens": rf"KV cache size: {_NUMBER} tokens",
    "max_concurrency": rf"Maximum concurrency for [\d,]+ tokens per request: {_NUMBER}x",
    "max_model_len": rf"Maximum concurrency for {_NUMBER} tokens per request",
    "block_tokens": rf"Setting attention block size to {_NUMBER} tokens",
}
_VERSION = re.compile(r"(?:LLM engine \(v|vLLM API server version |version )v?(\d+\.\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one start-up log says; None for what it does not. GiB as printed, tokens and requests as computed."""

    version: str | None = None
    weights_gib: float | None = None
    available_kv_gib: float | None = None
    graph_gib: float | None = None
    graph_estimate_gib: float | None = None
    activation_gib: float | None = None
    non_torch_gib: float | None = None
    kv_tokens: float | None = None
    max_concurrency: float | None = None
    max_model_len: float | None = None
    block_tokens: float | None = None


def read_engine_log(lines: Iterable[str]) -> EngineReport:
    """The figures in a start-up log of vLLM 0.17 to 0.33; where a line comes twice, the last one counts."""
    found: dict[str, float] = {}
    version = None
    patterns = {name: re.compile(pattern) for name, pattern in _LINES.items()}
    for line in lines:
        if match := _VERSION.search(line):
            version = match.group(1)
        for name, pattern in patterns.items():
            if match := pattern.search(line):
                found[name] = float(match.group(1).replace(",", ""))
    return EngineReport(version=version, **found)


@dataclass(frozen=True, slots=True)
class CalibrationKey:
    """What weights, activations and graphs depend on."""

    model: str
    memory_bytes: int
    vllm_version: str
    flags: str

    @classmethod
    def of(cls, model: str, memory_bytes: int, limits: EngineLimits) -> CalibrationKey:
        """The key of `model` (its source, with a revision if it has one) on a slice of `memory_bytes`."""
        flags = {
            "device": limits.device,
            "dtype": limits.dtype,
            "graphs": limits.cuda_graphs,
            "quantization": limits.quantization,
            "seqs": limits.max_num_seqs,
            "tokens": limits.max_num_batched_tokens,
            "tp": limits.tensor_parallel_size,
        }
        text = ",".join(f"{k}={v}" for k, v in flags.items())
        return cls(model, memory_bytes, limits.vllm_version, text)


@dataclass(frozen=True, slots=True)
class Calibration:
    """One measured start. `charged_bytes` is everything that the engine took off its budget before it sized the pool."""

    key: CalibrationKey
    weights_bytes: int
    charged_bytes: int
    graph_bytes: int
    available_kv_bytes: int
    kv_blocks: int | None
    predicted: dict[str, int]
    product: str | None = None
    profile: str | None = None


def calibrate(
    key: CalibrationKey,
    limits: EngineLimits,
    footprint: Footprint,
    report: EngineReport,
    *,
    utilization: float | None = None,
    product: str | None = None,
    profile: str | None = None,
) -> Calibration | None:
    """A record of one start; None where the log lacks the weights or the KV memory (a CPU engine prints neither).

    `utilization` is what the engine was really started with, `limits.gpu_memory_utilization` if None.
    """
    if report.weights_gib is None or report.available_kv_gib is None:
        return None
    share = limits.gpu_memory_utilization if utilization is None else utilization
    blocks = _blocks(footprint, limits, report)
    available = _available(footprint, report.available_kv_gib, blocks)
    graphs = footprint.cuda_graph_bytes if report.graph_gib is None else int(report.graph_gib * GIB)
    return Calibration(
        key=key,
        weights_bytes=int(report.weights_gib * GIB),
        charged_bytes=ceil(key.memory_bytes * share) - available,
        graph_bytes=graphs,
        available_kv_bytes=available,
        kv_blocks=blocks,
        predicted={
            "weights_bytes": footprint.weights_bytes,
            "charged_bytes": footprint.charged_bytes,
            "graph_bytes": footprint.cuda_graph_bytes,
        },
        product=product,
        profile=profile,
    )


def _blocks(footprint: Footprint, limits: EngineLimits, report: EngineReport) -> int | None:
    """The number of blocks behind the printed capacity: the one that gives exactly the printed tokens."""
    per_request = footprint.kv_blocks_per_request
    if not per_request or report.kv_tokens is None or report.max_model_len != limits.max_model_len:
        return None
    length, tokens = limits.max_model_len, int(report.kv_tokens)
    guess = tokens * per_request // length
    return next((b for b in (guess, guess + 1) if int(b / per_request * length) == tokens), None)


def _available(footprint: Footprint, printed_gib: float, blocks: int | None) -> int:
    """The pool's bytes: as printed, or the whole blocks where these say it more exactly."""
    printed = int(printed_gib * GIB)
    if blocks is None:
        return printed
    exact = blocks * footprint.kv_block_bytes
    return exact if abs(exact - printed) <= _PRINTED_STEP + footprint.kv_block_bytes else printed


def calibrated(footprint: Footprint, record: Calibration) -> Footprint:
    """The footprint with measured figures in place of estimated ones; the KV layout is computed as before.

    No margin: what started with these figures has to go on fitting.
    """
    graphs = record.graph_bytes if footprint.graphs_charged else 0
    overhead = max(0, record.charged_bytes - record.weights_bytes - graphs)
    terms = (
        Term("weights", record.weights_bytes, "measured when this engine started"),
        Term("activation and non-torch", overhead, "measured when this engine started"),
        Term("CUDA graphs", record.graph_bytes, "measured when this engine started"),
    )
    return replace(
        footprint,
        weights_bytes=record.weights_bytes,
        activation_bytes=overhead,
        non_torch_bytes=0,
        cuda_graph_bytes=record.graph_bytes,
        terms=terms,
        margin_bytes=0,
        measured=True,
        weights_exact=True,
    )


class CalibrationStore:
    """Records in one JSON file, replaced whole. Two writers at once: the later one wins, and neither leaves half a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> tuple[Calibration, ...]:
        """Every record; empty where there is no file. Raises ModelUnreadable for a file that is not one of these."""
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            return tuple(_record(r) for r in raw["records"])
        except FileNotFoundError:
            return ()
        except (ValueError, KeyError, TypeError) as error:
            raise ModelUnreadable(
                "the calibration file is damaged",
                where=str(self._path),
                remedy="Delete it; the next start of an engine writes it anew.",
            ) from error

    def find(self, key: CalibrationKey) -> Calibration | None:
        """The record for exactly this model, memory, version and flags."""
        return next((r for r in self.all() if r.key == key), None)

    def put(self, record: Calibration) -> None:
        """Add a record, in place of an older one with the same key."""
        kept = [r for r in self.all() if r.key != record.key]
        data = {"version": 1, "records": [asdict(r) for r in (*kept, record)]}
        write_atomically(self._path, json.dumps(data, indent=1).encode())


def _record(raw: dict[str, object]) -> Calibration:
    known = {f.name for f in fields(Calibration)}
    values = {k: v for k, v in raw.items() if k in known and k != "key"}
    return Calibration(key=CalibrationKey(**raw["key"]), **values)  # type: ignore[arg-type]
