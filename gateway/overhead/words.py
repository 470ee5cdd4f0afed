"""The report of `measure_everything` in words: Markdown, which reads well on a terminal too. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gateway.overhead.gateways import OURS
from model_registry.words import counted


def markdown(report: Mapping[str, Any]) -> str:
    """All tables of what was measured."""
    lines: list[str] = []
    for part, told in (("cost", _cost), ("added", _added), ("held", _held), ("neighbours", _neighbours)):
        if part in report:
            lines += [*told(report[part]), ""]
    return "\n".join([*lines, _host(report)]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _cost(cost: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for row in sorted(cost["rows"], key=lambda row: float(row["event_us"])):
        name = f"**{row['name']}**" if row["name"] == OURS else row["name"]
        ratios = [
            f"{row[f'{what}_ratio']:.2f} [{row[f'{what}_ratio_low']:.2f}, {row[f'{what}_ratio_high']:.2f}]"
            for what in ("request", "event")
        ]
        rows.append(
            (name, f"{row['request_us']:.1f}", ratios[0], f"{row['event_us']:.2f}", ratios[1], str(row["errors"]))
        )
    columns = ("gateway", "us CPU / request", f"x {OURS}", "us CPU / event", f"x {OURS}", "errors")
    yield from _table(columns, rows)
    yield ""
    yield f"Medians of {cost['rounds']} rounds of {cost['seconds']:g} s in turns; ratios within rounds, [10%, 90%]."
    for name, why in cost["left_out"].items():
        yield f"{name} is left out, {why}."


def _added(added: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for kind, metric, load in (
        ("plain", "e2e", "{requests_per_second:g} plain requests/s"),
        ("stream", "ttft", "{requests_per_second:g} streams/s"),
        ("events", "itl", "10,000 events/s"),
    ):
        row = added[kind].get(metric)
        if row is not None:
            figures = ["{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row[f"added_{q}_ms"]) for q in ("p50", "p99")]
            both = [f"{row[way]['p50']:.2f} / {row[way]['p99']:.2f}" for way in ("direct_ms", "gateway_ms")]
            rows.append((f"{metric.upper()} at {load.format(**added[kind])}", *both, *figures))
    columns = ("ms", "direct p50 / p99", "gateway p50 / p99", "added p50 [95%]", "added p99 [95%]")
    yield from _table(columns, rows)
    failed = {kind: added[kind]["errors"] for kind in added if added[kind]["errors"]}
    if failed:
        yield f"\nWrong answers: {failed}"


def _held(held: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{held['streams']} streams held at once, {held['errors']} errors, {held['events_per_second']} events/s: "
        f"{held['idle_bytes'] / 1e6:.0f} MB before, {held['most_bytes'] / 1e6:.0f} MB at most, "
        f"{held['bytes_per_stream'] / 1e3:.1f} kB per stream; the bound is {held['bound_bytes'] / 1e6:.0f} MB."
    )


def _neighbours(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    shown = []
    for row in rows:
        for name in ("ttft", "itl"):
            both = "{:.2f} / {:.2f}".format
            times = [both(row[f"{name}_{way}alone_ms"], row[f"{name}_{way}beside_ms"]) for way in ("", "direct_")]
            ratios = [_ratio(row, f"{name}_{what}") for what in ("ratio", "direct_ratio", "over_direct")]
            shown.append((row["aggressor"], name.upper(), times[0], ratios[0], times[1], ratios[1], ratios[2]))
    columns = (
        "beside",
        "p99 of",
        "gateway, ms alone / beside",
        "ratio",
        "control, ms alone / beside",
        "ratio",
        "gateway / control",
    )
    yield from _table(columns, shown)
    yield ""
    yield (
        f"Medians of {counted(rows[0]['rounds'], 'round')} in turns, with their {rows[0]['confidence']:.0%} intervals, or in braces the range "
        "where rounds are too few for one. In the control the victim asks its engine directly, and the storm has an engine of its own."
    )


def _ratio(row: Mapping[str, Any], name: str) -> str:
    if row[f"{name}_low"] is None:
        return "{:.2f} {{{:.2f}, {:.2f}}}".format(row[name], *row[f"{name}_range"])
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def _host(report: Mapping[str, Any]) -> str:
    host = report["host"]
    return f"On {host['cores']} cores, load average {host['load_average_before']} before; on: {', '.join(report['features'])}."
