"""Configurations in memory that are planned for cards of the catalogue; models are sized from the examples' metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Config
from gateway.export.cluster import nodes_of
from gateway.export.model import Exported
from gateway.export.planned import exported

ROOT = Path(__file__).parents[4]
MODELS = ROOT / "configs" / "examples" / "models"
SMALL: dict[str, Any] = {
    "name": "small",
    "source": "Qwen/Qwen3-0.6B",
    "metadata": str(MODELS / "Qwen--Qwen3-0.6B.json"),
    "max_model_len": 2048,
}

Export = Callable[..., Exported]


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    """A configuration with these sections; one small model if no others are named."""

    def make(**sections: Any) -> Config:
        return Config.model_validate({"version": "v1", "state_dir": tmp_path, "models": [SMALL]} | sections)

    return make


@pytest.fixture
def export(config_of: Callable[..., Config]) -> Export:
    """Plan and export such a configuration for `nodes`."""

    def make(nodes: Sequence[str] = ("h100-sxm:1",), **sections: Any) -> Exported:
        config = config_of(**sections)
        return exported(config, nodes_of(config, nodes))

    return make
