from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.endpoint_keys import endpoint_keys
from gateway.health import FAILURES_TO_LEAVE, HealthBook
from gateway.routes import Standing, build_routes, external_replicas
from gateway.testing import replica_row
from model_registry.schema import ModelConfig
from placement.table import ModelRow, ReplicaState, RoutingTable, SliceRow


def external(name: str, *endpoints: str, **more: Any) -> ModelConfig:
    return ModelConfig(name=name, endpoints=endpoints, **more)


TABLE = RoutingTable(
    generation=7,
    models=(ModelRow(name="m", task="generate", max_model_len=100, created=5),),
    replicas=(replica_row("m-0", "m", "unix:/0"), replica_row("m-1", "m", "unix:/1", state=ReplicaState.DRAINING)),
    idle=(SliceRow(id="cpu-9", kind="cpu"),),
)


def test_table_and_endpoints_come_together() -> None:
    routes = build_routes(TABLE, [external("e", "http://a:1/", "unix:/e")], {"e@0": Standing(reachable=True)})
    assert routes.generation == 7
    assert [r.replica for r in routes.models["m"].ready] == ["m-0"]
    assert [r.replica for r in routes.models["e"].replicas] == ["e@0", "e@1"]
    assert [r.replica for r in routes.models["e"].ready] == ["e@0"]
    assert routes.models["e"].replicas[0].endpoint == "http://a:1"
    assert routes.idle[0].id == "cpu-9"
    assert len(list(routes.replicas())) == 4


def test_external_slices_are_numbered_through() -> None:
    rows = external_replicas([external("a", "unix:/1", "unix:/2"), external("b", "unix:/3")])
    assert [(r.slice.id, r.slice.kind, r.replica) for r in rows] == [
        ("endpoint-0", "external", "a@0"),
        ("endpoint-1", "external", "a@1"),
        ("endpoint-2", "external", "b@0"),
    ]


def test_a_configured_model_is_known_before_there_is_a_table() -> None:
    routes = build_routes(None, [ModelConfig(name="later", source="x", task="embed", max_model_len=64)], {})
    assert routes.generation is None
    assert routes.models["later"].card == ModelRow(name="later", task="embed", max_model_len=64)
    assert routes.models["later"].ready == ()


def test_the_tables_card_wins_over_the_configurations() -> None:
    routes = build_routes(TABLE, [ModelConfig(name="m", source="x")], {})
    assert routes.models["m"].card.created == 5


def test_who_does_not_answer_is_not_ready_and_says_why() -> None:
    routes = build_routes(TABLE, [], {"m-0": Standing(reachable=False, reason="refused")})
    row = routes.models["m"].replicas[0]
    assert (row.state, row.reason) == (ReplicaState.BACKOFF, "does not answer: refused")
    assert routes.models["m"].ready == ()


def test_experience_does_not_overrule_the_controller_the_other_way() -> None:
    routes = build_routes(TABLE, [], {"m-1": Standing(reachable=True)})
    assert routes.models["m"].replicas[1].state is ReplicaState.DRAINING


def test_what_an_external_engine_told_of_itself_is_used() -> None:
    routes = build_routes(
        None, [external("e", "unix:/e")], {"e@0": Standing(reachable=True, engine_model="llama", max_model_len=4096)}
    )
    assert routes.models["e"].ready[0].engine_model == "llama"
    assert routes.models["e"].card.max_model_len == 4096


def test_three_failures_in_a_row_leave_and_two_successes_return() -> None:
    book = HealthBook()
    changes = [book.failed("r", "refused") for _ in range(FAILURES_TO_LEAVE + 1)]
    assert changes == [False, False, True, False]
    assert book.standing("r").reachable is False
    assert book.answered("r") is False
    assert book.answered("r") is True
    assert book.standing("r") == Standing(reachable=True, on_trial=True)


def broken() -> HealthBook:
    book = HealthBook()
    for _ in range(FAILURES_TO_LEAVE):
        book.failed("r", "refused")
    book.answered("r")
    book.answered("r")
    return book


def test_the_first_request_served_ends_a_trial() -> None:
    book = broken()
    assert book.served("r") is True
    assert book.standing("r") == Standing(reachable=True)
    assert book.served("r") is False


def test_one_failure_on_trial_is_enough_to_leave_again() -> None:
    book = broken()
    assert book.failed("r", "refused again") is True
    assert book.standing("r") == Standing(reachable=False, reason="refused again")


def test_the_routes_say_who_is_on_trial() -> None:
    row = replica_row("r", "m", "unix:/r")
    routes = build_routes(RoutingTable(generation=1, replicas=(row,)), (), broken().standings())
    assert routes.on_trial == {"r"}
    assert routes.models["m"].ready == (row,)


def test_a_served_request_ends_a_row_of_failures() -> None:
    book = HealthBook()
    for _ in range(5):
        book.failed("r", "refused")
        book.failed("r", "refused")
        book.served("r")
    assert book.standing("r").reachable is None


def test_a_failure_between_two_successes_starts_over() -> None:
    book = HealthBook()
    for _ in range(3):
        book.failed("r", "refused")
    assert [book.answered("r"), book.failed("r", "refused"), book.answered("r"), book.answered("r")] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("first", [True, False])
def test_nobody_vouches_for_an_external_replica_at_first_contact(first: bool) -> None:
    book = HealthBook()
    assert book.failed("e", "refused", first_contact=first) is first


def test_the_gone_are_forgotten() -> None:
    book = HealthBook()
    for replica in ("a", "b"):
        for _ in range(3):
            book.failed(replica, "refused")
    book.retain({"b"})
    assert set(book.standings()) == {"b"}
    assert book.standing("a") == Standing()


def test_engines_of_others_are_shown_the_key_of_their_model_and_rows_do_not_tell_it() -> None:
    models = [external("a", "unix:/1", "unix:/2", endpoint_key="${ENV:A_KEY}"), external("b", "unix:/3")]
    rows = external_replicas(models, endpoint_keys(models, {"A_KEY": "sk-1"}))
    assert [row.secret for row in rows] == ["sk-1", "sk-1", None]
    assert "sk-1" not in repr(rows)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"endpoints": ("unix:/1",), "endpoint_key": "sk-written-out"}, "not written out"),
        ({"source": "x", "endpoint_key": "${ENV:A_KEY}"}, "secrets of their own"),
    ],
)
def test_a_key_is_named_by_where_it_lies_and_for_engines_of_others(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ModelConfig(name="m", **fields)
