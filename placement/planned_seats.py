"""Which replica has which slice by the last plan that was carried out: what the controller runs where a fleet is planned.

A file of the state directory, slice ids by replica. It is changed one replica at a time while a transition goes on, so a
controller that starts in the middle of one runs exactly what the steps so far have made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model_registry.atomic import write_atomically
from placement.errors import PlacementError

SEATS_FILE = "planned.json"
"""Its name in the state directory."""


@dataclass(frozen=True, slots=True)
class PlannedSeats:
    """The seats of one state directory."""

    path: Path

    def read(self) -> dict[str, str] | None:
        """Slice ids by replica; None where nothing was planned yet. Raises PlacementError for a file that makes no sense."""
        try:
            raw = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        if not isinstance(raw, Mapping) or not all(
            isinstance(v, str) and k.rpartition("-")[2].isdigit() for k, v in raw.items()
        ):
            raise self._damaged()
        return dict(raw)

    def put(self, replica: str, slice_id: str) -> None:
        """Give `replica` the slice, in place of another that it had."""
        self._write((self.read() or {}) | {replica: slice_id})

    def remove(self, replica: str, slice_id: str) -> None:
        """Take the slice from `replica`; nothing happens if it has another by now."""
        seats = self.read() or {}
        self._write({r: s for r, s in seats.items() if (r, s) != (replica, slice_id)})

    def hand_over(self, replica: str, successor: str, slice_id: str) -> None:
        """Give `successor` the slice, and take its own from `replica`, at once."""
        self._write({r: s for r, s in (self.read() or {}).items() if r != replica} | {successor: slice_id})

    def begin(self, running: Mapping[str, str]) -> None:
        """From now on this file decides, and begins with what runs."""
        if self.read() is None:
            self._write(running)

    def _write(self, seats: Mapping[str, str]) -> None:
        write_atomically(self.path, json.dumps(dict(sorted(seats.items())), indent=1).encode(), mode=0o600)

    def _damaged(self) -> PlacementError:
        return PlacementError(
            "the list of planned seats cannot be read",
            where=str(self.path),
            remedy="Remove the file and run `sliceway apply CONFIG`: it plans from what the GPUs hold.",
        )
