"""What a pydantic schema allows where: its keys, its nested sections, the fields that hold paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Step = str | int
Pattern = tuple[str, ...]
"""Keys that lead to a field; `*` stands for any list item or mapping value."""

_MAX_DEPTH = 12  # a schema that nests itself would be walked for ever


@dataclass(frozen=True, slots=True)
class Entry:
    """One field of the schema, wherever it is nested."""

    pattern: Pattern
    info: FieldInfo

    @property
    def key(self) -> str:
        """The field's own key."""
        return self.pattern[-1]

    @property
    def section(self) -> str:
        """Where the key belongs, for people: `models[]`, `fleet.cpu`, `the top level`."""
        return ".".join(self.pattern[:-1]).replace(".*", "[]") or "the top level"


def entries(model: type[BaseModel], prefix: Pattern = ()) -> Iterator[Entry]:
    """Every field of `model` and of the sections in it, outer fields first."""
    for name, info in model.model_fields.items():
        pattern = (*prefix, name)
        yield Entry(pattern, info)
        for steps, section in _sections(info.annotation):
            if len(pattern) + len(steps) <= _MAX_DEPTH:
                yield from entries(section, (*pattern, *steps))


def fields_at(model: type[BaseModel], at: Sequence[Step]) -> dict[str, FieldInfo]:
    """The fields of the section that `at` leads to; empty if it leads to no section."""
    return {e.key: e.info for e in entries(model) if _matches(e.pattern[:-1], at)}


def field_at(model: type[BaseModel], at: Sequence[Step]) -> FieldInfo | None:
    """The field that `at` leads to."""
    return next((e.info for e in entries(model) if _matches(e.pattern, at)), None)


def _sections(annotation: Any) -> Iterator[tuple[Pattern, type[BaseModel]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
        return
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is dict:
        arguments = arguments[1:]
    step: Pattern = ("*",) if origin in (tuple, list, set, frozenset, dict) else ()
    for argument in arguments:
        for steps, section in _sections(argument):
            yield (*step, *steps), section


def _matches(pattern: Pattern, at: Sequence[Step]) -> bool:
    return len(pattern) == len(at) and all(p in ("*", step) for p, step in zip(pattern, at, strict=True))
