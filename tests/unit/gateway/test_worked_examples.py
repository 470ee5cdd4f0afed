"""The worked examples: each loads, is met on its fleet, shows what it is there to show, and is on the pages as it is planned."""

from __future__ import annotations

from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from gateway.config import Config, load_config
from gateway.layouts import plans_fleet
from gateway.planning import FleetAnswer
from model_registry.catalogue import load_catalogue
from placement.workload import Card, candidates

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "configs" / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


def planned(name: str) -> tuple[Config, FleetAnswer]:
    config, answer = table_script().planned(EXAMPLES / f"{name}.yaml")
    assert isinstance(config, Config)
    assert isinstance(answer, FleetAnswer)
    return config, answer


def places(answer: FleetAnswer, demand: str) -> list[str]:
    return sorted(s.placement.profile for g in answer.plan.gpus for s in g.slices if s.demand == demand)


@cache
def table_script() -> ModuleType:
    loader = SourceFileLoader("example_table", str(ROOT / "scripts" / "example-table"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_example_is_met_on_its_fleet_by_a_proven_plan(path: Path) -> None:
    config, answer = planned(path.stem)
    assert path.read_text(encoding="utf-8").startswith("# "), "say in the first line what the file is for"
    assert plans_fleet(config)
    assert answer.met
    assert answer.plan.optimal
    assert answer.transition is not None
    assert answer.blocked is None
    for model in config.models:
        assert model.metadata is not None, "sized without network"
        assert "/" in str(model.source), "served from the hub"


def test_seven_small_endpoints_have_a_slice_each_on_one_card() -> None:
    config, answer = planned("seven-small-endpoints")
    assert len(config.models) == 7
    assert [places(answer, m.name) for m in config.models] == [["1g.10gb"]] * 7
    assert sum(g.used for g in answer.plan.gpus) == 1


def test_a_large_one_and_two_medium_ones_share_a_card() -> None:
    _, answer = planned("one-large-two-medium")
    assert places(answer, "analyst") == ["3g.40gb"]
    assert sum(g.used for g in answer.plan.gpus) == 1


def test_training_has_its_slice_beside_serving() -> None:
    _, answer = planned("training-beside-serving")
    (gpu,) = answer.plan.gpus
    assert [str(s.placement) for s in gpu.slices if s.reserved == "fine-tuning"] == ["4g.40gb@0"]
    assert places(answer, "chat") == ["3g.40gb"]


def test_staging_is_apart_and_unused_sandboxes_cost_nothing() -> None:
    _, answer = planned("developer-team")
    assert answer.demands["staging@staging"].tenant == "staging"
    assert places(answer, "sandbox-ana") == []
    assert [d.name for d in answer.workload.resting] == ["sandbox-ana", "sandbox-bo"]
    assert places(answer, "sandbox-shared") == ["1g.10gb"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_sleeps_finds_a_slice_when_a_request_comes(path: Path) -> None:
    config, answer = planned(path.stem)
    cut = config.fleet.autoscale.repartition == "automatic"
    assert cut or not answer.workload.resting, "the plan leaves no slice free"


def test_three_medium_ones_and_a_small_one_fill_a_card() -> None:
    _, answer = planned("three-medium-one-small")
    assert [places(answer, n) for n in ("chat", "code", "vision", "route")] == [["2g.20gb"]] * 3 + [["1g.10gb"]]


def test_a_whole_card_is_not_cut() -> None:
    _, answer = planned("whole-card")
    assert places(answer, "reasoner") == ["gpu"]


def test_the_same_share_of_a_larger_card_holds_several_times_the_context() -> None:
    _, answer = planned("long-context")
    subject = answer.workload.models["documents"].subject
    assert subject is not None
    cards = [Card.of(load_catalogue().product(name)) for name in ("h200", "h100-sxm")]
    large, small = (
        next(c for c in candidates(subject, [card]) if c.place.profile == f"2g.{size}gb")
        for card, size in zip(cards, (35, 20), strict=True)
    )
    assert large.speed is not None
    assert small.speed is not None
    assert large.speed.batch >= 4 * small.speed.batch
    assert large.speed.requests_per_second > 1.9 * small.speed.requests_per_second


def test_the_often_recommended_half_of_an_h200_does_not_hold_seventy_billion_parameters() -> None:
    _, answer = planned("llama-70b-fp8")
    found = {c.place.profile: c for c in answer.workload.models["llama-70b"].candidates}
    half = found["4g.71gb"]
    assert half.option is None
    assert half.breaks == "memory"
    assert half.fit is not None
    assert half.fit.breaking_term == "weights"
    assert [c.place.profile for c in found.values() if c.option] == ["7g.141gb"]
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    weights = half.reason.partition("weights of ")[2].partition(" GiB")[0]
    allowed = half.reason.partition("exceed the ")[2].partition(" GiB")[0]
    assert f"{weights} GiB" in page
    assert f"{allowed} GiB" in page


def test_a_mixed_fleet_keeps_a_dedicated_tenant_apart_and_spreads_the_rest() -> None:
    _, answer = planned("mixed-fleet")
    assert answer.demands["chat@globex"].tenant == "globex"
    gpus = [g.gpu.id for g in answer.plan.gpus for s in g.slices if s.demand in ("chat", "chat@globex")]
    assert len(gpus) >= 4
    assert len(set(gpus)) == len(gpus), "no card takes two of them down"
    for demand in answer.demands.values():
        keys = [
            (g.gpu.product, s.placement.profile) for g in answer.plan.gpus for s in g.slices if s.demand == demand.name
        ]
        assert demand.rate is not None
        assert demand.served_by(keys) >= 1.2 * demand.rate, "head-room"


@pytest.mark.parametrize("page", [ROOT / "docs" / "planning.md", EXAMPLES / "README.md"], ids=lambda p: p.name)
def test_the_pages_show_what_the_plans_say(page: Path) -> None:
    script = table_script()
    text = page.read_text(encoding="utf-8")
    assert script.BEGIN in text
    assert script.rewritten(text, script.PAGES[page]) == text, "run scripts/example-table"


def test_every_metadata_file_is_used() -> None:
    used = {Path(str(m.metadata)).name for path in FILES for m in load_config(path).models}
    assert used == {p.name for p in (EXAMPLES / "models").glob("*.json")}
