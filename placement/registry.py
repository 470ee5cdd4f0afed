"""The model registry as placement asks it: one model of the configuration on one slice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from model_registry.errors import RegistryError
from model_registry.model import ModelSpec, SliceFit
from model_registry.schema import ModelConfig
from model_registry.sizing import default_limits, fit, weigh
from model_registry.source import resolve_source
from placement.engines import INSTALLED_VERSIONS, EngineKind, describe_engine, find_engine_python
from placement.errors import EngineMissing
from placement.launch import SizedModel
from placement.schema import EngineConfig
from placement.slices import Slice, SliceKind


class ModelRegistry:
    """Reads each model once. With `engine.command` another engine decides what fits, so everything does."""

    def __init__(
        self,
        engine: EngineConfig,
        *,
        vllm_version: str | None = None,
        device: EngineKind = "cuda",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._vllm_version = vllm_version or INSTALLED_VERSIONS[device]
        self._device = device
        self._environ = os.environ if environ is None else environ
        self._specs: dict[str, ModelSpec | None] = {}

    def describe(self, model: ModelConfig) -> SizedModel:
        """Raises RegistryError where the model cannot be read; not with `engine.command`, which may name models its own way."""
        spec = self._spec(model)
        if spec is None:
            task = "generate" if model.task == "auto" else model.task
            return SizedModel(model, str(model.source), task, model.max_model_len)
        limits = default_limits(model, spec, self._vllm_version, device=self._device)
        task = spec.task if model.task == "auto" else model.task
        source = str(spec.path) if Path(str(model.source)).exists() and spec.path else str(model.source)
        return SizedModel(model, source, task, limits.max_model_len, limits, weigh(spec, limits), spec)

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        """Whether the model fits the slice, by the bytes it takes there."""
        spec = self._specs.get(sized.config.name)
        if self._engine.command or spec is None or sized.limits is None or sized.footprint is None:
            return unsized(target, fits=True, reason="not sized: engine.command runs another engine")
        return fit(
            spec,
            sized.footprint,
            sized.limits,
            memory_bytes=target.memory_bytes,
            device="cpu" if target.kind is SliceKind.CPU else "cuda",
            product=target.gpu.product if target.gpu else None,
            profile=target.profile,
        )

    def _spec(self, model: ModelConfig) -> ModelSpec | None:
        if model.name not in self._specs:
            try:
                self._specs[model.name] = self._read(model)
            except RegistryError as error:
                if not self._engine.command:
                    raise _named(error, model.name) from error
                self._specs[model.name] = None
        return self._specs[model.name]

    def _read(self, model: ModelConfig) -> ModelSpec:
        if model.metadata is None:
            return resolve_source(str(model.source), revision=model.revision, environ=self._environ)
        return replace(resolve_source(model.metadata), source=str(model.source), path=None)


def installed_vllm(engine: EngineConfig, kind: EngineKind) -> str:
    """The version of the vLLM that would be started; the one that `sliceway engine install` brings where there is none."""
    try:
        return describe_engine(find_engine_python(kind, engine.python)).vllm or INSTALLED_VERSIONS[kind]
    except EngineMissing:
        return INSTALLED_VERSIONS[kind]


def unsized(target: Slice, *, fits: bool, reason: str) -> SliceFit:
    """What is said of a model on a slice where no figure of it is known."""
    return SliceFit(
        fits=fits,
        reason=reason,
        memory_bytes=target.memory_bytes,
        available_kv_bytes=0,
        kv_blocks=0,
        max_concurrency=0.0,
        longest_context_tokens=0,
        head_room_bytes=0,
        profile=target.profile,
    )


def _named(error: RegistryError, model: str) -> RegistryError:
    """The same error, saying which model of the configuration it is about."""
    error.where = error.where or f"models.{model}.source"
    return error
