"""How much load a model bore on a slice within an SLO, as measured by `sliceway bench capacity`; kept for planning.

One JSON file in the state directory, `throughput.json`: {"version": 1, "records": [...]}, a record per model, slice size,
workload and SLO. A measured figure is worth more than the roofline's estimate (`sizing.speed`) and less than a measurement
of the workload at hand: prompts and answers of other lengths need another record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from model_registry.atomic import write_atomically
from model_registry.errors import ModelUnreadable

THROUGHPUT_FILE = "throughput.json"
"""Its name in the state directory."""


@dataclass(frozen=True, slots=True)
class ThroughputKey:
    """What a measured capacity holds for.

    `source` is the model as the configuration names it, `kind` and `profile` are the slice's, `product` the card's;
    `cores` counts those of a cpu slice. Tokens are rounded means per request. `slo` maps limits (`ttft_seconds`,
    `tpot_seconds`, `itl_seconds`, `e2e_seconds`) to seconds, and `attainment` to a share.
    """

    source: str
    kind: str
    profile: str | None
    product: str | None
    cores: int | None
    prompt_tokens: int
    output_tokens: int
    slo: Mapping[str, float]
    engine_version: str | None = None


@dataclass(frozen=True, slots=True)
class Throughput:
    """One measurement. Rates are per second and per replica; `requests_per_second` held, `fails_at` (None: unknown) did not.

    `price_per_hour` is the slice's, None where nobody gave one. `measured_at` is UTC, ISO 8601.
    """

    key: ThroughputKey
    model: str
    requests_per_second: float
    fails_at: float | None
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    attainment: float
    ttft_p99_seconds: float | None
    itl_p99_seconds: float | None
    measured_at: str
    price_per_hour: float | None = None
    simulated: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def price_per_million_tokens(self) -> float | None:
        """Of output tokens at full load; None where no price is known."""
        if self.price_per_hour is None or not self.output_tokens_per_second:
            return None
        return self.price_per_hour / 3600 / self.output_tokens_per_second * 1e6


class ThroughputStore:
    """Records in one JSON file, replaced whole. Two writers at once: the later one wins, and neither leaves half a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> tuple[Throughput, ...]:
        """Every record; empty where there is no file. Raises ModelUnreadable for a file that is not one of these."""
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            return tuple(_record(one) for one in raw["records"])
        except FileNotFoundError:
            return ()
        except (ValueError, KeyError, TypeError) as error:
            raise ModelUnreadable(
                "the throughput file is damaged",
                where=str(self._path),
                remedy="Delete it; `sliceway bench capacity` writes it anew.",
            ) from error

    def find(self, key: ThroughputKey) -> Throughput | None:
        """The record for exactly this."""
        return next((one for one in self.all() if one.key == key), None)

    def of(self, source: str) -> tuple[Throughput, ...]:
        """Every record of a model, on whatever slice."""
        return tuple(one for one in self.all() if one.key.source == source)

    def put(self, record: Throughput) -> None:
        """Add a record, in place of an older one with the same key."""
        kept = [one for one in self.all() if one.key != record.key]
        data = {"version": 1, "records": [asdict(one) for one in (*kept, record)]}
        write_atomically(self._path, json.dumps(data, indent=1).encode())


def _record(raw: Mapping[str, Any]) -> Throughput:
    known = {f.name for f in fields(Throughput)} - {"key", "notes"}
    values = {name: value for name, value in raw.items() if name in known}
    return Throughput(key=ThroughputKey(**raw["key"]), notes=tuple(raw.get("notes", ())), **values)
