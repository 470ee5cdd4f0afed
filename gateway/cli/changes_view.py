"""Engines that run by earlier settings, for people: what replaces each, how long that takes, and what is missing meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.markup import escape

from gateway.cli.output import out
from model_registry.words import counted
from placement.changeover import Changeover, Replacement

_MOST_ROWS = 40
_REFUSED = "[dim]`apply` refuses that without --allow-dip; a reload (SIGHUP, `sliceway reload`, the watch) does it.[/]"


def show_changes(changes: Changeover, labels: Mapping[str, str] | None = None, *, planned: bool = False) -> None:
    """Nothing where nothing is to be replaced. `labels` name GPUs by their ids. `planned`: who may still refuse is told."""
    for line in _lines(changes, labels or {}):
        out.print(line, highlight=False)
    if planned and changes.undercut:
        out.print(_REFUSED, highlight=False)


def _lines(changes: Changeover, labels: Mapping[str, str]) -> Iterator[str]:
    if not changes:
        return
    number = counted(len(changes.replacements), "engine")
    yield f"\n{number} by earlier settings, replaced one after another in about {changes.seconds:.0f} s (estimate):"
    for told in changes.replacements[:_MOST_ROWS]:
        yield f"  [yellow]~[/] {escape(_row(told, labels))}"
    left = len(changes.replacements) - _MOST_ROWS
    if left > 0:
        yield f"  ... and {left} more; --json lists them all"
    for model in changes.undercut:
        yield (
            f"[bold yellow]dip[/] {escape(model.demand)} serves {model.lowest:.4g} of the {model.guaranteed:.4g} it is "
            f"guaranteed for about {model.dip_seconds:.0f} s"
        )


def _row(told: Replacement, labels: Mapping[str, str]) -> str:
    start = f"{told.start_seconds:.0f} s for its start ({told.start_source})"
    if told.how == "beside":
        made = ", made for it and given back afterwards" if told.makes_slice else ""
        back = ", for a while: then it comes back" if told.for_a_while else ""
        return f"{told.replica} beside itself, on {_place(told.slice_id, labels)}{made}{back}; no dip, {start}"
    why = f"{told.replica} in its place ({told.reason})"
    if not told.missing:
        return f"{why}; {start}"
    serve = f"{told.serving - told.missing} of {told.serving} serve for about {told.dip_seconds:.0f} s"
    return f"{why}: {serve}, {start}"


def _place(slice_id: str, labels: Mapping[str, str]) -> str:
    gpu, _, placement = slice_id.partition("/")
    return f"{labels.get(gpu, gpu)} {placement}".strip()
