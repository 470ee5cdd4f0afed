from __future__ import annotations

from typing import Any

import pytest

from gateway.bench import BenchError, ServedModel, choose_cast, context, scenario, served_models, tenant_for
from gateway.config import Config
from model_registry.errors import ConfigError

CHAT_A = ServedModel("chat-a", "generate", frozenset({"cpu-0"}))
CHAT_B = ServedModel("chat-b", "generate", frozenset({"cpu-1"}))
EMBED = ServedModel("embed", "embed", frozenset({"cpu-2"}))


def config_of(*tenants: dict[str, Any]) -> Config:
    models = [{"name": name, "endpoints": ["http://127.0.0.1:1"]} for name in ("chat-a", "chat-b", "embed")]
    return Config.model_validate({"version": "v1", "models": models, "tenants": tenants})


BOTH = config_of({"name": "quiet"}, {"name": "noisy"})


def row(model: str | None, slice_id: str, state: str = "ready") -> dict[str, Any]:
    return {"model": model, "slice": {"id": slice_id}, "state": state}


def test_what_runs_is_read_from_the_rows_of_slices() -> None:
    shown = [
        row("chat-a", "s0"),
        row("chat-a", "s1"),
        row("embed", "s2"),
        row("late", "s3", "starting"),
        row(None, "s4", "ready"),
    ]
    assert served_models(shown, {"embed": "embed"}) == (
        ServedModel("chat-a", "generate", frozenset({"s0", "s1"})),
        ServedModel("embed", "embed", frozenset({"s2"})),
    )


def test_left_alone_it_takes_two_tenants_and_two_slices() -> None:
    cast = choose_cast(BOTH, [EMBED, CHAT_A, CHAT_B])
    assert (cast.victim.tenant, cast.victim.model) == ("quiet", CHAT_A)
    assert cast.neighbour is not None
    assert (cast.neighbour.tenant, cast.neighbour.model) == ("noisy", CHAT_B)
    assert cast.contrast is not None
    assert cast.contrast.model == CHAT_A
    assert cast.notes == ()


def test_the_neighbour_never_shares_a_slice_by_chance() -> None:
    spread = ServedModel("chat-b", "generate", frozenset({"cpu-0", "cpu-1"}))
    cast = choose_cast(BOTH, [CHAT_A, spread])
    assert cast.neighbour is None
    assert "left out" in cast.notes[0]
    assert choose_cast(BOTH, [CHAT_A, spread], neighbour="noisy=chat-b").neighbour is None


def test_an_embedding_model_next_door_is_better_than_none() -> None:
    cast = choose_cast(BOTH, [CHAT_A, EMBED])
    assert cast.neighbour is not None
    sizes = {"prompt_words": 5, "prompt_tokens": None, "output_tokens": 6}
    assert cast.neighbour.load(users=3, **sizes)["task"] == "embedding"


def test_a_tenants_models_bind_the_choice() -> None:
    apart = config_of({"name": "quiet", "models": ["chat-a"]}, {"name": "noisy", "models": ["chat-b"]})
    cast = choose_cast(apart, [CHAT_A, CHAT_B])
    assert cast.neighbour is not None
    assert cast.contrast is None
    assert "cannot flood the same slice" in cast.notes[0]


def test_names_can_be_given() -> None:
    cast = choose_cast(BOTH, [CHAT_A, CHAT_B, EMBED], victim="noisy=chat-b", neighbour="quiet=embed")
    assert (cast.victim.tenant, cast.victim.model) == ("noisy", CHAT_B)
    assert cast.neighbour is not None
    assert cast.neighbour.model == EMBED


@pytest.mark.parametrize(
    ("victim", "neighbour", "said"),
    [
        ("absent", None, "'quiet', 'noisy'"),
        ("quiet=absent", None, "'chat-a'"),
        ("quiet", "noisy=absent", "'chat-a'"),
        ("quiet", "quiet", "two tenants"),
    ],
)
def test_wrong_names_are_told_with_the_right_ones(victim: str, neighbour: str | None, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_cast(BOTH, [CHAT_A, CHAT_B], victim=victim, neighbour=neighbour)
    assert said in (caught.value.remedy or "")


def test_a_single_tenant_has_no_neighbour() -> None:
    with pytest.raises(ConfigError, match="only tenant"):
        choose_cast(config_of({"name": "quiet"}), [CHAT_A])


def test_without_tenants_both_are_anonymous() -> None:
    cast = choose_cast(config_of(), [CHAT_A, CHAT_B])
    assert cast.victim.tenant == "victim"


def test_nothing_ready_is_said() -> None:
    with pytest.raises(BenchError, match="ready"):
        choose_cast(BOTH, [])


SETTINGS: dict[str, Any] = {
    "aggressors": (),
    "budget": {},
    "duration_seconds": 20.0,
    "warmup_seconds": 3.0,
    "rounds": 2,
    "users": 16,
    "prompt_words": 10,
    "prompt_tokens": None,
    "output_tokens": 11,
    "processes": 1,
    "seed": 3,
}


def test_the_scenario_is_what_the_load_tests_read() -> None:
    from loadtests.lab.scenario import Context, check_tenants, keys_from, read_isolation
    from loadtests.yamlfile import Source

    made = scenario(choose_cast(BOTH, [CHAT_A, CHAT_B]), **SETTINGS)
    told = context(base_url="http://127.0.0.1:1", keys={"quiet": "sk-1", "noisy": "sk-2"}, tenants=["quiet", "noisy"])
    source = Source(made, "scenario")
    read, given = read_isolation(source), Source(told, "context").parse(Context)
    check_tenants(read, given, source)
    assert keys_from(read, given, {}) == {"quiet": "sk-1", "noisy": "sk-2"}
    assert (read.victim.model, read.victim.arrival.users) == ("chat-a", 1)  # type: ignore[union-attr]
    assert (read.aggressors[0].label, read.aggressors[0].users) == ("neighbour", 16)  # type: ignore[union-attr]
    assert [(s.where, s.model) for s in read.settings] == [("other_slice", "chat-b"), ("same_slice", "chat-a")]
    assert read.duration_seconds == 20.0
    assert read.budget is None


def test_aggressors_and_a_budget_can_be_asked_for() -> None:
    numbers = SETTINGS | {"aggressors": ["prefill_flood", "cancel_storm"], "budget": {"p99_ratio": 1.1}}
    made = scenario(choose_cast(BOTH, [CHAT_A, CHAT_B]), **numbers)
    assert [a["kind"] for a in made["aggressors"]] == ["prefill_flood", "cancel_storm"]
    assert made["budget"] == {"p99_ratio": 1.1}


def test_a_scenario_without_any_neighbour_is_refused() -> None:
    alone = config_of({"name": "quiet", "models": ["chat-a"]}, {"name": "noisy", "models": ["chat-b"]})
    cast = choose_cast(alone, [CHAT_A, ServedModel("chat-b", "generate", frozenset({"cpu-0"}))])
    with pytest.raises(BenchError, match="disturb"):
        scenario(cast, **SETTINGS)


def test_capacity_is_asked_for_by_a_tenant_that_may() -> None:
    apart = config_of({"name": "quiet", "models": ["chat-a"]}, {"name": "noisy", "models": ["chat-b"]})
    assert tenant_for(apart, "chat-b", None) == "noisy"
    assert tenant_for(config_of(), "chat-b", None) == "bench"
    for model, wanted in (("embed", None), ("chat-b", "quiet")):
        with pytest.raises(ConfigError, match=r"may (not )?use"):
            tenant_for(apart, model, wanted)
