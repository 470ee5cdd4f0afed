"""What the plugin tells the controller: one JSON object per line in the engine's log.

The lines go through vLLM's logger at INFO. `placement.evidence` reads them back; each holds one fact that only the
engine's process can know. Events and fields:

- `slice`   what the platform answers: uuid, parent, gi, ci, memory_bytes, name, capability, vllm, tested
- `limits`  the engine's configuration after vLLM has settled it: max_num_seqs, max_num_batched_tokens, max_model_len,
            gpu_memory_utilization, kv_cache_memory_bytes (null where vLLM has none)
- `cuda`    what CUDA sees once a worker has its device: total_bytes, sm_count, uuid
"""

from __future__ import annotations

import json
import logging

MARK = "sliceway_mig "
LOGGER = "vllm.sliceway_mig"  # below "vllm", so that vLLM's handlers and level apply


def tell(event: str, **facts: object) -> None:
    """Write one line: the mark, the event, and `facts` as JSON."""
    logging.getLogger(LOGGER).info("%s%s %s", MARK, event, json.dumps(facts, default=str))
