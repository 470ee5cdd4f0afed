"""What the documentation says to type can be typed: figures that it publishes are repeated with the commands beside them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from gateway.cli import app
from gateway.cli.cluster import with_ray_address

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md", "configs/examples/README.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
LEFT_OUT = "layouts"
"""`sliceway export FORMAT` is `sliceway export layouts FORMAT`."""

_SPAN = re.compile(r"`([^`\n]+)`")
_BEFORE = re.compile(r"^(?:\$ )?(?:sudo )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?")
_AFTER = re.compile(r"\s(?:#|\||>|&&|;).*$|;.*$")


def code(page: str) -> Iterator[str]:
    """Every line of code of a page, and every span of code in its text."""
    fenced = False
    for line in page.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()
        else:
            yield from _SPAN.findall(line)


def commands(program: str) -> list[str]:
    """Every command of `program` that some page has, without what a shell makes of it."""
    lines = (_BEFORE.sub("", line) for page in PAGES for line in code(page.read_text(encoding="utf-8")))
    return sorted({_AFTER.sub("", line).strip() for line in lines if re.match(rf"{program}\s", line)})


def fault(words: list[str]) -> str | None:
    """What the command line says is wrong with `sliceway WORDS`; None if it would be carried out."""
    command = typer.main.get_command(app)
    words = with_ray_address([word.replace("HOST:PORT", "10.0.0.1:6379") for word in words])
    while words and (inside := getattr(command, "commands", None)) and not words[0].startswith("-"):
        if words[0] not in inside and LEFT_OUT in inside:
            words = [LEFT_OUT, *words]
        if words[0] not in inside:
            return f"no command {words[0]!r}"
        command, words = inside[words[0]], words[1:]
    context = command.make_context("sliceway", [], resilient_parsing=True)
    context.resilient_parsing = False
    try:
        _, unexpected, _ = command.make_parser(context).parse_args(list(words))
    except Exception as error:  # noqa: BLE001  # of whichever click typer brings along
        return str(error)
    return f"unexpected {unexpected}" if unexpected else None


@pytest.mark.parametrize("line", commands("sliceway"))
def test_commands_of_ours_are_understood(line: str) -> None:
    assert fault(shlex.split(line)[1:]) is None


@pytest.mark.parametrize(
    "line", ["plna", "up CONFIG --no-such-option", "keys creat acme", "size a b c", "bench overhead --rounds"]
)
def test_what_cannot_be_typed_is_found(line: str) -> None:
    assert fault(line.split()) is not None


@pytest.mark.parametrize("line", [*commands("python"), *commands("scripts/[a-z_-]+(?:.py)?")])
def test_programs_are_there_and_know_their_options(line: str) -> None:
    words = shlex.split(line)
    words = words[1:] if words[0] == "python" else words
    if words[0] == "-m" and not (ROOT / words[1].split(".")[0]).is_dir():
        assert importlib.util.find_spec(words[1]) is not None
        return
    source = source_of(words.pop(1) if words[0] == "-m" else words[0])
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in source, option


def source_of(program: str) -> str:
    """The source of a module of ours, by its name, or of a program, by its path; an engine's interpreter runs one without a folder."""
    folders = (ROOT, ROOT / "loadtests")
    if program.endswith(".py") or "/" in program:
        places = [folder / program for folder in folders]
    else:
        place = ROOT / program.replace(".", "/")
        places = [place / "__main__.py", place.with_suffix(".py")]
    return next(path for path in places if path.is_file()).read_text(encoding="utf-8")


@pytest.mark.parametrize("line", commands("make"))
def test_targets_are_in_the_makefile(line: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {word for word in shlex.split(line)[1:] if "=" not in word} <= targets
