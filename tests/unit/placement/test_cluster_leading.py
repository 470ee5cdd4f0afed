"""By whose configuration a cluster works."""

from __future__ import annotations

from placement.cluster.leading import LEADER_SECONDS, Lead


def test_a_second_one_is_told_who_leads_until_that_one_is_silent() -> None:
    lead = Lead()
    assert lead.claim("a", 100.0) is None
    assert lead.claim("b", 101.0) == "a"
    assert lead.claim("a", 110.0) is None
    assert lead.claim("b", 110.0 + LEADER_SECONDS - 0.1) == "a"
    assert lead.claim("b", 110.0 + LEADER_SECONDS) is None
    assert lead.claim("a", 111.0 + LEADER_SECONDS) == "b"
