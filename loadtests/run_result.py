"""What a run leaves behind. Apart from `run`, so that reports can be made in a process that is not patched for gevent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtests.samples import Quantiles, Sample, quantiles


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run. `client_lag` is how late this process woke up when it asked to be woken: the ruler's own error.

    `unfinished` requests had no answer when the run was given up; they are in no figure. `busy_ratio` is the processor time
    of the busiest client process over the time that passed: near 1 it could not have done more. `lags` are the single
    wake-ups, so that runs of several processes are put together exactly.
    """

    samples: tuple[Sample, ...]
    client_lag: Quantiles
    unfinished: int = 0
    busy_ratio: float = 0.0
    lags: tuple[float, ...] = field(default=(), repr=False)


def merged(parts: Sequence[Run]) -> Run:
    """Several processes' runs as one: samples are pooled before any percentile is taken, so nothing is approximated."""
    lags = tuple(lag for part in parts for lag in part.lags)
    return Run(
        samples=tuple(sorted((s for part in parts for s in part.samples), key=lambda s: s.due_seconds)),
        client_lag=quantiles(lags),
        unfinished=sum(part.unfinished for part in parts),
        busy_ratio=max((part.busy_ratio for part in parts), default=0.0),
        lags=lags,
    )
