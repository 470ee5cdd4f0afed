"""Replicas that follow demand, with the real processes: asleep, woken by a request, more under load, fewer after it, asleep again."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from placement.table import ReplicaState

pytestmark = pytest.mark.integration

Site = Any
Eventually = Callable[..., Any]


def configure(site: Site, port: int, *models: dict[str, Any]) -> None:
    site.write(*models, gateway={"listen": f"127.0.0.1:{port}"}, drain_timeout_seconds=1)
    site.scale_hastily()


def ask(port: int, path: str = "/readyz", body: dict[str, Any] | None = None) -> tuple[int, Any, Any]:
    """Status, JSON body and headers; status 0 where nobody answers."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers
    except OSError:
        return 0, None, None


def complete(port: int) -> tuple[int, Any, Any]:
    return ask(port, "/v1/completions", {"model": "a", "prompt": "hello", "max_tokens": 3})


@contextmanager
def load(port: int, users: int, statuses: list[int]) -> Iterator[None]:
    """So many users who send one request after the other; what they got is in `statuses` at the end."""
    over = threading.Event()

    def use() -> None:
        while not over.is_set():
            statuses.append(complete(port)[0])

    threads = [threading.Thread(target=use) for _ in range(users)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_replicas_follow_demand_from_none_to_the_most_and_back(site: Site, eventually: Eventually, port: int) -> None:
    model = {
        "name": "a",
        "replicas": {"min": 0, "max": 2},
        "max_num_seqs": 2,
        "engine_args": ["--take", "0.05"],
    }
    configure(site, port, model)
    site.run("up", str(site.config))
    eventually(lambda: ask(port)[0] == 200, f"a model that can be woken counts as ready: {site.said()}", seconds=30)
    assert site.table().replicas == ()

    status, _, headers = complete(port)
    assert status == 200, "the first request waits for the engine that it wakes"
    assert headers["x-sliceway-generation"] == "1"

    statuses: list[int] = []
    with load(port, 1, statuses):
        with load(port, 6, statuses):
            site.wait_for("a-1", ReplicaState.READY)
        row = site.status().scaling["a"]
        assert (row.least, row.most) == (0, 2)
        eventually(lambda: {r.replica for r in site.table().replicas} == {"a-0"}, f"fewer again: {site.said()}")
    eventually(lambda: site.table().replicas == (), f"asleep again: {site.said()}")

    statuses.append(complete(port)[0])
    assert set(statuses) == {200}
    assert ask(port)[0] == 200


def test_who_waits_for_a_model_that_cannot_wake_in_time_is_told_when_to_come_again(
    site: Site, eventually: Eventually, port: int
) -> None:
    configure(site, port, {"name": "a", "replicas": {"min": 0, "max": 1}})
    raw = json.loads(site.config.read_text(encoding="utf-8"))
    raw["gateway"]["queue"] = {"max_wait_seconds": 0.2}
    site.config.write_text(json.dumps(raw), encoding="utf-8")
    site.run("gateway", str(site.config))  # and no controller that would start anything
    eventually(lambda: ask(port)[0] == 200, f"the gateway: {site.said()}", seconds=30)
    status, body, headers = complete(port)
    assert (status, body["error"]["code"]) == (503, "queue_timeout")
    assert int(headers["retry-after"]) >= 1


def test_configurations_change_under_load_and_a_wrong_one_changes_nothing(
    site: Site, eventually: Eventually, port: int
) -> None:
    def write(*models: dict[str, Any]) -> None:
        site.write(*models, gateway={"listen": f"127.0.0.1:{port}", "watch_config": True}, drain_timeout_seconds=1)

    def generation() -> int:
        return int((ask(port)[1] or {"config_generation": 0})["config_generation"])

    write({"name": "a"})
    site.run("up", str(site.config))
    site.wait_for("a-0", ReplicaState.READY)
    eventually(lambda: ask(port)[0] == 200, "the gateway serves", seconds=30)
    engine, statuses = site.ready("a-0"), []
    with load(port, 2, statuses):
        write({"name": "a"}, {"name": "b", "replicas": {"min": 0, "max": 1}})
        eventually(lambda: generation() == 2, "a model that is added")
        site.config.write_text("version: v1\nmodles: []\n", encoding="utf-8")
        eventually(lambda: (s := site.status()) and s.refused, "the refusal")
        assert generation() == 2
        assert complete(port)[2]["x-sliceway-generation"] == "2"
        write({"name": "a", "max_num_seqs": 8})
        eventually(lambda: generation() == 3, "a model that is gone, and another that is changed")
    assert set(statuses) == {200}
    assert site.ready("a-0") == engine
