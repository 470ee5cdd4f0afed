"""What the plugin tells the controller: one JSON object per line in the engine's log.

Written straight to standard error, which is the replica's log: vLLM chooses its platform before it configures logging (seen
in 0.32.0), and an operator may have turned logging off. One write per line, so that processes do not mix theirs.
`placement.evidence` reads the lines back; each holds what only the engine's process can know. Events and fields:

- `slice`   what the platform answers: uuid, parent, gi, ci, memory_bytes, name, capability, vllm, tested
- `limits`  the engine's configuration after vLLM has settled it: max_num_seqs, max_num_batched_tokens, max_model_len,
            gpu_memory_utilization, kv_cache_memory_bytes (null where vLLM has none)
- `cuda`    what CUDA sees once a worker has its device: total_bytes, sm_count, uuid
"""

from __future__ import annotations

import contextlib
import json
import os

MARK = "sliceway_mig "
LOGGER = "vllm.sliceway_mig"  # for people; below "vllm", so that vLLM's handlers apply once it has any
_STANDARD_ERROR = 2


def tell(event: str, **facts: object) -> None:
    """Write one line: the mark, the event, and `facts` as JSON. An engine without standard error goes on without."""
    line = f"{MARK}{event} {json.dumps(facts, default=str)}\n"
    with contextlib.suppress(OSError):
        os.write(_STANDARD_ERROR, line.encode())
