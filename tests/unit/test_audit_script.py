"""`scripts/audit` never passes off as audited what nobody has looked at."""

from __future__ import annotations

import importlib.machinery
import importlib.util
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


@pytest.mark.parametrize(
    ("pypi", "osv", "status", "says"),
    [
        ([CLEAN, SKIPPED], None, 0, "1 packages audited by pypi: 0 with known vulnerabilities; 1 unknown there"),
        ([CLEAN, FLAWED], None, 1, "b 2: CVE-1, mended in 3"),
        ([SKIPPED], [FLAWED], 1, "1 packages audited by osv"),
        ([SKIPPED], None, 0, "DEPENDENCIES NOT AUDITED"),
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
    monkeypatch.setattr(script, "report", lambda _, service: {"pypi": pypi, "osv": osv}[service])
    monkeypatch.setattr(script.sys, "argv", ["audit"])
    assert script.main() == status
    assert says in capsys.readouterr().out


def test_strictly_it_is_a_failure(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "report", lambda *_: None)
    monkeypatch.setattr(script.sys, "argv", ["audit", "--strict"])
    assert script.main() == 3
