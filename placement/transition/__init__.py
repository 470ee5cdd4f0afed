"""From the fleet there is to the fleet that is planned: ordered steps that keep every promise, and their carrying out."""

from __future__ import annotations

from placement.transition.execute import EngineState, Executor, Fleet, Observed, Outcome
from placement.transition.forecast import SIMULATED, Forecast, Outlook, Timings, forecast
from placement.transition.journal import Record, TransitionJournal
from placement.transition.planning import plan_transition, with_own_names, without_engines
from placement.transition.steps import Dip, Place, Step, Transition

__all__ = [  # noqa: RUF022  # in the order of `sorted`, as everywhere
    "Dip",
    "EngineState",
    "Executor",
    "Fleet",
    "Forecast",
    "Observed",
    "Outcome",
    "Outlook",
    "Place",
    "Record",
    "SIMULATED",
    "Step",
    "Timings",
    "Transition",
    "TransitionJournal",
    "forecast",
    "plan_transition",
    "with_own_names",
    "without_engines",
]
