"""What people and programs get to see of a run: tables, and the same numbers as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtests.lab import service
from loadtests.manners import INTENDED
from loadtests.run_result import Run
from loadtests.samples import METRICS, Quantiles, Sample, Summary, grouped, summarize
from loadtests.scenario import Scenario

COUNTS_AND_METRICS = ("requests", "failed", "TTFT p50 / p99", "ITL p50 / p99", "E2E p50 / p99")
WIDTH_IN_FILES = 140
LAG_WARNING_SECONDS = 0.005
"""A client that wakes up later than this at its 99th percentile measures itself; an ITL on a GPU is about as long."""


def milliseconds(seconds: float | None) -> str:
    """Three digits that matter, in ms; a dash where nothing was measured."""
    if seconds is None:
        return "-"
    value = seconds * 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def by_tenant_and_slice(samples: Iterable[Sample]) -> dict[tuple[str, ...], Summary]:
    """Summaries by (tenant, model, slice); the slice is `?` where the gateway named none."""
    groups = grouped(samples, lambda s: (s.tenant, s.model, s.slice or "?"))
    return {key: summarize(group) for key, group in groups.items()}


def console() -> Console:
    """Standard output, wide enough for the tables where it is a file or a pipe."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=WIDTH_IN_FILES)


def table(summaries: dict[tuple[str, ...], Summary], title: str | None = None) -> Table:
    """p50/p99 per tenant and slice, with failures counted apart."""
    shown = Table(
        title=title, caption=caption(summaries.values()), caption_justify="left", title_justify="left", box=SIMPLE
    )
    for heading in ("tenant", "model", "slice"):
        shown.add_column(heading)
    for heading in COUNTS_AND_METRICS:
        shown.add_column(heading, justify="right")
    for key, summary in summaries.items():
        shown.add_row(*map(Text, key), *counts(summary), *(pair(getattr(summary, metric)) for metric in METRICS))
    return shown


def counts(summary: Summary) -> tuple[Text, Text]:
    """Requests, and how many of them failed, in red where any did."""
    failed = sum(summary.failures.values())
    return Text(str(summary.requests)), Text(str(failed), style="red" if failed else "")


def pair(values: Quantiles) -> str:
    """`p50 / p99` in ms, p99 marked where it is the maximum of fewer than 100 samples."""
    return f"{milliseconds(values.p50)} / {milliseconds(values.p99)}{'*' if values.p99_is_maximum else ''}"


def caption(summaries: Iterable[Summary]) -> str:
    """Units, what the asterisk means if there is one, and what kinds of failures there were."""
    lines = ["milliseconds, on the client's clock"]
    rows = list(summaries)
    if any(getattr(row, metric).p99_is_maximum for row in rows for metric in METRICS):
        lines.append("* fewer than 100 samples: this is the maximum")
    kinds: dict[str, int] = {}
    for row in rows:
        for kind, count in row.failures.items():
            kinds[kind] = kinds.get(kind, 0) + count
    if kinds:
        lines.append("failed: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return "; ".join(lines)


def warnings(runs: Iterable[Run]) -> list[str]:
    """What speaks against believing the figures, in words."""
    rows = list(runs)
    found = []
    worst = max((run.client_lag.p99 or 0.0 for run in rows), default=0.0)
    if worst > LAG_WARNING_SECONDS:
        found.append(
            f"the client woke up to {milliseconds(worst)} ms late (p99): it was short of CPU, and latencies contain that"
        )
    if unfinished := sum(run.unfinished for run in rows):
        found.append(f"{unfinished} requests were still unanswered at the end and are in no figure")
    messages = {s.failure: s.message for run in rows for s in run.samples if s.failure and s.failure not in INTENDED}
    found += [f"failed requests ({kind}), for instance: {message}" for kind, message in sorted(messages.items())]
    return found


def promises(run: Run, scenario: Scenario) -> dict[str, dict[str, Any]]:
    """How far each tenant's SLO was kept, by tenant; those that have one."""
    return {
        tenant.name: service.kept(
            [s for s in run.samples if s.tenant == tenant.name], tenant.slo, scenario.duration_seconds
        )
        for tenant in scenario.tenants
        if tenant.slo is not None
    }


def as_dict(run: Run, scenario: Scenario) -> dict[str, Any]:
    """One run as data: `rows` per tenant, model and slice, `slo` per tenant, `client_lag_seconds`, `warnings`."""
    rows = [
        {"tenant": tenant, "model": model, "slice": None if slice_id == "?" else slice_id} | summary.as_dict()
        for (tenant, model, slice_id), summary in by_tenant_and_slice(run.samples).items()
    ]
    return {
        "rows": rows,
        "slo": promises(run, scenario),
        "client_lag_seconds": run.client_lag.as_dict(),
        "unfinished": run.unfinished,
        "warnings": warnings([run]),
    }


def raw(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Every sample as data, for tools of the reader's own."""
    return [asdict(sample) for sample in samples]
