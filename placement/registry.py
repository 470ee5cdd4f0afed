"""The model registry as placement asks it: one model of the configuration on one slice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from model_registry.errors import RegistryError
from model_registry.model import ModelSpec, SliceFit
from model_registry.schema import ModelConfig
from model_registry.sizing import default_limits, fit, weigh
from model_registry.source import resolve_source
from placement.engines import describe_engine, find_engine_python
from placement.errors import EngineMissing
from placement.launch import SizedModel
from placement.schema import EngineConfig
from placement.slices import Slice, SliceKind

# What vLLM is sized as where none is installed yet: the version that `sliceway engine install` brings.
DEFAULT_VLLM = "0.32.0"


class ModelRegistry:
    """Reads each model once. With `engine.command` another engine decides what fits, so everything does."""

    def __init__(
        self,
        engine: EngineConfig,
        *,
        vllm_version: str = DEFAULT_VLLM,
        device: Literal["cuda", "cpu"] = "cuda",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._vllm_version = vllm_version
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
        return SizedModel(model, source, task, limits.max_model_len, limits, weigh(spec, limits))

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        """Whether the model fits the slice, by the bytes it takes there."""
        spec = self._specs.get(sized.config.name)
        if self._engine.command or spec is None or sized.limits is None or sized.footprint is None:
            return _taken_on_trust(target)
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
                self._specs[model.name] = resolve_source(
                    str(model.source), revision=model.revision, environ=self._environ
                )
            except RegistryError as error:
                if not self._engine.command:
                    raise _named(error, model.name) from error
                self._specs[model.name] = None
        return self._specs[model.name]


def installed_vllm(engine: EngineConfig, *, cuda: bool) -> str:
    """The version of the vLLM that would be started; the one that would be installed where there is none yet."""
    try:
        python = find_engine_python("cuda" if cuda else "cpu", engine.python)
        return describe_engine(python).vllm or DEFAULT_VLLM
    except EngineMissing:
        return DEFAULT_VLLM


def _taken_on_trust(target: Slice) -> SliceFit:
    return SliceFit(
        fits=True,
        reason="not sized: engine.command runs another engine",
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
