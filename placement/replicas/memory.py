"""The memory budget of `cpu` slices: what a core set cannot enforce, the controller does.

Resident memory is summed first, which is cheap and never too low; only a replica that seems over its budget is measured
exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from placement.replicas.procfs import proportional_bytes, resident_bytes, sessions


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory of one session's processes. `exact` is False for an upper bound."""

    used_bytes: int
    exact: bool


def measure(budgets: Mapping[int, int]) -> Mapping[int, Usage]:
    """Memory by session id, from one walk over `/proc`. `budgets` are bytes by session id."""
    usage: dict[int, Usage] = {}
    for session, pids in sessions(budgets).items():
        resident = resident_bytes(pids)
        if resident <= budgets[session]:
            usage[session] = Usage(resident, exact=False)
        else:
            usage[session] = Usage(proportional_bytes(pids), exact=True)
    return usage
