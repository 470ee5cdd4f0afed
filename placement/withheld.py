"""Slices that the controller is asked to leave for now, because they are about to be cut anew.

A file in the state directory: it outlives a controller that ends meanwhile, and removing it gives the slices back.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace

from model_registry.atomic import write_atomically
from model_registry.words import are, counted
from placement.slices import Inventory, Slice
from placement.state import StatePaths


def withhold(paths: StatePaths, slices: Collection[str]) -> None:
    """Ask for these slices, by id or UUID; a GPU's UUID stands for all of its slices. In place of what was asked before."""
    write_atomically(paths.withheld, json.dumps({"slices": sorted(slices)}).encode())


def release(paths: StatePaths) -> None:
    """Ask for none any more."""
    paths.withheld.unlink(missing_ok=True)


def withheld(paths: StatePaths) -> frozenset[str]:
    """What is asked for. A file that makes no sense asks for nothing: it must not take down what serves."""
    try:
        return frozenset(map(str, json.loads(paths.withheld.read_bytes())["slices"]))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def without(inventory: Inventory, asked: Collection[str]) -> Inventory:
    """`inventory` less the slices that are asked for."""
    if not asked:
        return inventory
    kept = tuple(s for s in inventory.slices if not is_among(s, asked))
    gone = len(inventory.slices) - len(kept)
    note = f"{counted(gone, 'slice')} {are(gone)} left free: `sliceway apply --drain` is about to cut their GPU anew."
    return replace(inventory, slices=kept, notes=(*inventory.notes, *((note,) if gone else ())))


def is_among(target: Slice, asked: Collection[str]) -> bool:
    """Whether the slice, or its whole GPU, is asked for."""
    return target.id in asked or target.uuid in asked or (target.gpu is not None and target.gpu.uuid in asked)
