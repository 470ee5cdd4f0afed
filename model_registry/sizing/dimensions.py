"""A model's configuration, with the aliases and defaults that a bare `config.json` leaves to the code that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from model_registry.errors import ModelUnreadable
from model_registry.model import MOST_LAYERS
from model_registry.sizing.architecture import AttentionCache, LatentAttention

Config = Mapping[str, Any]

_ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups"),
    "intermediate_size": ("ffn_dim", "n_inner", "d_inner", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx"),
    "vocab_size": ("padded_vocab_size",),
    "moe_intermediate_size": ("expert_intermediate_size",),
}
_TEXT_SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config")
_INHERITS = {"deepseek_v32": "deepseek_v3", "kimi_k2": "deepseek_v3", "camembert": "roberta"}
_FALCONS = ("falcon", "RefinedWeb", "RefinedWebModel")


def text_section(config: Config) -> Config:
    """The part of a configuration that describes the language model; all of it for text models."""
    for name in _TEXT_SECTIONS:
        section = config.get(name)
        if isinstance(section, Mapping):
            return text_section(section)
    return config


@cache
def _family_defaults() -> Mapping[str, Config]:
    text = resources.files("model_registry").joinpath("data/architecture_defaults.json").read_text(encoding="utf-8")
    loaded: dict[str, Config] = json.loads(text)
    return loaded


class Dimensions:
    """What a text model's configuration says, dimension by dimension; keys nobody gives read as None."""

    def __init__(self, config: Config) -> None:
        self.whole = config
        self.text = text_section(config)
        self.model_type = str(self.text.get("model_type") or config.get("model_type") or "")
        families = _family_defaults()
        family = _INHERITS.get(self.model_type, self.model_type)
        self._defaults = families.get(family) or families.get(f"{family}_text") or {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`: the text section's, the whole configuration's, the family's default, or `default`.

        A null counts as an answer (`sliding_window: null` is no window), unless another name of the key has a value.
        """
        named = [s[n] for s in (self.text, self.whole) for n in (key, *_ALIASES.get(key, ())) if n in s]
        if not named:
            return self._defaults.get(key, default)
        return next((value for value in named if value is not None), None)

    def count(self, key: str, default: int = 0) -> int:
        """The value of `key` as an integer; `default` where it is missing or null. Of a list (per layer) the largest."""
        value = self.get(key)
        if isinstance(value, list):
            value = max((v for v in value if isinstance(v, int)), default=None)
        if value is None or isinstance(value, (bool, str)):
            return default
        return int(value)

    def size(self, key: str) -> int:
        """The value of `key` as a positive integer; ModelUnreadable names the key where there is none."""
        value = self.count(key)
        if value < 1:
            raise ModelUnreadable(
                f"config.json gives no usable {key!r} ({self.get(key)!r})",
                remedy="Point at a complete config.json; sizing reads every dimension from it.",
            )
        return value

    @property
    def layers(self) -> int:
        """Decoder layers, counted as the configuration counts them."""
        pattern = self.get("hybrid_override_pattern") or self.get("layers_block_type")
        count = len(pattern) if pattern else self.size("num_hidden_layers")
        if count > MOST_LAYERS:
            raise ModelUnreadable(
                f"config.json says that the model has {count:,} layers; no model has more than {MOST_LAYERS:,}",
                remedy="Point at the model's own config.json.",
            )
        return count

    @property
    def layer_types(self) -> list[str] | None:
        """One word per layer where the configuration lists them (Nemotron-H writes one character per layer)."""
        pattern = self.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            return list(pattern)
        types = self.get("layer_types") or self.get("layers_block_type")
        return [str(t) for t in types][: self.layers] if isinstance(types, list) else None

    @property
    def heads(self) -> int:
        """Query heads; 0 in models without attention."""
        return self.count("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key and value heads; as many as query heads where the configuration is silent."""
        if self.model_type in _FALCONS and not self.get("new_decoder_architecture") and self.get("multi_query", True):
            return 1
        return self.count("num_key_value_heads") or self.heads

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        for key in ("head_dim", "attention_head_dim", "hidden_size_per_head"):
            if width := self.count(key):
                return width
        return self.size("hidden_size") // self.heads if self.heads else 0

    @property
    def window(self) -> int | None:
        """The sliding window in tokens; None where it is switched off (0 means off, too)."""
        if self.get("use_sliding_window") is False:
            return None
        return self.count("sliding_window") or None

    @property
    def latent(self) -> LatentAttention | None:
        """The ranks of multi-head latent attention; None for every other model."""
        rank = self.count("kv_lora_rank")
        if not rank:
            return None
        return LatentAttention(
            kv_lora_rank=rank,
            q_lora_rank=self.count("q_lora_rank") or None,
            qk_nope_head_dim=self.size("qk_nope_head_dim"),
            qk_rope_head_dim=self.size("qk_rope_head_dim"),
            v_head_dim=self.size("v_head_dim"),
        )

    def attention(
        self, kind: Literal["full", "sliding", "chunked"] = "full", window: int | None = None
    ) -> AttentionCache:
        """One attention layer with this model's own number and width of heads."""
        return AttentionCache(kind, self.kv_heads, self.head_dim, self.head_dim, window)
