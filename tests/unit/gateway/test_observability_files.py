"""Dashboards and alert rules: they ask only for what is exported, and alerts fire when they have to."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gateway.digests import METRICS
from gateway.engine_metrics import FAMILIES
from tests.observability import DASHBOARDS, FILES, MISSING, ROOT, program, rules

_NAME = re.compile(r"\b(?:sliceway|vllm:)[a-z0-9_:]*")
_STRINGS = re.compile(r'"[^"]*"')


def exported() -> set[str]:
    """Sample names, from the source: a running gateway shows a family only when it has something to say."""
    source = (ROOT / "gateway" / "metrics.py").read_text(encoding="utf-8")
    of_slices = (ROOT / "gateway" / "slice_metrics.py").read_text(encoding="utf-8")
    names = set(re.findall(r'"(sliceway_[a-z_]+)"', source))
    names |= set(re.findall(r'"(sliceway_slice_[a-z_]+)"', of_slices))
    names |= {f"sliceway_{name}_total" for name in re.findall(r'_counter\(\s*"([a-z_]+)"', source)}
    names |= {f"{name}_total" for name in re.findall(r'CounterMetricFamily\(\s*"(sliceway_[a-z_]+)"', source)}
    histograms = [f"sliceway_{metric}" for metric in METRICS]
    histograms += ["sliceway_batch_e2e_seconds", "sliceway_batch_queue_seconds"]
    histograms += [name for name, (kind, _) in FAMILIES.items() if kind == "histogram"]
    return (
        names
        | set(FAMILIES)
        | {"sliceway_engine_up"}
        | {f"{h}_{part}" for h in histograms for part in ("bucket", "sum", "count")}
    )


def asked(expression: str) -> set[str]:
    return set(_NAME.findall(_STRINGS.sub("", expression)))


def test_every_rule_asks_for_what_is_exported_and_says_what_to_do() -> None:
    found = list(rules())
    assert len({rule["alert"] for rule in found}) == len(found) >= 6
    for rule in found:
        assert asked(rule["expr"]), rule
        assert asked(rule["expr"]) <= exported(), rule["alert"]
        assert {"summary", "description"} <= set(rule["annotations"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_every_panel_asks_for_what_is_exported(path: Path) -> None:
    board = json.loads(path.read_text(encoding="utf-8"))
    variables = {v["name"] for v in board["templating"]["list"]} | {"__rate_interval"}
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(board["panels"]) + 1))
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert asked(target["expr"]), panel["title"]
            assert asked(target["expr"]) <= exported(), panel["title"]
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= variables, panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")")


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_a_dashboard_has_what_grafana_needs_of_one(path: Path) -> None:
    """Dashboard JSON of schema version 39: an id within 40 characters, a grid of 24 columns, and a letter for each query."""
    board = json.loads(path.read_text(encoding="utf-8"))
    assert board["schemaVersion"] == 39
    assert re.fullmatch(r"[\w-]{1,40}", board["uid"])
    assert {"title", "time", "templating", "panels"} <= board.keys()
    assert board["templating"]["list"][0] | {"label": ""} == {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "label": "",
    }
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert {"type", "title", "datasource", "fieldConfig", "options"} <= panel.keys()
        assert {"defaults", "overrides"} == panel["fieldConfig"].keys()
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == [chr(65 + i) for i in range(len(letters))]


def test_the_dashboards_are_what_the_script_writes(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "dashboards"))
    assert {path.stem for path in DASHBOARDS} == set(script["DASHBOARDS"])
    for name, (title, panels, variable) in script["DASHBOARDS"].items():
        written = json.loads((FILES / "grafana" / f"{name}.json").read_text(encoding="utf-8"))
        assert written == script["dashboard"](name, title, panels, variable), "run scripts/dashboards"


def test_every_alert_is_tested_both_ways() -> None:
    """`promtool test rules` does the testing; that no alert is left out of it is seen here."""
    told = YAML(typ="safe").load(FILES / "rules.test.yaml")
    asked = [one for test in told["tests"] for one in test["alert_rule_test"]]
    fired = {one["alertname"] for one in asked if one["exp_alerts"]}
    spared = {one["alertname"] for one in asked if not one["exp_alerts"]}
    names = {rule["alert"] for rule in rules()}
    assert fired == names
    assert spared == {rule["alert"] for rule in rules() if "for" in rule}


def test_a_mirror_that_never_answers_holds_nothing_up(tmp_path: Path) -> None:
    """The script goes on, says what it gave up, and leaves nothing behind: nobody's tests wait for Debian's mirrors."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "dirname", "id", "mktemp", "mkdir", "mv", "rm", "sleep", "timeout"):
        (commands / name).symlink_to(str(shutil.which(name)))
    for name, does in (("apt-get", "exec sleep 600"), ("dpkg-deb", "exit 1")):
        (commands / name).write_text(f"#!{commands}/bash\n{does}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    environment = {"PATH": str(commands), "VENV": str(tmp_path / "venv"), "APT_SECONDS": "0.1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [ROOT / "scripts" / "need-prometheus"],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "apt-get download was given up: no end after 0.1 seconds" in done.stderr
    assert "are not held against a Prometheus here" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    "words",
    [("check", "rules", "rules.yaml"), ("check", "config", "prometheus.yaml"), ("test", "rules", "rules.test.yaml")],
)
def test_promtool_takes_the_files(words: tuple[str, ...]) -> None:
    if (promtool := program("promtool")) is None:
        pytest.skip(MISSING)
    done = subprocess.run([promtool, *words], cwd=FILES, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr + done.stdout
