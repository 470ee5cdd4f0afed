"""The steps from one fleet to another, as values that can be written down and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model_registry.errors import UnknownProfile
from model_registry.geometry import Placement
from placement.planner.types import WHOLE, WHOLE_GPU

Kind = Literal["drain", "stop", "destroy", "create", "start", "check", "seat", "unseat"]
"""`seat` and `unseat` are what is left of `start` and `stop` where nobody runs engines: who has which slice is written down."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One slice of one GPU, or all of it (`gpu@0`)."""

    gpu: str
    placement: Placement

    def __str__(self) -> str:
        return self.gpu if self.placement == WHOLE else f"{self.gpu}/{self.placement}"

    @property
    def slice_id(self) -> str:
        """As the inventory calls it: `<GPU UUID>/<profile>@<start>`, or the GPU's UUID for a whole card."""
        return str(self)

    @classmethod
    def parse(cls, text: str) -> Place:
        """The inverse of `str`. Raises UnknownProfile for what is neither a placement on a GPU nor a GPU."""
        gpu, slash, last = text.rpartition("/")  # a cluster's GPUs have a slash in their names: NODE/UUID
        if "@" in last:
            return cls(gpu, Placement.parse(last))
        if not last or (slash and gpu.rpartition("/")[2].startswith("GPU-") and not last.startswith("GPU-")):
            raise UnknownProfile(
                f"{text!r} is no place on a GPU", remedy="Write GPU, or GPU/profile@start, like GPU-0/1g.10gb@3."
            )
        return cls(text, WHOLE)


@dataclass(frozen=True, slots=True)
class Step:
    """One idempotent action. `after` are the numbers of steps that must be done before.

    `create` and `destroy` are about an instance (of `gpu@0`: MIG off, and on again), the others about the engine of
    `replica` in this very place: while a replica moves there is one in each of two places.
    """

    number: int
    kind: Kind
    place: Place
    replica: str | None = None
    demand: str | None = None
    reserved: str | None = None
    after: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind in ("create", "destroy"):
            note = f" (reserved: {self.reserved})" if self.reserved else ""
            if self.place.placement.profile == WHOLE_GPU:
                return f"set {self.place.gpu} to MIG {'off' if self.kind == 'create' else 'on'}{note}"
            return f"{self.kind} {self.place}{note}"
        return f"{self.kind} {self.replica} on {self.place}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape, of `sliceway plan --json` and of the journal."""
        return {
            "step": self.number,
            "action": self.kind,
            "gpu": self.place.gpu,
            "slice": str(self.place.placement),
            "replica": self.replica,
            "model": self.demand,
            "reserved": self.reserved,
            "after": list(self.after),
        }

    @classmethod
    def of_public(cls, raw: Mapping[str, Any]) -> Step:
        """The inverse of `as_public`. Raises KeyError, ValueError or UnknownProfile for what is no step."""
        text = str(raw["slice"])
        placement = WHOLE if text == str(WHOLE) else Placement.parse(text)
        return cls(
            number=int(raw["step"]),
            kind=raw["action"],
            place=Place(str(raw["gpu"]), placement),
            replica=raw["replica"],
            demand=raw["model"],
            reserved=raw["reserved"],
            after=tuple(int(n) for n in raw["after"]),
        )


@dataclass(frozen=True, slots=True)
class Dip:
    """A demand that serves less for a while than it is guaranteed, in the unit of its capacity."""

    demand: str
    guaranteed: float
    lowest: float


@dataclass(frozen=True, slots=True)
class Transition:
    """Everything between two fleets, in an order that keeps every promise of `guaranteed`.

    `fingerprint` is that of the fleet it starts from, `target` of the one it leads to, where `seats` are the slice ids by
    replica. `before` is what each demand's engines serve at first, in the unit of its capacity. `dips` are promises that could not
    be kept, where that was allowed. `wanted` names the configuration that it was planned for; who finishes a transition for
    another one plans anew. Steps that depend on nothing of each other may be taken at the same time; any order that respects
    `after` keeps the promises.
    """

    steps: tuple[Step, ...]
    fingerprint: str
    target: str
    seats: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    guaranteed: Mapping[str, float] = field(default_factory=dict)
    dips: tuple[Dip, ...] = ()
    wanted: str = ""

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def gpus(self) -> tuple[str, ...]:
        """GPUs that some step is about."""
        return tuple(sorted({s.place.gpu for s in self.steps}))
