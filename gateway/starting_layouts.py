"""What `sliceway up` does about `fleet.layouts` before it starts anything: cut what it may, and say what it may not."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.applying import apply_plan
from gateway.config import Config
from gateway.layouts import machine_of, one_at_a_time, plans_fleet
from model_registry.errors import SlicewayError
from placement.errors import (
    CannotBeCut,
    ModeChangeNeeded,
    NotPrivileged,
    PartitionError,
    PlanError,
    SliceInUse,
    StateLocked,
)
from placement.partition import Applied, LayoutRule
from placement.partition import apply as apply_layouts
from placement.partition import plan as plan_layouts
from placement.state import StatePaths
from placement.transition.local import left_running


@dataclass(frozen=True, slots=True)
class StartingLayouts:
    """What was said about the layouts, and why GPUs do not hold what `fleet.layouts` says; None if they do."""

    said: tuple[str, ...] = ()
    missing: str | None = None

    def explain(self, error: SlicewayError) -> SlicewayError:
        """`error` with the layouts as its likely cause, where they are missing."""
        if self.missing is not None:
            error.remedy = f"First: {self.missing}\n{error.remedy or ''}".rstrip()
        return error


def cut_at_start(config: Config, path: Path) -> StartingLayouts:
    """Make GPUs hold `fleet.layouts`, by difference: slices that stay are not touched, and neither is what is in use.
    Then, where the configuration is planned, what the plan says.

    Never switches MIG mode or resets. What it may not do is said, with the command that does; `up` goes on with what is
    there. Raises RegistryError and ConfigError for layouts that no right would make possible.
    """
    layouts = _layouts_at_start(config, path)
    listed = config.fleet.discover in ("cpu", "none") or config.fleet.slices
    if layouts.missing is not None or not plans_fleet(config) or listed:
        return layouts
    return _planned_at_start(config, path, layouts)


def _planned_at_start(config: Config, path: Path, layouts: StartingLayouts) -> StartingLayouts:
    """Seats for the controller that starts next, on instances that are made if they are missing."""
    machine = machine_of(config)
    try:
        if not machine.driver.observe():
            return layouts
    except PartitionError:
        if config.fleet.discover != "auto":
            raise
        return layouts  # no GPU here: the slices are of this machine's cores, which no plan cuts
    if left_running(StatePaths(config.state)):
        later = f"engines of an earlier run go on; what was changed since is carried out by: sliceway apply {shlex.quote(str(path))}"
        return StartingLayouts((*layouts.said, later), layouts.missing)
    command = f"sliceway plan {shlex.quote(str(path))}"
    try:
        with one_at_a_time(config, machine):
            applied = apply_plan(config, machine)
    except (PlanError, PartitionError, StateLocked) as error:
        return StartingLayouts((*layouts.said, f"the plan is not carried out: {error}"), missing=command)
    said = [f"planned: {step}" for step in applied.outcome.done if step.kind in ("create", "destroy", "seat")]
    if applied.outcome.error is not None:
        said.append(f"the plan stopped at {applied.outcome.failed}: {applied.outcome.error}")
    if applied.answer is not None:
        said += [f"not met: {u.demand}: {u.reason}" for u in applied.answer.plan.unmet]
    return StartingLayouts((*layouts.said, *said), None if applied.outcome.ok else command)


def _layouts_at_start(config: Config, path: Path) -> StartingLayouts:
    rules = config.fleet.layouts
    if not rules:
        return StartingLayouts()
    try:
        return _cut(config, rules, path)
    except CannotBeCut:
        raise
    except (PartitionError, StateLocked) as error:
        command = _command(error, path)
        said = f"fleet.layouts is not applied: {error}"
        return StartingLayouts((said, f"to apply it: {command}"), missing=command)


def _cut(config: Config, rules: tuple[LayoutRule, ...], path: Path) -> StartingLayouts:
    machine = machine_of(config)
    plans = plan_layouts(machine.driver.observe(), rules)
    if not any(p.actions for p in plans):
        return StartingLayouts()
    with one_at_a_time(config, machine):
        applied = apply_layouts(machine.driver, rules, tools=machine.tools())
    failed = next((g.error for g in applied.gpus if not g.ok and g.error is not None), None)
    missing = _command(failed, path) if failed is not None else None
    return StartingLayouts(tuple(_told(applied)), missing)


def _told(applied: Applied) -> Iterator[str]:
    for outcome in applied.gpus:
        if outcome.result == "unchanged":
            continue
        holds = " ".join(i.name for i in outcome.now.instances) if outcome.now is not None else "not known"
        yield f"{outcome.plan.gpu.label} {outcome.result}: {holds or 'no instances'}"
        if outcome.error is not None:
            yield f"{outcome.plan.gpu.label}: {outcome.error}"


def _command(error: PartitionError | StateLocked, path: Path) -> str:
    """What the operator runs to have the layouts after all."""
    config = shlex.quote(str(path))
    match error:
        case NotPrivileged():
            return f"sudo sliceway apply {config} --layouts-only"
        case ModeChangeNeeded():
            return f"sudo sliceway apply {config} --layouts-only --allow-mode-change"
        case SliceInUse():
            return f"sliceway apply {config} --drain"
        case StateLocked():
            return f"wait for the other change of layouts, then: sliceway apply {config}"
        case _:
            return f"sliceway plan {config} shows what stands in the way; then: sliceway apply {config}"
