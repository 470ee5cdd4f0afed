"""The report of `measure_everything` in words: Markdown, which reads well on a terminal too. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gateway.overhead.gateways import OURS


def markdown(report: Mapping[str, Any]) -> str:
    """All tables."""
    return (
        "\n".join(
            [
                *_cost(report["cost"]),
                "",
                *_added(report["added"]),
                "",
                *_held(report["held"]),
                "",
                *_neighbours(report["neighbours"]),
                "",
                _host(report),
            ]
        )
        + "\n"
    )


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
        cells = [row["aggressor"]]
        for name in ("ttft", "itl"):
            low, high = row[f"{name}_ratio_range"]
            cells += [
                f"{row[f'{name}_alone_ms']:.2f} / {row[f'{name}_beside_ms']:.2f}",
                f"{row[f'{name}_ratio']:.2f} [{low:.2f}, {high:.2f}]",
            ]
        shown.append(cells)
    columns = ("beside", "TTFT p99 ms alone / beside", "ratio [range]", "ITL p99 ms alone / beside", "ratio [range]")
    yield from _table(columns, shown)


def _host(report: Mapping[str, Any]) -> str:
    host = report["host"]
    return f"On {host['cores']} cores, load average {host['load_average_before']} before; on: {', '.join(report['features'])}."
