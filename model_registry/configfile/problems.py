"""What pydantic found wrong, told as an operator would want it: file, line, field, what is allowed, what was meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from model_registry.configfile.guide import Step, entries, field_at, fields_at
from model_registry.configfile.tree import Node, Place
from model_registry.errors import ConfigError, SlicewayError
from model_registry.schema import Inconsistent

EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "string_pattern_mismatch": "of the form {pattern}",
    "path_type": "a path",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "at least {min_length} long",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "literal_error": "{expected}",
}
"""How each of pydantic's error types ends the sentence `must be ...`."""


@dataclass(frozen=True, slots=True)
class _Fault:
    """One of pydantic's errors and where it belongs. `rest` is what of its location leads to no value in the file."""

    at: tuple[Step, ...]
    rest: tuple[Step, ...]
    place: Place
    kind: str
    detail: Mapping[str, Any]

    @property
    def in_union(self) -> bool:
        """Pydantic names the branch of a union in the location; more than one branch complains about one value."""
        return bool(self.rest) and self.kind not in ("missing", "extra_forbidden")


def config_error(error: ValidationError, root: Node, model: type[BaseModel]) -> ConfigError:
    """Every problem in `error`, in file order, as one ConfigError.

    `root` is the tree that was validated against `model`.
    """
    faults = [_fault(detail, root) for detail in error.errors(include_url=False)]
    faults = [f for f in faults if not _is_outdone(f, faults)]
    problems = [p for group in _by_place(faults) for p in _told(group, root, model)]
    problems.sort(key=lambda p: (p[0].file != root.place.file, str(p[0].file), p[0].line))
    found = tuple(
        {str(problem): problem for _, problem in problems}.values()
    )  # an alias used twice shows one fault twice
    return ConfigError(found[0].message, where=found[0].where, remedy=found[0].remedy, problems=found)


def expected(kind: str, context: Mapping[str, Any]) -> str | None:
    """How pydantic's error of this `kind` ends the sentence `must be ...`; None for one that is told otherwise.

    `context` is the `ctx` of the error.
    """
    template = EXPECTED.get(kind)
    if template is None:
        return None
    return template.format(**{name: _number(value) for name, value in context.items()})


def _number(value: object) -> object:
    """0 for 0.0: a field that takes fractions has bounds such as nobody writes them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def show(at: Sequence[Step]) -> str:
    """`models[0].max_model_len` for `("models", 0, "max_model_len")`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).removeprefix(".")


def _fault(detail: Mapping[str, Any], root: Node) -> _Fault:
    node, at, rest = root, [], []
    for step in detail["loc"]:
        child = _child(node, step)
        if child is None:
            rest.append(step)
        else:
            node = child
            at.append(step)
    return _Fault(tuple(at), tuple(rest), node.place, detail["type"], detail)


def _child(node: Node, step: Step) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(str(step))
    if isinstance(node.value, list) and isinstance(step, int) and 0 <= step < len(node.value):
        return node.value[step]
    return None


def _is_outdone(fault: _Fault, faults: list[_Fault]) -> bool:
    """Whether another branch of the same union got further into the value: that one was meant."""
    return fault.in_union and any(other.rest and _further(other, fault) for other in faults)


def _further(other: _Fault, fault: _Fault) -> bool:
    """Whether `other` got deeper into the value, or took the mapping that `fault` did not expect and refused what it says."""
    if other.at == fault.at:
        mapping = isinstance(fault.detail["input"], dict)
        return mapping and fault.kind.endswith("_type") and other.kind == "value_error"
    return other.at[: len(fault.at)] == fault.at


def _by_place(faults: list[_Fault]) -> list[list[_Fault]]:
    """Faults of the branches of one union together, every other one alone."""
    groups: dict[object, list[_Fault]] = {}
    for index, fault in enumerate(faults):
        groups.setdefault(fault.at if fault.in_union else index, []).append(fault)
    return list(groups.values())


def _told(group: list[_Fault], root: Node, model: type[BaseModel]) -> list[tuple[Place, ConfigError]]:
    fault = group[0]
    teller = _TELLERS.get(fault.kind)
    if teller is not None and len(group) == 1:
        return teller(fault, root, model)
    expected = " or ".join(dict.fromkeys(_expected(f) for f in group))
    given = fault.detail["input"]
    but = "but nothing stands here" if given is None else f"not {_shown(given)}"
    return [_problem(fault.place, fault.at, f"must be {expected}, {but}", _advice(group, model))]


def _problem(place: Place, at: Sequence[Step], message: str, remedy: str | None) -> tuple[Place, ConfigError]:
    where = f"{place}: {show(at)}" if at else str(place)
    return place, ConfigError(message, where=where, remedy=remedy)


def _expected(fault: _Fault) -> str:
    if (told := expected(fault.kind, fault.detail.get("ctx", {}))) is not None:
        return told
    said = str(fault.detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return said[:1].lower() + said[1:]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _advice(group: list[_Fault], model: type[BaseModel]) -> str | None:
    value = group[0].detail["input"]
    allowed = [
        choice
        for fault in group
        if fault.kind == "literal_error"
        for choice in str(fault.detail["ctx"]["expected"]).split("'")[1::2]
    ]
    near = get_close_matches(str(value).lower(), allowed, 1)
    if near:
        return f"Did you mean {near[0]!r}?"
    if group[0].kind == "string_type" and isinstance(value, (bool, int, float)):
        return f"Put it in quotes: {str(value).lower()!r}"
    return _described(model, group[0].at)


def _described(model: type[BaseModel], at: Sequence[Step]) -> str | None:
    """What the field at `at` is for; an entry of a mapping or list, and a field that says nothing, are told by what holds them."""
    infos = (field_at(model, at[:length]) for length in range(len(at), 0, -1))
    return next((info.description for info in infos if info is not None and info.description), None)


def _missing(fault: _Fault, root: Node, model: type[BaseModel]) -> list[tuple[Place, ConfigError]]:
    key = str(fault.rest[-1])
    info = field_at(model, (*fault.at, key))
    choices = [c for c in get_args(info.annotation) if isinstance(c, str)] if info else []
    remedy = f"Add `{key}: {choices[0]}`." if len(choices) == 1 else info.description if info else None
    return [_problem(fault.place, fault.at, f"{key!r} is missing", remedy)]


def _unknown_key(fault: _Fault, root: Node, model: type[BaseModel]) -> list[tuple[Place, ConfigError]]:
    key = str(fault.at[-1] if fault.at else fault.rest[-1])
    known = list(fields_at(model, fault.at[:-1]))
    near = get_close_matches(key, known, 1)
    elsewhere = [e.section for e in entries(model) if e.key == key]
    if near:
        remedy = f"Did you mean {near[0]!r}?"
    elif elsewhere:
        remedy = f"It belongs under {' or '.join(dict.fromkeys(elsewhere))}."
    else:
        remedy = f"Keys here: {', '.join(sorted(known))}."
    return [_problem(fault.place, fault.at, f"unknown key {key!r}", remedy)]


def _refused_by_validator(fault: _Fault, root: Node, model: type[BaseModel]) -> list[tuple[Place, ConfigError]]:
    cause = fault.detail.get("ctx", {}).get("error")
    if not isinstance(cause, Inconsistent):
        # Pydantic carries one text; what a validator passed on has message and remedy apart.
        known = cause.__cause__ if isinstance(cause, ValueError) else None
        if isinstance(known, SlicewayError):
            return [_problem(fault.place, fault.at, known.message, known.remedy or _described(model, fault.at))]
        return [_problem(fault.place, fault.at, str(cause), _described(model, fault.at))]
    told = []
    for problem in cause.problems:
        deeper = _fault({"loc": (*fault.at, *problem.at), "type": fault.kind}, root)
        told.append(_problem(deeper.place, deeper.at, problem.message, problem.remedy))
    return told


_TELLERS: Mapping[str, Callable[[_Fault, Node, type[BaseModel]], list[tuple[Place, ConfigError]]]] = {
    "missing": _missing,
    "extra_forbidden": _unknown_key,
    "value_error": _refused_by_validator,
}
