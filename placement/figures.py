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
from placement.policy import AutoscalePolicy

FRESH_SECONDS = 5.0
"""Or three times the interval at which they are written, where that is longer."""
_INTERVALS = 3
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
    return add_up(map(_signals, fresh)) if fresh else None


def fresh_for(policy: AutoscalePolicy) -> float:
    """For how many seconds a gateway's figures count under `policy`."""
    return max(FRESH_SECONDS, _INTERVALS * policy.look_every)


def add_up(told: Iterable[Mapping[str, Signals]]) -> dict[str, Signals]:
    """The demand by model, of all who tell of it together."""
    by_model: dict[str, list[Signals]] = {}
    for one in told:
        for model, signals in one.items():
            by_model.setdefault(model, []).append(signals)
    return {model: _sum(all_of_it) for model, all_of_it in by_model.items()}


def _signals(gateway: GatewayFigures) -> dict[str, Signals]:
    return {
        row.model: Signals(
            arrivals_per_second=row.arrivals_per_second,
            queued=row.waiting,
            running=row.in_flight,
            ttft_seconds=row.ttft_seconds,
            itl_seconds=row.itl_seconds,
            idle_seconds=row.idle_seconds,
        )
        for row in gateway.models
    }


def _sum(told: list[Signals]) -> Signals:
    """Loads add up; of latencies the worst counts, of idleness the least."""
    return Signals(
        arrivals_per_second=sum(one.arrivals_per_second for one in told),
        queued=sum(one.queued for one in told),
        running=sum(one.running for one in told),
        ttft_seconds=_worst(told, lambda one: one.ttft_seconds),
        itl_seconds=_worst(told, lambda one: one.itl_seconds),
        idle_seconds=min(one.idle_seconds for one in told),
    )


def _worst(told: list[Signals], of: Callable[[Signals], float | None]) -> float | None:
    return max((seconds for one in told if (seconds := of(one)) is not None), default=None)
