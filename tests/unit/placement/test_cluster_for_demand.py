"""What a head keeps of plans: how many replicas pools have by the last one, of those that nobody has asked for only where their steps say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pytest

from model_registry.geometry import Placement
from model_registry.schema import ModelConfig
from placement.cluster.carrying import Round
from placement.cluster.cutting import CutOrder
from placement.cluster.head import ClusterGoal
from placement.cluster.members import NodeReport
from placement.cluster.testing import VERSIONS, FakeDriver, fits_anywhere, made_gpu
from placement.cluster.testing_laws import FakeNode, LawfulCluster
from placement.cluster.transitions import Transitions, TransitionsJournal, Why, digest
from placement.table import ModelRow
from placement.transition.steps import Kind, Place, Step, Transition

AT = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = "{}"
PLACES = tuple(Place("b/GPU-0", Placement(n, "1g.10gb")) for n in range(3))
STEP = Step(0, "create", Place("b/GPU-0", Placement(0, "1g.10gb")))


async def nobody_cuts(node: str, order: CutOrder) -> None:
    raise AssertionError("no round is done here")


def begun(
    why: Why, *seats: str, before: dict[str, int], starts: Sequence[str] = (), stops: Sequence[str] = ()
) -> Transitions:
    """A plan that gives these replicas seats, after another one by which pools have as many as `before` says; `chat` follows demand."""
    made = Transitions(nobody_cuts)
    made.restore(TransitionsJournal(counts=before, counts_for=digest(CONFIG)), CONFIG)
    seated = {replica: f"b/GPU-0/{n}" for n, replica in enumerate(seats)}
    kinds: list[tuple[Kind, str]] = [("stop", r) for r in stops] + [("start", r) for r in starts]
    engines = (Step(n, kind, STEP.place, r, after=(0,)) for n, (kind, r) in enumerate(kinds, 1))
    transition = Transition((STEP, *engines), "f", "t", seats=seated, wanted=digest(CONFIG))
    made.begin(transition, AT, CONFIG, {}, allow_mode_change=False, why=why, following={"chat"})
    return made


def stopped(made: Transitions) -> Transitions:
    """It ends before its first step, because the configuration is another one."""
    report = NodeReport(node="b", address="", versions=VERSIONS, boot="b")
    other = digest("another configuration")
    assert made.look({}, Round({"b": report}, frozenset({"b"}), {}, other, 0.0)) is None
    return made


SEATS = ("chat-0", "chat-1", "chat-2", "code-0")


@pytest.mark.parametrize(
    ("why", "before", "starts", "counts"),
    [
        ("apply", {"chat": 2}, (), {"chat": 3, "code": 1}),
        ("configuration", {}, (), {}),
        ("configuration", {}, ("code-0",), {"code": 1}),
        ("configuration", {"chat": 2}, ("code-0",), {"chat": 2, "code": 1}),
        ("configuration", {"chat": 2}, ("chat-2",), {"chat": 3}),
        ("demand", {"chat": 2, "code": 4}, ("chat-2",), {"chat": 2, "code": 4}),
        ("demand", {"chat": 2}, ("chat-2", "code-0"), {"chat": 2, "code": 1}),
        ("demand", {}, ("chat-2",), {}),
    ],
)
def test_only_an_operators_plan_says_the_numbers_of_pools_that_it_changes_nothing_of(
    why: Why, before: dict[str, int], starts: Sequence[str], counts: dict[str, int]
) -> None:
    made = begun(why, *SEATS, before=before, starts=starts)
    assert made.counts(CONFIG) == counts
    assert (made.in_short() or {})["why"] == why
    assert made.for_demand is (why == "demand")
    after = Transitions(nobody_cuts)
    after.restore(made.journal, CONFIG)
    assert (after.counts(CONFIG), after.for_demand) == (counts, why == "demand")


def test_replicas_of_a_plan_that_wait_for_a_slice_are_no_fewer_by_one_that_others_planned() -> None:
    made = begun("configuration", *SEATS, before={"chat": 5, "code": 2}, starts=("chat-2",))
    assert made.counts(CONFIG) == {"chat": 5, "code": 2}


def test_what_moves_is_as_many_as_before_and_what_ends_is_fewer() -> None:
    moved = begun("demand", *SEATS, before={"code": 3}, starts=("code-0",), stops=("code-1",))
    assert moved.counts(CONFIG) == {"code": 3}
    ended = begun("demand", *SEATS, before={"code": 2}, stops=("code-1",))
    assert ended.counts(CONFIG) == {"code": 1}
    assert begun("demand", *SEATS, before={}, stops=("code-1",)).counts(CONFIG) == {}


@pytest.mark.parametrize("why", ["apply", "configuration", "demand"])
def test_one_that_was_stopped_leaves_the_numbers_of_the_plan_before_it(why: Why) -> None:
    before = {"chat": 2, "code": 4}
    made = stopped(begun(why, *SEATS, before=before, starts=("chat-2", "code-0")))
    assert made.counts(CONFIG) == before
    assert not made.for_demand


def test_one_that_was_stopped_leaves_no_numbers_of_another_configuration() -> None:
    made = Transitions(nobody_cuts)
    made.restore(TransitionsJournal(counts={"chat": 5}, counts_for=digest("the one before")), CONFIG)
    transition = Transition((STEP,), "f", "t", seats={"chat-0": "b/GPU-0/0"}, wanted=digest(CONFIG))
    made.begin(transition, AT, CONFIG, {}, allow_mode_change=False)
    assert stopped(made).counts(CONFIG) == {}


def goal() -> ClusterGoal:
    """One model, whose demand is configured and whose number nobody knows but a plan: the head has one replica of it."""
    demand = {"requests_per_second": 9.0, "prompt_tokens": 100, "output_tokens": 50}
    models = (ModelConfig.model_validate({"name": "chat", "source": "org/x", "demand": demand}),)
    return ClusterGoal(CONFIG, models, (ModelRow(name="chat"),), fits_anywhere)


async def carried_out(cluster: LawfulCluster, steps: Sequence[Step], seats: Mapping[str, str], why: Why) -> int:
    """How many steps were done."""
    found = await cluster.head.survey()
    transition = Transition(tuple(steps), found.fingerprint, "t", seats=seats, wanted=digest(CONFIG))
    await cluster.head.carry_out(transition, why=why)
    for _ in range(40):
        await cluster.round()
    outcome = cluster.head.transition()
    assert outcome is not None
    assert not outcome["under_way"]
    return len(outcome["done"])  # type: ignore[arg-type]


@pytest.mark.parametrize("why", ["configuration", "demand"])
async def test_a_step_that_a_driver_refuses_ends_no_engine_that_an_operators_plan_has_brought(why: Why) -> None:
    gpu = made_gpu(0, holds=[str(place.placement) for place in PLACES])
    cluster = LawfulCluster({"b": FakeNode(FakeDriver((gpu,)))}, goal(), seed=1)
    await cluster.head.take_over(cluster.goal)
    await cluster.settle()
    (first,) = (row["slice"] for row in cluster.head.status()["replicas"])  # type: ignore[attr-defined]
    others = [place for place in PLACES if place.slice_id != first]
    seats = {"chat-0": first} | {f"chat-{n}": place.slice_id for n, place in enumerate(others, 1)}
    starts = [Step(n, "start", place, f"chat-{n + 1}", "chat", after=tuple(range(n))) for n, place in enumerate(others)]
    assert await carried_out(cluster, starts, seats, "apply") == 2
    refused = Step(0, "create", Place("b/GPU-0", Placement(0, "2g.20gb")))
    assert await carried_out(cluster, [refused], seats, why) == 0
    rows: list[dict[str, str]] = cluster.head.status()["replicas"]  # type: ignore[assignment]
    assert {row["replica"]: (row["slice"], row["state"]) for row in rows} == {r: (s, "ready") for r, s in seats.items()}
