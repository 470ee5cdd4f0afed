"""Rotary position tables: vLLM computes one per distinct setting at load and keeps it on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_registry.sizing.architecture import RopeTable
from model_registry.sizing.dimensions import Dimensions

_SCALED_FROM_ORIGINAL = ("yarn", "deepseek_yarn", "deepseek_llama_scaling")
_NO_ROPE = (
    "opt",
    "gpt2",
    "bloom",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "jamba",
    "nemotron_h",
    "bert",
    "roberta",
    "xlm-roberta",
)


def _settings(d: Dimensions) -> list[Mapping[str, Any]]:
    """One mapping per distinct rotary setting: new configurations keep one per layer type, old ones a scaling beside `rope_theta`."""
    parameters = d.get("rope_parameters")
    if isinstance(parameters, Mapping):
        nested = [p for p in parameters.values() if isinstance(p, Mapping)]
        return nested or [parameters]
    scaling = d.get("rope_scaling")
    own = dict(scaling) if isinstance(scaling, Mapping) else {}
    if d.get("rope_local_base_freq") or d.model_type.startswith("gemma3"):
        return [own, {}]
    return [own]


def scaling_type(setting: Mapping[str, Any]) -> str:
    """`default`, `linear`, `yarn`, `llama3`, `longrope`, ..., under the old key or the new one."""
    return str(setting.get("rope_type") or setting.get("type") or "default")


def _positions(setting: Mapping[str, Any], positions: int) -> int:
    """Rows of one table: scaling from the original length for YaRN, of the whole length for linear, fourfold for multimodal."""
    kind = scaling_type(setting)
    factor = float(setting.get("factor") or 1.0)
    if kind in _SCALED_FROM_ORIGINAL:
        original = int(setting.get("original_max_position_embeddings") or positions)
        return int(original * factor)
    if kind in ("linear", "dynamic", "ntk"):
        return int(positions * factor)
    if kind in ("longrope", "su"):
        return positions + int(setting.get("original_max_position_embeddings") or positions)
    return positions * 4 if "mrope_section" in setting else positions


def rope_tables(d: Dimensions) -> tuple[RopeTable, ...]:
    """The rotary tables of a model; empty for models that have none. Source: vLLM `model_executor/layers/rotary_embedding`."""
    positions = d.count("max_position_embeddings")
    if d.model_type in _NO_ROPE or not positions or not d.heads:
        return ()
    latent = d.latent
    width = latent.qk_rope_head_dim if latent else d.head_dim
    tables = []
    for setting in _settings(d):
        partial = float(
            setting.get("partial_rotary_factor") or d.get("partial_rotary_factor") or d.get("rotary_pct") or 1.0
        )
        tables.append(RopeTable(_positions(setting, positions), int(width * (1.0 if latent else partial))))
    return tuple(tables)


def context_limit(d: Dimensions) -> int | None:
    """The longest sequence that vLLM lets the model take; None where the configuration does not say.

    YaRN and Llama 3 lengths are already scaled in `max_position_embeddings`, linear and dynamic ones are not, and
    Gemma 3's are although its scaling is linear (vLLM `config/model.py`, `_get_and_verify_max_len`).
    """
    limit = d.count("max_position_embeddings")
    if not limit:
        return None
    if "gemma3" in d.model_type:
        return limit
    factor = 1.0
    for setting in _settings(d):
        if scaling_type(setting) not in (*_SCALED_FROM_ORIGINAL, "su", "longrope", "llama3", "default"):
            factor = float(setting.get("factor") or 1.0)
    return max(int(limit * factor), d.count("model_max_length"))
