"""The report as Markdown: the same figures as in the JSON, for pull requests and archives. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loadtests.lab.report import Report
from loadtests.report import words


def render(report: Report) -> str:
    """The whole report."""
    parts = [
        f"# {report.name}",
        f"**{words.VERDICTS[report.verdict.status]}** {report.verdict.sentence}",
        *(["These engines are **simulated**: what was measured is the gateway."] if report.simulated else []),
        _bullets(report.verdict.refusals[1:]),
        _bullets(f"**{words.OUTCOMES[status]}** {told}" for status, told in words.outcome_rows(report)),
        "## Latency of the victim, milliseconds",
        _table(words.PERCENTILE_HEADINGS, words.percentile_rows(report)),
        "Times are the client's, from the moment a request was due. `*`: the maximum, for want of samples.",
        "## Tenants",
        _table(words.TENANT_HEADINGS, words.tenant_rows(report)),
        "## Service",
        _table(words.SERVICE_HEADINGS, words.service_rows(report)),
        *_checks(report),
        "## What is not isolated",
        _bullets(report.not_isolated),
        *(["## Notes", _bullets(report.warnings)] if report.warnings else []),
        "## To repeat it",
        _table(
            ("", ""), ([name, f"`{text}`" if name == "command" else text] for name, text in words.repeat_rows(report))
        ),
        f"```yaml\n{words.scenario_lines(report)}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _checks(report: Report) -> list[str]:
    checks = words.checks(report)
    return ["## The budget", _table(words.CHECK_HEADINGS, map(words.check_row, checks))] if checks else []


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
