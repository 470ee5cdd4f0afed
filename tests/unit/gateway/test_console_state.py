from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.console.state import console_state, memory_slices
from model_registry.catalogue import load_catalogue
from model_registry.geometry import Placement
from placement.status import ControllerStatus
from placement.transition.journal import Record
from placement.transition.steps import Place, Step, Transition

NOTHING = {"p50": None, "p99": None, "count": 0}
WINDOWS = {w: dict.fromkeys(("ttft_seconds", "itl_seconds", "e2e_seconds"), NOTHING) for w in ("1m", "5m", "1h")}


def row(slice_id: str, *, profile: str | None = None, model: str | None = None, **more: Any) -> dict[str, Any]:
    replica = f"{model}-0" if model else None
    return {
        "slice": {"id": slice_id, "kind": "mig" if profile else "cpu", "profile": profile, "uuid": None, "gpu": None},
        "model": model,
        "replica": replica,
        "state": "ready" if model else "idle",
        "windows": WINDOWS,
        "tenants": {"acme": {"windows": WINDOWS}} if model else {},
    } | more


def state(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    readiness = {"ready": True, "draining": False, "generation": 7, "problems": []}
    asked: dict[str, Any] = {"limits": (), "reasons": {}, "transition": None} | more
    return console_state(
        rows, readiness, asked["limits"], asked["reasons"], asked["transition"], asked.get("controller")
    )


def test_slices_stand_in_their_places_on_their_card() -> None:
    shown = state(
        row("GPU-b/1g.10gb@6", profile="1g.10gb", model="chat"),
        row("GPU-b/3g.40gb@0", profile="3g.40gb"),
        row("node-a/GPU-a/7g.80gb@0", profile="7g.80gb", model="large"),
        row("cpu-0", model="embed"),
    )
    cards = {card["gpu"]: [(s["label"], s["start"], s["width"]) for s in card["slices"]] for card in shown["gpus"]}
    assert cards == {
        None: [("cpu", None, None)],
        "GPU-a": [("7g.80gb", 0, 8)],
        "GPU-b": [("3g.40gb", 0, 4), ("1g.10gb", 6, 1)],
    }


def test_a_slice_is_drawn_with_the_tenants_that_were_answered_on_it() -> None:
    busy = {"acme": {"windows": WINDOWS | {"1m": WINDOWS["1m"] | {"e2e_seconds": NOTHING | {"count": 3}}}}}
    shown = state(
        row("GPU-a/3g.40gb@0", profile="3g.40gb", model="chat", tenants=busy | {"calm": {"windows": WINDOWS}}),
        row("GPU-a/3g.40gb@4", profile="3g.40gb", model="chat"),
    )
    assert [one["tenants"] for one in shown["gpus"][0]["slices"]] == [["acme"], []]


def test_a_profile_that_nobody_knows_still_has_a_width() -> None:
    assert memory_slices(frozenset({("9g.999gb", 0)})) == {}
    assert state(row("GPU-a/9g.999gb@0", profile="9g.999gb"))["gpus"][0]["slices"][0]["width"] == 1


@pytest.mark.parametrize(
    ("profile", "starts", "columns", "width"),
    [
        ("1g.6gb", (0, 3), 4, 1),  # A30
        ("1g.24gb", (0, 9), 12, 3),  # RTX PRO 6000
        ("1g.10gb", (0, 6), 8, 1),
        ("9g.999gb", (9,), 10, 1),
    ],
)
def test_a_card_is_as_wide_as_its_memory(profile: str, starts: tuple[int, ...], columns: int, width: int) -> None:
    (card,) = state(*(row(f"GPU-a/{profile}@{start}", profile=profile) for start in starts))["gpus"]
    assert card["columns"] == columns
    assert [(s["start"], s["width"]) for s in card["slices"]] == [(start, width) for start in starts]


def whole(slice_id: str, kind: str) -> dict[str, Any]:
    one = row(slice_id, model="chat")
    return one | {"slice": one["slice"] | {"kind": kind, "gpu": "GPU-a"}}


def test_a_card_that_is_not_cut_is_shared_in_equal_parts() -> None:
    (card,) = state(whole("GPU-a", "gpu"))["gpus"]
    assert (card["columns"], [(s["start"], s["width"]) for s in card["slices"]]) == (1, [(0, 1)])
    (card,) = state(whole("GPU-a#1", "mps"), whole("GPU-a#0", "mps"))["gpus"]
    assert (card["columns"], [(s["id"], s["start"]) for s in card["slices"]]) == (2, [("GPU-a#0", 0), ("GPU-a#1", 1)])


def test_what_is_on_no_card_has_no_scale() -> None:
    (card,) = state(row("cpu-0", model="embed"))["gpus"]
    assert (card["gpu"], card["columns"]) == (None, None)


def test_one_name_is_as_wide_as_on_the_card_that_it_is_on() -> None:
    seven = frozenset(("1g.10gb", start) for start in range(7))
    assert memory_slices(seven) == {"1g.10gb": 1}
    assert memory_slices(frozenset({("1g.10gb", 0), ("3g.20gb", 4)})) == {"1g.10gb": 2, "3g.20gb": 4}


def test_a_slice_is_as_wide_as_on_the_product_that_is_told() -> None:
    """`1g.35gb` is two of an H200's memory slices, and one of a larger card's."""
    (h200,) = (p for p in load_catalogue().products if p.name == "H200-141GB")
    assert h200.profile("1g.35gb").memory_slices == 2
    one = row("GPU-a/1g.35gb@4", profile="1g.35gb")
    told = row("GPU-a/1g.35gb@4", profile="1g.35gb")
    told["slice"]["product"] = h200.name
    assert [state(r)["gpus"][0]["slices"][0]["width"] for r in (one, told)] == [1, 2]
    assert state(told)["gpus"][0]["columns"] == 8
    told["slice"]["product"] = "a card of tomorrow"
    assert state(told)["gpus"][0]["slices"][0]["width"] == 1


def test_why_a_replica_is_not_ready_stands_beside_it() -> None:
    shown = state(row("cpu-0", model="chat", state="failed"), reasons={"chat-0": "out of memory"})
    assert shown["slices"][0]["reason"] == "out of memory"


def test_only_limits_that_hold_somebody_back_are_shown_and_why() -> None:
    limit = {"tenant": "acme", "model": None, "limit": "requests_per_minute", "full": 10, "used": 1, "refused": 0}
    limit |= {"throttled_seconds": None, "retry_after_seconds": None}
    past = limit | {"refused": 3}
    refusing = past | {"throttled_seconds": 2.5, "retry_after_seconds": 6.0}
    shown = state(
        limits=(
            limit,
            past,
            limit | {"used": 5, "model": "chat"},
            limit | {"full": 0},
            refusing,
            refusing | {"throttled_seconds": 9.0},
        )
    )
    assert [(one["limit"], one["throttled_seconds"], one["share"]) for one in shown["throttled"]] == [
        ("requests per minute", 9.0, 0.1),
        ("requests per minute", 2.5, 0.1),
        ("requests per minute", None, 1.0),
        ("requests per minute on chat", None, 0.5),
    ]


def test_a_transition_says_how_far_it_is_and_what_stopped_it() -> None:
    place = Place("GPU-a", Placement("1g.10gb", 0))
    steps = (Step(0, "create", place), Step(1, "start", place, replica="chat-0", demand="chat", after=(0,)))
    transition = Transition(steps=steps, fingerprint="f", target="t", seats={}, before={}, guaranteed={}, dips=())
    record = Record(
        transition, datetime(2026, 11, 21, tzinfo=UTC), frozenset({0}), (1, {"message": "no", "remedy": None})
    )
    shown = state(transition=record)["transition"]
    assert [step["state"] for step in shown["steps"]] == ["done", "failed"]
    assert shown["error"]["message"] == "no"
    assert state()["transition"] is None


def test_the_plan_is_what_is_to_run_and_what_has_no_slice() -> None:
    now = "2026-11-21T00:00:00Z"
    running = {"model": "chat", "slice": {"id": "a", "kind": "cpu"}, "memory_bytes": 1, "since": now, "log": "l"}
    controller = ControllerStatus.model_validate(
        {
            "pid": 1,
            "started_at": now,
            "updated_at": now,
            "state": "running",
            "config": "c.yaml",
            "generation": 1,
            "replicas": [
                running | {"replica": "chat-0", "state": "ready"},
                running | {"replica": "chat-1", "state": "starting"},
            ],
            "unplaced": {"chat@acme-0": {"code": "no_slice", "message": "no slice is free", "remedy": "Add one."}},
            "scaling": {"chat": {"replicas": 3, "placed": 2, "least": 1, "most": 4, "reason": "3 are needed"}},
        }
    )
    plan = state(controller=controller)["plan"]
    assert plan["models"] == [
        {"model": "chat", "planned": 2, "ready": 1, "demand": "3 of 1 to 4, 1 without a slice (3 are needed)"},
        {"model": "chat@acme", "planned": 1, "ready": 0, "demand": None},
    ]
    assert plan["unplaced"] == [{"replica": "chat@acme-0", "message": "no slice is free", "remedy": "Add one."}]
    assert (plan["refused"], plan["repartition"]) == (None, None)
    assert state()["plan"] is None
