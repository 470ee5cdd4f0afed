"""What a head keeps of a transition that was for demand: how many replicas pools have by plan is as it was, of those whose number follows it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from model_registry.geometry import Placement
from placement.cluster.carrying import Round
from placement.cluster.cutting import CutOrder
from placement.cluster.members import NodeReport
from placement.cluster.testing import VERSIONS
from placement.cluster.transitions import Transitions, TransitionsJournal, Why, digest
from placement.transition.steps import Place, Step, Transition

AT = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = "{}"
STEP = Step(0, "create", Place("b/GPU-0", Placement(0, "1g.10gb")))


async def nobody_cuts(node: str, order: CutOrder) -> None:
    raise AssertionError("no round is done here")


def begun(why: Why, *seats: str, before: dict[str, int]) -> Transitions:
    """A plan that gives these replicas seats, after another one by which pools have as many as `before` says."""
    made = Transitions(nobody_cuts)
    made.restore(TransitionsJournal(counts=before, counts_for=digest(CONFIG)), CONFIG)
    seated = {replica: f"b/GPU-0/{n}" for n, replica in enumerate(seats)}
    transition = Transition((STEP,), "f", "t", seats=seated, wanted=digest(CONFIG))
    made.begin(transition, AT, CONFIG, {}, allow_mode_change=False, why=why, following={"chat"})
    return made


@pytest.mark.parametrize(
    ("why", "before", "counts"),
    [
        ("apply", {"chat": 2}, {"chat": 3, "code": 1}),
        ("configuration", {}, {"chat": 3, "code": 1}),
        ("demand", {"chat": 2, "code": 4}, {"chat": 2, "code": 1}),
        ("demand", {}, {"code": 1}),
    ],
)
def test_what_demand_has_brought_is_no_plans_number(why: Why, before: dict[str, int], counts: dict[str, int]) -> None:
    made = begun(why, "chat-0", "chat-1", "chat-2", "code-0", before=before)
    assert made.counts(CONFIG) == counts
    assert (made.in_short() or {})["why"] == why
    assert made.for_demand is (why == "demand")
    after = Transitions(nobody_cuts)
    after.restore(made.journal, CONFIG)
    assert (after.counts(CONFIG), after.for_demand) == (counts, why == "demand")


def test_one_that_was_stopped_leaves_the_numbers_of_the_plan_before_it_to_who_follows_demand() -> None:
    for why, left in (("demand", {"chat": 2}), ("apply", {})):
        made = begun(why, "chat-0", "chat-1", "chat-2", "code-0", before={"chat": 2, "code": 4})  # type: ignore[arg-type]
        report = NodeReport(node="b", address="", versions=VERSIONS, boot="b")
        other = digest("another configuration")
        assert made.look({}, Round({"b": report}, frozenset({"b"}), {}, other, 0.0)) is None
        assert made.counts(CONFIG) == left
        assert not made.for_demand
