"""What a run leaves behind. Apart from `run`, so that reports can be made in a process that is not patched for gevent."""

from __future__ import annotations

from dataclasses import dataclass

from loadtests.samples import Quantiles, Sample


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run. `client_lag` is how late this process woke up when it asked to be woken: the ruler's own error.

    `unfinished` requests had no answer when the run was given up; they are in no figure.
    """

    samples: tuple[Sample, ...]
    client_lag: Quantiles
    unfinished: int = 0
