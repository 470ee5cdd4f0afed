from __future__ import annotations

from typing import Any

import pytest

from gateway.ray_status import answer, application


def status(*states: str, unplaced: dict[str, str] | None = None) -> dict[str, Any]:
    replicas = [{"replica": f"chat-{n}", "slice": "s", "state": s, "reason": None} for n, s in enumerate(states)]
    return {"nodes": [], "replicas": replicas, "unplaced": unplaced or {}}


@pytest.mark.parametrize(
    ("told", "code"),
    [(None, 503), (status(), 503), (status("starting"), 503), (status("starting", "ready"), 200)],
)
def test_a_cluster_is_ready_as_soon_as_one_replica_is(told: dict[str, Any] | None, code: int) -> None:
    got, body = answer(told)
    assert got == code
    assert body["ready"] is (code == 200)


def test_what_waits_is_told_with_its_reason() -> None:
    _, body = answer(status("ready", unplaced={"chat-1": "no slice is large enough"}))
    assert body["unplaced"] == {"chat-1": "no slice is large enough"}


def test_the_application_takes_no_arguments() -> None:
    with pytest.raises(ValueError, match="takes no arguments, and was given port"):
        application({"port": 1})
