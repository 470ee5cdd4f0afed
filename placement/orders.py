"""What is asked of single replicas for a while, apart from the configuration: by an operator, or by a change of the fleet.

Orders are a state, not a stream of commands: one small file says which replicas are to take no requests (`drained`), which
are not to run (`stopped`), and which are to run on a slice that somebody else has chosen (`seats`). The controller makes it
so after every SIGHUP and at every start, so orders outlive a controller that is killed halfway; writing the same orders
again changes nothing, and an empty file is business as usual. Every change is also a line in `orders.log`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_registry.atomic import write_atomically
from placement.state import StatePaths


class Orders(BaseModel):
    """All orders there are. `number` grows with every change; the controller's status tells which it has carried out."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    number: int = 0
    drained: frozenset[str] = frozenset()
    stopped: frozenset[str] = frozenset()
    seats: Mapping[str, str] = Field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether anything is asked for at all."""
        return bool(self.drained or self.stopped or self.seats)

    def drain(self, replicas: Iterable[str]) -> Orders:
        """These take no new requests; their engines go on."""
        return self._next(drained=self.drained | set(replicas))

    def stop(self, replicas: Iterable[str]) -> Orders:
        """These finish what they do and end; their slices are free then."""
        names = set(replicas)
        return self._next(stopped=self.stopped | names, drained=self.drained - names)

    def start(self, replicas: Iterable[str], on: Mapping[str, str] | None = None) -> Orders:
        """These run and take requests again; on the slices in `on`, by replica, else where the controller seats them."""
        names = set(replicas)
        seats = {r: s for r, s in self.seats.items() if r not in names} | dict(on or {})
        return self._next(stopped=self.stopped - names, drained=self.drained - names, seats=seats)

    def none(self) -> Orders:
        """Nothing is asked for any more."""
        return Orders(number=self.number + 1)

    def _next(self, **changes: object) -> Orders:
        return self.model_copy(update={"number": self.number + 1, **changes})


def read_orders(paths: StatePaths) -> Orders:
    """The orders in force. A file that makes no sense orders nothing: it must not take down what serves."""
    try:
        return Orders.model_validate_json(paths.orders.read_bytes())
    except (OSError, ValidationError):
        return Orders()


def write_orders(paths: StatePaths, orders: Orders, *, verb: str, replicas: Iterable[str], at: datetime) -> None:
    """Replace the orders, and add a line to `orders.log` that says what changed."""
    write_atomically(paths.orders, orders.model_dump_json().encode(), mode=0o600)
    names = sorted(replicas)
    seats = {name: orders.seats[name] for name in names if name in orders.seats}
    line = {"at": at.isoformat(), "number": orders.number, "verb": verb, "replicas": names, "seats": seats}
    with paths.orders_log.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
