"""When a node's GPUs are cut as `fleet.layouts` says: once for each time that its machine joins, on the head's first order.

Until then the head seats nobody on a slice that has nobody (`eligible.in_use`), so nothing comes to where something may go. An agent that
Ray starts again in between reads here that it is done, and cuts nothing because of that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from model_registry.atomic import write_atomically
from placement.cluster.layouts import LaidOut, differences, lay_out, layouts_in, not_here
from placement.gpus import GpuState
from placement.partition import Driver, LayoutRule


class LaidOutFile(BaseModel):
    """What came of it when the machine joined as `join`; see `LaidOut`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    join: str
    said: tuple[str, ...] = ()
    why: Mapping[str, str] = {}


class LayingOut:
    """One node's. A node without a `driver`, or without a name for the time that it joined, cuts nothing and is done."""

    def __init__(self, path: Path, join: str, driver: Driver | None) -> None:
        self._path, self._join, self._driver = path, join, driver
        self._rules: Sequence[LayoutRule] = ()
        self._ordered = False
        self._config: str | None = None
        self._found = read_laid_out(path)
        self._why: Mapping[str, str] = self._found.why if self._found is not None else {}

    @property
    def done(self) -> bool:
        """Whether it has been tried since the machine joined."""
        if self._driver is None or not self._join:
            return True
        return self._found is not None and self._found.join == self._join

    @property
    def due(self) -> bool:
        """Whether it is to be tried, because the head has said what is configured."""
        return self._ordered and not self.done

    def aim(self, config: str) -> None:
        """Go by this configuration, as it was ordered."""
        if config != self._config:
            rules = layouts_in(config)
            if self._ordered and rules != self._rules:
                self._why = {}  # of other rules than these
            self._config, self._rules = config, rules
        self._ordered = True

    def carry_out(self, gpus: Sequence[GpuState], taken: Collection[str]) -> None:
        """Cut, and write down what came of it; see `lay_out`. `gpus` are those that the node offers slices of: none of one that
        offers cores. Takes as long as the driver takes.
        """
        found = LaidOut(why={"": "a fault of sliceway itself, which the agent's log tells"})
        try:
            mine = gpus and self._rules
            found = lay_out(self._driver, self._rules, taken) if mine and self._driver is not None else LaidOut()
        finally:  # whatever came of it, it is not tried again
            self._found, self._why = LaidOutFile(join=self._join, said=found.said, why=found.why), found.why
        write_atomically(self._path, self._found.model_dump_json().encode(), mode=0o600)

    def told(self, gpus: Sequence[GpuState]) -> tuple[str, ...]:
        """What is not so at the moment, a line each."""
        if not self._rules or not gpus:
            return ()
        if not self.done:
            return ("fleet.layouts is carried out first, when engines that ran here before, if any, have ended",)
        return differences(gpus, self._rules, self._why)

    def missing(self, gpus: Sequence[GpuState]) -> tuple[str, ...]:
        """Which GPUs that the rules name by themselves are none of `gpus`."""
        return not_here(self._rules, gpus)


def read_laid_out(path: Path) -> LaidOutFile | None:
    """What came of it the last time; None if it was not tried yet."""
    try:
        return LaidOutFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
