"""The `models:` section of the configuration, and what every section shares.

All sections are closed (an unknown key is an error), frozen and bounded. Values with a unit are written with it
(`1.5GiB`); inside, they are base units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

_UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]+)\s*")
_MAX_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class FilePath:
    """Marks a text field as a path: a relative value means relative to the file that names it.

    `path` is one always. `source` may be a hub id instead: a path is what starts with `./`, `../`, `/` or `~`, ends with
    `.gguf`, or exists beside the file. `command` may be a bare name that is looked up in PATH: a path has a `/`.
    """

    kind: Literal["path", "source", "command"] = "path"


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault, and the field it is about as the keys and indexes that lead there from the validated section."""

    message: str
    at: tuple[str | int, ...] = ()
    remedy: str | None = None


class Inconsistent(ValueError):
    """Raised by validators that look at several fields: every fault they found, each with its own place."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


def parse_size(value: object) -> object:
    """Bytes from `1.5GiB`, `512MiB`, `8GB` or a number of bytes; anything else is refused with the units there are."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if not match:
        raise ValueError(f"{value!r} is no size; write a number and one of {', '.join(_UNITS)}, like 1.5GiB")
    number, unit = match.groups()
    if unit not in _UNITS:
        meant = [number + known for known in _UNITS if known[0].lower() == unit[0].lower()]
        advice = f"did you mean {' or '.join(meant)}?" if meant else f"units are {', '.join(_UNITS)}"
        raise ValueError(f"{value!r} has no known unit; {advice}")
    return int(Decimal(number) * _UNITS[unit])


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=_MAX_BYTES)]
"""Bytes; in YAML a number with a unit."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]
"""A name that is safe in URLs, labels and file names after quoting."""


class Section(BaseModel):
    """The base of every part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """One model that clients can name."""

    name: Name = Field(description="The name clients send as `model`.")
    source: Annotated[str | None, FilePath("source")] = Field(
        default=None, min_length=1, description="Hub id (`org/name`), directory, or GGUF file."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    task: Literal["auto", "generate", "embed"] = Field(
        default="auto", description="`auto` decides by the model's architecture."
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Tokens of prompt and answer together; the model's own limit if unset."
    )
    max_num_seqs: int = Field(default=16, ge=1, le=4096, description="Sequences that run at once in one replica.")
    max_num_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per engine step; 2048 if unset, or max_model_len where chunked prefill is impossible.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str | None = Field(default=None, description="vLLM's name of a quantisation applied at load.")
    kv_cache_dtype: str = Field(default="auto", description="vLLM's --kv-cache-dtype.")
    kv_cache_memory: Size | None = Field(
        default=None, description="KV pool; sized from max_model_len and max_num_seqs if unset."
    )
    gpu_memory_utilization: float = Field(
        default=0.92, gt=0, le=1, description="Share of the slice the engine may plan with."
    )
    replicas: int = Field(default=1, ge=0, le=10_000)
    profile: str | None = Field(
        default=None, description="Only slices of this profile (`1g.10gb`); the smallest that fits if unset."
    )
    slices: tuple[str, ...] = Field(default=(), description="Pin the replicas to these slice ids, in this order.")
    chat_template: Annotated[str | None, FilePath()] = Field(
        default=None, description="A Jinja file that overrides the model's chat template."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python that comes with the model. Off: the engine refuses models that cannot do without.",
    )
    engine_args: tuple[str, ...] = Field(default=(), description="Further arguments for the engine, passed last.")
    endpoints: tuple[str, ...] = Field(
        default=(), description="Engines that something else runs: `http://host:port` or `unix:/path`."
    )

    @model_validator(mode="after")
    def _source_or_endpoints(self) -> ModelConfig:
        if bool(self.source) == bool(self.endpoints):
            raise ValueError("name either `source` (sliceway runs the engine) or `endpoints` (something else does)")
        for endpoint in self.endpoints:
            if not re.fullmatch(r"http://[^/\s]+/?|unix:/\S+", endpoint):
                raise ValueError(f"endpoint {endpoint!r} is neither http://host:port nor unix:/path")
        if self.slices and len(self.slices) != self.replicas:
            raise ValueError(f"{len(self.slices)} slices are named for {self.replicas} replicas")
        return self
