"""One YAML file as a tree of values that know their line.

Plain YAML 1.2: mappings with text keys, lists, text, numbers, booleans, null, anchors, aliases and `<<` merges. Tags,
several documents in one file, and aliases that contain themselves are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode
from ruamel.yaml.reader import ReaderError

from model_registry.errors import ConfigError

MAX_FILE_BYTES = 4 * 2**20
MAX_VALUES = 100_000
"""Aliases of aliases grow without bound; no configuration written by people comes near this."""

Scalar = str | int | float | bool | None
Value = Scalar | dict[str, "Node"] | list["Node"]

_TAG = "tag:yaml.org,2002:"
_HINTS = (
    ("'\\t'", "a tab stands where YAML wants spaces", "Indent with spaces."),
    (
        "mapping values are not allowed",
        "a `: ` stands where no key can be",
        "Keys of one mapping start in the same column; text that holds `: ` needs quotes.",
    ),
    ("cannot start any token", "this character cannot start a value", "Put the value in quotes."),
    ("unexpected end of stream", "a quote is opened and never closed", "Close it."),
    ("expected the node content", "a value is missing, or a bracket is opened and never closed", "Close it."),
    ("could not find expected ':'", "a key without a `:`", "Write `key: value`, with a space after the colon."),
    (
        "expected <block end>",
        "the indentation does not fit the lines above",
        "Keys of one mapping start in the same column.",
    ),
    (
        "flow mapping",
        "a mapping in braces `{` is not closed, or lacks a comma",
        "Close it, or put a comma between its keys.",
    ),
    (
        "flow sequence",
        "a list in brackets `[` is not closed, or lacks a comma",
        "Close it, or put a comma between its items.",
    ),
    (
        "'<document start>'",
        "this line does not belong to what stands above it, which was complete already",
        "Keys of one mapping start in the same column; a list, or text in several lines, is indented below its key.",
    ),
    (
        "expected alphabetic or numeric character",
        "`%` before a line, `&` and `*` before a value mean something to YAML itself",
        "Put the value in quotes.",
    ),
    (
        "expected a single document",
        "a second document starts here",
        "One file holds one document; use `include:` for several files.",
    ),
    ("found undefined alias", "an alias `*name` without an anchor `&name` above it", "Write the anchor, or the value."),
)


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, counted from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its place; for a mapping's values that is the line of the key."""

    value: Value
    place: Place

    def plain(self) -> object:
        """The value as dict, list or scalar, without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def read_file(path: Path) -> Node:
    """The one document in `path`.

    Raises ConfigError, with every problem found, for a file that is missing, empty, too large, not UTF-8 or not YAML, and
    for duplicate keys, keys that are no text, and tags.
    """
    text = _read_text(path)
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except RecursionError as error:
        raise _too_deep(path) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            "this is no YAML: a control character",
            where=f"{path}:{line}",
            remedy="Remove it, or write it as an escape in double quotes.",
        ) from error
    except YAMLError as error:
        raise _syntax_error(path, error) from error
    except ValueError as error:  # numbers in %YAML directives and escapes are parsed with int() and chr()
        raise ConfigError(f"this is no YAML: {error}", where=str(path)) from error
    if root is None or (isinstance(root, ScalarNode) and root.value == ""):
        raise ConfigError("the file is empty", where=str(path), remedy="`sliceway init` writes one to start from.")
    builder = _Builder(path)
    try:
        tree = builder.node(root, Place(path, root.start_mark.line + 1))
    except RecursionError as error:
        raise _too_deep(path) from error
    if builder.problems:
        raise ConfigError(
            builder.problems[0].message, where=builder.problems[0].where, problems=tuple(builder.problems)
        )
    return tree


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else None
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no such file", where=str(path), remedy=f"`sliceway init {path}` writes one to start from."
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"the file cannot be read: {reason}",
            where=str(path),
            remedy="Name a file in it." if path.is_dir() else "Make it readable for this user.",
        ) from error
    if data is None:
        raise ConfigError(
            f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB",
            where=str(path),
            remedy="Is this a configuration? Split it with `include:` if so.",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"byte 0x{data[error.start]:02x} is not UTF-8", where=f"{path}:{line}", remedy="Save the file as UTF-8."
        ) from error


def _too_deep(path: Path) -> ConfigError:
    return ConfigError("values are nested too deeply", where=str(path))


def _syntax_error(path: Path, error: YAMLError) -> ConfigError:
    if not isinstance(error, MarkedYAMLError):
        return ConfigError(f"this is no YAML: {' '.join(str(error).split())}", where=str(path))
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = " ".join(f"{error.problem or error.context or 'syntax error'}".split())
    said = f"{error.context or ''} {problem}"
    for clue, message, remedy in _HINTS:
        if clue in said:
            return ConfigError(message, where=where, remedy=remedy)
    return ConfigError(f"this is no YAML: {problem}", where=where, remedy="Look at this line and the one above it.")


class _Builder:
    """Turns ruamel's nodes into ours and collects what is wrong with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[ConfigError] = []
        self._count = 0
        self._open: set[int] = set()

    def node(self, node: YamlNode, place: Place) -> Node:
        self._count += 1
        if self._count == MAX_VALUES:
            self._problem(f"more than {MAX_VALUES} values, aliases counted where they are used", place)
        if self._count >= MAX_VALUES or id(node) in self._open:
            if id(node) in self._open:
                self._problem("an alias contains itself", place)
            return Node(None, place)
        self._open.add(id(node))
        value = self._value(node, place)
        self._open.discard(id(node))
        return Node(value, place)

    def _value(self, node: YamlNode, place: Place) -> Value:
        if isinstance(node, ScalarNode):
            return self._scalar(node, place)
        expected = "map" if isinstance(node, MappingNode) else "seq"
        if node.tag != _TAG + expected:
            self._problem(
                f"the tag {_short(node.tag)!r} is not known here", place, remedy="Write the value without a tag."
            )
        if isinstance(node, MappingNode):
            return self._mapping(node)
        return [self.node(item, self._place(item)) for item in node.value]

    def _mapping(self, node: MappingNode) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if key_node.tag == _TAG + "merge":
                for source in self._merge_sources(value_node, place):
                    merged = self.node(source, place).value | merged  # type: ignore[operator]  # a MappingNode gives a dict
                continue
            key = self._key(key_node, place)
            if key in own:
                self._problem(
                    f"the key {key!r} stands here twice",
                    place,
                    remedy=f"It is already set on line {own[key].place.line}; remove one of them.",
                )
            elif key is not None:
                own[key] = self.node(value_node, place)
        return merged | own

    def _merge_sources(self, node: YamlNode, place: Place) -> Iterator[MappingNode]:
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            if isinstance(source, MappingNode) and id(source) not in self._open:
                yield source
            else:
                self._problem("`<<` takes a mapping, or a list of mappings, that does not contain this one", place)

    def _key(self, node: YamlNode, place: Place) -> str | None:
        value = self._scalar(node, place) if isinstance(node, ScalarNode) else None
        if isinstance(value, str):
            return value
        self._problem(
            f"{node.value!r} is no key" if isinstance(node, ScalarNode) else "a list or a mapping is no key",
            place,
            remedy="Keys are text; put numbers and the like in quotes.",
        )
        return None

    def _scalar(self, node: ScalarNode, place: Place) -> Scalar:
        kind = _short(node.tag)
        if kind not in ("str", "int", "float", "bool", "null", "timestamp", "value"):
            self._problem(f"the tag {kind!r} is not known here", place, remedy="Write the value without a tag.")
            return None
        return parse_scalar(kind, node.value)

    def _place(self, node: YamlNode) -> Place:
        return Place(self.path, node.start_mark.line + 1)

    def _problem(self, message: str, place: Place, *, remedy: str | None = None) -> None:
        self.problems.append(ConfigError(message, where=str(place), remedy=remedy))


def _short(tag: object) -> str:
    return str(tag).removeprefix(_TAG)


def parse_scalar(kind: str, text: str) -> Scalar:
    """`text` as YAML 1.2 means it under the tag `kind`; text that does not parse as its tag says stays text."""
    match kind:
        case "null":
            return None
        case "bool":
            return {"true": True, "false": False}.get(text.lower(), text)  # under %YAML 1.1, `yes` is tagged so as well
        case "int":
            return _number(text.replace("_", ""))
        case "float":
            return _float(text.replace("_", ""))
    return text


def _number(text: str) -> int | str:
    for base in (10, 0):
        try:
            return int(text, base)
        except ValueError:
            continue
    return text


def _float(text: str) -> float | str:
    try:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text
