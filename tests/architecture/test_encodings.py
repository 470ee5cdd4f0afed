"""Text files and the output of other programs are UTF-8 wherever this runs: no call leaves it to the locale."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("model_registry", "placement", "gateway", "loadtests", "examples")
RUNNERS = {"run", "Popen", "check_output", "check_call", "call"}
OPENERS = {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"}
BINARY = {"NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"}  # unless a mode says otherwise
HANDLERS = {"FileHandler", "RotatingFileHandler", "TimedRotatingFileHandler", "WatchedFileHandler", "TextIOWrapper"}


def sources() -> Iterator[Path]:
    """Every Python file of ours that users run."""
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def by_locale(source: str) -> list[int]:
    """The lines of `source` with a call that reads or writes text in the locale's encoding."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return sorted(call.lineno for call in calls if _is_by_locale(call))


def _is_by_locale(call: ast.Call) -> bool:
    given = {word.arg for word in call.keywords}
    if "encoding" in given or None in given:
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if name in RUNNERS:
        return any(_said(call, word) is True for word in ("text", "universal_newlines"))
    return name in HANDLERS or (name in OPENERS and _opens_text(call, name))


def _opens_text(call: ast.Call, name: str) -> bool:
    """Whether this opens a file as text. `x.open(...)` is a file's only with a mode: other things are opened as well."""
    method = name == "open" and isinstance(call.func, ast.Attribute)
    if method and isinstance(call.func.value, ast.Name) and call.func.value.id == "os":
        return False
    position = 0 if method or name in BINARY else 1
    mode = _said(call, "mode")
    if mode is None and len(call.args) > position and isinstance(call.args[position], ast.Constant):
        mode = call.args[position].value
    if mode is None:
        return not method and name not in BINARY
    return isinstance(mode, str) and set(mode) <= set("rwaxt+") and mode != ""


def _said(call: ast.Call, word: str) -> object:
    values = (k.value for k in call.keywords if k.arg == word)
    return next((v.value for v in values if isinstance(v, ast.Constant)), None)


def test_no_text_is_read_or_written_in_the_locales_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in sources() for line in by_locale(path.read_text(encoding="utf-8"))
    ]
    assert found == [], 'add encoding="utf-8" (with subprocess, in the place of text=True)'


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text()",
        "path.read_text(errors='replace')",
        "path.write_text('x')",
        "open('x')",
        "open('x', 'w')",
        "path.open('a')",
        "path.open(mode='r+')",
        "os.fdopen(1)",
        "os.fdopen(1, 'w', buffering=1)",
        "subprocess.run(['x'], text=True)",
        "Popen(['x'], universal_newlines=True)",
        "tempfile.NamedTemporaryFile('w')",
        "logging.FileHandler('x')",
    ],
)
def test_calls_that_would_be_found(call: str) -> None:
    assert by_locale(call) == [1]


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text(encoding='utf-8')",
        "path.read_text('utf-8')",
        "path.write_text('x', 'utf-8')",
        "open('x', 'rb')",
        "open('x', encoding='utf-8')",
        "path.open('rb')",
        "exchanges.open(route)",
        "successor.open()",
        "os.open('x', os.O_RDONLY)",
        "os.fdopen(1, 'wb')",
        "subprocess.run(['x'], encoding='utf-8')",
        "subprocess.run(['x'])",
        "tempfile.NamedTemporaryFile()",
        "run(**options)",
    ],
)
def test_calls_that_are_none_of_them(call: str) -> None:
    assert by_locale(call) == []
