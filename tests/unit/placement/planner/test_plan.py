"""What a plan decides, case by case: options, constraints, reasons, and what would help where nothing fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.geometry import Placement
from placement.errors import StalePlan
from placement.planner.current import check_current, states
from placement.planner.plan import plan
from placement.planner.solver import Limits
from placement.planner.types import (
    WHOLE,
    Alternative,
    Constraints,
    FleetGpu,
    FleetPlan,
    Instance,
    ModelDemand,
    Objective,
    Option,
    Problem,
    Reservation,
)

CATALOGUE = load_catalogue()
A100, H100 = CATALOGUE.product("a100-80gb"), CATALOGUE.product("h100-sxm")


def gpu(name: str, *instances: Instance, product: str = "a100-80gb", node: str = "n0", price: float = 1.0) -> FleetGpu:
    found = CATALOGUE.product(product)
    return FleetGpu(name, found.name, found, node, instances, price_per_hour=price)


def runs(placement: str, replica: str, requests: int = 0) -> Instance:
    return Instance(Placement.parse(placement), replica, replica.rpartition("-")[0], requests=requests)


def idle(placement: str) -> Instance:
    return Instance(Placement.parse(placement))


def on(product: str, profile: str, capacity: float = 1.0, **more: object) -> Option:
    return Option(CATALOGUE.product(product).name, profile, capacity, **more)  # type: ignore[arg-type]


def wants(name: str, *options: Option, **more: object) -> ModelDemand:
    if "rate" not in more:
        more.setdefault("replicas", 1)
    return ModelDemand(name, name, options, **more)  # type: ignore[arg-type]


def seats(made: FleetPlan, demand: str) -> list[str]:
    return [f"{g.gpu.id}/{s.placement}" for g in made.gpus for s in g.slices if s.demand == demand]


def level(made: FleetPlan, objective: Objective) -> float:
    return next(x.value for x in made.levels if x.objective is objective)


SMALL = on("a100-80gb", "1g.10gb")


def test_profile_count_and_place_are_chosen_together_for_the_least_price() -> None:
    """Three times 1g serve 3, one 3g serves 4: what is cheaper depends on what else has to be on the card."""
    options = (on("a100-80gb", "1g.10gb", 1.0), on("a100-80gb", "3g.40gb", 4.0))
    alone = plan(Problem((gpu("a"), gpu("b")), (wants("chat", *options, rate=8.0),)))
    assert seats(alone, "chat") == ["a/3g.40gb@0", "a/3g.40gb@4"]
    beside = (wants("chat", *options, rate=4.0), wants("big", on("a100-80gb", "4g.40gb")))
    assert sorted(seats(plan(Problem((gpu("a"), gpu("b")), beside)), "chat")) == ["a/3g.40gb@4"]


def test_the_cheaper_product_is_taken_and_the_price_is_proven() -> None:
    fleet = (gpu("a", price=2.0), gpu("h", product="h100-sxm", price=3.0))
    demand = wants("chat", on("a100-80gb", "2g.20gb", 1.0), on("h100-sxm", "2g.20gb", 3.0), rate=3.0)
    made = plan(Problem(fleet, (demand,)))
    assert {g.gpu.id for g in made.gpus if g.used} == {"a"}
    assert (made.price_per_hour, made.lower_bound, made.optimal) == (2.0, 2.0, True)
    made = plan(Problem(fleet, (replace(demand, rate=6.0),)))
    assert {g.gpu.id for g in made.gpus if g.used} == {"h"}


def test_a_penalty_decides_between_options_at_one_price() -> None:
    demand = wants("chat", on("a100-80gb", "1g.10gb", penalty=1.0, note="fp8 KV cache"), on("a100-80gb", "1g.20gb"))
    made = plan(Problem((gpu("a"),), (demand,)))
    assert [s.split("@")[0] for s in seats(made, "chat")] == ["a/1g.20gb"]


def test_what_runs_stays_and_newcomers_go_beside_it() -> None:
    fleet = (gpu("a", runs("1g.10gb@2", "chat-0")), gpu("b"))
    made = plan(Problem(fleet, (wants("chat", SMALL, replicas=2),)))
    assert "a/1g.10gb@2" in seats(made, "chat")
    assert [(d.action, d.subject) for d in made.decisions] == [("keep", "chat-0"), ("add", "chat-1")]
    assert not made.by_gpu["b"].used


def test_price_comes_before_disturbance_unless_the_order_says_otherwise() -> None:
    fleet = (gpu("a", runs("1g.10gb@0", "chat-0")), gpu("b", runs("1g.10gb@0", "chat-1")))
    problem = Problem(fleet, (wants("chat", SMALL, replicas=2),))
    moved = plan(problem)
    assert moved.price_per_hour == 1.0
    assert [d.action for d in moved.decisions] == ["keep", "move"]
    assert "an hour less" in moved.decisions[1].reason
    order = (Objective.DEMAND, Objective.DISTURBANCE, Objective.PRICE, Objective.FRAGMENTATION)
    stayed = plan(replace(problem, order=order))
    assert not stayed.changed
    assert level(stayed, Objective.PRICE) == 2.0


def test_the_replica_with_the_most_requests_is_the_last_to_go() -> None:
    fleet = (gpu("a", runs("1g.10gb@0", "chat-0", 1), runs("1g.10gb@1", "chat-1", 9), runs("1g.10gb@2", "chat-2", 4)),)
    made = plan(Problem(fleet, (wants("chat", SMALL, replicas=1),)))
    assert {d.subject: d.action for d in made.decisions} == {"chat-0": "stop", "chat-1": "keep", "chat-2": "stop"}


def test_idle_instances_are_used_before_anything_is_created_and_stay_if_not_needed() -> None:
    fleet = (gpu("a", idle("1g.10gb@0"), idle("2g.20gb@2")),)
    made = plan(Problem(fleet, (wants("chat", SMALL),)))
    assert [(str(s.placement), s.change) for s in made.gpus[0].slices] == [
        ("1g.10gb@0", "reuse"),
        ("2g.20gb@2", "idle"),
    ]
    assert made.gpus[0].changes == 0


def test_a_card_can_be_used_whole_and_is_recut_for_that() -> None:
    fleet = (gpu("a", idle("1g.10gb@0")),)
    made = plan(Problem(fleet, (wants("big", on("a100-80gb", "gpu")),)))
    assert seats(made, "big") == ["a/gpu@0"]
    assert made.gpus[0].destroyed == (Placement(0, "1g.10gb"),)
    assert made.after()[0].instances == (Instance(WHOLE, "big-0", "big"),)
    assert not plan(Problem(made.after(), (wants("big", on("a100-80gb", "gpu")),))).changed


def test_a_card_without_known_profiles_is_used_whole() -> None:
    fleet = (FleetGpu("l", "L40S"),)
    made = plan(Problem(fleet, (wants("big", Option("L40S", "gpu")),)))
    assert seats(made, "big") == ["l/gpu@0"]


def test_replicas_are_spread_over_gpus_and_nodes() -> None:
    fleet = tuple(gpu(name, node=node) for name, node in (("a", "n0"), ("b", "n0"), ("c", "n1"), ("d", "n1")))
    made = plan(Problem(fleet, (wants("chat", SMALL, replicas=4, max_per_gpu=1),)))
    assert len({s.split("/")[0] for s in seats(made, "chat")}) == 4
    made = plan(Problem(fleet, (wants("chat", SMALL, replicas=4, max_per_node=2),)))
    assert Counter("n0" if s[0] in "ab" else "n1" for s in seats(made, "chat")) == {"n0": 2, "n1": 2}
    assert made.price_per_hour == 2.0


def test_without_a_limit_replicas_still_go_to_different_gpus_where_that_costs_nothing() -> None:
    fleet = (gpu("a"), gpu("b"))
    full = tuple(wants(name, SMALL, replicas=7) for name in ("chat", "code"))
    made = plan(Problem(fleet, full))
    assert {s[0] for s in seats(made, "chat")} == {"a", "b"}


def test_nothing_comes_to_a_cordoned_gpu_and_everything_leaves_a_draining_one() -> None:
    held = gpu("a", runs("1g.10gb@0", "chat-0"))
    demand = (wants("chat", SMALL, replicas=2),)
    cordoned = plan(
        Problem((replace(held, cordoned=True), gpu("b", runs("1g.10gb@6", "code-0"))), (*demand, wants("code", SMALL)))
    )
    assert "a/1g.10gb@0" not in seats(cordoned, "code")
    assert len([s for s in seats(cordoned, "chat") if s.startswith("a/")]) <= 1
    draining = plan(Problem((replace(held, draining=True), gpu("b")), demand))
    assert {s[0] for s in seats(draining, "chat")} == {"b"}
    assert "draining" in draining.why("chat")[0].reason


def test_what_stops_on_a_cordoned_gpu_is_free_again_and_the_rest_stays() -> None:
    held = gpu("a", runs("1g.10gb@0", "chat-0"), runs("1g.10gb@1", "chat-1"))
    made = plan(Problem((replace(held, cordoned=True),), (wants("chat", SMALL, replicas=1),)))
    assert len(seats(made, "chat")) == 1
    assert level(made, Objective.FRAGMENTATION) == level(
        plan(Problem((held,), (wants("chat", SMALL),))), Objective.FRAGMENTATION
    )
    ended = plan(Problem((replace(held, cordoned=True),), (wants("chat", replicas=0),)))
    assert (seats(ended, "chat"), level(ended, Objective.FRAGMENTATION)) == ([], 0.0)


def test_a_reserved_slice_is_made_once_and_never_touched_again() -> None:
    constraints = Constraints(reserve=(Reservation("4g.40gb", 1, "fine-tuning"),))
    demand = (wants("chat", on("a100-80gb", "3g.40gb"), replicas=2),)
    made = plan(Problem((gpu("a"), gpu("b")), demand, constraints))
    held = [(g.gpu.id, s) for g in made.gpus for s in g.slices if s.reserved]
    assert [(s.placement.profile, s.reserved) for _, s in held] == [("4g.40gb", "fine-tuning")]
    assert [d.action for d in made.why("fine-tuning")] == ["reserve"]
    again = plan(Problem(made.after(), (wants("chat", on("a100-80gb", "7g.80gb"), replicas=2),), constraints))
    assert [(g.gpu.id, s.placement) for g in again.gpus for s in g.slices if s.reserved] == [
        (i, s.placement) for i, s in held
    ]
    assert [u.demand for u in again.unmet] == ["chat"]


def test_headroom_is_planned_for_on_top_of_every_rate() -> None:
    demand = (wants("chat", SMALL, rate=4.0),)
    assert len(seats(plan(Problem((gpu("a"),), demand)), "chat")) == 4
    assert len(seats(plan(Problem((gpu("a"),), demand, Constraints(headroom_ratio=0.5))), "chat")) == 6


def test_a_limit_on_layout_changes_leaves_the_rest_for_the_next_run() -> None:
    demand = (wants("chat", SMALL, replicas=5),)
    constraints = Constraints(max_layout_changes=3)
    first = plan(Problem((gpu("a"),), demand, constraints))
    assert len(seats(first, "chat")) == 3
    assert first.unmet[0].remedies[0] == "allow more than 3 layout changes (max_layout_changes)"
    second = plan(Problem(first.after(), demand, constraints))
    assert len(seats(second, "chat")) == 5
    assert second.unmet == ()


def test_what_cannot_all_be_met_is_met_by_priority() -> None:
    full = on("a100-80gb", "7g.80gb")
    made = plan(Problem((gpu("a"),), (wants("batch", full), wants("live", full, priority=5))))
    assert seats(made, "live") == ["a/7g.80gb@0"]
    assert [u.demand for u in made.unmet] == ["batch"]


def test_the_smallest_changes_that_would_help_are_tried_out_not_guessed() -> None:
    fleet = (gpu("a", price=2.0), gpu("h", product="h100-sxm", price=4.0))
    big = wants(
        "big",
        on("a100-80gb", "7g.80gb"),
        on("h100-sxm", "7g.80gb"),
        replicas=3,
        alternatives=(
            Alternative("max_model_len: 6144", on("h100-sxm", "3g.40gb")),
            Alternative("kv_cache_dtype: fp8", on("a100-80gb", "4g.40gb")),
            Alternative("max_model_len: 100", on("h200", "1g.18gb")),
        ),
    )
    made = plan(Problem(fleet, (big, wants("small", on("a100-80gb", "2g.20gb"), priority=1))))
    missing = next(u for u in made.unmet if u.demand == "big")
    assert (missing.missing, missing.served, missing.unit) == (2.0, 1.0, "replicas")
    assert "small" in missing.reason
    assert missing.remedies[:2] == ("2 more A100-80GB", "2 more H100-80GB-SXM")
    assert "max_model_len: 6144" not in missing.remedies, "2 x 3g on the H100 are still one too few"
    assert "max_model_len: 100" not in missing.remedies
    assert missing.remedies[-1] == "replicas: 1"


def test_an_alternative_that_helps_by_itself_is_named() -> None:
    big = wants("big", on("a100-80gb", "7g.80gb"), alternatives=(Alternative("fp8 KV", on("a100-80gb", "3g.40gb")),))
    small = wants("small", on("a100-80gb", "4g.40gb"), priority=1)
    made = plan(Problem((gpu("a"),), (big, small)))
    assert made.unmet[0].remedies == ("1 more A100-80GB", "fp8 KV")


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        (wants("chat"), "no slice of any GPU here holds it"),
        (wants("chat", on("h200", "1g.18gb")), "there is no such GPU here"),
        (wants("chat", SMALL, replicas=3, max_per_gpu=1), "at most 1 on the one GPU that there is for it is allowed"),
        (
            wants("chat", SMALL, replicas=3, max_per_node=2),
            "at most 2 on the one node that there is for it are allowed",
        ),
        (wants("chat", SMALL, rate=9.0, max_replicas=4), "at most 4 replicas are allowed, which serve 4 of 9"),
        (wants("chat", on("a100-80gb", "gpu")), "no room left: taken by code"),
    ],
)
def test_what_is_in_the_way_is_named(demand: ModelDemand, reason: str) -> None:
    code = wants("code", SMALL, priority=1)
    made = plan(Problem((gpu("a", runs("1g.10gb@0", "code-0")),), (demand, code)))
    assert [u.demand for u in made.unmet] == ["chat"]
    assert reason in made.unmet[0].reason
    assert not [r for r in made.unmet[0].remedies if r in ("replicas: 0", "ask for 0 requests/s")], "that serves nobody"


def test_of_shorter_contexts_the_longest_that_helps_is_named() -> None:
    places = (on("a100-80gb", "1g.10gb"), on("a100-80gb", "3g.40gb"))
    shorter = zip((7936, 10240), places, strict=True)
    big = wants("big", alternatives=tuple(Alternative(f"max_model_len: {tokens}", place) for tokens, place in shorter))
    made = plan(Problem((gpu("a"),), (big,)))
    assert made.unmet[0].remedies == ("max_model_len: 10240",)


def test_a_closed_gpu_that_would_do_is_named() -> None:
    made = plan(Problem((replace(gpu("a"), cordoned=True),), (wants("chat", SMALL),)))
    assert "cordoned" in made.unmet[0].reason
    assert "take a out of fleet.cordon" in made.unmet[0].remedies


def test_a_plan_for_another_state_is_refused_with_the_difference() -> None:
    fleet = (gpu("a"), gpu("b"))
    made = plan(Problem(fleet, (wants("chat", SMALL),)))
    then = states(g.gpu for g in made.gpus)
    check_current(then, states(fleet))
    check_current(then, states(reversed(fleet)))
    with pytest.raises(StalePlan, match="GPU b is gone"):
        check_current(then, states(fleet[:1]))
    with pytest.raises(StalePlan, match="GPU a has changed, GPU c has come"):
        check_current(then, states((gpu("a", idle("1g.10gb@0")), gpu("b"), gpu("c"))))
    with pytest.raises(StalePlan, match="GPU c has come, GPU d has come, GPU e has come, and 1 more"):
        check_current(then, states((*fleet, *map(gpu, "cdef"))))


def test_an_empty_question_has_an_empty_answer() -> None:
    made = plan(Problem((), ()))
    assert (made.gpus, made.decisions, made.unmet, made.changed, made.optimal) == ((), (), (), False, True)


def test_a_large_fleet_is_planned_to_a_proven_hundredth() -> None:
    fleet = tuple(
        gpu(f"{p}-{n:03d}", product=p, price=c) for p, c in (("a100-80gb", 1.5), ("h100-sxm", 2.5)) for n in range(100)
    )
    some = tuple(
        wants(
            f"m{n:02d}",
            *(on(p, q) for p in ("a100-80gb", "h100-sxm") for q in ("1g.10gb", "1g.20gb")[n % 2 :]),
            replicas=n + 4,
        )
        for n in range(30)
    )
    made = plan(Problem(fleet, some))
    assert made.gap <= 0.01
    assert made.unmet == ()
    grown = (*some[:-1], replace(some[-1], replicas=40))
    again = plan(Problem(made.after(), grown))
    assert {d.action for d in again.decisions} == {"keep", "add"}


def test_the_json_is_complete() -> None:
    public = plan(Problem((gpu("a"),), (wants("chat", SMALL),))).as_public()
    assert set(public) == {
        "gpus", "decisions", "unmet", "levels", "price_per_hour", "optimal", "lower_bound", "gap", "seconds", "fingerprint", "reproducible",
        "online",
    }  # fmt: skip


def busy_week(**more: object) -> Problem:
    """Five GPUs of two products that have to serve another mixture than the one they run."""
    fleet = tuple(gpu(name) for name in "abc") + tuple(gpu(name, product="h100-sxm", price=2.0) for name in "de")
    options = tuple(
        on(p, q, c)
        for p, k in (("a100-80gb", 1.0), ("h100-sxm", 1.7))
        for q, c in (("1g.10gb", k), ("2g.20gb", 2.1 * k))
    )
    some = tuple(wants(f"m{n}", *options, rate=2.3 + n) for n in range(4))
    made = plan(Problem(fleet, some))
    return Problem(made.after(), tuple(replace(d, rate=6.9 - (d.rate or 0.0)) for d in some), **more)  # type: ignore[arg-type]


def test_a_starved_process_makes_the_same_plan() -> None:
    """Whatever the clock shows while it works: searches are ended by what they have done, not by the time it took."""
    problem = busy_week()
    ticking, hurrying = iter(range(10**9)), iter(range(0, 10**9, 7))
    unhurried, starved = plan(problem, clock=lambda: 0.0), plan(problem, clock=lambda: next(ticking) / 1000)
    assert unhurried == starved == plan(problem, clock=lambda: next(hurrying) / 1000)
    assert starved.reproducible
    assert starved.as_public() == unhurried.as_public()


def test_work_that_is_limited_ends_every_run_at_the_same_place() -> None:
    problem, few = busy_week(), Limits(work=30_000)
    assert plan(problem, few) == plan(problem, few)
    assert plan(problem, few).reproducible


def test_a_plan_that_the_clock_ended_says_so() -> None:
    problem, looks = busy_week(), 0

    def counting() -> float:
        nonlocal looks
        looks += 1
        return 0.0

    plan(problem, clock=counting)
    at_the_last_look = iter([0.0] * (looks - 1))
    made = plan(problem, clock=lambda: next(at_the_last_look, 1e6))
    assert not made.reproducible
    assert made.as_public()["reproducible"] is False


def test_a_reserved_slice_that_breaks_up_an_otherwise_empty_fleet_is_no_obstacle() -> None:
    """No layout with it is free of fragmentation, so none is looked for among those that are."""
    a30 = CATALOGUE.product("a30")
    tuning = Instance(Placement.parse("1g.6gb@1"), reserved="tuning")
    fleet = (FleetGpu("a", a30.name, a30, instances=(tuning,)),)
    made = plan(Problem(fleet, (wants("chat", on("a30", "2g.12gb")),)))
    assert seats(made, "chat") == ["a/2g.12gb@2"]
    assert all(x.optimal for x in made.levels)
    draining = (replace(fleet[0], draining=True), FleetGpu("b", a30.name, a30))
    assert seats(plan(Problem(draining, (wants("chat", on("a30", "2g.12gb")),))), "chat") == ["b/2g.12gb@0"]


def test_no_replica_that_nobody_needs_is_started_on_an_idle_slice_for_the_sake_of_tidiness() -> None:
    """An idle slice counts as free, and fragmentation is less where it is taken: not worth an engine."""
    held = (runs("3g.40gb@0", "big-0"), runs("1g.10gb@4", "chat-0"), idle("1g.10gb@5"), idle("1g.10gb@6"))
    chat = wants("chat", SMALL, on("a100-80gb", "2g.20gb", 2.0), rate=1.0)
    kept = wants("big", on("a100-80gb", "3g.40gb"))
    made = plan(Problem((gpu("a", *held),), (chat, kept, wants("new", SMALL))))
    assert len(seats(made, "chat")) == 1
    assert all(x.optimal for x in made.levels)


def test_a_plan_says_what_it_disturbs_where_a_limit_per_gpu_moves_a_replica() -> None:
    """Two of a model run on one GPU where one is allowed: one of them moves, though its slice serves somebody else."""
    fleet = (gpu("a", runs("1g.10gb@0", "chat-0"), runs("1g.10gb@1", "chat-1")), gpu("b", runs("1g.10gb@0", "code-0")))
    made = plan(Problem(fleet, (wants("chat", SMALL, replicas=2, max_per_gpu=1), wants("code", SMALL, replicas=2))))
    assert [d.subject for d in made.decisions if d.action == "move"] == ["chat-1"]
    assert level(made, Objective.DISTURBANCE) == pytest.approx(1.001)
    assert all(x.optimal for x in made.levels)
