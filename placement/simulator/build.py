"""Compiles the simulator's C file when it is first needed, and keeps the result.

Two libraries come out of one source: `libnvidia-ml.so.1`, which programs load in place of the driver's, and one with
another name to control machines with, so that a process can do that and still load the real driver.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from model_registry.directories import user_directory
from placement.errors import SimulatorError

FLAGS = ("-std=gnu11", "-O2", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
NVML = "libnvidia-ml.so.1"
CONTROL = "libsliceway-simulator.so"


@dataclass(frozen=True, slots=True)
class Libraries:
    """Where the two libraries lie. `directory` is what LD_LIBRARY_PATH takes; it holds nothing but them."""

    directory: Path

    @property
    def nvml(self) -> Path:
        """The library that programs load."""
        return self.directory / NVML

    @property
    def control(self) -> Path:
        """The library that `Simulation` loads."""
        return self.directory / CONTROL


def libraries(cache: Path | None = None, environ: Mapping[str, str] = os.environ) -> Libraries:
    """The compiled libraries, from `cache` (under XDG_CACHE_HOME if unset) or made there; about a second the first time.

    Raises SimulatorError where there is no C compiler or it fails, and where the libraries cannot be kept; NoHome where
    there is no directory to keep them in.
    """
    source = files("placement.simulator").joinpath("libnvidia_ml.c").read_bytes()
    key = hashlib.sha256(b"\0".join((source, " ".join(FLAGS).encode(), platform.machine().encode()))).hexdigest()[:16]
    home = (cache or user_directory("XDG_CACHE_HOME", ".cache", environ) / "sliceway" / "simulator") / key
    try:
        if not (home / CONTROL).exists() or not (home / NVML).exists():
            _build(source, home, compiler(environ))
    except OSError as error:
        raise SimulatorError(
            f"the simulator's compiled libraries cannot be kept there: {error.strerror or error}",
            where=str(home.parent),
            remedy="Set XDG_CACHE_HOME to a directory in which you may write.",
        ) from error
    return Libraries(home)


def compiler(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The command of a C compiler: $CC, else the system's, else the one in the `ziglang` package.

    Raises SimulatorError if there is none.
    """
    if environ.get("CC"):
        return tuple(environ["CC"].split())
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name, path=environ.get("PATH")):
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc")
    raise SimulatorError(
        "simulating GPUs needs a C compiler, and there is none",
        remedy="Install one (apt install gcc), or take the one from PyPI: pip install ziglang",
    )


def _build(source: bytes, home: Path, command: tuple[str, ...]) -> None:
    """Compile into a directory beside `home` and move it there whole: a second process may do the same at once."""
    home.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}."))
    try:
        (work / "libnvidia_ml.c").write_bytes(source)
        for name in (NVML, CONTROL):
            _compile(command, work, name)
        (work / "libnvidia_ml.c").unlink()
        try:
            work.rename(home)
        except OSError:
            if not (home / CONTROL).exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(command: tuple[str, ...], work: Path, name: str) -> None:
    arguments = [*command, *FLAGS, f"-Wl,-soname,{name}", "-o", name, "libnvidia_ml.c"]
    try:
        done = subprocess.run(
            arguments, cwd=work, capture_output=True, encoding="utf-8", errors="replace", timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SimulatorError(f"the C compiler could not be run: {error}", where=" ".join(command)) from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise SimulatorError(f"the simulator could not be compiled: {last}", where=" ".join(arguments))
