"""Whose a replica is: by its name in a planned fleet, in order elsewhere."""

from __future__ import annotations

from gateway.admission.domains import owners
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
