"""The report as one HTML file: verdict first, no script, nothing fetched; for phones, for paper, and for the colour-blind. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from loadtests.lab.report import Report, Setting
from loadtests.report import svg, words

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff}
h1{font-size:1.4rem;margin:.2rem 0 1rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.verdict{border:3px solid #555;border-left-width:14px;border-radius:6px;padding:.8rem 1rem}
.verdict b{display:block;font-size:1.6rem;letter-spacing:.02em}
.pass{border-color:#0072B2}.fail{border-color:#D55E00;border-style:double;border-left-style:solid}
.undecided,.refused{border-style:dashed;border-color:#7a5c00;border-left-style:solid}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.88rem;min-width:100%}
caption{text-align:left;color:#444;padding:.2rem 0}
th,td{padding:.3rem .55rem;border-bottom:1px solid #ccc;text-align:left;white-space:nowrap;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td.wrap{white-space:normal;overflow-wrap:anywhere}
tr.base td{background:#f1f4f6}
figure{margin:.5rem 0 1.2rem}figcaption{font-size:.88rem;color:#333}
svg{width:100%;height:auto;max-width:640px;display:block}
svg .grid{stroke:#d4d4d4;stroke-width:1}svg .axis{font:12px system-ui,sans-serif;fill:#333}svg .key{font:13px system-ui,sans-serif;fill:#111}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 1.5rem}
code{font-size:.88rem;overflow-wrap:anywhere}
pre{font-size:.8rem;white-space:pre-wrap;overflow-wrap:anywhere;background:#f1f4f6;padding:.6rem}
.note{color:#333;font-size:.9rem}
@media print{body{max-width:none;font-size:11pt;padding:0}.scroll{overflow:visible}figure,tr{break-inside:avoid}h2{break-after:avoid}th,td{white-space:normal}}
"""

_NUMERIC_FROM = 2


def render(report: Report) -> str:
    """The whole file."""
    parts = [
        f"<h1>{escape(report.name)}</h1>",
        _verdict(report),
        _bullets(f"{words.OUTCOMES[status]} {told}" for status, told in words.outcome_rows(report)),
        _glance(report),
        "<h2>Latency of the victim</h2>",
        _table(
            words.PERCENTILE_HEADINGS,
            words.percentile_rows(report),
            caption="Milliseconds on the client's clock, from the moment a request was due. *: the maximum, for want of samples.",
            base=[words.label_of(s) for k, s in report.settings.items() if k == s.baseline],
        ),
        "<h2>With and without the aggressor</h2>",
        *_figures(report),
        "<h2>Tenants and settings</h2>",
        _table(words.TENANT_HEADINGS, words.tenant_rows(report)),
        _table(words.SERVICE_HEADINGS, words.service_rows(report), caption=_service_caption(report)),
        *_checks(report),
        "<h2>What is not isolated</h2>",
        _bullets(report.not_isolated),
        *(["<h2>Notes</h2>", _bullets(report.warnings)] if report.warnings else []),
        "<h2>To repeat it</h2>",
        _pairs(words.repeat_rows(report)),
        f"<h3>The scenario, as a file</h3><pre>{escape(words.scenario_lines(report))}</pre>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: {escape(words.VERDICTS[report.verdict.status])}</title>"
        f"<style>{STYLE}</style></head><body><main>\n" + "\n".join(filter(None, parts)) + "\n</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    verdict = report.verdict
    more = _bullets(verdict.refusals[1:]) if len(verdict.refusals) > 1 else ""
    made_up = (
        "<p><strong>Simulated engines: what was measured is the gateway alone.</strong></p>" if report.simulated else ""
    )
    return (
        f'<section class="verdict {verdict.status}" aria-label="verdict"><b>{escape(words.VERDICTS[verdict.status])}</b>'
        f"{escape(verdict.sentence)}{made_up}{more}</section>"
    )


def _glance(report: Report) -> str:
    """One line per setting: what a person wants to know first."""
    lines = []
    for key, setting in report.settings.items():
        if key == setting.baseline:
            continue
        told = ", ".join(
            f"{short} p99 {words.times(setting.ratio_to_alone[metric]['p99'])}"  # type: ignore[index]
            for metric, (short, _) in words.METRIC_NAMES.items()
            if setting.ratio_to_alone[metric]["p99"] is not None  # type: ignore[index]
        )
        lines.append(f"{words.label_of(setting)}: {told or 'no answer'} of alone")
    return _bullets(lines)


def _figures(report: Report) -> Iterator[str]:
    for key, setting in report.settings.items():
        if key == setting.baseline:
            continue
        alone = report.settings[setting.baseline]
        drawn = [_figure(metric, alone, setting) for metric in words.METRIC_NAMES]
        yield f"<h3>{escape(words.label_of(setting))}</h3><div class=plots>{''.join(drawn)}</div>"


def _figure(metric: str, alone: Setting, beside: Setting) -> str:
    short, long = words.METRIC_NAMES[metric]
    first, second = alone.plots, beside.plots
    if metric not in first.ecdf or metric not in second.ecdf:
        return ""
    distribution = svg.ecdf(
        [
            svg.Series("alone", first.ecdf[metric], svg.BLUE),
            svg.Series(beside.label, second.ecdf[metric], svg.VERMILION, dashed=True),
        ],
        f"{short}: share of requests that took at most so long",
    )
    over_time = svg.timeline(
        [
            svg.Series("alone", first.timeline[metric], svg.BLUE),
            svg.Series(beside.label, second.timeline[metric], svg.VERMILION, dashed=True),
        ],
        f"{short} over time",
    )
    worst = "; of a request its longest gap" if metric == "itl_seconds" else ""
    return (
        f"<figure>{distribution}<figcaption>{short} ({long}): share of values up to so long</figcaption></figure>"
        f"<figure>{over_time}<figcaption>{short} over the time of the measurement{worst}</figcaption></figure>"
    )


def _checks(report: Report) -> Iterator[str]:
    if checks := words.checks(report):
        yield "<h2>The budget</h2>"
        yield _table(words.CHECK_HEADINGS, map(words.check_row, checks), numeric_from=3)


def _service_caption(report: Report) -> str:
    promised = next((s.slo.promised for s in report.settings.values() if s.slo), None)
    jain = "Jain's index of the tokens per second of all tenants: 1 is even, 1/n is one tenant alone."
    return f"SLO: {promised}. {jain}" if promised else jain


def _table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    base: Sequence[str] = (),
    numeric_from: int = _NUMERIC_FROM,
) -> str:
    def cell(index: int, text: str) -> str:
        return f"<td{' class=n' if index >= numeric_from and _is_numeric(text) else ''}>{escape(text)}</td>"

    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    body = "".join(
        f"<tr{' class=base' if row[0] in base else ''}>{''.join(cell(i, t) for i, t in enumerate(row))}</tr>"
        for row in rows
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class=scroll tabindex="0"><table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _is_numeric(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] == "-")


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class=wrap>{f"<code>{escape(text)}</code>" if name == "command" else escape(text)}</td></tr>'
        for name, text in rows
    )
    return f"<table><tbody>{body}</tbody></table>"


def _bullets(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""
