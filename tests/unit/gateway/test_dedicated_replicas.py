"""Whose a replica is: by its name in a planned fleet, in order elsewhere."""

from __future__ import annotations

from gateway.admission import Admission, AdmissionPolicy, Ask, Loads
from gateway.admission.domains import owners
from gateway.routes import Routes, build_routes
from gateway.testing import FakeClock, replica_row
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow
from placement.workload import demand_name


def test_a_planned_replica_says_in_its_name_whose_it_is() -> None:
    names = [f"{demand_name('chat', tenant)}-{n}" for tenant in (None, "acme-corp", "globex") for n in range(2)]
    assert owners(names, ["acme-corp", "globex"]) == {
        "chat@acme-corp-0": "acme-corp",
        "chat@acme-corp-1": "acme-corp",
        "chat@globex-0": "globex",
        "chat@globex-1": "globex",
    }


def test_replicas_of_a_tenant_that_is_dedicated_no_longer_serve_all() -> None:
    assert owners(["chat-0", "chat@acme-0", "chat@globex-0"], ["globex"]) == {"chat@globex-0": "globex"}


def test_elsewhere_each_dedicated_tenant_gets_one_in_order() -> None:
    assert owners(["chat-10", "chat-2"], ["acme", "globex", "last"]) == {"chat-2": "acme", "chat-10": "globex"}


def test_where_replicas_follow_demand_the_names_alone_say_whose_they_are() -> None:
    assert owners(["chat-0"], ["acme"]) == {"chat-0": "acme"}
    assert owners(["chat-0"], ["acme"], named=True) == {}, "acme's own sleep, and it does not get the others'"
    assert owners(["chat@acme-0"], ["acme"], named=True) == {"chat@acme-0": "acme"}


# ---- while a fleet is changed under requests

SHARED = AdmissionPolicy(planned=True)
DEDICATED = AdmissionPolicy(planned=True, dedicated={"chat": ("acme",)})


class Fleet:
    """A gateway's admission in front of replicas of one model, on slices of a GPU."""

    def __init__(self, *replicas: str, policy: AdmissionPolicy, kind: str = "mig") -> None:
        self.kind = kind
        self.routes = Routes()
        self.show(*replicas)
        self.admission = Admission(lambda: self.routes, Loads(bound=8), FakeClock(), policy)

    def show(self, *replicas: str) -> None:
        """These are there; those that end with `?` are not ready yet."""
        rows = [self._row(name.rstrip("?"), ready=not name.endswith("?")) for name in replicas]
        table = RoutingTable(generation=1, models=(ModelRow(name="chat"),), replicas=tuple(rows))
        self.routes = build_routes(table, (), {})
        if hasattr(self, "admission"):
            self.admission.follow_routes()

    def _row(self, name: str, *, ready: bool) -> ReplicaRow:
        state = ReplicaState.READY if ready else ReplicaState.STARTING
        row = replica_row(name, "chat", f"unix:/{name}", state=state)
        return row.model_copy(update={"slice": SliceRow(id=f"of-{name}", kind=self.kind)})

    def served_by(self, tenant: str) -> str | None:
        """The replica that one request is given."""
        claim = self.admission.claim(Ask(tenant, "chat", b"{}"), self.routes.models["chat"], 0.0)
        row = self.admission.place(claim, lambda: None, 0.0)
        return row.replica if row else None


def test_a_tenant_that_is_to_have_its_own_stays_with_the_others_until_they_serve() -> None:
    fleet = Fleet("chat-0", policy=SHARED)
    fleet.admission.configure(DEDICATED)
    assert (fleet.served_by("acme"), fleet.served_by("globex")) == ("chat-0", "chat-0")
    fleet.show("chat-0", "chat@acme-0?")
    assert (fleet.served_by("acme"), fleet.served_by("globex")) == ("chat-0", "chat-0")
    fleet.show("chat-0", "chat@acme-0")
    assert (fleet.served_by("acme"), fleet.served_by("globex")) == ("chat@acme-0", "chat-0")


def test_once_it_has_its_own_it_never_gets_the_others_again() -> None:
    fleet = Fleet("chat-0", policy=SHARED)
    fleet.admission.configure(DEDICATED)
    fleet.show("chat-0", "chat@acme-0")
    fleet.show("chat-0", "chat@acme-0?")
    fleet.admission.configure(DEDICATED)
    assert fleet.admission.pool("chat", "acme").tenant == "acme"


def test_a_tenant_that_gives_its_own_up_goes_to_the_others_at_once() -> None:
    fleet = Fleet("chat-0", "chat@acme-0", policy=DEDICATED)
    assert fleet.admission.pool("chat", "acme").tenant == "acme"
    fleet.admission.configure(SHARED)
    fleet.show("chat-0")
    assert fleet.served_by("acme") == "chat-0"


def test_where_nothing_is_planned_it_gets_one_of_those_there_are_at_once() -> None:
    for kind, policy in (("cpu", DEDICATED), ("mig", AdmissionPolicy(dedicated={"chat": ("acme",)}))):
        fleet = Fleet("chat-0", "chat-1", policy=AdmissionPolicy(), kind=kind)
        fleet.admission.configure(policy)
        assert (fleet.served_by("acme"), fleet.served_by("globex")) == ("chat-0", "chat-1")
