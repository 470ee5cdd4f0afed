"""The last configuration that a controller took over, for one that starts while the one on disk is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from model_registry.atomic import write_atomically
from placement.goals import PlacementConfig


@dataclass(frozen=True, slots=True)
class AcceptedConfig:
    """The file of one state directory."""

    path: Path

    def remember(self, config: PlacementConfig) -> None:
        """Keep it. Raises OSError."""
        write_atomically(self.path, config.model_dump_json().encode(), mode=0o600)

    def last(self) -> PlacementConfig | None:
        """What was kept; None if there is nothing that makes sense."""
        try:
            return PlacementConfig.model_validate_json(self.path.read_bytes())
        except (OSError, ValidationError):
            return None
