"""Files that include files: one tree out of several, each value remembering the file it came from."""

from __future__ import annotations

from pathlib import Path

from model_registry.configfile.tree import Node, Place, read_file
from model_registry.errors import ConfigError

INCLUDE = "include"
_MAY_REPEAT = frozenset({"version"})  # each file may state it, so that each can be read alone
_WANTED = "Write `include: [models.yaml, tenants.yaml]`; paths are relative to this file."


def read_with_includes(path: Path) -> Node:
    """The tree of `path` and of all it includes.

    Included files come first, in their order, then the including file: lists directly under a top-level key are
    concatenated, mappings merged; any other value that is set twice is a problem that names both places.
    Raises ConfigError with every problem of every file.
    """
    reader = _Reader()
    root = reader.read(path, ())
    if reader.problems:
        first = reader.problems[0]
        raise ConfigError(first.message, where=first.where, remedy=first.remedy, problems=tuple(reader.problems))
    assert root is not None  # no problems, so every file gave a tree
    return root


def files_of(path: Path) -> frozenset[Path]:
    """`path` and every file that it includes, as far as they can be read."""
    reader = _Reader()
    reader.read(path, ())
    return frozenset((path, *reader.files))


class _Reader:
    def __init__(self) -> None:
        self.problems: list[ConfigError] = []
        self._included_at: dict[Path, Place | None] = {}

    @property
    def files(self) -> frozenset[Path]:
        """Every file that was read."""
        return frozenset(self._included_at)

    def read(self, path: Path, stack: tuple[Path, ...], included_at: Place | None = None) -> Node | None:
        """The merged tree of `path`, or None if it has a problem; `stack` are the files that led here."""
        try:
            root = read_file(path)
            self._included_at[path.resolve()] = included_at
        except ConfigError as error:
            self.problems.extend(
                error.problems if included_at is None else [_blamed(p, included_at) for p in error.problems]
            )
            return None
        if not isinstance(root.value, dict):
            self.problems.append(_not_a_mapping(root))
            return None
        own = {key: node for key, node in root.value.items() if key != INCLUDE}
        merged: dict[str, Node] = {}
        for node in self._include_entries(root.value.get(INCLUDE)):
            child = self._include(path, str(node.value), node.place, (*stack, path.resolve()))
            if child is not None:
                merged = self._merge(merged, _mapping(child), depth=0)
        return Node(self._merge(merged, own, depth=0), root.place)

    def _include_entries(self, node: Node | None) -> list[Node]:
        if node is None:
            return []
        entries = node.value if isinstance(node.value, list) else [node]
        wrong = [entry for entry in entries if not isinstance(entry.value, str) or not entry.value]
        self.problems.extend(
            ConfigError("`include` takes file names", where=f"{entry.place}: {INCLUDE}", remedy=_WANTED)
            for entry in wrong
        )
        return [entry for entry in entries if entry not in wrong]

    def _include(self, parent: Path, name: str, place: Place, stack: tuple[Path, ...]) -> Node | None:
        where = f"{place}: {INCLUDE}"
        try:
            path = parent.parent / Path(name).expanduser()
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, `~nobody`, a NUL byte
            self.problems.append(ConfigError(f"{name!r} is no usable path: {error}", where=where))
            return None
        if real in stack:
            chain = " -> ".join(p.name for p in (*stack[stack.index(real) :], real))
            self.problems.append(
                ConfigError(
                    f"files include one another in a circle: {chain}",
                    where=where,
                    remedy="Remove one of these includes.",
                )
            )
            return None
        if real in self._included_at:
            self.problems.append(
                ConfigError(
                    f"{name!r} is included a second time",
                    where=where,
                    remedy=f"It is already included at {self._included_at[real]}.",
                )
            )
            return None
        return self.read(path, stack, place)

    def _merge(self, base: dict[str, Node], over: dict[str, Node], *, depth: int) -> dict[str, Node]:
        merged = dict(base)
        for key, node in over.items():
            merged[key] = self._both(key, merged[key], node, depth) if key in merged else node
        return merged

    def _both(self, key: str, first: Node, second: Node, depth: int) -> Node:
        if isinstance(first.value, dict) and isinstance(second.value, dict):
            return Node(self._merge(first.value, second.value, depth=depth + 1), first.place)
        if depth == 0 and isinstance(first.value, list) and isinstance(second.value, list):
            return Node(first.value + second.value, first.place)
        if not (depth == 0 and key in _MAY_REPEAT and first.value == second.value):
            self.problems.append(
                ConfigError(
                    f"{key!r} is set twice",
                    where=str(second.place),
                    remedy=f"It is already set at {first.place}; keep one of the two.",
                )
            )
        return first


def _mapping(node: Node) -> dict[str, Node]:
    assert isinstance(node.value, dict)
    return node.value


def _blamed(problem: ConfigError, included_at: Place) -> ConfigError:
    remedy = f"{problem.remedy} Included at {included_at}." if problem.remedy else f"Included at {included_at}."
    return ConfigError(problem.message, where=problem.where, remedy=remedy)


def _not_a_mapping(root: Node) -> ConfigError:
    what = "a list" if isinstance(root.value, list) else f"the value {root.value!r}"
    return ConfigError(
        f"the file holds {what}, not keys with values",
        where=str(root.place),
        remedy="Start with `version: v1`; `sliceway init` writes a file to begin with.",
    )
