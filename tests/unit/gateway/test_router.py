from __future__ import annotations

import pytest

from gateway.admission import Loads
from gateway.errors import UnknownModel
from gateway.router import Router
from gateway.routes import build_routes
from gateway.testing import replica_row
from placement.table import ModelRow, RoutingTable

ROUTES = build_routes(
    RoutingTable(generation=1, models=(ModelRow(name="m"),), replicas=(replica_row("m-0", "m", "unix:/0"),)), (), {}
)


def test_models_and_replicas_are_those_of_the_routes() -> None:
    router = Router(lambda: ROUTES, Loads(bound=10))
    assert router.model("m").card.name == "m"
    assert [row.replica for row in router.replicas()] == ["m-0"]


def test_what_runs_is_counted_over_all_replicas() -> None:
    loads = Loads(bound=10)
    loads.of(ROUTES.models["m"].ready[0]).take(1, 100)
    assert Router(lambda: ROUTES, loads).in_flight == 1


def test_an_unknown_model_is_told_shortly() -> None:
    with pytest.raises(UnknownModel) as caught:
        Router(lambda: ROUTES, Loads(bound=10)).model("x" * 5000)
    assert len(str(caught.value)) < 400
