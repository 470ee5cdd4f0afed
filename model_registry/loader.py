"""From a YAML file to a validated configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from model_registry.configfile.guide import Pattern, entries
from model_registry.configfile.includes import read_with_includes
from model_registry.configfile.problems import config_error
from model_registry.configfile.tree import Node
from model_registry.errors import ConfigError
from model_registry.schema import FilePath

RootT = TypeVar("RootT", bound=BaseModel)

_SECRET_FILE = "file:"


def load_yaml(path: Path, root: type[RootT]) -> RootT:
    """Read `path` and the files it includes, and validate them together as `root`.

    `include: [file, ...]` at the top level takes paths relative to the including file; see
    `configfile.includes.read_with_includes` for what is merged how. Fields that the schema marks with `FilePath` become
    absolute, relative to the file that names them.
    Raises ConfigError, and nothing else, with `file:line: field` and a remedy for every problem found.
    """
    tree = _absolute_paths(read_with_includes(path), root)
    try:
        return root.model_validate(tree.plain())
    except ValidationError as error:
        raise config_error(error, tree, root) from error


def _absolute_paths(tree: Node, root: type[BaseModel]) -> Node:
    for entry in entries(root):
        for marker in _markers(entry.info):
            if isinstance(marker, FilePath):
                tree = _replace(tree, entry.pattern, partial(_absolute, marker.kind))
    return tree


def _markers(field: FieldInfo) -> Iterator[object]:
    """What is annotated on the field, and on the alternatives of a union in it."""
    yield from field.metadata
    for alternative in get_args(field.annotation):
        yield from getattr(alternative, "__metadata__", ())


def _replace(node: Node, pattern: Pattern, change: Callable[[Node], Node]) -> Node:
    """`node` with `change` applied to every value that `pattern` leads to."""
    if not pattern:
        return change(node)
    step, rest = pattern[0], pattern[1:]
    if isinstance(node.value, dict):
        return Node(
            {key: _replace(child, rest, change) if step in ("*", key) else child for key, child in node.value.items()},
            node.place,
        )
    if isinstance(node.value, list) and step == "*":
        return Node([_replace(child, rest, change) for child in node.value], node.place)
    return node


def _absolute(kind: str, node: Node) -> Node:
    folder = node.place.file.parent
    if not isinstance(node.value, str) or not _is_path(kind, node.value, folder):
        return node
    prefix = _SECRET_FILE if kind == "secret" else ""
    try:
        path = Path(node.value.removeprefix(prefix)).expanduser()
    except RuntimeError as error:  # `~name` of a user who is not there
        raise ConfigError(
            f"{node.value!r} names a home directory that cannot be found", where=str(node.place)
        ) from error
    # Lexically: a configuration reached through a symbolic link means paths beside the link.
    return Node(prefix + os.path.abspath(folder / path), node.place)  # noqa: PTH100


def _is_path(kind: str, text: str, folder: Path) -> bool:
    match kind:
        case "path":
            return bool(text)
        case "command":
            return "/" in text
        case "secret":
            return text.startswith(_SECRET_FILE) and text != _SECRET_FILE
    if text in (".", "..") or text.startswith(("./", "../", "/", "~")) or text.endswith(".gguf"):
        return True
    try:
        return bool(text) and (folder / text).exists()
    except OSError:  # too long for a name
        return False
