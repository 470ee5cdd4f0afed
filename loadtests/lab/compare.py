"""Before and after: two reports of the same measurement. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
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
class Failed:
    """The victim's failed requests of one setting, [failed, all of them] before and after.

    They are in no latency, so an endpoint that answers errors would look no slower. `worse` and `better` where the 95%
    intervals of the two shares lie apart.
    """

    setting: str
    before: tuple[int, int]
    after: tuple[int, int]
    change: Change


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every figure that both have. `notes` say where the two were not made alike."""

    lines: tuple[Line, ...]
    failed: tuple[Failed, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Line, ...]:
        """The latencies that got worse."""
        return tuple(line for line in self.lines if line.change == "worse")

    @property
    def fails_more(self) -> tuple[Failed, ...]:
        """The settings in which more requests fail."""
        return tuple(one for one in self.failed if one.change == "worse")

    @property
    def is_worse(self) -> bool:
        """Whether anything got worse."""
        return bool(self.worse or self.fails_more)

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        return {
            "worse": len(self.worse) + len(self.fails_more),
            "notes": list(self.notes),
            "lines": [asdict(line) for line in self.lines],
            "failed": [asdict(one) for one in self.failed],
        }


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
    failed = tuple(_failed(key, before.settings[key], after.settings[key]) for key in shared)
    return Comparison(tuple(lines), failed, tuple(_notes(before, after)))


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


def _failed(key: str, before: Setting, after: Setting) -> Failed:
    first, second = ((sum(s.victim.failures.values()), s.victim.requests) for s in (before, after))
    one, other = share_interval(*first), share_interval(*second)
    change: Change = "worse" if one[1] < other[0] else "better" if other[1] < one[0] else "same"
    return Failed(key, first, second, change)


def share_interval(count: int, of: int) -> Interval:
    """The 95% interval of a share by E. B. Wilson (1927); (0, 1) of nothing, which tells nothing."""
    if not of:
        return 0.0, 1.0
    z = 1.96
    middle = (count + z * z / 2) / (of + z * z)
    reach = z * sqrt(count * (of - count) / of + z * z / 4) / (of + z * z)
    return middle - reach, middle + reach


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
    yield from _settings_apart(before, after)
    for name in ("cores", "processor"):
        if before.machine.get(name) != after.machine.get(name):
            yield f"another machine: {name} was {before.machine.get(name)} and is {after.machine.get(name)}"
    for report, when in ((before, "before"), (after, "after")):
        if report.verdict.status == "refused":
            yield f"{when}: {report.verdict.sentence}"


def _settings_apart(before: Report, after: Report) -> Iterator[str]:
    """Settings that one report lacks, and those in which the victim had something else beside it."""
    for has, lacks, when in ((before, after, "before"), (after, before, "after")):
        if only := [key for key in has.settings if key not in lacks.settings]:
            yield f"measured {when} only: {', '.join(only)}"
    for key, setting in before.settings.items():
        if key in after.settings and setting.load != after.settings[key].load:
            yield f"{key}: the aggressor did not do the same"
