"""Why a demand is not met, and the smallest change that would meet it. stub"""

from __future__ import annotations
from collections.abc import Sequence
from placement.planner.solver import Limits
from placement.planner.types import PlannedGpu, Problem, Unmet
from placement.planner.wants import Want


def unmet(problem: Problem, wants: Sequence[Want], gpus: Sequence[PlannedGpu], limits: Limits) -> tuple[Unmet, ...]:
    return ()
