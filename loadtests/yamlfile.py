"""YAML files checked against a closed schema, with the file and line of every fault and the nearest key that is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from loadtests.problems import Problem, ScenarioError

Step = str | int
Lines = Mapping[tuple[Step, ...], int]
"""The line, from 1, of each value by its path."""

EXPECTED: Mapping[str, str] = {
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "path_type": "a path",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "literal_error": "{expected}",
}
"""How each of pydantic's error types ends the sentence `must be ...`."""

MAX_FILE_BYTES = 4 * 2**20
SHOWN_CHARACTERS = 80


class Section(BaseModel):
    """A part of a scenario: closed and frozen, and every number in it finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class Source:
    """Data and where each value of it stands. `directory` is what relative paths in it are relative to.

    `options` are the options of a command that fields were made from, by the fields' names.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        lines: Lines | None = None,
        directory: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.data = data
        self.name = name
        self.directory = directory or Path()
        self._lines = lines or {}
        self._options = options or {}

    def where(self, *path: Step) -> str:
        """`file:line: field`, of the nearest value that has a line; the option that the value was made from, if there is one."""
        if option := next(filter(None, (self._options.get(str(step)) for step in reversed(path))), None):
            return option
        for end in range(len(path), -1, -1):
            if (line := self._lines.get(path[:end])) is not None:
                place = f"{self.name}:{line}"
                break
        else:
            place = self.name
        return f"{place}: {show(path)}" if path else place

    def parse(self, model: type[S]) -> S:
        """The data as a `model`. Raises ScenarioError with every fault."""
        if not isinstance(self.data, dict):
            raise ScenarioError(Problem("a scenario is a mapping", self.where(), "Write `key: value` lines."))
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            raise ScenarioError(*self._problems(error, model)) from error

    def _problems(self, error: ValidationError, model: type[BaseModel]) -> list[Problem]:
        found: dict[str, Problem] = {}
        details = error.errors(include_url=False)
        for detail in details:
            if detail["type"] == "too_short" and any(_inside(other["loc"], detail["loc"]) for other in details):
                continue  # a list whose items are wrong counts as empty; the items' own faults say it
            path = _without_tags(detail, self.data)
            problem = self._problem(detail, path, model)
            found.setdefault(str(problem), problem)
        return sorted(found.values(), key=lambda p: _line_of(p.where))

    def _problem(self, detail: Mapping[str, Any], path: tuple[Step, ...], model: type[BaseModel]) -> Problem:
        where = self.where(*path)
        if detail["type"] == "extra_forbidden":
            key = str(path[-1])
            known = sorted(_keys_at(model, path[:-1], self.data))
            near = get_close_matches(key, known, 1)
            return Problem(
                f"unknown key {key!r}", where, f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            )
        if detail["type"] == "missing":
            return Problem(f"{path[-1]!r} is missing", where, "Every field is described in docs/isolation.md.")
        if detail["type"] == "union_tag_invalid":
            return _unknown_kind(detail["ctx"], where)
        if detail["type"] == "union_tag_not_found":
            return _no_kind(_kinds_at(model, path, self.data), where, detail["input"])
        context = {name: _plain(value) for name, value in detail.get("ctx", {}).items()}
        if (expected := EXPECTED.get(detail["type"])) is not None:
            near = get_close_matches(str(detail["input"]), str(context.get("expected", "")).split("'")[1::2], 1)
            meant = f"Did you mean {near[0]!r}?" if near else ""
            return Problem(f"must be {expected.format(**context)}, not {_shown(detail['input'])}", where, meant)
        if detail["type"] == "too_short":
            return Problem("must not be empty", where, "Give at least one.")
        message = str(detail["msg"]).removeprefix("Value error, ")
        message, _, remedy = message.partition(" || ")
        return Problem(message, where, remedy)


def _unknown_kind(context: Mapping[str, Any], where: str) -> Problem:
    known = [name.strip("' ") for name in str(context["expected_tags"]).split(",")]
    near = get_close_matches(str(context["tag"]), known, 1)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return Problem(f"there is no kind {context['tag']!r}", where, f"{meant}There are {', '.join(known)}.")


def _no_kind(known: Sequence[str], where: str, given: Any) -> Problem:
    there_are = f"There are {', '.join(known)}."
    if isinstance(given, dict):
        return Problem("'kind' is missing", where, there_are)
    number = "a whole number, or " if "fixed" in known else ""
    return Problem(f"must be {number}a mapping with a 'kind', not {_shown(given)}", where, there_are)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any) -> str:
    """A value in a message: not the whole of it where somebody put a mapping in the place of a number."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def load(path: Path) -> Source:
    """Read one YAML (or JSON) file. Raises ScenarioError where there is none or it is not YAML."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ScenarioError(Problem(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB", str(path)))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ScenarioError(Problem(f"cannot be read: {reason}", str(path))) from error
    try:
        root = YAML(typ="safe", pure=True).compose(text)
        data = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ScenarioError(_syntax(error, path)) from error
    lines = dict(_lines_of(root, ())) if root is not None else {}
    return Source(data, str(path), lines, path.parent)


def show(path: Sequence[Step]) -> str:
    """`tenants[0].model` for `("tenants", 0, "model")`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _syntax(error: Exception, path: Path) -> Problem:
    mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
    words = error.problem if isinstance(error, MarkedYAMLError) and error.problem else str(error)
    return Problem(
        f"this is no YAML: {' '.join(str(words).split())}",
        f"{path}:{mark.line + 1}" if mark else str(path),
        "Look at the brackets, quotes and indentation from there upwards.",
    )


def _lines_of(node: Node, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], int]]:
    if isinstance(node, MappingNode):
        for key, child in node.value:
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines_of(child, (*path, key.value))
    elif isinstance(node, SequenceNode):
        for index, child in enumerate(node.value):
            yield (*path, index), child.start_mark.line + 1
            yield from _lines_of(child, (*path, index))


def _inside(loc: Sequence[Step], of: Sequence[Step]) -> bool:
    return len(loc) > len(of) and tuple(loc[: len(of)]) == tuple(of)


def _without_tags(detail: Mapping[str, Any], data: Any) -> tuple[Step, ...]:
    """Pydantic puts the tag of a union into the location; only steps that the data has, or lacks at the end, are kept."""
    path: list[Step] = []
    value = data
    for step in detail["loc"]:
        if not _leads_on(value, step):
            continue
        value = value[step]
        path.append(step)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def _leads_on(value: Any, step: Step) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _keys_at(model: type[BaseModel], path: Sequence[Step], data: Any) -> set[str]:
    """The keys that are allowed where `path` leads."""
    return {name for m in _models_at(model, path, data) for name in m.model_fields}


def _kinds_at(model: type[BaseModel], path: Sequence[Step], data: Any) -> list[str]:
    """The kinds that are allowed where `path` leads."""
    models = [m for m in _models_at(model, path, data) if "kind" in m.model_fields]
    return [name for m in models for name in get_args(m.model_fields["kind"].annotation)]


def _models_at(model: type[BaseModel], path: Sequence[Step], data: Any) -> list[type[BaseModel]]:
    """What may stand where `path` leads."""
    models: list[type[BaseModel]] = [model]
    value = data
    for step in path:
        value = value[step]
        if isinstance(step, str):
            annotations = [m.model_fields[step].annotation for m in models if step in m.model_fields]
            models = [found for annotation in annotations for found in _models_in(annotation)]
        models = _of_kind(models, value) if isinstance(value, dict) else models
    return models


def _of_kind(models: list[type[BaseModel]], value: Mapping[str, Any]) -> list[type[BaseModel]]:
    """Of a union's branches those that the value's `kind` names; all where it names none."""
    chosen = [
        m
        for m in models
        if "kind" in m.model_fields and value.get("kind") in get_args(m.model_fields["kind"].annotation)
    ]
    return chosen or models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inside in get_args(annotation):
        yield from _models_in(inside)


def _line_of(where: str) -> int:
    parts = where.split(":")
    return int(parts[1]) if len(parts) > 1 and parts[1].strip().isdigit() else 0
