"""Reading the models that a plan is made for. The one file here that touches disks and the hub, through the registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from model_registry.errors import ConfigError, SlicewayError
from model_registry.schema import ModelConfig
from placement.goals import Registry
from placement.workload.options import Subject


@dataclass(frozen=True, slots=True)
class Subjects:
    """The models by name: sized, or bare where another engine runs files that nobody can read; and why others are missing."""

    models: Mapping[str, Subject | ModelConfig]
    unreadable: Mapping[str, SlicewayError] = field(default_factory=dict)


def read_subjects(models: Iterable[ModelConfig], registry: Registry) -> Subjects:
    """Read and weigh every model that has a `source`. Blocking; may ask the hub.

    Raises ConfigError where the configuration asks for what makes no sense of the model; a model that cannot be had is told.
    """
    found: dict[str, Subject | ModelConfig] = {}
    unreadable: dict[str, SlicewayError] = {}
    for model in models:
        if not model.source:
            continue
        try:
            sized = registry.describe(model)
            if sized.spec is not None and sized.limits is not None:
                found[model.name] = Subject.of(model, sized.spec, sized.limits)
            else:
                found[model.name] = model
        except ConfigError:
            raise
        except SlicewayError as error:
            unreadable[model.name] = error
    return Subjects(found, unreadable)
