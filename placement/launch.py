"""How a model's engine is started on a slice: a pure function to arguments and environment.

The limits are always passed. vLLM's own defaults come from the memory of the whole GPU, also on a slice of it, and are then
several times too large (vLLM 0.33.0 `engine/arg_utils.py`, `get_batch_defaults`). Prefix caching is left to vLLM: it is on
wherever the model supports it, and forcing it on breaks some that do not.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model_registry.errors import ConfigError
from model_registry.model import EngineLimits, Footprint, ModelSpec, SliceFit, Task
from model_registry.schema import ModelConfig
from placement.cores import format_cores
from placement.guarding import MIDDLEWARE
from placement.latency_grid import histogram_flags
from placement.schema import EngineConfig
from placement.sharing import utilization_of_card
from placement.simulated_engine import simulated_argv
from placement.slices import Slice, SliceKind

_TOKEN = re.compile(r"\{([a-z_]+)\}")
TOKENS = (
    *("model", "served_name", "uds", "host", "port", "max_model_len", "max_num_seqs", "task", "cores", "python"),
    *("certificate", "key"),
)
_LATE = ("uds", "port")
_OF_TLS = ("certificate", "key")
LEAST_POOL_BYTES = 2**20
_SLEEP_MODE = ("--enable-sleep-mode",)
_VLLM = ("-m", "vllm.entrypoints.openai.api_server")

# What must not leak from the controller's environment into an engine: it would unpin it, or mix two environments.
# Or it would lock the gateway out, which shows each engine that engine's own secret.
DROPPED = (
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD"),
    *("VLLM_API_KEY", "ENGINE_API_KEY"),
)
DROPPED_PREFIXES = ("OMP_", "GOMP_", "KMP_", "VLLM_CPU_", "SLICEWAY_")

# Where engines keep what they compile; each library has a variable of its own. vLLM's holds its start-up plans too, which
# know a slice by its GPU's memory, so profiles must not share it (VLLM_ENABLE_STARTUP_PLAN).
_CACHES = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
_GPU_CACHES = {
    "CUDA_CACHE_PATH": "cuda",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "TILELANG_CACHE_DIR": "tilelang",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine listens: a Unix socket, or a port of loopback or of the machine's own address.

    `secret` is what it wants to be shown; it is no part of the text.
    """

    uds: Path | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    tls: bool = False
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if (self.uds is None) == (self.port is None):
            raise ValueError("an endpoint is either a socket or a port")

    @classmethod
    def parse(cls, text: str, *, secret: str = "") -> Endpoint:
        """The inverse of `str`. Raises ValueError for what is neither `unix:/path` nor `http(s)://address:port`."""
        if text.startswith("unix:"):
            return cls(uds=Path(text.removeprefix("unix:")), secret=secret)
        match = re.fullmatch(r"http(s?)://([0-9.]+|\[[0-9a-fA-F:.]+\]):(\d+)", text)
        if not match:
            raise ValueError(f"{text!r} is no endpoint of an engine")
        tls, host, port = match.groups()
        return cls(port=int(port), host=host.strip("[]"), tls=bool(tls), secret=secret)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.uds}" if self.uds else f"http{'s' if self.tls else ''}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SizedModel:
    """A model of the configuration with what the registry knows of it.

    `source` is what the engine is told: a directory, file or hub id. `limits`, `footprint` and `spec` are None where only
    the engine behind `engine.command` knows what the model is.
    """

    config: ModelConfig
    source: str
    task: Task
    max_model_len: int | None
    limits: EngineLimits | None = None
    footprint: Footprint | None = None
    spec: ModelSpec | None = None


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """Everything that makes one engine process what it is, but where it listens.

    `cache` is the directory of its compilation caches, which replicas of the same kind share; None if it compiles nothing.
    `argv` may hold `{uds}`, `{port}` and `{drain_seconds}`, filled in at every start. `environment` is laid over what is inherited;
    `spec_hash` is equal exactly if an engine that runs need not be restarted.
    """

    replica: str
    model: str
    task: Task
    slice: Slice
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    cache: Path | None = None

    @property
    def spec_hash(self) -> str:
        """16 hex digits over arguments, environment and slice. A GPU slice's cores are changed under a running engine."""
        cores = self.slice.cores if self.slice.kind is SliceKind.CPU else ()
        content = [self.argv, sorted(self.environment.items()), self.slice.id, self.slice.uuid, cores]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def place_hash(self) -> str:
        """16 hex digits over the slice alone: equal exactly if another engine may take this one's place when its turn comes."""
        cores = self.slice.cores if self.slice.kind is SliceKind.CPU else ()
        content = [self.slice.id, self.slice.uuid, self.slice.memory_bytes, cores]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def command(self, endpoint: Endpoint, *, drain_seconds: float) -> list[str]:
        """The arguments with the endpoint filled in, and how long the engine may finish requests after SIGTERM."""
        late = {
            "uds": str(endpoint.uds or ""),
            "host": endpoint.host,
            "port": str(endpoint.port or ""),
            "drain_seconds": str(math.ceil(drain_seconds)),
        }
        return [_TOKEN.sub(lambda m: late.get(m.group(1), m.group(0)), part) for part in self.argv]

    def full_environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The engine's whole environment: the controller's, less what would unpin it, and ours on top."""
        kept = {k: v for k, v in inherited.items() if k not in DROPPED and not k.startswith(DROPPED_PREFIXES)}
        return kept | thread_environment(self.slice) | dict(self.environment)


def thread_environment(target: Slice) -> dict[str, str]:
    """As many threads as the slice has cores of its own, so that an engine does not start one per core of the machine."""
    if not target.cores:
        return {}
    threads = str(1 if target.shared_cores else len(target.cores))
    return {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}


def build_launch(
    replica: str,
    sized: SizedModel,
    target: Slice,
    fit: SliceFit,
    engine: EngineConfig,
    *,
    vllm_python: Path | None,
    own_python: Path,
    cache: Path,
    extra_environment: Mapping[str, str] | None = None,
    sleep_mode: bool = False,
    guarded: bool = False,
) -> LaunchSpec:
    """Arguments and environment for `sized` on `target`.

    `vllm_python` is the interpreter with vLLM, needed unless `engine.command` names another engine or the slice is
    simulated; `own_python` the one that runs sliceway; `cache` the directory for compilation caches.
    `extra_environment` comes below `engine.environment`. With `sleep_mode` vLLM is started so that it can sleep; its
    endpoints for that are open to whoever reaches its socket, which is this user alone. A `guarded` vLLM on TCP asks for the
    secret that its start gives it (`placement.guarding`), and speaks TLS where `engine.tls` says so.
    Raises ConfigError where `engine.command` is not usable.
    """
    compiles = False
    if engine.command:
        argv = _custom_argv(sized, target, engine, own_python)
    elif target.simulated and sized.limits is not None:
        arguments = _vllm_arguments(sized, sized.limits, target, fit, engine, guarded=guarded)
        argv = simulated_argv(own_python, [*arguments, *_SLEEP_MODE[: int(sleep_mode)]], sized, target, fit)
    elif vllm_python is None or sized.limits is None:
        raise ValueError(f"{replica}: vLLM needs an interpreter and limits")
    else:
        compiles = True
        arguments = _vllm_arguments(sized, sized.limits, target, fit, engine, guarded=guarded)
        argv = [str(vllm_python), *_VLLM, *arguments, *_SLEEP_MODE[: int(sleep_mode)]]
    environment = {
        **_environment(target, engine, cache),
        **({"VLLM_SERVER_DEV_MODE": "1"} if sleep_mode else {}),
        **(extra_environment or {}),
        **engine.environment,
        **_closed_to_others(engine),
    }
    return LaunchSpec(
        replica, sized.config.name, sized.task, target, tuple(argv), environment, cache if compiles else None
    )


def _vllm_arguments(
    sized: SizedModel, limits: EngineLimits, target: Slice, fit: SliceFit, engine: EngineConfig, *, guarded: bool
) -> list[str]:
    model = sized.config
    flags = {
        "--max-model-len": str(limits.max_model_len),
        "--max-num-seqs": str(limits.max_num_seqs),
        "--max-num-batched-tokens": str(limits.max_num_batched_tokens),
        "--gpu-memory-utilization": f"{limits.gpu_memory_utilization:g}",
        "--dtype": limits.dtype,
        "--kv-cache-dtype": limits.kv_cache_dtype,
    }
    if limits.quantization:
        flags["--quantization"] = limits.quantization
    if limits.block_tokens:
        flags["--block-size"] = str(limits.block_tokens)
    if pool := _kv_pool_bytes(limits, sized.footprint, target, fit):
        flags["--kv-cache-memory-bytes"] = str(pool)
    # The sizing's own arguments are for exactly these limits, so they win where both name one.
    sized_flags, switches = _flags(fit.engine_args)
    flags |= sized_flags
    if target.sharers > 1:
        share_ratio = float(flags["--gpu-memory-utilization"])
        flags["--gpu-memory-utilization"] = f"{utilization_of_card(target, share_ratio):g}"
    flags |= {"--shutdown-timeout": "{drain_seconds}"} | histogram_flags(limits.vllm_version)
    if model.revision:
        flags["--revision"] = model.revision
    if model.chat_template:
        flags["--chat-template"] = model.chat_template
    if sized.task == "embed":
        flags["--runner"] = "pooling"
    listen = ["--uds", "{uds}"] if engine.transport == "unix" else ["--host", "{host}", "--port", "{port}"]
    return [
        *("--model", sized.source),
        *("--served-model-name", model.name),
        *listen,
        *(_guard_arguments(engine) if guarded else ()),
        *(part for flag in flags.items() for part in flag),
        *switches,
        "--disable-uvicorn-access-log",
        *(["--trust-remote-code"] if model.trust_remote_code else []),
        *model.engine_args,
    ]


def _kv_pool_bytes(limits: EngineLimits, footprint: Footprint | None, target: Slice, fit: SliceFit) -> int | None:
    """The KV pool. On a CPU it is always set: vLLM would take a share of the whole machine's memory otherwise.

    What the estimate may be off stays free: vLLM measures nothing on a CPU, and whoever exceeds the slice is ended.
    """
    if limits.kv_cache_memory_bytes:
        return limits.kv_cache_memory_bytes
    if target.kind is not SliceKind.CPU or footprint is None:
        return None
    # A model without a KV cache (an embedding model) needs none, but without the flag vLLM refuses to start unless
    # `gpu_memory_utilization` of the machine's whole memory is free.
    wanted = max(footprint.kv_pool_bytes(limits.max_num_seqs), LEAST_POOL_BYTES)
    room = fit.available_kv_bytes - footprint.margin_bytes
    return min(wanted, room) if room > 0 else wanted


def kv_cache_tokens(sized: SizedModel, target: Slice, fit: SliceFit) -> int | None:
    """Tokens that the engine's KV pool holds, in requests of the model's whole length; None where that is not known."""
    limits, footprint = sized.limits, sized.footprint
    if limits is None or footprint is None or not footprint.kv_bytes_per_request:
        return None
    pool = _kv_pool_bytes(limits, footprint, target, fit) or fit.available_kv_bytes
    return max(0, pool * limits.max_model_len // footprint.kv_bytes_per_request) or None


def _flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`--name value`, `--name=value` and bare `--name`, told apart."""
    values: dict[str, str] = {}
    switches: list[str] = []
    for i, part in enumerate(arguments):
        if not part.startswith("--"):
            continue
        name, equals, value = part.partition("=")
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if equals:
            values[name] = value
        elif following.startswith("--"):
            switches.append(name)
        else:
            values[name] = following
    return values, switches


def _environment(target: Slice, engine: EngineConfig, cache: Path) -> dict[str, str]:
    environment = {"PYTHONUNBUFFERED": "1"} | {name: str(cache / place) for name, place in _CACHES.items()}
    if not engine.usage_reporting:
        environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if target.kind is SliceKind.CPU:
        return environment | {
            "CUDA_VISIBLE_DEVICES": "",
            "VLLM_CPU_OMP_THREADS_BIND": format_cores(target.cores),
            # vLLM 0.32's ahead-of-time cache fails to load on a CPU ("'function' object has no attribute
            # 'finalize_loading'") and every start compiles for over a minute; without it the other caches serve.
            "VLLM_USE_AOT_COMPILE": "0",
        }
    on_gpu = {name: str(cache / place) for name, place in _GPU_CACHES.items()}
    return environment | on_gpu | {"CUDA_VISIBLE_DEVICES": str(target.uuid), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _guard_arguments(engine: EngineConfig) -> list[str]:
    """vLLM's, on TCP: ask for the secret, encrypt, and take a renewed certificate for new connections."""
    if engine.transport != "tcp":
        return []
    guard = ["--middleware", MIDDLEWARE]
    if engine.tls is None:
        return guard
    pair = ["--ssl-certfile", str(engine.tls.certificate), "--ssl-keyfile", str(engine.tls.key)]
    return [*guard, *pair, "--enable-ssl-refresh"]


def _closed_to_others(engine: EngineConfig) -> dict[str, str]:
    """Where other machines reach an engine it is never in vLLM's development mode: no key guards `/sleep`, `/collective_rpc` and the like."""
    return {"VLLM_SERVER_DEV_MODE": "0"} if engine.network is not None and engine.transport == "tcp" else {}


def _custom_argv(sized: SizedModel, target: Slice, engine: EngineConfig, own_python: Path) -> list[str]:
    known = {
        "model": sized.source,
        "served_name": sized.config.name,
        "max_model_len": str(sized.max_model_len or ""),
        "max_num_seqs": str(sized.config.max_num_seqs),
        "task": sized.task,
        "cores": format_cores(target.cores),
        "python": str(own_python),
        "certificate": str(engine.tls.certificate) if engine.tls else "",
        "key": str(engine.tls.key) if engine.tls else "",
    }
    used = {token for part in engine.command for token in _TOKEN.findall(part)}
    _check_tokens(used, engine)
    if "max_model_len" in used and not known["max_model_len"]:
        raise ConfigError(
            f"engine.command needs the context length of {sized.config.name!r}, which is not known",
            where=f"models.{sized.config.name}.max_model_len",
            remedy="Set max_model_len for this model.",
        )
    return [
        _TOKEN.sub(lambda m: known.get(m.group(1), m.group(0)), part)
        for part in (*engine.command, *sized.config.engine_args)
    ]


def _check_tokens(used: Iterable[str], engine: EngineConfig) -> None:
    names = set(used)
    unknown = sorted(names - set(TOKENS))
    if unknown:
        raise ConfigError(
            f"engine.command has an unknown placeholder {{{unknown[0]}}}",
            where="engine.command",
            remedy=f"There are {', '.join(f'{{{t}}}' for t in TOKENS)}.",
        )
    listen, other = _LATE if engine.transport == "unix" else _LATE[::-1]
    if listen not in names or other in names:
        raise ConfigError(
            f"with transport: {engine.transport} the engine's command must hold {{{listen}}}, and not {{{other}}}",
            where="engine.command",
            remedy=f"Put {{{listen}}} where the engine takes its {'socket path' if listen == 'uds' else 'port'}, or change engine.transport.",
        )
    encrypts = engine.tls is not None and engine.transport == "tcp"
    if any((token in names) != encrypts for token in _OF_TLS):
        raise ConfigError(
            "the engine's command holds {certificate} and {key} exactly where it listens on TCP with engine.tls",
            where="engine.command",
            remedy="Put both where the engine takes its certificate and key (an engine without TLS cannot have engine.tls), or take them out.",
        )
