"""When GPUs are to be cut anew for demand: after a lasting shortage, not soon after the last time, and later after a failure. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from placement.policy import AutoscalePolicy

Result = Literal["done", "unchanged", "proposed", "busy", "failed"]
"""What became of an attempt: GPUs were cut anew; that was not worth it, or not possible; it would be worth it, and is only proposed;
somebody else changes layouts or seats at the moment; or a step failed."""

_BUSY_SECONDS = 10.0
_MOST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Attempts:
    """What is remembered: since when replicas are short of slices, until when nothing is tried, and in a row failures, and attempts for
    which somebody else was in the way.

    Times are monotonic.
    """

    short_since: float | None = None
    not_before: float = 0.0
    failures: int = 0
    busy: int = 0

    def seen(self, short: bool, now: float) -> Attempts:
        """One more look. A shortage that ends starts over, however short it was away."""
        if not short:
            return replace(self, short_since=None)
        return self if self.short_since is not None else replace(self, short_since=now)

    def due(self, policy: AutoscalePolicy, now: float) -> bool:
        """Whether to try: the shortage has lasted for `scale_up_after`, and nothing speaks against another attempt yet."""
        if self.short_since is None or now < self.not_before:
            return False
        return now - self.short_since >= policy.scale_up_after

    def ended(self, policy: AutoscalePolicy, result: Result, now: float) -> Attempts:
        """An attempt has ended: the next one comes after the cool-down at the earliest, after failures later each time; sooner where only
        somebody else was in the way, later each time as well, up to the cool-down.
        """
        failures = self.failures + 1 if result == "failed" else self.failures if result == "busy" else 0
        if result == "busy":
            wait = min(_BUSY_SECONDS * 2.0 ** min(self.busy, 20), policy.cool_down)
        else:
            wait = min(_MOST_SECONDS, policy.cool_down * 2.0 ** min(failures, 20))
        return Attempts(None, now + max(wait, 0.0), failures, self.busy + 1 if result == "busy" else 0)
