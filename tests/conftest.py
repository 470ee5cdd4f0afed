"""Fixtures that several kinds of test share."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from placement.simulator import MachineOptions, Simulation
from placement.simulator.build import libraries

Simulate = Callable[..., Simulation]

# How long an example takes says something about the machine, and nothing about the law.
settings.register_profile(
    "any machine", parent=settings(), deadline=None, suppress_health_check=(HealthCheck.too_slow,)
)
settings.load_profile("any machine")


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Makes a simulated machine and points this process at it: `simulate("h100-sxm:2", mig=True)`."""

    def make(fleet: str = "h100-sxm", directory: Path | None = None, **options: Any) -> Simulation:
        made = Simulation.create(directory or tmp_path / "machine", fleet, MachineOptions(**options))
        monkeypatch.setenv("SLICEWAY_NVML_STATE", str(made.state))
        return made

    monkeypatch.delenv("SLICEWAY_NVML_PRIVILEGE", raising=False)
    return make


def binding_to(library: Path) -> ModuleType:
    """nvidia-ml-py as it is, a copy of its own, with `library` in the place of what the linker would find."""
    installed = importlib.util.find_spec("pynvml")
    assert installed is not None
    assert installed.origin is not None
    spec = importlib.util.spec_from_file_location(f"pynvml_{abs(hash(library))}", installed.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # it looks itself up there to make its error classes
    spec.loader.exec_module(module)
    module.nvmlLib = ctypes.CDLL(str(library))  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="session")
def bind() -> Callable[[Path], ModuleType]:
    """`bind(library)`: nvidia-ml-py on a library of one's choice."""
    return binding_to


@pytest.fixture(scope="session")
def simulator_binding() -> ModuleType:
    """nvidia-ml-py on the simulator."""
    return binding_to(libraries().nvml)


@pytest.fixture(autouse=True)
def _no_machine_stays() -> Iterator[None]:
    """A command that is run in this process enters its simulated machine for good; the next test starts without one."""
    names = ("SLICEWAY_NVML_STATE", "SLICEWAY_NVML_PRIVILEGE", "LD_LIBRARY_PATH")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def nvml(simulator_binding: ModuleType, simulate: Simulate) -> Iterator[Callable[..., Any]]:
    """Initialises nvidia-ml-py on a new simulated machine: `n = nvml("h100-sxm", mig=True)`; `n.machine` controls it."""

    def end_sessions() -> None:
        """The library stays on its first machine until the last session is over: whoever left one open, it ends here."""
        with contextlib.suppress(simulator_binding.NVMLError):
            while True:
                simulator_binding.nvmlShutdown()

    def start(fleet: str = "h100-sxm", **options: Any) -> Any:
        simulator_binding.machine = simulate(fleet, **options)  # type: ignore[attr-defined]
        end_sessions()
        simulator_binding.nvmlInit()
        return simulator_binding

    yield start
    end_sessions()
