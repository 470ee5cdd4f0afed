"""The `fleet:` and `engine:` sections of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from model_registry.catalogue import load_catalogue
from model_registry.errors import SlicewayError
from model_registry.schema import FilePath, Section, Size
from placement.errors import PlacementError
from placement.partition.rules import LayoutRule
from placement.policy import PlanningConfig
from placement.sharing import SharingRule
from placement.simulator.machine import parse_fleet

ActorsOf = Literal["replica", "node"]


class CpuFleet(Section):
    """How this machine's cores are cut into `cpu` slices."""

    slices: int | Literal["auto"] = Field(
        default="auto", description="How many; `auto` is one per core, at most seven. Never more than there are cores."
    )
    memory: Size | None = Field(
        default=None, description="Memory budget of each slice; an equal share of 90% of the machine's if unset."
    )

    @field_validator("slices")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least one slice is needed")
        return value


class ExplicitSlice(Section):
    """One slice named by hand, for fleets that are not to be discovered."""

    kind: Literal["mig", "gpu", "cpu"]
    id: str | None = Field(default=None, description="Its name here; made from the UUID or the cores if unset.")
    uuid: str | None = Field(
        default=None, pattern=r"^(MIG|GPU)-[0-9A-Za-z/-]+$", description="What CUDA_VISIBLE_DEVICES gets."
    )
    cores: str | None = Field(default=None, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$", description="Cores, as in `0-3,8`.")
    memory: Size | None = None

    @model_validator(mode="after")
    def _pinnable(self) -> ExplicitSlice:
        if self.kind == "cpu" and not self.cores:
            raise ValueError("a cpu slice needs `cores`, like 0-3")
        if self.kind != "cpu" and not self.uuid:
            raise ValueError(f"a {self.kind} slice needs `uuid`; `sliceway slices` lists them")
        return self


class SimulatedFleet(Section):
    """GPUs that are not there, behind the same NVML: for planning, teaching and tests."""

    simulate: dict[str, Annotated[int, Field(ge=1, le=32)]] = Field(
        min_length=1, description="GPUs by product, like `{h100-sxm: 8}`; `plain` is a GPU without MIG. At most 32."
    )
    mig: bool = Field(default=True, description="Whether MIG is on when the machine is made.")

    @field_validator("simulate")
    @classmethod
    def _can_be_simulated(cls, value: dict[str, int]) -> dict[str, int]:
        try:
            parse_fleet(load_catalogue(), _fleet_text(value))
        except SlicewayError as error:
            raise ValueError("\n".join(filter(None, (error.message, error.remedy)))) from error
        return value

    @property
    def text(self) -> str:
        """As `--simulate` takes it: `h100-sxm:8,a30:2`."""
        return _fleet_text(self.simulate)


def _fleet_text(fleet: dict[str, int]) -> str:
    return ",".join(f"{product}:{count}" for product, count in fleet.items())


class FleetConfig(PlanningConfig):
    """Which slices there are, and how GPUs are cut into them."""

    discover: Literal["auto", "cpu", "nvidia", "none"] | SimulatedFleet = Field(
        default="auto",
        description="`auto` takes the NVIDIA driver's slices where there are any, else this machine's cores; `{simulate: {h100-sxm: 8}}` makes GPUs up.",
    )
    layouts: tuple[LayoutRule, ...] = Field(
        default=(), description="MIG instances that GPUs are to hold; made by `sliceway apply`."
    )
    sharing: tuple[SharingRule, ...] = Field(
        default=(), description="GPUs without MIG that several engines use at once; they are not isolated."
    )
    pin_cores: bool = Field(
        default=True,
        description="Give each GPU slice's engine cores of its own on the GPU's NUMA node. Off where something else pins.",
    )
    cpu: CpuFleet = CpuFleet()
    slices: tuple[ExplicitSlice, ...] = Field(default=(), description="An explicit list, instead of discovery.")


class RestartConfig(Section):
    """What happens when an engine ends that should run: exponential back-off with jitter, and a limit."""

    first_delay_seconds: float = Field(default=1.0, gt=0, le=600)
    max_delay_seconds: float = Field(default=60.0, gt=0, le=3600)
    fast_failure_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Ending sooner than this after it was started, or before it was ready, counts as a fast failure.",
    )
    max_fast_failures: int = Field(
        default=3, ge=1, le=100, description="So many in a row and the replica is `failed` until the operator acts."
    )


class LivenessConfig(Section):
    """How an engine that was ready is found to serve no longer.

    On a GPU a step takes a second at the most, and one that hangs is found within 10 s. On CPU cores a step may take tens of
    seconds (a long prompt on few cores), so there nothing is concluded as soon as that.
    """

    interval_seconds: float | None = Field(
        default=None,
        gt=0,
        le=600,
        description="Between two checks. Unset: 2 on GPUs, 5 on CPU slices and simulated GPUs.",
    )
    timeout_seconds: float = Field(default=5.0, gt=0, le=600, description="How long one check may take.")
    failures: int = Field(default=3, ge=1, le=100, description="So many failed checks in a row and it is restarted.")
    stall_seconds: float | None = Field(
        default=None,
        ge=0,
        description="Requests run, but no engine step ends for so long: restarted. 0: never. "
        "Unset: 6 on GPUs, 120 on CPU slices and simulated GPUs.",
    )

    def times(self, *, on_gpu: bool) -> tuple[float, float]:
        """Seconds between two checks, and seconds without a step after which an engine hangs (0: never). `on_gpu` says whether
        a real GPU does the work.
        """
        interval, stall = (2.0, 6.0) if on_gpu else (5.0, 120.0)
        return (
            interval if self.interval_seconds is None else self.interval_seconds,
            stall if self.stall_seconds is None else self.stall_seconds,
        )


class NetworkConfig(Section):
    """Engines that gateways of other machines reach: written by a cluster's agent, not by hand (docs/cluster.md)."""

    address: str = Field(
        min_length=1, description="This machine's address, where engines listen with `transport: tcp`."
    )
    secret_file: Annotated[Path, FilePath()] = Field(
        description="A file with what requests show to engines that were started before each had a secret of its own."
    )

    def secret(self) -> str:
        """The file's text. Raises PlacementError where it cannot be read."""
        try:
            return self.secret_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise PlacementError(
                f"the engines' secret cannot be read: {error.strerror}",
                where=str(self.secret_file),
                remedy="The agent of this node writes it: is it running?",
            ) from error


class EngineTlsConfig(Section):
    """TLS between gateways and engines that listen on TCP. The same paths on every node; each node has files of its own there."""

    certificate: Annotated[Path, FilePath()] = Field(
        description="PEM, with the address that engines listen on as an IP address among its alternative names."
    )
    key: Annotated[Path, FilePath()] = Field(
        description="PEM, not encrypted; readable by the user who runs the engines alone."
    )
    authority: Annotated[Path, FilePath()] = Field(
        description="PEM, who must have signed an engine's certificate for a gateway to talk to it."
    )


class EngineConfig(Section):
    """How engine processes are started."""

    python: Annotated[str | None, FilePath("command")] = Field(
        default=None, description="Interpreter with vLLM; found by itself if unset (`sliceway engine install`)."
    )
    command: tuple[str, ...] = Field(
        default=(),
        description="Another engine that speaks OpenAI's API. {model}, {served_name}, {uds} or {port}, {max_model_len}, {max_num_seqs}, {task}, {cores} and {python} (the one that runs sliceway) are filled in; with `tls` {certificate} and {key} too. On TCP it finds the secret to ask for in ENGINE_API_KEY.",
    )
    transport: Literal["unix", "tcp"] = Field(
        default="unix",
        description="`tcp` (loopback only, behind a secret) where an engine cannot listen on a Unix socket.",
    )
    tls: EngineTlsConfig | None = Field(
        default=None, description="Encrypt what goes between gateways and engines on TCP (docs/security.md)."
    )
    network: NetworkConfig | None = Field(
        default=None, description="With `transport: tcp`: listen on this machine's address instead of loopback."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="Added to every engine's environment.")
    usage_reporting: bool = Field(default=False, description="Let engines send usage statistics to their makers.")
    start_timeout_seconds: float = Field(default=900.0, gt=0)
    parallel_starts: int | None = Field(
        default=None,
        ge=1,
        description="How many engines start at once on GPUs, never two on one GPU; one per four cores, at least two, if unset.",
    )
    drain_timeout_seconds: float = Field(
        default=30.0, ge=0, description="How long running requests may go on after a stop was asked for."
    )
    stop_timeout_seconds: float = Field(default=20.0, gt=0, description="From SIGTERM to SIGKILL.")
    restart: RestartConfig = RestartConfig()
    liveness: LivenessConfig = LivenessConfig()


class ClusterConfig(Section):
    """What counts only where several machines serve together (docs/cluster.md)."""

    actors: ActorsOf = Field(
        default="replica",
        description="The Ray actors that engines belong to: one of each replica, or one of each node, which costs less where "
        "few cores have very many small slices.",
    )
