"""By whose configuration a cluster works, and what its leader tells of its plans."""

from __future__ import annotations

from datetime import UTC, datetime

from placement.cluster.leading import LEADER_SECONDS, Lead, Leaders
from placement.status import LeaderStatus, RepartitionEvent, RepartitionStatus


def test_a_second_one_is_told_who_leads_until_that_one_is_silent() -> None:
    lead = Lead()
    assert lead.claim("a", 100.0) is None
    assert lead.claim("b", 101.0) == "a"
    assert lead.claim("a", 110.0) is None
    assert lead.claim("b", 110.0 + LEADER_SECONDS - 0.1) == "a"
    assert lead.claim("b", 110.0 + LEADER_SECONDS) is None
    assert lead.claim("a", 111.0 + LEADER_SECONDS) == "b"


def test_only_who_leads_and_says_so_is_taken_at_its_word() -> None:
    lead = Lead()
    assert not lead.leads("a", 100.0)
    lead.claim("a", 100.0)
    assert lead.leads("a", 101.0)
    assert not lead.leads("b", 101.0)
    assert not lead.leads("a", 100.0 + LEADER_SECONDS)


def test_what_is_waited_for_counts_down_and_gateways_are_told_what_lasts() -> None:
    event = RepartitionEvent(at=datetime(2026, 1, 1, tzinfo=UTC), result="proposed", reason="more")
    told = RepartitionStatus(
        mode="automatic",
        running=True,
        step="s",
        proposed="more",
        next_in_seconds=30.0,
        counts={"done": 1},
        events=(event,),
    )
    leaders = Leaders(LeaderStatus(repartition=told), 100.0)
    for now, left in ((100.0, 30.0), (112.0, 18.0), (130.0, None), (200.0, None)):
        shown = leaders.as_public(now)
        assert shown is not None
        assert shown["repartition"]["next_in_seconds"] == left
    lasting = leaders.repartition(running=False)
    assert lasting == RepartitionStatus(mode="automatic", proposed="more", counts={"done": 1})
    assert leaders.repartition(running=True).running, "the head knows what it carries out"
    assert Leaders().as_public(1.0) is None
    assert Leaders().repartition(running=False) == RepartitionStatus()
