"""`fleet.layouts` on the nodes of a cluster: whom a rule means, what is cut when a machine joins, and what is never taken away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from placement.cluster.eligible import in_use
from placement.cluster.laying_out import LayingOut, read_laid_out
from placement.cluster.layouts import differences, lay_out, layouts_in, named_by_nobody, not_here, rules_here
from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.testing import FakeDriver, made_gpu
from placement.gpu_slices import slices_of
from placement.partition import LayoutRule

HALVES = ["3g.40gb@0", "3g.40gb@4"]


def rule(layout: Any = tuple(HALVES), **more: Any) -> LayoutRule:
    return LayoutRule.model_validate({"layout": layout} | more)


def holds(driver: FakeDriver, index: int) -> list[str]:
    return sorted(i.name for i in driver.gpus[index].instances)


def told(*rules: LayoutRule) -> str:
    return json.dumps({"version": "v1", "fleet": {"layouts": [r.model_dump(mode="json") for r in rules]}})


def node(count: int = 2, *first: str) -> FakeDriver:
    return FakeDriver((made_gpu(0, holds=first), *(made_gpu(i) for i in range(1, count))))


def test_an_index_is_that_of_every_node_and_a_uuid_is_one_gpu_of_one() -> None:
    rules = [rule(gpus=[0]), rule({"1g.10gb": 7}, gpus=["GPU-7"])]
    for driver in (node(), node()):
        assert not lay_out(driver, rules, ()).why
        assert (holds(driver, 0), holds(driver, 1)) == (HALVES, [])
    other = FakeDriver((made_gpu(7),))
    assert lay_out(other, rules, ()).said == ("GPU 7 (H100-80GB-SXM) cut as fleet.layouts says: " + _ones(),)


def _ones() -> str:
    return " ".join(f"1g.10gb@{i}" for i in range(7))


def test_a_product_is_cut_where_it_is_and_the_last_rule_that_names_a_gpu_counts() -> None:
    rules = [rule(products=["h100-sxm"]), rule({"1g.10gb": 1}, gpus=[1])]
    mixed = FakeDriver((made_gpu(0), made_gpu(1), made_gpu(2, "a30")))
    assert not lay_out(mixed, rules, ()).why
    assert holds(mixed, 0) == HALVES
    assert len(holds(mixed, 1)) == 1
    assert holds(mixed, 2) == []


def test_only_what_no_node_has_is_a_mistake() -> None:
    rules = [rule(gpus=[0, 5]), rule(gpus=["GPU-1", "GPU-9"]), rule(products=["a30"], layout=["1g.6gb"])]
    small, large = (made_gpu(0),), tuple(made_gpu(i) for i in range(6))
    assert not_here(rules, large) == ("fleet.layouts[1].gpus: GPU-9",)
    (said,) = named_by_nobody([not_here(rules, small), not_here(rules, large)])
    assert said.startswith("fleet.layouts[1].gpus: no node of the cluster has a GPU GPU-9")
    assert "sliceway plan CONFIG --ray HOST:PORT" in said
    assert len(named_by_nobody([not_here(rules, small)])) == 3
    assert named_by_nobody([]) == ()
    assert rules_here(rules, small)[0].gpus == (0,)


def test_a_slice_that_has_a_replica_stays_and_the_other_gpus_are_cut() -> None:
    driver = node(2, "1g.10gb@6")
    found = lay_out(driver, [rule()], {"GPU-0/1g.10gb@6", "GPU-1/1g.10gb@0"})
    assert holds(driver, 0) == ["1g.10gb@6"], "nothing was touched there"
    assert holds(driver, 1) == HALVES
    assert set(found.why) == {"GPU-0"}
    assert "GPU-0/1g.10gb@6 would have to go, and has a replica" in found.why["GPU-0"]
    assert "sliceway apply CONFIG --ray HOST:PORT --drain" in found.why["GPU-0"]


def test_a_whole_card_that_has_a_replica_stays_one() -> None:
    driver = FakeDriver((made_gpu(0, mig=False),))
    assert "GPU-0 would have to go, and has a replica" in lay_out(driver, [rule()], {"GPU-0"}).why["GPU-0"]


def test_what_stays_is_not_touched_whoever_is_on_it() -> None:
    driver = node(1, "3g.40gb@4", "1g.10gb@0")
    kept = driver.gpus[0].instances[0].id
    assert not lay_out(driver, [rule()], {"GPU-0/3g.40gb@4"}).why
    assert holds(driver, 0) == HALVES
    assert kept in {i.id for i in driver.gpus[0].instances}


def test_mig_mode_is_never_switched_by_joining() -> None:
    driver = FakeDriver((made_gpu(0, mig=False), made_gpu(1)))
    found = lay_out(driver, [rule()], ())
    assert not driver.gpus[0].mig
    assert holds(driver, 1) == HALVES
    assert "MIG would have to be switched on" in found.why["GPU-0"]
    assert "--ray HOST:PORT --allow-mode-change" in found.why["GPU-0"]


def test_what_this_product_has_not_is_told_with_the_rule_and_cuts_nothing() -> None:
    driver = FakeDriver((made_gpu(0, "a30"), made_gpu(1)))
    found = lay_out(driver, [rule()], ())
    assert set(found.why) == {""}
    assert "fleet.layouts[0] on GPU 0 (A30" in found.why[""]
    assert holds(driver, 1) == []


def test_it_is_tried_once_for_each_time_that_the_machine_joins(tmp_path: Path) -> None:
    driver, path = node(1), tmp_path / "layouts.json"
    first = LayingOut(path, "j1", driver)
    assert (first.done, first.due) == (False, False), "nothing is known yet"
    first.aim(told(rule()))
    assert first.due
    assert first.told(driver.gpus) == (
        "fleet.layouts is carried out first, when engines that ran here before, if any, have ended",
    )
    first.carry_out(driver.gpus, ())
    assert (first.done, first.due, first.told(driver.gpus)) == (True, False, ())
    again = LayingOut(path, "j1", driver)
    again.aim(told(rule(["1g.10gb@0"])))
    assert not again.due, "an agent that Ray starts again cuts nothing because of that"
    (said,) = again.told(driver.gpus)
    assert said.startswith("GPU 0 (H100-80GB-SXM) is not cut as fleet.layouts[0] says, it holds 3g.40gb@0 3g.40gb@4: ")
    assert "sliceway apply CONFIG --ray HOST:PORT" in said
    other = LayingOut(path, "j2", driver)
    other.aim(told(rule(["1g.10gb@0"])))
    assert other.due
    other.carry_out(driver.gpus, ())
    assert holds(driver, 0) == ["1g.10gb@0"]
    assert read_laid_out(path) is not None


def test_why_not_is_told_for_as_long_as_it_is_not_so_and_for_these_rules_alone(tmp_path: Path) -> None:
    driver = node(1, "1g.10gb@6")
    mine = LayingOut(tmp_path / "layouts.json", "j", driver)
    mine.aim(told(rule()))
    mine.carry_out(driver.gpus, {"GPU-0/1g.10gb@6"})
    assert "has a replica" in mine.told(driver.gpus)[0]
    mine.aim(told(rule(["7g.80gb@0"])))
    assert "has a replica" not in mine.told(driver.gpus)[0]
    mine.aim(told(rule(["1g.10gb@6"])))
    assert mine.told(driver.gpus) == ()


@pytest.mark.parametrize(("join", "has_driver"), [("", True), ("j", False)])
def test_who_cuts_nothing_is_done(tmp_path: Path, join: str, has_driver: bool) -> None:
    mine = LayingOut(tmp_path / "layouts.json", join, node(1) if has_driver else None)
    mine.aim(told(rule()))
    assert (mine.done, mine.due) == (True, False)


def test_a_node_that_offers_cores_cuts_no_gpu_that_it_may_have(tmp_path: Path) -> None:
    driver = node(1)
    mine = LayingOut(tmp_path / "layouts.json", "j", driver)
    mine.aim(told(rule(gpus=[0])))
    mine.carry_out((), ())
    assert holds(driver, 0) == []
    assert mine.told(()) == ()
    assert mine.missing(()) == ("fleet.layouts[0].gpus: 0",)


def test_rules_that_this_version_does_not_take_cut_nothing() -> None:
    assert layouts_in('{"fleet": {"layouts": [{"layout": ["nonsense"]}]}}') == ()
    assert layouts_in('{"fleet": {"layouts": 3}}') == ()
    assert layouts_in("") == ()
    assert len(layouts_in(told(rule(), rule(gpus=[1])))) == 2


def test_nobody_is_seated_where_a_slice_may_go_at_any_moment() -> None:
    gpu = made_gpu(0, holds=("1g.10gb@0", "1g.10gb@1", "1g.10gb@2", "1g.10gb@3", "1g.10gb@4"))
    report = NodeReport(
        node="a",
        address="",
        versions=Versions(sliceway="1", python="3.11", ray="2"),
        boot="b",
        slices=slices_of(gpu),
        running={"chat-0": "GPU-0/1g.10gb@1", "gone-0": "GPU-0/1g.10gb@3", "chat-7": "GPU-0/1g.10gb@4"},
        laid_out=False,
    )
    seats = {
        "chat-1": Seat(replica="chat-1", model="chat", node="a", slice_id="GPU-0/1g.10gb@2"),
        "chat-7": Seat(replica="chat-7", model="chat", node="b", slice_id="GPU-0/1g.10gb@0"),
    }
    assert [s.id for s in in_use(report, seats, {"chat"}).slices] == ["GPU-0/1g.10gb@1", "GPU-0/1g.10gb@2"]
    assert in_use(report.model_copy(update={"laid_out": True}), {}, ()).slices == report.slices


def test_differences_name_the_node_in_a_cluster_and_are_none_where_all_is_so() -> None:
    assert differences((made_gpu(0, holds=HALVES),), [rule()], {}) == ()
    (said,) = differences((made_gpu(0, mig=False),), [rule()], {"": "no right"})
    assert said == "GPU 0 (H100-80GB-SXM) is not cut as fleet.layouts[0] says, it holds no MIG: no right"
