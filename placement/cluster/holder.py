"""What engines belong to, as long as Ray has their node: an actor of each replica, or one of each node.

Ray's worker imports the module of the class that it is given. This one needs the standard library only: what an agent or the head
imports takes longer to load, and more memory, than Ray itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from placement.replicas.procfs import ProcessIdentity


def _own_process() -> dict[str, object]:
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    return asdict(me)


class SliceHolder:
    """Holds a node's slices: an engine there outlives this process by a while at most, unless another one takes its place."""

    def owner(self) -> str:
        """This process as an `Owner`, in JSON, for a node's controller to look for."""
        return json.dumps(_own_process())


class ReplicaActor:
    """One replica: its engine outlives this process by a while at most, unless another one takes its place.

    It lives in the placement group of its slice and ends with it: who gives the slice back ends it.
    """

    def __init__(self, seat: Mapping[str, str], journal: str) -> None:
        """`seat` is a `Seat` as data. `journal` is the file on this node in which its controller writes down the engine; empty where
        nobody knows.
        """
        self._seat = {name: seat[name] for name in ("replica", "model", "node", "slice_id")}
        self._journal = journal

    def __repr__(self) -> str:
        """What Ray shows for it in lists and logs."""
        return f"{self._seat['replica']} on {self._seat['node']}/{self._seat['slice_id']}"

    def owner(self) -> str:
        """As `SliceHolder.owner`, with the seat: one that is about to end may still have the replica's name."""
        return json.dumps({**_own_process(), "seat": self._seat})

    def describe(self) -> dict[str, object]:
        """For people: the seat, this process, and the engine's (None where none runs there, or nobody knows)."""
        return {**self._seat, "pid": os.getpid(), "engine_pid": self._engine()}

    def _engine(self) -> int | None:
        try:
            entry = json.loads(Path(self._journal).read_bytes())
            shim = ProcessIdentity(int(entry["shim_pid"]), int(entry["shim_start_ticks"]), str(entry["boot_id"]))
            here = str(entry["slice_id"]) == self._seat["slice_id"]
            engine = int(entry["engine_pid"])
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
        ):  # none has been started, or it is being written by another version
            return None
        return engine if here and engine and shim.alive else None
