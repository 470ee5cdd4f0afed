"""Is the fleet still the one that a plan was made from?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from placement.errors import StalePlan
from placement.planner.types import FleetGpu, FleetPlan, fingerprint


def check_current(plan: FleetPlan, gpus: Iterable[FleetGpu]) -> None:
    """Raise StalePlan, naming what is different, if `gpus` are not as they were when `plan` was made."""
    gpus = tuple(gpus)
    if fingerprint(gpus) == plan.fingerprint:
        return
    differences = list(_differences({g.gpu.id: g.gpu for g in plan.gpus}, {g.id: g for g in gpus}))
    more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise StalePlan(
        f"the plan was made for another state of the fleet: {', '.join(differences[:3])}{more}",
        remedy="Plan again.",
    )


def _differences(then: dict[str, FleetGpu], now: dict[str, FleetGpu]) -> Iterator[str]:
    for gpu in sorted(then.keys() | now.keys()):
        if gpu not in now:
            yield f"GPU {gpu} is gone"
        elif gpu not in then:
            yield f"GPU {gpu} has come"
        elif fingerprint([then[gpu]]) != fingerprint([now[gpu]]):
            yield f"GPU {gpu} has changed"
