"""A simulated machine: made once, seen by every process that gets its environment, and broken on purpose by tests."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from model_registry.atomic import write_atomically
from model_registry.catalogue import load_catalogue
from placement.cores import numa_nodes
from placement.errors import SimulatorError
from placement.simulator.build import Libraries, libraries
from placement.simulator.machine import PRIVILEGES, MachineOptions, Privilege, describe, parse_fleet

STATE_VARIABLE = "SLICEWAY_NVML_STATE"
PRIVILEGE_VARIABLE = "SLICEWAY_NVML_PRIVILEGE"
_KINDS = {"compute": 0, "graphics": 1, "mps": 2, "client": 3}
_NO_INSTANCE = 0xFFFFFFFF
_MEANINGS = {
    2: "there is no such property",
    3: "the GPU is in MIG mode: only its MIG devices can be used",
    6: "there is no such device or process",
    9: "there is no simulated machine",
    15: "the GPU has fallen off the bus",
    19: "processes or a display hold the GPU",
    20: "there is not that much memory left",
    23: "the simulator's table is full",
}

Kind = Literal["compute", "graphics", "mps", "client"]


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulated machine in a directory. The values here are paths: the machine itself is a file that all share."""

    directory: Path
    libraries: Libraries

    @classmethod
    def create(
        cls, directory: Path, fleet: str, options: MachineOptions | None = None, *, cache: Path | None = None
    ) -> Self:
        """Make a machine with the GPUs that `fleet` names (`h100-sxm:8`) in an empty or new directory.

        Raises SimulatorError if one is there, there is no compiler, or a product cannot be simulated.
        """
        options = options or MachineOptions()
        if not options.cpus:
            options = _on_this_host(options)
        description = describe(parse_fleet(load_catalogue(), fleet), options)
        made = cls(directory.absolute(), libraries(cache))
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "machine.txt", description.text.encode())
        about = {"fleet": fleet, "assumptions": description.assumptions}
        write_atomically(directory / "machine.json", json.dumps(about, indent=1).encode())
        error = ctypes.create_string_buffer(512)
        paths = (os.fsencode(directory / "machine.txt"), os.fsencode(made.state))
        if made._control().sliceway_sim_create(*paths, error, ctypes.c_size_t(len(error))):
            raise SimulatorError(
                f"the simulated machine could not be made: {error.value.decode()}", where=str(directory)
            )
        return made

    @classmethod
    def open(cls, directory: Path, *, cache: Path | None = None) -> Self:
        """The machine that was made in `directory`; raises SimulatorError if there is none."""
        if not (directory / "state").exists():
            raise SimulatorError(
                "there is no simulated machine", where=str(directory), remedy="Start with --simulate h100-sxm:8."
            )
        return cls(directory.absolute(), libraries(cache))

    @classmethod
    def ensure(
        cls, directory: Path, fleet: str, options: MachineOptions | None = None, *, cache: Path | None = None
    ) -> Self:
        """The machine in `directory`, made if there is none; raises SimulatorError if it has other GPUs."""
        if not (directory / "state").exists():
            return cls.create(directory, fleet, options, cache=cache)
        there = json.loads((directory / "machine.json").read_text(encoding="utf-8"))["fleet"]
        if there != fleet:
            raise SimulatorError(
                f"the simulated machine there has {there}, not {fleet}",
                where=str(directory),
                remedy="Remove the directory to start with another machine.",
            )
        return cls.open(directory, cache=cache)

    @property
    def state(self) -> Path:
        """The file that is the machine."""
        return self.directory / "state"

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Figures that nobody has published and that this machine makes up."""
        return tuple(json.loads((self.directory / "machine.json").read_text(encoding="utf-8"))["assumptions"])

    def environment(
        self, *, privilege: Privilege | None = None, environ: Mapping[str, str] = os.environ
    ) -> dict[str, str]:
        """What a process needs in its environment to see this machine instead of a driver; add it to the rest.

        The same for a process and for the children that inherit it: engines are known again by their environment.
        """
        own = str(self.libraries.directory)
        others = [p for p in environ.get("LD_LIBRARY_PATH", "").split(":") if p not in ("", own)]
        added = {STATE_VARIABLE: str(self.state), "LD_LIBRARY_PATH": ":".join([own, *others])}
        return added | ({PRIVILEGE_VARIABLE: privilege} if privilege else {})

    def activate(self, *, privilege: Privilege | None = None) -> None:
        """Make this very process and its children see the machine.

        Works as long as the process has not loaded a driver's NVML: a library with the name that `pynvml` asks for is
        then there already (the dynamic linker compares names), and stays for the life of the process.
        """
        ctypes.CDLL(str(self.libraries.nvml), mode=ctypes.RTLD_GLOBAL)
        os.environ.update(self.environment(privilege=privilege))

    @contextmanager
    def active(self, *, privilege: Privilege | None = None) -> Iterator[Self]:
        """`activate`, with the environment put back at the end."""
        names = (STATE_VARIABLE, PRIVILEGE_VARIABLE, "LD_LIBRARY_PATH")
        before = {name: os.environ.get(name) for name in names}
        self.activate(privilege=privilege)
        try:
            yield self
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def attach(
        self, pid: int, uuid: str, *, memory_bytes: int = 0, kind: Kind = "compute", name: str = "", ghost: bool = False
    ) -> None:
        """Put process `pid` on the GPU or MIG device `uuid`.

        It leaves when it ends; a `ghost` needs no living process and stays until `detach`. A `client` holds the driver
        open without computing, like DCGM: it stands in the way of mode changes and shows in no list.
        Raises SimulatorError if the device is not there, is full, or is a GPU in MIG mode.
        """
        arguments = (
            os.fsencode(self.state),
            uuid.encode(),
            pid,
            _KINDS[kind],
            ctypes.c_ulonglong(memory_bytes),
            int(ghost),
        )
        self._do("attach", self._control().sliceway_sim_attach(*arguments, (name or f"process-{pid}").encode()))

    def detach(self, pid: int) -> None:
        """Take a process off every device."""
        self._do("detach", self._control().sliceway_sim_detach(os.fsencode(self.state), pid))

    def inject(
        self,
        function: str,
        error: int,
        *,
        nth: int = 1,
        times: int = 1,
        gpu: int | None = None,
        after: bool = False,
        delay_seconds: float = 0,
    ) -> None:
        """Make calls of an NVML function fail: the `nth` from here on, `times` in a row (0: for ever).

        `error` is one of NVML's codes, or a negative signal number that the calling process gets; 0 with a delay is a
        call that hangs. `function` may end in `*`. With `after` the call is carried out and the answer lost.
        """
        arguments = (
            function.encode(),
            -1 if gpu is None else gpu,
            nth - 1,
            times,
            error,
            int(after),
            int(delay_seconds * 1000),
        )
        self._do("inject", self._control().sliceway_sim_fault(os.fsencode(self.state), *arguments))

    def kill_caller(self, function: str, *, nth: int = 1, after: bool = False) -> None:
        """SIGKILL for the process that makes the `nth` call of `function`, before or after it is carried out."""
        self.inject(function, -signal.SIGKILL, nth=nth, after=after)

    def clear_faults(self) -> None:
        """Forget every fault that was ordered."""
        self._do("clear", self._control().sliceway_sim_clear_faults(os.fsencode(self.state)))

    def xid(self, gpu: int, xid: int, *, gi: int = _NO_INSTANCE, ci: int = _NO_INSTANCE) -> None:
        """An XID error of a GPU, or of one of its instances."""
        self._do("xid", self._control().sliceway_sim_xid(os.fsencode(self.state), gpu, ctypes.c_ulonglong(xid), gi, ci))

    def lose(self, gpu: int) -> None:
        """The GPU falls off the bus; only `reboot` brings it back."""
        self._do("lose", self._control().sliceway_sim_lose(os.fsencode(self.state), gpu))

    def reset(self, gpu: int) -> None:
        """`nvidia-smi --gpu-reset`: instances go and a pending MIG mode becomes current. Refused while it is in use."""
        self._do("reset", self._control().sliceway_sim_reset(os.fsencode(self.state), gpu))

    def reboot(self) -> None:
        """Processes and instances are gone; the MIG mode survives on GPUs that need a reset to change it, else not."""
        self._do("reboot", self._control().sliceway_sim_reboot(os.fsencode(self.state)))

    def set(self, gpu: int, name: str, value: int) -> None:
        """Set `display`, `persistence`, `compute-mode`, `ecc-uncorrected` or `temperature` of a GPU."""
        self._do(name, self._control().sliceway_sim_set(os.fsencode(self.state), gpu, name.encode(), value))

    def set_privilege(self, privilege: Privilege) -> None:
        """What processes may do that have no privilege of their own in their environment."""
        self.set(0, "privilege", PRIVILEGES.index(privilege))

    def journal(self) -> tuple[str, ...]:
        """Every change of instances and modes in order: `create-gi gpu=0 gi=9 1g.10gb@2`."""
        path = self.directory / "state.journal"
        return tuple(path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()

    def _control(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(self.libraries.control))

    def _do(self, what: str, code: int) -> None:
        if code:
            raise SimulatorError(f"{what}: {_MEANINGS.get(code, f'error {code}')}", where=str(self.directory))


def join(memory_bytes: int, environ: Mapping[str, str] = os.environ, *, name: str = "") -> bool:
    """Put the calling process on the devices in its CUDA_VISIBLE_DEVICES, as CUDA would by itself on a real GPU.

    For engines that only pretend to compute. False where the environment names no simulated machine or no device.
    Raises SimulatorError like `Simulation.attach`.
    """
    state, devices = environ.get(STATE_VARIABLE), environ.get("CUDA_VISIBLE_DEVICES")
    if not state or not devices:
        return False
    simulation = Simulation.open(Path(state).parent)
    for uuid in devices.split(","):
        simulation.attach(os.getpid(), uuid.strip(), memory_bytes=memory_bytes, name=name)
    return True


def _on_this_host(options: MachineOptions) -> MachineOptions:
    """GPUs beside this machine's own cores, so that engines can really be pinned to them."""
    nodes = numa_nodes()
    return replace(options, cpus=tuple(nodes.values()), numa_nodes=tuple(nodes))
