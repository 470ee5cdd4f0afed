"""Finding and installing engines' environments, without installing one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from placement import engines
from placement.engines import (
    EngineEnvironment,
    EngineKind,
    EngineVersions,
    InstallProgress,
    describe_engine,
    engine_home,
    find_engine_python,
    install_engine,
)
from placement.errors import EngineInstallFailed, EngineMissing


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.symlink_to(sys.executable)
    return path


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_missing_engine_names_the_command_that_installs_it(kind: EngineKind, tmp_path: Path) -> None:
    with pytest.raises(EngineMissing) as caught:
        find_engine_python(kind, environ={}, prefix=tmp_path)
    assert f"sliceway engine install --kind {kind}" in str(caught.value)


def test_configured_interpreter_wins_over_the_environment(interpreter: Path, tmp_path: Path) -> None:
    environ = {"SLICEWAY_ENGINE_PYTHON": "/nonexistent"}
    assert find_engine_python("cpu", str(interpreter), environ=environ, prefix=tmp_path) == interpreter


@pytest.mark.parametrize(("configured", "where"), [("/nonexistent", "engine.python"), (None, "SLICEWAY_ENGINE_PYTHON")])
def test_an_interpreter_that_is_none_is_refused_and_its_origin_named(
    configured: str | None, where: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineMissing) as caught:
        find_engine_python("cpu", configured, environ={"SLICEWAY_ENGINE_PYTHON": "/nowhere"}, prefix=tmp_path)
    assert caught.value.where == where


def test_installed_environment_is_found_and_a_half_made_one_is_not(tmp_path: Path) -> None:
    home = engine_home("cpu", prefix=tmp_path)
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(EngineMissing):
        find_engine_python("cpu", environ={}, prefix=tmp_path)
    (home / "sliceway-engine.json").write_text("{}", encoding="utf-8")
    assert find_engine_python("cpu", environ={}, prefix=tmp_path) == home / "bin" / "python"


def test_describe_says_when_there_is_no_vllm(interpreter: Path) -> None:
    found = describe_engine(interpreter)
    assert (found.kind, found.vllm) == (None, None)


def test_describe_refuses_what_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(EngineMissing, match="does not run"):
        describe_engine(tmp_path / "missing")


def test_lock_leaves_out_what_exists_for_cuda_only_and_pins_everything() -> None:
    pins = [line for line in engines._requirements("cpu").splitlines() if line and not line.startswith("#")]
    names = {pin.split("==")[0] for pin in pins}
    assert names.isdisjoint({"torchvision", "torchaudio", "torchcodec"})
    assert all("==" in pin for pin in pins)
    assert any(pin.startswith("torch==") and pin.endswith("+cpu") for pin in pins)


class FakePip:
    """Stands for pip and venv: records the commands, and answers as told."""

    def __init__(self, *, torch_found: bool = True, cuda: str = "None") -> None:
        self.commands: list[list[str]] = []
        self.torch_found = torch_found
        self.cuda = cuda

    def run(self, command: list[str], *, stage: str) -> str:
        self.commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True, exist_ok=True)
        return self.cuda + "\n"

    def pip(self, python: Path, arguments: list[str], *, stage: str, total: int, report: engines.Report) -> None:
        self.commands.append(arguments)
        if arguments[-1].startswith("torch==") and "--index-url" not in arguments and not self.torch_found:
            raise EngineInstallFailed("ERROR: No matching distribution found for torch")
        report(InstallProgress("packages", total, total))


def install(fake: FakePip, home: Path, monkeypatch: pytest.MonkeyPatch, *, force: bool = False) -> Path:
    monkeypatch.setattr(engines, "_run", fake.run)
    monkeypatch.setattr(engines, "_pip", fake.pip)
    return install_engine("cpu", report=lambda progress: None, home=home, force=force)


def test_pytorchs_own_index_is_not_asked_where_the_configured_ones_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakePip()
    install(fake, tmp_path / "engine", monkeypatch)
    assert not any("--index-url" in command for command in fake.commands)


def test_pytorchs_own_index_is_asked_for_torch_alone_where_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakePip(torch_found=False)
    install(fake, tmp_path / "engine", monkeypatch)
    asked = [command for command in fake.commands if "--index-url" in command]
    assert len(asked) == 1
    assert asked[0][-1].startswith("torch==")
    assert asked[0][:1] == ["--no-deps"]


def test_second_installation_does_nothing_and_force_does_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "engine"
    first, second, forced = FakePip(), FakePip(), FakePip()
    install(first, home, monkeypatch)
    install(second, home, monkeypatch)
    install(forced, home, monkeypatch, force=True)
    assert first.commands
    assert not second.commands
    assert forced.commands


def test_a_cuda_build_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "engine"
    with pytest.raises(EngineInstallFailed, match=r"CUDA 13\.0"):
        install(FakePip(cuda="13.0"), home, monkeypatch)
    assert not home.exists()


def test_pips_own_words_reach_the_error(tmp_path: Path) -> None:
    with pytest.raises(EngineInstallFailed, match="no-such-file"):
        engines._pip(
            Path(sys.executable),
            ["-r", str(tmp_path / "no-such-file")],
            stage="packages",
            total=1,
            report=lambda progress: None,
        )


def test_progress_counts_packages_up_to_the_total() -> None:
    lines = iter(
        [
            "Collecting a==1\n",
            "  noise\n",
            "Processing /x/b-1-py3.whl (from c)\n",
            "Installing collected packages: a, b\n",
        ]
    )
    seen = list(engines._progress_of(lines, stage="packages", total=2))
    assert [(p.stage, p.done, p.total) for p in seen] == [("packages", 1, 2), ("packages", 2, 2), ("writing", 0, 0)]


def test_engine_show_prints_json(interpreter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"SLICEWAY_ENGINE_PYTHON": str(interpreter), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", "from gateway.cli import main; main()", "engine", "show", "--json"]
    answer = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", check=False)
    assert answer.returncode == 1
    assert json.loads(answer.stdout)["error"]["code"] == "engine_missing"


def test_versions_are_asked_once_until_the_environment_is_made_again(tmp_path: Path) -> None:
    python, marker = tmp_path / "bin" / "python", tmp_path / "sliceway-engine.json"
    python.parent.mkdir()
    python.touch()
    asked: list[Path] = []

    def describe(path: Path) -> EngineEnvironment:
        asked.append(path)
        return EngineEnvironment(path, "cuda", f"0.3{len(asked)}.0", None, None)

    versions = EngineVersions(describe)
    assert [versions.of(python), versions.of(python)] == ["0.31.0", "0.31.0"]
    marker.touch()
    os.utime(marker, (1, 1))
    assert versions.of(python) == "0.32.0"
    assert len(asked) == 2
    assert EngineVersions().of(tmp_path / "gone") is None
