"""Which slices were made for other work, and for whom: what `fleet.reserve` asked for and nothing touches again.

A small file of the state directory, by slice id. A slice that is gone takes its reservation with it, and is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model_registry.atomic import write_atomically
from placement.errors import PlacementError

RESERVATIONS_FILE = "reservations.json"
"""Its name in the state directory."""


@dataclass(frozen=True, slots=True)
class Reservations:
    """The reservations of one state directory."""

    path: Path

    def read(self) -> dict[str, str]:
        """Notes by slice id; empty if nothing is reserved. Raises PlacementError for a file that makes no sense."""
        try:
            raw = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        if not isinstance(raw, Mapping) or not all(isinstance(v, str) for v in raw.values()):
            raise self._damaged()
        return dict(raw)

    def add(self, slice_id: str, note: str) -> None:
        """Remember a slice that was made for `note`."""
        self._write(self.read() | {slice_id: note})

    def keep(self, slice_ids: Iterable[str]) -> None:
        """Forget all but these: the others are gone."""
        there, known = set(slice_ids), self.read()
        left = {slice_id: note for slice_id, note in known.items() if slice_id in there}
        if left != known:
            self._write(left)

    def _write(self, notes: Mapping[str, str]) -> None:
        write_atomically(self.path, json.dumps(dict(sorted(notes.items())), indent=1).encode(), mode=0o600)

    def _damaged(self) -> PlacementError:
        return PlacementError(
            "the list of reserved slices cannot be read",
            where=str(self.path),
            remedy="Write it anew as JSON, {slice id: note}; until then nothing is planned, or what is reserved could be lost.",
        )
