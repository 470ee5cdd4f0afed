"""How a model without requests sleeps: vLLM's sleep mode, or its engine stopped, by which of them wakes faster. Pure.

Sleep mode (level 1) moves the weights to the host's memory and keeps slice and process; a stopped engine frees both, and
loads, compiles and captures anew when it wakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from placement.policy import AutoscalePolicy

Sleep = Literal["sleep-mode", "stop"]


@dataclass(frozen=True, slots=True)
class WakeFigures:
    """What was measured of a model on its slice: seconds to its first token out of sleep mode, and from a stopped engine.

    None where it was not measured. `supported` is whether its engine has sleep mode at all (vLLM on a GPU).
    """

    weights_bytes: int
    from_sleep_seconds: float | None = None
    from_stop_seconds: float | None = None
    supported: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """How to sleep, and why."""

    sleep: Sleep
    reason: str


def choose_sleep(
    policy: AutoscalePolicy, figures: WakeFigures, *, host_free_bytes: int, slice_wanted: bool = False
) -> Choice:
    """How a model that is not asked for should sleep.

    `host_free_bytes` is memory of the host that nobody uses, where sleeping weights would lie. `slice_wanted` says that
    another model waits for a slice like this one. What the configuration asks for counts, as far as it is possible.
    """
    impossible = _impossible(figures, host_free_bytes)
    if policy.sleep == "stop":
        return Choice("stop", "autoscale.sleep asks for it")
    if impossible is not None:
        return Choice("stop", impossible)
    if policy.sleep == "sleep-mode":
        return Choice("sleep-mode", "autoscale.sleep asks for it")
    if slice_wanted:
        return Choice("stop", "another model waits for its slice")
    asleep, stopped = figures.from_sleep_seconds, figures.from_stop_seconds
    if asleep is None or stopped is None:
        return Choice("sleep-mode", "not measured on this slice yet; waking from sleep mode loads and compiles nothing")
    if asleep <= stopped:
        return Choice("sleep-mode", f"it wakes in {asleep:.1f} s, a stopped engine in {stopped:.1f} s")
    return Choice("stop", f"a stopped engine wakes in {stopped:.1f} s, sleep mode in {asleep:.1f} s")


def _impossible(figures: WakeFigures, host_free_bytes: int) -> str | None:
    if not figures.supported:
        return "its engine has no sleep mode"
    if figures.weights_bytes > host_free_bytes:
        return (
            f"its weights ({figures.weights_bytes / 2**30:.1f} GiB) do not fit the host's free memory "
            f"({host_free_bytes / 2**30:.1f} GiB)"
        )
    return None
