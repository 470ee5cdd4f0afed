"""The shipped dashboards and alert rules, and the programs of Prometheus that they are checked with."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
FILES = ROOT / "configs" / "observability"
DASHBOARDS = tuple(sorted((FILES / "grafana").glob("*.json")))
MISSING = "Prometheus is not installed: make prometheus, or Debian's package prometheus"


def program(name: str) -> str | None:
    """Where `promtool` or `prometheus` is: the machine's, else what `make prometheus` unpacked; None where there is none."""
    unpacked = Path(sys.prefix) / "tools" / "prometheus" / "usr" / "bin"
    return shutil.which(name) or shutil.which(name, path=unpacked)


def panels(path: Path) -> Iterator[dict[str, Any]]:
    """The panels of one dashboard."""
    yield from json.loads(path.read_text(encoding="utf-8"))["panels"]


def rules() -> Iterator[dict[str, Any]]:
    """Every alert."""
    for group in YAML(typ="safe").load(FILES / "rules.yaml")["groups"]:
        yield from group["rules"]


def queries() -> Iterator[tuple[str, str]]:
    """Every query with where it stands: those of the panels, as they are written, and those of the alerts."""
    for path in DASHBOARDS:
        for panel in panels(path):
            yield from ((f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"])
    yield from ((rule["alert"], rule["expr"]) for rule in rules())
