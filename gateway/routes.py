"""What can be routed to at one moment: the routing table, the models with endpoints of their own, and what answers.

Pure: values in, one immutable `Routes` out. A new table, a new configuration or a replica that stops answering makes a new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gateway.endpoint_keys import NO_KEYS
from gateway.secret_values import Secret
from model_registry.schema import ModelConfig
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow

EXTERNAL = "external"


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """One model: its card, every replica, and those that take new requests."""

    card: ModelRow
    replicas: tuple[ReplicaRow, ...] = ()
    ready: tuple[ReplicaRow, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it has replicas and every one of them has failed."""
        return bool(self.replicas) and all(r.state is ReplicaState.FAILED for r in self.replicas)

    def why_not_ready(self) -> str:
        """One phrase for a client; the engine's own words stay with the operator (`/slices`, `sliceway status`)."""
        if not self.replicas:
            return "it has no replica"
        states = Counter(replica.state.value for replica in self.replicas)
        return "its replicas are " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))

    def retry_after_seconds(self) -> float:
        """When it is worth asking again: soon where one is on its way up, later where all have failed."""
        states = {replica.state for replica in self.replicas}
        if states & {ReplicaState.BACKOFF, ReplicaState.DRAINING}:
            return 2.0
        coming = {ReplicaState.STARTING, ReplicaState.PENDING, ReplicaState.ASLEEP}
        return 5.0 if states & coming else 30.0


@dataclass(frozen=True, slots=True)
class Routes:
    """Everything the router knows. `generation` is the routing table's; None where no table was read yet."""

    generation: int | None = None
    models: Mapping[str, ModelRoute] = field(default_factory=dict)
    idle: tuple[SliceRow, ...] = ()
    on_trial: frozenset[str] = frozenset()  # ready ones that failed before and have not served a request since

    def replicas(self) -> Iterable[ReplicaRow]:
        """Every replica of every model."""
        for model in self.models.values():
            yield from model.replicas


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a replica from talking to it.

    `reachable` is None before the first answer. `engine_model` is the name an external engine serves under, and
    `max_model_len` its limit, where it said so. `on_trial` is a replica that answers again but has not served a request since.
    """

    reachable: bool | None = None
    reason: str | None = None
    engine_model: str | None = None
    max_model_len: int | None = None
    on_trial: bool = False


def external_replicas(models: Iterable[ModelConfig], keys: Mapping[str, Secret] = NO_KEYS) -> tuple[ReplicaRow, ...]:
    """The replicas that the configuration names by their endpoints, numbered through as `endpoint-0`, `endpoint-1` ...

    `keys` are what the engines of a model are shown.
    """
    rows: list[ReplicaRow] = []
    for model in models:
        key = keys.get(model.name)
        for number, endpoint in enumerate(model.endpoints):
            rows.append(
                ReplicaRow(
                    replica=f"{model.name}@{number}",
                    model=model.name,
                    engine_model=model.name,
                    endpoint=endpoint.rstrip("/"),
                    slice=SliceRow(id=f"endpoint-{len(rows)}", kind=EXTERNAL),
                    state=ReplicaState.PENDING,
                    # The default is for engines of ours; of others only the operator knows.
                    max_num_seqs=model.max_num_seqs if "max_num_seqs" in model.model_fields_set else None,
                    secret=key.value.decode("ascii") if key is not None else None,
                )
            )
    return tuple(rows)


def build_routes(
    table: RoutingTable | None,
    models: Iterable[ModelConfig],
    standing: Mapping[str, Standing],
    keys: Mapping[str, Secret] = NO_KEYS,
) -> Routes:
    """Compose the routes. `standing` is by replica; replicas without one are what the table says they are. `keys` as in `external_replicas`."""
    configured = list(models)
    table_rows = table.replicas if table else ()
    rows = [_as_seen(row, standing.get(row.replica)) for row in (*table_rows, *external_replicas(configured, keys))]
    cards = {model.name: _card(model) for model in configured} | {
        card.name: card for card in (table.models if table else ())
    }
    by_model: dict[str, list[ReplicaRow]] = {name: [] for name in cards}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    routes = {}
    for name, replicas in by_model.items():
        card = cards.get(name) or ModelRow(name=name)
        if card.max_model_len is None and (told := _told_length(replicas, standing)):
            card = card.model_copy(update={"max_model_len": told})
        ready = tuple(row for row in replicas if row.state is ReplicaState.READY)
        routes[name] = ModelRoute(card, tuple(replicas), ready)
    on_trial = frozenset(name for name, known in standing.items() if known.on_trial)
    return Routes(table.generation if table else None, routes, table.idle if table else (), on_trial)


def without_drained(routes: Routes, drained: frozenset[str]) -> Routes:
    """`routes` with the replicas of these names out of service: what they have goes on, nothing new comes."""
    if not drained:
        return routes
    models = {}
    for name, model in routes.models.items():
        rows = tuple(_drained(row) if row.replica in drained else row for row in model.replicas)
        ready = tuple(row for row in model.ready if row.replica not in drained)
        models[name] = replace(model, replicas=rows, ready=ready)
    return replace(routes, models=models)


def _drained(row: ReplicaRow) -> ReplicaRow:
    if row.state is not ReplicaState.READY:
        return row
    return row.model_copy(update={"state": ReplicaState.DRAINING, "reason": "an operator has taken it out"})


def _card(model: ModelConfig) -> ModelRow:
    task = "unknown" if model.task == "auto" else model.task
    return ModelRow(name=model.name, task=task, max_model_len=model.max_model_len)


def _told_length(replicas: Iterable[ReplicaRow], standing: Mapping[str, Standing]) -> int | None:
    lengths = [known.max_model_len for row in replicas if (known := standing.get(row.replica)) and known.max_model_len]
    return min(lengths, default=None)


def _as_seen(row: ReplicaRow, standing: Standing | None) -> ReplicaRow:
    """The table's word on a replica, corrected by experience: who does not answer is not ready."""
    external = row.slice.kind == EXTERNAL
    if standing is None or standing.reachable is None:
        return row
    if not standing.reachable and (external or row.state is ReplicaState.READY):
        return row.model_copy(update={"state": ReplicaState.BACKOFF, "reason": f"does not answer: {standing.reason}"})
    if not external:
        return row
    return row.model_copy(
        update={"state": ReplicaState.READY, "engine_model": standing.engine_model or row.engine_model}
    )
