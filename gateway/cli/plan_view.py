"""The fleet plan for people: what each GPU will hold as a difference, what each model gets, the steps, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gateway.applying import AppliedPlan
from gateway.cli.output import out
from gateway.cli.profiles import drawn
from gateway.planning import FleetAnswer, ReservedSlice
from model_registry.errors import ConfigError, SlicewayError
from model_registry.geometry import Layout, Placement
from model_registry.words import counted
from placement.capacity import costs_of_demands
from placement.gpus import GpuState
from placement.planner.types import WHOLE, FleetGpu, PlannedGpu, PlannedSlice
from placement.transition import Outlook, Place, Step

_MOST_STEPS = 40


def show_fleet(answer: FleetAnswer, gpus: Sequence[GpuState], reserved: Sequence[ReservedSlice] = ()) -> None:
    """Everything but the reasons."""
    labels = labels_of(gpus)
    out.print(_summary(answer), highlight=False)
    order = {g.uuid: place for place, g in enumerate(gpus)}
    kept = {there.slice_id for there in reserved}
    for planned in sorted(answer.plan.gpus, key=lambda p: order.get(p.gpu.id, len(order))):
        if planned.changes or planned.used or planned.gpu.instances:
            for line in _gpu_lines(planned, answer, labels, kept):
                out.print(line, highlight=False)
    for there in reserved:
        out.print(f"[dim]reserved[/] {escape(str(there))}", highlight=False)
    if answer.demands or answer.workload.resting:
        out.print()
        out.print(_models(answer))
    for line in (*_unmet(answer), *_stranded(answer), *_transition(answer, gpus), *_proposal(answer)):
        out.print(line, highlight=False)
    show_assumed_prices(answer.assumed_prices)


def show_assumed_prices(prices: Mapping[str, float], *, also: str = "") -> None:
    """Whoever reads a sum must know of prices in it that nobody named. `also` is another way to name one."""
    for product, price in prices.items():
        out.print(
            f"[dim]·[/] [yellow]{escape(product)} has no price[/]: counted at {price:.2f}, the mean of those that have "
            f"one. Name it in fleet.prices{also}.",
            highlight=False,
        )


def show_left_out(notes: Sequence[str]) -> None:
    """What is not planned for, though the machine has it."""
    for note in notes:
        out.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def labels_of(gpus: Sequence[GpuState]) -> dict[str, str]:
    """What GPUs are called where people read it, by their ids; those of a cluster (`NODE/UUID`) with their node."""
    return {g.uuid: f"{node} GPU {g.index}" if (node := g.uuid.rpartition("/")[0]) else f"GPU {g.index}" for g in gpus}


def show_step(step: Step, what: str, labels: dict[str, str]) -> None:
    """One line when a step begins, and one when it fails; what is done is counted at the end."""
    text = escape(_in_words(str(step), labels))
    if what == "begun":
        out.print(f"  {text}", highlight=False)
    elif what == "failed":
        out.print(f"  [red]failed[/] {text}", highlight=False)


def show_applied(applied: AppliedPlan) -> None:
    """What is done of a plan, what is not, and why."""
    outcome = applied.outcome
    if outcome.error is not None:
        at = f"{_in_words(str(outcome.failed), applied.labels)}: " if outcome.failed is not None else ""
        why = _in_words(str(outcome.error), applied.labels)
        out.print(f"[bold red]stopped[/] at {escape(at)}{escape(why)}", highlight=False)
        out.print("The fleet serves with what it has.")
        for title, steps in (("Done", outcome.done), ("Not done", outcome.not_done)):
            out.print(f"{title}:" if steps else f"{title}: nothing", highlight=False)
            for step in steps:
                out.print(f"  {escape(_in_words(str(step), applied.labels))}", highlight=False)
        out.print("[dim]`sliceway apply CONFIG` tries again from there.[/]", highlight=False)
    elif outcome.done:
        out.print(f"[green]as planned[/]: {counted(len(outcome.done), 'step')} done", highlight=False)
        if any(step.kind == "seat" for step in outcome.done):
            out.print(
                "[dim]no engine was started: no controller runs. The next one finds its seats (sliceway up CONFIG).[/]"
            )
    else:
        out.print("[green]as planned[/]: nothing to do", highlight=False)
    if applied.answer is not None:
        for line in _unmet(applied.answer):
            out.print(line, highlight=False)


def show_why(answer: FleetAnswer, name: str, gpus: Sequence[GpuState] = ()) -> None:
    """What was decided about one model or reservation, and every place it could have had. Raises ConfigError for another name."""
    planned = (*answer.demands.values(), *answer.workload.resting)
    models = {d.model for d in planned if name in (d.name, d.model)} | ({name} & set(answer.workload.models))
    decisions = [d for n in _demands_of(answer, name) for d in answer.plan.why(n)]
    if not models and not decisions and name not in answer.workload.unreadable:
        known = sorted({*answer.workload.models, *answer.workload.unreadable, *answer.demands})
        raise ConfigError(
            f"the plan knows no model {name!r}", where="--why", remedy=f"There are: {', '.join(known) or 'none'}."
        )
    for decision in decisions:
        place = f" {decision.placement}" if decision.placement else ""
        reason = decision.reason
        for uuid, label in labels_of(gpus).items():
            reason = reason.replace(f"GPU {uuid}", label)
        out.print(f"[bold]{decision.action}[/] {escape(decision.subject)}{place}: {escape(reason)}", highlight=False)
    if name in answer.workload.unreadable:
        out.print(f"[red]not planned[/]: {escape(str(answer.workload.unreadable[name]))}", highlight=False)
    for demand in answer.workload.resting:
        if name in (demand.name, demand.model):
            out.print(f"[bold]no replica[/] {escape(demand.name)}: min is 0, so one comes with the first request")
    for unmet in answer.plan.unmet:
        if unmet.demand in _demands_of(answer, name):
            out.print(_unmet_line(answer, unmet.demand), highlight=False)
    for model in sorted(models & set(answer.workload.models)):
        _show_places(answer, model)


def _demands_of(answer: FleetAnswer, name: str) -> list[str]:
    return [d.name for d in answer.demands.values() if name in (d.name, d.model)] or [name]


def _show_places(answer: FleetAnswer, model: str) -> None:
    choices = answer.workload.models[model]
    table = Table(box=None, pad_edge=False)
    for title in ("", "product", "profile"):
        table.add_column(title, no_wrap=True)
    table.add_column("what it gets there, or why not")
    for c in choices.candidates:
        table.add_row("[green]yes[/]" if c.option else "[red]no[/]", c.place.product, c.place.profile, escape(c.reason))
    out.print(table)
    for a in choices.alternatives:
        out.print(
            f"[dim]{escape(a.change)} would let it run on {a.option.profile} of {a.option.product}[/]", highlight=False
        )


def _summary(answer: FleetAnswer) -> str:
    used = [g for g in answer.plan.gpus if g.used]
    prices = {g.gpu.price_per_hour for g in answer.plan.gpus}
    cost = "" if prices <= {1.0} else f", {answer.plan.price_per_hour:.2f} per hour"
    proof = "nothing cheaper exists" if answer.plan.optimal else f"at most {answer.plan.gap:.1%} above the cheapest"
    if answer.plan.online:
        proof = "nobody is moved to save money or to make room; a full plan (without --online) looks for that"
    return f"[bold]plan[/] {len(used)} of {counted(len(answer.plan.gpus), 'GPU')} in use{cost}  [dim]{proof}[/]"


def _gpu_lines(
    planned: PlannedGpu, answer: FleetAnswer, labels: dict[str, str], kept: Collection[str]
) -> Iterator[RenderableType]:
    gpu = planned.gpu
    flags = " (cordoned)" if gpu.cordoned else ""
    changed = planned.changes or any(s.change == "reuse" for s in planned.slices)
    state = "" if changed else " [green]stays[/]"
    yield f"[bold]{labels.get(gpu.id, gpu.id)}[/] {escape(gpu.product)}{flags}{state}"
    if planned.changes:
        yield from _bars(gpu, tuple(i.placement for i in gpu.instances), tuple(s.placement for s in planned.slices))
    there = {i.placement: i for i in gpu.instances}
    goes = {d.subject: d for d in answer.plan.decisions if d.action in ("move", "stop")}
    for placement in planned.destroyed:
        replica = there[placement].replica
        decision = goes.get(replica or "")
        whither = "" if decision is None else " moves" if decision.action == "move" else " stops"
        yield f"[red]- {placement}[/] {escape(replica or 'idle')}{whither}"
    for planned_slice in planned.slices:
        place = Place(gpu.id, planned_slice.placement)
        reserved = planned_slice.change != "keep" or place.slice_id in kept
        yield _slice_line(planned_slice, labels, reserved=reserved)


def _slice_line(there: PlannedSlice, labels: dict[str, str], *, reserved: bool) -> str:
    """`reserved` tells slices that were made for other work from those that others have anyway, which the plan leaves alone."""
    who = there.replica or there.reserved or "idle"
    if there.reserved and reserved:
        who = f"reserved: {there.reserved}"
    text = f"{there.placement} {escape(who)}"
    if there.was:
        gpu, _, placement = there.was.rpartition("/")
        text += f" [dim]from {labels.get(gpu, gpu)} {placement}[/]"
    match there.change:
        case "create":
            return f"[green]+ {text}[/]"
        case "reuse":
            return f"[yellow]~ {text}[/]"
        case "idle":
            return f"  [dim]{text}[/]"
        case _:
            return f"  {text} [dim]stays[/]"


def _bars(gpu: FleetGpu, now: Sequence[Placement], then: Sequence[Placement]) -> Iterator[Text]:
    product = gpu.geometry
    if product is None or not product.memory_slices:
        return
    rows = [("now", now), ("then", then)]
    try:
        layouts = [(name, None if WHOLE in held else Layout(product, tuple(held))) for name, held in rows]
    except SlicewayError:
        return
    drawable = [layout for _, layout in layouts if layout is not None]
    if not drawable:
        return
    ruler, *bars = drawn(product, drawable, width=out.width - 8)
    yield Text("      ").append_text(ruler)
    lines = iter(bars)
    for name, layout in layouts:
        line = Text("whole card, MIG off", style="dim") if layout is None else next(lines)
        yield Text(f"{name:>5} ", style="dim").append_text(line)


def _models(answer: FleetAnswer) -> Table:
    costs = costs_of_demands(answer.plan)
    priced = {g.gpu.price_per_hour for g in answer.plan.gpus} > {1.0} or any(
        g.gpu.price_per_hour != 1.0 for g in answer.plan.gpus
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("slices")
    for title in ("asked", "served", *(("per hour",) if priced else ()), "meanwhile"):
        table.add_column(title, justify="right", no_wrap=True)
    meanwhile = {m.demand: m for m in answer.outlook.models} if answer.outlook else {}
    for name, demand in sorted(answer.demands.items()):
        keys = [(g.gpu.product, s.placement.profile) for g in answer.plan.gpus for s in g.slices if s.demand == name]
        counted = demand.rate is None
        asked = f"{demand.floor}" if counted else f"{demand.rate:.4g}/s"
        served = f"{len(keys)}" if counted else f"{demand.served_by(keys):.4g}/s"
        cost = (f"{costs.get(name, 0.0):.2f}",) if priced else ()
        table.add_row(
            escape(name), _places(keys) or "[red]none[/]", asked, served, *cost, _meanwhile(meanwhile.get(name))
        )
    for demand in answer.workload.resting:
        none = ("0", "0", *(("0.00",) if priced else ()))
        table.add_row(escape(demand.name), "[dim]none until a request comes[/]", *none, "[dim]rests[/]")
    return table


def _places(keys: Iterable[tuple[str, str]]) -> str:
    listed = list(keys)
    return ", ".join(f"{listed.count(key)} x {key[1]} on {key[0]}" for key in sorted(set(listed)))


def _meanwhile(outlook: Outlook | None) -> str:
    """The capacity dip, if there is one; or that it will have less, which is no dip since it stays so."""
    if outlook is None:
        return "[dim]unchanged[/]"
    if outlook.before <= 0:
        return "[green]new[/]"
    if outlook.dip_seconds <= 0 and outlook.then < outlook.before - 1e-9:
        return f"[yellow]{outlook.before:.4g} to {outlook.then:.4g}[/]"
    if outlook.dip_seconds <= 0:
        return "[green]no dip[/]"
    return f"[yellow]{outlook.lowest:.4g} of {outlook.before:.4g} for {outlook.dip_seconds:.0f} s[/]"


def _unmet(answer: FleetAnswer) -> Iterator[str]:
    for unmet in answer.plan.unmet:
        yield _unmet_line(answer, unmet.demand)
    for name, error in answer.workload.unreadable.items():
        remedy = f"\n  [dim]{escape(error.remedy)}[/]" if error.remedy else ""
        where = f"{error.where}: " if error.where else ""
        yield f"[bold red]not planned[/] {escape(name)}: {escape(where + error.message)}{remedy}"


def _stranded(answer: FleetAnswer) -> Iterator[str]:
    """Models that nothing would wake: said before a client finds out."""
    if answer.stranded:
        yield (
            f"[bold yellow]![/] no slice is left free for {escape(', '.join(answer.stranded))}: a request would wait in vain\n"
            "  [dim]fleet.autoscale: {repartition: automatic} has one cut when the request comes; or leave a slice free.[/]"
        )


def _unmet_line(answer: FleetAnswer, demand: str) -> str:
    unmet = next(u for u in answer.plan.unmet if u.demand == demand)
    model = demand.partition("@")[0]
    choices = answer.workload.models.get(model)
    blocked = f": {choices.blocked}" if choices is not None and choices.blocked else ""
    help_ = f"No single change that was tried would do; --why {model} shows every place."
    if unmet.remedies:
        help_ = f"It would do: {' or '.join(unmet.remedies)}"
    if unmet.untried:
        help_ = f"{help_.rstrip('.')}. Not tried out, since it takes too long: {unmet.untried} more"
    what = f"{unmet.shortfall} missing. {escape(unmet.reason + blocked)}."
    return f"[bold red]not met[/] {escape(demand)}: {what}\n  [dim]{escape(help_)}[/]"


def _transition(answer: FleetAnswer, gpus: Sequence[GpuState]) -> Iterator[str]:
    if answer.blocked is not None:
        yield f"[bold red]no safe order[/] {escape(answer.blocked.message)}\n  [dim]{escape(answer.blocked.remedy or '')}[/]"
        return
    if answer.transition is None or answer.outlook is None:
        return
    if not answer.transition.steps:
        yield "[green]nothing to do[/]"
        return
    yield f"\n{counted(len(answer.transition.steps), 'step')}, about {_duration(answer.outlook.seconds)} (estimate):"
    starts = [m for m in answer.outlook.models if m.start_seconds is not None]
    if starts:
        told = ", ".join(f"{m.demand} {_duration(m.start_seconds or 0.0)} ({m.start_source})" for m in starts)
        yield f"  [dim]counted for a start: {escape(told)}[/]"
    labels, mig = labels_of(gpus), {g.uuid: g.mig for g in gpus}
    for step in answer.transition.steps[:_MOST_STEPS]:
        switched = _switches(step, mig.get(step.place.gpu))
        yield f"  {step.number + 1:>3} {escape(_in_words(str(step), labels))}{switched}"
    left = len(answer.transition.steps) - _MOST_STEPS
    if left > 0:
        yield f"  ... and {left} more; --json lists them all"


def _switches(step: Step, mig: bool | None) -> str:
    """What `apply` has to be told for a step that changes a GPU's mode."""
    if step.place.placement != WHOLE or step.kind not in ("create", "destroy") or mig is (step.kind == "destroy"):
        return ""
    return "  [yellow]needs --allow-mode-change[/]"


def _in_words(text: str, labels: Mapping[str, str]) -> str:
    """The same with what GPUs are called in the place of their ids."""
    for gpu, label in labels.items():
        text = text.replace(f"GPU {gpu}", label).replace(f"{gpu}/", f"{label} ").replace(gpu, label)
    return text


def _proposal(answer: FleetAnswer) -> Iterator[str]:
    if answer.proposal is None:
        return
    worth = "worth it" if answer.proposal.worthwhile else "not worth it"
    yield f"\n[bold]cutting GPUs anew[/] would serve {escape(answer.proposal.reason)}: {worth}"
    yield "  [dim]fleet.partition: planned lets the plan cut GPUs; fleet.autoscale.repartition: automatic does it unasked.[/]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
