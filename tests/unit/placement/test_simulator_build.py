from __future__ import annotations

import ctypes
import shutil
import stat
from pathlib import Path

import pytest

from placement.errors import SimulatorError
from placement.simulator.build import compiler, libraries


def fake_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_cc_wins_over_what_is_installed() -> None:
    assert compiler({"CC": "ccache gcc-13", "PATH": "/usr/bin"}) == ("ccache", "gcc-13")


def test_a_machine_without_any_compiler_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SimulatorError) as refused:
        compiler({"PATH": str(tmp_path)})
    assert "pip install ziglang" in str(refused.value.remedy)


def test_the_compiler_from_pypi_is_taken_where_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert compiler({"PATH": str(tmp_path)})[1:] == ("-m", "ziglang", "cc")


def test_built_once_and_found_again(tmp_path: Path) -> None:
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    log = tmp_path / "log"
    counting = fake_compiler(tmp_path / "counting-cc", f'echo x >> {log}\nexec {cc} "$@"')
    built = libraries(tmp_path / "cache", {"CC": counting})
    assert libraries(tmp_path / "cache", {"CC": counting}) == built
    assert log.read_text(encoding="utf-8") == "x\nx\n"
    assert sorted(p.name for p in built.directory.iterdir()) == ["libnvidia-ml.so.1", "libsliceway-simulator.so"]
    assert ctypes.CDLL(str(built.control)).nvmlInit_v2() == 9
    assert [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")] == []


def test_a_failing_compiler_says_its_last_words_and_leaves_nothing(tmp_path: Path) -> None:
    failing = fake_compiler(tmp_path / "failing-cc", "echo one >&2; echo 'fatal: no headers' >&2; exit 1")
    with pytest.raises(SimulatorError, match="fatal: no headers"):
        libraries(tmp_path / "cache", {"CC": failing})
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="could not be run"):
        libraries(tmp_path / "cache", {"CC": str(tmp_path / "nothing")})


def test_a_cache_that_cannot_be_written_is_told_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be", encoding="utf-8")
    with pytest.raises(SimulatorError, match="cannot be kept") as told:
        libraries(environ={"XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": "true"})
    assert told.value.where == str(tmp_path / "cache" / "sliceway" / "simulator")
    assert "XDG_CACHE_HOME" in str(told.value.remedy)
