"""`fleet.layouts` on one node of a cluster: which rules mean its GPUs, cutting them once when its machine has joined, and what is not so.

An index means that GPU of every node, a UUID one GPU of one node, `all` and a product whatever nodes have. What a node has not is another
one's, so only what no node has is a mistake, which the head finds (`named_by_nobody`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from model_registry.errors import ConfigError, SlicewayError
from placement.errors import ModeChangeNeeded, NotPrivileged, SliceInUse
from placement.gpus import GpuState
from placement.partition import Driver, GpuPlan, LayoutRule, Tools, apply
from placement.partition import plan as plan_layouts
from placement.partition.actions import Action, Complete, Destroy, SetMode
from placement.partition.host import holders
from placement.partition.select import UUID, names_gpu

log = logging.getLogger(__name__)

BY_PLAN = "sliceway apply CONFIG --ray HOST:PORT"


# ---- rules against the GPUs of one node


def rules_here(rules: Sequence[LayoutRule], gpus: Sequence[GpuState]) -> tuple[LayoutRule, ...]:
    """`rules` as they mean `gpus`, in their order and number: who is named by itself and is not here is left out."""
    return tuple(_here(rule, gpus) for rule in rules)


def _here(rule: LayoutRule, gpus: Sequence[GpuState]) -> LayoutRule:
    if rule.gpus == "all":
        return rule
    there = tuple(s for s in rule.selectors if not _is_one(s) or names_gpu(gpus, s))
    return rule.model_copy(update={"gpus": there})


def _is_one(selector: int | str) -> bool:
    return isinstance(selector, int) or UUID.fullmatch(selector) is not None


def not_here(rules: Sequence[LayoutRule], gpus: Sequence[GpuState]) -> tuple[str, ...]:
    """Each single GPU that `rules` name and `gpus` have not, as `fleet.layouts[0].gpus: 7`."""
    return tuple(
        f"fleet.layouts[{number}].gpus: {selector}"
        for number, rule in enumerate(rules)
        for selector in rule.selectors
        if _is_one(selector) and not names_gpu(gpus, selector)
    )


def named_by_nobody(missing: Iterable[Collection[str]]) -> tuple[str, ...]:
    """Of what each node has not (`not_here`), what none has: an error each, with what to do. Nothing where there is no node."""
    each = [set(one) for one in missing]
    nowhere = sorted(set.intersection(*each)) if each else []
    return tuple(
        str(
            ConfigError(
                f"no node of the cluster has a GPU {selector}",
                where=where,
                remedy="`sliceway plan CONFIG --ray HOST:PORT` lists them. An index means that GPU of every node, a UUID one GPU of one.",
            )
        )
        for where, _, selector in (one.partition(": ") for one in nowhere)
    )


def layouts_in(config: str) -> tuple[LayoutRule, ...]:
    """The rules in a configuration as nodes are told it; none in one that this version does not take."""
    try:
        raw = json.loads(config).get("fleet", {}).get("layouts", ())
        return tuple(LayoutRule.model_validate(rule) for rule in raw)
    except (ValueError, ValidationError, AttributeError, TypeError) as error:
        log.error("fleet.layouts makes no sense and is not carried out: %s", error)
        return ()


def differences(gpus: Sequence[GpuState], rules: Sequence[LayoutRule], why: Mapping[str, str]) -> tuple[str, ...]:
    """What of `rules` is not so on `gpus`, a line each; `why` has the reason by UUID where one is known, under `""` for all."""
    try:
        plans = plan_layouts(gpus, rules_here(rules, gpus))
    except SlicewayError as error:
        return (f"fleet.layouts is not carried out: {error}",)
    return tuple(_differs(p, why.get(p.gpu.uuid) or why.get("")) for p in plans if p.actions and p.wanted is not None)


def _differs(plan: GpuPlan, why: str | None) -> str:
    assert plan.wanted is not None
    holds = " ".join(i.name for i in plan.gpu.instances) or ("no instances" if plan.gpu.mig else "no MIG")
    reason = why or f"it was not so when the machine joined, or has changed since. To cut it: {BY_PLAN}"
    return f"{plan.gpu.label} is not cut as {plan.wanted.where} says, it holds {holds}: {reason}"


# ---- cutting


@dataclass(frozen=True, slots=True)
class LaidOut:
    """What came of it: what was cut, a line for each GPU, and by UUID why the others were not (`""`: none of them was)."""

    said: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)


def lay_out(driver: Driver, rules: Sequence[LayoutRule], taken: Collection[str]) -> LaidOut:
    """Make each GPU hold what `rules` say, by difference; a GPU on which a slice of `taken` would have to go stays as it is.

    Never switches MIG mode, resets, or takes away what is in use. Each GPU is a transaction of its own (`placement.partition.apply`).
    """
    said: list[str] = []
    why: dict[str, str] = {}
    try:
        here = rules_here(rules, driver.observe())
        plans = plan_layouts(driver.observe(), here)
    except SlicewayError as error:
        return LaidOut(why={"": str(error)})
    for plan in (p for p in plans if p.actions):
        try:
            _refuse_taken(plan, taken)
            said += _cut(driver, _only(here, plan), plan)
        except SlicewayError as error:
            error.remedy = f"{error.remedy or ''} {_remedy(error)}".strip()
            why[plan.gpu.uuid] = str(error)
    return LaidOut(tuple(said), why)


def _refuse_taken(plan: GpuPlan, taken: Collection[str]) -> None:
    going = {place for action in plan.actions for place in _going(plan, action)}
    if busy := sorted(going & set(taken)):
        raise SliceInUse(f"{', '.join(busy)} would have to go, and has a replica", where=plan.gpu.label)


def _going(plan: GpuPlan, action: Action) -> set[str]:
    uuid = plan.gpu.uuid
    match action:
        case Destroy(instance=instance) | Complete(instance=instance):
            return {f"{uuid}/{instance.name}"}
        case SetMode():
            return {uuid, *(f"{uuid}/{instance.name}" for instance in plan.gpu.instances)}
        case _:
            return set()


def _only(rules: Sequence[LayoutRule], plan: GpuPlan) -> tuple[LayoutRule, ...]:
    """`rules` for this GPU alone, in their number, so that errors name the one that counts."""
    where = plan.wanted.where if plan.wanted is not None else ""
    return tuple(
        rule.model_copy(update={"gpus": (plan.gpu.uuid,) if where == f"fleet.layouts[{number}]" else ()})
        for number, rule in enumerate(rules)
    )


def _cut(driver: Driver, rules: Sequence[LayoutRule], plan: GpuPlan) -> list[str]:
    """What was cut, to be told. Raises PartitionError where it was not."""
    for outcome in apply(driver, rules, tools=Tools(clients=holders)).gpus:
        if outcome.error is not None:
            raise outcome.error
        if outcome.result == "changed" and outcome.now is not None:
            holds = " ".join(i.name for i in outcome.now.instances) or "no instances"
            return [f"{plan.gpu.label} cut as fleet.layouts says: {holds}"]
    return []


def _remedy(error: SlicewayError) -> str:
    match error:
        case SliceInUse():
            return f"With its replicas ended first: {BY_PLAN} --drain"
        case ModeChangeNeeded():
            return f"In a cluster: {BY_PLAN} --allow-mode-change"
        case NotPrivileged():
            return "Join as root, or cut it before this machine joins: sudo sliceway apply CONFIG --layouts-only"
        case _:
            return f"Then: {BY_PLAN}"
