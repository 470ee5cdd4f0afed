"""How figures of a report are written, the same in HTML and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from loadtests.lab.report import Check, Report, Setting, Slo

METRIC_NAMES = {
    "ttft_seconds": ("TTFT", "time to first token"),
    "itl_seconds": ("ITL", "gap between tokens"),
    "e2e_seconds": ("E2E", "whole answer"),
}
VERDICTS = {
    "pass": "✓ PASS",
    "fail": "✗ FAIL",
    "undecided": "? UNDECIDED",
    "refused": "! NO CERTIFICATE",
    "none": "MEASURED",
}
OUTCOMES = VERDICTS | {"refused": "! NOT JUDGED"}
PERCENTILE_NAMES = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9"}


def milliseconds(seconds: float | None) -> str:
    """Three digits that matter, without the unit; a dash where nothing was measured."""
    if seconds is None:
        return "-"
    value = seconds * 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}x"


def interval(found: tuple[float, float] | None) -> str:
    """A 95% interval of a ratio."""
    return "" if found is None else f"{found[0]:.2f} to {found[1]:.2f}"


def label_of(setting: Setting) -> str:
    """What a setting is called, with its deployment where there are several."""
    return f"{setting.deployment}: {setting.label}" if setting.deployment else setting.label


def outcome_rows(report: Report) -> Iterator[tuple[str, str]]:
    """What the budget says of each setting by itself: status and words. None of a report without a budget."""
    for key, outcome in report.verdict.settings.items():
        told = f"{label_of(report.settings[key])}: {outcome.sentence}"
        yield outcome.status, told if outcome.decides else f"{told} (the verdict does not depend on it)"


def percentile_rows(report: Report) -> Iterator[list[str]]:
    """Setting, metric, p50, p90, p99, p99.9, p99/p50, ratio of the p50s, ratio of the p99s, its interval, samples."""
    for key, setting in report.settings.items():
        for metric, (short, _) in METRIC_NAMES.items():
            row = getattr(setting.victim, metric)
            if not row.count:
                continue
            ratios = setting.ratio_to_alone[metric] if key != setting.baseline else {}  # type: ignore[index]
            reach = setting.ratio_confidence[metric].get("p99") if ratios else None  # type: ignore[index]
            yield [
                label_of(setting),
                short,
                *(_marked(row, name) for name in PERCENTILE_NAMES),
                times(setting.p99_over_p50[metric]),  # type: ignore[index]
                times(ratios.get("p50")) if ratios else "1",
                times(ratios.get("p99")) if ratios else "1",
                interval(reach),
                str(row.count),
            ]


PERCENTILE_HEADINGS = (
    "setting",
    "metric",
    "p50",
    "p90",
    "p99",
    "p99.9",
    "p99/p50",
    "p50 to alone",
    "p99 to alone",
    "95% interval",
    "samples",
)

_NEEDED = {"p50": 1, "p90": 10, "p99": 100, "p999": 1000}


def _marked(row: Any, name: str) -> str:
    """A percentile, with an asterisk where it is the maximum for want of samples."""
    return milliseconds(getattr(row, name)) + ("*" if row.count < _NEEDED[name] else "")


TENANT_HEADINGS = (
    "setting",
    "tenant",
    "role",
    "model",
    "slice",
    "answered",
    "failed",
    "TTFT p50 / p99",
    "tokens/s",
    "SLO met",
)


def tenant_rows(report: Report) -> Iterator[list[str]]:
    """The matrix: one row per setting and tenant."""
    victim = report.victim
    for setting in report.settings.values():
        rates = setting.service.tokens_per_second
        promised = setting.slo
        yield [
            label_of(setting),
            str(victim["name"]),
            "victim",
            str(victim["model"]),
            str(victim.get("slice") or "-"),
            str(setting.victim.succeeded),
            failures(setting.victim.failures),
            f"{milliseconds(setting.victim.ttft_seconds.p50)} / {milliseconds(setting.victim.ttft_seconds.p99)}",
            f"{rates.get(str(victim['name']), 0.0):.1f}",
            _met(promised),
        ]
        for row in setting.neighbours:
            yield [
                label_of(setting),
                row.tenant,
                "beside",
                row.model,
                row.slice or "-",
                str(row.succeeded),
                failures(row.failures),
                f"{milliseconds(row.ttft_seconds.p50)} / {milliseconds(row.ttft_seconds.p99)}",
                f"{rates.get(row.tenant, 0.0):.1f}",
                _met(row.slo),
            ]


def _met(slo: Slo | None) -> str:
    return "-" if slo is None or slo.attainment is None else f"{slo.attainment:.1%}"


def failures(found: dict[str, int]) -> str:
    """`3 http_503, 1 timeout`, or 0."""
    return ", ".join(f"{count} {kind}" for kind, count in found.items()) or "0"


SERVICE_HEADINGS = (
    "setting",
    "goodput at the SLO, requests/s",
    "SLO attained",
    "tokens/s, all tenants",
    "Jain's index",
)


def service_rows(report: Report) -> Iterator[list[str]]:
    """Goodput, tokens per second and fairness per setting."""
    for setting in report.settings.values():
        promised, service = setting.slo, setting.service
        yield [
            label_of(setting),
            "-" if promised is None else f"{promised.goodput_per_second:.2f}",
            "-" if promised is None or promised.attainment is None else f"{promised.attainment:.1%}",
            f"{sum(service.tokens_per_second.values()):.1f}",
            "-" if service.jain_index is None else f"{service.jain_index:.2f}",
        ]


CHECK_HEADINGS = ("outcome", "setting", "figure", "measured", "95% interval", "allowed")


def checks(report: Report) -> list[Check]:
    """The budget's lines of all settings: first those that decide, then the others."""
    others = [one for one in report.verdict.settings.values() if not one.decides]
    return [*report.verdict.checks, *(check for one in others for check in one.checks)]


def check_row(check: Check) -> list[str]:
    """One line of the budget."""
    return [
        VERDICTS[check.outcome],
        check.setting,
        f"{check.metric} {check.figure}",
        "-" if check.measured is None else f"{check.measured:.3g}",
        interval(check.interval),
        f"{check.limit:g}",
    ]


def repeat_rows(report: Report) -> Iterator[tuple[str, str]]:
    """What is needed to repeat the measurement, as (name, text)."""
    machine, client = report.machine, report.client
    yield "command", report.command
    yield "made", f"{report.made_at} (UTC)"
    yield "seed", str(report.seed)
    yield (
        "order",
        f"{report.rounds} rounds of all settings, mirrored; {report.duration_seconds:g} s each after {report.warmup_seconds:g} s of warm-up",
    )
    yield "machine", ", ".join(_known(machine))
    yield "versions", ", ".join(f"{name} {version}" for name, version in report.software.items()) or "-"
    yield "client", _client(client)
    for name, value in report.layout.items():
        yield f"layout: {name}", _plain(value)


def scenario_lines(report: Report) -> str:
    """What was asked, as a scenario file has it: to be saved beside a `config:` or `base_url:` and run again."""
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in report.scenario.items())


def _known(machine: dict[str, Any]) -> Iterator[str]:
    if machine.get("cores"):
        yield f"{machine['cores']} cores"
    if machine.get("processor"):
        yield str(machine["processor"])
    if machine.get("memory_bytes"):
        yield f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    if machine.get("kernel"):
        yield f"Linux {machine['kernel']}"
    if machine.get("load_average") is not None:
        yield f"load average {machine['load_average']} at the start"


def _client(client: Any) -> str:
    found = [
        f"{client.processes} process(es) for the victim",
        f"woke up {milliseconds(client.lag_p50_seconds)} / {milliseconds(client.lag_p99_seconds)} ms late (p50 / p99)",
        f"busy {client.busy_ratio:.0%}",
    ]
    if client.machine_busy_ratio is not None:
        found.append(f"whole machine busy {client.machine_busy_ratio:.0%}")
    return ", ".join(found)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)
