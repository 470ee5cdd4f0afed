"""Plans and their outcome for people: each GPU's memory slices to scale, now and then, and the steps between."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from gateway.cli.output import out
from gateway.cli.profiles import drawn
from gateway.layouts import ReplicaDifference
from model_registry.errors import SlicewayError
from model_registry.geometry import Layout, Placement
from placement.cores import format_cores
from placement.gpus import GpuState, named
from placement.partition import Create, GpuOutcome, GpuPlan, SetMode

T = TypeVar("T")
_RESULTS = {
    "unchanged": "[green]as it should be[/]",
    "changed": "[green]changed[/]",
    "pending": "[yellow]pending[/]",
    "rolled-back": "[red]not changed[/] (what was begun is undone)",
    "failed": "[bold red]failed[/]",
}


def show_plans(plans: Sequence[GpuPlan]) -> None:
    """The difference, GPUs with the same one together."""
    for group in _alike(plans, _plan_key):
        _print(_plan_lines(group))


def show_outcomes(outcomes: Sequence[GpuOutcome]) -> None:
    """What became of every GPU, and what the driver shows there."""
    for group in _alike(outcomes, _outcome_key):
        _print(_outcome_lines(group))


def show_replicas(difference: ReplicaDifference, started: int | None = None, *, met: bool = True) -> None:
    """Replicas that differ, one line each.

    `started` is how many the plan has slices for, `met` whether that is all that is asked for; None where nothing is planned.
    """
    if not difference.controller and difference.missing:
        number = f"as many of {len(difference.missing)} as find a slice" if started is None else str(started)
        rest = "" if met else ", without what finds no slice"
        out.print(f"replicas: no controller runs; `sliceway up CONFIG` starts {number}{rest}", highlight=False)
        return
    _print(f"[green]+[/] replica {escape(name)}" for name in difference.missing)
    _print(f"[red]-[/] replica {escape(name)}" for name in difference.superfluous)
    _print(f"[yellow]![/] replica {escape(name)} is {state}" for name, state in difference.not_ready)


def _print(lines: Iterable[RenderableType]) -> None:
    for line in lines:
        out.print(line, highlight=False)


def _alike(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Neighbours or not: items with one key together, in order of the first."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _plan_key(plan: GpuPlan) -> Hashable:
    steps = tuple(map(str, plan.actions))
    busy = tuple((i.name, i.processes) for i in plan.gpu.instances) if steps else ()
    there = tuple(i.name for i in plan.gpu.instances)
    return plan.gpu.product, plan.gpu.mode, plan.wanted is None, there, steps, busy, len(plan.obstacles)


def _outcome_key(outcome: GpuOutcome) -> Hashable:
    now = tuple(i.name for i in outcome.now.instances) if outcome.now else None
    mode = outcome.now.mode if outcome.now else None
    error = outcome.error.message if outcome.error else None
    return outcome.plan.gpu.product, outcome.result, now, mode, error


def _plan_lines(group: Sequence[GpuPlan]) -> Iterator[RenderableType]:
    plan = group[0]
    if plan.wanted is None:
        yield f"{_title(p.gpu for p in group)} [dim]in no layout: stays as it is[/]"
        return
    if not plan.actions:
        yield f"{_title(p.gpu for p in group)} [green]as it should be[/]: {escape(_held(plan.gpu))}"
        return
    yield f"{_title(p.gpu for p in group)} [dim]{escape(plan.wanted.where)}[/]"
    yield from _bars(plan.gpu, (("now", plan.gpu.placements, plan.gpu.mig), ("then", plan.then, plan.then_mig)))
    yield from _steps(plan)
    for obstacle in (o for p in group for o in p.obstacles):
        yield f"[yellow]![/] {escape(obstacle.message)}\n  [dim]{escape(obstacle.remedy)}[/]"


def _steps(plan: GpuPlan) -> Iterator[str]:
    """The difference as diff prints it: `-` goes, `+` comes, `~` is put right, a blank stays."""
    gone = {str(a): a for a in plan.actions}
    for instance in plan.gpu.instances:
        users = f", in use by {', '.join(named(instance.processes))}" if instance.processes else ""
        if f"destroy {instance.name}" in gone:
            yield f"[red]- {escape(instance.name + users)}[/]"
        elif f"complete {instance.name}" in gone:
            yield f"[yellow]~ {escape(instance.name)}[/] gets its one full compute instance"
        else:
            yield f"  {escape(instance.name)} [dim]stays{escape(users)}[/]"
    for action in plan.actions:
        if isinstance(action, Create):
            yield f"[green]+ {escape(str(action.placement))}[/]"
        elif isinstance(action, SetMode):
            yield f"[yellow]~ MIG {'on' if action.on else 'off'}[/]"


def _outcome_lines(group: Sequence[GpuOutcome]) -> Iterator[RenderableType]:
    outcome = group[0]
    holds = f": {escape(_held(outcome.now))}" if outcome.now else ""
    if outcome.plan.wanted is None:
        yield f"{_title(o.plan.gpu for o in group)} [dim]in no layout: left as it is[/]"
        return
    yield f"{_title(o.plan.gpu for o in group)} {_RESULTS[outcome.result]}{holds}"
    if outcome.now and outcome.result != "unchanged":
        yield from _bars(outcome.now, (("now", outcome.now.placements, outcome.now.mig),))
    if outcome.error:
        yield f"[bold red]error[/] {escape(outcome.error.message)}"
        if outcome.error.remedy:
            yield f"      [dim]{escape(outcome.error.remedy)}[/]"


def _title(gpus: Iterable[GpuState]) -> str:
    gpus = list(gpus)
    simulated = " (simulated)" if gpus[0].simulated else ""
    return f"[bold]GPU {format_cores(g.index for g in gpus)}[/] {escape(gpus[0].product)}{simulated}"


def _held(gpu: GpuState) -> str:
    if gpu.mode is None:
        return "no MIG"
    if not gpu.mig:
        return "MIG off" + (", on at the next reset" if gpu.mode.pending else "")
    return " ".join(i.name for i in gpu.instances) or "MIG on, no instances"


def _bars(gpu: GpuState, rows: Iterable[tuple[str, tuple[Placement, ...], bool]]) -> Iterator[RenderableType]:
    """A ruler and a line per row, memory slices to scale; nothing where geometry cannot draw it."""
    product = gpu.geometry
    if product is None or not product.memory_slices or not gpu.instances_known:
        return
    try:
        layouts = [(name, Layout(product, held) if mig else None) for name, held, mig in rows]
    except SlicewayError:
        return
    drawable = [layout for _, layout in layouts if layout is not None]
    if not drawable:
        return
    ruler, *bars = drawn(product, drawable, width=out.width - 8)
    yield Text("      ").append_text(ruler)
    lines = iter(bars)
    for name, layout in layouts:
        bar = next(lines) if layout is not None else Text("MIG off", style="dim")
        yield Text(f"{name:>5} ", style="dim").append_text(bar)
