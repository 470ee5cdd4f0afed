"""Before and after: two reports of the same measurement. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from loadtests.lab.report import Interval, Report, Setting
from loadtests.problems import Problem, ScenarioError
from loadtests.samples import METRICS

TOLERANCE_RATIO = 1.10
PERCENTILES = ("p50", "p99")
Change = Literal["same", "better", "worse"]


@dataclass(frozen=True, slots=True)
class Line:
    """One figure before and after, in seconds. `worse` where it grew beyond the tolerance and the intervals lie apart."""

    setting: str
    metric: str
    percentile: str
    before: float
    after: float
    ratio: float
    before_interval: Interval | None
    after_interval: Interval | None
    change: Change


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every figure that both have. `notes` say where the two were not made alike."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Line, ...]:
        """What got worse."""
        return tuple(line for line in self.lines if line.change == "worse")

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        return {"worse": len(self.worse), "notes": list(self.notes), "lines": [asdict(line) for line in self.lines]}


def compare(before: Report, after: Report, *, tolerance_ratio: float = TOLERANCE_RATIO) -> Comparison:
    """Compare every setting that both reports have.

    Raises ScenarioError where they have none in common, or the victims did not ask for the same.
    """
    if problem := _different_questions(before, after):
        raise ScenarioError(problem)
    shared = [key for key in before.settings if key in after.settings]
    if not shared:
        raise ScenarioError(
            Problem(
                "the two reports have no setting in common",
                remedy=f"One has {', '.join(before.settings)}; the other {', '.join(after.settings)}.",
            )
        )
    lines = [line for key in shared for line in _lines(key, before.settings[key], after.settings[key], tolerance_ratio)]
    return Comparison(tuple(lines), tuple(_notes(before, after)))


def _lines(key: str, before: Setting, after: Setting, tolerance: float) -> Iterator[Line]:
    for metric in METRICS:
        for name in PERCENTILES:
            first = getattr(getattr(before.victim, metric), name)
            second = getattr(getattr(after.victim, metric), name)
            if not first or second is None:
                continue
            intervals = before.confidence[metric].get(name), after.confidence[metric].get(name)  # type: ignore[index]
            yield Line(
                setting=key,
                metric=metric,
                percentile=name,
                before=first,
                after=second,
                ratio=second / first,
                before_interval=intervals[0],
                after_interval=intervals[1],
                change=_change(second / first, *intervals, tolerance),
            )


def _change(ratio: float, before: Interval | None, after: Interval | None, tolerance: float) -> Change:
    apart = before is None or after is None or before[1] < after[0] or after[1] < before[0]
    if apart and ratio > tolerance:
        return "worse"
    return "better" if apart and ratio < 1 / tolerance else "same"


def _different_questions(before: Report, after: Report) -> Problem | None:
    """The first thing that the victims did not have in common; the slice that it ran on may differ."""
    one, other = ({k: v for k, v in r.victim.items() if k not in ("slice", "slo", "name")} for r in (before, after))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return Problem(
                f"the victims did not ask for the same: {name} is {one.get(name)!r} in one and {other.get(name)!r} in the other",
                remedy="Measure both with the same scenario.",
            )
    return None


def _notes(before: Report, after: Report) -> Iterator[str]:
    for name in ("seed", "rounds", "duration_seconds"):
        one, other = getattr(before, name), getattr(after, name)
        if one != other:
            yield f"{name} was {one} before and is {other}"
    for name in ("cores", "processor"):
        if before.machine.get(name) != after.machine.get(name):
            yield f"another machine: {name} was {before.machine.get(name)} and is {after.machine.get(name)}"
    for report, when in ((before, "before"), (after, "after")):
        if report.verdict.status == "refused":
            yield f"{when}: {report.verdict.sentence}"
