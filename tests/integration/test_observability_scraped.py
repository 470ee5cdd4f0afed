"""What a simulated fleet tells to Prometheus: by name, and in a real Prometheus with the shipped configuration, rules and dashboards."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from tests.integration.simulated_fleet import Fleet, simulated_fleet, until_seen
from tests.observability import FILES, MISSING, program, queries

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

PATIENCE_SECONDS = 90.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever proxy this machine is told to use."""
VARIABLES = {"$__rate_interval": "5m", '"$slice"': '".*"', '"$tenant"': '".*"'}
# Simulated engines count no preemptions, prefixes or latencies, nobody waits here, and there is no hour before.
EMPTY_HERE = re.compile(r"vllm:(?!kv_cache_usage|num_requests)|sliceway_queue_requests|offset 1h")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One tenant has been answered, and one refused by its limit."""
    with simulated_fleet(tmp_path_factory.mktemp("fleet")) as one:
        until_seen(one.key("quiet"), one, 200)
        until_seen(one.key("held"), one, 429)
        yield one


def test_whatever_dashboards_and_alerts_ask_for_is_in_a_scrape(fleet: Fleet) -> None:
    """What only vLLM tells is held against its names in the unit tests."""
    pages = [fleet.get("/metrics"), fleet.get("/metrics/engines")]
    told = {s.name for page in pages for family in text_string_to_metric_families(page) for s in family.samples}
    asked = {name for _, query in queries() for name in re.findall(r"\bsliceway_[a-z0-9_]+", query)}
    assert len(asked) > 15
    # Only where nobody waits there is no line of who does, and where everything has a slice none of what has none.
    assert asked - told <= {"sliceway_queue_requests", "sliceway_unplaced_replicas", "sliceway_limit_store_available"}


@dataclass(frozen=True)
class Prometheus:
    """A server that answers at `url`."""

    url: str

    def get(self, path: str, **asked: str) -> Any:
        """What its HTTP API answers, as soon as it does. Raises AssertionError for a query that it refuses."""
        return until(lambda: self._once(path, asked), f"an answer to {path} {asked}")

    def _once(self, path: str, asked: dict[str, str]) -> Any:
        """None where there is no answer yet: while it starts, and when a busy machine lets a query run out of time, it says 503."""
        try:
            with DIRECT.open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(asked)}", timeout=30) as got:
                answer = json.load(got)
        except urllib.error.HTTPError as refused:
            with refused:
                told = refused.read().decode()
            if refused.code != 503:
                raise AssertionError(f"{asked}: {told}") from None
            return None
        except (OSError, http.client.HTTPException):
            return None
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str) -> list[float]:
        """The values of every series that `query` has at this moment."""
        return [float(row["value"][1]) for row in self.get("query", query=query)["result"]]


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


@contextmanager
def prometheus(fleet: Fleet, directory: Path) -> Iterator[Prometheus]:
    """The shipped configuration with this fleet's address, and looks that are close together."""
    config = YAML(typ="safe").load(FILES / "prometheus.yaml")
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(FILES / name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [fleet.url.removeprefix("http://")]}]
    path = directory / "prometheus.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    command = [str(program("prometheus")), f"--config.file={path}", f"--storage.tsdb.path={directory / 'data'}"]
    log = directory / "prometheus.log"
    with log.open("wb") as file:
        running = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=file, stderr=file)

    def port() -> int | None:
        assert running.poll() is None, log.read_text(encoding="utf-8")
        found = psutil.Process(running.pid).net_connections("tcp")
        return next((one.laddr.port for one in found if one.status == psutil.CONN_LISTEN), None)

    try:
        server = Prometheus(f"http://127.0.0.1:{until(port, 'Prometheus listens')}")
        server.get("query", query="up")
        yield server
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(60)


def test_a_real_prometheus_understands_every_panel_and_every_alert(fleet: Fleet, tmp_path: Path) -> None:
    if program("prometheus") is None:
        pytest.skip(MISSING)
    key = fleet.key("noisy")
    until_seen(key, fleet, 200)
    with prometheus(fleet, tmp_path) as server:
        first = 'sliceway_ttft_seconds_count{tenant="noisy"}'
        until(lambda: server.values(first), "the first look at the gateway")
        before = sum(server.values(first))
        assert fleet.ask(key) == 200
        until(lambda: sum(server.values(first)) > before, "a look after another answer")
        # A look that took too long on a busy machine leaves a gap; the next one fills it.
        until(lambda: len(server.values("max_over_time(up[5m]) == 1")) == 2, "looks at both pages")
        until(lambda: not panels_without_data(server), "data in every panel")
        quantile = 'histogram_quantile(0.5, sum by (le) (rate(sliceway_ttft_seconds_bucket{tenant="noisy"}[5m])))'
        until(lambda: server.values(quantile), "a median of one tenant")
        (took,) = server.values(quantile)
        assert took > 0.01, "an engine's first token takes 20 ms"
        alerts(server)


def panels_without_data(server: Prometheus) -> list[str]:
    """Where a query of a panel has no series, though this fleet has what it asks for. Every query is taken, those of alerts, too."""
    empty = []
    for where, query in queries():
        asked = query
        for name, value in VARIABLES.items():
            asked = asked.replace(name, value)
        assert "$" not in asked, where
        if not server.values(asked) and ":" in where and not EMPTY_HERE.search(query):
            empty.append(where)
    return empty


def alerts(server: Prometheus) -> None:
    """Every alert is evaluated without an error, and none is raised by a fleet that is well."""

    def evaluated() -> list[Any]:
        rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
        return rules if rules and all(rule["health"] != "unknown" for rule in rules) else []

    for rule in until(evaluated, "the rules are evaluated"):
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
        assert rule["state"] != "firing", rule
