from __future__ import annotations

from typing import Any

import pytest

from gateway.bench import BenchError, ServedModel, choose_cast, plan, served_models
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
    assert cast.neighbour.load(key=None, users=3, prompt_words=5, output_tokens=6)["task"] == "embedding"


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
    "base_url": "http://127.0.0.1:8080",
    "duration_seconds": 20.0,
    "warmup_seconds": 3.0,
    "rounds": 2,
    "users": 16,
    "prompt_words": 10,
    "output_tokens": 11,
    "seed": 3,
}


def test_the_plan_is_what_the_load_tests_read() -> None:
    from loadtests.isolation import parse_plan

    made = plan(choose_cast(BOTH, [CHAT_A, CHAT_B]), keys={"quiet": "sk-1", "noisy": "sk-2"}, **SETTINGS)
    read = parse_plan(made)
    assert read.victim.key({}) == "sk-1"
    assert read.neighbour is not None
    assert read.neighbour.key({}) == "sk-2"
    assert (read.victim.arrival.users, read.neighbour.arrival.users) == (1, 16)  # type: ignore[union-attr]
    assert read.base.duration_seconds == 20.0
    assert read.settings == ("alone", "neighbour_on_other_slice", "neighbour_on_same_slice")


def test_a_plan_without_any_neighbour_is_refused() -> None:
    alone = config_of({"name": "quiet", "models": ["chat-a"]}, {"name": "noisy", "models": ["chat-b"]})
    cast = choose_cast(alone, [CHAT_A, ServedModel("chat-b", "generate", frozenset({"cpu-0"}))])
    with pytest.raises(BenchError, match="disturb"):
        plan(cast, keys={}, **SETTINGS)
