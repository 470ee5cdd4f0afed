"""docs/promises.md: a row for everything that users of other gateways suffer from, and only tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
COLLECTED = {"E": 10, "L": 6, "F": 6, "P": 6, "D": 3, "Q": 2, "M": 3, "H": 2, "C": 4, "T": 2}
"""How many there are of each kind: engines, life of slices, fairness, performance, disconnects, quotas, metrics, health, configuration, tools."""

ROW = re.compile(r"^\| ([A-Z]\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
NAMED = re.compile(r"`((?:tests/\S+/)?test_\w+(?:\.py)?)`")


def there() -> set[str]:
    """Every test, by its name; and every file of them, by its name and by its path."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= {path.name, str(path.relative_to(ROOT))}
        functions = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(n, "decorator_list"))
        found |= {function.name for function in functions}
    return found


def test_everything_that_was_collected_has_a_row_and_only_one() -> None:
    rows = [row[0] for row in ROW.findall(PAGE)]
    assert rows == [f"{kind}{number}" for kind, count in COLLECTED.items() for number in range(1, count + 1)]


def test_every_row_names_a_test_and_every_test_that_is_named_exists() -> None:
    known = there()
    for which, what, tests in ROW.findall(PAGE):
        named = NAMED.findall(tests)
        assert what, which
        assert named, f"{which} is held by nothing"
        assert set(named) <= known, f"{which}: {sorted(set(named) - known)}"
    assert "test_no_such_test" not in known


def test_readers_are_led_there() -> None:
    for page in ("README.md", "docs/fairness.md", "docs/http.md"):
        assert "promises.md" in (ROOT / page).read_text(encoding="utf-8"), page
