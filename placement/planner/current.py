"""Is the fleet still the one that a plan was made from?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from placement.errors import StalePlan
from placement.planner.types import FleetGpu, fingerprint

_MOST_NAMED = 3


def states(gpus: Iterable[FleetGpu]) -> dict[str, str]:
    """What every GPU is like, as a digest, by its id."""
    return {gpu.id: fingerprint([gpu]) for gpu in gpus}


def check_current(
    then: Mapping[str, str], now: Mapping[str, str], *, where: str | None = None, remedy: str = "Plan again."
) -> None:
    """Raise StalePlan, naming what is different, if GPUs are not `now` as they were `then`, when a plan was made (`states`)."""
    if then == now:
        return
    differences = list(_differences(then, now))
    left = len(differences) - _MOST_NAMED
    more = f", and {left} more" if left > 0 else ""
    raise StalePlan(
        f"the plan was made for another state of the fleet: {', '.join(differences[:_MOST_NAMED])}{more}",
        where=where,
        remedy=remedy,
    )


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for gpu in sorted(then.keys() | now.keys()):
        if gpu not in now:
            yield f"GPU {gpu} is gone"
        elif gpu not in then:
            yield f"GPU {gpu} has come"
        elif then[gpu] != now[gpu]:
            yield f"GPU {gpu} has changed"
