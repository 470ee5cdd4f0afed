"""docs/http.md names what there is: every relayed route, every setting of batches, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.batches.api import ENDPOINTS
from gateway.surface import BY_ID, ROUTES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")


def test_every_relayed_route_is_on_the_page() -> None:
    named = set(re.findall(r"`(?:GET |POST )?(/[a-z0-9_/{}]+)`", PAGE))
    paths = {route.path.replace("{response_id}", "{id}") for route in (*ROUTES.values(), *BY_ID)}
    assert paths <= named
    assert {path for path in named if path in ENDPOINTS} == set(ENDPOINTS)


def test_every_test_that_the_page_names_exists() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    there = {file.name for file in files}
    for file in files:
        there |= set(re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8")))
    assert set(re.findall(r"`(test_\w+(?:\.py)?)`", PAGE)) <= there
