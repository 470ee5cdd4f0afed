"""What gateways see of each model's demand, told to the controller through files: one per gateway process, replaced as a whole.

A file says when it was written; one that is older than `FRESH_SECONDS` is a process that hangs or has ended, and does not
count. Written without waiting for the disk: after a crash of the machine it is out of date anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from placement.autoscale import Signals

FRESH_SECONDS = 5.0
"""Or three times the interval at which they are written, where that is longer."""
_FORGOTTEN_SECONDS = 60.0


class ModelFigures(BaseModel):
    """One model as one gateway sees it. Rates are over `autoscale.window`, latencies 95th percentiles over a minute."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    model: str
    arrivals_per_second: float = Field(default=0.0, ge=0)
    waiting: int = Field(default=0, ge=0, description="Requests in its queues.")
    in_flight: int = Field(default=0, ge=0, description="Requests that its engines have.")
    oldest_wait_seconds: float = Field(
        default=0.0, ge=0, description="For how long the next one in a queue has waited."
    )
    ttft_seconds: float | None = Field(default=None, ge=0)
    itl_seconds: float | None = Field(default=None, ge=0)
    idle_seconds: float = Field(default=0.0, ge=0, description="Since a request last came, waited or ran.")


class GatewayFigures(BaseModel):
    """Everything one gateway process tells. `at` is seconds since 1970."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    version: int = 1
    at: float
    models: tuple[ModelFigures, ...] = ()


class FiguresFile:
    """The file of one gateway process, in the directory of all of them."""

    def __init__(self, directory: Path, process: str) -> None:
        self._path = directory / f"{process}.json"

    def write(self, figures: GatewayFigures) -> None:
        """Replace it. Raises OSError."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        draft.write_bytes(figures.model_dump_json().encode())
        draft.chmod(0o600)
        draft.replace(self._path)

    def remove(self) -> None:
        """This process sees nothing any more."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_figures(directory: Path, now: float, *, fresh_seconds: float = FRESH_SECONDS) -> Mapping[str, Signals] | None:
    """The demand by model, of all gateways together; None where none of them tells anything fresh.

    `now` is seconds since 1970. Files that make no sense or are stale do not count, and those long forgotten are removed.
    """
    fresh: list[GatewayFigures] = []
    for path in sorted(directory.glob("*.json")):
        try:
            figures = GatewayFigures.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        age = abs(now - figures.at)  # one from the future was written before the clock was set back
        if figures.version == 1 and age <= fresh_seconds:
            fresh.append(figures)
        elif age > max(_FORGOTTEN_SECONDS, fresh_seconds):
            with contextlib.suppress(OSError):
                path.unlink()
    return _together(fresh) if fresh else None


def _together(gateways: Iterable[GatewayFigures]) -> dict[str, Signals]:
    by_model: dict[str, list[ModelFigures]] = {}
    for gateway in gateways:
        for row in gateway.models:
            by_model.setdefault(row.model, []).append(row)
    return {model: _sum(rows) for model, rows in by_model.items()}


def _sum(rows: list[ModelFigures]) -> Signals:
    """Loads add up; of latencies the worst counts, of idleness the least."""
    return Signals(
        arrivals_per_second=sum(row.arrivals_per_second for row in rows),
        queued=sum(row.waiting for row in rows),
        running=sum(row.in_flight for row in rows),
        ttft_seconds=_worst(rows, lambda row: row.ttft_seconds),
        itl_seconds=_worst(rows, lambda row: row.itl_seconds),
        idle_seconds=min(row.idle_seconds for row in rows),
    )


def _worst(rows: list[ModelFigures], of: Callable[[ModelFigures], float | None]) -> float | None:
    return max((seconds for row in rows if (seconds := of(row)) is not None), default=None)
