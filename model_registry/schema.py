"""The `models:` section of the configuration, and what every section shares.

All sections are closed (an unknown key is an error), frozen and bounded. Values with a unit are written with it
(`1.5GiB`, `500ms`); inside, they are base units.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    field_validator,
    model_validator,
)

from model_registry.catalogue import profile_names
from model_registry.words import are, counted

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
_TIMES = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]+)\s*")
_MAX_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class FilePath:
    """Marks a text field as a path: a relative value means relative to the file that names it.

    `path` is one always. `source` may be a hub id instead: a path is what starts with `./`, `../`, `/` or `~`, ends with
    `.gguf`, or exists beside the file. `command` may be a bare name that is looked up in PATH: a path has a `/`. `secret` is
    a reference to a secret: a path is what follows `file:`.
    """

    kind: Literal["path", "source", "command", "secret"] = "path"


SECRET_REFERENCE = re.compile(r"\$\{ENV:([A-Za-z_][A-Za-z0-9_]*)\}|file:(.+)", re.DOTALL)
"""A variable's name, or a path."""


def check_reference(value: object) -> object:
    """`value` if it is a reference to a secret. Raises ValueError otherwise, without the value: it may be a secret written out."""
    if isinstance(value, str) and SECRET_REFERENCE.fullmatch(value):
        return value
    raise ValueError("a secret is not written out here; name where it lies, as ${ENV:NAME} or file:PATH")


SecretRef = Annotated[str, BeforeValidator(check_reference), FilePath("secret")]
"""A reference to a secret, for fields of the configuration. A relative path means relative to the file that names it."""


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


def parse_duration(value: object) -> float:
    """Seconds from `500ms`, `2s`, `5m` or `1h`. A bare number is refused: nobody can tell what it was meant in."""
    units = ", ".join(_TIMES)
    match = _NUMBER_AND_UNIT.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError(f"{value!r} is no duration; write a number and one of {units}, like 500ms")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{value!r} has no unit; did you mean {number}ms or {number}s?")
    if unit not in _TIMES:
        meant = [number + known for known in _TIMES if known[0] == unit[0].lower()]
        advice = f"did you mean {' or '.join(meant)}?" if meant else f"units are {units}"
        raise ValueError(f"{value!r} has no known unit; {advice}")
    return float(Decimal(number) * _TIMES[unit])


def _duration_text(seconds: float) -> str:
    return f"{seconds:.9f}s"


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(_duration_text, return_type=str, when_used="json"),
    Field(gt=0, le=7 * 24 * 3600),
]
"""Seconds; in YAML a number with a unit."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]
"""A name that is safe in URLs, labels and file names after quoting."""


class Section(BaseModel):
    """The base of every part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DemandConfig(Section):
    """The traffic that a model is to bear, at its peak. Lengths are means over requests."""

    requests_per_second: float = Field(gt=0, le=1e6, description="Of all tenants together.")
    prompt_tokens: int = Field(ge=1, le=10_000_000, description="Tokens of a prompt, in the mean.")
    output_tokens: int = Field(ge=1, le=10_000_000, description="Tokens of an answer, in the mean.")


class SloConfig(Section):
    """The latencies that clients bear. What is left out is not limited."""

    ttft: Duration | None = Field(default=None, description="Time to the first token, like 500ms.")
    itl: Duration | None = Field(default=None, description="Time from one token to the next, like 50ms.")
    attainment: float = Field(default=0.99, gt=0, le=1, description="The share of requests that has to meet them.")

    @model_validator(mode="after")
    def _says_something(self) -> SloConfig:
        if self.ttft is None and self.itl is None:
            raise ValueError("an slo limits `ttft`, `itl` or both, like {ttft: 500ms, itl: 50ms}")
        return self


class ReplicaRange(Section):
    """How many replicas there may be; between the two, demand decides."""

    min: int = Field(default=1, ge=0, le=10_000, description="0: the model sleeps until a request wakes it.")
    max: int = Field(ge=1, le=10_000)

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}; swap them")
        return self


class ModelConfig(Section):
    """One model that clients can name."""

    name: Name = Field(description="The name clients send as `model`.")
    source: Annotated[str | None, FilePath("source")] = Field(
        default=None, min_length=1, description="Hub id (`org/name`), directory, or GGUF file."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    metadata: Annotated[str | None, FilePath()] = Field(
        default=None,
        description="A config.json to plan with in place of the hub's: no network, no weights. The engine still gets `source`.",
    )
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
    replicas: Annotated[int, Field(ge=0, le=10_000)] | ReplicaRange | None = Field(
        default=None,
        description="A number, or `{min: 1, max: 4}`. Unset: as many as `demand` takes, one where there is none.",
    )
    demand: DemandConfig | None = Field(
        default=None, description="`{requests_per_second: 6, prompt_tokens: 800, output_tokens: 200}`."
    )
    slo: SloConfig | None = Field(default=None, description="`{ttft: 500ms, itl: 50ms}`, kept at `demand`.")
    priority: int = Field(
        default=0, ge=-1000, le=1000, description="Where there is not room for all, the higher is placed first."
    )
    spread: Literal["none", "gpus", "nodes"] = Field(
        default="none",
        description="No two replicas on one GPU, or on one node, whichever tenant has them, so that not all fail together.",
    )
    profile: str | None = Field(
        default=None, description="Only slices of this profile (`1g.10gb`); the smallest that fits if unset."
    )
    profiles: tuple[str, ...] = Field(
        default=(), description="Only slices of these profiles; which of them, the plan decides."
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
    endpoint_key: SecretRef | None = Field(
        default=None, description="What these engines ask for (vLLM's `--api-key`): ${ENV:NAME} or file:PATH."
    )

    @model_validator(mode="after")
    def _source_or_endpoints(self) -> ModelConfig:
        if bool(self.source) == bool(self.endpoints):
            raise ValueError("name either `source` (sliceway runs the engine) or `endpoints` (something else does)")
        for endpoint in self.endpoints:
            if not re.fullmatch(r"http://[^/\s]+/?|unix:/\S+", endpoint):
                raise ValueError(f"endpoint {endpoint!r} is neither http://host:port nor unix:/path")
        return self

    @field_validator("profile", "profiles")
    @classmethod
    def _known_profiles(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        named = (value,) if isinstance(value, str) else value or ()
        for name in named:
            if name not in (known := profile_names()):
                near = get_close_matches(name, known, n=3, cutoff=0.5)
                advice = f"did you mean {' or '.join(near)}?" if near else "`sliceway profiles` lists them by product"
                raise ValueError(f"no GPU product has a profile {name!r}; {advice}")
        return value

    @field_validator("profiles")
    @classmethod
    def _named_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} stands here twice; name it once")
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> ModelConfig:
        problems = [*self._replica_problems(), *self._demand_problems()]
        if problems:
            raise Inconsistent(*problems)
        return self

    def _replica_problems(self) -> Iterator[Problem]:
        if self.slices and isinstance(self.replicas, ReplicaRange):
            yield Problem(
                "pinned replicas are a fixed number, not a range",
                ("replicas",),
                f"Write replicas: {len(self.slices)}, or take `slices` out.",
            )
        elif self.slices and len(self.slices) != self.least_replicas:
            named = f"{counted(len(self.slices), 'slice')} {are(len(self.slices))} named"
            yield Problem(f"{named} for {counted(self.least_replicas, 'replica')}", ("slices",))
        if self.profile and self.profiles:
            yield Problem(
                "`profile` and `profiles` say the same thing twice",
                ("profiles",),
                "Keep one: `profile` for exactly one, `profiles` for a choice.",
            )

    def _demand_problems(self) -> Iterator[Problem]:
        if self.endpoint_key and not self.endpoints:
            yield Problem(
                "engines that sliceway runs have secrets of their own, made at each start",
                ("endpoint_key",),
                "Take it out, or name `endpoints` in the place of `source`.",
            )
        if self.endpoints and (self.demand or self.slo or isinstance(self.replicas, ReplicaRange)):
            yield Problem(
                "the engines of `endpoints` are run by something else, so no replica is planned for them",
                ("endpoints",),
                "Take `demand`, `slo` and the range of `replicas` out, or name a `source`.",
            )
        if self.slo and not self.demand:
            yield Problem(
                "an slo holds at a demand, and none is named",
                ("slo",),
                "Add demand: {requests_per_second: 6, prompt_tokens: 800, output_tokens: 200}.",
            )
        if self.demand and self.replicas == 0:
            yield Problem(
                "a demand with replicas: 0 cannot be served",
                ("replicas",),
                "Take `replicas` out, or write {min: 0, max: N} for a model that sleeps without requests.",
            )
        asked = self.demand.prompt_tokens + self.demand.output_tokens if self.demand else 0
        if self.max_model_len and asked > self.max_model_len:
            yield Problem(
                f"demand asks for {asked:,} tokens per request, prompt and answer together; max_model_len is {self.max_model_len:,}",
                ("demand",),
                f"Raise max_model_len to at least {asked}, or shorten the requests.",
            )

    @property
    def least_replicas(self) -> int:
        """Replicas that run whatever the demand: the number, the range's `min`, or one where nothing is said."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas.min
        return 1 if self.replicas is None else self.replicas

    @property
    def most_replicas(self) -> int | None:
        """Replicas that there may be at most; None where demand alone decides."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas.max
        if self.replicas is None:
            return None if self.demand else 1
        return self.replicas

    @property
    def accepted_profiles(self) -> tuple[str, ...]:
        """The only profiles its replicas may have; empty where any that fits will do."""
        return (self.profile,) if self.profile else self.profiles
