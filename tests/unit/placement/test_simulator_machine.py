from __future__ import annotations

from pathlib import Path

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.errors import UnknownProduct
from model_registry.geometry import Geometry
from placement.errors import SimulatorError
from placement.simulator.build import Libraries
from placement.simulator.machine import MachineOptions, PlainGpu, describe, drivers_order, parse_fleet, supports_mig
from placement.simulator.simulation import Simulation

CATALOGUE = load_catalogue()


def test_fleets_are_read_as_they_are_written() -> None:
    fleet = parse_fleet(CATALOGUE, "h100-sxm:8, a30 ,plain:2")
    assert [(p.name, n) for p, n in fleet] == [("H100-80GB-SXM", 8), ("A30-24GB", 1), ("NVIDIA L4", 2)]


@pytest.mark.parametrize("text", ["", ",", "h100-sxm:", "h100-sxm:-1", "h100-sxm:1.5", "h100-sxm:99"])
def test_fleets_that_make_no_sense(text: str) -> None:
    with pytest.raises(SimulatorError) as refused:
        parse_fleet(CATALOGUE, text)
    assert "h100-sxm:8" in str(refused.value.remedy)


def test_an_unknown_product_has_the_catalogues_error() -> None:
    with pytest.raises(UnknownProduct):
        parse_fleet(CATALOGUE, "h900:2")


@pytest.mark.parametrize(
    ("profile", "order"),
    [("1g.5gb", [6, 4, 5, 0, 1, 2, 3]), ("2g.10gb", [4, 0, 2]), ("3g.20gb", [4, 0]), ("1g.10gb", [6, 4, 0, 2])],
)
def test_the_order_in_which_a_driver_tries_starts(profile: str, order: list[int]) -> None:
    a100 = CATALOGUE.product("a100-40gb")
    found = drivers_order(Geometry.with_variants(a100), a100.profile(profile))
    assert [o.placement.start for o in found] == order


def test_the_same_arguments_describe_the_same_machine() -> None:
    fleet = parse_fleet(CATALOGUE, "h200:2,plain")
    one, other = describe(fleet, MachineOptions()), describe(fleet, MachineOptions())
    assert one == other
    assert describe(fleet, MachineOptions(seed="another")) != one


def test_every_figure_of_the_catalogue_is_in_the_description() -> None:
    a30 = CATALOGUE.product("a30")
    text = describe([(a30, 1)], MachineOptions()).text.splitlines()
    assert "profile 14 0 1 1 14 4 0 1 1 0 0 0 0 0 5952 1g.6gb" in text
    assert "profile 6 8 2 2 28 1 1 2 2 0 1 1 0 0 11968 2g.12gb+me" in text
    assert [line for line in text if line.startswith("product")] == [
        "product 20B710DE 7 8 0 14 3584 4 4 1 1 24576 512 13 NVIDIA A30"
    ]


def test_gpus_have_their_own_names_and_neighbouring_cores() -> None:
    options = MachineOptions(mig=True, cpus=((0, 1), (2, 3)))
    text = describe([(CATALOGUE.product("a30"), 3), (PlainGpu(), 1)], options).text.splitlines()
    gpus = [line.split() for line in text if line.startswith("gpu")]
    assert len({g[2] for g in gpus}) == len({g[6] for g in gpus}) == 4
    assert [g[8] for g in gpus] == ["1", "1", "1", "0"]
    assert [line for line in text if line.startswith("cpus")] == ["cpus 0 1", "cpus 2 3", "cpus 0 1", "cpus 2 3"]


def test_a_driver_from_before_the_product_has_no_mig() -> None:
    h200 = CATALOGUE.product("h200")
    assert [supports_mig(h200, d) for d in ("550.54.14", "550.90.07", "1000.1")] == [False, True, True]
    assert supports_mig(CATALOGUE.product("gh200-144gb"), "1.0")


@pytest.mark.parametrize(
    ("inherited", "expected"), [("", "/sim"), ("/cuda:/other", "/sim:/cuda:/other"), ("/cuda::/sim", "/sim:/cuda")]
)
def test_a_child_that_enters_again_has_the_same_environment(inherited: str, expected: str) -> None:
    machine = Simulation(Path("/machine"), Libraries(Path("/sim")))
    once = machine.environment(environ={"LD_LIBRARY_PATH": inherited})
    assert once["LD_LIBRARY_PATH"] == expected
    assert machine.environment(environ=once) == once
