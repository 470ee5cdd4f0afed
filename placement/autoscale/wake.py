"""How a model without requests sleeps: vLLM's sleep mode, or its engine stopped, by which of them wakes faster. Pure.

Sleep mode (level 1) moves the weights to the host's memory and keeps slice and process; a stopped engine frees both, and
loads, compiles and captures anew when it wakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from placement.policy import AutoscalePolicy

_WAKE_SECONDS = 0.5
_COPY_BYTES_PER_SECOND = 8e9  # pinned memory to one slice of a card on PCIe 4; a whole card does better
_START_SECONDS = 45.0  # imports, compilation from a filled cache, graphs: the short end of what starts take
_LOAD_BYTES_PER_SECOND = 1e9

Sleep = Literal["sleep-mode", "stop"]


@dataclass(frozen=True, slots=True)
class WakeFigures:
    """What was measured of a model on its slice: seconds to its first token out of sleep mode, and from a stopped engine.

    None where it was not measured: then they are estimated. `supported` is whether its engine has sleep mode at all (vLLM
    on a GPU), `failed` whether the last wake did.
    """

    weights_bytes: int
    from_sleep_seconds: float | None = None
    from_stop_seconds: float | None = None
    supported: bool = True
    failed: bool = False

    @property
    def asleep(self) -> tuple[float, str]:
        """Seconds to wake from sleep mode, and whether that was measured or is an estimate."""
        if self.from_sleep_seconds is not None:
            return self.from_sleep_seconds, "measured"
        return _WAKE_SECONDS + self.weights_bytes / _COPY_BYTES_PER_SECOND, "estimated"

    @property
    def stopped(self) -> tuple[float, str]:
        """Seconds to start a stopped engine, likewise."""
        if self.from_stop_seconds is not None:
            return self.from_stop_seconds, "measured"
        return _START_SECONDS + self.weights_bytes / _LOAD_BYTES_PER_SECOND, "estimated"


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
    (asleep, how_asleep), (stopped, how_stopped) = figures.asleep, figures.stopped
    if asleep <= stopped:
        return Choice(
            "sleep-mode",
            f"it wakes in {asleep:.1f} s ({how_asleep}), a stopped engine in {stopped:.1f} s ({how_stopped})",
        )
    return Choice(
        "stop",
        f"a stopped engine wakes in {stopped:.1f} s ({how_stopped}), sleep mode in {asleep:.1f} s ({how_asleep})",
    )


def _impossible(figures: WakeFigures, host_free_bytes: int) -> str | None:
    if not figures.supported:
        return "its engine has no sleep mode"
    if figures.failed:
        return "it did not wake from sleep mode the last time"
    if figures.weights_bytes > host_free_bytes:
        return (
            f"its weights ({figures.weights_bytes / 2**30:.1f} GiB) do not fit the host's free memory "
            f"({host_free_bytes / 2**30:.1f} GiB)"
        )
    return None
