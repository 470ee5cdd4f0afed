"""Several deployments of one scenario in one report: each keeps its own `alone`, and is judged by it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from loadtests.lab.report import Client, Report, Setting
from loadtests.lab.scenario import Budget
from loadtests.lab.verdict import judge
from loadtests.problems import ScenarioError


def merge(reports: Sequence[Report]) -> Report:
    """One report with every setting, by `deployment: setting`; the client is as good as the worst of them.

    A single report comes back as it is; one of a version that judged no setting by itself gets that from its own figures.
    Raises ScenarioError for none, or two of the same deployment.
    """
    if not reports:
        raise ScenarioError("no report to put together")
    if len(reports) == 1:
        return _judged(reports[0])
    names = [_deployment(report) for report in reports]
    if len(set(names)) != len(names):
        raise ScenarioError(f"two reports are of the same deployment: {', '.join(map(repr, names))}")
    first = reports[0]
    settings = {
        f"{name}: {key}": _renamed(setting, name)
        for name, report in zip(names, reports, strict=True)
        for key, setting in report.settings.items()
    }
    client = _worst([report.client for report in reports])
    budget = Budget.model_validate(first.budget) if first.budget else None
    shared = list(dict.fromkeys(text for report in reports for text in report.not_isolated))
    return first.model_copy(
        update={
            "settings": settings,
            "verdict": judge(settings, budget, client),
            "client": client,
            "simulated": all(report.simulated for report in reports),
            "not_isolated": shared,
            "warnings": [f"{name}: {w}" for name, r in zip(names, reports, strict=True) for w in r.warnings],
            "layout": {name: report.layout for name, report in zip(names, reports, strict=True)},
        }
    )


def _judged(report: Report) -> Report:
    if report.verdict.settings or not report.budget:
        return report
    verdict = judge(report.settings, Budget.model_validate(report.budget), report.client)
    return report.model_copy(update={"verdict": report.verdict.model_copy(update={"settings": verdict.settings})})


def _deployment(report: Report) -> str:
    return next((s.deployment for s in report.settings.values() if s.deployment), None) or report.name


def _renamed(setting: Setting, deployment: str) -> Setting:
    return setting.model_copy(
        update={"baseline": f"{deployment}: {setting.baseline}", "deployment": setting.deployment or deployment}
    )


def _worst(clients: Sequence[Client]) -> Client:
    worst = max(clients, key=lambda c: c.lag_p99_seconds or 0.0)
    return worst.model_copy(
        update={
            "busy_ratio": max(c.busy_ratio for c in clients),
            "unfinished": sum(c.unfinished for c in clients),
        }
    )
