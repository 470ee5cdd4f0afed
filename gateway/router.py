"""What the routes of this moment say of models and replicas. Which replica takes a request is `gateway.admission`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.admission import Loads
from gateway.errors import UnknownModel
from gateway.routes import ModelRoute, Routes
from placement.table import ReplicaRow


class Router:
    """The routes, by name, at the moment of the call."""

    def __init__(self, routes: Callable[[], Routes], loads: Loads) -> None:
        self._routes = routes
        self._loads = loads

    @property
    def in_flight(self) -> int:
        """Requests on all replicas together."""
        return self._loads.total()

    def replicas(self) -> Iterable[ReplicaRow]:
        """Every replica of every model, ready or not."""
        return self._routes().replicas()

    def model(self, name: str) -> ModelRoute:
        """The model that clients call `name`. Raises UnknownModel."""
        if (model := self._routes().models.get(name)) is None:
            raise unknown_model(name)
        return model


def unknown_model(name: str) -> UnknownModel:
    """The same words whether a model does not exist or this tenant may not use it."""
    return UnknownModel(
        f"The model {name[:128]!r} does not exist or you do not have access to it.",
        param="model",
        remedy="GET /v1/models lists the models you may use.",
    )
