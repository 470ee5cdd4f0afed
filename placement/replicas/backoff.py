"""When an engine that ended is started again: exponential back-off with jitter, and a limit. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from placement.schema import RestartConfig

# A power beyond which every delay is the largest one anyway; keeps the arithmetic finite.
_LARGEST_EXPONENT = 32


@dataclass(frozen=True, slots=True)
class Restarts:
    """What has happened so far: `total` restarts, and `fast_failures` in a row."""

    total: int = 0
    fast_failures: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """`delay_seconds` until the next start; None if there is none until the operator acts."""

    restarts: Restarts
    delay_seconds: float | None


def after_end(
    restarts: Restarts, config: RestartConfig, *, was_ready: bool, uptime_seconds: float, jitter: float
) -> Decision:
    """Decide what follows an unwanted end.

    An end before readiness, or sooner than `fast_failure_seconds` after the start, is a fast failure. Fast failures in a
    row double the delay, and `max_fast_failures` of them end the attempts. Anything else counts as a fresh start.
    `jitter` is uniform in [0, 1); the delay is between half and the whole of its nominal value, so that replicas that
    failed together do not come back together.
    """
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter must be in [0, 1), not {jitter}")
    fast = not was_ready or uptime_seconds < config.fast_failure_seconds
    failures = restarts.fast_failures + 1 if fast else 0
    if failures >= config.max_fast_failures:
        return Decision(Restarts(restarts.total, failures), None)
    nominal = config.first_delay_seconds * 2.0 ** min(max(failures - 1, 0), _LARGEST_EXPONENT)
    delay = min(nominal, config.max_delay_seconds) * (0.5 + jitter / 2)
    return Decision(Restarts(restarts.total + 1, failures), delay)
