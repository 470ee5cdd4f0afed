"""A number with a unit says so in its name: base units inside, nothing that a reader has to guess."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, BeforeValidator

from model_registry.schema import Section, parse_size

ROOT = Path(__file__).parents[2]
PACKAGES = ("model_registry", "placement", "gateway")
ELSEWHERE = ("placement.vllm_plugin", "model_registry.convert_gguf")
"""What another process imports; see test_imports.py."""

SUSPECT = re.compile(
    r"(^|_)(time|timeout|delay|duration|interval|latency|age|ttl|elapsed|deadline|uptime|memory|ram)(_|$)"
)
UNITS = ("_seconds", "_bytes", "_tokens", "_slices", "_ratio", "_per_second", "_per_minute")
WRONG_UNITS = (
    "_ms",
    "_msec",
    "_millis",
    "_secs",
    "_sec",
    "_mins",
    "_us",
    "_ns",
    "_mb",
    "_gb",
    "_mib",
    "_gib",
    "_kb",
    "_kib",
    "_pct",
    "_percent",
)
NUMBER = re.compile(r"\b(int|float)\b")
EDGES = {
    "gateway.overhead.tools.Closed": "the compiled client's line of JSON, in whole microseconds",
    "model_registry.sizing.calibration.EngineReport": "vLLM's log is in GiB",
    "model_registry.sizing.versions.EngineRules": "published figures, in the GiB of their sources",
}
"""Where numbers come in from outside in other units, which their names tell."""
NAMED_BY_OTHERS = {
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "block_size",
}
"""Names of vLLM's arguments and of keys in a model's config.json; another name for the same thing would help nobody."""


def classes() -> Iterator[type]:
    """Every dataclass and pydantic model that our packages define."""
    for package in PACKAGES:
        for info in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if info.name.startswith(ELSEWHERE) or info.name.endswith("__main__"):
                continue
            module = importlib.import_module(info.name)
            for _, found in inspect.getmembers(module, inspect.isclass):
                if found.__module__ == info.name and (dataclasses.is_dataclass(found) or issubclass(found, BaseModel)):
                    yield found


def numbers(found: type) -> Iterator[str]:
    """Names of the fields that hold a number and no unit of their own. A `Size` is written with its unit."""
    if issubclass(found, BaseModel):
        for name, info in found.model_fields.items():
            sized = any(
                isinstance(m, BeforeValidator) and m.func is parse_size
                for m in (*info.metadata, *_nested(info.annotation))
            )
            if _is_number(info.annotation) and not sized:
                yield name
    else:
        yield from (field.name for field in dataclasses.fields(found) if NUMBER.search(str(field.type)))


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(
        _is_number(inside) for inside in get_args(annotation) if inside is not type(None)
    )


def _nested(annotation: Any) -> Iterator[Any]:
    for inside in get_args(annotation):
        yield from getattr(inside, "__metadata__", ())
        yield inside


ALL = sorted(classes(), key=lambda c: (c.__module__, c.__qualname__))


@pytest.mark.parametrize("found", ALL, ids=lambda c: f"{c.__module__}.{c.__qualname__}")
def test_numbers_with_a_unit_are_named_with_it(found: type) -> None:
    for name in numbers(found):
        if f"{found.__module__}.{found.__qualname__}" not in EDGES:
            assert not name.endswith(WRONG_UNITS), f"{name}: use base units (seconds, bytes, ratio), and name them"
        if SUSPECT.search(name) and name not in NAMED_BY_OTHERS:
            assert name.endswith(UNITS), f"{name}: which unit?"


def test_there_is_something_to_look_at() -> None:
    assert sum(len(list(numbers(found))) for found in ALL) > 50


@pytest.mark.parametrize("found", [c for c in ALL if issubclass(c, Section)], ids=lambda c: c.__qualname__)
def test_configuration_is_closed_and_frozen(found: type[BaseModel]) -> None:
    assert found.model_config.get("extra") == "forbid"
    assert found.model_config.get("frozen") is True
