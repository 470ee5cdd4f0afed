"""Run by vLLM's own interpreter: start the CPU engine on a configuration alone and print what it makes of its KV cache.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 PYTHON kv_engine_probe.py RUN.json

RUN is one entry of `tests/data/sizing/engine_runs.json`; the last line of output is the entry's `measured` (JSON). Dummy
weights and no tokenizer, so that a config.json of any family is all it takes; encoders alone want a vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ENGINE_NAMES = {
    "block_tokens": "block_size",
    "prefix_caching": "enable_prefix_caching",
    "kv_cache_dtype": "kv_cache_dtype",
    "dtype": "dtype",
}
ENCODERS = ("bert", "xlm-roberta")
REFUSED = re.compile(r"To serve at least one request.*?estimated maximum model length is (\d+)", re.DOTALL)


def start(run: dict[str, Any], folder: Path) -> Any:
    from vllm import LLM

    limits, encoder = run["limits"], run["config"]["model_type"] in ENCODERS
    (folder / "config.json").write_text(json.dumps(run["config"]), encoding="utf-8")
    if encoder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words += [f"w{i}" for i in range(run["config"]["vocab_size"] - len(words))]
        (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    options = {ENGINE_NAMES[k]: v for k, v in limits.items() if k in ENGINE_NAMES}
    if run["pooling"]:
        options["runner"] = "pooling"
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=not encoder,
        enforce_eager=True,
        disable_log_stats=True,
        kv_cache_memory_bytes=run["pool_bytes"],
        max_model_len=limits["max_model_len"],
        max_num_seqs=limits["max_num_seqs"],
        max_num_batched_tokens=limits["max_num_batched_tokens"],
        **options,
    )


def measure(run: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            engine = start(run, Path(folder))
        except (ValueError, AssertionError, RuntimeError) as error:
            return refusal(str(error))
        cache = engine.llm_engine.vllm_config.cache_config
        plan = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        groups = [
            [type(s).__name__.removesuffix("Spec"), len(g.layer_names), s.block_size, s.page_size_bytes]
            for g in plan.kv_cache_groups
            for s in (g.kv_cache_spec,)
        ]
        measured: dict[str, Any] = {"blocks": plan.num_blocks, "groups": groups}
        if groups:
            measured["kv_tokens"] = cache.kv_cache_size_tokens
            measured["max_concurrency"] = round(cache.kv_cache_max_concurrency, 2)
        return measured


def refusal(message: str) -> dict[str, Any]:
    if found := REFUSED.search(message):
        return {"refused": "kv_cache", "longest_context_tokens": int(found.group(1))}
    if "Sliding window for some but all layers is not supported" in message:
        return {"refused": "limits"}
    raise RuntimeError(message)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    sys.stdout.write("\n" + json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))) + "\n")
