"""`fleet.layouts` as an operator gets it wrong, and which GPUs a rule means."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from model_registry.catalogue import MIB, load_catalogue
from model_registry.errors import ConfigError, UnknownProfile
from model_registry.geometry import Placement
from placement.gpus import GpuState, MigMode
from placement.partition.plan import wanted_by_gpu
from placement.partition.rules import LayoutRule
from placement.schema import FleetConfig, SimulatedFleet

CATALOGUE = load_catalogue()


def gpu(index: int = 0, product: str = "h100-sxm", **changes: Any) -> GpuState:
    known = CATALOGUE.product(product)
    settings: dict[str, Any] = {
        "uuid": f"GPU-{index}",
        "index": index,
        "name": known.nvml_names[0],
        "product": known.name,
        "memory_bytes": 80_000 * MIB,
        "usable_bytes": 79_000 * MIB,
        "driver": "610.43.02",
        "pci_device_id": int(known.pci_device_ids[0], 16) << 16 | 0x10DE,
        "geometry": known,
        "mode": MigMode(True, True),
    }
    return GpuState(**settings | changes)


PLAIN = GpuState("GPU-9", 9, "NVIDIA L4", "NVIDIA L4", 24_000 * MIB, 23_000 * MIB, "610.43.02")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"layout": {"1g.10bg": 4}}, "Did you mean 1g.10gb"),
        ({"gpus": ["h100-sxm"], "layout": {"1g.5gb": 1}}, "H100-80GB-SXM has no profile '1g.5gb'"),
        ({"layout": ["3g.40gb@0", "3g.40gb@4", "1g.10gb@6"]}, "both need memory slice 6"),
        ({"gpus": ["h100-sxm"], "layout": {"3g.40gb": 2, "1g.10gb": 1}}, "3g.40gb@0     X  #  #  #"),
        ({"gpus": ["h100-sxm"], "layout": ["3g.40gb@2"]}, "It can start at 0, 4"),
        ({"gpus": ["h100-smx"], "layout": {}}, "Did you mean h100-sxm"),
        ({"products": ["h100"]}, "Say which"),
        ({"gpus": [], "layout": {}}, "at least one GPU"),
        ({"mig": False, "layout": {"1g.10gb": 1}}, "a layout needs MIG"),
        ({"layout": {"1g.10gb": 1, "1g.18gb": 1}}, "no GPU product has all of"),
        ({"gpus": ["h100-sxm"], "layout": {"1g.10gb+me": 2}}, "at most 1 can be on one GPU"),
        ({"layout": {"1g.10gb": -1}}, "greater than or equal to 0"),
        ({"layout": ["1g.10gb@x"]}, "not a placement"),
        ({"layout": {"1g.10gb": 8}}, "finds no room"),
        ({"layout": {"1g.10gb": 8}}, "Nor on any other product with these profiles: A100-80GB, H100-80GB-SXM"),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_meant(rule: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        LayoutRule.model_validate(rule)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    "rule",
    [
        {"layout": {"1g.10gb": 4, "3g.40gb": 1}},
        {"layout": ["3g.40gb@4", "1g.10gb", "1g.10gb"]},
        {"layout": {"1g.12gb": 1}, "gpus": ["rtx-pro-5000"]},  # its starts are not published: the driver knows them
        {"layout": {}},
        {"gpus": [0, "GPU-abc", "a30", "0x2330"], "mig": False},
    ],
)
def test_what_can_be_is_taken(rule: dict[str, Any]) -> None:
    assert LayoutRule.model_validate(rule)


def test_counts_of_none_are_no_instances() -> None:
    assert LayoutRule(layout={"1g.10gb": 0, "3g.40gb": 1}).entries == (("3g.40gb", 1),)


def test_the_last_rule_that_names_a_gpu_counts_and_others_stay() -> None:
    gpus = [gpu(0), gpu(1), gpu(2, "a30"), PLAIN]
    rules = [
        LayoutRule(gpus=("h100-sxm",), layout={"1g.10gb": 7}),
        LayoutRule(gpus=("GPU-1",), layout=("3g.40gb@4",)),
    ]
    wanted = wanted_by_gpu(gpus, rules)
    assert set(wanted) == {"GPU-0", "GPU-1"}
    assert wanted["GPU-0"].counts == {"1g.10gb": 7}
    assert wanted["GPU-1"].exact == (Placement(4, "3g.40gb"),)
    assert wanted["GPU-1"].where == "fleet.layouts[1]"


def test_all_passes_over_gpus_without_mig() -> None:
    assert set(wanted_by_gpu([gpu(0), PLAIN], [LayoutRule(layout={"1g.10gb": 1})])) == {"GPU-0"}


def test_kinds_of_gpus_may_be_absent_but_single_ones_not() -> None:
    assert wanted_by_gpu([gpu(0)], [LayoutRule(gpus=("a30", "0x20B7"), layout={})]) == {}
    for selector in (3, "GPU-nine"):
        with pytest.raises(ConfigError, match=f"there is no GPU {selector}") as refused:
            wanted_by_gpu([gpu(0)], [LayoutRule(gpus=(selector,), layout={})])
        assert "0 = GPU-0" in str(refused.value.remedy)


def test_products_narrow_what_gpus_says() -> None:
    gpus = [gpu(0), gpu(1), gpu(2, "a30")]
    for products in (("h100-sxm",), ("0x233010DE",)):
        rule = LayoutRule(gpus=(1, 2), products=products, layout={"1g.10gb": 1})
        assert set(wanted_by_gpu(gpus, [rule])) == {"GPU-1"}


def test_a_profile_that_the_gpu_has_not_is_told_with_rule_and_gpu() -> None:
    with pytest.raises(UnknownProfile) as refused:
        wanted_by_gpu([gpu(0), gpu(1, "a30")], [LayoutRule(layout={"1g.10gb": 1})])
    assert refused.value.where == "fleet.layouts[0] on GPU 1 (A30-24GB)"


@pytest.mark.parametrize(
    ("simulate", "told"),
    [
        ({"h100-smx": 8}, "Did you mean h100-sxm"),
        ({"rtx-pro-5000": 1}, "cannot be simulated"),
        ({"h100-sxm": 30, "a30": 10}, "not 40"),
        ({"h100-sxm": 0}, "greater than or equal to 1"),
        ({}, "at least 1"),
    ],
)
def test_fleets_that_cannot_be_simulated(simulate: dict[str, int], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SimulatedFleet(simulate=simulate)
    assert told in str(refused.value)


def test_a_simulated_fleet_is_a_way_of_discovery() -> None:
    fleet = FleetConfig.model_validate({"discover": {"simulate": {"h100-sxm": 8, "plain": 1}}})
    assert isinstance(fleet.discover, SimulatedFleet)
    assert fleet.discover.text == "h100-sxm:8,plain:1"
