"""`scripts/audit` never passes off as audited what nobody has looked at."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CLEAN = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found"}


@pytest.fixture
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("audit_script", str(Path(__file__).parents[2] / "scripts" / "audit"))
    spec = importlib.util.spec_from_loader("audit_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Databases:
    """What each database answers: a list of packages, "no report" where it fails at that, None where it cannot be reached."""

    def __init__(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str, **answers: Any) -> None:
        monkeypatch.setattr(script, "reachable", lambda service: answers.get(service) is not None)
        monkeypatch.setattr(
            script, "report", lambda _, service: None if answers[service] == "no report" else answers[service]
        )
        monkeypatch.setattr(script.sys, "argv", ["audit", *arguments])


@pytest.mark.parametrize(
    ("pypi", "osv", "status", "says"),
    [
        ([CLEAN, SKIPPED], None, 0, "AUDIT: CLEAN (1 packages, 1 unknown)"),
        ([CLEAN, SKIPPED], None, 0, "in no database that could be asked: c"),
        ([CLEAN, FLAWED], None, 1, "b 2: CVE-1, mended in 3"),
        ([CLEAN, FLAWED], None, 1, "AUDIT: VULNERABLE (1 of 2 packages"),
        ([CLEAN, SKIPPED | {"name": "b"}], [CLEAN, FLAWED], 1, "AUDIT: VULNERABLE (1 of 2 packages"),
        ([FLAWED], [{**FLAWED, "vulns": []}], 1, "AUDIT: VULNERABLE"),
        ([SKIPPED], [FLAWED], 1, "in no database that could be asked: c"),
        ([SKIPPED], None, 2, "AUDIT: FAILED (a database answers, and knows none of the packages)"),
        ("no report", None, 2, "AUDIT: FAILED (pypi can be reached, but gave no report)"),
        ("no report", [CLEAN], 0, "AUDIT: CLEAN"),
        (None, [CLEAN], 0, "AUDIT: CLEAN"),
        (None, None, 0, "AUDIT: NOT DONE"),
        (None, None, 0, "DEPENDENCIES NOT AUDITED"),
    ],
)
def test_what_was_not_asked_is_not_clean(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pypi: Any,
    osv: Any,
    status: int,
    says: str,
) -> None:
    Databases(script, monkeypatch, pypi=pypi, osv=osv)
    assert script.main() == status
    assert says in capsys.readouterr().out


def test_strictly_it_is_a_failure(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    Databases(script, monkeypatch, "--strict")
    assert script.main() == 3


@pytest.mark.parametrize(
    ("answer", "reached"),
    [
        (b'{"vulnerabilities": [{"id": "CVE-1"}]}', True),
        (b'{"vulnerabilities": []}', False),
        (b'{"info": {}}', False),
        (b"<html>blocked</html>", False),
        (OSError("no route"), False),
    ],
)
def test_a_mirror_or_a_proxy_is_not_taken_for_a_database(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, answer: bytes | OSError, reached: bool
) -> None:
    def open_url(*_: object, **__: object) -> io.BytesIO:
        if isinstance(answer, OSError):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(script.urllib.request, "urlopen", open_url)
    assert script.reachable("pypi") is reached


def test_a_tool_that_breaks_down_gives_no_report(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.CompletedProcess((), 1, stdout="", stderr="it broke")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: done)
    assert script.report(tmp_path / "lock", "pypi") is None
    assert "it broke" in capsys.readouterr().err
