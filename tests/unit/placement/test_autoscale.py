"""Autoscaling by example: when replicas come and go, how models sleep and wake, and when GPUs are cut anew."""

from __future__ import annotations

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.geometry import Placement
from placement.autoscale import Scaled, ScaledModel, Signals, WakeFigures, choose_sleep, decide
from placement.autoscale.repartition import rescale
from placement.planner.types import FleetGpu, Instance, ModelDemand, Option, Problem
from placement.policy import AutoscalePolicy
from placement.workload.fleet import only

POLICY = AutoscalePolicy()
CHAT = ScaledModel("chat", 1, 8, capacity_per_second=2.0, max_num_seqs=16, ttft_slo_seconds=0.5)
H100 = load_catalogue().product("h100-sxm")


def after(seconds: float, signals: Signals, start: Scaled, *, model: ScaledModel = CHAT, since: float = 0.0) -> Scaled:
    state, now = start, since
    while now <= since + seconds:
        state = decide(POLICY, model, signals, state, now)
        now += 1.0
    return state


def test_replicas_come_after_a_lasting_rise_and_not_before() -> None:
    busy = Signals(arrivals_per_second=7.0)
    assert after(POLICY.scale_up_after - 1, busy, Scaled(1)).replicas == 1
    state = after(POLICY.scale_up_after, busy, Scaled(1))
    assert state.replicas == 4
    assert "7.00 requests/s arrive" in state.reason


def test_replicas_go_much_later_than_they_came() -> None:
    quiet = Signals(arrivals_per_second=0.5)
    assert after(POLICY.scale_down_after - 1, quiet, Scaled(4)).replicas == 4
    state = after(POLICY.scale_down_after, quiet, Scaled(4))
    assert state.replicas == 1
    assert "1 would do" in state.reason


def test_a_queue_counts_even_where_nobody_said_how_long_requests_are() -> None:
    model = ScaledModel("chat", 1, 8, max_num_seqs=16)
    state = after(POLICY.scale_up_after, Signals(queued=40, running=16), Scaled(1), model=model)
    assert state.replicas == 5


def test_answers_that_are_late_ask_for_one_more_than_there_is() -> None:
    late = Signals(arrivals_per_second=3.0, ttft_seconds=0.9)
    assert after(POLICY.scale_up_after, late, Scaled(2)).replicas == 3
    idle = Signals(arrivals_per_second=0.1, ttft_seconds=0.9)
    assert after(POLICY.scale_up_after, idle, Scaled(2)).replicas == 2, "late, but not for want of replicas"


def test_bounds_that_changed_count_at_once() -> None:
    assert decide(POLICY, CHAT, Signals(), Scaled(20), 0.0).replicas == 8
    assert decide(POLICY, ScaledModel("chat", 3, 8), Signals(), Scaled(1), 0.0).replicas == 3


def test_a_model_without_requests_falls_asleep_and_the_first_one_wakes_it() -> None:
    model = ScaledModel("chat", 0, 8, 2.0)
    resting = Signals(idle_seconds=POLICY.sleep_after - 400)
    assert after(POLICY.scale_down_after, resting, Scaled(1), model=model).replicas == 1
    asleep = after(POLICY.scale_down_after, Signals(idle_seconds=POLICY.sleep_after), Scaled(1), model=model)
    assert (asleep.replicas, asleep.reason) == (0, "no request came for a while")
    still = decide(POLICY, model, Signals(idle_seconds=2000), asleep, 400.0)
    assert still.replicas == 0
    woken = decide(POLICY, model, Signals(queued=1), still, 401.0)
    assert (woken.replicas, woken.reason) == (1, "a request wakes it")


def test_a_model_that_waits_for_a_crowd_wakes_with_enough() -> None:
    model = ScaledModel("chat", 0, 8, 2.0, max_num_seqs=16)
    assert decide(POLICY, model, Signals(queued=60), Scaled(0), 0.0).replicas == 5


def test_time_that_runs_backwards_starts_over() -> None:
    state = after(10, Signals(arrivals_per_second=9.0), Scaled(1))
    assert decide(POLICY, CHAT, Signals(arrivals_per_second=9.0), state, 0.0).looks[0].at_seconds == 0.0


@pytest.mark.parametrize(
    ("figures", "free", "wanted", "sleep", "said"),
    [
        (WakeFigures(2**34, 2.0, 60.0), 2**35, False, "sleep-mode", "wakes in 2.0 s"),
        (WakeFigures(2**34, 9.0, 4.0), 2**35, False, "stop", "a stopped engine wakes in 4.0 s"),
        (WakeFigures(2**34), 2**35, False, "sleep-mode", "it wakes in 2.6 s (estimated), a stopped engine in 62.2 s"),
        (WakeFigures(2**34), 2**33, False, "stop", "do not fit the host's free memory"),
        (WakeFigures(2**34, 2.0, 60.0), 2**35, True, "stop", "another model waits"),
        (WakeFigures(2**34, 2.0, 60.0, supported=False), 2**35, False, "stop", "no sleep mode"),
    ],
)
def test_a_model_sleeps_in_the_way_that_wakes_faster(
    figures: WakeFigures, free: int, wanted: bool, sleep: str, said: str
) -> None:
    choice = choose_sleep(POLICY, figures, host_free_bytes=free, slice_wanted=wanted)
    assert choice.sleep == sleep
    assert said in choice.reason


def test_what_the_configuration_asks_for_counts_where_it_is_possible() -> None:
    figures = WakeFigures(2**34, 9.0, 4.0)
    asked = AutoscalePolicy(sleep="sleep-mode")
    assert choose_sleep(asked, figures, host_free_bytes=2**35).sleep == "sleep-mode"
    assert choose_sleep(asked, figures, host_free_bytes=0).sleep == "stop"
    assert choose_sleep(AutoscalePolicy(sleep="stop"), figures, host_free_bytes=2**35).sleep == "stop"


def fleet(*, recut: bool) -> Problem:
    """Two half cards serve; a third replica of chat needs a slice that only cutting the second card gives."""
    held = tuple(Instance(p, f"chat-{n}", "chat", requests=3) for n, p in enumerate(_at("3g.40gb@0")))
    first = FleetGpu("A", H100.name, H100, instances=held, whole=False)
    second = FleetGpu("B", H100.name, H100, instances=tuple(Instance(p) for p in _at("1g.10gb@0")), whole=False)
    gpus = (first, second)
    if not recut:
        gpus = tuple(
            FleetGpu(
                g.id, g.product, only(H100, [i.placement for i in g.instances]), instances=g.instances, whole=False
            )
            for g in gpus
        )
    demand = ModelDemand("chat", "chat", (Option(H100.name, "3g.40gb", 2.0),), rate=6.0)
    return Problem(gpus, (demand,))


def _at(*places: str) -> list[Placement]:
    return [Placement.parse(p) for p in places]


def test_cutting_anew_is_proposed_where_free_slices_do_not_do() -> None:
    found = rescale(fleet(recut=False), fleet(recut=True), POLICY)
    assert found.plan.unmet
    assert found.proposal is not None
    assert found.proposal.worthwhile
    assert not found.proposal.automatic, "only shown, unless the configuration allows more"
    assert found.proposal.gained > 0
    assert found.proposal.disturbed == 0, "room was found without moving anybody"
    allowed = AutoscalePolicy(repartition="automatic")
    assert rescale(fleet(recut=False), fleet(recut=True), allowed).proposal.automatic  # type: ignore[union-attr]
    assert found.proposal.as_public()["worthwhile"] is True


def test_a_gain_that_comes_too_late_is_not_worth_it() -> None:
    hasty = AutoscalePolicy.model_validate({"repartition_horizon": "10s", "repartition": "automatic"})
    proposal = rescale(fleet(recut=False), fleet(recut=True), hasty).proposal
    assert proposal is not None
    assert not proposal.worthwhile
    assert not proposal.automatic


def test_free_slices_are_enough_where_they_are() -> None:
    enough = fleet(recut=True)
    assert rescale(enough, enough, POLICY).proposal is None
