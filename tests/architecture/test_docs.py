"""The documentation names what there is: every module on the architecture page, every command where users read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import typer.main

from gateway.cli import app

ROOT = Path(__file__).parents[2]
PACKAGES = ("model_registry", "placement", "gateway", "loadtests")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def module_paths() -> list[str]:
    """Every module with something in it, as `folder/name.py`."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return [str(p.relative_to(ROOT)) for p in paths if p.name != "__init__.py"]


def named_modules(page: str) -> set[str]:
    """Modules that the page names: by path, or by name on a line that begins with their folder.

    `placement/replicas/shim.py` names one; so does `shim` on a line that begins with `placement/replicas/`.
    """
    found = set(re.findall(r"[a-z_]+(?:/[a-z_0-9]+)+\.py", page))
    for line in page.splitlines():
        if begins := re.match(r"[\s|*-]*`((?:[a-z_0-9]+/)+)`", line):
            found |= {f"{begins.group(1)}{name}.py" for name in re.findall(r"`([a-z_0-9]+)(?:\.py)?`", line)}
    return found


def test_every_module_is_on_the_architecture_page() -> None:
    missing = sorted(set(module_paths()) - named_modules(ARCHITECTURE))
    assert missing == [], "give each its line in docs/architecture.md"


def test_the_architecture_page_names_no_module_that_is_gone() -> None:
    by_path = set(re.findall(r"[a-z_]+(?:/[a-z_0-9]+)+\.py", ARCHITECTURE))
    assert {path for path in by_path if not (ROOT / path).exists()} == set()


def commands() -> list[str]:
    """Every command that is not hidden, as it is typed."""

    def walk(command: click.Command, words: str) -> Iterator[str]:
        inside = getattr(command, "commands", {})
        if not inside:
            yield words
        for name, one in inside.items():
            if not one.hidden:
                yield from walk(one, f"{words} {name}")

    return sorted(walk(typer.main.get_command(app), "sliceway"))


def pages() -> str:
    """Everything that a user reads."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))


def test_every_command_is_documented() -> None:
    text = pages()
    missing = [command for command in commands() if not re.search(rf"\b{re.escape(command)}\b", text)]
    assert missing == [], "name each in README.md or a page under docs/"


def test_no_page_names_a_command_that_is_not_there() -> None:
    known = commands()
    heads = {words.split()[1] for words in known}
    written = set(re.findall(r"`sliceway ([a-z]+)", pages()))
    assert written <= heads, f"unknown: {sorted(written - heads)}"


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_links_into_a_page_name_one_of_its_headings() -> None:
    broken = []
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            if anchor not in headings((page.parent / target) if target else page):
                broken.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert broken == []


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def test_the_readme_fits_on_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
