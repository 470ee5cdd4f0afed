"""Seats over many nodes: replicas are kept apart as their models ask, and nothing is worked out twice."""

from __future__ import annotations

import pytest

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.cluster.members import NodeReport, Seat, Versions
from placement.cluster.seating import Seating, SeatingBook, seat_replicas
from placement.errors import NoSliceApart
from placement.slices import Gpu, Slice, SliceKind

GIB = 2**30


def one(number: int, gib: int) -> Slice:
    return Slice(f"cpu-{number}", SliceKind.CPU, None, gib * GIB, cores=(number,))


def fit(model: str, target: Slice) -> SliceFit:
    least = {"a": 4, "b": 8, "c": 16}[model] * GIB
    return SliceFit(target.memory_bytes >= least, "", target.memory_bytes, 0, 0, 0, 8192, 0)


def card(node: str, index: int, slices: int) -> tuple[Slice, ...]:
    gpu = Gpu(f"GPU-{index}", index, "H100", 80 * GIB)
    return tuple(
        Slice(f"{gpu.uuid}/1g.10gb@{i}", SliceKind.MIG, "1g.10gb", 8 * GIB, uuid=f"MIG-{node}-{index}-{i}", gpu=gpu)
        for i in range(slices)
    )


def node(name: str, *cards: int) -> NodeReport:
    """A node whose cards have so many slices. Cards of different nodes have equal names, as simulated ones do."""
    own = tuple(s for index, slices in enumerate(cards) for s in card(name, index, slices))
    return report(name, 0).model_copy(update={"slices": own})


def seated(spread: str, replicas: int, *reports: NodeReport, **more: object) -> Seating:
    model = ModelConfig.model_validate(
        {"name": "chat", "source": "org/x", "replicas": replicas, "spread": spread} | more
    )
    return seat_replicas([model], {r.node: r for r in reports}, lambda _, s: fit("a", s), {})


def test_replicas_are_put_on_different_gpus_of_all_nodes() -> None:
    found = seated("gpus", 4, node("n0", 3, 3), node("n1", 3, 3))
    assert found.unplaced == {}
    assert len({(s.node, s.slice_id.partition("/")[0]) for s in found.seats.values()}) == 4


def test_replicas_are_put_on_different_nodes() -> None:
    found = seated("nodes", 2, node("n0", 3, 3), node("n1", 3))
    assert {s.node for s in found.seats.values()} == {"n0", "n1"}
    assert {s.node for s in seated("none", 2, node("n0", 3, 3), node("n1", 3)).seats.values()} == {"n0"}


def test_who_is_left_over_for_being_too_close_is_told_so() -> None:
    found = seated("nodes", 3, node("n0", 3, 3), node("n1", 3))
    assert set(found.seats) == {"chat-0", "chat-1"}
    why = found.unplaced["chat-2"]
    assert isinstance(why, NoSliceApart)
    assert why.message == (
        "no node is left for 'chat-2' that has no other replica of 'chat' (spread: nodes): slices that fit it are on 2 nodes, "
        "and of those 7 slices are free"
    )
    assert why.remedy == (
        "Provide 1 more node with such a slice, set replicas: 2 for 'chat', or set spread: gpus or spread: none."
    )
    assert isinstance(seated("gpus", 4, node("n0", 3, 3), node("n1", 3)).unplaced["chat-3"], NoSliceApart)


def test_where_other_models_have_the_slices_that_is_the_reason() -> None:
    models = [
        ModelConfig(name="chat", source="org/x", replicas=2, spread="nodes"),
        ModelConfig(name="code", source="org/x", replicas=2, priority=5),
    ]
    found = seat_replicas(models, {n: node(n, 1) for n in ("n0", "n1")}, lambda _, s: fit("a", s), {})
    assert set(found.seats) == {"code-0", "code-1"}
    assert (
        found.unplaced["chat-1"].message
        == "no slice is left for 'chat-1': there are 2 slices, and 'code' needs some too"
    )


def test_gpus_that_nobody_names_keep_nobody_apart() -> None:
    assert seated("gpus", 3, report("n0", 3)).unplaced == {}


def test_pins_on_one_gpu_contradict_the_spread() -> None:
    pins = ["n0/GPU-0/1g.10gb@0", "n0/GPU-0/1g.10gb@1"]
    found = seated("gpus", 2, node("n0", 3, 3), slices=pins)
    assert set(found.seats) == {"chat-0"}
    assert "which is on one GPU with" in found.unplaced["chat-1"].message
    assert "Name a slice of another GPU" in str(found.unplaced["chat-1"].remedy)


def test_a_replica_that_runs_too_close_moves_where_there_is_room() -> None:
    reports = {"n0": node("n0", 2, 2)}
    slices = reports["n0"].slices
    seats = {f"chat-{i}": Seat(replica=f"chat-{i}", model="chat", node="n0", slice_id=slices[i].id) for i in range(2)}
    model = ModelConfig(name="chat", source="org/x", replicas=2, spread="gpus")
    found = seat_replicas([model], reports, lambda _, s: fit("a", s), seats).seats
    assert found["chat-0"] == seats["chat-0"]
    assert found["chat-1"].slice_id.startswith("GPU-1/")


@pytest.mark.parametrize(("priority", "stays"), [(0, "embed"), (1, "chat")])
def test_who_runs_gives_way_only_to_what_is_more_important(priority: int, stays: str) -> None:
    models = [
        ModelConfig(name="chat", source="org/x", replicas=1, priority=priority),
        ModelConfig(name="embed", source="org/x", replicas=1),
    ]
    here = {"embed-0": Seat(replica="embed-0", model="embed", node="n1", slice_id="cpu-0")}
    found = seat_replicas(models, {"n1": report("n1", 1)}, lambda _, s: fit("a", s), here)
    assert set(found.seats) == {f"{stays}-0"}
    assert set(found.unplaced) == {"chat-0", "embed-0"} - set(found.seats)


def report(node: str, slices: int) -> NodeReport:
    versions = Versions(sliceway="1", python="3.11", ray="2")
    own = tuple(one(i, 8) for i in range(slices))
    return NodeReport(node=node, address="10.0.0.1", versions=versions, boot="b", slices=own)


def test_seats_are_worked_out_again_only_where_something_counts() -> None:
    looked: list[str] = []

    def fit_on(model: str, target: Slice) -> SliceFit:
        looked.append(target.id)
        return fit("a", target)

    models = [ModelConfig(name="chat", source="org/x", replicas=2)]
    book = SeatingBook()
    first = book.seat(models, {"n": report("n", 2)}, fit_on, {})
    assert set(first.seats) == {"chat-0", "chat-1"}
    count = len(looked)
    assert book.seat(models, {"n": report("n", 2)}, fit_on, {}) is first
    assert len(looked) == count
    fewer = book.seat(models, {"n": report("n", 1)}, fit_on, {})
    assert set(fewer.unplaced) == {"chat-1"}
    assert book.seat(models, {"n": report("n", 2)}, fit_on, {}).seats == first.seats


def test_a_fleet_of_thousands_keeps_its_seats() -> None:
    """What would take minutes if every replica were compared with every slice."""
    reports = {f"n{i}": report(f"n{i}", 8) for i in range(250)}
    models = [ModelConfig(name="chat", source="org/x", replicas=2000)]
    seats = {
        f"chat-{8 * n + i}": Seat(replica=f"chat-{8 * n + i}", model="chat", node=f"n{n}", slice_id=f"cpu-{i}")
        for n in range(250)
        for i in range(8)
    }
    assert seat_replicas(models, reports, lambda _, s: fit("a", s), seats).seats == seats


def test_a_fleet_of_thousands_is_seated_from_nothing_and_told_what_is_missing() -> None:
    """What would take minutes if every replica were compared with every slice."""
    reports = {f"n{i:04}": node(f"n{i:04}", *[1] * 8) for i in range(250)}
    models = [
        ModelConfig(name="chat", source="org/x", replicas=200, spread="nodes"),
        ModelConfig(name="code", source="org/x", replicas=2000),
        ModelConfig(name="edge", source="org/x", replicas=300, spread="nodes", priority=1),
    ]
    found = seat_replicas(models, reports, lambda _, s: fit("a", s), {})
    assert len(found.seats) == 2000
    assert len({s.node for s in found.seats.values() if s.model == "edge"}) == 250
    assert sum(isinstance(why, NoSliceApart) for why in found.unplaced.values()) == 50


# ---- there for demand


def following(name: str = "chat", least: int = 1, most: int = 9, **more: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": name, "source": "org/x", "replicas": {"min": least, "max": most}} | more)


def with_demand(
    models: list[ModelConfig], numbers: dict[str, int], *reports: NodeReport, current: dict[str, Seat] | None = None
) -> Seating:
    known = {r.node: r for r in reports}
    return seat_replicas(models, known, lambda _, s: fit("a", s), current or {}, numbers=numbers)


def test_demand_brings_replicas_beyond_the_least_onto_any_node() -> None:
    found = with_demand([following()], {"chat": 3}, node("n0", 2), node("n1", 2))
    assert set(found.seats) == {"chat-0", "chat-1", "chat-2"}
    assert {s.node for s in found.seats.values()} == {"n0", "n1"}
    assert found.unplaced == {}


def test_demand_without_a_free_slice_is_told() -> None:
    found = with_demand([following()], {"chat": 3}, node("n0", 2))
    assert set(found.seats) == {"chat-0", "chat-1"}
    told = found.unplaced["chat-2"]
    assert told.code == "no_free_slice"
    assert told.remedy == "It starts as soon as one is; add a node, or lower `max`."
    assert told.where == "models.chat.replicas"


def test_of_two_models_that_demand_asks_for_the_more_important_one_has_the_slice() -> None:
    models = [following("batch"), following("chat", priority=5)]
    before = with_demand(models, {"batch": 2}, node("n0", 3)).seats
    assert set(before) == {"batch-0", "batch-1", "chat-0"}
    found = with_demand(models, {"batch": 2, "chat": 2}, node("n0", 3), current=dict(before))
    assert set(found.seats) == {"batch-0", "chat-0", "chat-1"}
    assert set(found.unplaced) == {"batch-1"}
    assert {r: found.seats[r] for r in ("batch-0", "chat-0")} == {r: before[r] for r in ("batch-0", "chat-0")}


def test_nobody_who_runs_gives_way_to_demand_that_is_as_important() -> None:
    models = [following("batch"), following("chat")]
    before = with_demand(models, {"batch": 2}, node("n0", 3)).seats
    found = with_demand(models, {"batch": 2, "chat": 2}, node("n0", 3), current=dict(before))
    assert found.seats == before
    assert set(found.unplaced) == {"chat-1"}


def test_a_new_model_takes_free_slices_before_those_of_replicas_for_demand() -> None:
    models = [following()]
    before = with_demand(models, {"chat": 2}, node("n0", 3)).seats
    fixed = ModelConfig(name="code", source="org/x", replicas=1)
    found = with_demand([*models, fixed], {"chat": 2}, node("n0", 3), current=dict(before))
    assert {r: s for r, s in found.seats.items() if r != "code-0"} == before
    crowded = with_demand([*models, fixed], {"chat": 2}, node("n0", 2), current=dict(before))
    assert set(crowded.seats) == {"chat-0", "code-0"}
    assert set(crowded.unplaced) == {"chat-1"}


def test_demand_gets_nothing_of_what_is_cordoned_but_keeps_what_it_has() -> None:
    closed = node("n0", 3)
    closed = closed.model_copy(update={"cordoned": tuple(s.id for s in closed.slices)})
    found = with_demand([following()], {"chat": 2}, closed)
    assert set(found.seats) == {"chat-0"}, "what is configured starts there"
    before = with_demand([following()], {"chat": 2}, node("n0", 3)).seats
    assert with_demand([following()], {"chat": 2}, closed, current=dict(before)).seats == before


def test_replicas_for_demand_are_kept_apart_from_the_configured_ones() -> None:
    found = with_demand([following(spread="nodes")], {"chat": 3}, node("n0", 3), node("n1", 3))
    assert {s.node for s in found.seats.values()} == {"n0", "n1"}
    assert set(found.unplaced) == {"chat-2"}


def test_each_tenant_with_replicas_of_its_own_has_its_least_and_what_its_demand_asks_for() -> None:
    found = seat_replicas(
        [following()],
        {"n0": node("n0", 6)},
        lambda _, s: fit("a", s),
        {},
        pools={"chat": (None, "acme")},
        numbers={"chat@acme": 3, "chat": 1},
    )
    assert set(found.seats) == {"chat-0", "chat@acme-0", "chat@acme-1", "chat@acme-2"}
    assert {s.model for s in found.seats.values()} == {"chat"}


def large(node: str, *indices: int) -> NodeReport:
    """A node with a 1g.10gb of GPU 0, and the larger slices of these GPUs."""
    small = card(node, 0, 1)
    gpus = [Gpu(f"GPU-{i}", i, "H100", 80 * GIB) for i in indices]
    more = tuple(
        Slice(f"{g.uuid}/2g.20gb@0", SliceKind.MIG, "2g.20gb", 16 * GIB, uuid=f"MIG-{node}-{g.index}-l", gpu=g)
        for g in gpus
    )
    return report(node, 0).model_copy(update={"slices": (*small, *more)})


SMALL = Seat(replica="chat-0", model="chat", node="n0", slice_id="GPU-0/1g.10gb@0")


def reseated(*models: dict[str, object], reports: list[NodeReport], **here: Seat) -> Seating:
    parsed = [ModelConfig.model_validate({"source": "org/x", "replicas": 1} | m) for m in models]
    current = {seat.replica: seat for seat in here.values()}
    return seat_replicas(parsed, {r.node: r for r in reports}, lambda _, s: fit("a", s), current)


def test_who_runs_where_profiles_do_not_want_it_any_more_serves_on_until_there_is_room() -> None:
    chat = {"name": "chat", "profiles": ["2g.20gb"]}
    found = reseated(chat, reports=[large("n0")], a=SMALL)
    assert found.seats == {"chat-0": SMALL}
    assert found.unplaced == {}
    assert "it serves on until there is a free slice of 2g.20gb" in str(found.staying["chat-0"])
    assert "sliceway apply CONFIG --ray HOST:PORT" in str(found.staying["chat-0"])
    found = reseated(chat, reports=[large("n0", 1)], a=SMALL)
    assert found.seats["chat-0"].slice_id == "GPU-1/2g.20gb@0"
    assert not found.staying


def test_who_does_not_run_waits_for_the_profile() -> None:
    chat = {"name": "chat", "profiles": ["2g.20gb"]}
    assert set(reseated(chat, reports=[large("n0")]).unplaced) == {"chat-0"}


def test_who_serves_on_gives_way_to_what_is_more_important_and_to_nobody_else() -> None:
    chat = {"name": "chat", "profiles": ["2g.20gb"]}
    other = {"name": "other", "profiles": ["1g.10gb"]}
    found = reseated(chat, other, reports=[large("n0")], a=SMALL)
    assert found.seats == {"chat-0": SMALL}
    assert set(found.staying) == {"chat-0"}
    assert "no slice is free for 'other-0': chat-0 serves on where it could be" in str(found.unplaced["other-0"])
    found = reseated(chat, other | {"priority": 1}, reports=[large("n0")], a=SMALL)
    assert {r: s.slice_id for r, s in found.seats.items()} == {"other-0": "GPU-0/1g.10gb@0"}
    assert (set(found.unplaced), found.staying) == ({"chat-0"}, {})


def test_a_replica_more_of_another_model_does_not_drive_out_who_serves_on() -> None:
    chat = {"name": "chat", "profiles": ["2g.20gb"]}
    other = {"name": "other", "profiles": ["1g.10gb"], "replicas": 3}
    runs = [Seat(replica=f"other-{i}", model="other", node=f"n{i + 1}", slice_id="GPU-0/1g.10gb@0") for i in range(2)]
    reports = [large("n0"), large("n1"), large("n2")]
    found = reseated(chat, other, reports=reports, a=SMALL, b=runs[0], c=runs[1])
    assert set(found.seats) == {"chat-0", "other-0", "other-1"}
    assert found.seats["chat-0"] == SMALL
    assert set(found.unplaced) == {"other-2"}


def test_a_replica_for_demand_that_serves_on_gives_way_to_whoever_is_configured() -> None:
    chat = {"name": "chat", "profiles": ["2g.20gb"], "replicas": {"min": 1, "max": 2}}
    other = {"name": "other", "profiles": ["1g.10gb"], "priority": -1}
    models = [ModelConfig.model_validate({"source": "org/x", "replicas": 1} | m) for m in (chat, other)]
    gpu = Gpu("GPU-0", 0, "H100", 80 * GIB)
    first = Slice("GPU-0/2g.20gb@0", SliceKind.MIG, "2g.20gb", 16 * GIB, uuid="MIG-n1-l", gpu=gpu)
    reports = {"n0": large("n0"), "n1": report("n1", 0).model_copy(update={"slices": (first,)})}
    runs = [
        Seat(replica="chat-0", model="chat", node="n1", slice_id=first.id),
        Seat(replica="chat-1", model="chat", node="n0", slice_id="GPU-0/1g.10gb@0"),
    ]

    def seated(*some: ModelConfig) -> Seating:
        current = {seat.replica: seat for seat in runs}
        return seat_replicas(some, reports, lambda _, s: fit("a", s), current, numbers={"chat": 2})

    assert set(seated(models[0]).staying) == {"chat-1"}
    found = seated(*models)
    assert {r: s.key for r, s in found.seats.items()} == {"chat-0": runs[0].key, "other-0": runs[1].key}
    assert set(found.unplaced) == {"chat-1"}


def test_nobody_stays_where_spread_would_not_have_it() -> None:
    chat = {"name": "chat", "profiles": ["2g.20gb"], "replicas": 2, "spread": "nodes"}
    found = reseated(chat, reports=[large("n0", 1)], a=SMALL)
    assert len(found.seats) == 1
    assert len(found.unplaced) == 1
    assert found.staying == {}
