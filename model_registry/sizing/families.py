"""What each layer keeps between tokens, family by family.

The rules are those of Hugging Face's configurations (which keys mean what, and what a missing key means) and of the
layers that vLLM builds from them. An architecture that is not in `LAYOUTS` is read as plain full attention in every
layer: an upper bound, marked as not known by the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from model_registry.sizing.architecture import AttentionCache, LayerCache, StateKind
from model_registry.sizing.dimensions import Dimensions
from model_registry.sizing.recurrent import recurrent_state

Layout = Callable[[Dimensions], tuple[LayerCache, ...]]

_STATE_TYPES = {"linear_attention", "mamba", "mamba2", "conv", "short_conv", "recurrent", "M"}
_NO_CACHE_TYPES = {"mlp", "moe", "-", "E"}


def _mixed(d: Dimensions, types: list[str], state: StateKind | None = None) -> tuple[LayerCache, ...]:
    """One cache per layer type; a type that is not recognised is taken for full attention."""
    caches: list[LayerCache] = []
    for kind in types:
        if kind in _NO_CACHE_TYPES:
            continue
        if kind in _STATE_TYPES and state:
            caches.append(recurrent_state(state, d))
        elif kind == "sliding_attention" and d.window:
            caches.append(d.attention("sliding", d.window))
        else:
            caches.append(d.attention())
    return tuple(caches)


def plain(d: Dimensions) -> tuple[LayerCache, ...]:
    """Layer types where the configuration lists them, else its one sliding window, else full attention."""
    if types := d.layer_types:
        return _mixed(d, types)
    if d.window:
        return (d.attention("sliding", d.window),) * d.layers
    return (d.attention(),) * d.layers


def full(d: Dimensions) -> tuple[LayerCache, ...]:
    """Full attention in every layer: the upper bound for an architecture that is not known."""
    return (d.attention(),) * d.layers


def _qwen(d: Dimensions) -> tuple[LayerCache, ...]:
    """Qwen 2 and 3: a window, where switched on, holds from layer `max_window_layers` on."""
    first = d.count("max_window_layers")
    windowed = ["sliding_attention" if d.window and i >= first else "full_attention" for i in range(d.layers)]
    return _mixed(d, d.layer_types or windowed)


def refusal(d: Dimensions) -> str | None:
    """What vLLM does not run although the configuration allows it (`models/qwen2.py`)."""
    if LAYOUTS.get(d.model_type) is not _qwen or not d.window or len({c.kind for c in _qwen(d)}) < 2:
        return None
    return "vLLM runs no Qwen model whose sliding window holds in some layers only (`max_window_layers` below the number of layers)"


def _every(d: Dimensions, period: int) -> list[str]:
    """`sliding_attention`, with full attention in the last layer of each period."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(d.layers)]


def _interleaved(period: int) -> Layout:
    def layout(d: Dimensions) -> tuple[LayerCache, ...]:
        own = d.count("sliding_window_pattern") or d.count("_sliding_window_pattern")
        return _mixed(d, d.layer_types or _every(d, own or period))

    return layout


def _gemma3n(d: Dimensions) -> tuple[LayerCache, ...]:
    """The last `num_kv_shared_layers` layers read an earlier layer's cache."""
    types = d.layer_types or _every(d, 5)
    return _mixed(d, types[: d.layers - d.count("num_kv_shared_layers")])


def _gemma4(d: Dimensions) -> tuple[LayerCache, ...]:
    """As Gemma 3n, and full layers have heads of their own width and, where keys serve as values, number."""
    types = d.layer_types or _every(d, 6)
    types[-1] = "full_attention"
    width = d.count("global_head_dim") or 512
    heads = d.count("num_global_key_value_heads") if d.get("attention_k_eq_v") else 0
    wide = AttentionCache("full", heads or d.kv_heads, width, width)
    own = types[: d.layers - d.count("num_kv_shared_layers")]
    return tuple(d.attention("sliding", d.window) if t == "sliding_attention" else wide for t in own)


def _llama4(d: Dimensions) -> tuple[LayerCache, ...]:
    """Layers with rotary positions attend within chunks, the others (every fourth) to everything."""
    chunk = d.count("attention_chunk_size")
    step = d.count("no_rope_layer_interval") or 4
    rotary = d.get("no_rope_layers") or [int((i + 1) % step != 0) for i in range(d.layers)]
    return tuple(d.attention("chunked", chunk) if chunk and r else d.attention() for r in rotary[: d.layers])


def _latent(d: Dimensions) -> tuple[LayerCache, ...]:
    """Multi-head latent attention; with a sparse-attention indexer (DeepSeek-V3.2) its keys beside every layer."""
    ranks = d.latent
    if ranks is None:
        return full(d)
    layer: LayerCache = AttentionCache("mla", 1, ranks.kv_lora_rank + ranks.qk_rope_head_dim, 0)
    if not (width := d.count("index_head_dim")):
        return (layer,) * d.layers
    # One fp8 key per token, and a float32 scale for each 128 of its elements.
    keys: LayerCache = AttentionCache("mla", 1, width + 4 * -(-width // 128), 0, element_bytes=1)
    return (layer, keys) * d.layers


def _mimo(d: Dimensions) -> tuple[LayerCache, ...]:
    """MiMo-V2: windowed layers have heads of their own number and width, and values are narrower than keys."""
    wide = AttentionCache("full", d.kv_heads, d.head_dim, d.count("v_head_dim") or d.head_dim)
    windowed = AttentionCache(
        "sliding",
        d.count("swa_num_key_value_heads") or d.kv_heads,
        d.count("swa_head_dim") or d.head_dim,
        d.count("swa_v_head_dim") or d.head_dim,
        d.count("sliding_window_size") or d.window or 128,
    )
    pattern = d.get("hybrid_layer_pattern") or [0] * d.layers
    return tuple(windowed if p else wide for p in pattern[: d.layers])


def _gated_delta(d: Dimensions) -> tuple[LayerCache, ...]:
    step = d.count("full_attention_interval") or 4
    types = ["linear_attention" if (i + 1) % step else "full_attention" for i in range(d.layers)]
    return _mixed(d, d.layer_types or types, "gated_delta")


def _jamba(d: Dimensions) -> tuple[LayerCache, ...]:
    period, offset = d.count("attn_layer_period") or 8, d.count("attn_layer_offset")
    types = ["attention" if i % period == offset else "mamba" for i in range(d.layers)]
    return _mixed(d, d.layer_types or types, "mamba1")


def _only(state: StateKind) -> Layout:
    def layout(d: Dimensions) -> tuple[LayerCache, ...]:
        return (recurrent_state(state, d),) * d.layers

    return layout


def _mamba2_hybrid(d: Dimensions) -> tuple[LayerCache, ...]:
    """Nemotron-H, Granite 4, Bamba: attention where the configuration puts it, Mamba-2 elsewhere."""
    attention = set(d.get("attn_layer_indices") or ())
    types = ["attention" if i in attention else "mamba" for i in range(d.layers)]
    return _mixed(d, d.layer_types or types, "mamba2")


def _parallel_hybrid(d: Dimensions) -> tuple[LayerCache, ...]:
    """Falcon-H1: attention and a Mamba-2 mixer side by side in every layer."""
    return (d.attention(), recurrent_state("mamba2", d)) * d.layers


def _lfm2(d: Dimensions) -> tuple[LayerCache, ...]:
    attention = d.get("full_attn_idxs")
    types = ["full_attention" if attention is None or i in attention else "conv" for i in range(d.layers)]
    return _mixed(d, d.layer_types or types, "short_conv")


def _kimi_linear(d: Dimensions) -> tuple[LayerCache, ...]:
    """Latent attention in the layers listed as full (counted from 1), Kimi delta attention in the others."""
    ranks = d.latent
    listed = set((d.get("linear_attn_config") or {}).get("full_attn_layers") or ())
    layer: LayerCache = (
        d.attention() if ranks is None else AttentionCache("mla", 1, ranks.kv_lora_rank + ranks.qk_rope_head_dim, 0)
    )
    return tuple(layer if i + 1 in listed else recurrent_state("kimi_delta", d) for i in range(d.layers))


def _none(_: Dimensions) -> tuple[LayerCache, ...]:
    return ()


ENCODERS = frozenset(
    [
        "bert",
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "modernbert",
        "nomic_bert",
        "new",
        "gte",
        "electra",
    ]
)
"""Model types of bidirectional encoders: no cache at all, one pass per text."""

_BY_LAYOUT: tuple[tuple[Layout, str], ...] = (
    (plain, "llama granite granitemoe granitemoeshared gemma phi phimoe nemotron olmo olmo2 olmoe glm glm4 glm4_moe"),
    (
        plain,
        "stablelm opt gpt2 gpt_neox gptj bloom falcon internlm2 seed_oss cohere smollm3 ernie4_5 ernie4_5_moe dots1",
    ),
    (plain, "mistral ministral ministral3 mixtral phi3 phi4mm starcoder2 apertus arcee exaone hunyuan_v1_dense"),
    (_qwen, "qwen2 qwen2_moe qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3 qwen3_moe"),
    (_qwen, "qwen3_vl qwen3_vl_text qwen3_vl_moe qwen3_vl_moe_text"),
    (_gated_delta, "qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text"),
    (_interleaved(2), "gemma2 gpt_oss"),
    (_interleaved(4), "cohere2 olmo3 exaone4"),
    (_interleaved(6), "gemma3 gemma3_text"),
    (_gemma3n, "gemma3n gemma3n_text"),
    (_gemma4, "gemma4 gemma4_text"),
    (_llama4, "llama4 llama4_text"),
    (_latent, "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm4_moe_lite"),
    (_mimo, "mimo_v2 mimo_v2_flash"),
    (_mamba2_hybrid, "nemotron_h granitemoehybrid bamba"),
    (_parallel_hybrid, "falcon_h1"),
    (_jamba, "jamba"),
    (_only("mamba1"), "mamba falcon_mamba"),
    (_only("mamba2"), "mamba2"),
    (_lfm2, "lfm2 lfm2_moe"),
    (_kimi_linear, "kimi_linear"),
    (_none, " ".join(sorted(ENCODERS))),
)
LAYOUTS: Mapping[str, Layout] = {name: layout for layout, names in _BY_LAYOUT for name in names.split()}
"""`model_type` of the text model -> its layout."""
