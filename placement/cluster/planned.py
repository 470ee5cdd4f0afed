"""How many replicas a configured demand takes on the slices that a cluster has, where no number is named. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from placement.autoscale.capacity import Capacity

_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Planned:
    """The number, and what it comes from."""

    replicas: int
    reason: str

    def as_public(self) -> dict[str, object]:
        """As data, for `--json`."""
        return asdict(self)


def replicas_for(rate: float, here: Sequence[Capacity], could: Sequence[Capacity]) -> Planned:
    """How many replicas bear `rate` requests per second, at least one.

    `here` is what those that there are bear, the lowest number first; `could` what one would on each slice that it fits, the
    smallest first. Those that come are counted with the smallest slice. The first ones that are enough stay, so a number
    that turned out too high, because larger slices were found, comes down once and not up again.
    """
    each = next((c for c in could if c.requests_per_second is not None), None)
    if each is None or each.requests_per_second is None:
        why = could[0].reason if could else "no slice is large enough"
        return Planned(1, f"one, since nobody knows what a replica bears: {why}")
    borne, number = 0.0, 0
    for capacity in here:
        if number and borne >= rate - _CLOSE:
            break
        borne, number = borne + (capacity.requests_per_second or 0.0), number + 1
    rest = max(0.0, rate - borne)
    takes = max(1, number + ceil(rest / each.requests_per_second - _CLOSE))
    told = f"{rate:g} requests/s, {each.requests_per_second:.3g} of them on the smallest slice ({each.origin})"
    if takes > len(could):
        return Planned(len(could), f"{told}: that takes {takes}, and {len(could)} is every slice that it fits")
    return Planned(takes, told)
