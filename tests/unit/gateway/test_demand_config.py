"""Demand, SLO, prices, reservations: what the configuration takes, and what it says about what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import Config, load_config
from model_registry.errors import ConfigError

MODEL = """
  - name: chat
    source: org/chat
    max_model_len: 4096
"""
DEMAND = "    demand: {requests_per_second: 6, prompt_tokens: 800, output_tokens: 200}\n"


def loaded(tmp_path: Path, *, fleet: str = "{}", model: str = "", tenants: str = "[]") -> Config:
    path = tmp_path / "sliceway.yaml"
    path.write_text(f"version: v1\nfleet: {fleet}\nmodels:{MODEL}{model}\ntenants: {tenants}\n", encoding="utf-8")
    return load_config(path)


def refusal(tmp_path: Path, **sections: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, **sections)
    return "\n".join(str(p) for p in caught.value.problems)


def test_durations_become_seconds(tmp_path: Path) -> None:
    model = loaded(tmp_path, model=DEMAND + "    slo: {ttft: 500ms, itl: 0.05s}\n").models[0]
    assert model.slo is not None
    assert (model.slo.ttft, model.slo.itl) == (0.5, 0.05)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("500", "did you mean 500ms or 500s?"),
        ("500 msec", "did you mean 500ms or 500m?"),
        ("soon", "write a number and one of ms, s, m, h"),
        ("0ms", "must be more than 0"),
    ],
)
def test_a_duration_without_a_known_unit_is_refused(tmp_path: Path, written: str, said: str) -> None:
    assert said in refusal(tmp_path, model=DEMAND + f"    slo: {{ttft: {written}}}\n")


def test_a_configuration_survives_being_written_down(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        fleet="{prices: {h100-sxm: 2.5}, reserve: {4g.40gb: 1, note: fine-tuning}, head_room: 20%, autoscale: {window: 30s}}",
        model=DEMAND + "    slo: {itl: 33ms}\n    replicas: {min: 0, max: 3}\n",
    )
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("replicas", "demand", "least", "most"),
    [
        ("", "", 1, 1),
        ("", DEMAND, 1, None),
        ("    replicas: 3\n", "", 3, 3),
        ("    replicas: {min: 0, max: 4}\n", "", 0, 4),
        ("    replicas: {max: 4}\n", DEMAND, 1, 4),
    ],
)
def test_replicas_are_a_number_or_a_range(
    tmp_path: Path, replicas: str, demand: str, least: int, most: int | None
) -> None:
    model = loaded(tmp_path, model=replicas + demand).models[0]
    assert (model.least_replicas, model.most_replicas) == (least, most)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("    replicas: {min: 3, max: 2}\n", "min 3 is more than max 2"),
        ("    replicas: {min: 1, max: 2}\n    slices: [a]\n", "pinned replicas are a fixed number, not a range"),
        ("    replicas: 2\n    slices: [a]\n", "1 slice is named for 2 replicas"),
        ("    profile: 1g.10gb\n    profiles: [2g.20gb]\n", "say the same thing twice"),
        ("    profiles: [2g.20gb, 2g.20gb]\n", "'2g.20gb' stands here twice"),
        ("    profiles: [2g.2gb]\n", "no GPU product has a profile '2g.2gb'; did you mean 2g.24gb or 2g.20gb"),
        ("    profile: half\n", "no GPU product has a profile 'half'; `sliceway profiles` lists them by product"),
        ("    slo: {ttft: 1s}\n", "an slo holds at a demand"),
        (DEMAND + "    slo: {}\n", "an slo limits `ttft`, `itl` or both"),
        (DEMAND + "    replicas: 0\n", "a demand with replicas: 0 cannot be served"),
        (
            "    demand: {requests_per_second: 1, prompt_tokens: 4000, output_tokens: 200}\n",
            "Raise max_model_len to at least 4200",
        ),
        ("    demand: {requests_per_second: 0, prompt_tokens: 1, output_tokens: 1}\n", "must be more than 0"),
    ],
)
def test_contradictions_in_a_model_are_told(tmp_path: Path, model: str, said: str) -> None:
    assert said in refusal(tmp_path, model=model)


def test_models_that_something_else_runs_have_no_demand(tmp_path: Path) -> None:
    path = tmp_path / "sliceway.yaml"
    path.write_text(f"version: v1\nmodels:\n  - name: chat\n    endpoints: [http://h:1]\n{DEMAND}", encoding="utf-8")
    with pytest.raises(ConfigError, match="no replica is planned for them"):
        load_config(path)


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        ("{prices: {h100-smx: 2.5}}", "Did you mean h100-sxm"),
        ("{prices: {h100-sxm: 2.5, H100-80GB-SXM: 3}}", "are the same product"),
        ("{prices: {h100-sxm: -1}}", "must be at least 0"),
        ("{cordon: [h100-smx]}", "Did you mean h100-sxm"),
        ("{reserve: [{4g.41gb: 1, note: x}]}", "did you mean"),
        ("{reserve: [{4g.40gb: 1}]}", "note"),
        ("{reserve: [{note: x}]}", "profiles"),
        ("{reserve: [{1g.10gb: 1, note: x}, {2g.20gb: 1, note: x}]}", "two reservations have the note 'x'"),
        ("{head_room: lots}", "write 20% or 0.2"),
        ("{autoscale: {scale_up_after: 5m, scale_down_after: 1m}}", "replicas would come and go"),
        ("{autoscale: {look_every: 5s, window: 2s}}", "window (2s) is shorter than look_every (5s)"),
        ("{autoscale: {tolerence: 0.1}}", "Did you mean 'tolerance'?"),
    ],
)
def test_what_makes_no_sense_for_a_fleet_is_told(tmp_path: Path, fleet: str, said: str) -> None:
    assert said in refusal(tmp_path, fleet=fleet)


def test_prices_are_found_by_any_name_of_the_product(tmp_path: Path) -> None:
    fleet = loaded(tmp_path, fleet="{prices: {h100-sxm: 2.5, a30: 0.5}}").fleet
    assert fleet.price_per_hour("H100-80GB-SXM") == 2.5
    assert fleet.price_per_hour("A100-80GB") == 1.5, "unpriced products cost the mean of the others"
    assert loaded(tmp_path).fleet.price_per_hour("A100-80GB") == 1.0


@pytest.mark.parametrize(
    ("tenants", "said"),
    [
        ("[{name: a, models: [], isolation: dedicated}]", "no model of it has a replica"),
        ("[{name: a, demand: {chat: 1}}]", "no demand of which this could be a part"),
        ("[{name: a, models: [], demand: {chat: 1}}]", "which it may not use"),
    ],
)
def test_tenants_that_cannot_have_what_they_ask_for(tmp_path: Path, tenants: str, said: str) -> None:
    assert said in refusal(tmp_path, tenants=tenants)


def test_tenants_cannot_ask_for_more_than_the_model_is_planned_for(tmp_path: Path) -> None:
    told = refusal(tmp_path, model=DEMAND, tenants="[{name: a, demand: {chat: 4}}, {name: b, demand: {chat: 3}}]")
    assert "Raise models.chat.demand.requests_per_second to at least 7" in told


def test_a_pinned_model_cannot_be_dedicated_and_shared(tmp_path: Path) -> None:
    told = refusal(
        tmp_path, model="    slices: [s]\n", tenants="[{name: a, isolation: dedicated}, {name: b, models: [chat]}]"
    )
    assert "pinned to slices that 'b' may use too" in told


@pytest.mark.parametrize("below", ["", "/deeper/state"])
def test_a_state_directory_that_is_a_file_is_told_with_what_is_in_its_place(tmp_path: Path, below: str) -> None:
    other, path = tmp_path / "taken", tmp_path / "sliceway.yaml"
    path.write_text(f"version: v1\nstate_dir: ./taken{below}\n", encoding="utf-8")
    assert load_config(path).state == tmp_path / f"taken{below}"
    other.write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"taken is no directory") as refused:
        load_config(path)
    assert refused.value.where == f"{path}: state_dir"
    assert f"Move {other} away" in str(refused.value.remedy)
    other.unlink()
    other.mkdir()
    assert load_config(path).state == tmp_path / f"taken{below}"
