"""A first configuration for the machine it is written on. Pure: an inventory in, YAML out."""

from __future__ import annotations

from collections import Counter

from placement.cores import format_cores
from placement.slices import Inventory, Slice, SliceKind

_CPU_MODEL = """\
  - name: chat                     # the name that clients send as `model`
    source: ./models/my-model      # a hub id (org/name), a directory, or: sliceway models import FILE.gguf
    max_model_len: 2048            # tokens of prompt and answer together
    max_num_seqs: 8                # requests that run at once; with max_model_len this sizes the KV cache
    replicas: 1                    # each takes a slice of its own
"""

_GPU_MODEL = """\
  - name: chat                     # the name that clients send as `model`
    source: org/name               # a hub id (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count), a directory, or a GGUF file
    max_model_len: 8192            # tokens of prompt and answer together
    max_num_seqs: 16               # requests that run at once; with max_model_len this sizes the KV cache
    replicas: 1                    # each takes the smallest free slice that fits: sliceway size org/name
    # profile: 1g.10gb             # only slices of this profile
"""

_TEMPLATE = """\
# sliceway's configuration. Check it with `sliceway doctor {name}`, start it with `sliceway up {name}`.
# While it serves, edit it and send SIGHUP to `sliceway up`: a wrong file changes nothing.
version: v1
state_dir: ./.sliceway             # keys, logs, routing table

# Found on this machine ({summary}):
{slices}
fleet:
{fleet}

models:
{model}
# An engine that something else runs needs no slice:
#  - name: elsewhere
#    endpoints: ["http://127.0.0.1:9100"]

tenants:                           # keys: sliceway keys create TENANT {name}
  - name: {tenant}
    models: [chat]                 # or: all

gateway:
  listen: "127.0.0.1:8080"         # clients use http://127.0.0.1:8080/v1
"""


def starter_config(inventory: Inventory, *, name: str, tenant: str = "acme") -> str:
    """The text of a commented configuration that loads, for a machine with these slices. `name` is the file's own."""
    gpu = any(one.kind is not SliceKind.CPU for one in inventory.slices)
    return _TEMPLATE.format(
        name=name,
        tenant=tenant,
        summary=summary(inventory),
        slices="\n".join(f"#   {_describe(one)}" for one in inventory.slices) or "#   none",
        fleet="  discover: nvidia               # MIG slices and whole cards, as the driver tells them"
        if gpu
        else f"  discover: cpu                  # this machine's cores, cut into slices\n  cpu: {{slices: {max(1, len(inventory.slices))}}}",
        model=_GPU_MODEL if gpu else _CPU_MODEL,
    )


def summary(inventory: Inventory) -> str:
    """How many slices of which kind and profile, in one phrase."""
    counts = Counter(one.profile or one.kind.value for one in inventory.slices)
    return ", ".join(f"{count} x {what}" for what, count in counts.items()) or "no slice"


def _describe(one: Slice) -> str:
    where = (
        f"cores {format_cores(one.cores)}"
        if one.kind is SliceKind.CPU
        else f"{one.profile or one.kind.value} {one.uuid}"
    )
    product = f", {one.gpu.product}" if one.gpu else ""
    return f"{one.id}: {where}, {one.memory_bytes / 2**30:.1f} GiB{product}"
